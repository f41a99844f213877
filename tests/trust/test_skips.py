"""docs/skips.json lists every reason for which a test is skipped, and nothing else."""

from __future__ import annotations

import ast
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BY_NAME = "a backend by name: opt_einsum, tensorly, tensornetwork"
LIST = ROOT / "docs" / "skips.json"
LIBRARIES = "a library that is not installed"


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


def listed() -> dict[str, dict[str, dict[str, str]]]:
    """What is missing -> reason -> the files that skip for it, and what they would test; libraries have no files."""
    found: dict[str, dict[str, dict[str, str]]] = json.loads(LIST.read_text())
    return found


def test_the_list_is_complete() -> None:
    given = reasons()
    libraries = listed()[LIBRARIES].keys()
    others = {
        reason: set(files) for what, found in listed().items() if what != LIBRARIES for reason, files in found.items()
    }
    assert not libraries & others.keys()
    assert given.keys() == libraries | others.keys()
    assert others == {reason: files for reason, files in given.items() if reason not in libraries}


def test_the_libraries_are_in_the_dev_extra() -> None:
    metadata = (ROOT / "pyproject.toml").read_text()
    libraries = listed()[LIBRARIES].keys() - {BY_NAME}
    assert "peft" in libraries
    assert not {name for name in libraries if name.replace("_", "-") not in metadata.replace("_", "-")}
