"""The main recipe: scoring, prompts and labels, every method from end to end on a tiny model, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipes import ablate
from recipes import llama31_gsm8k as recipe

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

METHODS = list(recipe.METHODS)
EMBEDDED_MODEL = recipe.HERE / "embedded" / "model"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """A random Llama of two layers, in a folder."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny(model: str, **changes: Any) -> recipe.Config:
    settings: dict[str, Any] = {
        "model": model,
        "train_size": 24,
        "eval_size": 4,
        "max_steps": 3,
        "batch": 4,
        "micro_batch": 2,
        "order": 4,
        "top_n": 1,
        "split": 1,
        "every": 1,
        "max_new_tokens": 4,
        "save_every": 2,
    }
    return dataclasses.replace(recipe.Config(), **(settings | changes))


# -- scoring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 3.\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("#### 1,234,567.50", "1234567.50"),
        ("#### -5", "-5"),
        ("#### −5", "-5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### $3.50 for each", "3.50"),
        ("#### .5", "0.5"),
        ("#### 12.", "12"),
        ("#### 70%", "70"),
        ("#### 4\n#### 5\n#### 6", "6"),
        ("#### 4\n#### none", "4"),
        ("####18", "18"),
        ("#### 18.0", "18"),
        ("<<4*6=24>>24 pens", None),
        ("#### ", None),
        ("", None),
        ("18", None),
        ("#### 1/2", None),
        ("#### 12,34", None),
        ("#### 1.2.3", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert recipe.final_number(text) == (None if number is None else Decimal(number))


# -- data -------------------------------------------------------------------------------------------------------------


def test_only_the_answer_and_its_end_carry_labels(tokenizer: Any) -> None:
    problem = {"question": "Tom has 3 pens and buys 4. How many?", "answer": "3+4=<<3+4=7>>7\n#### 7"}
    (example,) = recipe.tokenize(tokenizer, [problem], size=1, max_length=200)
    labelled = [token for token in example["labels"] if token != -100]
    prompt = example["input_ids"][: -len(labelled)]
    assert tokenizer.decode(prompt) == "Q: Tom has 3 pens and buys 4. How many?\nA: "
    assert tokenizer.decode(labelled[:-1]) == problem["answer"]
    assert labelled[-1] == tokenizer.eos_token_id
    assert example["input_ids"][-len(labelled) :] == labelled
    assert len(example["labels"]) == len(example["input_ids"])


def test_long_problems_are_left_out_and_the_next_ones_taken(tokenizer: Any) -> None:
    short = {"question": "What is 1 plus 1?", "answer": "#### 2"}
    long = {"question": "What is 1 plus 1? " * 50, "answer": "#### 2"}
    examples = recipe.tokenize(tokenizer, [long, short, long, short, short], size=2, max_length=60)
    assert len(examples) == 2
    assert all(len(example["input_ids"]) < 60 for example in examples)
    with pytest.raises(ValueError, match="no training problem fits into --max-length 60"):
        recipe.tokenize(tokenizer, [long], size=1, max_length=60)


def test_metamath_is_cut_as_its_other_users_cut_it() -> None:
    row = {
        "type": "GSM_Rephrased",
        "query": "Q?",
        "original_question": "O?",
        "response": "Two.\n#### 2\nThe answer is: 2",
    }
    assert recipe.from_metamath(row) == {"question": "Q?", "answer": "Two.\n#### 2", "source": "O?"}
    assert recipe.from_metamath(row | {"type": "MATH_Rephrased"}) is None


def write_jsonl(path: Path, problems: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))


