"""Base models and tokenizers, from a folder or the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from support import quantized
from support.config import EMBEDDED, Config, is_hub_id
from support.methods import METHODS
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


def is_encoder(model_config: Any) -> bool:
    """Whether a model is an encoder alone, such as BERT, which cannot write."""
    writes = model_config.is_encoder_decoder or getattr(model_config, "is_decoder", False)
    return model_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not writes


def choices_of(recipe: Recipe, config: Config, model_config: Any) -> Sequence[str] | None:
    """The answers that an encoder chooses among; None for a model that writes.

    Raises:
        ValueError: the recipe's answers are free text, or the method cannot train the head that chooses.
    """
    if not is_encoder(model_config):
        return None
    if recipe.choices is None:
        raise ValueError(
            f"--model is {config.model}, an encoder ({model_config.model_type}), which cannot write; {recipe.path.name} needs a "
            "decoder or an encoder-decoder"
        )
    method = METHODS[config.method]
    if method.tensor_train or method.optimizer in ("rite", "muon"):
        reason = "trains nothing but its own matrices"
    elif method.changes_base:
        reason = "changes the base model, and no adapter of PEFT's says both that and a new head"
    else:
        return recipe.choices(config)
    raise ValueError(
        f"--method is {config.method}, which {reason}; {config.model} is an encoder, whose head is trained too: choose another "
        "method, or a model that writes"
    )


def _kind(recipe: Recipe, config: Config, model_config: Any) -> Any:
    choices = choices_of(recipe, config, model_config)
    if choices is not None:
        model_config.num_labels = len(choices)
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM


def load_model(recipe: Recipe, config: Config) -> tuple[Any, Any]:
    """The base model, on the GPU if there is one, and its tokenizer.

    What an encoder lacks, a head that chooses and perhaps a pooler below it, is made anew, as the seed decides; ``new_layers`` of
    the model names it.
    """
    place, device = place_of(recipe, config), "cuda" if torch.cuda.is_available() else "cpu"
    with reaching("model", config.model):
        tokenizer = AutoTokenizer.from_pretrained(place)
        model_config = AutoConfig.from_pretrained(place)
    kind = _kind(recipe, config, model_config)
    with reaching("model", config.model), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model, loaded = kind.from_pretrained(
            place,
            config=model_config,
            dtype=getattr(torch, config.dtype),
            output_loading_info=True,
            **quantized.loading(config, device),
        )
    if is_encoder(model_config):
        model.new_layers = sorted({key.rpartition(".")[0] for key in loaded["missing_keys"]})
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to(device), tokenizer


def load_shape(recipe: Recipe, config: Config) -> Any:
    """The base model without its weights, on the meta device."""
    with reaching("model", config.model):
        model_config = AutoConfig.from_pretrained(place_of(recipe, config))
    kind = _kind(recipe, config, model_config)
    with torch.device("meta"):
        return kind.from_config(model_config)


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
