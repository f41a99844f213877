"""The training examples that a run takes from its records."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from support.evaluation import tokenization
from support.evaluation.prompts import Example
from support.recipe import Record


def encode(
    tokenizer: Any,
    records: Sequence[Record],
    prompt: Callable[[Record], str],
    answer: Callable[[Record], str],
    size: int,
    max_length: int,
    encoder_decoder: bool = False,
    choices: Sequence[str] | None = None,
) -> list[dict[str, list[int]]]:
    """The first ``size`` records that fit into ``max_length`` tokens, as ``tokenization.encode`` makes examples of them.

    Raises:
        ValueError: no record fits.
    """
    examples: list[dict[str, list[int]]] = []
    for record in records:
        pair = Example(prompt(record), answer(record))
        example = tokenization.encode(tokenizer, pair, max_length, encoder_decoder, choices)
        if example is not None:
            examples.append(example)
        if len(examples) == size:
            break
    if not examples:
        raise ValueError(f"no training example fits into --max-length {max_length} tokens; raise it")
    return examples


def with_wrong_answers(
    records: Sequence[Record], answer: Callable[[Record], str], share: float
) -> Callable[[Record], str]:
    """``answer``, save that a ``share`` of these records, always the same ones, have the answers of one another.

    Raises:
        ValueError: fewer than two records would, so that nothing would change.
    """
    drawn = random.Random(0).sample(range(len(records)), round(share * len(records)))
    wrong = {id(records[one]): answer(records[other]) for one, other in zip(drawn, drawn[1:] + drawn[:1], strict=True)}
    if share and len(drawn) < 2:
        raise ValueError(
            f"--wrong-answers is {share:g}, which is {len(drawn)} of {len(records)} examples; give a larger share, or 0"
        )
    return lambda record: wrong[id(record)] if id(record) in wrong else answer(record)
