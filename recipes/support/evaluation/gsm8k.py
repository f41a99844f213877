r"""GSM8K: the final number of an answer, read exactly, and the share of problems where it is the reference's.

The data set is Cobbe et al. 2021 (arXiv:2110.14168); a reference answer ends in ``#### number``. An answer is read twice:

- *marked*: the first number behind the first ``####``, as the data set's authors and LoRA-GA read it, or else behind the
  last "the answer is", in which MetaMathQA's answers end. Without such a mark there is no number. This is the score
  to report: the recipes train on answers that carry the mark.
- *flexible*: the marked number, or else the last number of the text. It tells a wrong answer from a missing mark.

Numbers are compared as rationals, so 18, 18.00, $18 and 36/2 are equal. An answer without a number is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from .accuracy import Accuracy
from .records import Record, read_records

_MINUS = "-\N{MINUS SIGN}\N{EN DASH}"
_INTEGER = r"(?:\d{1,3}(?:(?:,|\{,\}|\\,)\d{3})+|\d+)"

#: One number, with what may stand around and in it. A hyphen behind a word, a digit or a bracket is a minus between two
#: terms ("10-5") and no sign, unless the text begins with it. "1,23", "12:30", "3/4/2020" and "1e5" are read as no number.
_NUMBER = re.compile(
    rf"""
    (?<!\d) (?<!\d[.,:/eE])
    (?P<sign> (?:^|(?<![\w)\]}}])) [{_MINUS}+] (?:(?<=^.)\s*)? )?
    (?: \\?[$€£¥] \s* (?P<inner_sign> [{_MINUS}+] )? )?
    (?:
        (?: (?P<units> \d+ ) \s* )? \\[dt]?frac \s* \{{ \s* (?P<top> \d+ ) \s* \}} \s* \{{ \s* (?P<bottom> \d+ ) \s* \}}
      | (?P<mixed> \d+ ) \s+ (?P<over> \d+ ) / (?P<under> \d+ )
      | (?P<whole> {_INTEGER} | (?=\.\d) ) (?P<decimals> \.\d+ )? (?: \s? / \s? (?P<divisor> {_INTEGER} ) )?
    )
    (?! \d | [.,:/]\d | [eE][+-]?\d )
    """,
    re.VERBOSE,
)
_HASHES = re.compile(r"####")
_THE_ANSWER_IS = re.compile(r"the (?:final )?answer is", re.IGNORECASE)


def marked_number(answer: str) -> Fraction | None:
    """The number behind the mark of the final answer; ``None`` where there is no mark, or no number on its line."""
    for found in [*_HASHES.finditer(answer), *reversed([*_THE_ANSWER_IS.finditer(answer)])]:
        line = answer[found.end() :].lstrip(" \t\r\n:*").partition("\n")[0]
        numbers = _numbers(line)
        if numbers:
            return numbers[0]
    return None


def flexible_number(answer: str) -> Fraction | None:
    """The marked number, or else the last number of the text; ``None`` where the text has none."""
    marked = marked_number(answer)
    if marked is not None:
        return marked
    numbers = _numbers(answer)
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[Fraction]:
    return [value for value in map(_value, _NUMBER.finditer(text)) if value is not None]


def _value(found: re.Match[str]) -> Fraction | None:
    parts = {name: re.sub(r"[,{}\\]", "", part or "") for name, part in found.groupdict().items()}
    try:
        if parts["bottom"]:
            size = int(parts["units"] or 0) + Fraction(int(parts["top"]), int(parts["bottom"]))
        elif parts["under"]:
            size = int(parts["mixed"]) + Fraction(int(parts["over"]), int(parts["under"]))
        else:
            size = Fraction(f"{parts['whole'] or 0}{parts['decimals']}") / int(parts["divisor"] or 1)
    except ZeroDivisionError:
        return None
    except ValueError:  # Python reads no integer of more than sys.get_int_max_str_digits() digits
        return None
    negative = any(sign in _MINUS for sign in (parts["sign"].strip(), parts["inner_sign"]) if sign)
    return -size if negative else size


def reference_number(problem: Record) -> Fraction:
    """The number behind ``####`` in a problem's reference answer; ``ValueError`` where there is none."""
    answer = problem["answer"]
    number = marked_number(answer) if "####" in answer else None
    if number is None:
        raise ValueError(f"a reference answer should end in '#### number', found ...{answer[-40:]!r}")
    return number


def read_problems(path: str | Path) -> list[Record]:
    """A file of GSM8K: objects with ``question`` and ``answer``; every answer has its number behind ``####``."""
    problems = read_records(path, {"question": str, "answer": str})
    for index, problem in enumerate(problems, start=1):
        try:
            reference_number(problem)
        except ValueError as error:
            raise ValueError(f"{path}, problem {index}: {error}") from error
    return problems


@dataclass(frozen=True)
class Scores:
    """Exact match over a set of problems."""

    marked: Accuracy
    flexible: Accuracy
    right: tuple[bool, ...]
    """For each problem, whether its marked number is the reference's."""


def score(answers: Sequence[str], problems: Sequence[Record]) -> Scores:
    """Compare the model's answers with the references of as many problems."""
    if len(answers) != len(problems):
        raise ValueError(f"{len(answers)} answers to {len(problems)} problems; there should be one for each")
    references = [reference_number(problem) for problem in problems]
    right = tuple(marked_number(answer) == want for answer, want in zip(answers, references, strict=True))
    flexible = sum(flexible_number(answer) == want for answer, want in zip(answers, references, strict=True))
    return Scores(Accuracy(sum(right), len(right)), Accuracy(flexible, len(right)), right)
