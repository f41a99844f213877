"""Checks of plug-ins: whether a factorization, scheduler or backend keeps the laws that the package builds on.

Each check runs through a fixed list of examples and raises `LawBroken` at the first that breaks a law. The laws are those of the
docstrings of `Factorization`, `Scheduler` and `Backend`, by number.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tnadapt.backends import Backend, get_backend
from tnadapt.factorizations import SVD, Factorization, core_dtype
from tnadapt.factorizations.sites import to_sites
from tnadapt.matrices import TrainedMatrix
from tnadapt.schedulers import Scheduler

__all__ = ["LawBroken", "check_backend", "check_factorization", "check_scheduler", "example_matrices"]

SHAPES = ((24, 8), (8, 24), (1, 1), (1, 6), (13, 17), (30, 30))
KINDS = ("normal", "zero", "rank-1", "constant")


_Described = TypeVar("_Described", Factorization, Scheduler)


class LawBroken(AssertionError):
    """A plug-in breaks a law.

    Attributes:
        law: its number.
    """

    def __init__(self, owner: object, law: int, counterexample: str) -> None:
        super().__init__(f"{owner!r} breaks law {law} of {_kind(owner)}: {counterexample}")
        self.law = law


def _kind(owner: object) -> str:
    return next((cls.__name__ for cls in (Factorization, Scheduler, Backend) if isinstance(owner, cls)), "")


class _Judge:
    """Raises for one plug-in.

    Raises:
        TypeError: the plug-in is not one of its kind.
    """

    def __init__(self, owner: object, kind: type) -> None:
        if not isinstance(owner, kind):
            raise TypeError(
                f"check_{kind.__name__.lower()} takes an object of a subclass of {kind.__name__}, got {owner!r}"
                + ("; make one of the class first" if isinstance(owner, type) else "")
            )
        self.owner = owner

    def require(self, holds: bool, law: int, counterexample: str) -> None:
        if not holds:
            raise LawBroken(self.owner, law, counterexample)

    @contextmanager
    def law(self, number: int, case: str) -> Iterator[None]:
        """An exception inside breaks this law too."""
        try:
            yield
        except LawBroken:
            raise
        except Exception as error:
            raise LawBroken(self.owner, number, f"{case}: {type(error).__name__}: {error}") from error


def _rebuilt(judge: _Judge, plugin: _Described, make: Callable[[dict[str, Any]], _Described]) -> _Described:
    """A plug-in made again from the JSON of its description, which it must describe alike."""
    data = plugin.to_dict()
    again = make(json.loads(json.dumps({key: value for key, value in data.items() if key != "type"})))
    judge.require(again.to_dict() == data, 6, f"to_dict() gives {data}, which is rebuilt as {again!r}")
    return again


# -- factorizations ---------------------------------------------------------------------------------------------------------


def check_factorization(
    factorization: Factorization,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """Check the laws of `Factorization` for matrices of every shape and dtype: normal ones, zero, of rank 1 and constant.

    Args:
        factorization: with sites for all `shapes`, or none.
        shapes: `(rows, cols)`.
        dtypes: by default float32, float64 and bfloat16.

    Raises:
        LawBroken: with the number of the law and the example that breaks it.
    """
    judge = _Judge(factorization, Factorization)
    _check_description(judge, factorization)
    for shape in shapes:
        for dtype in dtypes or (torch.float64, torch.float32, torch.bfloat16):
            for kind in KINDS:
                case = f"{kind} matrix, shape {shape}, {dtype}"
                _check_matrix(judge, factorization, _matrix(shape, kind, 0).to(dtype), case)
        _check_gradients(judge, factorization, shape)
        _check_zero(judge, factorization, shape)
        _check_batch(judge, factorization, shape)


def _check_description(judge: _Judge, factorization: Factorization) -> None:
    with judge.law(6, "description"):
        again = _rebuilt(judge, factorization, type(factorization)._from_settings)
        judge.require(again == factorization, 6, f"to_dict() is rebuilt as {again!r}, which is not equal")
        judge.require(hash(again) == hash(factorization), 6, f"{again!r} is equal and has another hash")
        try:
            again.backend = again.backend  # type: ignore[misc]
        except dataclasses.FrozenInstanceError:
            return
        judge.require(
            False, 6, "its settings can be changed; make the class a dataclass with frozen=True, kw_only=True"
        )


def _unfold(factorization: Factorization, matrix: Tensor) -> tuple[Tensor, ...]:
    if not factorization.needs_gradient:
        return factorization.unfold(matrix)
    return factorization.unfold(matrix, gradient=_matrix(matrix.shape, "normal", 7).to(matrix))


def _check_matrix(judge: _Judge, factorization: Factorization, matrix: Tensor, case: str) -> None:
    shape = (matrix.shape[-2], matrix.shape[-1])
    before = matrix.clone()
    with judge.law(2, case):
        wanted = factorization.core_shapes(shape)
        cores = _unfold(factorization, matrix)
        judge.require(torch.equal(matrix, before), 2, f"{case}: unfold writes to the matrix")
        got = tuple(tuple(core.shape) for core in cores)
        judge.require(got == wanted, 2, f"{case}: unfold gives cores of shapes {got}, core_shapes says {wanted}")
    with judge.law(1, case):  # before the gradients: autograd's errors do not name the method that is wrong
        folded = factorization.fold(cores)
        judge.require(folded.shape == matrix.shape, 1, f"{case}: fold gives the shape {tuple(folded.shape)}")
    with judge.law(2, case):
        grads = factorization.pull_back(cores, matrix)
        for what, tensors in (("core", cores), ("gradient", grads)):
            for k, tensor in enumerate(tensors):
                judge.require(tensor.is_contiguous(), 2, f"{case}: {what} {k} is not contiguous")
                wide = core_dtype(matrix.dtype)
                judge.require(tensor.dtype == wide, 2, f"{case}: {what} {k} is {tensor.dtype} instead of {wide}")
                judge.require(tensor.shape == cores[k].shape, 2, f"{case}: {what} {k} has shape {tuple(tensor.shape)}")
    with judge.law(1, case):
        if factorization.structure(shape).exact:
            error, bound = _error(folded, matrix), 1e-12 if matrix.dtype == torch.float64 else 2e-6
            judge.require(error <= bound, 1, f"{case}: fold(unfold(W)) is off by {error:.2g}, more than {bound:g}")


def _check_gradients(judge: _Judge, factorization: Factorization, shape: tuple[int, int]) -> None:
    case = f"cores in general position, shape {shape}, torch.float64"
    with judge.law(3, case):
        generator = torch.Generator().manual_seed(1)
        shapes = factorization.core_shapes(shape)
        cores = [
            torch.randn(2, *core, generator=generator, dtype=torch.float64) / max(core[0], core[-1]) ** 0.5
            for core in shapes
        ]
        grad = _matrix((2, *shape), "normal", 2)
        leaves = [core.clone().requires_grad_() for core in cores]
        folded = factorization.fold(leaves)
        expected = torch.autograd.grad((folded * grad).sum(), leaves)
        for k, (got, want) in enumerate(zip(factorization.pull_back(cores, grad), expected, strict=True)):
            error = _error(got, want)
            judge.require(error <= 1e-9, 3, f"{case}: the gradient of core {k} differs from autograd's by {error:.2g}")
        fused = [core.reshape(2, *own) for core, own in zip(cores, factorization.fused_shapes(shapes), strict=True)]
        contracted = factorization.kernel(fused).contract()
        sites = factorization.structure(shape).sites
        error = _error(contracted, to_sites(folded.detach(), sites).reshape(2, -1))
        judge.require(
            error <= 1e-12, 3, f"{case}: its kernel contracts to another matrix than fold, off by {error:.2g}"
        )


def _check_zero(judge: _Judge, factorization: Factorization, shape: tuple[int, int]) -> None:
    case = f"zero matrix, shape {shape}"
    with judge.law(4, case):
        cores = _unfold(factorization, torch.zeros(shape))
        judge.require(not bool(factorization.fold(cores).any()), 4, f"{case}: its cores do not fold to zero")
        grads = factorization.pull_back(cores, _matrix(shape, "normal", 3).float())
        judge.require(any(bool(grad.any()) for grad in grads), 4, f"{case}: no core gets a gradient")


def _check_batch(judge: _Judge, factorization: Factorization, shape: tuple[int, int]) -> None:
    case = f"batch of a normal, a zero and a rank-1 matrix, shape {shape}, torch.float64"
    with judge.law(5, case):
        batch = torch.stack([_matrix(shape, kind, 4) for kind in ("normal", "zero", "rank-1")])
        grad = _matrix((3, *shape), "normal", 5)
        cores = _unfold(factorization, batch)
        folded, grads = factorization.fold(cores), factorization.pull_back(cores, grad)
        for k in range(3):
            own = [core[k] for core in cores]
            error = _error(folded[k], factorization.fold(own))
            judge.require(error <= 1e-12, 5, f"{case}: member {k} folds differently alone, by {error:.2g}")
            for got, want in zip(grads, factorization.pull_back(own, grad[k]), strict=True):
                error = _error(got[k], want)
                judge.require(error <= 1e-9, 5, f"{case}: member {k} is pulled back differently alone, by {error:.2g}")
            if factorization.structure(shape).exact:
                alone = factorization.fold(_unfold(factorization, batch[k]))
                error = _error(folded[k], alone)
                judge.require(error <= 1e-11, 5, f"{case}: member {k} unfolds differently alone, by {error:.2g}")


def _matrix(shape: Sequence[int], kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    if kind == "zero":
        return torch.zeros(*shape, dtype=torch.float64)
    if kind == "constant":
        return torch.full(tuple(shape), -0.75, dtype=torch.float64)
    if kind == "rank-1":
        return normal(*shape[:-1], 1) @ normal(*shape[:-2], 1, shape[-1])
    return normal(*shape)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of `expected`; infinite where the shapes differ or a number is not finite."""
    if actual.shape != expected.shape:
        return float("inf")
    difference = float((actual.double() - expected.double()).norm())
    size = float(expected.double().norm())
    return float("inf") if difference != difference else difference / (size or 1.0)


