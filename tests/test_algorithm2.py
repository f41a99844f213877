"""A second oracle: the paper's Algorithm 2, written a second time and from the paper alone, and trained beside `LoraOver`.

Everything above the line "The comparison" is the reference: a small LoRA model as a function of its matrices, Algorithm 1 by
NumPy's SVD, scores, rounds, and training in which the forward pass contracts the cores (Eq. 3) and autograd reaches them. It
uses nothing of tnadapt, and nothing passes from one side to the other but the initial matrices and the batches.

**What makes the two trajectories comparable.** The cores of a matrix are not unique; two decompositions of one matrix train
differently unless what they differ by commutes with the optimizer.

- A matrix whose unfoldings have different singular values, none of them zero, has one left-canonical gauge up to the signs of
  the singular vectors. Signs are a change of basis at a bond by a diagonal of plus and minus ones. Every update here works
  element by element and is odd in the gradient and the parameter (decay included), so it commutes with signs, and the matrix
  moves alike for all of them. Hence no sign is fixed; a test flips them at random.
- At a 1x1 site the sweep finds `Lambda V^T`, whose left singular vectors are unit vectors: Algorithm 1 gives the identity there,
  again up to signs. The reference runs that SVD as it runs all others.
- For a zero matrix the left singular vectors are any orthonormal frame. Gradient descent with or without momentum is linear, so
  it commutes with rotations of a bond, and the trajectory is the same for all frames that span the same space, which is every
  frame where the first sites together are no larger than the last. Elsewhere, and for optimizers that look at single entries,
  the frame is a choice, and both sides must make the same: the first unit vectors, which is what LAPACK's SVD of zeros returns.
  One test holds the choice, another rotates the frames under momentum.

**What the paper leaves open** is read as `docs/decisions.md` says: the score is `|<dL/dW, W>|` summed over steps; after round k of
K, `ceil(k N / K)` matrices of a group are expanded, N at most the size of the group; a round expands before the update of its
step; a core's rate is its matrix's rate times a constant; equal scores go by the order of the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import contract_mpo, paper_sites
from torch import Tensor, nn

# -- the model --------------------------------------------------------------------------------------------------------

LAYERS = 4
WIDTH = 7
ROWS = 16  # of a batch
SCALING = 0.5
#: (side, kind of module) -> shape. Those of `down` have a prime rank and width, so that first sites are 1x2 and 1x1.
SHAPES = {("A", "up"): (4, WIDTH), ("B", "up"): (8, 4), ("A", "down"): (3, 8), ("B", "down"): (WIDTH, 3)}
NAMES = [f"layers.{k}.{kind}.{side}" for k in range(LAYERS) for kind in ("up", "down") for side in ("A", "B")]

Matrices = dict[str, Tensor]


def group_of(name: str) -> tuple[str, str]:
    """Matrices are ranked against those of the same kind of module and the same side in other layers."""
    _, _, kind, side = name.split(".")
    return side, kind


def initial(seed: int, zero_start: bool) -> tuple[Matrices, Matrices]:
    """Matrices and frozen weights, in float64. `B` is zero as LoRA has it, or not."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    matrices = {name: normal(*SHAPES[group_of(name)]) for name in NAMES}
    frozen: Matrices = {}
    for k in range(LAYERS):
        frozen |= {f"layers.{k}.up": normal(8, WIDTH), f"layers.{k}.down": normal(WIDTH, 8)}
    if zero_start:
        matrices = {name: torch.zeros_like(m) if name.endswith("B") else m for name, m in matrices.items()}
    return matrices, frozen


def batch(step: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1000 + step), dtype=torch.float64)


def loss_of(matrices: Matrices, frozen: Matrices, step: int) -> Tensor:
    """Residual layers `x + W_down tanh(W_up x)`, with `W + SCALING B A` for each W; the error of fitting a fixed map."""
    x = batch(step)
    target = x.roll(1, dims=1).sin()

    def weight(path: str) -> Tensor:
        return frozen[path] + SCALING * matrices[f"{path}.B"] @ matrices[f"{path}.A"]

    for k in range(LAYERS):
        x = x + torch.tanh(x @ weight(f"layers.{k}.up").T) @ weight(f"layers.{k}.down").T / LAYERS
    return (x - target).square().mean()


