"""The main recipe: scoring, prompts and labels, every method from end to end on a tiny model, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
from support import running, training
from support.encoding import encode
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import ablate
from recipes import llama31_gsm8k as recipe

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

EMBEDDED_MODEL = recipe.RECIPE.embedded_model


def run(config: recipe.Config, root: Path, **settings: Any) -> dict[str, Any]:
    return running.run(recipe.RECIPE, config, root, quiet=True, **settings)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def tiny(model: str, **changes: Any) -> recipe.Config:
    settings: dict[str, Any] = {
        "model": model,
        "lr": 1e-2,
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
    ("output", "graded"),
    [
        ("so it is 3.\n#### 1,234", (True, True)),
        ("#### $1234.00", (True, True)),
        ("#### -1234", (True, False)),
        ("#### 1234\n#### 5", (True, True)),
        ("#### 5\n#### 1234", (True, False)),
        ("1234", (False, False)),
        ("#### ", (False, False)),
        ("", (False, False)),
    ],
)
def test_the_number_behind_the_first_mark_is_graded(output: str, graded: tuple[bool, bool]) -> None:
    assert recipe.grade({"answer": "1,200 + 34 = <<1200+34=1234>>1,234\n#### 1,234"}, output) == graded


# -- data -------------------------------------------------------------------------------------------------------------


def encoded(
    tokenizer: Any, problems: Sequence[dict[str, str]], size: int, max_length: int
) -> list[dict[str, list[int]]]:
    return encode(tokenizer, problems, recipe.RECIPE.prompt, recipe.RECIPE.answer, size, max_length)


def test_only_the_answer_and_its_end_carry_labels(tokenizer: Any) -> None:
    problem = {"question": "Tom has 3 pens and buys 4. How many?", "answer": "3+4=<<3+4=7>>7\n#### 7"}
    (example,) = encoded(tokenizer, [problem], size=1, max_length=200)
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
    examples = encoded(tokenizer, [long, short, long, short, short], size=2, max_length=60)
    assert len(examples) == 2
    assert all(len(example["input_ids"]) < 60 for example in examples)
    with pytest.raises(ValueError, match="no training example fits into --max-length 60"):
        encoded(tokenizer, [long], size=1, max_length=60)


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
        ("{", r"train\.jsonl, line 2: not valid JSON"),
        ('{"question": "q"}', r"line 2: no column answer"),
        ('{"question": "q", "answer": "7"}', r"problem 2: a reference answer should end in '#### number'"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "q", "answer": "#### 7"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        recipe.load_problems(recipe.Config(data=str(path)))


# -- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "lora-over-svd", "lora-over-mpo-r"])
def test_three_steps_leave_a_whole_run_folder(tmp_path: Path, tiny_model: str, method: str) -> None:
    result = run(tiny(tiny_model, method=method), tmp_path)
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


def test_an_interrupted_examination_asks_only_for_what_is_missing(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tiny_model, max_steps=1, eval_batch=2, seed=5)
    whole = run(config, tmp_path / "whole")
    asked = []

    class Counting(running.Generator):
        def __call__(self, prompts: Sequence[str], number: int = 0) -> list[str]:
            if len(asked) == 1:
                asked.append(number)
                raise KeyboardInterrupt
            asked.append(number)
            return super().__call__(prompts, number)

    monkeypatch.setattr(running, "Generator", Counting)
    monkeypatch.setattr(running, "_base_answers", {})
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, name="run")
    kept = tmp_path / "unfinished" / "run" / "answers" / "base.jsonl"
    assert len(kept.read_text().splitlines()) == 2
    resumed = run(config, tmp_path, name="run", resume=True)
    assert asked == [0, 1, 1, 0, 1], "the first batch of the base model's answers is not asked for again"
    for name in ("base", "trained"):
        texts = [(Path(each["folder"]) / "answers" / f"{name}.jsonl").read_text() for each in (whole, resumed)]
        assert texts[0] == texts[1]


def test_sampled_answers_have_greedy_ones_beside_them(tmp_path: Path, tiny_model: str) -> None:
    config = tiny(tiny_model, temperature=0.8, top_p=0.95, greedy_beside=True, max_steps=1)
    result = run(config, tmp_path)
    assert {"accuracy", "greedy_accuracy", "base_accuracy", "base_greedy_accuracy"} <= result["metrics"].keys()
    answers = Path(result["folder"]) / "answers"
    names = {"trained.jsonl", "trained-greedy.jsonl", "base.jsonl", "base-greedy.jsonl"}
    assert {path.name for path in answers.iterdir()} == names
    assert "| greedy |" in (answers.parent / "report.md").read_text()
    greedy = run(dataclasses.replace(config, temperature=0.0), tmp_path)
    texts = [(answers / "base-greedy.jsonl").read_text(), (Path(greedy["folder"]) / "answers/base.jsonl").read_text()]
    assert texts[0] == texts[1], "the greedy answers are those of a greedy run"
    assert texts[0] != (answers / "base.jsonl").read_text()


def test_an_interrupted_run_resumes_to_the_same_adapter(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tiny_model, method="lora-over-mpo-r", max_steps=4)
    whole = run(config, tmp_path / "whole")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "expansions", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path, name="run")
    work = tmp_path / "unfinished" / "run"
    assert json.loads((work / "result.json").read_text())["status"] == "cancelled"
    shutil.rmtree(work / "checkpoints" / "checkpoint-4")
    resumed = run(config, tmp_path, name="run", resume=True)
    first, second = (
        load_file(Path(run["folder"]) / "adapter" / "adapter_model.safetensors") for run in (whole, resumed)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed["matrices"] == whole["matrices"]
    assert resumed["curve"] == whole["curve"]
    again = run(config, tmp_path, name="run", resume=True)
    assert again["started"] == resumed["started"]


def test_the_command_line_compares_methods(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results").mkdir()
    committed = {
        "seeds": [0, 1],
        "steps": 7,
        "base_accuracy": 0.25,
        "methods": {"lora": {"accuracy": [0.5, 0.6], "lr": 0.02}},
    }
    (tmp_path / "results" / "llama31_gsm8k-laptop.json").write_text(json.dumps(committed))
    moved = dataclasses.replace(recipe.RECIPE, path=tmp_path / recipe.RECIPE.path.name)
    (tmp_path / "embedded").symlink_to(recipe.RECIPE.path.parent / "embedded")
    settings = dataclasses.asdict(tiny(tiny_model))
    given = ["train_size", "max_steps", "batch", "micro_batch", "max_new_tokens", "every", "top_n"]
    options = [part for name in given for part in (f"--{name.replace('_', '-')}", str(settings[name]))]
    recipe.main(moved, ["--method", "lora", "lora-over-mpo-r", "--runs", str(tmp_path), *options])
    printed = capsys.readouterr().out
    assert "55.0 ± 7.1 %" in printed.replace("\n", " ")
    assert "comparison-" in printed
    assert len([*tmp_path.glob("comparison-*.png")]) == 1
    others = ["--model", tiny_model, "--lr", "1e-2"]
    recipe.main(moved, ["--method", "lora", "--runs", str(tmp_path), *others, *options])
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
    ablate.main(["seeds", *common, "--lr", "1e-2", "--seeds", "0", "1", "--results", str(tmp_path / "results")])
    summary = json.loads((tmp_path / "results" / "llama31_gsm8k-laptop.json").read_text())
    assert len(summary["methods"]["lora"]["accuracy"]) == 2
    assert summary["methods"]["lora"]["std"] is not None


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "--model is 'nowhere': there is no such folder, and a hub id reads owner/name"),
        (["--data", "./nowhere"], "--data is './nowhere': there is no such folder or file"),
        (["--batch", "8", "--micro-batch", "3"], "--micro-batch is 3: it must divide --batch, which is 8"),
        (["--eval-split", "training"], "invalid choice: 'training' (choose from 'validation', 'test')"),
        (["--order", "1"], "--order is 1: give a whole number of at least 2"),
        (["--lr", "0"], "--lr is 0.0: give a number above 0"),
        (["--top-p", "2"], "--top-p is 2.0: give a share of at most 1"),
        (["--train-size", "0"], "--train-size is 0: give a whole number of at least 1"),
        (["--method", "lora-under"], "invalid choice: 'lora-under'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        recipe.main(recipe.RECIPE, ["--runs", str(tmp_path / "runs"), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the preset is refused where there is no GPU")
def test_the_paper_preset_asks_for_a_gpu() -> None:
    with pytest.raises(ValueError, match="needs a GPU and there is none; use --preset laptop"):
        recipe.RECIPE.resolve(recipe.PRESETS["paper"])


def test_rates_come_from_the_table_unless_given() -> None:
    config = recipe.Config(method="lora-over-mpo-r")
    resolved = recipe.RECIPE.resolve(config)
    assert (resolved.lr, resolved.core_lr) == recipe.LEARNING_RATES["laptop"]["lora-over-mpo-r"]
    given = recipe.RECIPE.resolve(dataclasses.replace(config, lr=0.5))
    assert (given.lr, given.core_lr) == (0.5, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vary", "--factor", "ordre", "2"], "--factor ordre 2: give one of"),
        (["vary", "--factor", "order", "two"], "invalid int value: 'two'"),
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


# -- the command line -------------------------------------------------------------------------------------------------

SCRIPT = recipe.RECIPE.path


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The recipe as a user starts it, from a folder that is not the repository's."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parent,
        env=variables | environment,
    )


@pytest.mark.parametrize("preset", list(recipe.PRESETS))
def test_help_tells_every_option_with_its_default_and_choices(preset: str) -> None:
    done = command("--help", "--preset", preset, COLUMNS="200")
    shown = " ".join(done.stdout.split())
    assert done.returncode == 0
    for field in dataclasses.fields(recipe.Config):
        assert f"--{field.name.replace('_', '-')}" in shown
        if field.name not in ("preset", "method"):
            default = getattr(recipe.PRESETS[preset], field.name)
            assert f"{field.metadata['help']} (default: {default})" in shown
        for choice in field.metadata.get("choices", ()):
            assert choice in shown


def test_help_waits_for_no_library_that_takes_seconds() -> None:
    """Importing torch alone takes longer than everything that the parser needs."""
    script = f"""
