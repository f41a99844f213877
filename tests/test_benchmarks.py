"""The benchmarks of performance run, at the smallest size, and write what the docs are made of."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from recipes.support.provenance import read_json

pytest.importorskip("rich")
pytest.importorskip("tqdm")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark as its script would be."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--quick", *arguments])
    threads = torch.get_num_threads()
    try:
        script.main()
    finally:
        torch.set_num_threads(threads)


def result(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(file)
    assert found["provenance"]["packages"]["torch"]
    return found


@pytest.mark.slow
def test_scaling(load, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("peft")
    scaling = load("scaling")
    run(scaling, monkeypatch, "--threads", "1", "--output", str(tmp_path))
    factors = result(tmp_path / "scaling.json")["factors"]
    assert [f["factor"] for f in factors] == list(scaling.FACTORS)
    assert all(len(f["points"]) == 2 for f in factors)
    assert (tmp_path / "scaling.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "<!-- scaling -->" in printed
    assert all(f["title"] in printed for f in factors)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc (Linux)")
def test_ranks_of_scaling_leave_no_threads(tmp_path):
    """Gloo's threads, where they outlive the process group, now and then abort the process at its end."""
    script = """
import sys
from pathlib import Path
import scaling
scaling.ddp_worker(0, 1, sys.argv[1], "ranks", 1, True)
print(sorted(file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])},
    )
    assert "python" in done.stdout
    assert "gloo" not in done.stdout


def test_fits_of_scaling(load):
    scaling = load("scaling")
    found = scaling.summarize("order", {x: [3.0 * x**1.5] * 3 for x in (1, 2, 4, 8)})
    assert math.isclose(found["power_law"]["exponent"], 1.5)
    assert math.isclose(found["power_law"]["factor"], 3.0)
    found = scaling.summarize("order", {x: [5.0 + 0.25 * x] * 3 for x in (1, 2, 4, 8)})
    assert math.isclose(found["line"]["intercept"], 5.0)
    assert math.isclose(found["line"]["slope"], 0.25)
    assert math.isclose(found["line"]["r2"], 1.0)
    # noise can make a small cost negative: no power law then, and no error
    assert math.isnan(scaling.summarize("order", {1: [-1.0], 2: [1.0]})["power_law"]["exponent"])


def test_expansion(load, monkeypatch, tmp_path, capsys):
    expansion = load("expansion")
    run(expansion, monkeypatch, "--threads", "1", "--output", str(tmp_path))
    rows = result(tmp_path / "expansion.json")["rows"]
    assert {row["way"] for row in rows} == set(expansion.WAYS)
    # one matrix in each of the 8 groups
    assert all(row["matrices"] == 8 and row["seconds"] > 0 for row in rows)
    assert "<!-- expansion -->" in capsys.readouterr().out


def test_groups_of_expansion_are_those_of_llama(load):
    expansion = load("expansion")
    found, _ = importlib.import_module("tnadapt").find_lora_matrices(expansion.adapters(2, "cpu"))
    assert found["layers.1.self_attn.v_proj.B"].shape == (1024, 8)
    assert found["layers.0.self_attn.k_proj.A"].shape == (8, 4096)
    assert len({matrix.group for matrix in found.values()}) == 8


def test_profile_step(load, monkeypatch, tmp_path, capsys):
    pytest.importorskip("peft")
    profile_step = load("profile_step")
    run(profile_step, monkeypatch, "--threads", "1", "--output", str(tmp_path))
    (case,) = result(tmp_path / "profile_step.json")["cases"]
    assert case["case"] == "t5-cpu-short"
    # every phase is there still, under its name in the engine
    assert [row["phase"] for row in case["rows"]] == profile_step.ORDER
    assert all(row["seconds"] > 0 for row in case["rows"] if row["phase"] != profile_step.SCHEDULE)
    step, plain, passes = (row["operators"] for row in case["traffic"])
    assert passes > step > plain > 0
    assert "<!-- profile-t5-cpu-short -->" in capsys.readouterr().out


def test_stopwatch_leaves_inner_phases_out(load):
    pytest.importorskip("peft")
    watch = load("profile_step").Watch(lambda: None)
    ticks = iter([0.0, 1.0, 3.0, 6.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["profile_step"].time, "perf_counter", lambda: next(ticks))
        with watch.phase("outer"), watch.phase("inner"):
            pass
    assert dict(watch.seconds) == {"outer": 1.0 + 3.0, "inner": 2.0}


@pytest.mark.slow
def test_step_overhead(load, monkeypatch, tmp_path, capsys):
    pytest.importorskip("peft")
    script = load("step_overhead")
    variants = ["plain", "mpo", "α-lora", "tt-lora, 2 + 2 modes", "tt-lora, 3 + 3 modes", "full", "opf"]
    options = ["--case", "t5-gpu", "--device", "cpu", "--threads", "1", "--output", str(tmp_path)]
    run(script, monkeypatch, *options, "--variants", *variants)
    rows = {row["variant"]: row for row in result(tmp_path / "step_overhead-t5-gpu.json")["rows"]}
    alpha = ["between α's steps", "T = 20", "T = 20, by mini-batch"]
    assert list(rows) == [*variants[:2], *(f"α-lora, {row}" for row in alpha), *variants[3:]]
    assert rows["plain"]["ratio"] == 1
    assert rows["opf"]["beside"] == "full"
    # numbers that are trained, their two moments, and for full fine-tuning and OPF the weights themselves
    numbers = {name: row["trained_parameters"] for name, row in rows.items()}
    kept = {name: row["kept_bytes"] / 4 for name, row in rows.items()}
    for name in ("plain", "α-lora, T = 20", *variants[3:6]):
        assert kept[name] == pytest.approx(3 * numbers[name], rel=0.1)
    # the cores' contractions are kept, too (docs/performance.md), and a copy of the weights
    assert kept["opf"] >= 3 * numbers["opf"] + numbers["full"]
    assert all(row["peak_bytes"] > 0 for row in rows.values())
    # scaling where the outputs lie takes nothing; α's own step keeps them
    assert rows["α-lora, between α's steps"]["peak_bytes"] == pytest.approx(rows["plain"]["peak_bytes"], rel=0.02)
    assert rows["α-lora, T = 20"]["peak_bytes"] > rows["plain"]["peak_bytes"]
    assert "goal: α-lora, T = 20, by mini-batch, at most 1.05" in capsys.readouterr().out


@pytest.mark.slow
def test_step_overhead_of_a_llama_that_computes_activations_again(load, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    options = ["--case", "llama31-gpu", "--device", "cpu", "--threads", "1", "--within", "0", "--output", str(tmp_path)]
    run(load("step_overhead"), monkeypatch, *options, "--variants", "plain", "mpo-r", "paper's way")
    found = result(tmp_path / "step_overhead-llama31-gpu.json")
    assert (found["model"], found["recompute"], found["batch"], found["micro"]) == ("llama-3.1-8b/16", True, 2, 1)
    trained = {row["variant"]: row["trained_parameters"] for row in found["rows"]}
    # one layer has one round, after which all is expanded
    assert trained["mpo-r"] == trained["paper's way"] > trained["plain"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks of a GPU are refused where there is none")
def test_benchmarks_for_a_gpu_say_in_one_line_that_there_is_none(load, monkeypatch):
    pytest.importorskip("peft")
    script = load("step_overhead")
    monkeypatch.setattr(sys, "argv", ["step_overhead.py", "--case", "llama31-gpu"])
    with pytest.raises(SystemExit, match=r"case llama31-gpu needs CUDA.*--device cpu"):
        script.main()


def test_traffic_counts_what_computes_and_no_views(load):
    traffic = load("devices").traffic
    x = torch.ones(2, 3)
    assert traffic(lambda: x.t().view(3, 2).unsqueeze(0), "cpu").operators == 0
    found = traffic(lambda: torch.add(x, x).mul_(2).t().sum(), "cpu")
    assert (found.operators, found.launches, found.waits) == (3, None, None)


def test_three_modes_of_step_overhead(load):
    modes = load("step_overhead").three_modes
    assert [modes(n) for n in (768, 3072, 64, 7, 1)] == [(8, 8, 12), (12, 16, 16), (4, 4, 4), (1, 1, 7), (1, 1, 1)]


def test_gauges(load, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    gauges = load("gauges")
    run(gauges, monkeypatch, "--output", str(tmp_path))
    rows = result(tmp_path / "gauge_updates.json")["rows"]
    assert {row["gauge"] for row in rows} == set(gauges.GAUGES)
    assert all(len(row["update"]) == 20 and min(row["update"]) > 0 for row in rows)
    # from W = 0 the first update of the gauge svd is plain LoRA's: the core that moves is the matrix in a frame
    first = {(row["gauge"], row["start"], row["gradient"]): row["update"][0] for row in rows}
    assert math.isclose(first["svd", "zero", "steady"], 1.0, rel_tol=1e-3)
    assert (tmp_path / "gauges.png").stat().st_size > 0
    assert "| 2, `gradient` |" in capsys.readouterr().out


def test_import_time(load, monkeypatch, tmp_path, capsys):
    import_time = load("import_time")
    run(import_time, monkeypatch, "--output", str(tmp_path))
    rows = result(tmp_path / "import_time.json")["rows"]
    assert all(series["quartiles"][0] <= series["quartiles"][1] for series in rows.values())
    assert "<!-- import-time -->" in capsys.readouterr().out


def test_the_page_on_scale_has_the_numbers_of_its_results(load):
    at_scale = load("at_scale")
    found = result(BENCHMARKS / "results" / "at_scale.json")
    blocks = {
        "models": at_scale.model_table(found["plans"]),
        "plans": at_scale.plan_table(found["plans"]),
        "measured": at_scale.measured_table(found["measurements"]),
    }
    assert at_scale.renewed(at_scale.PAGE, blocks) == at_scale.PAGE.read_text(encoding="utf-8")
    assert {row["ranks"] for row in found["measurements"]} == {1, 2, 4}
    for row in found["measurements"]:
        assert row["ratio"] == pytest.approx(1.0, abs=0.01)
        assert row["sent"] == row["formula_sent"]


@pytest.mark.slow
def test_plans_at_scale_and_what_ranks_allocate_and_send(load, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    at_scale = load("at_scale")
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in ("models", "plans", "measured")))
    run(at_scale, monkeypatch, "--output", str(tmp_path), "--page", str(page))
    found = result(tmp_path / "at_scale.json")
    assert len(found["plans"]) == 6
    for row in found["measurements"]:
        assert row["ratio"] == pytest.approx(1.0, abs=0.01)
        assert row["sent"] == row["formula_sent"]
    assert at_scale.plan_table(found["plans"]) in page.read_text()
