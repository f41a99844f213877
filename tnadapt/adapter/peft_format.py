"""PEFT's adapter folders: `adapter_config.json` beside `adapter_model.safetensors`, written for stock PEFT and read from it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tnadapt.adapter.files import named, read_tensors
from tnadapt.adapter.models import build_adapters, find_adapters
from tnadapt.adapter.pair import OverParamAdapter
from tnadapt.matrices import canonical_name

__all__ = ["export_peft", "import_peft"]

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")

#: Fields of a LoraConfig that `import_peft` follows, and those that change nothing in what a trained adapter computes. Any
#: other field must have its default.
_FOLLOWED = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
_WITHOUT_EFFECT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config",
    "eva_config", "qalora_group_size", "runtime_config", "ensure_weight_tying", "init_lora_weights",
}  # fmt: skip
#: Initializations that leave the base weight alone. Others may change it, so that their adapters belong to a base
#: which the folder does not hold.
_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")


def export_peft(
    model: nn.Module, folder: str | Path, base_model: str | None = None, task_type: str | None = None
) -> None:
    """Write the `OverParamAdapter`s of `model` as a folder that `PeftModel.from_pretrained(base, folder)` loads.

    The scaling is written as `lora_alpha = scaling * r`, never as rsLoRA, which is the same function. Layers whose rank or
    scaling differ from the most frequent ones stand in `rank_pattern` and `alpha_pattern`.

    Args:
        model: the model with the adapters.
        folder: is made where it is missing; files of an older export in it are replaced. After an interruption it has the older
            export, or the new one, or no config, so that nobody loads the weights of one with the scaling of the other.
        base_model: name or path of the base model, for PEFT's `base_model_name_or_path`; the one that a transformers model
            was loaded from by default.
        task_type: PEFT's, such as `"CAUSAL_LM"`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the model has no `OverParamAdapter`, an adapter of another class, one around another, or different dropouts.
    """
    peft = _peft()
    adapters = find_adapters(model, OverParamAdapter)
    if not adapters or "" in adapters:
        raise ValueError("the model has no layer with an OverParamAdapter to export")
    others = [name for name, adapter in find_adapters(model).items() if not isinstance(adapter, OverParamAdapter)]
    if others:
        raise ValueError(
            f"{named(others)} has an adapter that is no LoRA pair, which PEFT's format cannot say; merge it first"
        )
    nested = [name for name, adapter in adapters.items() if isinstance(adapter.base, OverParamAdapter)]
    if nested:
        raise ValueError(
            f"{named(nested)} has an adapter around an adapter, which PEFT's format cannot say; merge the inner ones first, "
            "and give PEFT the model with them merged"
        )
    settings = {name: adapter.settings() for name, adapter in adapters.items()}
    dropouts = {entry["dropout"] for entry in settings.values()}
    if len(dropouts) > 1:
        raise ValueError(
            f"the adapters have the dropouts {sorted(dropouts)}, a PEFT adapter has one for all; set them alike first"
        )
    ranks = {name: entry["rank"] for name, entry in settings.items()}
    alphas = {name: _alpha(entry["scaling"], entry["rank"]) for name, entry in settings.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    if base_model is None:
        base_model = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    config = peft.LoraConfig(
        base_model_name_or_path=base_model,
        task_type=task_type,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropouts.pop(),
        target_modules=_targets(model, list(adapters)),
        rank_pattern={_exactly(name): r for name, r in ranks.items() if r != rank},
        alpha_pattern={_exactly(name): a for name, a in alphas.items() if a != alpha},
        inference_mode=True,
    )
    from safetensors.torch import save_file

    # clones, because safetensors refuses tensors that share memory
    tensors = {
        f"{_PREFIX}{name}.{entry}": tensor.detach().cpu().contiguous().clone()
        for name, adapter in adapters.items()
        for entry, tensor in adapter.trained_tensors().items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".writing", dir=folder) as halves:
        save_file(tensors, Path(halves) / _WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(halves)
        # weights and config cannot be replaced at once: without a config in between, nothing can be loaded
        (folder / _CONFIG).unlink(missing_ok=True)
        (Path(halves) / _WEIGHTS).replace(folder / _WEIGHTS)
        (Path(halves) / _CONFIG).replace(folder / _CONFIG)


def import_peft(model: nn.Module, folder: str | Path) -> dict[str, OverParamAdapter]:
    """Read a LoRA adapter that PEFT saved into `OverParamAdapter`s around the layers of `model`, and freeze everything else.

    Rank and alpha patterns and rsLoRA are followed. Whatever else would make the adapter compute something that a LoRA pair
    does not (DoRA, `modules_to_save`, trained biases, embeddings, initializations that rewrite the base) is refused by name.

    Returns:
        The adapters by the name of their layer.

    Raises:
        ImportError: PEFT is not installed.
        FileNotFoundError: the folder has no config, or no safetensors file.
        ValueError: the adapter is not plain LoRA on linear layers, or does not fit the model; nothing is changed.
    """
    peft, folder = _peft(), Path(folder)
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(f"{folder / _CONFIG} is not there; give the folder that PEFT's save_pretrained wrote")
    if not (folder / _WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{folder / _WEIGHTS} is not there; PEFT writes it unless it is told safe_serialization=False: save again"
        )
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    _refuse_others(config, peft.LoraConfig(), folder / _CONFIG)
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(folder / _WEIGHTS, None)[0].items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{folder / _WEIGHTS} holds {key}, which is not a LoRA weight of a linear layer; only plain LoRA is read"
            )
        tensors.setdefault(match["layer"], {})[f"lora_{match['side']}.weight"] = tensor
    if not tensors:
        raise ValueError(f"{folder / _WEIGHTS} holds no LoRA weights")
    layers = {name: _settings(name, config, found, folder / _WEIGHTS) for name, found in tensors.items()}
    return build_adapters(model, OverParamAdapter, layers, tensors, str(folder / _WEIGHTS))


def _settings(name: str, config: Mapping[str, Any], found: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    """Rank, scaling and dropout of one layer, by the rules of PEFT."""
    from peft.utils.other import get_pattern_key

    def by_pattern(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        patterns = patterns or {}
        return patterns.get(get_pattern_key(list(patterns), name), default)

    rank = by_pattern(config.get("rank_pattern"), config["r"])
    alpha = by_pattern(config.get("alpha_pattern"), config["lora_alpha"])
    a = found.get("lora_A.weight")
    if a is not None and a.shape[0] != rank:
        raise ValueError(f"{name} has rank {a.shape[0]} in {file}, but the config says {rank}")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return {"rank": rank, "scaling": scaling, "dropout": config.get("lora_dropout", 0.0)}


def _refuse_others(config: Mapping[str, Any], plain: Any, file: Path) -> None:
    """Raise ValueError where the config asks for something that a LoRA pair does not compute."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file} is of type {config.get('peft_type')!r}; only LORA is read")
    defaults = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    for name, value in config.items():
        if name in _FOLLOWED or name in _WITHOUT_EFFECT or not value:
            continue
        if name not in defaults or value != defaults[name]:
            raise ValueError(
                f"{file} has {name}={value!r}, which OverParamAdapter cannot follow: it is plain LoRA on linear layers. "
                "Load the adapter with PEFT, or merge it there (merge_and_unload)"
            )
    initialization = config.get("init_lora_weights", True)
    if initialization not in _INITIALIZATIONS:
        raise ValueError(
            f"{file} has init_lora_weights={initialization!r}, which may rewrite the base weight, so that the adapter would not "
            "belong to the base model; save it with path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )


def _targets(model: nn.Module, names: Sequence[str]) -> list[str] | str:
    """`target_modules` that mean exactly the layers `names`: the last parts of the names where these are enough, else the
    names, else (where a name is the end of another one) a regular expression."""
    adapters = find_adapters(model, OverParamAdapter)
    inner = {f"{name}.{part}" for name, a in adapters.items() for part, _ in a.named_modules() if part}
    others = {canonical_name(path) for path, _ in model.named_modules()} - inner - set(names)

    def exact(targets: Sequence[str]) -> bool:
        return not any(name == t or name.endswith(f".{t}") for name in others for t in targets)

    for targets in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if exact(targets):
            return targets
    return "|".join(re.escape(name) for name in sorted(names))


def _exactly(name: str) -> str:
    """A key of a PEFT pattern that means this layer: PEFT reads it as a regular expression for the end of the name."""
    return f"^{re.escape(name)}"


def _alpha(scaling: float, rank: int) -> float:
    """The number whose `rank`-th part is `scaling`, a whole one where that is so."""
    alpha = scaling * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    alpha = next((a for a in near if a / rank == scaling), alpha)
    return int(alpha) if float(alpha).is_integer() else alpha


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("PEFT's format needs PEFT: pip install 'tnadapt[peft]'") from error
    return peft
