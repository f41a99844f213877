"""The examples on the documentation pages run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs" / "factorizations").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples(page: Path) -> None:
    """Blocks of one page run one after the other in one namespace."""
    namespace: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks, f"{page.name} has no example"
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)


def test_every_factorization_has_a_page() -> None:
    assert {page.stem for page in PAGES} >= {"mpo", "svd", "tucker", "cp", "tensor_ring", "backends"}