import runpy, sys
sys.argv = ["recipe", "--help"]
try:
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
except SystemExit:
    pass
print([name for name in ("torch", "peft", "datasets", "matplotlib", "tnadapt") if name in sys.modules])
"""
    # runpy does not put the script's folder on the path, as starting it does
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n{script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_another_model_asks_for_its_rate_and_tells_how_to_tune_it(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--runs", str(tmp_path / "runs"), "--method", "lora-over-mpo", "--model", tiny_model, "--max-steps", "7"]
    with pytest.raises(SystemExit):
        recipe.main(recipe.RECIPE, options)
    said = capsys.readouterr().err
    assert f"--lr is not given, and no rate of lora-over-mpo was tuned on {tiny_model}" in said
    assert not (tmp_path / "runs").exists()
    tuned = []
    monkeypatch.setattr(ablate, "run_cells", lambda cells, options: tuned.extend(cells) or sys.exit(0))
    words = shlex.split(said.partition("tune it: ")[2])
    assert words[:2] == ["python", "recipes/ablate.py"]
    monkeypatch.chdir(SCRIPT.parent.parent)
    with pytest.raises(SystemExit):
        ablate.main(words[2:])
    configs = [cell.configs[0] for cell in tuned]
    assert len({config.lr for config in configs}) >= 5
    for config in configs:
        assert (config.model, config.max_steps, config.method) == (tiny_model, 7, "lora-over-mpo")
        assert config.eval_split == "validation"


def test_a_wrong_layer_is_named_before_anything_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "evaluate", lambda *_: pytest.fail("evaluated"))
    with pytest.raises(SystemExit):
        recipe.main(recipe.RECIPE, ["--runs", str(tmp_path / "runs"), "--targets", "q_proj,w_proj"])
    said = capsys.readouterr().err
    assert "--targets is 'q_proj,w_proj': embedded has no linear layer w_proj" in said
    assert "it has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in said
    assert not (tmp_path / "runs").exists()


def test_a_file_of_data_lends_its_end_to_be_evaluated(tmp_path: Path) -> None:
    problems = [{"question": f"q{number}", "answer": f"#### {number}"} for number in range(10)]
    write_jsonl(tmp_path / "mine.jsonl", problems)
    write_jsonl(tmp_path / "other.jsonl", problems[:2])
    config = recipe.Config(data=str(tmp_path / "mine.jsonl"), eval_size=3)
    for split in ("test", "validation"):
        train, evaluation = recipe.load_problems(dataclasses.replace(config, eval_split=split))
        assert [problem["question"] for problem in evaluation] == ["q7", "q8", "q9"]
        assert [problem["question"] for problem in train] == [f"q{number}" for number in range(7)]
    train, evaluation = recipe.load_problems(dataclasses.replace(config, test_data=str(tmp_path / "other.jsonl")))
    assert [problem["question"] for problem in evaluation] == ["q0", "q1"]
    assert len(train) == 10
    with pytest.raises(ValueError, match=r"no problem left to train on; lower --eval-size \(10\)"):
        recipe.load_problems(dataclasses.replace(config, eval_size=10))


def test_a_run_trains_on_a_file(tmp_path: Path, tiny_model: str) -> None:
    problems = [{"question": f"q{number}", "answer": f"#### {number}"} for number in range(10)]
    write_jsonl(tmp_path / "mine.jsonl", problems)
    result = run(tiny(tiny_model, data=str(tmp_path / "mine.jsonl"), eval_size=2), tmp_path)
    assert (result["metrics"]["training_examples"], result["metrics"]["problems"]) == (8, 2)


@pytest.mark.parametrize(
    "option", ["--model", *(pytest.param(o, marks=pytest.mark.slow) for o in ("--data", "--test-data"))]
)
def test_a_hub_id_without_network_is_one_clear_line(tmp_path: Path, option: str) -> None:
    arguments = [option, "nobody/nothing", "--lr", "1e-3", "--method", "lora", "--runs", str(tmp_path)]
    done = command(*arguments, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 2, done.stderr
    said = done.stderr.strip().splitlines()
    assert len(said) == 1, done.stderr
    assert said[0].startswith(f"error: {option} is nobody/nothing, which cannot be had from the hub: no network")


class GatedHub(BaseHTTPRequestHandler):
    """Refuses everything as the hub refuses a model whose terms were not accepted."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to model nobody/nothing is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["gated", "nobody answers"])
