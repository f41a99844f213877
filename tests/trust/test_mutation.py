"""docs/mutation.md says what docs/mutation/results.json holds, and a mutation run names modules and tests that are there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.mutation.targets import LEFT_OUT, MUTATED, TESTS

ROOT = Path(__file__).parent.parent.parent
RESULTS: dict[str, dict[str, Any]] = json.loads((ROOT / "docs" / "mutation" / "results.json").read_text())
PAGE = (ROOT / "docs" / "mutation.md").read_text(encoding="utf-8")
KINDS = ("Equivalent", "Message", "Cost", "Elsewhere", "Arbitrary", "Killed since", "Open")


def within(path: str, part: str) -> bool:
    return path == part or path.startswith(f"{part}/")


def test_every_module_is_mutated_or_left_out_for_a_reason() -> None:
    for file in (ROOT / "tnadapt").rglob("*.py"):
        path = file.relative_to(ROOT).as_posix()
        assert len([part for part in (*MUTATED, *LEFT_OUT) if within(path, part)]) == 1, path
    for part in (*MUTATED, *LEFT_OUT, *(test for tests in TESTS.values() for test in tests)):
        assert (ROOT / part).exists(), part
    assert set(MUTATED) == set(TESTS)


def test_the_page_names_what_is_left_out() -> None:
    assert all(f"`{part}`" in PAGE for part in LEFT_OUT)


def test_every_survivor_has_a_reason() -> None:
    for path, found in RESULTS.items():
        assert any(within(path, part) for part in MUTATED), path
        assert found["mutants"] == found["killed"] + found["time"] + len(found["survivors"])
        for one in found["survivors"]:
            assert one["reason"].startswith(KINDS), f"{path}:{one['line']}: {one['after']}"


def test_the_figures_of_the_page_are_those_of_the_data() -> None:
    drawn, survived, exist = (
        sum(one)
        for one in zip(*((m["mutants"], len(m["survivors"]), m["exist"]) for m in RESULTS.values()), strict=True)
    )
    said = re.search(
        r"([\d,]+) changes were drawn from the ([\d,]+) of (\d+) modules.*noticed ([\d,]+), which is ([\d.]+) %",
        PAGE,
        re.DOTALL,
    )
    assert said is not None
    noticed = drawn - survived
    assert said.groups() == (
        f"{drawn:,}",
        f"{exist:,}",
        str(len(RESULTS)),
        f"{noticed:,}",
        f"{100 * noticed / drawn:.1f}",
    )
