"""Every backend means the same as float64 torch, in values and in gradients. A backend that is missing fails here."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnadapt.backends import BACKENDS, get_backend
from tnadapt.backends.tensorly_backend import _weights_into
from tnadapt.factorizations import CP, MPO, SVD, Factorization, TensorRing, Tucker

from .variants import DTYPES, make_matrix, matrices, random_cores, relative_error, shapes, tolerance

#: The backends that every run must have: nothing is skipped where one is not installed.
REQUIRED = ("torch", "opt_einsum", "tensorly", "tensornetwork")
LIBRARIES = REQUIRED[1:]

MIXED = ((4, 3), (1, 1), (2, 5), (6, 1))
#: name -> (factorization, a shape that it fits)
EACH: dict[str, tuple[Factorization, tuple[int, int]]] = {
    "svd": (SVD(), (24, 8)),
    "mpo-9": (MPO(order=9), (24, 8)),
    "mpo-16-spread": (MPO(order=16, gauge="spread"), (24, 8)),
    "mpo-right": (MPO(order=4, gauge="right"), (24, 8)),
    "mpo-identity": (MPO(order=4, gauge="identity"), (24, 8)),
    "mpo-mixed": (MPO(sites=MIXED), (48, 15)),
    "mpo-bond-3": (MPO(sites=MIXED, max_bond=3), (48, 15)),
    "tucker": (Tucker(), (24, 8)),
    "tucker-mixed": (Tucker(sites=MIXED, gauge="spread"), (48, 15)),
    "tucker-ranks": (Tucker(sites=MIXED, ranks=(5, 1, 7, 2)), (48, 15)),
    "ring": (TensorRing(order=4), (24, 8)),
    "ring-mixed": (TensorRing(sites=MIXED), (48, 15)),
    "ring-bond-3": (TensorRing(sites=MIXED, max_bond=3), (48, 15)),
    "cp": (CP(), (24, 8)),
    "cp-16": (CP(order=16), (24, 8)),
    "cp-mixed": (CP(sites=MIXED), (48, 15)),
    "cp-rank-5": (CP(sites=MIXED, rank=5), (48, 15)),
    "cp-rank-20": (CP(sites=MIXED, rank=20), (48, 15)),
}
ANY_SHAPE = [SVD(), MPO(order=16), TensorRing(order=5), Tucker(), CP(order=4)]


def on(factorization: Factorization, backend: str) -> Factorization:
    return dataclasses.replace(factorization, backend=backend)


@pytest.mark.parametrize("backend", REQUIRED)
def test_is_there(backend: str) -> None:
    assert get_backend(backend).name == backend
    assert get_backend(backend) is get_backend(backend)
    assert set(REQUIRED) == set(BACKENDS)


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("backend", REQUIRED)
def test_columns_of_a_cp_have_norm_one_but_for_those_of_the_largest_mode(backend: str, rank: int) -> None:
    tensor = torch.randn(2, 3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors = get_backend(backend).cp_decompose(tensor, rank)
    for k in (0, 2):
        norms = torch.linalg.vector_norm(factors[k], dim=1)
        assert torch.allclose(norms, torch.ones_like(norms), rtol=1e-9), k


def test_a_component_of_tensorly_that_vanished_stays_zero() -> None:
    """Norms go into one factor, and what has none is not divided by it."""
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(p, 3, generator=generator, dtype=torch.float64) for p in (3, 5, 4)]
    factors[0][:, 1] = 0
    moved = _weights_into(factors, 1)
    sums = [torch.einsum("ar,br,cr->abc", *each) for each in (factors, moved)]
    assert torch.allclose(*sums, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("backend", LIBRARIES)
def test_fold_and_pull_back(backend: str, name: str) -> None:
    factorization, shape = EACH[name]
    cores, grad = random_cores(factorization, shape, (3,)), make_matrix((3, *shape), seed=1)
    theirs = on(factorization, backend)
    assert relative_error(theirs.fold(cores), factorization.fold(cores)) <= 1e-13
    expected = factorization.pull_back(cores, grad)
    assert relative_error(theirs.fold(cores), factorization.fold(cores)) <= 1e-13
    leaves = [core.clone().requires_grad_() for core in cores]
    by_autograd = torch.autograd.grad(theirs.fold(leaves), leaves, grad)
    for found in (theirs.pull_back(cores, grad), by_autograd):
        for got, want in zip(found, expected, strict=True):
            assert float((got - want).norm()) <= 1e-12 * float(want.norm())


@pytest.mark.parametrize(
    "kind", ["normal", "zero", "constant", "rank-1", "deficient", "ill-conditioned", "huge", "tiny"]
)
@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("backend", LIBRARIES)
def test_unfold(backend: str, name: str, kind: str) -> None:
    """Exact ones give the matrix back; the others miss about as much as torch's."""
    factorization, shape = EACH[name]
    theirs = on(factorization, backend)
    for dtype in DTYPES:
        matrix = make_matrix(shape, kind, dtype)
        cores = theirs.unfold(matrix)
        assert tuple(tuple(core.shape) for core in cores) == factorization.core_shapes(shape)
        assert all(core.is_contiguous() for core in cores)
        error = relative_error(theirs.fold(cores), matrix)
        if factorization.structure(shape).exact:
            assert error <= tolerance(dtype, len(cores))
        else:
            ours = relative_error(factorization.fold(factorization.unfold(matrix)), matrix)
            # alternating least squares ends in a local minimum, and not every implementation in the same one
            slack = 1.3 if isinstance(factorization, CP) else 1.0 + 1e-3
            assert error <= slack * ours + 1e-5


