"""docs/skips.md lists every reason for which a test is skipped, and nothing else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BY_NAME = "a backend by name: opt_einsum, tensorly, tensornetwork"
LIST = ROOT / "docs" / "skips.md"


def named(call: ast.Call) -> str:
    return ast.unparse(call.func)


def reasons() -> dict[str, set[str]]:
    """Reason, or the library that is missing -> the files that skip for it."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            what = named(node)
            if what == "pytest.importorskip":
                reason: ast.expr = node.args[0]
            elif what in ("pytest.skip", "pytest.mark.skip", "pytest.mark.skipif", "pytest.xfail", "pytest.mark.xfail"):
                given = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
                reason = given[0] if given else node.args[-1]
            else:
                continue
            text = str(reason.value) if isinstance(reason, ast.Constant) else BY_NAME
            found.setdefault(text, set()).add(path.relative_to(ROOT).as_posix())
    return found


def listed() -> dict[str, set[str]]:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in LIST.read_text().splitlines()
        if line.startswith("| ") and not line.startswith(("| reason", "| library"))
    ]
    return {row[0]: set(re.findall(r"`(tests/[\w/.]+)`", "".join(row[1:]))) for row in rows}


def test_the_list_is_complete() -> None:
    given, known = reasons(), listed()
    assert set(given) == set(known)
    # those of hardware and systems name their tests too
    assert {reason: files for reason, files in known.items() if files} == {
        reason: files for reason, files in given.items() if not (reason == BY_NAME or re.fullmatch(r"[a-z_]+", reason))
    }


def test_the_libraries_are_in_the_dev_extra() -> None:
    metadata = (ROOT / "pyproject.toml").read_text()
    libraries = {name for name in listed() if re.fullmatch(r"[a-z_]+", name)}
    assert "peft" in libraries
    assert not {name for name in libraries if name.replace("_", "-") not in metadata.replace("_", "-")}
