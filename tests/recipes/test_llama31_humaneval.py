"""The recipe of HumanEval: its generated programs, and answers that are kept first and executed only when that is asked for."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from embedded import programs
from support import running
from support.evaluation import humaneval

from recipes import llama31_humaneval as recipe

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def configuration(model: str, **changes: Any) -> recipe.Config:
    settings: dict[str, Any] = {
        "model": model,
        "lr": 1e-2,
        "train_size": 8,
        "eval_size": 3,
        "max_steps": 1,
        "batch": 4,
        "micro_batch": 2,
        "max_new_tokens": 4,
    }
    return dataclasses.replace(recipe.Config(), **(settings | changes))


class Solves:
    """A generator that writes the solution of every problem but the first, whose answer it gets wrong."""

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int, sampling: Any) -> None:
        problems = programs.problems("test", 3)
        self.answers = {recipe.prompts.humaneval_prompt(problem): problem for problem in problems}
        self.wrong = problems[0]["task_id"]

    def __call__(self, prompts: Sequence[str], number: int) -> list[str]:
        problems = [self.answers[prompt] for prompt in prompts]
        return [
            f"{problem['prompt']}    return None\n```" if problem["task_id"] == self.wrong
            else f"{problem['prompt']}{problem['canonical_solution']}```"
            for problem in problems
        ]  # fmt: skip


# -- generated programs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_solutions_pass_their_tests_and_other_solutions_do_not(split: str) -> None:
    problems = programs.problems(split, 40)
    for problem, other in zip(problems, problems[1:] + problems[:1], strict=True):
        namespace: dict[str, Any] = {}
        exec(problem["prompt"] + problem["canonical_solution"] + problem["test"], namespace)
        namespace["check"](namespace[problem["entry_point"]])
        exec(problem["prompt"] + other["canonical_solution"], namespace)
        with pytest.raises(AssertionError):
            namespace["check"](namespace[problem["entry_point"]])


def test_splits_share_no_program_and_longer_lists_continue_shorter_ones() -> None:
    texts = {
        split: {p["prompt"].partition('"""')[2] for p in programs.problems(split, 300)} for split in ("train", "test")
    }
    assert not texts["train"] & texts["test"]
    assert all(len(each) == 300 for each in texts.values())
    assert programs.problems("test", 9)[:4] == programs.problems("test", 4)
    assert programs.examples("train", 9)[:4] == programs.examples("train", 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("tests", 1), "split is 'tests'; choose one of"), (("test", -1), "n is -1"), (("test", 10**6), "ask for fewer")],
)
def test_what_cannot_be_generated_is_refused(arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        programs.problems(*arguments)


# -- answers and execution --------------------------------------------------------------------------------------------


def test_code_is_executed_only_when_that_is_asked_for(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("no bubblewrap")
    monkeypatch.setattr(running, "Generator", Solves)
    config = configuration(tiny_model)
    with monkeypatch.context() as patch:
        patch.setattr(humaneval, "Sandbox", lambda *_: pytest.fail("executed"))
        result = running.run(recipe.RECIPE, config, tmp_path, "run", quiet=True)
    folder = Path(result["folder"])
    assert result["metrics"]["accuracy"] is None
    assert result["metrics"]["format_rate"] == 1.0
    assert "add --resume --execute" in (folder / "report.md").read_text()
    answers = [json.loads(line) for line in (folder / "answers" / "trained.jsonl").read_text().splitlines()]
    assert len(answers) == 3
    with monkeypatch.context() as patch:
        patch.setattr(running, "load_model", lambda *_: pytest.fail("the model is not needed to score"))
        execute = dataclasses.replace(config, execute=True)
        scored = running.run(recipe.RECIPE, execute, tmp_path, "run", resume=True, quiet=True)
    assert scored["metrics"]["accuracy"] == scored["metrics"]["base_accuracy"] == pytest.approx(2 / 3)
    assert scored["started"] == result["started"], "it is not trained again"
    written = json.loads((folder / "result.json").read_text())
    assert written["metrics"] == scored["metrics"]
    assert "66.7 %" in (folder / "report.md").read_text()
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in rows] == [False, True, True]


def test_a_missing_answer_is_no_silent_score(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "Sandbox", lambda: None)
    config = configuration(tiny_model)
    result = running.run(recipe.RECIPE, config, tmp_path, "run", quiet=True)
    (Path(result["folder"]) / "answers" / "trained.jsonl").unlink()
    with pytest.raises(ValueError, match="lacks an answer"):
        running.run(recipe.RECIPE, dataclasses.replace(config, execute=True), tmp_path, "run", resume=True, quiet=True)


def test_without_a_sandbox_execution_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from support.evaluation import sandbox

    monkeypatch.setattr(sandbox.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ValueError, match="executed only under bubblewrap"):
        recipe.RECIPE.resolve(recipe.Config(lr=1e-3, execute=True))


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ('def f(x):\n    """Do it."""\n', False),
        ('def f(x):\n    """Do it."""\n    return x\n', True),
        ('def f(x):\n    """Do it."""\n\ndef f(x):\n    return x\n', True),
        ('def f(x):\n    """Do it."""\n    return x +\n', False),
        ("x = 1\n", False),
    ],
)
def test_a_well_formed_answer_goes_beyond_the_prompt(source: str, written: bool) -> None:
    assert recipe.is_written(source, "f") is written


# -- data -------------------------------------------------------------------------------------------------------------


def test_files_are_read_as_the_real_ones_are(tmp_path: Path) -> None:
    rows = [{"query": "Add.", "answer": "So:\n```python\nx\n```\nDone."}, {"query": "Why?", "answer": "No code."}]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = programs.problems("test", 2)
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(problem) + "\n" for problem in problems))
    config = recipe.Config(data=str(tmp_path / "code.jsonl"), test_data=str(tmp_path / "HumanEval.jsonl.gz"))
    train, evaluation = recipe.load_problems(config)
    assert [example["answer"] for example in train] == ["So:\n```python\nx\n```"]
    assert evaluation == problems
    with pytest.raises(ValueError, match=r"there are no test problems in .*; give HumanEval's problem file"):
        recipe.load_problems(dataclasses.replace(config, test_data=str(tmp_path)))
