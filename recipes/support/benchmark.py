"""How a model is examined: it answers into a file, and the answers of the file are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from support.config import Config
    from support.evaluation.answers import Generate

Record = dict[str, Any]


@dataclass(frozen=True)
class Scores:
    """What a benchmark says of a model's answers."""

    figures: Mapping[str, Any]
    """``accuracy`` and ``format_rate`` as shares, ``grade`` from 1 to 10; ``None`` for what was not scored."""
    rows: Sequence[Record] = field(default_factory=tuple)
    """Every record with its ``output`` and, where it was scored, whether it is ``correct``."""
    note: str = ""
    """What to do for figures that are missing, in a sentence."""


class Benchmark(Protocol):
    """Answers come first and scores from the answers, so that a run is scored later, or again, without the model."""

    @property
    def measure(self) -> str:
        """What the main figure is, as a table's title."""

    @property
    def answered(self) -> bool:
        """Whether a record to evaluate on has an answer as one to train on has, so that the loss on it can be measured."""

    def check(self, config: Any) -> None:
        """Refuse what cannot be scored as ``config`` asks, with a ``ValueError``, before anything is trained."""

    def scores(self, config: Any) -> bool:
        """Whether ``config`` allows what the main figure needs, such as the execution of code."""

    def answer(self, config: Any, records: Sequence[Record], generate: Generate, file: Path) -> list[Record]:
        """The answers to all records. What the file holds already is not asked for again."""

    def score(self, config: Any, records: Sequence[Record], answers: Sequence[Record], stem: Path) -> Scores:
        """What the answers are worth; further files begin with ``stem``."""


@dataclass(frozen=True)
class ExactMatch:
    """One answer to each record, which a function grades: whether it is well formed, and whether it is right."""

    measure: str
    prompt: Callable[[Record], str]
    grade: Callable[[Record, str], tuple[bool, bool]]
    answered: bool = True

    def check(self, config: Config) -> None:
        """Nothing can be wrong here."""

    def scores(self, config: Config) -> bool:
        return True

    def answer(self, config: Config, records: Sequence[Record], generate: Generate, file: Path) -> list[Record]:
        from support.evaluation.answers import collect_answers

        prompts = [self.prompt(record) for record in records]
        # prompts of about one length share a batch, which leaves less padding
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        questions: list[tuple[Record, str]] = [({"problem": row}, prompts[row]) for row in order]
        answers = collect_answers(file, questions, generate, config.eval_batch)
        return sorted(answers, key=lambda answer: answer["problem"])

    def score(self, config: Config, records: Sequence[Record], answers: Sequence[Record], stem: Path) -> Scores:
        outputs = [answer["answer"] for answer in answers]
        grades = [self.grade(record, output) for record, output in zip(records, outputs, strict=True)]
        rows = [
            {**record, "output": output, "correct": right}
            for record, output, (_, right) in zip(records, outputs, grades, strict=True)
        ]
        formed, right = (sum(column) / len(grades) for column in zip(*grades, strict=True))
        return Scores({"accuracy": right, "format_rate": formed}, rows)
