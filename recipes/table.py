"""Writes the README's table of what can be run, from the recipes themselves::

python recipes/table.py
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from support.config import EMBEDDED
from support.marked import replaced
from support.methods import METHODS
from support.recipe import Recipe
from support.tables import Table

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
START, END = "<!-- made by: python recipes/table.py -->", "<!-- end of what recipes/table.py makes -->"

#: methods that are named where rates are known for no more than so many
MANY = 4


def recipes() -> list[Recipe]:
    """Those of all files in this folder that have one."""
    modules = [
        importlib.import_module(path.stem)
        for path in sorted(HERE.glob("*.py"))
        if "\nRECIPE = Recipe(" in path.read_text()
    ]
    return [module.RECIPE for module in modules]


def rows_of(recipe: Recipe) -> list[Sequence[str]]:
    """A row for each preset."""
    rows: list[Sequence[str]] = []
    for name, preset in recipe.presets.items():
        places = [place for place in (preset.data, getattr(preset, "test_data", None)) if place]
        shown = "generated" if places == [EMBEDDED] else ", ".join(places)
        known = [f"`{method}`" for method in recipe.rates.get(name, {})]
        tuned = ", ".join(known) if len(known) <= MANY else f"{len(known)} of {len(METHODS)} methods"
        tuned = tuned or "none: give `--lr`"
        model = "the embedded one" if preset.model == EMBEDDED else preset.model
        rows.append((f"`{recipe.path.name}`", f"`{name}`", model, shown, recipe.benchmark.measure, tuned))
    return rows


def text() -> str:
    """What stands between the two marks."""
    columns = ("recipe", "preset", "model", "data", "measured", "rates known for")
    table = Table("what can be run", columns, [row for recipe in recipes() for row in rows_of(recipe)])
    methods = ", ".join(f"`{name}` ({method.label})" for name, method in METHODS.items())
    return f"{table.markdown()}\n`--method` takes any of {methods}."


def renewed(readme: str) -> str:
    """The README with the table as it is now.

    Raises:
        ValueError: it lacks the marks.
    """
    return replaced(readme, START, END, text(), README)


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").split("::")[0], allow_abbrev=False).parse_args()
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{README}: renewed")
