"""The recipe for prompts and answers of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from support import running

from recipes import text_pairs as recipe

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def write(folder: Path, **splits: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"number {n} plus 1?", "answer": str(n + 1)} for n in range(start, start + count)]


def test_splits_of_a_folder_and_what_is_held_out_of_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", train=pairs(20), test=pairs(5, 100))
    given: dict[str, Any] = {"data": str(folder), "eval_size": 4}
    train, evaluation = recipe.load_pairs(recipe.Config(**given))
    assert (train, evaluation) == (pairs(20), pairs(4, 100))
    train, evaluation = recipe.load_pairs(recipe.Config(**given, eval_split="validation"))
    assert (train, evaluation) == (pairs(16), pairs(4, 16)), "the end of the training records, which are not trained on"
    write(folder, validation=pairs(3, 50))
    train, evaluation = recipe.load_pairs(recipe.Config(**given, eval_split="validation"))
    assert (train, evaluation) == (pairs(20), pairs(3, 50))
    alone = folder / "train.jsonl"
    train, evaluation = recipe.load_pairs(recipe.Config(data=str(alone), eval_size=4))
    assert (train, evaluation) == (pairs(16), pairs(4, 16))


def test_the_embedded_problems_are_pairs_too() -> None:
    train, evaluation = recipe.load_pairs(recipe.Config(train_size=6, eval_size=3))
    assert (len(train), len(evaluation)) == (6, 3)
    assert all(record.keys() == {"prompt", "answer"} for record in [*train, *evaluation])
    assert not {record["prompt"] for record in train} & {record["prompt"] for record in evaluation}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}], "line 1"),
        ([*pairs(2), "{broken"], "line 3"),
        ([], "holds no record; every line should be an object with prompt, answer"),
    ],
)
def test_broken_data_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    folder = write(tmp_path / "data", train=rows, test=pairs(2))
    with pytest.raises(ValueError, match=message):
        recipe.load_pairs(recipe.Config(data=str(folder), eval_size=2))


def test_data_that_are_neither_a_folder_nor_a_file() -> None:
    with pytest.raises(ValueError, match=r"--data is owner/name: give a folder with train.jsonl"):
        recipe.load_pairs(recipe.Config(data="owner/name"))


def test_an_answer_is_right_word_for_word() -> None:
    assert recipe.grade({"answer": "a b"}, " a b\n") == (True, True)
    assert recipe.grade({"answer": "a b"}, "a  b") == (True, False)
    assert recipe.grade({"answer": "a b"}, " ") == (False, False)


def test_it_trains_on_ones_own_pairs(tmp_path: Path, tiny_model: str) -> None:
    folder = write(tmp_path / "data", train=pairs(8), test=pairs(2, 8))
    config = recipe.Config(
        **{
            "model": tiny_model,
            "data": str(folder),
            "method": "lora-over-svd",
            "lr": 1e-2,
            "batch": 4,
            "micro_batch": 4,
        },
        **{"train_size": 8, "eval_size": 2, "max_steps": 4, "max_new_tokens": 2},
    )
    result = running.run(recipe.RECIPE, config, tmp_path / "runs", quiet=True)
    assert result["metrics"]["steps"] == 4
    assert len(result["losses"]) == 2
    assert result["curve"][-1][1] < result["curve"][0][1]