# -- Algorithm 1 ------------------------------------------------------------------------------------------------------


def algorithm1(
    matrix: Tensor, sites: Sequence[tuple[int, int]], signs: np.random.Generator | None = None
) -> list[Tensor]:
    """Cores `[d_{k-1}, i_k, j_k, d_k]` by the sweep of SVDs from left to right (the bonds are those of Eq. 4).

    Args:
        signs: flips singular vectors at random; None for the signs that LAPACK gives.
    """
    rows, cols = [i for i, _ in sites], [j for _, j in sites]
    order = len(sites)
    paired = [axis for k in range(order) for axis in (k, order + k)]  # i_1...i_m j_1...j_m -> i_1 j_1 ... i_m j_m
    remainder = matrix.detach().numpy().reshape(*rows, *cols).transpose(paired)
    cores: list[Tensor] = []
    bond = 1
    for i, j in sites[:-1]:
        u, s, vh = np.linalg.svd(remainder.reshape(bond * i * j, -1), full_matrices=False)
        if signs is not None:
            flips = signs.choice([-1.0, 1.0], size=len(s))
            u, vh = u * flips, flips[:, None] * vh
        cores.append(torch.from_numpy(u.reshape(bond, i, j, len(s)).copy()))
        remainder, bond = s[:, None] * vh, len(s)
    cores.append(torch.from_numpy(remainder.reshape(bond, *sites[-1], 1).copy()))
    return cores


# -- Algorithm 2 ------------------------------------------------------------------------------------------------------


class Algorithm2:
    """Fine-tuning in which the matrices that matter most are expanded, in rounds.

    Args:
        matrices: trained, by name.
        frozen: the weights that they adapt.
        make: an optimizer of torch from parameter groups; its class and settings.
        rates: learning rate of `A` and of `B`.
        order: number of sites.
        top_n: N, matrices of a group that are expanded in the end.
        split: number of rounds.
        every: steps between rounds.
        core_factor: a core's rate over its matrix's.
        warm: whether cores inherit the momentum of their matrix, pulled back by autograd; otherwise they start fresh.
        decompose: Algorithm 1, or a form of it in another gauge.
    """

    def __init__(
        self,
        matrices: Matrices,
        frozen: Matrices,
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        rates: dict[str, float],
        *,
        order: int,
        top_n: int,
        split: int,
        every: int,
        core_factor: float,
        warm: bool,
        decompose: Callable[..., list[Tensor]] = algorithm1,
    ) -> None:
        self.leaves: dict[str, list[Tensor]] = {name: [m.clone().requires_grad_()] for name, m in matrices.items()}
        self.frozen, self.rates = frozen, rates
        self.order, self.top_n, self.split, self.every = order, top_n, split, every
        self.core_factor, self.warm, self.decompose = core_factor, warm, decompose
        self.scores = dict.fromkeys(matrices, 0.0)
        self.rounds: list[tuple[int, dict[str, float], list[str]]] = []
        self.expanded: list[str] = []
        # a group for each matrix: the group of a matrix that is expanded becomes that of its cores
        self.groups = {name: {"params": leaves, "lr": 0.0} for name, leaves in self.leaves.items()}
        self.optimizer = make(list(self.groups.values()))
        self.groups = dict(zip(matrices, self.optimizer.param_groups, strict=True))

    def matrices(self) -> Matrices:
        return {
            name: contract_mpo(leaves) if name in self.expanded else leaves[0] for name, leaves in self.leaves.items()
        }

    def step(self, step: int, factor: float) -> float:
        """One step, at `factor` times the rates."""
        self.optimizer.zero_grad()
        loss = loss_of(self.matrices(), self.frozen, step)
        loss.backward()
        self._score()
        if step % self.every == 0 and len(self.rounds) < self.split:
            self._round(step)
            self.optimizer.zero_grad()
            loss_of(self.matrices(), self.frozen, step).backward()
        for name, group in self.groups.items():
            of_core = self.core_factor if name in self.expanded else 1.0
            group["lr"] = self.rates[name[-1]] * factor * of_core
        self.optimizer.step()
        return float(loss.detach())

    def _score(self) -> None:
        """Eq. 8, of the matrices that are matrices still."""
        for name, leaves in self.leaves.items():
            if name not in self.expanded and len(self.rounds) < self.split:
                grad = leaves[0].grad
                assert grad is not None
                self.scores[name] += abs(float((grad * leaves[0].detach()).sum()))

    def _round(self, step: int) -> None:
        k = len(self.rounds) + 1
        chosen: list[str] = []
        for group in dict.fromkeys(map(group_of, self.leaves)):
            members = [name for name in self.leaves if group_of(name) == group]
            n = min(self.top_n, len(members))
            present = sum(name in self.expanded for name in members)
            wanted = math.ceil(k * n / self.split) - present
            waiting = [name for name in members if name not in self.expanded]
            chosen += sorted(waiting, key=lambda name: self.scores[name], reverse=True)[:wanted]
        self.rounds.append((step, dict(self.scores), chosen))
        for name in chosen:
            self._expand(name)

    def _expand(self, name: str) -> None:
        (matrix,) = self.leaves[name]
        known = self.optimizer.state.pop(matrix, {})
        cores = self.decompose(matrix, paper_sites(*matrix.shape, self.order))
        assert torch.allclose(contract_mpo(cores), matrix, rtol=0, atol=1e-13)
        for core in cores:
            core.requires_grad_()
        if self.warm and known:
            # momentum is a weighted sum of gradients, and core gradients are linear in those of the matrix
            pulled = torch.autograd.grad(contract_mpo(cores), cores, known["momentum_buffer"])
            self.optimizer.state.update({c: {"momentum_buffer": m} for c, m in zip(cores, pulled, strict=True)})
        self.leaves[name] = self.groups[name]["params"] = cores
        self.expanded.append(name)


