"""Finders: which parameters of a model are trained through cores, where it is not the LoRA pairs of its linear layers.

A finder is a function that is given the model and yields one `Found` for each parameter to train. Pass it as
`LoraOver(..., matrices=finder)`. A finder of your own can be a generator of ten lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from tnadapt.matrices import Skipped, TrainedMatrix, canonical_name, compiled, find_lora_matrices, group_of

__all__ = [
    "Finder",
    "Found",
    "collect",
    "convolution_lora",
    "embedding_lora",
    "full_weights",
    "lora_pairs",
    "named_parameters",
    "together",
]


class Found(NamedTuple):
    """One parameter that is to be trained through cores.

    Attributes:
        name: name of the matrix, unique in the model.
        owner: the module that has the parameter.
        attribute: the name of the parameter in that module.
        group: matrices that are ranked against each other; None for the name with its numbers replaced by `*`.
        kind: `"A"` or `"B"` for the sides of a LoRA pair, anything else otherwise.
    """

    name: str
    owner: nn.Module
    attribute: str = "weight"
    group: str | None = None
    kind: str = "W"


Finder = Callable[[nn.Module], Iterable[Found]]


def lora_pairs(model: nn.Module) -> Iterator[Found]:
    """What `LoraOver` takes by default: the LoRA pairs of linear layers."""
    for matrix in find_lora_matrices(model)[0].values():
        yield Found(matrix.name, matrix.owner, matrix.attribute, matrix.group, matrix.kind)


def full_weights(which: str | None = None) -> Finder:
    """The trainable weights of linear layers, as OPF over-parameterizes them in full fine-tuning (Gao et al., ACL 2023).

    Args:
        which: a regular expression that is searched for in the path of the layer; None for every linear layer.

    Raises:
        TypeError, ValueError: `which` is not a regular expression.
    """
    pattern = _pattern("full_weights", "" if which is None else which)

    def find(model: nn.Module) -> Iterator[Found]:
        for path, module in model.named_modules():
            name = canonical_name(path)
            if isinstance(module, nn.Linear) and module.weight.requires_grad and pattern.search(name):
                yield Found(f"{name}.W" if name else "W", module)

    return find


def convolution_lora(model: nn.Module) -> Iterator[Found]:
    """PEFT's LoRA on convolutions. A kernel [out, in, *size] is the matrix [out, in * size] of its rows."""
    for path, module in model.named_modules():
        pair = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if not all(isinstance(half, nn.ModuleDict) for half in pair):
            continue
        for adapter, side, half in _active(module, pair):
            layer: Any = half[adapter]
            if isinstance(layer, nn.modules.conv._ConvNd):
                yield Found(_lora_name(path, adapter, side), layer, "weight", None, side)


def embedding_lora(model: nn.Module) -> Iterator[Found]:
    """PEFT's LoRA on embeddings: `A` [r, words] and `B` [dimension, r]."""
    for path, module in model.named_modules():
        pair = getattr(module, "lora_embedding_A", None), getattr(module, "lora_embedding_B", None)
        if all(isinstance(half, nn.ParameterDict) for half in pair):
            for adapter, side, half in _active(module, pair):
                yield Found(_lora_name(path, adapter, side), half, adapter, None, side)


def named_parameters(which: str) -> Finder:
    """Parameters of at least two dimensions, by a regular expression that is searched for in their canonical names.

    Raises:
        TypeError, ValueError: `which` is not a regular expression.
    """
    pattern = _pattern("named_parameters", which)

    def find(model: nn.Module) -> Iterator[Found]:
        for path, module in model.named_modules():
            for attribute, parameter in module.named_parameters(recurse=False):
                name = canonical_name(f"{path}.{attribute}" if path else attribute)
                if pattern.search(name) and parameter.dim() >= 2 and parameter.requires_grad:
                    yield Found(name, module, attribute)

    return find


def together(*finders: Finder) -> Finder:
    """A finder of everything that any of these finders finds, in their order."""

    def find(model: nn.Module) -> Iterator[Found]:
        for finder in finders:
            yield from finder(model)

    return find


