"""Contractions keep the precision of the cores: under autocast, under TF32 settings, and those settings are put back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tnadapt.backends import get_backend
from tnadapt.backends import kernels as precision
from tnadapt.backends.kernels import ChainKernel, CPKernel, TuckerKernel, ieee_matmul
from tnadapt.factorizations import CP, MPO, Tucker
from tnadapt.factorizations.sites import from_sites, to_sites

from .variants import CASES, make_matrix

MATMUL = torch.backends.cuda.matmul
NEWER = hasattr(torch.backends, "fp32_precision")
newer = pytest.mark.skipif(not NEWER, reason="torch before 2.9 has one setting for the precision of float32 products")


@pytest.fixture
def settings() -> Iterator[None]:
    """Settings as they were at the start, whatever a test did."""
    yield
    if NEWER:
        torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    if NEWER:
        MATMUL.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.parametrize("name", CASES)
def test_autocast_does_not_lower_the_precision(name: str) -> None:
    factorization, shape = CASES[name]
    matrix, grad = make_matrix(shape, dtype=torch.float32), make_matrix(shape, dtype=torch.float32, seed=1)
    cores = factorization.unfold(matrix)
    expected, expected_grads = factorization.fold(cores), factorization.pull_back(cores, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = factorization.unfold(matrix)
        folded, grads = factorization.fold(cores), factorization.pull_back(cores, grad)
        fused = factorization.fused_shapes(factorization.core_shapes(shape))
        kernel = factorization.kernel([core.view(1, *own) for core, own in zip(cores, fused, strict=True)])
        sites = factorization.structure(shape).sites
        kept = from_sites(kernel.contract(), sites)
        kept_grads = torch.split(kernel.pull_back(to_sites(grad[None], sites).flatten(1)), [c.numel() for c in cores])
    assert torch.equal(folded, expected)
    assert torch.equal(kept[0], expected)
    assert folded.dtype == torch.float32
    assert all(map(torch.equal, again, cores))
    assert all(map(torch.equal, grads, expected_grads))
    assert all(torch.equal(got.view(want.shape), want) for got, want in zip(kept_grads, expected_grads, strict=True))


USERS = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(MATMUL, "allow_tf32", True),
    "matmul": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


def state() -> tuple[str, ...]:
    if not NEWER:
        return (torch.get_float32_matmul_precision(),)
    return (torch.backends.fp32_precision, MATMUL.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)


@newer
@pytest.mark.parametrize("user", USERS)
def test_tf32_is_off_inside_and_back_afterwards(user: str, settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    USERS[user]()
    before, seen = state(), []
    backend = get_backend("torch")
    watched: list[tuple[Any, str]] = [(backend, f"{kind}_contract") for kind in ("chain", "tucker", "cp")]
    watched += [(kind, "_pull_back") for kind in (ChainKernel, TuckerKernel, CPKernel)]
    for owner, operation in watched:
        original = getattr(owner, operation)

        def spy(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            seen.append(state())
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, operation, spy)
    matrix = make_matrix((24, 8), dtype=torch.float32)
    for factorization in (MPO(order=3), Tucker(), CP()):
        cores = factorization.unfold(matrix)
        factorization.fold(cores)
        factorization.pull_back(cores, matrix)
        assert state() == before
    assert len(seen) == 6
    assert not any("tf32" in inside[1:] or "bf16" in inside[1:] for inside in seen)
    with pytest.raises(ValueError, match="belong"):
        MPO(order=3).fold([torch.ones(1, 2, 2, 3), torch.ones(4, 2, 2, 1)])
    assert state() == before


@newer
def test_an_inherited_setting_stays_inherited(settings: None) -> None:
    torch.backends.fp32_precision = "tf32"
    MPO(order=3).unfold(torch.ones(24, 8))
    torch.backends.fp32_precision = "ieee"
    assert state() == ("ieee", "ieee", "ieee")


def test_threads_that_overlap_restore_once(settings: None) -> None:
    """One leaves while the other is still inside: the setting comes back with the last."""
    torch.set_float32_matmul_precision("high")
    before = state()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with ieee_matmul():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with ieee_matmul():
        thread.start()
        assert entered.wait(10)
    assert MATMUL.fp32_precision == "ieee" if NEWER else state() == ("highest",)
    leave.set()
    thread.join()
    assert state() == before
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("name", CASES)
def test_decompositions_run_in_float64_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the matrix's dtype: what a sweep gets is float64, so the cores are exact to their own rounding."""
    factorization, shape = CASES[name]
    seen: list[torch.Tensor] = []
    method = "_unfold_along" if factorization.needs_gradient else "_unfold"
    original = getattr(type(factorization), method)

    def spy(self: Any, *arguments: Any) -> Any:
        seen.extend(argument for argument in arguments if isinstance(argument, torch.Tensor))
        return original(self, *arguments)

    monkeypatch.setattr(type(factorization), method, spy)
    for dtype in (torch.bfloat16, torch.float32):
        cores = factorization.unfold(make_matrix(shape, dtype=dtype))
        assert {core.dtype for core in cores} == {torch.float32}
    assert {(matrix.dtype, matrix.device.type) for matrix in seen} == {(torch.float64, "cpu")}


@pytest.mark.parametrize("user", ["nothing", "high", "medium"])
def test_the_one_setting_of_older_torch(user: str, settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.9 there is the global setting alone."""
    monkeypatch.setattr(precision, "_settings", list)
    USERS[user]()
    before, seen = torch.get_float32_matmul_precision(), []
    contract = get_backend("torch").chain_contract

    def spy(*args: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return contract(*args)

    monkeypatch.setattr(get_backend("torch"), "chain_contract", spy)
    MPO(order=3).fold(MPO(order=3).unfold(make_matrix((24, 8), dtype=torch.float32)))
    assert seen == ["highest"]
    assert torch.get_float32_matmul_precision() == before


def test_wrapped_methods_keep_their_names() -> None:
    for method in (MPO.unfold, MPO.fold):
        assert method.__qualname__ in ("Factorization.unfold", "Factorization.fold")
        assert "cores" in (method.__doc__ or "")
