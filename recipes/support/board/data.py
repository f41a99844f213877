"""What the board trains on and asks, and which answers are right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedded.word_problems import generate

from support.config import EMBEDDED
from support.evaluation.gsm8k import read_problems
from support.evaluation.tokenization import IGNORED
from support.records import load_hub, local_file, read_rows

TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
#: Longest query and response together, in characters: the same examples for every tokenizer.
LONGEST = 1300
#: Batches of a bucket, in which examples are sorted by length.
BUCKET = 20
#: Ends of reasoning in MetaMathQA and GSM8K, in the order in which they are looked for.
MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")

Row = Mapping[str, Any]


def training_rows(place: str, size: int) -> list[Row]:
    """At least ``size`` rows with ``query`` and ``response`` of MetaMathQA, in the order of the data, without the long ones.

    Raises:
        ValueError: there are fewer.
    """
    if place == EMBEDDED:
        problems = generate("composed", "train", size)
        rows: Sequence[Row] = [{"query": each["question"], "response": _metamath(each["answer"])} for each in problems]
    else:
        rows = read_rows("data", place, "train", {"query": str, "response": str})
    short = [row for row in rows if len(f"{row['query']} {row['response']}") <= LONGEST]
    if len(short) < size:
        raise ValueError(
            f"--data is {place}, which has {len(short)} examples of at most {LONGEST} characters; --batch times --max-steps needs "
            f"{size}: lower them"
        )
    return short


def _metamath(answer: str) -> str:
    """An answer of GSM8K with the end that MetaMathQA's have."""
    return f"{answer}\nThe answer is: {answer.rpartition('#### ')[2]}"


def problems(place: str, split: str, size: int | None = None) -> list[Row]:
    """Problems of GSM8K with ``question`` and ``answer``: the first ``size`` of a split; None for all."""
    if place == EMBEDDED:
        return list(generate("composed", split, size or 500))
    if file := local_file(place, split):
        known: list[Row] = [*read_problems(file)]
        return known[:size]
    if Path(place).expanduser().exists():
        raise ValueError(f"--test-data is {place}, which has no {split}.jsonl with question, answer")
    return list(load_hub("test-data", place, "main", split=split))[:size]


def validation_problems(place: str, size: int) -> list[Row]:
    """``size`` problems of GSM8K's training split, drawn as the board draws them; embedded ones are of a split of their own."""
    every = problems(place, "validation" if place == EMBEDDED else "train")
    order = np.arange(len(every))
    np.random.RandomState(0).shuffle(order)
    return [every[index] for index in order[:size]]


def texts(place: str, size: int) -> list[str]:
    """The first ``size`` texts of a data set that has nothing to do with mathematics."""
    if place == EMBEDDED:
        return [problem["question"] for problem in generate("basic", "test", size)]
    if Path(place).expanduser().exists():
        rows: Any = read_rows("texts", place, "train", {"text": str})
    else:
        rows = load_hub("texts", place, split="train", streaming=True)
    return [row["text"] for row in islice(rows, size)]


# -- batches ----------------------------------------------------------------------------------------------------------


def prompt(question: str) -> str:
    """What the model reads of a question."""
    return TEMPLATE.format(query=question)


def batches(tokenizer: Any, rows: Sequence[Row], size: int, max_length: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of ``size`` examples in the order of the data, the longest of each bucket first.

    Labels are those of prompt and answer, and of the first token of the padding, which is the end-of-sequence token; so the
    longest example of a batch has no end to learn.
    """
    for start in range(0, len(rows), size * BUCKET):
        bucket = rows[start : start + size * BUCKET]
        tokens = tokenizer([prompt(row["query"]) + row["response"] for row in bucket])["input_ids"]
        tokens = [each[:max_length] for each in tokens]
        order = torch.argsort(torch.tensor([len(each) for each in tokens]), descending=True).tolist()
        for first in range(0, len(order), size):
            chosen = [tokens[index] for index in order[first : first + size]]
            batch = tokenizer.pad({"input_ids": chosen}, padding_side="right", return_tensors="pt")
            labels = batch["input_ids"].clone()
            for row, each in enumerate(chosen):
                labels[row, len(each) + 1 :] = IGNORED
            yield {**batch, "labels": labels}


# -- answers ----------------------------------------------------------------------------------------------------------


def final_answer(text: str) -> str | None:
    """What stands behind the last mark of the kind that is looked for first, on its line; None without a mark."""
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark is None:
        return None
    line, _, _ = text[text.rindex(mark) + len(mark) :].strip().partition("\n")
    return line.strip(" .!?$%")


def value(answer: str) -> float | str:
    """An answer as a number, if it is a decimal number or a fraction; else as it is."""
    parts = answer.split("/")
    try:
        numbers = [Decimal(part.strip()) for part in parts]
        if len(numbers) > 2:
            return answer
        return float(numbers[0] / numbers[1] if len(numbers) == 2 else numbers[0])
    except (ArithmeticError, InvalidOperation, ValueError):
        return answer


def is_right(output: str, reference: str) -> bool:
    """Whether a model's text ends in the answer of the reference.

    Raises:
        ValueError: the reference has no marked answer.
    """
    wanted, given = final_answer(reference), final_answer(output)
    if wanted is None:
        raise ValueError(f"a reference answer should end in '#### number', found ...{reference[-40:]!r}")
    return given is not None and value(given) == value(wanted)