def collect(
    model: nn.Module, finder: Finder | None, groups: Callable[[TrainedMatrix], str] | None = None
) -> tuple[dict[str, TrainedMatrix], list[Skipped]]:
    """The matrices that a finder finds, by name. Without a finder: LoRA's, and the LoRA weights that cannot be expanded.

    Raises:
        TypeError: the finder is no function, or gives something else than `Found`.
        ValueError: nothing is found; a name or a parameter twice; a parameter that is not there, is frozen, has no values yet, is
            not real floating point or has fewer than two dimensions.
    """
    if finder is None:
        return find_lora_matrices(model, groups)
    matrices: dict[str, TrainedMatrix] = {}
    names: dict[int, str] = {}
    for found in _given(finder, model):
        if not isinstance(found, Found):
            raise TypeError(
                f"the finder gave a {type(found).__name__}; it must give tnadapt.finders.Found(name, owner, attribute)"
            )
        if not isinstance(found.name, str) or not found.name:
            raise TypeError(f"the finder gave a matrix the name {found.name!r}; a name is a string that is not empty")
        parameter = getattr(found.owner, found.attribute, None)
        where = f"{type(found.owner).__name__}.{found.attribute}"
        if not isinstance(parameter, nn.Parameter):
            raise ValueError(f"{found.name}: {where} is not a parameter; name an attribute of its owner that is one")
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"{found.name} has no values yet: {where} is lazy; call the model once before")
        if not parameter.is_floating_point():
            raise ValueError(
                f"{found.name} is {parameter.dtype}; only real floating-point matrices have cores: leave it out"
            )
        if parameter.dim() < 2:
            raise ValueError(
                f"{found.name} has the shape {tuple(parameter.shape)}; only matrices can be factorized: leave it out"
            )
        if not parameter.requires_grad:
            raise ValueError(f"{found.name} is frozen (requires_grad is False); train it, or leave it out")
        if found.name in matrices:
            raise ValueError(f"the finder gave the name {found.name} twice; names are unique in a model")
        if id(parameter) in names:
            raise ValueError(
                f"the finder gave {names[id(parameter)]} twice, the second time as {found.name}; a parameter that layers share "
                "is trained once: leave one of the two out"
            )
        names[id(parameter)] = found.name
        module = found.name.rpartition(".")[0]
        layer = next((int(part) for part in found.name.split(".") if part.isdigit()), None)
        matrix = TrainedMatrix(found.name, found.kind, "", module, layer, found.owner, found.attribute, parameter)
        matrix.group = found.group if groups is None and found.group else group_of(matrix, groups)
        matrices[found.name] = matrix
    if not matrices:
        raise ValueError(
            "the finder found nothing to train through cores in the model; look at the names that it searches for, and at what "
            "is frozen (requires_grad)"
        )
    return matrices, []


def _given(finder: Finder, model: nn.Module) -> Iterable[Found]:
    given = finder(model) if callable(finder) else None
    if not isinstance(given, Iterable):
        raise TypeError(
            f"matrices={finder!r}: give a finder, a function of the model that gives tnadapt.finders.Found(name, owner, attribute) "
            "for each parameter, such as tnadapt.finders.full_weights()"
        )
    return given


def _pattern(finder: str, which: str) -> re.Pattern[str]:
    if not isinstance(which, str):
        raise TypeError(
            f"{finder} takes a regular expression, got a {type(which).__name__}; it makes the finder: matrices={finder}(...)"
        )
    return compiled(which, f"{finder}({which!r}): not a regular expression")


def _active(module: nn.Module, pair: Any) -> Iterator[tuple[str, str, Any]]:
    """Name of each active adapter, with its two sides."""
    active = getattr(module, "active_adapters", None)
    for adapter in pair[0]:
        if active is None or adapter in active:
            for side, half in zip("AB", pair, strict=True):
                yield adapter, side, half


def _lora_name(path: str, adapter: str, side: str) -> str:
    return ".".join(part for part in (canonical_name(path), "" if adapter == "default" else adapter, side) if part)
