"""Pages of which a part is made by a program: what stands between two marks is replaced, the rest is kept."""

from __future__ import annotations

from pathlib import Path


def replaced(page: str, start: str, end: str, text: str, path: Path) -> str:
    """``page`` with ``text`` between its marks ``start`` and ``end``.

    Raises:
        ValueError: it lacks the marks; names the file, ``path``.
    """
    before, found, rest = page.partition(start)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{path} lacks the marks {start!r} and {end!r}, between which generated text belongs")
    return f"{before}{start}\n\n{text.strip()}\n\n{end}{after}"
