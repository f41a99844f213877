"""Runs the Python blocks of a documentation page, as a reader would who pastes them one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

_BLOCK = re.compile(r"^```(?:python|\{code-cell\} python)\n((?::[^\n]*\n)*)(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line and text of each Python block, be it fenced code or a cell of a notebook."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(2)), match[2]) for match in _BLOCK.finditer(text)]


def run(page: Path) -> dict[str, Any]:
    """Run the blocks of a page in one namespace, which is returned; errors name the line of the page."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = blocks(page)
    assert found, f"{page.name} has no example"
    for line, code in found:
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
    return namespace


def as_script(page: Path) -> str:
    """All blocks of a page as one program."""
    return "\n".join(code for _, code in blocks(page))
