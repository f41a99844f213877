"""GSM8K: a number is read back however it is written, what is not a number is not, and scores count exact matches."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

pytest.importorskip("scipy")

from hypothesis import example, given
from hypothesis import strategies as st

from recipes.support.evaluation import gsm8k
from recipes.support.evaluation.gsm8k import flexible_number, marked_number

SIGNS = {"": 1, "+": 1, "-": -1, "\N{MINUS SIGN}": -1, "\N{EN DASH}": -1}
CURRENCIES = ["", "$", r"\$", "€", "£", "$ "]
ENDINGS = ["", ".", "%", " %", r"\%", " dollars", ",", "!", "}", "**", ")", "\n", ". So it is.", "km", " per day"]
OPENINGS = ["", " ", "\n", ": ", ":", " **", r" \boxed{", " (", " x = ", " about "]
SEPARATORS = [",", "{,}", r"\,"]


@st.composite
def written_numbers(draw: st.DrawFn) -> tuple[str, Fraction]:
    """A number as a text, and its value from integers that the text was made of."""
    sign, currency = draw(st.sampled_from(list(SIGNS))), draw(st.sampled_from(CURRENCIES))
    kind = draw(st.sampled_from(["decimal", "grouped", "point", "quotient", "mixed", "latex", "mixed latex"]))
    whole = draw(st.integers(0, 10**9))
    digits = draw(st.sampled_from(["", "0", "5", "25", "075"]))
    top, bottom = draw(st.integers(0, 99)), draw(st.integers(1, 99))
    decimals = Fraction(int(digits or 0), 10 ** len(digits))
    if kind == "decimal":
        text, size = f"{whole}{digits and '.' + digits}", whole + decimals
    elif kind == "grouped":
        grouped = f"{whole:,}".replace(",", draw(st.sampled_from(SEPARATORS)))
        text, size = f"{grouped}{digits and '.' + digits}", whole + decimals
    elif kind == "point":
        text, size = f".{digits or '0'}", decimals
    elif kind == "quotient":
        text, size = f"{whole}{draw(st.sampled_from(['/', ' / ']))}{bottom}", Fraction(whole, bottom)
    elif kind == "mixed":
        text, size = f"{whole} {top}/{bottom}", whole + Fraction(top, bottom)
    else:
        front = whole if kind == "mixed latex" else 0
        frac = draw(st.sampled_from([r"\frac", r"\dfrac", r"\tfrac"]))
        text, size = f"{front or ''}{frac}{{{top}}}{{{bottom}}}", front + Fraction(top, bottom)
    inside = bool(currency) and draw(st.booleans())
    written = f"{currency}{sign}{text}" if inside else f"{sign}{currency}{text}"
    return written, SIGNS[sign] * size


@given(written_numbers(), st.sampled_from(OPENINGS), st.sampled_from(ENDINGS))
def test_a_number_behind_the_mark_is_read_back(number, opening, ending):
    text, value = number
    assert marked_number(f"She has 17 eggs, 3 more.\n####{opening}{text}{ending}") == value
    assert marked_number(f"She has 17 eggs, 3 more.\nThe answer is{opening}{text}{ending}") == value


@given(written_numbers(), st.sampled_from(ENDINGS))
def test_without_a_mark_the_last_number_is_the_flexible_one(number, ending):
    text, value = number
    answer = f"There were 17 of 20. They paid {text}{ending}"
    assert marked_number(answer) is None
    assert flexible_number(answer) == value


@given(st.text(st.characters(exclude_categories=["N"])))
@example("")
@example("#### none")
@example("The answer is unknown.")
@example("#### -")
@example("$,.%/")
def test_a_text_without_digits_has_no_number(text):
    assert marked_number(text) is None
    assert flexible_number(text) is None


@given(st.text(alphabet="0123456789-+.,/ $%#{}\\eE\nfracThe answer is", max_size=60))
def test_reading_never_fails_and_a_marked_number_is_the_flexible_one(text):
    marked = marked_number(text)
    assert marked is None or flexible_number(text) == marked


@pytest.mark.parametrize(
    "text",
    ["1,23", "12,3456", "1.2.3", "12:30", "3/4/2020", "1e5", "10/0", r"\frac{1}{0}", "9" * 5000, "none\nThen 5 apples"],
)
def test_what_is_no_number_is_no_answer(text):
    assert marked_number(f"#### {text}") is None


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("#### 5\nQ: another question\nA: #### 7", 5),  # the first mark: what follows is another problem
        ("#### 42\nThe answer is: 43", 42),  # GSM8K's own mark comes first
        ("the answer is not 5. The answer is 6.", 6),
        ("The final answer is **7**", 7),
        ("####\n\n8", 8),
        ("#### \nThe answer is: 9", 9),
        ("#### Jan has 10 dollars", 10),
        ("#### - 5", -5),
    ],
)
def test_which_mark_counts(answer, value):
    assert marked_number(answer) == value


@pytest.mark.parametrize(("text", "value"), [("10-5", 5), ("(3)-5", 5), ("3–5", 5), ("x is -5", -5), ("7 eggs -5", -5)])
def test_a_hyphen_between_two_terms_is_no_sign(text, value):
    assert flexible_number(text) == value


@given(st.integers(-(10**12), 10**12), st.booleans(), st.sampled_from(["", ".50", ".125"]))
def test_math_verify_reads_the_same_numbers(whole, grouped, decimals):
    math_verify = pytest.importorskip("math_verify")
    text = f"{whole:,}{decimals}" if grouped else f"{whole}{decimals}"
    parsed = math_verify.parse(f"The final answer is ${text}$.", parsing_timeout=None)
    assert Fraction(str(parsed[0])) == marked_number(f"#### {text}")


def problems(*numbers: object) -> list[dict[str, str]]:
    return [{"question": f"{index}?", "answer": f"It is.\n#### {number}"} for index, number in enumerate(numbers)]


def test_scores_count_exact_matches_and_an_answer_without_a_number_is_wrong():
    answers = ["#### 18.00", "#### $1,234", "I do not know", "so it is 7", "#### 6", ""]
    scores = gsm8k.score(answers, problems(18, "1,234", 5, 7, 7, 0))
    assert scores.right == (True, True, False, False, False, False)
    assert (scores.marked.right, scores.flexible.right, scores.marked.total) == (2, 3, 6)


@given(st.lists(written_numbers(), min_size=1, max_size=5))
def test_reference_answers_score_full_marks_against_themselves(numbers):
    asked = problems(*[text for text, _ in numbers])
    scores = gsm8k.score([problem["answer"] for problem in asked], asked)
    assert scores.marked.share == scores.flexible.share == 1


def test_as_many_answers_as_problems_are_needed():
    with pytest.raises(ValueError, match="1 answers to 2 problems"):
        gsm8k.score(["#### 1"], problems(1, 2))


def test_a_reference_without_its_number_is_refused(tmp_path: Path):
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in [*problems(1), {"question": "?", "answer": "It is 5."}]))
    with pytest.raises(ValueError, match=r"test\.jsonl, problem 2: .*'#### number', found .*It is 5"):
        gsm8k.read_problems(path)
    with pytest.raises(ValueError, match="should end in '#### number'"):
        gsm8k.score(["none"], [{"question": "?", "answer": "none either"}])


def test_a_file_is_read_in_its_order(tmp_path: Path):
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in problems(1, -2, "3,000")))
    assert [gsm8k.reference_number(each) for each in gsm8k.read_problems(path)] == [1, -2, 3000]
