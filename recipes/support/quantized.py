"""A base model in four bits, under an adapter of full precision (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from support.methods import METHODS

if TYPE_CHECKING:
    from support.config import Config

CHOICES = NONE, FOUR_BITS = "none", "4bit"


def check(config: Config) -> None:
    """Refuse what needs the base model's own numbers.

    Raises:
        ValueError: the method changes or trains the base, or bitsandbytes is not there.
    """
    if config.quantize == NONE:
        return
    method = METHODS[config.method]
    if method.adapter != "LoraConfig" or method.changes_base or method.rescaled:
        raise ValueError(
            f"--quantize is {config.quantize}, and --method is {config.method}, which does not leave the base model as it is or has no "
            "adapter for layers of four bits; take a method that trains LoRA pairs alone, or leave --quantize out"
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"--quantize is {config.quantize}, which needs bitsandbytes: pip install bitsandbytes")


def loading(config: Config, device: str) -> dict[str, Any]:
    """What ``from_pretrained`` is told for it; nothing without quantization.

    The numbers are stored as the dtype of everything else, so that FSDP can shard them together.
    """
    if config.quantize == NONE:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, config.dtype)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    index = torch.cuda.current_device() if device == "cuda" else device
    return {"quantization_config": settings, "device_map": {"": index}}