def test_a_model_that_the_hub_does_not_give_is_one_clear_line(tmp_path: Path, there: bool) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), GatedHub) as server:
        hub = f"http://127.0.0.1:{server.server_port}"
        if there:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        else:
            server.server_close()
        arguments = ["--model", "nobody/nothing", "--lr", "1e-3", "--method", "lora", "--runs", str(tmp_path / "runs")]
        done = command(*arguments, HF_ENDPOINT=hub, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "cache"))
        if there:
            server.shutdown()
    said = done.stderr.strip().splitlines()
    assert (done.returncode, len(said)) == (2, 1), done.stderr
    assert said[0].startswith("error: --model is nobody/nothing, which cannot be had from the hub: no network")
    assert "access not granted (then run `hf auth login`); a local folder works without" in said[0]
    assert not list((tmp_path / "runs").glob("*/result.json"))


def test_a_second_run_says_what_it_does_with_the_first(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tiny_model, max_steps=1)

    def said(resume: bool) -> str:
        capsys.readouterr()
        running.run(recipe.RECIPE, config, tmp_path, "mine", resume)
        return capsys.readouterr().out

    assert "holds this run" not in said(resume=False)
    assert f"{tmp_path / 'mine'} holds this run, finished: it is kept and not repeated." in said(resume=True)
    assert f"{tmp_path / 'mine'} holds this run, finished: it is repeated, and replaced when" in said(resume=False)
    unfinished = tmp_path / "unfinished" / "mine"
    shutil.copytree(tmp_path / "mine", unfinished)
    shutil.rmtree(tmp_path / "mine")
    assert f"{unfinished} holds this run, unfinished: it is moved to {unfinished}--2, and" in said(resume=False)
    assert (tmp_path / "unfinished" / "mine--2").is_dir()
    shutil.move(tmp_path / "mine", unfinished)
    assert f"{unfinished} holds this run, unfinished: it goes on from its last checkpoint." in said(resume=True)