# -- schedulers -------------------------------------------------------------------------------------------------------------

#: What a scheduler released and selected, by step.
Choices = dict[int, tuple[list[str], list[str]]]


def example_matrices(layers: int = 4) -> dict[str, TrainedMatrix]:
    """The LoRA matrices of a small model, two pairs in each layer: `layers.0.q.A`, `layers.0.q.B`, `layers.0.v.A`, ..."""
    generator = torch.Generator().manual_seed(0)
    matrices: dict[str, TrainedMatrix] = {}
    for layer in range(layers):
        for module in ("q", "v"):
            for side, (rows, cols) in (("A", (4, 12)), ("B", (8, 4))):
                linear = nn.Linear(cols, rows, bias=False)
                parameter = nn.Parameter(torch.randn(rows, cols, generator=generator))
                linear.weight = parameter
                path = f"layers.{layer}.{module}"
                matrices[f"{path}.{side}"] = TrainedMatrix(
                    name=f"{path}.{side}",
                    kind=side,
                    group=f"layers.*.{module}.{side}",
                    module=path,
                    layer=layer,
                    owner=linear,
                    attribute="weight",
                    parameter=parameter,
                    factorization=SVD(),
                )
    return matrices


def check_scheduler(scheduler: Scheduler, steps: int = 24, layers: int = 4) -> None:
    """Check the laws of `Scheduler` in a run on `example_matrices(layers)`, whose gradients are random.

    Args:
        scheduler: a new one; it is copied and not changed.
        steps: length of the run, long enough for everything that the scheduler decides.
        layers: number of layers of the example.

    Raises:
        LawBroken: with the number of the law and the step that breaks it.
    """
    judge = _Judge(scheduler, Scheduler)
    with judge.law(6, "description"):
        _rebuilt(judge, scheduler, lambda settings: type(scheduler)(**settings))
    whole, _ = _run(judge, copy.deepcopy(scheduler), example_matrices(layers), range(steps + 1))
    again, _ = _run(judge, copy.deepcopy(scheduler), example_matrices(layers), range(steps + 1))
    judge.require(whole == again, 5, f"of two runs on the same matrices one chose {whole}, the other {again}")
    for stop in sorted({1, steps // 3, steps // 2, steps - 1}):
        case = f"saved after step {stop} of {steps}"
        with judge.law(4, case):
            matrices = example_matrices(layers)
            first, running = _run(judge, copy.deepcopy(scheduler), matrices, range(stop + 1))
            state = running.state_dict()
            _require_plain(judge, state, case)
            kept = copy.deepcopy(state)
            rest, _ = _run(judge, running, copy.deepcopy(matrices), range(stop + 1, steps + 1))
            judge.require(_equal(state, kept), 4, f"{case}: the state that was saved changes while the run goes on")
            resumed = copy.deepcopy(scheduler)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                resumed.attach(example_matrices(layers))
            resumed.load_state_dict(kept)
            second, _ = _run(judge, resumed, matrices, range(stop + 1, steps + 1))
            judge.require({**first, **rest} == whole, 5, f"{case}: the run chose {rest} afterwards, another {whole}")
            judge.require(second == rest, 4, f"{case}: the resumed run chose {second}, the one that went on {rest}")


def _run(
    judge: _Judge, scheduler: Scheduler, matrices: dict[str, TrainedMatrix], steps: range
) -> tuple[Choices, Scheduler]:
    """What the scheduler names at each of `steps`; step 0 attaches it."""
    choices: Choices = {}
    first = scheduler.first_step()
    expanded = {name for name, matrix in matrices.items() if matrix.expanded}
    for matrix in matrices.values():
        matrix.roster = lambda: expanded
    for step in steps:
        _give_gradients(matrices, step)
        before = {name: (m.value.clone(), _copy(m.parameter.grad)) for name, m in matrices.items()}
        released: list[str] = []
        chosen: list[str] = []
        with warnings.catch_warnings(), judge.law(1, f"step {step}"):
            warnings.simplefilter("ignore")
            if step == 0:
                scheduler.attach(matrices)
                chosen = list(scheduler.select(0, matrices))
            else:
                scheduler.observe(step, matrices)
                if scheduler.due(step):
                    released, chosen = list(scheduler.release(step, matrices)), list(scheduler.select(step, matrices))
        for name, (value, gradient) in before.items():
            same = torch.equal(matrices[name].value, value) and _equal(matrices[name].parameter.grad, gradient)
            judge.require(same, 3, f"step {step}: {name} or its gradient was written to")
        strangers = [name for name in [*released, *chosen] if name not in matrices]
        judge.require(not strangers, 1, f"step {step}: {strangers} are no names of matrices")
        wrong = [name for name in released if not matrices[name].expanded]
        judge.require(not wrong, 1, f"step {step}: released {wrong}, which are not expanded")
        wrong = [name for name in chosen if matrices[name].expanded and name not in released]
        judge.require(not wrong, 1, f"step {step}: selected {wrong}, which are expanded")
        judge.require(len(set(chosen)) == len(chosen), 1, f"step {step}: selected some of {chosen} twice")
        if first is not None:
            judge.require(
                not chosen or step >= first, 2, f"selected {chosen} at step {step}, before first_step()={first}"
            )
        expanded.difference_update(released)
        expanded.update(chosen)
        if released or chosen:
            choices[step] = released, chosen
    return choices, scheduler


def _give_gradients(matrices: Mapping[str, TrainedMatrix], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for matrix in matrices.values():
        gradient = torch.randn(matrix.shape, generator=generator)
        matrix.parameter.grad = None if step == 0 else gradient


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _require_plain(judge: _Judge, value: Any, case: str) -> None:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            judge.require(
                isinstance(key, (str, int)), 4, f"{case}: the state has the key {key!r}, no string or integer"
            )
            _require_plain(judge, entry, case)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _require_plain(judge, entry, case)
    else:
        plain = value is None or isinstance(value, (bool, int, float, str, Tensor))
        judge.require(plain, 4, f"{case}: the state holds a {type(value).__name__}, which weights_only does not load")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return set(one) == set(other) and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


# -- backends ---------------------------------------------------------------------------------------------------------------

#: (equation, shapes)
EQUATIONS: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...] = (
    ("nab,nbc->nac", ((2, 3, 4), (2, 4, 5))),
    ("nxd,ndpe->nxpe", ((1, 6, 2), (1, 2, 3, 4))),
    ("nrxd,ndpr->nxp", ((2, 3, 4, 5), (2, 5, 2, 3))),
    ("nxr,npr->nxpr", ((3, 4, 2), (3, 5, 2))),
    ("nxr,nyr->nxy", ((2, 4, 3), (2, 5, 3))),
)


class _Default(Backend):
    """The operations as the base class has them."""

    name = "default"

    def contract(self, equation: str, *tensors: Tensor) -> Tensor:
        return torch.einsum(equation, *tensors)

    def svd(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[..., :rank], s[..., :rank], vh[..., :rank, :]


def check_backend(backend: Backend | str) -> None:
    """Check the laws of `Backend`.

    Args:
        backend: an object, or the name that it is registered under.

    Raises:
        LawBroken: with the number of the law and the example that breaks it.
    """
    tested = get_backend(backend) if isinstance(backend, str) else backend
    judge = _Judge(tested, Backend)
    for equation, shapes in EQUATIONS:
        for dtype in (torch.float64, torch.float32):
            _check_contract(judge, tested, equation, [_matrix(s, "normal", k).to(dtype) for k, s in enumerate(shapes)])
    for shape in ((2, 6, 4), (3, 4, 6), (1, 5, 5), (2, 1, 3)):
        for kind in KINDS:
            for rank in sorted({1, min(shape[1:])}):
                _check_svd(judge, tested, _matrix(shape, kind, 0), rank, f"{kind} matrices {shape}, rank {rank}")
    _check_operations(judge, tested)


def _read_only(judge: _Judge, case: str, run: Callable[..., Any], *tensors: Tensor) -> Any:
    before = [tensor.detach().clone() for tensor in tensors]
    result = run(*tensors)
    judge.require(all(map(torch.equal, tensors, before)), 4, f"{case}: an argument was written to")
    return result


def _check_contract(judge: _Judge, backend: Backend, equation: str, tensors: list[Tensor]) -> None:
    case = f"contract({equation!r}) of {[tuple(t.shape) for t in tensors]}, {tensors[0].dtype}"
    bound = 1e-12 if tensors[0].dtype == torch.float64 else 1e-5
    with judge.law(1, case):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        result = _read_only(judge, case, lambda *each: backend.contract(equation, *each), *leaves)
        expected = torch.einsum(equation, *leaves)
        judge.require(result.dtype == expected.dtype, 1, f"{case}: gives {result.dtype}")
        error = _error(result.detach(), expected.detach())
        judge.require(error <= bound, 1, f"{case}: differs from torch.einsum by {error:.2g}")
        weight = _matrix(expected.shape, "normal", 9).to(expected)
        wanted = torch.autograd.grad((expected * weight).sum(), leaves)
        judge.require(result.requires_grad, 1, f"{case}: autograd does not see it")
        for k, (got, want) in enumerate(zip(torch.autograd.grad((result * weight).sum(), leaves), wanted, strict=True)):
            error = _error(got, want)
            judge.require(error <= bound, 1, f"{case}: the gradient of tensor {k} is off by {error:.2g}")


def _check_svd(judge: _Judge, backend: Backend, matrix: Tensor, rank: int, case: str) -> None:
    case = f"svd of {case}"
    with judge.law(2, case):
        u, s, vh = _read_only(judge, case, lambda m: backend.svd(m, rank), matrix)
        n, a, b = matrix.shape
        got, want = (tuple(u.shape), tuple(s.shape), tuple(vh.shape)), ((n, a, rank), (n, rank), (n, rank, b))
        judge.require(got == want, 2, f"{case}: gives the shapes {got} instead of {want}")
        expected = torch.linalg.svdvals(matrix)[:, :rank]
        judge.require(
            bool(torch.allclose(s, expected, atol=1e-10)),
            2,
            f"{case}: gives the values {s.tolist()}, not {expected.tolist()}",
        )
        eye = torch.eye(rank, dtype=matrix.dtype)
        for side, gram in (("left", u.mT @ u), ("right", vh @ vh.mT)):
            judge.require(
                bool(torch.allclose(gram, eye.expand_as(gram), atol=1e-10)),
                2,
                f"{case}: the {side} vectors are not orthonormal",
            )
        # u s vh has the singular values of the matrix, and is the matrix projected on u
        error = _error((u * s.unsqueeze(1)) @ vh, u @ (u.mT @ matrix))
        judge.require(error <= 1e-10, 2, f"{case}: U S Vh is off by {error:.2g} from the matrix projected on U")


def _check_operations(judge: _Judge, backend: Backend) -> None:
    default = _Default()
    chain = [_matrix((1, *s), "normal", k) for k, s in enumerate([(1, 4, 3), (3, 5, 2), (2, 6, 1)])]
    factors = [_matrix((1, *s), "normal", k) for k, s in enumerate([(4, 3), (5, 2), (6, 4)])]
    core = _matrix((1, 3, 2, 4), "normal", 8)
    components = [_matrix((1, p, 3), "normal", p) for p in (4, 5, 6)]
    contractions: dict[str, tuple[list[Tensor], Callable[[Backend, Sequence[Tensor]], Tensor], Any]] = {
        "chain": (chain, lambda b, t: b.chain_contract(t), lambda b, t: b.chain_kernel(t)),
        "tucker": (
            [*factors, core],
            lambda b, t: b.tucker_contract(t[:-1], t[-1]),
            lambda b, t: b.tucker_kernel(t[:-1], t[-1]),
        ),
        "cp": (components, lambda b, t: b.cp_contract(t), lambda b, t: b.cp_kernel(t)),
    }
    weight = _matrix((1, 120), "normal", 9)
    for name, (tensors, contract, kernel) in contractions.items():
        for n in (1, 2):
            case = f"{name}_contract of a batch of {n}"
            with judge.law(3, case):
                batch = [torch.cat([tensor] * n) for tensor in tensors]
                found = _read_only(judge, case, lambda *t, c=contract: c(backend, t), *batch)
                error = _error(found, contract(default, batch))
                judge.require(error <= 1e-12, 3, f"{case}: off by {error:.2g}")
        case = f"{name}_kernel"
        with judge.law(3, case):
            own, wanted = kernel(backend, tensors), kernel(default, tensors)
            error = max(_error(own.contract(), wanted.contract()), _error(own.contract(), wanted.contract()))
            judge.require(error <= 1e-12, 3, f"{case}: contracts to something else, off by {error:.2g}")
            error = _error(own.pull_back(weight).reshape(-1), wanted.pull_back(weight).reshape(-1))
            judge.require(error <= 1e-10, 3, f"{case}: its gradient is off by {error:.2g}")
    _check_decompositions(judge, backend, default)


def _check_decompositions(judge: _Judge, backend: Backend, default: Backend) -> None:
    tensor = torch.stack([_matrix((4, 30), kind, 3).reshape(4, 5, 6) for kind in KINDS])
    flat = tensor.flatten(1)
    bonds: Sequence[int]
    for bonds in ([4, 6], [2, 2]):
        case = f"chain_decompose with bonds {bonds}"
        with judge.law(3, case):
            found = _read_only(judge, case, lambda t, b=bonds: backend.chain_decompose(t, b), tensor)
            error = _error(
                default.chain_contract(found), default.chain_contract(default.chain_decompose(tensor, bonds))
            )
            judge.require(error <= 1e-9, 3, f"{case}: the chain is off by {error:.2g}")
    for ranks, slack in (([4, 5, 6], 1.0), ([2, 2, 2], 1.05)):
        case = f"tucker_decompose with ranks {ranks}"
        with judge.law(3, case):
            factors, core = _read_only(judge, case, lambda t, r=ranks: backend.tucker_decompose(t, r), tensor)
            error = _error(default.tucker_contract(factors, core), flat)
            allowed = slack * _error(default.tucker_contract(*default.tucker_decompose(tensor, ranks)), flat) + 1e-9
            judge.require(error <= allowed, 3, f"{case}: misses {error:.2g} of the tensor, the default {allowed:.2g}")
    case = "cp_decompose with rank 3"
    with judge.law(3, case):
        found = _read_only(judge, case, lambda t: backend.cp_decompose(t, 3), tensor)
        error = _error(default.cp_contract(found), flat)
        allowed = 1.3 * _error(default.cp_contract(default.cp_decompose(tensor, 3)), flat) + 1e-5
        judge.require(
            error <= allowed, 3, f"{case}: misses {error:.2g} of the tensor, the default with slack {allowed:.2g}"
        )
