"""Made-up examples that belong to one split each, whatever the seeds and sizes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import TypeVar

SPLITS = ("train", "validation", "test")

T = TypeVar("T")


def split_of(text: str) -> str:
    """The split of an example: 80 % train, 10 % validation, 10 % test, by the hash of its text."""
    return {0: "test", 1: "validation"}.get(hashlib.sha256(text.encode()).digest()[0] % 10, "train")


def draw_distinct(
    seed: str, split: str, n: int, draw: Callable[[random.Random], T], text_of: Callable[[T], str]
) -> list[T]:
    """``n`` drawn examples of a split, no two with the same text. A larger ``n`` continues the list of a smaller one.

    Raises:
        ValueError: for an unknown split, a negative ``n``, or more examples than there seem to be.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    if n < 0:
        raise ValueError(f"n is {n}; it counts examples, so it cannot be negative")
    rng, found, repeated = random.Random(seed), dict[str, T](), 0
    while len(found) < n:
        example = draw(rng)
        text = text_of(example)
        if split_of(text) != split:
            continue
        repeated = repeated + 1 if text in found else 0
        if repeated == 10_000:
            raise ValueError(
                f"n is {n}, and the split {split} has hardly more than {len(found)} examples; ask for fewer"
            )
        found.setdefault(text, example)
    return [*found.values()]
