"""The contract that every decomposition keeps.

Shapes: `*` = any leading batch dimensions, n = those flattened into one, `core_k` = `structure(shape).core_shapes[k]`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from tnadapt.backends import Backend, Kernel, full_precision, get_backend
from tnadapt.factorizations.sites import from_sites, to_sites
from tnadapt.factorizations.structure import (
    Shape,
    Sites,
    SitesArgument,
    Structure,
    checked_sites,
    is_count,
    nearest_sites,
    resolve_sites,
)
from tnadapt.registry import Registry, plain

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Factorization", "core_dtype", "register_factorization"]

F = TypeVar("F", bound="type[Factorization]")


def core_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the cores of a matrix: float32, or the matrix's own where that is wider."""
    return torch.promote_types(dtype, torch.float32)


#: An order above this is a mistake: even a dimension of 2^63 has no more than 63 prime factors.
MAX_ORDER = 256


@dataclass(frozen=True, kw_only=True, repr=False)
class Factorization(ABC):
    """How a matrix becomes cores and back. Immutable; holds no tensors; equal descriptions are equal objects.

    A subclass is a dataclass, frozen and with settings by name only. `docs/plugins.md` has an example,
    `tnadapt.testing.check_factorization` checks the laws.

    Laws (the property tests quote them):

    1. `fold(unfold(W)) == W` to rounding wherever `structure(shape).exact`, for any shape, dtype and batch, zero and
       rank-deficient matrices included.
    2. The cores have exactly the shapes of `core_shapes(shape)` and are contiguous, and so are the gradients: fused
       optimizers index flat memory.
    3. `pull_back(cores, G)` is the gradient of `sum(G * fold(cores))` with respect to the cores.
    4. From `W = 0` the gradient reaches at least one core.
    5. A batch is folded, unfolded and pulled back as its members are, one by one.
    6. It is a value: what `to_dict` says makes an equal object with an equal hash, and no setting can be changed.

    Attributes:
        order: number of sites, at least 2. Not used, and may be None, if `sites` or `expansion` is given.
        sites: explicit `(i_k, j_k)` of every site for one shape, or a mapping from shape to sites; shapes that a mapping
            does not list get the paper's split into `order` sites: near-square factors at the ends, 1x1 sites between.
        expansion: instead of `order` or `sites`, the wanted number of parameters over the matrix's own. The exact
            structure nearest to it is taken; `structure(shape).expansion` is what it reaches.
        backend: the name of the library that contracts and decomposes, see `tnadapt.backends`.
    """

    order: int | None = 2
    # a dict of sites has no hash; equal descriptions still have equal hashes without it
    sites: SitesArgument | None = field(default=None, hash=False)
    expansion: float | None = None
    backend: str = "torch"

    #: Orders that a plan from `expansion` may take.
    _EXPANSION_ORDERS: ClassVar[range] = range(2, 33)
    #: Gauges that the factorization knows, its default first.
    _GAUGES: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *unnamed: object, **settings: object) -> Factorization:
        if unnamed:
            raise TypeError(_by_name(cls, unnamed))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        get_backend(self.backend)
        if self.order is None:
            if self.sites is None and self.expansion is None:
                raise ValueError(
                    f"{type(self).__name__}() has no order: state one, such as {type(self).__name__}(order=9) (the paper uses "
                    "8-16; order 2 is the SVD), or give sites or expansion"
                )
        elif isinstance(self.order, bool) or not isinstance(self.order, int) or self.order < 2:
            raise ValueError(
                f"order={self.order!r}: {type(self).__name__} needs an integer order of at least 2 "
                "(an MPO of order 2 is the SVD; the paper uses 8-16)"
            )
        elif self.order > MAX_ORDER:
            raise ValueError(
                f"order={self.order}: at most {MAX_ORDER}. A matrix has no more sites than its dimensions have prime factors; all beyond "
                "are 1x1"
            )
        if self.sites is not None:
            object.__setattr__(self, "sites", checked_sites(self.sites))
        if self.expansion is not None:
            self._check_expansion(self.expansion)

    def _check_expansion(self, expansion: object) -> None:
        number = isinstance(expansion, (int, float)) and not isinstance(expansion, bool)
        if not number or not 1 <= expansion < math.inf:  # type: ignore[operator]
            raise ValueError(
                f"expansion={expansion!r}: an exact factorization has at least the matrix's own parameters; give a finite "
                "number of at least 1, such as 3.0"
            )
        if self.sites is not None or self.order != type(self).order:
            raise ValueError(
                f"expansion={expansion!r} chooses the sites itself; drop "
                f"{'sites' if self.sites is not None else f'order={self.order}'}, or drop expansion"
            )

    def _check_gauge(self, gauge: str) -> None:
        if gauge not in self._GAUGES:
            raise ValueError(
                f"gauge={gauge!r} is unknown to {type(self).__name__}; choose one of {', '.join(self._GAUGES)}"
            )

    def __repr__(self) -> str:
        """The settings that are not the default ones, as they would be written."""
        settings = [f for f in _settings(type(self)) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in settings)})"

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain JSON data, beside the name of the type: `{"type": "MPO", "order": 9, ...}`.

        Shapes that are keys are written as `"768x8"`. `from_dict` makes an equal object from it.

        Raises:
            TypeError: a setting is no JSON data; its class then writes its own `to_dict` and `_from_settings`.
            ValueError: the class is not registered, and its name is that of another one.
        """
        name = _FACTORIZATIONS.name_of(type(self))
        return {"type": name, **{f.name: plain(self, f.name, getattr(self, f.name)) for f in _settings(type(self))}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Factorization:
        """The factorization that `to_dict` described, of a type of this package or a registered one. Settings that are not
        there have their defaults.

        Raises:
            TypeError: `data` is not a mapping.
            ValueError: an unknown type or setting, or settings that mean nothing.
        """
        cls, settings = _FACTORIZATIONS.read(data)
        return cls._from_settings(settings)

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any]) -> Factorization:
        """The object with the settings that `to_dict` gave."""
        _FACTORIZATIONS.check_settings(cls.__name__, settings, [f.name for f in _settings(cls)])
        return cls(**{name: _unplain(cls, name, value) for name, value in settings.items()})

    @staticmethod
    def _check_seed(seed: object, gauge: str) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed={seed!r}: give an integer of at least 0")
        if seed and gauge != "random":
            raise ValueError(
                f"seed={seed} is of the rotations of gauge='random', and the gauge is {gauge!r}; drop seed"
            )

    @property
    def needs_gradient(self) -> bool:
        """Whether `unfold` has to be given the gradient of the matrix."""
        return False

    @property
    def operations(self) -> Backend:
        """The backend that contracts and decomposes."""
        return get_backend(self.backend)

    @property
    def label(self) -> str:
        """Short name for tables, such as `MPO(order=16)`."""
        if self.expansion is not None:
            parts = [f"expansion={self.expansion:g}"]
        else:
            parts = ["sites=…" if self.sites is not None else f"order={self.order}"]
        return f"{type(self).__name__}({', '.join([*parts, *self._label_parts()])})"

    # -- what a decomposition defines ---------------------------------------------------------------------------------

    @abstractmethod
    def structure(self, shape: Shape) -> Structure:
        """The plan for a matrix of `shape = (rows, cols)`; integers only.

        Raises:
            ValueError: the description does not fit the shape.
        """

    def _full_parameters(self, sites: Sites) -> int:
        """Numbers in the cores of these sites at full rank; for a subclass that can be planned from `expansion`."""
        raise ValueError(
            f"{type(self).__name__} cannot be planned from expansion={self.expansion!r}; give order or sites"
        )

    @abstractmethod
    def _unfold(self, matrices: Float[Tensor, "n rows cols"], structure: Structure) -> Sequence[Tensor]:
        """Cores of finite matrices in the sweep's dtype, each [n, *core_k]."""

    def _unfold_along(
        self, matrices: Float[Tensor, "n rows cols"], gradients: Float[Tensor, "n rows cols"], structure: Structure
    ) -> Sequence[Tensor]:
        """`_unfold` in the frames of gradients, whose entries are at most 1; for a subclass with `needs_gradient`."""
        raise NotImplementedError(f"{type(self).__name__} has no gauge that is aligned with a gradient")

    @abstractmethod
    def _contract(self, fused: Sequence[Tensor]) -> Float[Tensor, "n numel"]:
        """Contract fused cores (see `fused_shapes`), one mode per site in their order; differentiable."""

    @abstractmethod
    def kernel(self, fused: Sequence[Tensor]) -> Kernel:
        """For training loops: what contracts fused cores [n, *fused_k], which keep their memory, and pulls back through them
        again and again."""

    @abstractmethod
    def _sites_of(self, shapes: Sequence[tuple[int, ...]]) -> Sites:
        """The sites of cores of these shapes (without batch)."""

    def fused_shapes(self, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        """Shapes of the cores with rows and columns of a site as one mode. Matrices whose cores agree in these, such as
        the `A` and `B` of transposed shapes, are contracted as one batch. By default the cores' own."""
        return tuple(shapes)

    @abstractmethod
    def _check_cores(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Raise ValueError where core shapes (without batch) cannot belong together."""

    def _core_dims(self, count: int) -> Sequence[int]:
        """Number of dimensions of each of `count` cores, without batch."""
        return [4] * count

    def _label_parts(self) -> list[str]:
        """What the label says beside the order: by default the subclass's own settings that are not the default ones. A run
        that is resumed is compared by the label."""
        shared = {f.name for f in _settings(Factorization)}  # type: ignore[type-abstract]
        return [
            f"{f.name}={getattr(self, f.name)}"
            for f in _settings(type(self))
            if f.name not in shared and getattr(self, f.name) != f.default
        ]

    # -- integers -----------------------------------------------------------------------------------------------------

    def _resolve_sites(self, shape: Shape) -> Sites:
        """The sites that this description has for `shape`."""
        if self.expansion is None or min(shape) < 1:
            return resolve_sites(shape, self.order, self.sites)
        return _expanded_sites(self, shape, self.expansion)

    def core_shapes(self, shape: Shape) -> tuple[tuple[int, ...], ...]:
        """Shape of each core of a matrix of `shape`."""
        return self.structure(_checked_shape(shape)).core_shapes

    def num_parameters(self, shape: Shape) -> int:
        """Numbers in the cores of a matrix of `shape`."""
        return self.structure(_checked_shape(shape)).num_parameters

    def added_parameters(self, shape: Shape) -> int:
        """Parameters above the matrix's own (LoRA-Over, Eq. 6)."""
        return self.structure(_checked_shape(shape)).added_parameters

    # -- tensors ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @full_precision
    def unfold(
        self, matrix: Float[Tensor, "*batch rows cols"], gradient: Float[Tensor, "*batch rows cols"] | None = None
    ) -> tuple[Tensor, ...]:
        """Decompose `matrix` (or a batch of them) into cores.

        `gradient` is that of the loss with respect to the matrix, for gauges that are aligned with it (`needs_gradient`).
        It decides the frames of the cores, not what they fold to.

        The sweep runs in float64 on the CPU: LoRA matrices are small, libraries for GPUs decompose small matrices one after the
        other, and not every device has float64. The cores are float32, or the matrix's dtype where that is wider, on its
        device. They share memory neither with the matrix nor with each other.

        Raises:
            TypeError: the matrix is not real floating point.
            ValueError: fewer than two dimensions, an empty dimension, NaN or infinity, or entries so large that the
                cores overflow their dtype; a gradient that is missing, not needed, or not that of the matrix.
        """
        if not matrix.is_floating_point():
            raise TypeError(
                f"cannot unfold a matrix of dtype {matrix.dtype}; only real floating-point matrices have cores: "
                "convert it first, for example with .float()"
            )
        if matrix.dim() < 2:
            raise ValueError(f"unfold needs (*batch, rows, cols), got the shape {tuple(matrix.shape)}")
        if matrix.numel() == 0:
            raise ValueError(f"cannot unfold the empty shape {tuple(matrix.shape)}; every dimension must be at least 1")
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(
                f"the {matrix.shape[-2]}x{matrix.shape[-1]} matrix holds NaN or infinity, which no cores can represent; "
                "restore it from the last good checkpoint, or lower the learning rate that broke it"
            )
        self._check_gradient(matrix, gradient)
        batch = matrix.shape[:-2]
        structure = self.structure((matrix.shape[-2], matrix.shape[-1]))
        # copied even where nothing is converted: a core may be a view of what it was made from
        flat = matrix.reshape(-1, *matrix.shape[-2:]).to("cpu", torch.float64, copy=True)
        dtype = core_dtype(matrix.dtype)
        if gradient is None:
            swept = self._unfold(flat, structure)
        else:
            slope = gradient.reshape(-1, *matrix.shape[-2:]).to("cpu", torch.float64)
            swept = self._unfold_along(flat, slope / power_of_two_scale(slope), structure)
        if [core.numel() for core in swept] != [len(flat) * math.prod(shape) for shape in structure.core_shapes]:
            raise ValueError(
                f"{type(self).__name__}._unfold gave cores of shapes {[tuple(core.shape[1:]) for core in swept]}, where "
                f"structure() has {list(structure.core_shapes)}"
            )
        cores = tuple(
            _own_memory(core.reshape(*batch, *shape).to(matrix.device, dtype))
            for core, shape in zip(swept, structure.core_shapes, strict=True)
        )
        if not bool(torch.stack([torch.isfinite(core).all() for core in cores]).all()):
            raise ValueError(
                f"entries up to {float(matrix.abs().max()):.3g} of the {matrix.shape[-2]}x{matrix.shape[-1]} matrix overflow "
                f"its {dtype} cores in {self.label}; take gauge='identity', whose largest entry is the matrix's, or scale "
                "the matrix down"
            )
        return cores

    def _check_gradient(self, matrix: Tensor, gradient: Tensor | None) -> None:
        if gradient is None:
            if self.needs_gradient:
                raise ValueError(
                    f"{self.label} is aligned with a gradient: pass that of the {matrix.shape[-2]}x{matrix.shape[-1]} matrix, "
                    "unfold(matrix, gradient=...)"
                )
            return
        if not self.needs_gradient:
            raise ValueError(f"{self.label} does not look at a gradient; leave it out, or take gauge='gradient'")
        if gradient.shape != matrix.shape:
            raise ValueError(
                f"the gradient has shape {tuple(gradient.shape)}, the matrix {tuple(matrix.shape)}; pass the gradient of the "
                "matrix"
            )
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError(
                f"the gradient of the {matrix.shape[-2]}x{matrix.shape[-1]} matrix holds NaN or infinity; skip the step, or "
                "lower the learning rate that broke it"
            )

    @full_precision
    def fold(self, cores: Sequence[Tensor]) -> Float[Tensor, "*batch rows cols"]:
        """Contract `cores` to the matrix; differentiable, any leading batch dimensions, never in autocast.

        Raises:
            ValueError: the cores do not belong together.
        """
        flat, batch = self._flatten(cores)
        shapes = [tuple(core.shape[1:]) for core in flat]
        sites, contracted = self._sites_of(shapes), self._contract(self._fuse(flat, shapes))
        if contracted.shape != (len(flat[0]), math.prod(i * j for i, j in sites)):
            raise ValueError(
                f"{type(self).__name__}._contract gave the shape {tuple(contracted.shape)} for {len(flat[0])} matrices with "
                f"the sites {list(sites)}; it gives one row with the entries of each matrix"
            )
        matrix = from_sites(contracted, sites)
        return matrix.reshape(*batch, *matrix.shape[-2:])

    @torch.no_grad()
    def pull_back(self, cores: Sequence[Tensor], grad: Float[Tensor, "*batch rows cols"]) -> tuple[Tensor, ...]:
        """Gradient of `sum(grad * fold(cores))` with respect to each core: fold's vector-Jacobian product.

        `grad` is taken in the dtype of the cores, so that the low-precision gradient of a low-precision matrix serves.

        Raises:
            ValueError: the cores do not belong together, or `grad` has not the shape of the matrix.
        """
        flat, batch = self._flatten(cores)
        shapes = [tuple(core.shape[1:]) for core in flat]
        sites = self._sites_of(shapes)
        shape = math.prod(i for i, _ in sites), math.prod(j for _, j in sites)
        if grad.shape != (*batch, *shape):
            raise ValueError(
                f"the gradient has shape {tuple(grad.shape)}, but the cores fold to {(*batch, *shape)}; pass the gradient of "
                "the folded matrix"
            )
        n = flat[0].shape[0]
        split = to_sites(grad.reshape(n, *shape).to(flat[0].dtype), sites).reshape(n, -1)
        fused = self._fuse([core.detach().contiguous() for core in flat], shapes)
        grads = torch.split(self.kernel(fused).pull_back(split), [core.numel() for core in flat])
        return tuple(_own_memory(g.view(core.shape)) for g, core in zip(grads, cores, strict=True))

    def _fuse(self, cores: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        return [core.reshape(-1, *shape) for core, shape in zip(cores, self.fused_shapes(shapes), strict=True)]

    def _flatten(self, cores: Sequence[Tensor]) -> tuple[list[Tensor], torch.Size]:
        """Cores with their batch dimensions flattened into one, and those dimensions."""
        if len(cores) == 0:
            raise ValueError("fold needs the cores of one matrix, got none")
        dims = self._core_dims(len(cores))
        batch = cores[0].shape[: max(0, cores[0].dim() - dims[0])]
        shapes = []
        for k, (core, dim) in enumerate(zip(cores, dims, strict=True)):
            if core.dim() - dim != len(batch) or core.shape[: len(batch)] != batch:
                raise ValueError(
                    f"core {k} has shape {tuple(core.shape)}; {self.label} expects {dim} dimensions after the batch "
                    f"dimensions {tuple(batch)} of core 0"
                )
            if core.dtype != cores[0].dtype or core.device != cores[0].device:
                raise ValueError(
                    f"core {k} is {core.dtype} on {core.device}, core 0 is {cores[0].dtype} on {cores[0].device}; cores "
                    "of one matrix have one dtype and one device"
                )
            shapes.append(tuple(core.shape[len(batch) :]))
        self._check_cores(shapes)
        n = math.prod(batch)
        return [core.reshape(n, *shape) for core, shape in zip(cores, shapes, strict=True)], batch


def register_factorization(cls: F, name: str | None = None) -> F:
    """Make a factorization known to `Factorization.from_dict`, by the name of its class or another. Usable as a decorator.

    Raises:
        TypeError: `cls` is not a subclass of `Factorization`.
        ValueError: the name belongs to another class.
    """
    _FACTORIZATIONS.add(cls, Factorization, name)  # type: ignore[type-abstract]
    return cls


#: What `from_dict` knows. `tnadapt.factorizations` registers those of the package.
_FACTORIZATIONS: Registry[Factorization] = Registry("factorization", "register_factorization")


def _settings(cls: type[Factorization]) -> list[dataclasses.Field[Any]]:
    """What can be given when an object of the class is made."""
    return [f for f in dataclasses.fields(cls) if f.init]


def _by_name(cls: type[Factorization], unnamed: Sequence[object]) -> str:
    """What to write instead of settings without a name."""
    names = [f.name for f in _settings(cls)]
    name, first = cls.__name__, unnamed[0]
    given = ", ".join(map(repr, unnamed))
    likely = "order" if is_count(first) else "sites" if isinstance(first, (Sequence, Mapping)) else ""
    if len(unnamed) == 1 and likely in names and not isinstance(first, str):
        return f"{name}({given}): settings go by name; write {name}({likely}={first!r})"
    return f"{name}({given}): settings go by name; those of {name} are {', '.join(names)}"


def _unplain(cls: type[Factorization], name: str, value: Any) -> Any:
    """A setting from JSON data: a mapping has shapes as keys."""
    if not isinstance(value, Mapping):
        return value
    try:
        split = {tuple(key.split("x")): entry for key, entry in value.items()}
        return {(int(rows), int(cols)): entry for (rows, cols), entry in split.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{cls.__name__}: {name}={value!r} must have shapes such as '768x8' as keys") from error


@lru_cache(maxsize=1024)
def _expanded_sites(factorization: Factorization, shape: Shape, expansion: float) -> Sites:
    """`nearest_sites` of a factorization, which is a search and asked for again and again."""
    return nearest_sites(shape, expansion, factorization._EXPANSION_ORDERS, factorization._full_parameters)


def _own_memory(tensor: Tensor) -> Tensor:
    """`tensor`, contiguous and in memory that holds nothing else."""
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _checked_shape(shape: Shape) -> Shape:
    rows, cols = shape
    return int(rows), int(cols)


def explicit_for(shape: Shape, value: Sequence[int] | Mapping[Shape, Sequence[int]] | None) -> tuple[int, ...] | None:
    """The entry of a per-shape argument that holds for `shape`; None where there is none."""
    chosen = value.get(shape) if isinstance(value, Mapping) else value
    return None if chosen is None else tuple(chosen)


def check_cap(name: str, value: object) -> None:
    """Raise ValueError where the argument `name` is neither None nor an integer of at least 1."""
    if value is not None and not is_count(value):
        raise ValueError(f"{name}={value!r}: give an integer of at least 1, or None")


def power_of_two_scale(matrices: Float[Tensor, "n rows cols"]) -> Float[Tensor, "n 1 1"]:
    """The power of two just above each matrix's largest entry (1 for a zero matrix): dividing by it is exact."""
    largest = matrices.abs().amax(dim=(1, 2), keepdim=True)
    exponent = torch.frexp(largest).exponent.to(matrices.dtype)
    # twice the smallest normal exponent away from overflow: a subnormal scale could not be divided by
    return torch.exp2(exponent.clamp(-1000, 1000))


def spread_exponents(logs: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    """Integer exponents of two that bring norms of log2 `logs` nearest to equal, their sum 0 over the cores.

    Powers of two, because any other factor would round once in every core of a chain. A zero norm (log2 = -inf) leaves
    all cores of that matrix alone: sharing it out would leave no core a gradient.
    """
    device = logs.device
    logs = logs.cpu()  # a few numbers; the running sum has no deterministic kernel on CUDA
    finite = logs.isfinite().all(dim=0)
    logs = torch.where(finite, logs, torch.zeros_like(logs))
    # rounding the running sums, not the shifts, keeps the total at exactly zero
    running = (logs.mean(dim=0) - logs).cumsum(dim=0).round()
    running[-1] = 0
    return torch.diff(running, dim=0, prepend=torch.zeros_like(running[:1])).to(device)
