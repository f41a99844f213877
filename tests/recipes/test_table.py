"""The README's table of what can be run is the one that the recipes give."""

from __future__ import annotations

import subprocess
import sys

import pytest

from recipes import table


def test_the_readme_is_up_to_date() -> None:
    readme = table.README.read_text(encoding="utf-8")
    assert table.renewed(readme) == readme, "run: python recipes/table.py"


def test_every_recipe_preset_and_method_is_in_it() -> None:
    made = table.text()
    assert (
        len(table.recipes())
        == len([path for kind in ("llama*", "t5*", "text*") for path in table.HERE.glob(f"{kind}.py")])
        > 0
    )
    for recipe in table.recipes():
        for preset in recipe.presets:
            assert f"| `{recipe.path.name}` | `{preset}` |" in made
    for name, method in table.METHODS.items():
        assert f"`{name}` ({method.label})" in made


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the marks"):
        table.renewed("# Nothing")


def test_an_argument_that_it_does_not_know_changes_nothing() -> None:
    before = table.README.read_bytes()
    for argument, code in (("--help", 0), ("--hlep", 2)):
        done = subprocess.run([sys.executable, table.__file__, argument], capture_output=True, check=False)
        assert done.returncode == code
    assert table.README.read_bytes() == before
