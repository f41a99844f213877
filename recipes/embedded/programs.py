"""Made-up small programs, in the formats of CodeFeedback and HumanEval, for fine-tuning where no data set can be fetched.

A program takes a list of whole numbers through two or three steps, each of which is a phrase of its docstring and a line of
its body. What it should return is computed from the meaning of the phrases, not from the lines, so a test of a problem is no
copy of its solution::

    def change(numbers):
        \"\"\"Add 3 to each number, then keep the even ones.\"\"\"
        numbers = [n + 3 for n in numbers]
        numbers = [n for n in numbers if n % 2 == 0]
        return numbers

Which split a program belongs to is decided by a hash of its docstring, so splits share no program whatever the seeds and sizes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .splits import draw_distinct

Record = dict[str, str]

_NAMES = ("change", "make", "work", "turn")


@dataclass(frozen=True)
class Step:
    """What a docstring says, the line of code that does it, and what it means."""

    phrase: str
    line: str
    meaning: Callable[[list[int]], list[int]]


def _steps() -> list[Step]:
    steps = [
        Step("turn the order round", "numbers = numbers[::-1]", lambda xs: [*reversed(xs)]),
        Step("sort the numbers", "numbers = sorted(numbers)", sorted),
        Step(
            "keep the even ones",
            "numbers = [n for n in numbers if n % 2 == 0]",
            lambda xs: [x for x in xs if not x & 1],
        ),
        Step("keep the odd ones", "numbers = [n for n in numbers if n % 2 == 1]", lambda xs: [x for x in xs if x & 1]),
    ]
    return [*steps, *(step for k in range(2, 10) for step in _steps_with(k))]


def _steps_with(k: int) -> list[Step]:
    return [
        Step(f"add {k} to each number", f"numbers = [n + {k} for n in numbers]", lambda xs: [x + k for x in xs]),
        Step(f"take {k} from each number", f"numbers = [n - {k} for n in numbers]", lambda xs: [x - k for x in xs]),
        Step(
            f"multiply each number by {k}",
            f"numbers = [n * {k} for n in numbers]",
            lambda xs: [sum([x] * k) for x in xs],
        ),
        Step(f"leave out the first {k}", f"numbers = numbers[{k}:]", lambda xs: [*xs][k:]),
    ]


_STEPS = _steps()


@dataclass(frozen=True)
class Program:
    """A function of a list of whole numbers."""

    name: str
    steps: tuple[Step, ...]

    @property
    def text(self) -> str:
        """What it does, in words; no two programs of one split share it."""
        return ", then ".join(step.phrase for step in self.steps).capitalize() + "."

    @property
    def prompt(self) -> str:
        """Its first line and its docstring."""
        return f'def {self.name}(numbers):\n    """{self.text}"""\n'

    @property
    def body(self) -> str:
        """What follows the docstring."""
        return "".join(f"    {line}\n" for line in (*(step.line for step in self.steps), "return numbers"))

    def result(self, numbers: list[int]) -> list[int]:
        """What it should return."""
        for step in self.steps:
            numbers = step.meaning(numbers)
        return numbers


def _draw(rng: random.Random) -> Program:
    return Program(rng.choice(_NAMES), tuple(rng.sample(_STEPS, rng.choice((2, 3)))))


def _programs(split: str, n: int, seed: int) -> list[Program]:
    return draw_distinct(f"programs/{split}/{seed}", split, n, _draw, lambda program: program.text)


def examples(split: str, n: int, seed: int = 0) -> list[Record]:
    """``n`` rows with CodeFeedback's columns ``query`` and ``answer``; a larger ``n`` continues the list of a smaller one."""
    rows = []
    for program in _programs(split, n, seed):
        query = f"Complete the following Python code: \n\ncode:\n```python\n{program.prompt}\n```"
        rows.append({"query": query, "answer": f"```python\n{program.prompt}{program.body}```"})
    return rows


def problems(split: str, n: int, seed: int = 0) -> list[Record]:
    """``n`` problems with HumanEval's columns, solution included; the tests call the program with eight lists."""
    rng = random.Random(f"tests/{split}/{seed}")
    made = []
    for number, program in enumerate(_programs(split, n, seed)):
        inputs = [[rng.randrange(-20, 20) for _ in range(rng.randrange(4, 16))] for _ in range(8)]
        lines = [f"    assert candidate({values}) == {program.result(values)}\n" for values in inputs]
        made.append(
            {
                "task_id": f"programs/{split}/{number}",
                "prompt": program.prompt,
                "entry_point": program.name,
                "canonical_solution": program.body,
                "test": "def check(candidate):\n" + "".join(lines),
            }
        )
    return made
