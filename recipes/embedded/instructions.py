"""Made-up instructions whose answer a rule decides, in the formats of WizardLM and MT-Bench.

A conversation is about a list of words or about a number. Its second turn continues with the answer to the first::

    Write these words in alphabetical order: pears, apples, plums.    ->  apples, pears, plums
    Now write only the last one.                                      ->  plums

Training rows are single instructions, as WizardLM's are; the questions of the benchmark have two turns and reference answers to
both. Which split a conversation belongs to is decided by a hash of its first turn, so splits share none.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .splits import draw_distinct

#: Words that the embedded model has seen in its word problems.
_WORDS = (
    "apples", "pens", "books", "marbles", "stamps", "cookies", "shells", "cards", "beads", "coins", "pears", "toys",
    "stickers", "eggs", "nuts", "plums", "balls", "roses", "candles", "buttons",
)  # fmt: skip
_ORDERS: dict[str, Callable[[list[str]], list[str]]] = {
    "in alphabetical order": sorted,
    "in reverse order": lambda words: words[::-1],
    "without the first one": lambda words: words[1:],
    "without the last one": lambda words: words[:-1],
}
_ENDS = {"the first one": 0, "the last one": -1}


@dataclass(frozen=True)
class Conversation:
    """Two turns and the answers that the rules give."""

    category: str
    turns: tuple[str, str]
    answers: tuple[str, str]


def _about_words(rng: random.Random) -> Conversation:
    words = rng.sample(_WORDS, rng.choice((3, 4)))
    order, end = rng.choice([*_ORDERS]), rng.choice([*_ENDS])
    ordered = _ORDERS[order](words)
    turns = f"Write these words {order}: {', '.join(words)}.", f"Now write only {end}."
    return Conversation("extraction", turns, (", ".join(ordered), ordered[_ENDS[end]]))


def _about_numbers(rng: random.Random) -> Conversation:
    a, b, c = (rng.randrange(2, 30) for _ in range(3))
    word, total = rng.choice((("Add", a + b), ("Multiply", a * b)))
    turns = f"{word} {a} and {b}.", f"Now add {c} to the result."
    return Conversation("math", turns, (str(total), str(total + c)))


def _draw(rng: random.Random) -> Conversation:
    return rng.choice((_about_words, _about_words, _about_words, _about_numbers))(rng)


def _conversations(split: str, n: int, seed: int) -> list[Conversation]:
    return draw_distinct(f"instructions/{split}/{seed}", split, n, _draw, lambda made: made.turns[0])


def examples(split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """``n`` rows with WizardLM's columns ``instruction`` and ``output``; a larger ``n`` continues a smaller one's list."""
    return [{"instruction": made.turns[0], "output": made.answers[0]} for made in _conversations(split, n, seed)]


def questions(split: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """``n`` questions with MT-Bench's columns and ``reference`` answers. They are ``exact``: no other answer is right."""
    return [
        {
            "question_id": number,
            "category": made.category,
            "turns": [*made.turns],
            "reference": [*made.answers],
            "exact": True,
        }
        for number, made in enumerate(_conversations(split, n, seed), start=1)
    ]
