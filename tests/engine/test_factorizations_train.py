"""Every factorization on every backend trains a small Llama as autograd does through the definition of its cores.

The oracle holds the cores as leaves of the autograd graph and contracts them by their definition (`oracle.contract`) inside every
forward pass; what truncated cores miss of a matrix it works out for itself. Of tnadapt it takes the cores of a matrix, and what
their optimizer is handed, at the moment of the expansion.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import contract
from torch import Tensor, nn

from tnadapt import MPO, SVD, LoraOver, Static, TaylorRuntime
from tnadapt.factorizations import CP, Factorization, Tucker

from .models import backward, largest_difference, llama, loss_of, tokens, trainable, values, when_lent

STEPS = 50
TARGETS = ["q_proj", "v_proj", "down_proj"]
#: three sites with entries for every shape of the model, so that CP below its exact rank takes least squares
SITES = {
    (4, 16): [(2, 2), (2, 4), (1, 2)],
    (16, 4): [(2, 2), (4, 2), (2, 1)],
    (8, 4): [(2, 2), (2, 2), (2, 1)],
    (4, 24): [(2, 2), (2, 3), (1, 4)],
}
RANKS = {(4, 16): (3, 4, 2), (16, 4): (2, 5, 2), (8, 4): (3, 3, 1), (4, 24): (4, 4, 2)}

EXACT: dict[str, Factorization] = {
    "svd": SVD(),
    "svd-right": SVD(gauge="right"),
    "svd-identity": SVD(gauge="identity"),
    "svd-spread": SVD(gauge="spread"),
    "mpo": MPO(order=5),
    "mpo-16": MPO(order=16),
    "mpo-right": MPO(order=5, gauge="right"),
    "mpo-identity": MPO(order=5, gauge="identity"),
    "mpo-spread": MPO(order=5, gauge="spread"),
    "mpo-sites": MPO(sites=SITES),
    "mpo-3x": MPO(expansion=3.0),
    "tucker": Tucker(),
    "tucker-identity": Tucker(gauge="identity"),
    "tucker-spread": Tucker(gauge="spread"),
    "tucker-sites": Tucker(sites=SITES),
    "cp": CP(),
    "cp-5-spread": CP(order=5, gauge="spread"),
    "cp-sites": CP(sites=SITES),
}
TRUNCATED: dict[str, Factorization] = {
    "svd-bond-1": SVD(max_bond=1),
    "mpo-bond-3": MPO(order=5, max_bond=3),
    "mpo-sites-right-bond-2": MPO(sites=SITES, max_bond=2, gauge="right"),
    "mpo-spread-bond-3": MPO(order=5, max_bond=3, gauge="spread"),
    "tucker-cap-3": Tucker(max_rank=3),
    "tucker-ranks": Tucker(sites=SITES, ranks=RANKS),
    "tucker-spread-cap-2": Tucker(sites=SITES, max_rank=2, gauge="spread"),
    "cp-cap-3": CP(max_rank=3),
    "cp-als": CP(sites=SITES, max_rank=3),
    "cp-als-spread": CP(sites=SITES, max_rank=2, gauge="spread"),
}
VARIANTS = {**EXACT, **TRUNCATED}
BACKENDS = ("torch", "opt_einsum", "tensorly", "tensornetwork")

#: what the fast suite trains: every factorization, exact and truncated, and every backend; the rest is slow
FAST = {
    ("svd", "torch", "static"),
    ("svd-bond-1", "opt_einsum", "mid-run"),
    ("mpo", "torch", "mid-run"),
    ("mpo-bond-3", "tensornetwork", "static"),
    ("tucker", "opt_einsum", "static"),
    ("tucker-ranks", "torch", "mid-run"),
    ("cp", "tensornetwork", "mid-run"),
    ("cp-als", "tensorly", "static"),
}
CASES = sorted(
    # every variant and when it starts on torch, and the plain and truncated forms on all other backends
    {(name, "torch", start) for name in VARIANTS for start in ("static", "mid-run")}
    | {
        (name, backend, "mid-run" if k % 2 else "static")
        for name in ("svd", "mpo", "tucker", "cp", "svd-bond-1", "mpo-bond-3", "tucker-ranks", "cp-als")
        for k, backend in enumerate(BACKENDS)
    }
    | FAST
)


class Oracle:
    """Trains cores by autograd through `contract`, and matrices without cores as they are."""

    def __init__(self, factorization: Factorization, model: nn.Module) -> None:
        self.factorization, self.model = factorization, model
        self.optimizer = adamw(model, foreach=False)
        self.parameters = dict(model.named_parameters())
        self.cores: dict[str, list[nn.Parameter]] = {}
        self.missing: dict[str, Tensor] = {}

    def expand(self, name: str, cores: list[Tensor], states: list[dict[str, Any]]) -> None:
        self.missing[name] = self.parameters[name].detach() - contract(self.factorization, cores)
        self.cores[name] = [nn.Parameter(core) for core in cores]
        self.optimizer.add_param_group({"params": self.cores[name]})
        for core, state in zip(self.cores[name], states, strict=True):
            if state:
                self.optimizer.state[core] = {k: v.view_as(core) if v.dim() else v for k, v in state.items()}

    def matrices(self) -> dict[str, Tensor]:
        return {
            name: contract(self.factorization, list(cores)) + self.missing[name] for name, cores in self.cores.items()
        }

    def step(self, step: int, rate: float) -> None:
        ids = tokens(step)
        set_rate(self.optimizer, rate)
        self.optimizer.zero_grad()
        outputs = torch.func.functional_call(self.model, self.matrices(), (), {"input_ids": ids})
        loss_of(outputs.logits, ids).backward()
        self.optimizer.step()

    def values(self) -> dict[str, Tensor]:
        return {**values(self.model), **{name: matrix.detach() for name, matrix in self.matrices().items()}}


def adamw(model: nn.Module, **flags: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=3e-3, weight_decay=0.1, **flags)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def small_llama(zero_start: bool = False) -> Any:
    return llama(torch.float64, zero_start=zero_start, target_modules=TARGETS)


# -- the comparison ---------------------------------------------------------------------------------------------------


def check(factorization: Factorization, start: str, *, truncated: bool, zero_start: bool = False) -> None:
    """Train through cores, by the oracle and as plain LoRA, and compare."""
    model, plain = small_llama(zero_start), small_llama(zero_start)
    optimizer, plain_optimizer = adamw(model), adamw(plain)
    scheduler = Static() if start == "static" else TaylorRuntime(top_n=2, split=2, every=10)
    over = LoraOver(model, optimizer, factorization, scheduler)
    oracle = Oracle(factorization, small_llama(zero_start))
    parameters = dict(model.named_parameters())
    taken: dict[str, tuple[list[Tensor], list[dict[str, Any]]]] = {}
    residuals: dict[str, Tensor | None] = {}

    def take(*_: Any) -> None:
        # matrices expanded for the step to come: their cores before it, and the matrices, which must not have moved
        for name, entry in over.state_dict()["cores"].items():
            if name in residuals:
                continue
            full, cores = parameter_name(name), [core.clone() for core in entry["cores"]]
            taken[full] = cores, [{k: v.clone() for k, v in state.items()} for state in entry["state"] or []]
            residual = residuals[name] = None if entry["residual"] is None else entry["residual"].clone()
            assert torch.equal(parameters[full], before[full]), "the expansion wrote the matrix"
            folded = contract(factorization, cores) + (0 if residual is None else residual)
            assert float((folded - before[full]).abs().max()) <= 1e-13 * max(1.0, float(before[full].abs().max()))

    when_lent(over, take)
    for step in range(1, STEPS + 1):
        rate = 3e-3 * (1 - 0.01 * step)  # a learning-rate schedule
        before = values(model)
        for each, stepped in ((model, optimizer), (plain, plain_optimizer)):
            set_rate(stepped, rate)
            stepped.zero_grad()
            backward(each, step)
            stepped.step()
        for name, (cores, states) in taken.items():
            oracle.expand(name, cores, states or [{}] * len(cores))
        taken.clear()
        oracle.step(step, rate)

    assert len(oracle.cores) == len(over.matrices) == 12
    assert [event.step for event in over.history] == ([0] if start == "static" else [10, 20])
    assert all((residual is not None) == truncated for residual in residuals.values())
    for name, entry in over.state_dict()["cores"].items():
        residual = residuals[name]
        if residual is not None:
            assert torch.equal(entry["residual"], residual), "the residual is frozen"
            assert zero_start or float(residual.abs().max()) > 1e-3, "the cores miss something"
    assert largest_difference(values(model), oracle.values()) < 1e-9
    assert largest_difference(values(model), values(plain)) > 1e-4


def parameter_name(name: str) -> str:
    return f"base_model.model.{name[:-2]}.lora_{name[-1]}.default.weight"


@pytest.mark.parametrize(
    ("name", "backend", "start"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id="-".join(case)) for case in CASES],
)
def test_fifty_steps(name: str, backend: str, start: str) -> None:
    check(replace(VARIANTS[name], backend=backend), start, truncated=name in TRUNCATED)


@pytest.mark.parametrize("name", ["mpo", pytest.param("svd", marks=pytest.mark.slow), "tucker", "cp"])
def test_fifty_steps_from_zero_matrices(name: str) -> None:
    """Every B is zero at the start, as LoRA has it, and its cores learn."""
    check(VARIANTS[name], "static", truncated=False, zero_start=True)


def test_every_combination_is_among_the_cases() -> None:
    assert {(VARIANTS[n].__class__, b) for n, b, _ in CASES} == {
        (f, b) for f in (MPO, SVD, Tucker, CP) for b in BACKENDS
    }
    assert {b for n, b, _ in CASES if n == "svd"} == set(BACKENDS)
    assert {b for _, b, _ in FAST} == set(BACKENDS)
    assert set(FAST) <= set(CASES)
