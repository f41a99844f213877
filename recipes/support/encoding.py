"""Training examples: token ids, and labels on the answer alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from support.recipe import Record

IGNORED = -100
"""The label that the loss leaves out."""


def encode(
    tokenizer: Any,
    records: Sequence[Record],
    prompt: Callable[[Record], str],
    answer: Callable[[Record], str],
    size: int,
    max_length: int,
    encoder_decoder: bool = False,
) -> list[dict[str, list[int]]]:
    """The first ``size`` records that fit into ``max_length`` tokens; only answers and their end carry a label.

    A decoder reads prompt and answer as one sequence; an encoder-decoder encodes the prompt, and its labels are the answer.

    Raises:
        ValueError: no record fits.
    """
    examples: list[dict[str, list[int]]] = []
    for record in records:
        question = tokenizer(prompt(record))["input_ids"]
        reply = tokenizer(answer(record), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if encoder_decoder:
            example = {"input_ids": question, "labels": reply}
        else:
            example = {"input_ids": question + reply, "labels": [IGNORED] * len(question) + reply}
        if len(example["input_ids"]) <= max_length:
            examples.append(example)
        if len(examples) == size:
            break
    if not examples:
        raise ValueError(f"no training example fits into --max-length {max_length} tokens; raise it")
    return examples
