"""Which learning rates were tried for a method, from the repository's tables of tuned rates."""

from __future__ import annotations

from .config import Grids
from .provenance import read_json
from .tuned import TABLES, lanes


def tried_rates(name: str) -> Grids:
    """The rates of the table ``name`` by method, from the lowest to the highest; none without such a table."""
    path = TABLES / f"{name}.json"
    tried: dict[str, set[float]] = {}
    for (method, _), lane in lanes(read_json(path)["rows"] if path.exists() else []).items():
        tried.setdefault(method, set()).update(float(row["lr"]) for row in lane)
    return {method: sorted(rates) for method, rates in tried.items()}