@pytest.mark.parametrize("backend", LIBRARIES)
@given(data=st.data())
def test_any_matrix(backend: str, data: st.DataObject) -> None:
    matrix = data.draw(matrices(shape=data.draw(shapes(64))))
    for factorization in ANY_SHAPE:
        theirs = on(factorization, backend)
        cores = theirs.unfold(matrix)
        assert relative_error(theirs.fold(cores), matrix) <= tolerance(matrix.dtype, len(cores))


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("backend", LIBRARIES)
def test_zero_start_and_batches(backend: str, name: str) -> None:
    factorization, shape = EACH[name]
    theirs = on(factorization, backend)
    batch = torch.stack([make_matrix(shape), torch.zeros(shape, dtype=torch.float64), make_matrix(shape, "rank-1")])
    cores = theirs.unfold(batch)
    folded = theirs.fold(cores)
    assert not folded[1].any()
    grads = theirs.pull_back(cores, torch.ones_like(batch))
    assert any(bool(grad[1].any()) for grad in grads)
    for k in range(3):
        assert relative_error(folded[k], theirs.fold(theirs.unfold(batch[k]))) <= 1e-12


def test_tensorly_is_left_as_it_was() -> None:
    import threading

    import tensorly

    global_before, seen = tensorly.get_backend(), []

    def elsewhere() -> None:
        seen.append(tensorly.get_backend())

    for before in ("numpy", "pytorch"):
        tensorly.set_backend(before, local_threadsafe=True)
        try:
            for factorization, shape in EACH.values():
                theirs = on(factorization, "tensorly")
                theirs.fold(theirs.unfold(make_matrix(shape)))
                assert tensorly.get_backend() == before
            with pytest.raises(RuntimeError):
                get_backend("tensorly").chain_contract([torch.ones(1, 1, 2, 3), torch.ones(1, 4, 2, 1)])
            assert tensorly.get_backend() == before
        finally:
            tensorly.set_backend(global_before)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [global_before]


def test_tensornetwork_is_left_as_it_was() -> None:
    from tensornetwork import backend_contextmanager

    before = backend_contextmanager.get_default_backend()
    theirs = MPO(order=3, backend="tensornetwork")
    theirs.fold(theirs.unfold(make_matrix((24, 8))))
    assert backend_contextmanager.get_default_backend() == before
