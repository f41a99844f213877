"""Bad input is refused before anything is computed, with the value and a way out in the message."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tnadapt.backends import BACKENDS, get_backend
from tnadapt.factorizations import CP, MPO, SVD, Factorization, Tucker

from .variants import CASES, EVERY

VALUE_ERRORS: list[tuple[Callable[..., Factorization], dict[str, Any], str]] = [
    (MPO, {}, r"MPO\(\) has no order.*MPO\(order=9\)"),
    (MPO, {"order": None, "max_bond": 3}, "no order"),
    (MPO, {"order": 1}, "order=1"),
    (MPO, {"order": 2.0}, "order=2.0"),
    (MPO, {"order": True}, "order=True"),
    (MPO, {"order": 10**6}, "order=1000000: at most 256"),
    (MPO, {"order": 3, "max_bond": 0}, "max_bond=0"),
    (MPO, {"order": 3, "max_bond": 2.5}, "max_bond=2.5"),
    (MPO, {"order": 3, "max_bond": True}, "max_bond=True"),
    (MPO, {"order": 3, "gauge": "left"}, "gauge='left'.*svd"),
    (MPO, {"order": 3, "gauge": "identity", "max_bond": 3}, "identity.*max_bond"),
    (MPO, {"sites": [(4, 2)]}, "at least two"),
    (MPO, {"sites": [(4, 0), (1, 8)]}, "at least two"),
    (MPO, {"sites": [(4, 2, 1), (1, 8)]}, "at least two"),
    (MPO, {"sites": [(4, 2.5), (1, 8)]}, "integers"),
    (MPO, {"sites": {(4.5, 8): [(4, 2), (1, 4)]}}, r"sites has the key \(4.5, 8\).*shapes of matrices"),
    (MPO, {"sites": {"4x8": [(4, 2), (1, 4)]}}, "sites has the key '4x8'"),
    (MPO, {"expansion": 0.5}, "expansion=0.5.*at least 1"),
    (MPO, {"expansion": float("inf")}, "expansion=inf"),
    (MPO, {"expansion": "3"}, "expansion='3'"),
    (MPO, {"expansion": 3.0, "order": 9}, "drop order=9"),
    (MPO, {"expansion": 3.0, "sites": [(2, 2), (2, 2)]}, "drop sites"),
    (MPO, {"expansion": 3.0, "max_bond": 4}, "max_bond=4"),
    (Tucker, {"order": 1}, "order=1"),
    (Tucker, {"ranks": [2, 0]}, r"ranks=\[2, 0\]"),
    (Tucker, {"ranks": 4}, "max_rank"),
    (Tucker, {"ranks": {"8x8": [2, 2]}}, "ranks has the key '8x8'.*shapes of matrices"),
    (Tucker, {"ranks": {(8, 8, 8): [2, 2]}}, r"ranks has the key \(8, 8, 8\)"),
    (Tucker, {"max_rank": 0}, "max_rank=0"),
    (Tucker, {"max_rank": 2, "ranks": [2, 2]}, "drop one"),
    (Tucker, {"ranks": [2, 2], "gauge": "identity"}, "identity.*ranks"),
    (Tucker, {"gauge": "right"}, "gauge='right'.*svd"),
    (Tucker, {"expansion": 2.0, "max_rank": 2}, "drop one"),
    (CP, {"order": 1}, "order=1"),
    (CP, {"rank": 0}, "rank=0"),
    (CP, {"max_rank": 0}, "max_rank=0"),
    (CP, {"rank": True}, "rank=True"),
    (CP, {"rank": 2, "max_rank": 2}, "drop one"),
    (CP, {"gauge": "svd"}, "gauge='svd'.*unit"),
    (CP, {"expansion": 2.0, "rank": 2}, "drop one"),
    (CP, {"max_scratch": 0}, "max_scratch=0"),
    (SVD, {"sites": [(2, 2), (2, 2), (2, 2)]}, "an SVD has two sites.*MPO"),
    (SVD, {"sites": {(8, 8): [(2, 2), (2, 2), (2, 2)]}}, "an SVD has two sites.*MPO"),
    (MPO, {"order": 3, "backend": "numpy"}, "backend 'numpy' is unknown.*torch"),
]


@pytest.mark.parametrize(
    ("make", "arguments", "message"), VALUE_ERRORS, ids=lambda value: getattr(value, "__name__", str(value)[:40])
)
def test_bad_descriptions(make: Callable[..., Factorization], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_ranks_above_full_rank() -> None:
    with pytest.raises(ValueError, match=r"ranks=\(9, 33\).*full ranks are \(16, 16\)"):
        Tucker(sites=[(8, 2), (4, 8)], ranks=(9, 33)).core_shapes((32, 16))
    with pytest.raises(ValueError, match="as many ranks as sites"):
        Tucker(ranks=(2, 2, 2)).core_shapes((32, 16))
    with pytest.raises(ValueError, match=r"rank=49 is above the exact rank 48.*max_rank"):
        CP(rank=49).core_shapes((768, 8))
    # caps are no claims
    assert Tucker(max_rank=10**6).structure((768, 8)).exact
    assert CP(max_rank=10**6).structure((768, 8)).exact
    # and the full rank may be said
    assert CP(rank=48).structure((768, 8)).exact
    assert Tucker(ranks=(48, 48)).structure((768, 8)).exact


def test_ranks_by_shape() -> None:
    tucker = Tucker(ranks={(24, 8): (3, 2)})
    assert tucker.core_shapes((24, 8)) == ((4, 2, 3), (6, 4, 2), (3, 2))
    assert tucker.structure((8, 24)).exact


def test_a_cp_that_explodes_is_refused_with_its_estimate() -> None:
    """Exact CP on equal modes: the Khatri-Rao product of half of them is as long as the matrix is large."""
    cp = CP(sites=[(8, 8)] * 4)
    with pytest.raises(ValueError, match=r"rank 262144 .* 2\.15e\+09 numbers of scratch \(8 GiB.*smaller rank"):
        cp.structure((4096, 4096))
    assert CP(sites=[(8, 8)] * 4, rank=64).structure((4096, 4096)).scratch < 2**28
    assert CP().structure((4096, 4096)).exact
    # a matrix of 2**27 entries, of which the sweep holds two, is the largest
    assert CP().structure((2**14, 2**13)).scratch == 2**28
    with pytest.raises(ValueError, match="max_scratch=268435456"):
        CP().structure((2**14, 2**13 + 2))
    with pytest.raises(ValueError, match="max_scratch=1000"):
        CP(max_scratch=1000).unfold(torch.ones(768, 8))


def test_sites_that_do_not_fit() -> None:
    mpo = MPO(sites=[(4, 2), (6, 4)])
    with pytest.raises(ValueError, match=r"multiply to 24x8, but the matrix is 24x9"):
        mpo.core_shapes((24, 9))
    with pytest.raises(ValueError, match="multiply to 24x8"):
        mpo.unfold(torch.ones(8, 24))


def test_sites_by_shape_fall_back_to_the_papers() -> None:
    mpo = MPO(order=3, sites={(24, 8): [(2, 8), (12, 1)]})
    assert mpo.core_shapes((24, 8)) == ((1, 2, 8, 12), (12, 12, 1, 1))
    assert mpo.core_shapes((8, 24)) == MPO(order=3).core_shapes((8, 24))


@pytest.mark.parametrize("name", EVERY)
def test_bad_matrices(name: str) -> None:
    factorization = EVERY[name]
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=str(dtype)):
            factorization.unfold(torch.ones(4, 6, dtype=dtype))
    for value in (float("nan"), float("inf"), -float("inf")):
        matrix = torch.ones(4, 6)
        matrix[2, 3] = value
        with pytest.raises(ValueError, match="NaN or infinity"):
            factorization.unfold(matrix)
    for shape in ((0, 4), (4, 0), (0, 4, 4)):
        with pytest.raises(ValueError, match="empty"):
            factorization.unfold(torch.ones(shape))
    with pytest.raises(ValueError, match=r"\(\*batch, rows, cols\)"):
        factorization.unfold(torch.ones(5))
    for shape in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            factorization.core_shapes(shape)


def test_cores_beyond_the_range_of_float32() -> None:
    """Entries that float32 holds can have singular values that it does not."""
    matrix = torch.full((64, 8), 3e38)
    with pytest.raises(ValueError, match=r"overflow.*gauge='identity'"):
        SVD().unfold(matrix)
    identity = SVD(gauge="identity")
    assert torch.equal(identity.fold(identity.unfold(matrix)), matrix)


@pytest.mark.parametrize("name", CASES)
def test_cores_that_do_not_belong_together(name: str) -> None:
    factorization, shape = CASES[name]
    cores = list(factorization.unfold(torch.ones(shape)))
    with pytest.raises(ValueError, match="got none"):
        factorization.fold([])
    with pytest.raises(ValueError, match="dimensions"):
        factorization.fold([cores[0][0], *cores[1:]])
    with pytest.raises(ValueError, match="batch"):
        factorization.fold([cores[0][None], *cores[1:]])
    with pytest.raises(ValueError, match="dtype"):
        factorization.fold([cores[0].double(), *cores[1:]])
    with pytest.raises(ValueError, match=r"belong|bonds"):
        factorization.fold([torch.cat([cores[0], cores[0]], dim=-1), *cores[1:]])
    with pytest.raises(ValueError, match="gradient has shape"):
        factorization.pull_back(cores, torch.ones(shape[0] + 1, shape[1]))


def test_outer_bonds() -> None:
    cores = [torch.ones(2, 3, 3, 4), torch.ones(4, 3, 3, 1)]
    with pytest.raises(ValueError, match="outer bonds"):
        MPO(order=2).fold(cores)


def test_one_core_is_no_mpo() -> None:
    with pytest.raises(ValueError, match="at least two"):
        MPO(order=2).fold([torch.ones(1, 3, 3, 1)])
    with pytest.raises(ValueError, match="at least two"):
        CP().fold([torch.ones(3, 3, 1)])
    with pytest.raises(ValueError, match="at least two"):
        Tucker().fold([torch.ones(3, 3, 1), torch.ones(1)])


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "nowhere", ("nowhere.at_all", "Nothing"))
    with pytest.raises(ImportError, match=r"pip install 'tnadapt\[nowhere\]'"):
        get_backend("nowhere")


@pytest.mark.parametrize("name", CASES)
def test_descriptions_are_values(name: str) -> None:
    """Equal, hashable, picklable, and not to be changed behind one's back."""
    factorization, shape = CASES[name]
    again = pickle.loads(pickle.dumps(factorization))
    assert again == factorization
    assert hash(again) == hash(factorization)
    assert again.core_shapes(shape) == factorization.core_shapes(shape)
    with pytest.raises(AttributeError):
        factorization.backend = "torch"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (MPO, (16,), r"MPO\(16\): settings go by name; write MPO\(order=16\)"),
        (Tucker, (3,), r"write Tucker\(order=3\)"),
        (CP, (3,), r"write CP\(order=3\)"),
        (MPO, ([(4, 2), (6, 4)],), r"write MPO\(sites=\[\(4, 2\), \(6, 4\)\]\)"),
        (SVD, ({(24, 8): [(4, 2), (6, 4)]},), r"write SVD\(sites="),
        (SVD, (2,), r"SVD\(2\): settings go by name; those of SVD are sites, backend, max_bond, gauge"),
        (MPO, ("mpo",), "those of MPO are order, sites"),
        (MPO, (9, 4), r"MPO\(9, 4\): .* those of MPO are order"),
    ],
)
def test_settings_without_a_name(make: Callable[..., Factorization], arguments: tuple[Any, ...], message: str) -> None:
    """`MPO(16)` could be an order, a bond or a rank."""
    with pytest.raises(TypeError, match=message):
        make(*arguments)


