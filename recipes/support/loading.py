"""Base models and tokenizers, from a folder or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from support import quantized
from support.config import EMBEDDED, Config, is_hub_id
from support.recipe import Recipe


@contextmanager
def reaching(name: str, place: str) -> Iterator[None]:
    """Tell in one line that the hub could not be reached, or does not have or give ``place``.

    Raises:
        ValueError: for an error of loading from the hub; errors of local folders are passed on with their folder.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        if is_hub_id(place) and not Path(place).expanduser().exists():
            raise ValueError(
                f"--{name} is {place}, which cannot be had from the hub: no network, no such name, or access not granted "
                f"(then run `hf auth login`); a local folder works without: {reason}"
            ) from error
        raise ValueError(f"--{name} is {place}, which cannot be loaded: {reason}") from error


def place_of(recipe: Recipe, config: Config) -> str:
    """Where the base model is read from."""
    return str(recipe.embedded_model if config.model == EMBEDDED else Path(config.model).expanduser())


def _kind(model_config: Any) -> Any:
    return AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM


def load_model(recipe: Recipe, config: Config) -> tuple[Any, Any]:
    """The base model, on the GPU if there is one, and its tokenizer."""
    place, device = place_of(recipe, config), "cuda" if torch.cuda.is_available() else "cpu"
    with reaching("model", config.model):
        tokenizer = AutoTokenizer.from_pretrained(place)
        kind = _kind(AutoConfig.from_pretrained(place))
        model = kind.from_pretrained(place, dtype=getattr(torch, config.dtype), **quantized.loading(config, device))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to(device), tokenizer


def load_shape(recipe: Recipe, config: Config) -> Any:
    """The base model without its weights, on the meta device."""
    with reaching("model", config.model):
        model_config = AutoConfig.from_pretrained(place_of(recipe, config))
        with torch.device("meta"):
            return _kind(model_config).from_config(model_config)


def target_modules(config: Config, model: torch.nn.Module) -> str | list[str]:
    """What PEFT takes for ``--targets``.

    Raises:
        ValueError: a name that no linear layer of ``model`` has; PEFT would leave it out without a word.
    """
    if config.targets == "all-linear":
        return config.targets
    names = [name.strip() for name in config.targets.split(",") if name.strip()]
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    wrong = [name for name in names if not any(each == name or each.endswith(f".{name}") for each in linear)]
    if wrong or not names:
        has = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ValueError(
            f"--targets is {config.targets!r}: {config.model} has no linear layer {', '.join(wrong)}; it has {has}"
        )
    return names
