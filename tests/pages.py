"""Runs the Python blocks of a documentation page with Sybil, as a reader would who pastes them one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sybil import Document
from sybil.document import PythonDocStringDocument
from sybil.parsers.myst import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def parse(page: Path) -> Document:
    """The Python blocks of a page, be they fenced code or cells of a notebook; all run in one namespace."""
    document = Document.parse(str(page), PythonCodeBlockParser())
    document.namespace["__name__"] = "__main__"
    return document


def blocks(page: Path) -> list[str]:
    """The text of each Python block."""
    return [str(example.parsed) for example in parse(page)]


def run(page: Path) -> dict[str, Any]:
    """Run the blocks of a page and return their namespace; errors name the line of the page."""
    document = parse(page)
    found = list(document)
    assert found, f"{page.name} has no example"
    for example in found:
        example.evaluate()
    return document.namespace


def run_docstrings(module: Path) -> int:
    """Run the `>>>` examples in the docstrings of a module; returns how many there are."""
    found = list(PythonDocStringDocument.parse(str(module), DocTestParser()))
    for example in found:
        example.evaluate()
    return len(found)


def as_script(page: Path) -> str:
    """All blocks of a page as one program."""
    return "\n".join(blocks(page))
