"""Adapters for whole models: add by pattern, save, load, merge.

A layer's name is its canonical path: what DDP, `torch.compile` and PEFT's outer models put into names is left out. In an
adapter around an adapter, the inner one is called after the outer one, `proj.base` inside `proj`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from tnadapt.adapter.base import LinearAdapter, check_base
from tnadapt.adapter.files import named, read_tensors, write_tensors
from tnadapt.adapter.pair import OverParamAdapter
from tnadapt.adapter.targets import by_canonical_name, chosen_names, is_adapter
from tnadapt.matrices import canonical_name

__all__ = ["add_adapters", "chosen_layers", "find_adapters", "load_adapters", "merge_adapters", "save_adapters"]

_KIND = "tnadapt.adapters"

A = TypeVar("A", bound=LinearAdapter)


def add_adapters(
    model: nn.Module,
    targets: str | Iterable[str],
    *,
    kind: type[A] = OverParamAdapter,  # type: ignore[assignment]
    **options: Any,
) -> dict[str, A]:
    """Put an adapter around linear layers of `model`, in place, and freeze everything but adapters.

    Args:
        model: any module that holds the layers; not a linear layer itself.
        targets: a regular expression that is searched for in the names of linear layers (`r"q_proj|v_proj"`), or names.
        kind: class of the adapters, `OverParamAdapter` or `TTLoraLinear`.
        options: what `kind.from_linear` takes, such as `rank=8, alpha=16`.

    Returns:
        The adapters by the name of their layer, in the order of the model.

    Raises:
        ValueError: no layer is meant, a layer has an adapter already, or the options do not fit a layer.
        TypeError: a layer is not one that `kind` can adapt.
    """
    layers = chosen_layers(model, targets)
    adapters: dict[str, A] = {}
    frozen = [p.requires_grad for p in model.parameters()]
    try:
        for name, layer in layers.items():
            check_base(kind, layer)
            try:
                adapters[name] = kind.from_linear(layer, **options)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    except BaseException:
        for parameter, trained in zip(model.parameters(), frozen, strict=True):
            parameter.requires_grad_(trained)
        raise
    for name, adapter in adapters.items():
        _replace(model, layers[name], adapter)
    _freeze_rest(model)
    return adapters


def chosen_layers(model: nn.Module, targets: str | Iterable[str]) -> dict[str, nn.Linear]:
    """The linear layers that `targets` means, by canonical name.

    Raises:
        TypeError, ValueError: see `chosen_names`; a layer that has an adapter; two layers of one name.
    """
    if isinstance(model, nn.Linear):
        raise ValueError(
            "the model is a linear layer itself, which cannot be replaced inside of itself; wrap it with from_linear"
        )
    inside = {id(part) for owner in model.modules() if is_adapter(owner) for part in list(owner.modules())[1:]}
    adapted = {canonical_name(path) for path, module in model.named_modules() if is_adapter(module)}
    layers = by_canonical_name(
        (path, layer)
        for path, layer in model.named_modules()
        if is_adapter(layer) or (isinstance(layer, nn.Linear) and id(layer) not in inside)
    )
    names = chosen_names(targets, layers)
    taken = [name for name in names if name in adapted]
    if taken:
        raise ValueError(
            f"{named(sorted(taken))} has an adapter already; merge it first (merge_adapters), or put another one around it "
            "by hand with from_linear"
        )
    return {name: layers[name] for name in names}


@overload
def find_adapters(model: nn.Module) -> dict[str, LinearAdapter]: ...
@overload
def find_adapters(model: nn.Module, kind: type[A]) -> dict[str, A]: ...
def find_adapters(model: nn.Module, kind: type[LinearAdapter] = LinearAdapter) -> Mapping[str, LinearAdapter]:
    """The adapters in `model` of a class, by the name of their layer, outer ones before the ones that they are around.

    Raises:
        ValueError: two of them have one name.
    """
    return by_canonical_name((path, module) for path, module in model.named_modules() if isinstance(module, kind))


def merge_adapters(model: nn.Module) -> list[str]:
    """Replace every adapter of `model` by the plain linear layer that computes the same; adapters around adapters too.

    Returns:
        The names of the layers.

    Raises:
        ValueError: the model has no adapters, a base has hooks, or a merged weight is not finite; nothing is changed.
        TypeError: a base is not a plain `nn.Linear` (a quantized layer, say); nothing is changed.
    """
    adapters = find_adapters(model)
    outermost = [name for name in adapters if not any(_inside(name, other) for other in adapters)]
    if not outermost:
        raise ValueError("the model has no adapters to merge, or is one itself (call its merge())")
    if outermost == [""]:
        raise ValueError("the model is an adapter itself, which cannot be replaced inside of itself; call its merge()")
    merged: dict[str, nn.Linear] = {}
    for name in outermost:
        try:
            merged[name] = adapters[name].merge()
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    for name, layer in merged.items():
        adapter = adapters[name]
        layer.weight.requires_grad_(adapter.weight.requires_grad)
        if adapter.bias is not None:
            layer.bias.requires_grad_(adapter.bias.requires_grad)
        _replace(model, adapter, layer)
    return outermost


def save_adapters(model: nn.Module, file: str | Path, kind: type[LinearAdapter] = OverParamAdapter) -> None:
    """Write the adapters of a class to a safetensors file, with what is needed to make them anew.

    Raises:
        ValueError: the model has no adapters of that class, or one around (or inside of) an adapter of another class.
        ImportError: safetensors is not installed.
    """
    adapters = find_adapters(model, kind)
    if not adapters:
        raise ValueError(f"the model has no {kind.__name__} to save")
    mixed = [
        name
        for name, adapter in find_adapters(model).items()
        if isinstance(adapter.base, LinearAdapter) and isinstance(adapter, kind) != isinstance(adapter.base, kind)
    ]
    if mixed:
        raise ValueError(
            f"{named(mixed)} has an adapter of one class around one of another, which files of one class cannot say; merge "
            "the inner one first, and save the base with it"
        )
    tensors = {
        _join(name, entry): tensor
        for name, adapter in adapters.items()
        for entry, tensor in adapter.trained_tensors().items()
    }
    about = {"kind": kind.__name__, "layers": {name: adapter.settings() for name, adapter in adapters.items()}}
    write_tensors(file, tensors, _KIND, about)


def load_adapters(model: nn.Module, file: str | Path, kind: type[A] = OverParamAdapter) -> dict[str, A]:  # type: ignore[assignment]
    """Read what `save_adapters` wrote. Linear layers get their adapters and everything else is frozen, as in `add_adapters`;
    a model that has exactly these adapters already has their values replaced, in place, and keeps its own factorizations.

    Returns:
        The adapters by the name of their layer.

    Raises:
        FileNotFoundError, ImportError: no file, or no safetensors.
        ValueError: the file is damaged or of another class, or does not fit the model; nothing is changed.
    """
    tensors, about = read_tensors(file, _KIND)
    if about["kind"] != kind.__name__:
        raise ValueError(f"{file} holds adapters of the class {about['kind']}; load it with kind={about['kind']}")
    by_layer: dict[str, dict[str, Tensor]] = {name: {} for name in about["layers"]}
    for entry, tensor in tensors.items():
        # the longest name, since an inner adapter is called after the outer one
        owner = max((name for name in by_layer if _inside(entry, name)), key=len, default=None)
        if owner is None:
            raise ValueError(f"{file} holds {entry}, which belongs to none of its layers")
        by_layer[owner][entry[len(owner) :].lstrip(".")] = tensor
    present = find_adapters(model, kind)
    if present:
        return _load_values(present, about["layers"], by_layer, file)
    return build_adapters(model, kind, about["layers"], by_layer, str(file))


def build_adapters(
    model: nn.Module,
    kind: type[A],
    layers: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Mapping[str, Tensor]],
    source: str,
) -> dict[str, A]:
    """Put adapters with these settings and tensors around layers of `model`, and freeze everything else. A layer called
    `proj.base` where `proj` is a layer too is an adapter inside an adapter.

    Raises:
        ValueError: the layers are not there, or the tensors do not fit; nothing is changed.
    """
    outermost = [name for name in layers if not any(_inside(name, other) for other in layers)]
    bases = chosen_layers(model, outermost)
    frozen = [p.requires_grad for p in model.parameters()]
    adapters: dict[str, A] = {}
    try:
        # from the inside to the outside
        for name in sorted(layers, key=len, reverse=True):
            outer = next(other for other in outermost if name == other or _inside(name, other))
            base = adapters.get(f"{name}.base", bases[outer])
            try:
                adapter = kind.from_settings(base, layers[name])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{name}: its settings in {source} make no {kind.__name__}: {error}") from error
            for entry, parameter in _matched(name, adapter, tensors[name], source):
                # the wider dtype: nothing of the file is lost, and a bfloat16 file is trained in float32
                dtype = torch.promote_types(tensors[name][entry].dtype, parameter.dtype)
                value = tensors[name][entry].to(parameter.device, dtype, copy=True)
                _set_parameter(adapter, entry, nn.Parameter(value))
            adapters[name] = adapter
    except BaseException:
        for p, trained in zip(model.parameters(), frozen, strict=True):
            p.requires_grad_(trained)
        raise
    for name in outermost:
        _replace(model, bases[name], adapters[name])
    _freeze_rest(model)
    return {name: adapters[name] for name in layers}


@torch.no_grad()
def _load_values(
    present: dict[str, A],
    layers: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Mapping[str, Tensor]],
    source: str | Path,
) -> dict[str, A]:
    """Copy the tensors of a file into adapters that are there."""
    if set(present) != set(layers):
        raise ValueError(
            f"the adapters of the model are not those of {source}: only the model has "
            f"{named(n for n in present if n not in layers) or 'none'}, only the file has "
            f"{named(n for n in layers if n not in present) or 'none'}; load it into a model without adapters"
        )
    copies: list[tuple[nn.Parameter, Tensor]] = []
    for name, adapter in present.items():
        own, its = (
            {key: value for key, value in settings.items() if key not in adapter.notes}
            for settings in (adapter.settings(), layers[name])
        )
        if own != its:
            raise ValueError(
                f"{name} has the settings {own}, in {source} it has {its}; load it into a model without adapters"
            )
        for entry, parameter in _matched(name, adapter, tensors[name], source):
            value = tensors[name][entry]
            if torch.promote_types(value.dtype, parameter.dtype) != parameter.dtype:
                raise ValueError(
                    f"{_join(name, entry)} is {value.dtype} in {source} and {parameter.dtype} in the model, which would "
                    "round it; load it into a model without adapters"
                )
            copies.append((parameter, value))
    for parameter, value in copies:
        parameter.copy_(value)
    return present


def _matched(
    name: str, adapter: LinearAdapter, tensors: Mapping[str, Tensor], source: str | Path
) -> list[tuple[str, nn.Parameter]]:
    """The parameters of an adapter, after checking that they can hold values, and that the file has a tensor of that name and shape
    for each."""
    own = adapter.trained_tensors()
    if any(parameter.is_meta for parameter in own.values()):
        raise ValueError(
            f"{name} is on the meta device, where the values of {source} would be lost; load the weights of the model first"
        )
    if set(own) != set(tensors):
        raise ValueError(
            f"{name} has the tensors {named(own, 6)}, but {source} has {named(tensors, 6) or 'none'} for it"
        )
    for entry, parameter in own.items():
        if tensors[entry].shape != parameter.shape:
            raise ValueError(
                f"{_join(name, entry)} is {tuple(tensors[entry].shape)} in {source}, but {tuple(parameter.shape)} fits the "
                f"layer, which maps {adapter.in_features} -> {adapter.out_features}"
            )
    return list(own.items())


def _inside(name: str, other: str) -> bool:
    return name != other and (other == "" or name.startswith(other + "."))


def _join(name: str, entry: str) -> str:
    return f"{name}.{entry}" if name else entry


def _freeze_rest(model: nn.Module) -> None:
    """Freeze what belongs to no adapter; adapters that were there before, ours or others, are trained or not, as they were."""
    kept: set[int] = set()
    for module in model.modules():
        if isinstance(module, LinearAdapter):
            kept.update(id(p) for p in module.trained_tensors().values())
        elif is_adapter(module):
            kept.update(id(p) for name, p in module.named_parameters() if name.startswith("lora_"))
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


def _set_parameter(module: nn.Module, entry: str, parameter: nn.Parameter) -> None:
    path, _, leaf = entry.rpartition(".")
    setattr(module.get_submodule(path), leaf, parameter)


def _replace(model: nn.Module, old: nn.Module, layer: nn.Module) -> None:
    """Put `layer` where `old` is, in every place that holds it."""
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if child is old and parent is not layer:
                setattr(parent, leaf, layer)
