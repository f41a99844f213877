"""`make gpu`: steps that go on where they were cut off, results that say where they come from, and packages for a machine without a
network. The steps here are of a line each; those of the repository are run by the tests of benchmarks."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from recipes.support.provenance import read_json

ROOT = Path(__file__).parents[1]
WRITES = "import pathlib, sys; pathlib.Path(sys.argv[2], 'found.json').write_text('{\"x\": 1}'); print('said')"
SEEN = {"torch": "2.13.0", "cuda": "13.0", "python": "3.12.3", "cpus": 16, "device": "NVIDIA H100 80GB HBM3"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    for folder in ("recipes", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module


@pytest.fixture
def gpu(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, on a machine with a GPU as far as it can tell, and with steps of a line."""
    script: ModuleType = load("gpu")
    script_file = tmp_path / "benchmark.py"
    script_file.write_text(WRITES.replace("sys.argv[2]", "sys.argv[sys.argv.index('--output') + 1]"))

    class Benchmark(script.Step):  # type: ignore[name-defined, misc]
        is_benchmark = True

    good = Benchmark([str(script_file)], 1)
    steps = {"good": good, "bad": script.Step(["-c", "raise SystemExit(3)"], 1), "good too": good}
    monkeypatch.setattr(script, "STEPS", steps)
    monkeypatch.setattr(script, "python_with_gpu", lambda *_: (sys.executable, SEEN))
    monkeypatch.setattr(script, "RESULTS", tmp_path / "kept")
    return script


