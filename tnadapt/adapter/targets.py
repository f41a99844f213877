"""Which layers of a model are meant, by a pattern or by their names."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple, TypeVar

from torch import nn

from tnadapt.adapter.base import LinearAdapter
from tnadapt.adapter.files import named
from tnadapt.matrices import canonical_name, compiled

__all__ = ["BaseLayer", "base_layers", "by_canonical_name", "chosen_names", "is_adapter"]

T = TypeVar("T")


def by_canonical_name(found: Iterable[tuple[str, T]]) -> dict[str, T]:
    """What was found at these paths by the canonical name of each, in their order.

    Raises:
        ValueError: two of them have one name.
    """
    by_name: dict[str, T] = {}
    for path, one in found:
        name = canonical_name(path)
        if name in by_name:
            raise ValueError(
                f"two layers of the model are called {name}, without what wrappers put into names (one is at {path}); rename one of "
                "the two modules"
            )
        by_name[name] = one
    return by_name


def chosen_names(targets: str | Iterable[str], layers: Collection[str]) -> list[str]:
    """The names among `layers`, those of a model's linear layers, that `targets` means: a regular expression that is searched for in
    them, or names. In the order of the model.

    Raises:
        TypeError: `targets` is neither.
        ValueError: no layer is meant; a name is that of none, or is given twice; the pattern is not a regular expression.
    """
    if not layers:
        raise ValueError("the model has no linear layers")
    if isinstance(targets, str):
        pattern = compiled(targets, f"targets={targets!r} is not a regular expression")
        found = [name for name in layers if pattern.search(name)]
        if not found:
            raise ValueError(
                f"the pattern {targets!r} matches none of the {len(layers)} linear layers, whose names look like {named(layers)}"
            )
        return found
    given = list(targets) if isinstance(targets, Iterable) else [targets]
    if not all(isinstance(name, str) for name in given):
        raise TypeError(
            f"targets={targets!r}: give a regular expression or names of linear layers, which look like {named(layers)}"
        )
    if not given:
        raise ValueError(f"targets is an empty list of names; the linear layers have names like {named(layers)}")
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        raise ValueError(f"targets names {named(twice)} more than once")
    missing = [name for name in given if name not in layers]
    if missing:
        raise ValueError(
            f"the model has no linear layer called {named(missing)}; the names of its {len(layers)} linear layers look like "
            f"{named(layers)}"
        )
    meant = set(given)
    return [name for name in layers if name in meant]


class BaseLayer(NamedTuple):
    """A linear layer that is not part of an adapter's own matrices.

    Attributes:
        module: the layer.
        owner: the innermost adapter around it, or None.
    """

    module: nn.Linear
    owner: nn.Module | None


def base_layers(model: nn.Module) -> dict[str, BaseLayer]:
    """The linear layers of `model` by the canonical path without the adapters on it: a layer has one name, adapted or not.

    Raises:
        ValueError: two layers have one name.
    """
    found: list[tuple[str, BaseLayer]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parts: list[str] = []
        owner: nn.Module | None = None
        parent: nn.Module = model
        for part in path.split(".") if path else ():
            adapter = is_adapter(parent)
            if (adapter and part.startswith("lora_")) or part == "original_module":
                break
            if adapter:
                owner = parent
            if not (adapter and part in ("base", "base_layer")):
                parts.append(part)
            parent = parent.get_submodule(part)
        else:
            found.append((".".join(parts), BaseLayer(module, owner)))
    return by_canonical_name(found)


def is_adapter(module: nn.Module) -> bool:
    """Whether layers inside of `module` belong to an adapter: ours, one of PEFT, or a pair of somebody's own."""
    return isinstance(module, LinearAdapter) or hasattr(module, "lora_A") or hasattr(module, "get_base_layer")