def test_a_folder_without_validation_split_lends_the_end_of_its_training_problems(tmp_path: Path) -> None:
    problems = [{"question": f"q{number}", "answer": f"#### {number}"} for number in range(10)]
    write_jsonl(tmp_path / "train.jsonl", problems)
    write_jsonl(tmp_path / "test.jsonl", problems[:1])
    config = dataclasses.replace(recipe.Config(), data=str(tmp_path), eval_split="validation", eval_size=3)
    train, evaluation = recipe.load_problems(config)
    assert [problem["question"] for problem in evaluation] == ["q7", "q8", "q9"]
    assert [problem["question"] for problem in train] == [f"q{number}" for number in range(7)]
    write_jsonl(tmp_path / "validation.jsonl", problems[2:4])
    train, evaluation = recipe.load_problems(config)
    assert [problem["question"] for problem in evaluation] == ["q2", "q3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"train\.jsonl, line 2: not an object"),
        ('{"question": "q"}', r"line 2: not an object with question and answer"),
        ('{"question": "q", "answer": "7"}', r"line 2: the answer does not end in '#### number'"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "q", "answer": "#### 7"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        recipe.read_jsonl(path, needed=True)


# -- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_three_steps_leave_a_whole_run_folder(tmp_path: Path, tiny_model: str, method: str) -> None:
    result = recipe.run(tiny(tiny_model, method=method), tmp_path, quiet=True)
    folder = Path(result["folder"])
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter", "result.json", "report.md", "loss.png", "predictions.jsonl"}
    assert ("expansions.png" in names) == (method != "lora")
    assert "checkpoints" not in names
    written = json.loads((folder / "result.json").read_text())
    assert written["status"] == "finished"
    assert written["metrics"]["steps"] == 3
    assert written["metrics"]["tokens"] > 0
    assert (written["metrics"]["trained_parameters"] > written["metrics"]["lora_parameters"]) == (method != "lora")
    expanded = {matrix["name"] for matrix in written["matrices"] if matrix["expanded_at"] is not None}
    assert len(expanded) == {"lora": 0, "lora-over-mpo-r": 8}.get(method, 16)
    assert "## What next" in (folder / "report.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert PeftModel.from_pretrained(base, folder / "adapter").peft_config["default"].peft_type == "LORA"


def test_an_interrupted_run_resumes_to_the_same_adapter(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tiny_model, method="lora-over-mpo-r", max_steps=4)
    whole = recipe.run(config, tmp_path / "whole", quiet=True)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "expansions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recipe.run(config, tmp_path, name="run", quiet=True)
    work = tmp_path / "unfinished" / "run"
    assert json.loads((work / "result.json").read_text())["status"] == "cancelled"
    shutil.rmtree(work / "checkpoints" / "checkpoint-4")
    resumed = recipe.run(config, tmp_path, name="run", resume=True, quiet=True)
    first, second = (
        load_file(Path(run["folder"]) / "adapter" / "adapter_model.safetensors") for run in (whole, resumed)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed["matrices"] == whole["matrices"]
    assert resumed["curve"] == whole["curve"]
    again = recipe.run(config, tmp_path, name="run", resume=True, quiet=True)
    assert again["started"] == resumed["started"]


def test_the_command_line_compares_methods(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = {"seeds": [0, 1], "steps": 7, "base_accuracy": 0.25, "methods": {"lora": {"accuracy": [0.5, 0.6]}}}
    (tmp_path / "committed.json").write_text(json.dumps(committed))
    monkeypatch.setattr(recipe, "COMMITTED", tmp_path / "committed.json")
    settings = dataclasses.asdict(tiny(tiny_model))
    given = ["train_size", "eval_size", "max_steps", "batch", "micro_batch", "max_new_tokens", "every", "top_n"]
    options = [part for name in given for part in (f"--{name.replace('_', '-')}", str(settings[name]))]
    recipe.main(["--method", "lora", "lora-over-mpo-r", "--runs", str(tmp_path), *options])
    printed = capsys.readouterr().out
    assert "55.0 ± 7.1 %" in printed
    assert "comparison-" in printed
    assert len([*tmp_path.glob("comparison-*.png")]) == 1
    recipe.main(["--method", "lora", "--runs", str(tmp_path), "--model", tiny_model, *options])
    assert "55.0 ± 7.1 %" not in capsys.readouterr().out, "the table is of the embedded model"


def test_the_tuner_marks_the_best_rate_and_warns_at_the_edge(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--runs", str(tmp_path), "--model", tiny_model, "--max-steps", "1", "--eval-size", "2", "--batch", "2"]
    common += ["--micro-batch", "2", "--max-new-tokens", "2", "--train-size", "4", "--methods", "lora"]
    ablate.main(["tune", *common, "--lrs", "1e-3", "1e-2", "--eval-split", "validation"])
    printed = capsys.readouterr().out
    assert "of the grid; the optimum may lie outside" in printed
    (table,) = (tmp_path / "ablations").glob("tune-*/table.json")
    assert [row["value"] for row in json.loads(table.read_text())["rows"]] == [1e-3, 1e-2]
    ablate.main(["seeds", *common, "--seeds", "0", "1", "--results", str(tmp_path / "results")])
    summary = json.loads((tmp_path / "results" / "llama31_gsm8k-laptop.json").read_text())
    assert len(summary["methods"]["lora"]["accuracy"]) == 2
    assert summary["methods"]["lora"]["std"] is not None


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "--model is 'nowhere': there is no such folder, and a hub id reads owner/name"),
        (["--data", "./nowhere"], "--data is './nowhere': there is no such folder"),
        (["--batch", "8", "--micro-batch", "3"], "--micro-batch is 3: it must divide --batch, which is 8"),
        (["--eval-split", "training"], "--eval-split is 'training': choose one of validation, test"),
        (["--order", "1"], "--order is 1: give a whole number of at least 2"),
        (["--lr", "0"], "--lr is 0.0: give a number above 0"),
        (["--top-p", "2"], "--top-p is 2.0: give a share of at most 1"),
        (["--train-size", "0"], "--train-size is 0: give a whole number of at least 1"),
        (["--method", "dora"], "invalid choice: 'dora'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        recipe.main(["--runs", str(tmp_path / "runs"), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the preset is refused where there is no GPU")
def test_the_paper_preset_asks_for_a_gpu() -> None:
    with pytest.raises(ValueError, match="needs a GPU and there is none; use --preset laptop"):
        recipe.PRESETS["paper"].resolved()


def test_rates_come_from_the_table_unless_given() -> None:
    config = dataclasses.replace(recipe.Config(), method="lora-over-mpo-r")
    assert (config.resolved().lr, config.resolved().core_lr) == recipe.LEARNING_RATES["laptop"]["lora-over-mpo-r"]
    given = dataclasses.replace(config, lr=0.5).resolved()
    assert (given.lr, given.core_lr) == (0.5, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vary", "--factor", "ordre", "2"], "--factor ordre 2: give one of"),
        (["vary", "--factor", "order", "two"], "'two' is no int"),
        (["tune", "--lrs", "-1"], "--lr is -1.0: give a number above 0"),
        (["--recipe", "none.py", "seeds"], "--recipe is none.py, which does not exist"),
    ],
)
def test_the_driver_refuses_before_any_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        ablate.main([*arguments, "--runs", str(tmp_path / "runs")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