def test_a_step_leaves_its_result_and_is_not_run_again(gpu: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    where = ["--results", str(tmp_path / "out"), "--steps"]
    assert gpu.main([*where, "good"]) == 0
    file = tmp_path / "out" / "nvidia-h100-80gb-hbm3" / "good.json"
    result = read_json(file)
    assert result["results"] == {"found.json": {"x": 1}}
    assert result["output"] == "said\n"
    assert result["code"] == gpu.code_hash()
    assert result["provenance"].keys() >= {"commit", "device", "driver", "torch", "cuda", "time"}
    assert result["command"][-2:] == ["--device", "cuda"]
    written = file.stat().st_mtime_ns
    assert gpu.main([*where, "good", "good too"]) == 0
    assert file.stat().st_mtime_ns == written
    assert "good: done" in capsys.readouterr().out
    # results that are in the repository count, on whichever machine they were made
    (tmp_path / "out").rename(tmp_path / "kept")
    assert gpu.main([*where, "good"]) == 0
    assert not (tmp_path / "out").exists()
    # of another code or size they do not
    monkeypatch.setattr(gpu, "code_hash", lambda: "other")
    assert gpu.main([*where, "good"]) == 0
    assert read_json(file)["code"] == "other"


def test_what_fails_is_told_and_tried_again_while_the_others_run(gpu: Any, tmp_path: Path, capsys: Any) -> None:
    assert gpu.main(["--results", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "bad: ended with 3" in out
    assert out.endswith("failed: bad\n")
    assert sorted(file.name for file in tmp_path.rglob("good*.json")) == ["good too.json", "good.json"]
    assert gpu.main(["--results", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("ended with") == 1


def test_no_step_begins_for_which_no_time_is_left(gpu: Any, tmp_path: Path, capsys: Any) -> None:
    assert gpu.main(["--results", str(tmp_path), "--within", "0.5"]) == 1
    assert "no time left for: good, bad, good too" in capsys.readouterr().out


def test_a_step_that_hangs_is_stopped_with_what_it_has_started(load: Any, tmp_path: Path) -> None:
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    script = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.perf_counter()
    status, said = load("gpu").run([sys.executable, "-c", script], {}, 1.5)
    assert status is None
    assert time.perf_counter() - started < 4
    assert said in ("begun\n", "")  # a busy machine may not come to it
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_of_a_progress_bar_the_end_is_kept(load: Any) -> None:
    script = "print('1 of 2\\r2 of 2'); print('done')"
    assert load("gpu").run([sys.executable, "-c", script], {}, 60)[1] == "2 of 2\ndone\n"


def test_a_machine_without_a_gpu_is_told_so_in_one_sentence(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        "--results",
        str(tmp_path),
        "--wheels",
        str(tmp_path),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin"}, check=False
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.startswith("There is no GPU here that torch sees (torch ")
    assert done.stderr.count("\n") == 1


def test_the_hash_of_the_code_knows_code_from_results(load: Any, tmp_path: Path) -> None:
    gpu = load("gpu")
    assert all((ROOT / name).exists() for name in gpu.CODE)
    for name in gpu.CODE:
        place = tmp_path / name
        (place.parent if name.endswith(".py") else place).mkdir(parents=True, exist_ok=True)
    file = tmp_path / gpu.CODE[0] / "a.py"
    file.write_text("1")
    for name in gpu.CODE:
        if name.endswith(".py"):
            (tmp_path / name).write_text("")
    before = gpu.code_hash(tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir()
    (tmp_path / "benchmarks" / "results" / "x.json").write_text("{}")
    (tmp_path / "README.md").write_text("")
    assert gpu.code_hash(tmp_path) == before
    file.write_text("2")
    assert gpu.code_hash(tmp_path) != before


def test_every_step_is_a_command_of_the_repository(load: Any) -> None:
    gpu = load("gpu")
    for name, step in gpu.STEPS.items():
        place = step.command[0] if step.is_benchmark else step.command[-1]
        assert (ROOT / place).exists(), name
        assert step.seconds < gpu.LIMIT <= 600
        if step.is_benchmark:
            source = (ROOT / place).read_text()
            assert all(option in source for option in ('"--device"', '"--quick"', '"--output"')), name


# -- packages ---------------------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, version: str = "1.0") -> Path:
    """A wheel of one module."""
    stem = f"{name}-{version}"
    file = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.py", "here = True\n")
        archive.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return file


def test_what_a_python_lacks_or_has_older_is_installed_beside_it_and_torch_never_is(load: Any, tmp_path: Path) -> None:
    wheels = load("wheels")
    files = [wheel(tmp_path, name) for name in ("nowhere_else", "pytest", "torch", "nvidia_cublas_cu12", "triton")]
    files.append(wheel(tmp_path, "hypothesis", "9999.0"))
    site = tmp_path / "site"
    found = wheels.lacking(sys.executable, files, site)
    assert found.pop().name == "hypothesis-9999.0-py3-none-any.whl"
    assert [file.name for file in found] == ["nowhere_else-1.0-py3-none-any.whl"]
    wheels.install(sys.executable, found, site)
    assert wheels.lacking(sys.executable, found, site) == []
    script = "import nowhere_else, sys; print(nowhere_else.here)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(site)},
        check=True,
    )
    assert done.stdout == "True\n"


def test_wheels_without_torch_make_no_environment(load: Any, tmp_path: Path) -> None:
    wheel(tmp_path, "torchvision_like")
    assert load("wheels").environment_with_torch(tmp_path, tmp_path / "venv") is None
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("torch", [False, True])
def test_wheels_are_downloaded_for_the_machine_that_they_are_for(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torch: bool
) -> None:
    wheels = load("wheels")
    commands: list[list[str]] = []
    offered: list[str] = []

    def pip(command: list[str], **_: Any) -> None:
        commands.append(command)
        if "--report" in command:
            found = ["torch", "PEFT", "triton"] if torch else ["torch", "PEFT"]
            install = [{"metadata": {"name": name, "version": "1.0"}} for name in found]
            Path(command[command.index("--report") + 1]).write_text(json.dumps({"install": install}))
        if "--find-links" in command:
            (file,) = Path(command[command.index("--find-links") + 1]).glob("*.whl")
            offered.append(file.name)
            with zipfile.ZipFile(file) as archive:
                about = archive.read(f"{file.name.removesuffix('-py3-none-any.whl')}.dist-info/METADATA").decode()
            assert "Name: torch\nVersion: 2.13.0+stand.in\n" in about
            assert "Requires-Dist" not in about

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    old, other = wheel(tmp_path, "peft"), wheel(tmp_path, "rich")
    pins = tmp_path / "constraints.txt"
    pins.write_text("peft==1.0\ntorch==2.13.0\ntorchmetrics==1.9.0\n")
    chosen = wheels.download(tmp_path, ["peft"], "3.12", pins, torch)
    assert chosen == (["torch==1.0", "peft==1.0", "triton==1.0"] if torch else ["peft==1.0"])
    # where torch is not wanted, pip finds one that needs nothing
    assert offered == ([] if torch else ["torch-2.13.0+stand.in-py3-none-any.whl"])
    for command in commands:
        assert command[command.index("--python-version") + 1] == "3.12"
        assert "manylinux_2_28_x86_64" in command
    assert commands[-1][-len(chosen) :] == chosen
    # two versions of one package would stop the whole installation
    assert (old.exists(), other.exists()) == (False, True)


# -- the recipe at full size ------------------------------------------------------------------------------------------


def test_problems_of_the_recipe_are_as_long_as_asked_for(load: Any) -> None:
    pytest.importorskip("peft")
    recipe = load("recipe")
    from recipes.support.evaluation.gsm8k import marked_number

    def tokenizer(text: str) -> dict[str, list[str]]:
        return {"input_ids": text.split()}

    found = list(recipe.problems("train", 20, (60, 200), tokenizer))
    lengths = [len(f"{problem['question']} {problem['answer']}".split()) for problem in found]
    assert len(found) == 20
    assert 40 < sum(lengths) / 20 < 200
    assert max(lengths) > 100
    # as many marks as problems, one of which is the answer
    assert all(
        problem["answer"].count("####") == 1 and marked_number(problem["answer"]) is not None for problem in found
    )
    assert found == list(recipe.problems("train", 20, (60, 200), tokenizer))


@pytest.mark.parametrize("method", ["lora", "lora-over-mpo-r"])
def test_the_recipe_is_started_with_its_paper_preset_and_all_rounds(load: Any, tmp_path: Path, method: str) -> None:
    pytest.importorskip("peft")
    recipe = load("recipe")
    import llama31_gsm8k
    from support.command_line import config_from, options_of

    command = recipe.command_of(method, tmp_path, tmp_path, tmp_path, recipe.Size(), quick=False)
    assert Path(command[0]).name == "llama31_gsm8k.py"
    parser = options_of(llama31_gsm8k.RECIPE, "paper", llama31_gsm8k.RECIPE.several)
    options, rest = parser.parse_known_args(command[1:])
    assert rest == ["--method", method, "--runs", str(tmp_path), "--name", "benchmark"]
    config = config_from(llama31_gsm8k.RECIPE, options, method=method)
    paper = llama31_gsm8k.PRESETS["paper"]
    for field in (
        "batch",
        "micro_batch",
        "max_length",
        "order",
        "top_n",
        "split",
        "dtype",
        "eval_batch",
        "temperature",
    ):
        assert getattr(config, field) == getattr(paper, field), field
    assert recipe.Size().new_tokens == paper.max_new_tokens
    assert config.split * config.every <= config.max_steps == 2 * config.save_every == 50


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps",
    [
        ["recipe-mpo-r", "answers"],
        ["t5"],
        ["llama31"],
        ["llama2"],
        ["profile"],
        ["expansion"],
        ["scaling"],
        ["recipe-lora"],
    ],
)
def test_steps_run_on_the_cpu(load: Any, tmp_path: Path, steps: list[str]) -> None:
    gpu = load("gpu")
    assert gpu.main(["--device", "cpu", "--quick", "--results", str(tmp_path), "--steps", *steps]) == 0
    found = {}
    for step in steps:
        results = read_json(tmp_path / "cpu" / f"{step}.json")["results"]
        assert results
        (found[step],) = list(results.values())[:1]
    if steps == ["recipe-mpo-r", "answers"]:
        assert found["recipe-mpo-r"]["rounds"] == [2]
        assert found["recipe-mpo-r"]["tokens"] > 0
        assert found["answers"]["new_tokens"] == 4


def test_results_do_not_tell_where_a_machine_keeps_its_files(load: Any) -> None:
    gpu = load("gpu")
    text = f'{ROOT}/build/x.py:3: Warn\nwritten: /tmp/abc/found.json\n"/opt/torch/.venv/lib/python3.12/site-packages/torch/cuda/graphs.py:7"'
    found = gpu.without_places(text, "/tmp/abc")
    assert found == 'build/x.py:3: Warn\nwritten: FOLDER/found.json\n"torch/cuda/graphs.py:7"'


def test_pages_say_what_was_measured_on_a_gpu(load: Any) -> None:
    pages = load("gpu_page").pages()
    assert {page.name for page in pages} == {"gpu.md", "performance.md"}
    for page, made in pages.items():
        assert page.read_text(encoding="utf-8") == made, f"{page}: python benchmarks/gpu_page.py"
