"""The loss of a model on answers that it did not train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from .tokenization import IGNORED, collator


@torch.no_grad()
def answer_losses(
    model: Any, tokenizer: Any, examples: Sequence[dict[str, Any]], batch: int
) -> list[tuple[float, int]]:
    """The cross entropy of each answer, its end included, summed over its tokens and in nats, and the number of its tokens.

    What an encoder chooses counts as one token.

    Args:
        model: the model; it is left in the mode, training or evaluation, in which it comes.
        tokenizer: its tokenizer.
        examples: as ``tokenization.encode`` makes them.
        batch: examples at once.
    """
    collate = collator(tokenizer)
    order = sorted(range(len(examples)), key=lambda index: len(examples[index]["input_ids"]))  # less padding
    found: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = {name: each.to(model.device) for name, each in collate([examples[i] for i in chosen]).items()}
            logits, labels = model(**inputs).logits.float(), inputs["labels"]
            if labels.dim() == 2 and not model.config.is_encoder_decoder:
                # a decoder's token is foretold at the one before
                logits, labels = logits[:, :-1], labels[:, 1:]
            rows, labels = logits.reshape(len(chosen), -1, logits.shape[-1]), labels.reshape(len(chosen), -1)
            each = cross_entropy(rows.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").sum(1)
            counted = (labels != IGNORED).sum(1)
            for index, loss, tokens in zip(chosen, each.tolist(), counted.tolist(), strict=True):
                found[index] = (loss, tokens)
    finally:
        model.train(training)
    return found
