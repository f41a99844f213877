"""Greedy answers of a model to word problems, and how many are well formed and right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_LAST_LINE = re.compile(r"(?:^|\n)#### (-?\d+)$")


@dataclass(frozen=True)
class Scores:
    """Shares, between 0 and 1, of the problems that were asked."""

    well_formed: float
    """Answers that end by themselves, and with a line ``#### integer``."""
    right: float
    """Well-formed answers whose integer is the problem's."""


def final_number(answer: str) -> int | None:
    """The integer on the last line of an answer, or ``None`` if there is none."""
    found = _LAST_LINE.search(answer)
    return int(found[1]) if found else None


@torch.inference_mode()
def greedy_answers(
    model: Any, tokenizer: Any, questions: Sequence[str], max_new_tokens: int = 80, batch: int = 128
) -> list[str | None]:
    """The model's answers; ``None`` where an answer was cut off before its end."""
    model.eval()
    answers: list[str | None] = []
    for start in range(0, len(questions), batch):
        prompts = [f"Q: {question}\nA: " for question in questions[start : start + batch]]
        encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        tokens = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        for row in tokens[:, encoded["input_ids"].shape[1] :].tolist():
            ended = tokenizer.eos_token_id in row
            answers.append(tokenizer.decode(row[: row.index(tokenizer.eos_token_id)]) if ended else None)
    return answers


def score(model: Any, tokenizer: Any, problems: Sequence[dict[str, str]]) -> Scores:
    """Ask a model every problem and compare the final numbers."""
    answers = greedy_answers(model, tokenizer, [problem["question"] for problem in problems])
    numbers = [None if answer is None else final_number(answer) for answer in answers]
    wanted = [final_number(problem["answer"]) for problem in problems]
    well_formed = sum(number is not None for number in numbers)
    right = sum(number is not None and number == want for number, want in zip(numbers, wanted, strict=True))
    return Scores(well_formed / len(problems), right / len(problems))
