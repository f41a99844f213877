"""Made-up grade-school word problems in GSM8K's format, for fine-tuning where no data set can be fetched.

Two families:

``basic``
    What the embedded base model is pre-trained on: bare arithmetic, stories that take one step, and stories
    in which things are added and taken away.
``composed``
    What it is fine-tuned on: the same words and the same arithmetic, put together in ways ``basic`` never
    does: three steps, multiplied, divided, added and subtracted in new orders.

A problem is a dictionary with GSM8K's two fields. ``answer`` holds one line per step, each with a calculator
mark, and ends with the result::

    {"question": "Ann has 4 boxes of 6 pens. ...",
     "answer": "The boxes hold <<4*6=24>>24 pens.\\nHalf is <<24/2=12>>12.\\n...\\n#### 17"}

Which split a problem belongs to is decided by a hash of its question, so splits cannot share a question
whatever the seeds and sizes. Every number, intermediate ones included, lies between 0 and 60.

Write the three files of a family to a folder::

    cd recipes && python -m embedded.word_problems FOLDER --family composed --train 3200
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FAMILIES = ("basic", "composed")
SPLITS = ("train", "validation", "test")

LARGEST = 60

_SHE = ("Ann", "Mia", "Eva", "Zoe", "Lily", "Nora", "Ruth", "Sara", "Ida", "Jane", "Kate", "Rosa")
_HE = ("Tom", "Ben", "Max", "Leo", "Sam", "Paul", "Omar", "Jack", "Dan", "Hugo", "Ivan", "Carl")
_THINGS = (
    "apples", "pens", "books", "marbles", "stamps", "cookies", "shells", "cards", "beads", "coins", "pears",
    "toys", "stickers", "eggs", "nuts", "plums", "balls", "roses", "candles", "buttons",
)  # fmt: skip
_CONTAINERS = ("boxes", "bags", "jars", "trays", "baskets", "packs")


@dataclass(frozen=True)
class Story:
    """A question, the lines of its rationale and its result."""

    question: str
    lines: tuple[str, ...]
    result: int

    def as_record(self) -> dict[str, str]:
        """The problem as GSM8K stores it."""
        return {"question": self.question, "answer": "\n".join((*self.lines, f"#### {self.result}"))}


@dataclass(frozen=True)
class Cast:
    """The people and things of one story."""

    hero: str
    she: str
    her: str
    friend: str
    third: str
    thing: str
    other: str
    containers: str

    @staticmethod
    def draw(rng: random.Random) -> Cast:
        """People with different names, things of different kinds."""
        hero, friend, third = rng.sample(_SHE + _HE, 3)
        she, her = ("She", "her") if hero in _SHE else ("He", "his")
        thing, other = rng.sample(_THINGS, 2)
        return Cast(hero, she, her, friend, third, thing, other, rng.choice(_CONTAINERS))


Template = Callable[[random.Random, Cast], Story]


def _mark(left: int, operator: str, right: int) -> tuple[int, str]:
    """The value of one step, and the step as GSM8K writes it: a calculator mark, then the value."""
    value = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[operator]
    assert 0 <= value <= LARGEST, f"{left}{operator}{right} leaves the range of numbers"
    assert operator != "/" or value * right == left, f"{left}/{right} is no integer"
    return value, f"<<{left}{operator}{right}={value}>>{value}"


def _pair_below(rng: random.Random, limit: int = LARGEST) -> tuple[int, int]:
    """Two numbers of at least 2 whose sum is at most ``limit``."""
    total = rng.randint(4, limit)
    first = rng.randint(2, total - 2)
    return first, total - first


def _factors(rng: random.Random, limit: int = LARGEST, even: bool = False) -> tuple[int, int]:
    """Two factors between 2 and 12 with a product of at most ``limit``."""
    while True:
        count, size = rng.randint(2, 12), rng.randint(2, 12)
        if count * size <= limit and not (even and count * size % 2):
            return count, size


# -- basic: one or two steps ------------------------------------------------------------------------------


def _bare(rng: random.Random, cast: Cast) -> Story:
    operator = rng.choice("++--**/")
    if operator == "*":
        left, right = _factors(rng)
    elif operator == "/":
        right, quotient = _factors(rng)
        left = right * quotient
    else:
        left, right = _pair_below(rng)
        left = left + right if operator == "-" else left
    word = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[operator]
    value, mark = _mark(left, operator, right)
    return Story(f"What is {left} {word} {right}?", (f"It is {mark}.",), value)


def _gain(rng: random.Random, cast: Cast) -> Story:
    first, second = _pair_below(rng)
    verb = rng.choice(("buys", "gets", "finds"))
    value, mark = _mark(first, "+", second)
    question = (
        f"{cast.hero} has {first} {cast.thing}. {cast.she} {verb} {second} more. "
        f"How many {cast.thing} does {cast.hero} have now?"
    )
    return Story(question, (f"{cast.hero} has {mark} {cast.thing}.",), value)


def _loss(rng: random.Random, cast: Cast) -> Story:
    second, value = _pair_below(rng)
    first = second + value
    verb = rng.choice(("loses", "sells", "eats", "gives away", "uses"))
    value, mark = _mark(first, "-", second)
    question = (
        f"{cast.hero} has {first} {cast.thing}. {cast.she} {verb} {second} of them. How many {cast.thing} are left?"
    )
    return Story(question, (f"{cast.hero} has {mark} {cast.thing} left.",), value)


def _together(rng: random.Random, cast: Cast) -> Story:
    first, second = _pair_below(rng)
    value, mark = _mark(first, "+", second)
    question = (
        f"{cast.hero} has {first} {cast.thing} and {cast.friend} has {second} {cast.thing}. "
        f"How many {cast.thing} do they have in all?"
    )
    return Story(question, (f"They have {mark} {cast.thing}.",), value)


def _compare(rng: random.Random, cast: Cast) -> Story:
    first, second = _pair_below(rng)
    operator, word = rng.choice((("+", "more"), ("-", "fewer")))
    first = first + second if operator == "-" else first
    value, mark = _mark(first, operator, second)
    question = (
        f"{cast.hero} has {first} {cast.thing}. {cast.friend} has {second} {cast.thing} {word} than "
        f"{cast.hero}. How many {cast.thing} does {cast.friend} have?"
    )
    return Story(question, (f"{cast.friend} has {mark} {cast.thing}.",), value)


def _gain_then_loss(rng: random.Random, cast: Cast) -> Story:
    first, second = _pair_below(rng)
    third = rng.randint(2, first + second - 1)
    total, gain = _mark(first, "+", second)
    value, loss = _mark(total, "-", third)
    question = (
        f"{cast.hero} has {first} {cast.thing}. {cast.she} gets {second} more and gives {third} to "
        f"{cast.friend}. How many {cast.thing} are left?"
    )
    return Story(question, (f"{cast.hero} has {gain} {cast.thing}.", f"Then {loss} are left."), value)


def _loss_then_gain(rng: random.Random, cast: Cast) -> Story:
    second, rest = _pair_below(rng)
    first = second + rest
    third = rng.randint(1, LARGEST - rest)
    rest, loss = _mark(first, "-", second)
    value, gain = _mark(rest, "+", third)
    question = (
        f"{cast.hero} has {first} {cast.thing}. {cast.she} loses {second} and then buys {third} more. "
        f"How many {cast.thing} does {cast.hero} have now?"
    )
    return Story(question, (f"{cast.hero} has {loss} {cast.thing} left.", f"Then it is {gain}."), value)


def _three_changes(rng: random.Random, cast: Cast) -> Story:
    first, second = _pair_below(rng)
    third = rng.randint(2, first + second - 1)
    total, gain = _mark(first, "+", second)
    rest, loss = _mark(total, "-", third)
    value, found = _mark(rest, "+", more := rng.randint(1, LARGEST - rest))
    question = (
        f"{cast.hero} has {first} {cast.thing} and buys {second} more. {cast.she} gives {third} to {cast.friend} "
        f"and then finds {more} more. How many {cast.thing} does {cast.hero} have now?"
    )
    lines = (f"{cast.hero} has {gain} {cast.thing}.", f"Then {loss} are left.", f"Then it is {found}.")
    return Story(question, lines, value)


def _groups(rng: random.Random, cast: Cast) -> Story:
    count, size = _factors(rng)
    value, mark = _mark(count, "*", size)
    told = rng.choice((
        f"There are {count} {cast.containers}. Each holds {size} {cast.thing}.",
        f"{cast.hero} buys {count} {cast.containers} of {size} {cast.thing}.",
    ))  # fmt: skip
    question = f"{told} How many {cast.thing} is that?"
    return Story(question, (f"The {cast.containers} hold {mark} {cast.thing}.",), value)


def _price(rng: random.Random, cast: Cast) -> Story:
    count, size = _factors(rng)
    value, mark = _mark(count, "*", size)
    question = rng.choice((
        f"{cast.hero} buys {count} {cast.thing} for ${size} each. How much is that?",
        f"{cast.hero} earns ${size} a day. How much does {cast.hero} earn in {count} days?",
    ))  # fmt: skip
    return Story(question, (f"It is ${mark}.",), value)


def _multiple(rng: random.Random, cast: Cast) -> Story:
    factor, word = rng.choice(((2, "twice"), (3, "three times")))
    first = rng.randint(2, LARGEST // factor)
    value, mark = _mark(first, "*", factor)
    question = (
        f"{cast.hero} has {first} {cast.thing}. {cast.friend} has {word} as many. "
        f"How many {cast.thing} does {cast.friend} have?"
    )
    return Story(question, (f"{cast.friend} has {mark} {cast.thing}.",), value)


def _half(rng: random.Random, cast: Cast) -> Story:
    first = 2 * rng.randint(1, LARGEST // 2)
    value, mark = _mark(first, "/", 2)
    question = f"{cast.hero} gives half of {first} {cast.thing} to {cast.friend}. How many {cast.thing} is that?"
    return Story(question, (f"Half is {mark}.",), value)


def _share(rng: random.Random, cast: Cast) -> Story:
    count, size = _factors(rng)
    value, mark = _mark(count * size, "/", count)
    question = (
        f"{cast.hero} puts {count * size} {cast.thing} into {count} {cast.containers}. "
        f"How many {cast.thing} does each hold?"
    )
    return Story(question, (f"Each holds {mark} {cast.thing}.",), value)


# -- composed: three steps ----------------------------------------------------------------------------------


def _boxes_half_more(rng: random.Random, cast: Cast) -> Story:
    count, size = _factors(rng, even=True)
    total, product = _mark(count, "*", size)
    rest, half = _mark(total, "/", 2)
    value, gain = _mark(rest, "+", more := rng.randint(2, LARGEST - rest))
    sentences = [
        f"{cast.hero} has {count} {cast.containers} of {size} {cast.thing}.",
        f"{cast.she} gives half of the {cast.thing} to {cast.friend} and then gets {more} more.",
    ]
    question = " ".join((*sentences, f"How many {cast.thing} does {cast.hero} have now?"))
    lines = (f"The {cast.containers} hold {product} {cast.thing}.", f"Half is {half}.", f"Then it is {gain}.")
    return Story(question, lines, value)


def _twice_together_loss(rng: random.Random, cast: Cast) -> Story:
    factor, word = rng.choice(((2, "twice"), (3, "three times")))
    first = rng.randint(2, LARGEST // (factor + 1))
    more, multiple = _mark(first, "*", factor)
    total, together = _mark(first, "+", more)
    value, loss = _mark(total, "-", gone := rng.randint(2, total - 1))
    verb = rng.choice(("lose", "sell", "use"))
    sentences = [
        f"{cast.hero} has {first} {cast.thing} and {cast.friend} has {word} as many.",
        f"They {verb} {gone} of them.",
    ]
    question = " ".join((*sentences, f"How many {cast.thing} are left?"))
    lines = (
        f"{cast.friend} has {multiple} {cast.thing}.",
        f"They have {together}.",
        f"Then {loss} are left.",
    )
    return Story(question, lines, value)


def _shop_change(rng: random.Random, cast: Cast) -> Story:
    count, size = _factors(rng, limit=LARGEST - 20)
    cost, product = _mark(count, "*", size)
    total, both = _mark(cost, "+", extra := rng.randint(2, LARGEST - 5 - cost))
    value, change = _mark(paid := rng.randint(total + 1, LARGEST), "-", total)
    sentences = [
        f"{cast.hero} has ${paid}.",
        f"{cast.she} buys {count} {cast.thing} for ${size} each and uses ${extra} for {cast.other}.",
    ]
    question = " ".join((*sentences, f"How much does {cast.hero} have left?"))
    lines = (f"The {cast.thing} are ${product}.", f"In all it is ${both}.", f"Then ${change} are left.")
    return Story(question, lines, value)


def _days_rest_half(rng: random.Random, cast: Cast) -> Story:
    count, size = _factors(rng, limit=LARGEST - 10)
    gone, product = _mark(count, "*", size)
    rest = 2 * rng.randint(1, (LARGEST - gone) // 2)
    first = gone + rest
    rest, loss = _mark(first, "-", gone)
    value, half = _mark(rest, "/", 2)
    verb = rng.choice(("uses", "sells", "eats"))
    sentences = [
        f"{cast.hero} has {first} {cast.thing}.",
        f"{cast.she} {verb} {size} a day for {count} days and gives half of the rest to {cast.friend}.",
    ]
    question = " ".join((*sentences, f"How many {cast.thing} does {cast.friend} get?"))
    lines = (f"In {count} days it is {product}.", f"Then {loss} are left.", f"Half is {half}.")
    return Story(question, lines, value)


def _more_multiple_together(rng: random.Random, cast: Cast) -> Story:
    factor, word = rng.choice(((2, "twice"), (3, "three times")))
    first, second = _pair_below(rng, limit=LARGEST // (factor + 1))
    larger, more = _mark(first, "+", second)
    largest, multiple = _mark(larger, "*", factor)
    value, together = _mark(larger, "+", largest)
    sentences = [
        f"{cast.hero} has {first} {cast.thing}.",
        f"{cast.friend} has {second} more than {cast.hero}, and {cast.third} has {word} as many as {cast.friend}.",
    ]
    asked = f"How many {cast.thing} do {cast.friend} and {cast.third} have in all?"
    question = " ".join((*sentences, asked))
    lines = (
        f"{cast.friend} has {more} {cast.thing}.",
        f"{cast.third} has {multiple} {cast.thing}.",
        f"They have {together}.",
    )
    return Story(question, lines, value)


def _loss_share_more(rng: random.Random, cast: Cast) -> Story:
    count, size = _factors(rng, limit=LARGEST - 10)
    rest = count * size
    first = rng.randint(rest + 2, LARGEST)
    rest, loss = _mark(first, "-", first - rest)
    each, shared = _mark(rest, "/", count)
    value, gain = _mark(each, "+", more := rng.randint(2, LARGEST - each))
    sentences = [
        f"{cast.hero} has {first} {cast.thing} and loses {first - rest}.",
        f"{cast.she} puts the rest into {count} {cast.containers}, and {more} more into each.",
    ]
    question = " ".join((*sentences, f"How many {cast.thing} does each hold?"))
    lines = (f"Then {loss} are left.", f"Each holds {shared}.", f"Then it is {gain}.")
    return Story(question, lines, value)


_TEMPLATES: dict[str, tuple[Template, ...]] = {
    "basic": (
        _bare, _bare, _bare, _bare, _bare, _bare, _gain, _loss, _together, _compare, _gain_then_loss, _loss_then_gain,
        _three_changes, _groups, _price, _multiple, _half, _share,
    ),
    "composed": (
        _boxes_half_more, _twice_together_loss, _shop_change, _days_rest_half, _more_multiple_together,
        _loss_share_more,
    ),
}  # fmt: skip


# How often a sentence with a number that does not matter is slipped in.
_ASIDES = {"basic": 0.25, "composed": 0.5}


def _with_aside(rng: random.Random, cast: Cast, story: Story) -> Story:
    """The story with one more sentence, anywhere before what is asked."""
    number = rng.randint(2, LARGEST)
    aside = rng.choice((
        f"{cast.hero} is {rng.randint(6, 15)} years old.",
        f"{cast.hero} lives {number} miles away.",
        f"There are {number} {cast.other} on the table.",
        f"It is day {rng.randint(2, 30)} of the month.",
    ))  # fmt: skip
    sentences = re.split(r"(?<=\.) ", story.question)
    sentences.insert(rng.randrange(len(sentences)), aside)
    return Story(" ".join(sentences), story.lines, story.result)


def split_of(question: str) -> str:
    """The split that a question belongs to: 80 % train, 10 % validation, 10 % test, by its hash."""
    bucket = hashlib.sha256(question.encode()).digest()[0] % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


def _stories(family: str, split: str, seed: int) -> Iterator[Story]:
    rng = random.Random(f"{family}/{split}/{seed}")
    while True:
        template, cast = rng.choice(_TEMPLATES[family]), Cast.draw(rng)
        story = template(rng, cast)
        if template is not _bare and rng.random() < _ASIDES[family]:
            story = _with_aside(rng, cast, story)
        if split_of(story.question) == split:
            yield story


def generate(family: str, split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
    """``n`` problems of a family and split, the same ones whenever the arguments are the same.

    Problems of ``composed`` are all different. Those of ``basic`` may repeat: there are only so many small sums,
    and pre-training is meant to see them often. A larger ``n`` continues the list of a smaller one.

    Raises:
        ValueError: for an unknown family or split, or a negative ``n``.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; choose one of {', '.join(FAMILIES)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    if n < 0:
        raise ValueError(f"n is {n}; it counts problems, so it cannot be negative")
    stories = _stories(family, split, seed)
    if family == "basic":
        return [next(stories).as_record() for _ in range(n)]
    unique: dict[str, Story] = {}
    while len(unique) < n:
        story = next(stories)
        unique.setdefault(story.question, story)
    return [story.as_record() for story in unique.values()]


def write_splits(folder: Path, family: str, sizes: dict[str, int], seed: int = 0) -> list[Path]:
    """Write ``<split>.jsonl`` for each split in ``sizes`` and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, size in sizes.items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in generate(family, split, size, seed)))
        paths.append(path)
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write word problems in GSM8K's format as JSON lines.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="composed")
    parser.add_argument("--seed", type=int, default=0)
    for split, size in zip(SPLITS, (3200, 250, 250), strict=True):
        parser.add_argument(f"--{split}", type=int, default=size, help=f"problems to write (default {size})")
    options = parser.parse_args(arguments)
    sizes = {split: getattr(options, split) for split in SPLITS}
    for path in write_splits(options.folder, options.family, sizes, options.seed):
        print(path)


if __name__ == "__main__":
    main()
