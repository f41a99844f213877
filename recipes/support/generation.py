"""Answers of a model to many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from support.config import Config


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompts: Sequence[str], config: Config, quiet: bool) -> list[str]:
    """The answers, in the order of the prompts. Prompts of about one length share a batch; padding is on the left."""
    tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    temperature: float = getattr(config, "temperature", 0.0)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": getattr(config, "top_p", 1.0), "top_k": 0}
    outputs = [""] * len(prompts)
    torch.manual_seed(config.seed)
    model.eval()
    with tqdm(total=len(prompts), desc="answering", unit="prompt", disable=quiet) as bar:
        for start in range(0, len(order), config.eval_batch):
            rows = order[start : start + config.eval_batch]
            inputs = tokenizer.pad(
                {"input_ids": [tokens[row] for row in rows]}, padding_side="left", return_tensors="pt"
            )
            written = model.generate(
                **inputs.to(model.device),
                max_new_tokens=config.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
            if not model.config.is_encoder_decoder:
                written = written[:, inputs["input_ids"].shape[1] :]
            for row, text in zip(rows, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
                outputs[row] = text
            bar.update(len(rows))
    return outputs
