"""The loss of a model on answers that it did not train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .tokenization import IGNORED, collator


@torch.no_grad()
def answer_loss(model: Any, tokenizer: Any, examples: Sequence[dict[str, list[int]]], batch: int) -> float:
    """The mean cross entropy of an answer's token, its end included, over all tokens of all answers, in nats.

    Args:
        model: the model; it is left in the mode, training or evaluation, in which it comes.
        tokenizer: its tokenizer.
        examples: as ``tokenization.encode`` makes them.
        batch: examples at once.
    """
    collate = collator(tokenizer)
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))  # less padding
    total, tokens = 0.0, 0
    training = model.training
    model.eval()
    try:
        for start in range(0, len(ordered), batch):
            inputs = {name: each.to(model.device) for name, each in collate(ordered[start : start + batch]).items()}
            counted = int((inputs["labels"] != IGNORED).sum())
            total += counted * float(model(**inputs).loss)
            tokens += counted
    finally:
        model.train(training)
    return total / tokens
