"""Run folders, atomic files, tables, settings, pictures and advice."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from support import advice, config, elsewhere, folders, pictures, provenance, results, tables, tuned

from tnadapt.backends import BACKENDS


def result_of(**changes: Any) -> dict[str, Any]:
    metrics = {
        "accuracy": 0.5,
        "base_accuracy": 0.1,
        "format_rate": 1.0,
        "problems": 100,
        "steps": 40,
    }
    config = {"model": "embedded", "eval_split": "validation", "every": 10, "split": 2}
    curve = [(step, 2.0 - 0.04 * step) for step in range(40)]
    return {"metrics": metrics | changes.pop("metrics", {}), "config": config, "curve": curve, "matrices": []} | changes


def stop_in(folder: folders.RunFolder, keep: bool, write: str) -> None:
    """A run that writes a file and fails."""
    with contextlib.suppress(RuntimeError), folder.working({"config": {"lr": 1.0}}, keep=keep) as work:
        (work / write).write_text("text")
        raise RuntimeError


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_finished_run_moves_up_and_is_found_again(tmp_path: Path) -> None:
    folder = folders.RunFolder(tmp_path, "run")
    result: dict[str, Any] = {"config": {"lr": 1.0}}
    with folder.working(result, keep=False) as work:
        assert provenance.read_json(work / "result.json")["status"] == "running"
        (work / "file").write_text("kept")
    assert not folder.work.exists()
    assert (folder.final / "file").read_text() == "kept"
    found = folder.finished({"lr": 1.0})
    assert found is not None
    assert found["status"] == "finished"


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "cancelled"), (RuntimeError, "failed")])
def test_a_run_that_does_not_finish_is_marked_and_kept_apart(tmp_path: Path, error: type, status: str) -> None:
    folder = folders.RunFolder(tmp_path, "run")
    with pytest.raises(error), folder.working({"config": {}}, keep=False):
        raise error("halfway")
    assert not folder.final.exists()
    assert provenance.read_json(folder.work / "result.json")["status"] == status
    assert folder.finished({}) is None


def test_starting_again_keeps_the_unfinished_run_and_resuming_goes_on_in_it(tmp_path: Path) -> None:
    folder = folders.RunFolder(tmp_path, "run")
    stop_in(folder, keep=False, write="checkpoint")
    with pytest.raises(ValueError, match=r"lr 1\.0 there, 2\.0 here.*another --name"):
        folder.working({"config": {"lr": 2.0}}, keep=True).__enter__()
    stop_in(folder, keep=True, write="second")
    assert (folder.work / "checkpoint").exists()
    with folder.working({"config": {"lr": 1.0}}, keep=False) as work:
        assert not (work / "checkpoint").exists()
    assert (tmp_path / "unfinished" / "run--2" / "checkpoint").exists()


def test_a_finished_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    folder = folders.RunFolder(tmp_path, "run")
    with folder.working({"config": {"lr": 1.0}}, keep=False):
        pass
    with pytest.raises(ValueError, match=r"lr 1\.0 there, 2\.0 here"):
        folder.finished({"lr": 2.0})


def test_environment_is_json_and_names_versions_and_hardware(tmp_path: Path) -> None:
    found = json.loads(json.dumps(provenance.environment(tmp_path)))
    assert found["packages"]["torch"]
    assert found["hardware"]["cpus"] >= 1
    assert found["git"] is None


def test_git_state_tells_commit_and_dirt(tmp_path: Path) -> None:
    assert provenance.git(tmp_path, "init") is not None
    assert provenance.git_state(tmp_path) == {"commit": None, "dirty": False}
    (tmp_path / "file").write_text("new")
    assert provenance.git_state(tmp_path) == {"commit": None, "dirty": True}


def test_files_are_replaced_and_leave_no_temporary_ones(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "data.json"
    provenance.write_json(path, {"a": 1})
    provenance.write_json(path, {"a": 2})
    assert provenance.read_json(path) == {"a": 2}
    assert [*path.parent.iterdir()] == [path]
    path.write_text("{")
    with pytest.raises(ValueError, match=r"data\.json does not hold JSON"):
        provenance.read_json(path)


def test_config_hash_ignores_order_only() -> None:
    assert provenance.config_hash({"a": 1, "b": 2}) == provenance.config_hash({"b": 2, "a": 1})
    assert provenance.config_hash({"a": 1}) != provenance.config_hash({"a": 2})


# -- tables and settings -----------------------------------------------------------------------------------------------


def test_table_as_markdown_and_csv() -> None:
    table = tables.Table("title", ("method", "score"), [("a|b", "1,000")], "caption")
    assert table.markdown() == "| method | score |\n| :-- | --: |\n| a\\|b | 1,000 |\n\ncaption\n"
    assert table.csv() == 'method,score\na|b,"1,000"\n'
    with pytest.raises(ValueError, match="has 1 cells for 2 columns"):
        tables.Table("title", ("method", "score"), [("a",)])


def test_percentages_over_seeds_use_the_sample_deviation() -> None:
    assert tables.percent_over_seeds([0.5, 0.6, 0.7]) == "60.0 ± 10.0 %"
    assert tables.percent_over_seeds([0.5]) == "50.0 %"
    assert tables.percent_over_seeds([]) == "–"


def row_of(label: str, method: str, lr: float) -> dict[str, Any]:
    metrics = {
        **{"accuracy": 0.5, "format_rate": 1.0, "base_accuracy": 0.1, "base_format_rate": 1.0, "loss": 0.2, "steps": 4},
        **{"trained_parameters": 10, "training_seconds": 1.0, "problems": 100},
    }
    return {"label": label, "config": {"method": method, "lr": lr, "core_lr": None}, "metrics": metrics}


def cells_of(table: tables.Table) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_our_seeds_rates_and_grid_the_papers_figures_and_others_lora_have_a_column_each() -> None:
    found = [row_of("LoRA", "lora", 0.01), row_of("LoRA-Over-SVD", "lora-over-svd", 0.02)]
    committed = {
        "seeds": [0, 1],
        "steps": 4,
        "base_accuracy": 0.1,
        "methods": {"lora": {"accuracy": [0.5, 0.6], "lr": 0.03}},
    }
    others = elsewhere.TunedLora(
        "some/model", "59.3", "the best method there has 60.4", "rate tuned", "A Paper, table 1"
    )
    beside = results.Beside(
        committed, {"lora": [1e-3, 1e-2, 4e-2]}, {"LoRA": "42.1", "LoRA-Over-SVD": "45.0"}, [others]
    )
    table = results.result_table(found, "share", beside)
    cells = cells_of(table)
    ours, rival = cells["LoRA"], cells["LoRA-Over-SVD"]
    assert (ours["accuracy"], ours["lr"], ours["rates tried"]) == ("50.0 %", "0.01", "3, 0.001 to 0.04")
    assert (ours["2 seeds"], ours["paper's %"], ours["tuned elsewhere %"]) == ("55.0 ± 7.1 % at 0.03", "42.1", "59.3")
    assert (rival["rates tried"], rival["2 seeds"], rival["paper's %"], rival["tuned elsewhere %"]) == (
        "–",
        "–",
        "45.0",
        "–",
    )
    assert {cells["base model"][name] for name in ("rates tried", "paper's %", "tuned elsewhere %")} == {"–"}
    assert "59.3 in A Paper, table 1 (rate tuned; the best method there has 60.4)" in table.caption
    noted = [{**row_of("LoRA", "lora", 0.02), "note": "Nothing is scored: add --execute."}] * 2
    assert results.result_table(noted, "share").caption.count("Nothing is scored: add --execute.") == 1
    plain = results.result_table(found, "share")
    assert not {"rates tried", "paper's %", "tuned elsewhere %"} & {*plain.columns}


def test_what_others_report_of_lora_is_shown_where_it_was_not_run() -> None:
    others = elsewhere.TunedLora("some/model", "59.3", "…", "…", "A Paper")
    beside = results.Beside(paper={"LoRA": "42.1", "LoRA-Over-SVD": "45.0"}, elsewhere=[others])
    cells = cells_of(results.result_table([row_of("LoRA-Over-SVD", "lora-over-svd", 0.02)], "share", beside))
    assert (cells["LoRA"]["accuracy"], cells["LoRA"]["paper's %"], cells["LoRA"]["tuned elsewhere %"]) == (
        "–",
        "42.1",
        "59.3",
    )


def test_the_rates_that_were_tried_are_those_of_the_committed_tables() -> None:
    grid = tuned.tried_rates("t5_glue-laptop-sst2")
    rates = tuned.tuned_rates("t5_glue-laptop-sst2")
    assert rates
    for method, (lr, _) in rates.items():
        assert min(grid[method]) < lr < max(grid[method])
    assert tuned.tried_rates("no such table") == {}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "float8", "--dtype is 'float8': choose one of float32, bfloat16"),
        ("eval_split", "train", "--eval-split is 'train': choose one of validation, test"),
        ("rank", 0, "--rank is 0: give a whole number of at least 1"),
        ("order", 1, "--order is 1: give a whole number of at least 2"),
        ("lr", 0.0, "--lr is 0.0: give a number above 0"),
        ("lr", float("nan"), "--lr is nan: give a number above 0"),
        ("weight_decay", -0.1, "--weight-decay is -0.1: give a number of at least 0"),
        ("micro_batch", 5, "--micro-batch is 5: it must divide --batch, which is 32"),
    ],
)
def test_values_that_cannot_work_are_refused(field: str, value: Any, message: str) -> None:
    config.Config().check()
    config.Config(weight_decay=0.0, max_steps=0, clip=0.0).check()
    with pytest.raises(ValueError, match=f"^{message}$"):
        config.Config(**{field: value}).check()


def test_choices_of_options_are_those_of_the_package() -> None:
    """The configuration names them again, since `--help` must not wait for torch."""
    assert tuple(BACKENDS) == config.BACKENDS


def test_a_name_of_a_file_is_no_hub_id() -> None:
    assert config.is_hub_id("openai/gsm8k")
    assert not config.is_hub_id("data/train.jsonl")
    assert not config.is_hub_id("./data")
    assert not config.is_hub_id("a/b/c")


# -- pictures and advice ----------------------------------------------------------------------------------------------


def test_pictures_are_written(tmp_path: Path) -> None:
    curve = [(1, 2.0), (2, 1.0)]
    paths = [
        pictures.comparison(tmp_path / "bars.png", {"base": 0.1, "a": 0.5}, {"a": curve}),
        pictures.score_against(tmp_path / "lr.png", "lr", {"a": [(1e-3, 0.1), (1e-2, 0.2)]}, logarithmic=True),
        pictures.score_against(tmp_path / "gauge.png", "gauge", {"a": [("svd", 0.1), ("spread", 0.2)]}),
    ]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len([*tmp_path.iterdir()]) == len(paths)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": {"format_rate": 0.5}}, "Only 50 % of the answers are well formed"),
        ({"metrics": {"accuracy": 0.1}}, "not better than the base model"),
        ({"metrics": {"accuracy": 0.0, "base_accuracy": 0.0}}, "No problem was solved before or after training"),
        ({"metrics": {"accuracy": 0.99}}, "nearly solved"),
        ({"curve": [(1, 2.0), (2, float("nan"))]}, "stopped being a finite number"),
        ({"curve": [(step, 2.0) for step in range(20)]}, "hardly fell"),
        ({"matrices": [{"expanded_at": None}]}, "No matrix was expanded"),
        ({"matrices": [{"expanded_at": 30}]}, "expanded at step 30 of 40"),
    ],
)
def test_advice_names_what_is_wrong(changes: dict[str, Any], said: str) -> None:
    assert any(said in sentence for sentence in advice.advise(result_of(**changes)))
    assert not any(said in sentence for sentence in advice.advise(result_of()))


def test_noise_is_the_standard_error() -> None:
    assert advice.noise(0.5, 100) == pytest.approx(0.05)
    assert advice.noise(0.0, 100) > 0
