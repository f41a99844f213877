"""Answers of a model to a batch of prompts, greedy or sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .tokenization import padding_tokenizer, prompt_tokens


@dataclass(frozen=True)
class Sampling:
    """LoRA-Over's sampling (arXiv:2605.16470): top-p 0.95 at temperature 0.8, and no top-k.

    transformers would cut to the 50 most likely tokens unless it is told not to.
    """

    seed: int = 0
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; it should be positive (greedy answers need no Sampling)"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it should be above 0 and at most 1")


class Generator:
    """Called with prompts, returns as many answers without special tokens; an ``answers.Generate``.

    A decoder's prompts are padded on the left, so that each answer follows its prompt, an encoder-decoder's on the right;
    attention is masked where they are padded. So greedy answers do not depend on what else is in the batch, up to
    rounding. ``sampling=None`` is greedy, whatever the model's own generation settings say. A batch that is sampled draws
    from a stream of its own, which the seed and the number of the batch decide; torch's global stream stays where it is.
    """

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int, sampling: Sampling | None = None) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it should be at least 1")
        self._model = model
        self._encoder_decoder = bool(model.config.is_encoder_decoder)
        self._tokenizer = padding_tokenizer(tokenizer, "right" if self._encoder_decoder else "left")
        self._sampling = sampling
        own = model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        self._ends = sorted(ends)
        self._settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": 0,
            "pad_token_id": self._tokenizer.pad_token_id,
            "eos_token_id": self._ends or None,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            # many models are saved after a training that had turned it off, and without it each token costs a whole pass
            "use_cache": True,
        }
        if sampling is None:
            self._settings |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            self._settings |= {"do_sample": True, **drawn}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], number: int = 0) -> list[str]:
        """Raises ``ValueError`` where a prompt and its answer do not fit into the model's context."""
        tokens = [prompt_tokens(self._tokenizer, prompt, self._encoder_decoder) for prompt in prompts]
        self._require_room(tokens)
        inputs = self._tokenizer.pad({"input_ids": tokens}, return_tensors="pt").to(self._model.device)
        training = self._model.training
        self._model.eval()
        try:
            with torch.random.fork_rng(self._devices(), enabled=self._sampling is not None):
                if self._sampling is not None:
                    torch.manual_seed(_seed(self._sampling.seed, number))
                answers = self._model.generate(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **self._settings
                )
        finally:
            self._model.train(training)
        if not self._encoder_decoder:
            answers = answers[:, inputs["input_ids"].shape[1] :]
        return [self._text(row) for row in answers.tolist()]

    def _text(self, row: list[int]) -> str:
        # an encoder-decoder's answer begins with a start token, which can be an end token too
        begin = 1 if self._encoder_decoder else 0
        end = next((place for place in range(begin, len(row)) if row[place] in self._ends), len(row))
        return str(self._tokenizer.decode(row[begin:end], skip_special_tokens=True))

    def _devices(self) -> list[int]:
        device = self._model.device
        return [device.index or 0] if device.type == "cuda" else []

    def _require_room(self, tokens: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, tokens))
        room = getattr(self._model.config, "max_position_embeddings", None)
        asked = longest + self._settings["max_new_tokens"]
        if not self._encoder_decoder and room is not None and asked > room:
            raise ValueError(
                f"a prompt of {longest} tokens and {self._settings['max_new_tokens']} new ones do not fit into the model's "
                f"{room} positions; lower max_new_tokens"
            )


class Chooser:
    """Called with prompts, returns for each the choice that an encoder's head gives the highest score; an ``answers.Generate``."""

    def __init__(self, model: Any, tokenizer: Any, choices: Sequence[str]) -> None:
        self._model, self._choices = model, choices
        self._tokenizer = padding_tokenizer(tokenizer, "right")

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], number: int = 0) -> list[str]:
        tokens = [prompt_tokens(self._tokenizer, prompt, True) for prompt in prompts]
        inputs = self._tokenizer.pad({"input_ids": tokens}, return_tensors="pt").to(self._model.device)
        training = self._model.training
        self._model.eval()
        try:
            scores = self._model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        finally:
            self._model.train(training)
        return [self._choices[row] for row in scores.argmax(-1).tolist()]


def _seed(seed: int, number: int) -> int:
    """A seed for one batch; seeds that differ by one do not share the streams of neighbouring batches."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "big")
