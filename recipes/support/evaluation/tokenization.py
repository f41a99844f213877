"""From prompts and answers to batches: the loss is on the answer and its end, padding is on the right and masked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from .prompts import Example

#: The label of a position that the loss leaves out (``torch.nn.CrossEntropyLoss``).
IGNORED = -100


def prompt_tokens(tokenizer: Any, prompt: str, encoder_decoder: bool = False) -> list[int]:
    """The tokens that a model reads of a prompt, in training and in generation alike.

    With the tokenizer's own special tokens, save that the prompt of a decoder does not end in an end-of-sequence token: the
    answer follows it.
    """
    tokens = list(tokenizer(prompt)["input_ids"])
    if not encoder_decoder and tokens and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()
    return tokens


def answer_tokens(tokenizer: Any, answer: str) -> list[int]:
    """The tokens of an answer, and one end-of-sequence token behind them."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, so a model could not learn to stop; set eos_token"
        )
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def encode(
    tokenizer: Any,
    example: Example,
    max_length: int,
    encoder_decoder: bool = False,
    choices: Sequence[str] | None = None,
) -> dict[str, Any] | None:
    """``input_ids``, ``attention_mask`` and ``labels``; ``None`` for an example that is longer than ``max_length`` tokens.

    A decoder reads prompt and answer, and its labels hide the prompt. An encoder-decoder reads the prompt, its labels are
    the answer, and either may have ``max_length`` tokens. An encoder, for which ``choices`` are given, reads the prompt, and its
    label is the number of the answer among them.
    """
    prompt = prompt_tokens(tokenizer, example.prompt, encoder_decoder or choices is not None)
    if choices is not None:
        fits = len(prompt) <= max_length
        label = choices.index(example.answer)
        return {"input_ids": prompt, "attention_mask": [1] * len(prompt), "labels": label} if fits else None
    answer = answer_tokens(tokenizer, example.answer)
    if encoder_decoder:
        tokens, labels, length = prompt, answer, max(len(prompt), len(answer))
    else:
        tokens, labels, length = [*prompt, *answer], [*[IGNORED] * len(prompt), *answer], len(prompt) + len(answer)
    if length > max_length:
        return None
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def padding_tokenizer(tokenizer: Any, side: str) -> Any:
    """A copy that pads on that side; without a padding token of its own it pads with the end-of-sequence token.

    Masks are made from lengths, never from the padding token, so both kinds of tokenizer give the same batches up to the
    identity of tokens that nobody reads.
    """
    padding = copy.deepcopy(tokenizer)
    padding.padding_side = side
    if padding.pad_token_id is None:
        padding.pad_token = padding.eos_token
    return padding


def collator(tokenizer: Any) -> Callable[[Sequence[dict[str, Any]]], dict[str, Any]]:
    """Makes tensors of encoded examples, padded on the right to the longest; labels are padded with ``IGNORED``."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    padding = padding_tokenizer(tokenizer, "right")
    of_tokens, of_numbers = (
        DataCollatorForSeq2Seq(padding, label_pad_token_id=IGNORED),
        DataCollatorWithPadding(padding),
    )

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = (of_numbers if isinstance(examples[0]["labels"], int) else of_tokens)(examples)
        return made

    return collate
