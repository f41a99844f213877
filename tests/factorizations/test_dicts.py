"""Descriptions as plain data: what is written is JSON, what is read back is equal, and `repr` says how it would be written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnadapt.factorizations import CP, MPO, SVD, Factorization, Tucker, register_factorization
from tnadapt.factorizations.base import _FACTORIZATIONS

from .variants import CASES


@pytest.fixture
def registered() -> Iterator[dict[str, type[Factorization]]]:
    before = dict(_FACTORIZATIONS._classes)
    yield _FACTORIZATIONS._classes
    _FACTORIZATIONS._classes.clear()
    _FACTORIZATIONS._classes.update(before)


SITES = st.one_of(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=2),
    st.dictionaries(
        st.tuples(st.integers(1, 99), st.integers(1, 99)),
        st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=2),
        min_size=1,
        max_size=3,
    ),
)
CAPS = st.integers(1, 99)
SETTINGS: dict[type[Factorization], dict[str, st.SearchStrategy[Any]]] = {
    MPO: {"order": st.integers(2, 40), "sites": SITES, "max_bond": CAPS, "gauge": st.sampled_from(["svd", "right"])},
    SVD: {"sites": SITES, "max_bond": CAPS, "gauge": st.sampled_from(["svd", "spread"])},
    Tucker: {"order": st.integers(2, 9), "sites": SITES, "max_rank": CAPS, "gauge": st.sampled_from(["svd", "spread"])},
    CP: {"order": st.integers(2, 9), "sites": SITES, "rank": CAPS, "max_scratch": st.integers(1, 2**40)},
}


@st.composite
def factorizations(draw: st.DrawFn) -> Factorization:
    cls = draw(st.sampled_from(list(SETTINGS)))
    names = draw(st.sets(st.sampled_from(list(SETTINGS[cls]))))
    if cls is MPO and not names & {"order", "sites"}:
        return MPO(expansion=draw(st.floats(1, 20)))
    return cls(**{name: draw(SETTINGS[cls][name]) for name in names})


@given(factorization=factorizations())
def test_round_trip(factorization: Factorization) -> None:
    data = factorization.to_dict()
    again = Factorization.from_dict(json.loads(json.dumps(data)))
    assert type(again) is type(factorization)
    assert again == factorization
    assert again.to_dict() == data
    assert again.label == factorization.label


@given(factorization=factorizations())
def test_repr_is_how_it_is_written(factorization: Factorization) -> None:
    names = {"MPO": MPO, "SVD": SVD, "Tucker": Tucker, "CP": CP}
    again = eval(repr(factorization), names)
    assert type(again) is type(factorization)
    assert again == factorization


def test_repr_says_what_was_set() -> None:
    assert repr(MPO(order=16)) == "MPO(order=16)"
    assert repr(SVD()) == "SVD()"
    assert repr(MPO(order=9, max_bond=4, gauge="right")) == "MPO(order=9, max_bond=4, gauge='right')"
    assert repr(CP(rank=3)) == "CP(rank=3)"


@pytest.mark.parametrize("name", CASES)
def test_every_variant_is_rebuilt(name: str, registered: dict[str, type[Factorization]]) -> None:
    factorization, shape = CASES[name]
    if type(factorization).__name__ not in registered:
        register_factorization(type(factorization))
    again = Factorization.from_dict(json.loads(json.dumps(factorization.to_dict())))
    assert again == factorization
    assert again.core_shapes(shape) == factorization.core_shapes(shape)


def test_what_is_written() -> None:
    assert MPO(order=9, sites={(24, 8): [(4, 2), (6, 4)]}).to_dict() == {
        "type": "MPO",
        "order": 9,
        "sites": {"24x8": [[4, 2], [6, 4]]},
        "expansion": None,
        "backend": "torch",
        "max_bond": None,
        "gauge": "svd",
        "seed": 0,
    }
    assert Factorization.from_dict({"type": "Tucker", "max_rank": 3}) == Tucker(max_rank=3)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            {"type": "TT"},
            ValueError,
            "factorization 'TT' is unknown; the known ones are .*CP, MPO, SVD, .*register_factor",
        ),
        ({"type": "TaylorRuntime", "top_n": 9}, ValueError, "factorization 'TaylorRuntime' is unknown"),
        ({"order": 9}, ValueError, "has no 'type'"),
        ("MPO", TypeError, "to_dict"),
        ({"type": "MPO", "rank": 9}, ValueError, "MPO has no setting rank; its settings are order, sites"),
        ({"type": "SVD", "order": 2}, ValueError, "SVD has no setting order"),
        ({"type": "MPO"}, ValueError, "no order"),
        ({"type": "MPO", "order": 1}, ValueError, "order=1"),
        ({"type": "MPO", "sites": {"24": [[4, 2], [6, 4]]}}, ValueError, "shapes such as '768x8' as keys"),
    ],
)
def test_bad_data(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Factorization.from_dict(data)


def test_one_of_ones_own(registered: dict[str, type[Factorization]]) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(CP):
        more: float = 0.5

    assert Mine(more=2.5).to_dict()["type"] == "Mine"
    with pytest.raises(ValueError, match="'Mine' is unknown"):
        Factorization.from_dict(Mine().to_dict())
    assert register_factorization(Mine) is Mine
    assert Factorization.from_dict(Mine(more=2.5).to_dict()) == Mine(more=2.5)
    register_factorization(Mine, "another")
    assert Factorization.from_dict({"type": "another"}) == Mine()


def test_names_belong_to_one_class(registered: dict[str, type[Factorization]]) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(CP):
        pass

    Other.__name__ = Other.__qualname__ = "MPO"
    with pytest.raises(ValueError, match=r"not registered and has the name of the factorization .*MPO"):
        Other().to_dict()
    with pytest.raises(ValueError, match="the name 'MPO' belongs to tnadapt"):
        register_factorization(Other)
    register_factorization(Other, "Other")
    assert Other().to_dict()["type"] == "Other"


@pytest.mark.parametrize("what", [SVD(), int, "SVD"])
def test_only_classes_of_factorizations_are_registered(what: Any) -> None:
    with pytest.raises(TypeError, match="register_factorization takes a subclass of Factorization"):
        register_factorization(what)


def test_settings_that_are_no_data() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Odd(CP):
        more: object = object

    with pytest.raises(TypeError, match=r"more=.* of Odd is no JSON data"):
        Odd().to_dict()
