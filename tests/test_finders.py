"""Finders that give what cannot be trained: one error that names it, before anything changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tnadapt import MPO, LoraOver, finders
from tnadapt.finders import Found


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lazy = nn.Linear(4, 4), nn.LazyLinear(4)
        self.complex = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "text": ("weight", TypeError, r"matrices='weight': give a finder, a function of the model .*finders\.full_weights\(\)"),
    "a list": ([Found("w", nn.Linear(2, 2))], TypeError, "give a finder, a function of the model"),
    "a function that gives None": (lambda model: None, TypeError, "give a finder, a function of the model"),
    "a finder that was not made": (finders.full_weights, TypeError, r"full_weights takes a regular expression, got a Odd"),
    "a finder of names that was not made": (finders.named_parameters, TypeError, "named_parameters takes a regular expr"),
    "nothing": (lambda model: [], ValueError, "the finder found nothing to train through cores"),
    "a pattern that fits nothing": (finders.full_weights("nothing"), ValueError, "the finder found nothing"),
    "parameters": (lambda model: [model.layer.weight], TypeError, "the finder gave a Parameter; it must give"),
    "a number as a name": (lambda model: [Found(3, model.layer)], TypeError, "the name 3; a name is a string"),
    "an empty name": (lambda model: [Found("", model.layer)], TypeError, "the name ''; a name is a string that is not empty"),
    "a lazy layer": (lambda model: [Found("w", model.lazy)], ValueError, r"LazyLinear\.weight is lazy; call the model once"),
    "complex": (lambda model: [Found("w", model, "complex")], ValueError, r"w is torch\.complex64; only real"),
    "a shared parameter": (
        lambda model: [Found("v", model.layer), Found("w", model.layer)],
        ValueError,
        "v twice, the second time as w; a parameter that layers share is trained once: leave one of the two out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_finders_are_refused_and_nothing_is_attached(case: str) -> None:
    finder, error, message = BAD[case]
    model = Odd()
    optimizer = torch.optim.SGD(model.layer.parameters(), lr=1e-2)
    with pytest.raises(error, match=message):
        LoraOver(model, optimizer, MPO(order=2), matrices=finder)
    assert LoraOver.of(model) is None


@pytest.mark.parametrize("make", [finders.full_weights, finders.named_parameters])
def test_patterns_that_are_none_are_refused_when_the_finder_is_made(make: Any) -> None:
    with pytest.raises(ValueError, match=rf"{make.__name__}\('\('\): not a regular expression"):
        make("(")


def stacked(model: nn.Module) -> Iterator[Found]:
    """The second layer's weight is in a group that the finder gives; that of the others is left to their names."""
    for k, layer in enumerate(model.children()):
        yield Found(f"layers.{k}.W", layer, "weight", "middle" if k == 1 else None)


def test_a_group_is_what_groups_gives_else_the_finders_else_the_name_without_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    groups = {name: matrix.group for name, matrix in finders.collect(model, stacked)[0].items()}
    assert groups == {"layers.0.W": "layers.*.W", "layers.1.W": "middle", "layers.2.W": "layers.*.W"}
    given, skipped = finders.collect(model, stacked, lambda matrix: f"layer {matrix.layer} of {matrix.module}")
    assert [m.group for m in given.values()] == [f"layer {k} of layers.{k}" for k in range(3)]
    assert skipped == []
