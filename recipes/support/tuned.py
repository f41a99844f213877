"""Learning rates that were tuned: the repository's tables of them, which ``recipes/ablate.py tune --tuned`` writes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from .config import Grids, Rates
from .provenance import read_json

Row = Mapping[str, Any]
TABLES = Path(__file__).resolve().parents[1] / "results" / "tuning"


def loss_of(row: Row) -> float:
    """The mean loss of a row's runs on the answers of the validation split; infinite where they failed."""
    return mean(row["eval_loss"]) if row["eval_loss"] else math.inf


def lanes(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by method and factor (``lr``, or ``lr`` with another rate for the cores), from the lowest rate to the highest."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: float(row["value"])):
        found.setdefault((row["method"], row["factor"]), []).append(row)
    return found


def best_of_lane(lane: Sequence[Row]) -> tuple[Row, bool]:
    """The row of the lowest loss, and whether a lower and a higher rate were tried too, so that the optimum is inside."""
    place = min(range(len(lane)), key=lambda index: loss_of(lane[index]))
    return lane[place], 0 < place < len(lane) - 1 and math.isfinite(loss_of(lane[place]))


def tuned_rates(name: str) -> Rates:
    """The best rates of the table ``name``, by method; methods whose optimum is not inside what was tried are left out.

    Without such a table there is no rate.
    """
    path = TABLES / f"{name}.json"
    rates: dict[str, tuple[float, float | None]] = {}
    losses: dict[str, float] = {}
    for (method, _), lane in lanes(read_json(path)["rows"] if path.exists() else []).items():
        row, inside = best_of_lane(lane)
        if inside and loss_of(row) < losses.get(method, math.inf):
            rates[method], losses[method] = (row["lr"], row.get("core_lr")), loss_of(row)
    return rates


def tried_rates(name: str) -> Grids:
    """The rates of the table ``name`` by method, from the lowest to the highest; none without such a table."""
    path = TABLES / f"{name}.json"
    tried: dict[str, set[float]] = {}
    for (method, _), lane in lanes(read_json(path)["rows"] if path.exists() else []).items():
        tried.setdefault(method, set()).update(float(row["lr"]) for row in lane)
    return {method: sorted(rates) for method, rates in tried.items()}
