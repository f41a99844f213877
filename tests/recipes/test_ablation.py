"""The recipe with another factorization, expansion or backend, and the driver that varies them and reports."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import many, running, tuned
from support.methods import METHODS
from support.provenance import config_hash

from recipes import ablate, t5_glue
from recipes import llama31_gsm8k as recipe
from tnadapt import MPO, SVD
from tnadapt.factorizations import CP, Tucker

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


TINY = {"train_size": 4, "eval_size": 2, "max_steps": 2, "batch": 2, "micro_batch": 2, "max_new_tokens": 2, "order": 4}


def config(**changes: Any) -> recipe.Config:
    return dataclasses.replace(recipe.Config(method="lora-over-mpo"), **changes)


def arguments(model: str, root: Path) -> list[str]:
    given = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["--runs", str(root), "--model", model, "--lr", "1e-2", *given]


def made(each: recipe.Config) -> Any:
    over = METHODS[each.method].over
    assert over is not None
    return over.make_factorization(each)


# -- what the fields mean ---------------------------------------------------------------------------------------------


def test_the_methods_keep_their_own_factorization_by_default() -> None:
    assert made(config()) == MPO(order=10)
    assert made(config(method="lora-over-mpo-r", order=4, gauge="spread")) == MPO(order=4, gauge="spread")
    assert made(config(method="lora-over-svd")) == SVD()


def test_a_factorization_an_expansion_and_a_backend_in_their_place() -> None:
    assert made(config(factorization="svd", gauge="right")) == SVD(gauge="right")
    assert made(config(factorization="tucker", order=2, gauge="spread")) == Tucker(gauge="spread")
    assert made(config(factorization="cp")) == CP(order=10)
    assert made(config(factorization="cp", gauge="spread")) == CP(order=10, gauge="spread")
    assert made(config(expansion=3.0)) == MPO(expansion=3.0)
    assert made(config(method="lora-over-svd", factorization="tucker", expansion=2.0)) == Tucker(expansion=2.0)
    assert made(config(backend="opt_einsum")) == MPO(order=10, backend="opt_einsum")


def test_runs_from_before_these_fields_stay_valid() -> None:
    """The settings of a run with the defaults have neither changed nor grown."""
    settings = recipe.RECIPE.resolve(recipe.Config()).settings()
    assert {"factorization", "expansion", "backend"}.isdisjoint(settings)
    fixed = {**settings, "lr": 0.003, "core_lr": None}
    assert config_hash(fixed) == "bb883219"
    assert config(expansion=2.0).settings()["expansion"] == 2.0
    hashes = {
        config_hash(recipe.RECIPE.resolve(each).settings())
        for each in (config(), config(factorization="cp"), config(expansion=2.0), config(backend="tensorly"))
    }
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--factorization", "qr"], "invalid choice: 'qr' (choose from 'svd', 'mpo', 'tucker', 'cp')"),
        (
            ["--backend", "numpy"],
            "invalid choice: 'numpy' (choose from 'torch', 'opt_einsum', 'tensorly', 'tensornetwork')",
        ),
        (["--expansion", "0.5"], "expansion=0.5: an exact factorization has at least"),
        (["--factorization", "cp", "--gauge", "right"], "gauge='right' is unknown to CP"),
        (["--factorization", "svd", "--expansion", "2"], "--expansion is 2.0: an SVD has one structure only"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        recipe.main(recipe.RECIPE, ["--method", "lora-over-mpo", "--runs", str(tmp_path / "runs"), *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# -- runs -------------------------------------------------------------------------------------------------------------


def test_backends_train_the_same_adapter(tmp_path: Path, tiny_model: str) -> None:
    curves = {}
    for backend in ("torch", "opt_einsum", "tensorly", "tensornetwork"):
        if backend != "torch":
            pytest.importorskip(backend)
        each = config(model=tiny_model, lr=1e-2, backend=backend, **TINY)
        result = running.run(recipe.RECIPE, each, tmp_path, quiet=True)
        curves[backend] = [loss for _, loss in result["curve"]]
    for backend, curve in curves.items():
        assert curve == pytest.approx(curves["torch"], rel=1e-4), backend


def test_the_driver_varies_factorization_and_expansion(tmp_path: Path, tiny_model: str) -> None:
    common = [*arguments(tiny_model, tmp_path), "--methods", "lora-over-mpo", "--report", str(tmp_path / "report")]
    ablate.main(["vary", *common, "--factor", "factorization", "tucker", "cp", "--factor", "expansion", "3"])
    rows = json.loads((tmp_path / "report" / "rows.json").read_text())["rows"]
    assert [(row["factor"], row["value"], row["errors"]) for row in rows] == [
        ("factorization", "tucker", []),
        ("factorization", "cp", []),
        ("expansion", 3.0, []),
    ]
    assert len({row["trained_parameters"][0] for row in rows}) == 3


def test_a_sweep_of_which_every_run_failed_says_so(tmp_path: Path, tiny_model: str, capsys: Any) -> None:
    common = [*arguments(tiny_model, tmp_path), "--methods", "lora-over-mpo"]
    with pytest.raises(SystemExit, match="1"):
        ablate.main(["vary", *common, "--factor", "targets", "nowhere"])
    told = capsys.readouterr()
    assert told.err.strip().endswith("error: every run failed; the reasons stand above")
    assert "failed" in told.out
    assert "lora-over-mpo *" not in told.out
    with pytest.raises(SystemExit, match="2"):
        ablate.main(["vary", *common, "--factor", "order"])
    assert "error: --factor order: give the values to try too" in capsys.readouterr().err


def fake_run(_: Path, settings: dict[str, Any], *__: Any, **___: Any) -> dict[str, Any]:
    """A result without a run, other for other rates and factorizations; one setting fails."""
    given = recipe.Config(**settings)
    if given.factorization == "cp":
        return {"config": settings, "error": "RuntimeError: no luck"}
    accuracy = {None: 0.2, "mpo": 0.3, "tucker": 0.4}[given.factorization] + 10 * (given.lr or 0)
    metrics = {"accuracy": accuracy, "loss": 1 - accuracy, "trained_parameters": 100 * (given.expansion or 1)}
    metrics |= {"training_seconds": 1.0, "problems": 500}
    return {
        "name": f"run-{settings}",
        "plan": "MPO(order=10): 1 matrix",
        "config": dataclasses.asdict(given),
        "metrics": metrics,
    }


def test_every_value_at_every_rate_goes_into_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "run_one", fake_run)
    report = tmp_path / "report"
    vary = ["vary", "--runs", str(tmp_path), "--report", str(report), "--methods", "lora-over-mpo"]
    factors = ["--factor", "method", "lora", "--factor", "factorization", "mpo", "tucker", "cp"]
    ablate.main([*vary, *factors, "--lrs", "1e-3", "1e-2"])
    ablate.main([*vary, "--factor", "expansion", "1", "2"])
    ablate.main([*vary, "--factor", "expansion", "1", "3"])  # 1 in place of the row before
    rows = json.loads((report / "rows.json").read_text())["rows"]
    own = recipe.LEARNING_RATES["laptop"]["lora-over-mpo"][0]
    assert [(row["factor"], row["value"], row["lr"]) for row in rows] == [
        *[("method", "lora", lr) for lr in (1e-3, 1e-2)],
        *[("factorization", value, lr) for value in ("mpo", "tucker", "cp") for lr in (1e-3, 1e-2)],
        *[("expansion", value, own) for value in (1.0, 2.0, 3.0)],
    ]
    assert [row["value"] for row in rows if row["errors"]] == ["cp", "cp"]
    assert len([*csv.reader((report / "table.csv").open())]) == 1 + len(rows)
    text = (report / "report.md").read_text()
    for part in (
        "## method",
        "## factorization",
        "## expansion",
        "own best rate: 10.0 points apart, tucker",
        "FAILED: cp",
        "| MPO(order=10) |",
    ):
        assert part in text
    pictures = {path.name for path in report.glob("*.png")}
    assert pictures == {"method-by-lr.png", "factorization.png", "factorization-by-lr.png", "expansion.png"}
    assert all(f"]({name})" in text for name in pictures)


def test_what_the_report_says_of_a_factor() -> None:
    by_the_rate = {"svd": {0.01: 0.3, 0.02: 0.6}, "mpo": {0.01: 0.6, 0.02: 0.3}}
    text = "\n".join(ablate.verdict("factorization", by_the_rate, 500))
    assert "they lie up to 30.0 points apart" in text
    assert "own best rate: 0.0 points apart" in text
    assert "what factorization seems to change at one rate, the rate explains" in text
    assert "Best at an end of the grid, so that another rate may be better still: svd, mpo" in text
    itself = {"svd": {0.01: 0.3, 0.02: 0.4, 0.04: 0.3}, "mpo": {0.01: 0.5, 0.02: 0.6, 0.04: 0.5}}
    text = "\n".join(ablate.verdict("factorization", itself, 500))
    assert "20.0 points apart, mpo being the best" in text
    assert "factorization seems to matter beyond the rate" in text
    assert "end of the grid" not in text
    alike = {"svd": {0.01: 0.3, 0.02: 0.6}, "mpo": {0.01: 0.31, 0.02: 0.61}}
    assert "factorization changes nothing beyond chance" in "\n".join(ablate.verdict("factorization", alike, 500))
    assert ablate.verdict("factorization", {"svd": {0.01: 0.3}}, 500) == []


# -- tuning -----------------------------------------------------------------------------------------------------------


def tuning(monkeypatch: pytest.MonkeyPatch, root: Path, loss: Any, *options: str) -> tuple[list[float], Any]:
    """``tune --extend`` where a run at a rate has the loss that is given, None for a run that fails: the rates that it tried,
    in their order, and the table."""
    tried: list[float] = []

    def run(_: Path, settings: dict[str, Any], *__: Any, **___: Any) -> dict[str, Any]:
        lr = settings["lr"]
        tried.append(lr)
        if (found := loss(lr)) is None:
            return {"config": settings, "error": "FloatingPointError: too fast"}
        made = fake_run(Path(), {**settings, "lr": 0.0})
        made["config"] = settings
        made["metrics"]["eval_loss"] = found
        return made | {"environment": {"git": {"commit": "abc", "dirty": True}}}

    monkeypatch.setattr(many, "run_one", run)
    folder = root / "tuned"
    command = ["tune", "--runs", str(root), "--methods", "lora", "--extend", "--tuned", str(folder), *options]
    ablate.main([*command, "--eval-split", "validation"])
    return tried, json.loads((folder / "llama31_gsm8k-laptop.json").read_text())


@given(start=st.integers(-20, -1), optimum=st.integers(-20, -1))
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_best_rate_is_found_wherever_the_grid_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, start: int, optimum: int
) -> None:
    """Every rate tried is a power of 10^(1/4); the best one and both its neighbours are among them, and none twice."""
    root = tmp_path_factory.mktemp("tune")
    monkeypatch.setattr(ablate, "write_table", lambda *_: None)  # pictures
    tried, table = tuning(
        monkeypatch, root, lambda lr: (4 * math.log10(lr) - optimum) ** 2, "--lrs", f"{10 ** (start / 4):.2e}"
    )
    places = [round(4 * math.log10(lr)) for lr in tried]
    assert all(math.isclose(lr, 10 ** (place / 4), rel_tol=0.01) for lr, place in zip(tried, places, strict=True))
    assert {optimum - 1, optimum, optimum + 1} <= set(places)
    assert len(set(places)) == len(places) <= abs(start - optimum) + 3
    best, inside = tuned.best_of_lane(tuned.lanes(table["rows"])["lora", "lr"])
    assert inside
    assert round(4 * math.log10(best["lr"])) == optimum


def test_a_rate_at_which_training_fails_is_worse_than_any_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried, table = tuning(monkeypatch, tmp_path, lambda lr: None if lr > 2e-3 else 1 - lr, "--lrs", "1e-2")
    assert tried == [1e-2, 5.62e-3, 3.16e-3, 1.78e-3, 1e-3]
    assert {row["commits"][0] for row in table["rows"] if row["eval_loss"]} == {"abc+"}
    page = (tmp_path / "tuned" / "llama31_gsm8k-laptop.md").read_text()
    assert "| lora | 0.00178 | 20.0 % | 0.9990 | **0.9982** | failed | failed | failed |" in page
    monkeypatch.setattr(tuned, "TABLES", tmp_path / "tuned")
    assert tuned.tuned_rates("llama31_gsm8k-laptop") == {"lora": (1.78e-3, None)}


def test_an_optimum_outside_of_what_was_tried_is_no_tuned_rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tuning(monkeypatch, tmp_path, lambda lr: 1 / lr, "--lrs", "1e-2", "1")  # up to the highest rate that makes sense
    monkeypatch.setattr(tuned, "TABLES", tmp_path / "tuned")
    assert tuned.tuned_rates("llama31_gsm8k-laptop") == {}
    assert "| lora | outside |" in (tmp_path / "tuned" / "llama31_gsm8k-laptop.md").read_text()


def test_a_table_of_other_settings_is_not_mixed_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning(monkeypatch, tmp_path, lambda lr: lr, "--lrs", "1e-2")
    with pytest.raises(SystemExit):
        tuning(monkeypatch, tmp_path, lambda lr: lr, "--lrs", "1e-2", "--batch", "64")
    assert "llama31_gsm8k-laptop.json was made with other settings (batch)" in capsys.readouterr().err


def test_a_run_from_before_the_loss_was_measured_is_not_compared() -> None:
    config = recipe.Config(lr=1e-2)
    outcomes = [
        ablate.Outcome(ablate.Cell("lr", lr, (config,)), ({"name": name, "metrics": {"loss": 1.0, **more}},), ())
        for lr, name, more in ((1e-2, "new", {"eval_loss": 0.5}), (1e-3, "old", {"accuracy": 0.9}))
    ]
    with pytest.raises(ValueError, match="the run old did not measure the loss"):
        ablate.best_of(outcomes)


@pytest.mark.parametrize("path", sorted(tuned.TABLES.glob("*-laptop*.json")), ids=lambda path: path.stem)
def test_the_laptop_rates_are_those_of_the_committed_tables(path: Path) -> None:
    """Read here from the rows themselves: a recipe's rate is the one of lowest loss, with worse ones on both sides."""
    rates = {"t5": t5_glue.LEARNING_RATES, "ll": recipe.LEARNING_RATES}[path.stem[:2]]["laptop"]
    rows = [row for row in json.loads(path.read_text())["rows"] if row["factor"] == "lr"]
    for method in {row["method"] for row in rows}:
        losses = {row["lr"]: min(row["eval_loss"], default=math.inf) for row in rows if row["method"] == method}
        best = min(losses, key=lambda lr: losses[lr])
        inside = min(losses) < best < max(losses)
        assert rates.get(method) == ((best, None) if inside else None), method