# -- The comparison ---------------------------------------------------------------------------------------------------

from tnadapt import MPO, LoraOver, TaylorRuntime  # noqa: E402
from tnadapt.engine.checks import REFUSED  # noqa: E402


class Pair(nn.Module):
    """A LoRA pair as a user may have it."""

    def __init__(self, A: Tensor, B: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        for side, matrix in (("lora_A", A), ("lora_B", B)):
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=torch.float64)
            with torch.no_grad():
                linear.weight.copy_(matrix)
            setattr(self, side, linear)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) + SCALING * self.lora_B(self.lora_A(x))


class Model(nn.Module):
    """The model of `loss_of` as torch modules."""

    def __init__(self, matrices: Matrices, frozen: Matrices) -> None:
        super().__init__()

        def pair(path: str) -> Pair:
            return Pair(matrices[f"{path}.A"], matrices[f"{path}.B"], frozen[path])

        self.layers = nn.ModuleList(
            nn.ModuleDict({kind: pair(f"layers.{k}.{kind}") for kind in ("up", "down")}) for k in range(LAYERS)
        )

    def loss(self, step: int) -> Tensor:
        x = start = batch(step)
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x))) / LAYERS
        return nn.functional.mse_loss(x, start.roll(1, dims=1).sin())


#: class and settings; the rate of `A` is the optimizer's default, that of `B` is twice as high
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], float, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, 5e-2, {}),
    "momentum": (torch.optim.SGD, 1e-2, {"momentum": 0.9, "weight_decay": 1e-2}),
    "Nesterov": (torch.optim.SGD, 1e-2, {"momentum": 0.8, "nesterov": True}),
    "AdamW": (torch.optim.AdamW, 5e-3, {"weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, 1e-3, {"momentum": 0.5}),
    # Adagrad's own eps of 1e-10 would make steps of what is rounding in a gradient that is zero
    "Adagrad": (torch.optim.Adagrad, 2e-2, {"eps": 1e-6}),
}
for refused in REFUSED.keys() & OPTIMIZERS.keys():  # Adagrad, before torch 2.12
    del OPTIMIZERS[refused]
STEPS = 11
TOLERANCE = 1e-10


def compare(
    name: str,
    *,
    order: int,
    zero_start: bool = False,
    top_n: int = 3,
    split: int = 2,
    every: int = 4,
    core_ratio: float | None = None,
    handover: str = "restart",
    seed: int = 0,
    steps: int = STEPS,
    decompose: Callable[..., list[Tensor]] = algorithm1,
) -> Algorithm2:
    """Train the reference and a model with `LoraOver`, and require the same choices, scores, losses and matrices at every step."""
    optimizer_class, rate, settings = OPTIMIZERS[name]
    rates = {"A": rate, "B": 2 * rate}
    matrices, frozen = initial(seed, zero_start)
    reference = Algorithm2(
        matrices,
        frozen,
        lambda groups: optimizer_class(groups, lr=rate, foreach=False, **settings),
        rates,
        order=order,
        top_n=top_n,
        split=split,
        every=every,
        core_factor=1.0 if core_ratio is None else core_ratio,
        warm=handover == "warm",
        decompose=decompose,
    )
    model = Model(matrices, frozen)
    sides = [[p for n, p in model.named_parameters() if f"lora_{side}" in n] for side in "AB"]
    optimizer: Any = optimizer_class(
        [{"params": sides[0]}, {"params": sides[1], "lr": rates["B"]}], lr=rate, **settings
    )
    scheduler = TaylorRuntime(top_n=top_n, split=split, every=every)
    core_lr = None if core_ratio is None else rate * core_ratio
    over = LoraOver(model, optimizer, MPO(order=order), scheduler, core_lr=core_lr, handover=handover)
    assert list(over.matrices) == NAMES
    for step in range(1, steps + 1):
        factor = schedule(step, steps)
        for group, side in zip(optimizer.param_groups, "AB", strict=True):
            group["lr"] = rates[side] * factor
        optimizer.zero_grad()
        loss = model.loss(step)
        loss.backward()
        optimizer.step()
        expected = reference.step(step, factor)
        assert abs(float(loss.detach()) - expected) <= TOLERANCE * (1 + expected)
        assert set(over.expanded) == set(reference.expanded), f"other choices at step {step}"
        for matrix_name, wanted in reference.matrices().items():
            found = over.matrices[matrix_name].parameter.detach()
            difference = float((found - wanted.detach()).abs().max())
            assert difference <= TOLERANCE, f"{matrix_name} is {difference:.1e} away at step {step}"
    assert len(scheduler.rounds) == len(reference.rounds)
    for ours, (step, scores, chosen) in zip(scheduler.rounds, reference.rounds, strict=True):
        assert ours["step"] == step
        assert sorted(ours["selected"]) == sorted(chosen)
        for matrix_name, score in scores.items():
            assert abs(ours["scores"][matrix_name] - score) <= TOLERANCE * (1 + score)
    return reference


def schedule(step: int, steps: int) -> float:
    return 1.0 - 0.5 * step / steps


def plain_lora(name: str, zero_start: bool) -> Matrices:
    """The same run without any round."""
    optimizer_class, rate, settings = OPTIMIZERS[name]
    matrices, frozen = initial(0, zero_start)
    leaves = {n: m.requires_grad_() for n, m in matrices.items()}
    groups = [{"params": [m for n, m in leaves.items() if n.endswith(side)]} for side in "AB"]
    optimizer: Any = optimizer_class(groups, lr=rate, **settings)
    for step in range(1, STEPS + 1):
        for group, ratio in zip(optimizer.param_groups, (1, 2), strict=True):
            group["lr"] = rate * ratio * schedule(step, STEPS)
        optimizer.zero_grad()
        loss_of(leaves, frozen, step).backward()
        optimizer.step()
    return leaves


def distance(one: Matrices, other: Matrices) -> float:
    """Largest difference of an entry."""
    return max(float((matrix - other[name]).detach().abs().max()) for name, matrix in one.items())


@pytest.mark.parametrize("zero_start", [False, True], ids=["B", "B=0"])
@pytest.mark.parametrize("order", [2, 4, 9])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_choices_and_trajectories_agree(name: str, order: int, zero_start: bool) -> None:
    reference = compare(name, order=order, zero_start=zero_start, top_n=3, split=2, every=4, core_ratio=0.7)
    assert [step for step, _, _ in reference.rounds] == [4, 8]
    assert [len(chosen) for _, _, chosen in reference.rounds] == [8, 4], "3 matrices of each of 4 groups: 2 and 1"
    assert distance(reference.matrices(), plain_lora(name, zero_start)) > 1e-5, "cores train otherwise than matrices"


@pytest.mark.parametrize("order", [2, 4, 9])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_that_are_zero_when_they_are_expanded(name: str, order: int) -> None:
    """The round of the first step finds every B zero and every score too, since A has no gradient while B is zero."""
    reference = compare(name, order=order, zero_start=True, top_n=3, split=1, every=1)
    ((_, scores, chosen),) = reference.rounds
    assert set(scores.values()) == {0.0}
    assert {n.split(".")[1] for n in chosen} == {"0", "1", "2"}, "equal scores go by the order of the model"


@pytest.mark.parametrize("order", [2, 4, 9])
@pytest.mark.parametrize("name", ["momentum", "Nesterov"])
def test_momentum_is_handed_over(name: str, order: int) -> None:
    warm = compare(name, order=order, handover="warm")
    fresh = compare(name, order=order, handover="restart")
    assert distance(warm.matrices(), fresh.matrices()) > 1e-4, "the hand-over matters"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_signs_of_singular_vectors_do_not_matter(name: str) -> None:
    flips = np.random.default_rng(3)
    compare(name, order=4, decompose=lambda matrix, sites: algorithm1(matrix, sites, flips))


def test_rotated_frames_of_a_zero_matrix_do_not_matter_under_momentum() -> None:
    """Where the first site of a zero matrix is not the larger one, its frame is square, and any other is a rotation of it."""
    rotations = np.random.default_rng(4)

    def rotated(matrix: Tensor, sites: Sequence[tuple[int, int]]) -> list[Tensor]:
        cores = algorithm1(matrix, sites)
        if not bool(matrix.any()):
            assert cores[0].shape[1] * cores[0].shape[2] == cores[0].shape[3], "a square frame"
            for left, right in itertools.pairwise(range(len(cores))):
                bond = cores[left].shape[-1]
                q = torch.from_numpy(np.linalg.qr(rotations.normal(size=(bond, bond))).Q.copy())
                cores[left] = torch.tensordot(cores[left], q, dims=1)
                cores[right] = torch.tensordot(q.T, cores[right], dims=1)
        return [core.contiguous() for core in cores]

    compare("momentum", order=4, zero_start=True, split=1, every=1, decompose=rotated)
    with pytest.raises(AssertionError, match="away at step"):
        compare("AdamW", order=4, zero_start=True, split=1, every=1, decompose=rotated)


@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    order=st.integers(2, 6),
    top_n=st.integers(1, 7),
    split=st.integers(1, 4),
    every=st.integers(2, 4),
    core_ratio=st.sampled_from([None, 0.3, 1.0, 2.0]),
    seed=st.integers(0, 2**16),
)
@pytest.mark.filterwarnings("ignore:TaylorRuntime. top_n")
def test_any_plan(
    name: str, order: int, top_n: int, split: int, every: int, core_ratio: float | None, seed: int
) -> None:
    """N that the number of rounds does not divide, N above the size of a group, rounds that expand nothing, rounds that the run is
    too short for."""
    reference = compare(
        name, order=order, top_n=top_n, split=split, every=every, core_ratio=core_ratio, seed=seed, steps=9
    )
    sizes = {group: sum(group_of(n) == group for n in reference.expanded) for group in map(group_of, NAMES)}
    assert set(sizes.values()) == {math.ceil(min(9 // every, split) * min(top_n, LAYERS) / split)}