def test_shapes_that_sites_do_not_list_need_an_order() -> None:
    mpo = MPO(sites={(24, 8): [(4, 2), (6, 4)]})
    assert mpo.core_shapes((24, 8)) == SVD().core_shapes((24, 8))
    with pytest.raises(ValueError, match=r"none for a 8x24 matrix \(only for 24x8\).*order=9"):
        mpo.core_shapes((8, 24))


def test_svd_is_a_type_and_the_mpo_of_order_2() -> None:
    svd, mpo = SVD(max_bond=3), MPO(order=2, max_bond=3)
    assert isinstance(svd, SVD)
    assert isinstance(svd, MPO)
    assert not isinstance(mpo, SVD)
    assert svd == mpo
    assert mpo == svd
    assert hash(svd) == hash(mpo)
    assert svd != SVD()
    assert SVD() != MPO(order=3)
    assert dataclasses.replace(svd, max_bond=None) == SVD()
    assert svd.core_shapes((24, 8)) == mpo.core_shapes((24, 8))
    for setting in ("order", "expansion"):
        with pytest.raises(TypeError, match=setting):
            SVD(**{setting: 3})


def test_a_subclass_of_ones_own_is_no_mpo() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(MPO):
        more: int = 0

    assert Mine(order=3) != MPO(order=3)
    assert Mine(order=3) != SVD()
    assert Mine(order=3) == Mine(order=3)
    assert Mine(order=3) != Mine(order=3, more=1)


def test_descriptions_by_shape_are_values() -> None:
    """A mapping has no hash, what is described by it has: equal ones the same, whatever became of the mapping."""
    by_shape = {(24, 8): [(4, 2), (6, 4)]}
    for make in (MPO, SVD, Tucker, CP):
        plain = MPO(order=3) if make is MPO else make()
        assert make(sites=by_shape) == make(sites={(24, 8): [(4, 2), (6, 4)]})
        assert len({make(sites=by_shape), make(sites=dict(by_shape)), plain}) == 2
    assert len({Tucker(ranks={(24, 8): (3, 2)}), Tucker(ranks={(24, 8): [3, 2]}), Tucker()}) == 2


def test_sites_are_copied() -> None:
    sites = [(4, 2), (6, 4)]
    by_shape = {(24, 8): sites}
    one, many = MPO(sites=sites), MPO(sites=by_shape)
    sites[0] = (24, 8)
    by_shape.clear()
    assert one.core_shapes((24, 8)) == many.core_shapes((24, 8)) == ((1, 4, 2, 8), (8, 6, 4, 1))
