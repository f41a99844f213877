"""What a random run consists of: a setting, and the moves that are made in it. Drawn by Hypothesis, which shrinks what fails.

A plan is plain data whose `repr` can be pasted into a test: nothing here depends on how a run goes, so that moves can be left
out one by one. Where a move finds nothing to do (no matrix is expanded, say) it does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

from tnadapt import CP, MPO, SVD, Tucker

__all__ = [
    "HOSTILE",
    "Again",
    "Call",
    "Detach",
    "Edit",
    "Fail",
    "Fold",
    "Move",
    "Plan",
    "Reload",
    "Setting",
    "Step",
    "plans",
]


@dataclass(frozen=True)
class Call:
    """A class of tnadapt or torch by name, and what it is called with. `repr` is the call."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Call({self.name!r}, {self.options!r})"


@dataclass(frozen=True)
class Setting:
    """What is trained, and how.

    Attributes:
        model: `"stack"`, residual layers of two `OverParamAdapter`s, of which a step may use some; `"llama"`, PEFT on Llama.
        hidden: hidden sizes of the layers of a stack.
        rank: of every LoRA pair.
        dtype: of the matrices.
        zero_start: whether `B` starts at zero.
        factorization: of tnadapt.
        sites: seed of explicit sites for every shape; None for those that the factorization chooses.
        scheduler: of tnadapt; fractions stand for what depends on the model, see `machine.make_scheduler`.
        optimizer: of torch.
        groups: number of parameter groups, 1 or 2 (`A` and `B`, which has twice the rate).
        rates: LR scheduler, or `""`, and whether it is made before `LoraOver` is attached.
        core_ratio: `core_lr` over the rate of the optimizer; None for no `core_lr`.
        core_weight_decay, handover, max_update: of `LoraOver`.
        subclass: whether the optimizer is a subclass, which can be told to raise before or after it steps.
        wrapped_step: `"autocast"` for steps inside of it, otherwise `""`.
        hook: `"zero_grad"` for a post hook, registered before attaching, that clears gradients; `"look"` for hooks that look at
            gradients and matrices; `"save"` for a post hook that saves the optimizer.
        joins: whether small cohorts are laid out by member and contracted together, which all cohorts of these models are.
    """

    model: str = "stack"
    hidden: tuple[int, ...] = (8, 8)
    rank: int = 4
    dtype: torch.dtype = torch.float64
    zero_start: bool = False
    factorization: Any = field(default_factory=lambda: MPO(order=3))
    sites: int | None = None
    scheduler: Call = Call("Static")
    optimizer: Call = Call("AdamW", {"lr": 5e-3})
    groups: int = 1
    rates: tuple[str, str] = ("", "before")
    core_ratio: float | None = None
    core_weight_decay: float | None = None
    handover: str = "warm"
    max_update: float | None = None
    subclass: bool = False
    wrapped_step: str = ""
    hook: str = ""
    joins: bool = True


@dataclass(frozen=True)
class Step:
    """A training step.

    Attributes:
        used: layers of a stack that the loss depends on, modulo their number; None for all.
        micro_batches: gradients are accumulated over so many.
        zero: what happens to the gradients of the step before: `"none"`, `"zeros"`, `"model"` (`model.zero_grad()`) or
            `"keep"`, where they are accumulated onto.
        closure: whether the loss is evaluated in a closure.
    """

    used: tuple[int, ...] | None = None
    micro_batches: int = 1
    zero: str = "none"
    closure: bool = False


@dataclass(frozen=True)
class Edit:
    """Somebody writes a matrix: `"in-place"`, `"data"` (through `.data`), `"load"` (`load_state_dict`), `"back"` (what it was a
    step ago) or `"entry"` (its smallest entry becomes zero).

    Attributes:
        which: number of the matrix, modulo how many there are.
    """

    kind: str
    which: int


@dataclass(frozen=True)
class Fold:
    """Every `stride`-th expanded matrix is folded."""

    stride: int = 2


@dataclass(frozen=True)
class Reload:
    """All is saved and read into fresh objects, which go on.

    Attributes:
        first: what is loaded first, `"adapter"` or `"optimizer"`.
    """

    first: str = "adapter"


@dataclass(frozen=True)
class Fail:
    """A step that fails: `"closure"`, `"nan"`, or an optimizer that raises `"before"` or `"after"` it has stepped.

    Attributes:
        then: what the loop does after an optimizer that raised: `"recover"`; `"go on"`; `"restore"` (adapter and optimizer are
            loaded as they were before); `"accumulate"` (gradients are kept and added to).
    """

    kind: str
    then: str = "recover"


@dataclass(frozen=True)
class Detach:
    """The optimizer trains plain LoRA from here on."""


@dataclass(frozen=True)
class Again:
    """`LoraOver` is attached again, where it was detached."""


Move = Step | Edit | Fold | Reload | Fail | Detach | Again


@dataclass(frozen=True)
class Plan:
    """A setting and the moves in it."""

    setting: Setting
    moves: tuple[Move, ...]


# -- strategies -------------------------------------------------------------------------------------------------------

#: what a loop should rather not do, each by a name; a plan has at most one of these
HOSTILE = (
    "clears gradients in a post hook",
    "edits below the rounding of the dtype",
    "goes on after the optimizer failed",
    "saves in a post hook",
    "looks in hooks",
    "has steps without gradients",
    "steps inside autocast",
    "caps the updates of bfloat16",
)
_HOOKS = {"clears gradients in a post hook": "zero_grad", "saves in a post hook": "save", "looks in hooks": "look"}
_EPS = 1e-6  # with less, optimizers make steps of what is rounding in a gradient that is zero
_FACTORIZATIONS: list[Any] = [
    MPO(order=3),
    SVD(),
    MPO(order=2, gauge="right"),
    MPO(order=4, gauge="identity"),
    MPO(order=5, gauge="spread"),
    MPO(order=9),
    MPO(expansion=2.5),
    MPO(order=3, max_bond=2),
    MPO(order=4, max_bond=3, gauge="spread"),
    Tucker(),
    Tucker(order=4, gauge="identity"),
    Tucker(gauge="spread"),
    Tucker(order=3, max_rank=2),
    CP(),
    CP(order=4, gauge="spread"),
    CP(order=3, max_rank=3),
]
_SCHEDULERS = [
    Call("Static"),
    Call("Static", {"which": r"A$"}),
    Call("Static", {"refresh_every": 2}),
    Call("Static", {"which": r"A$", "refresh_every": 1, "fold_after": 4}),
    Call("LossAblation", {"top_n": 1}),
    Call("TaylorRuntime", {"top_n": 1, "split": 1, "every": 1}),
    Call("TaylorRuntime", {"top_n": 2, "split": 2, "every": 2}),
    Call("TaylorRuntime", {"top_n": 3, "split": 2, "every": 1, "reset": True}),
    Call("TaylorRuntime", {"top_n": 2, "split": 3, "every": 1, "reduction": "elementwise", "average": True}),
    Call("Budget", {"fraction": 0.5, "every": 1, "decay": 0.5, "margin": 1.0}),
    Call("Budget", {"fraction": 0.3, "every": 2, "decay": 0.0, "margin": 1.2, "per_group": True}),
]
#: flags of each optimizer; every subset of them is drawn. Values of `foreach` and `fused` are drawn besides.
_ELEMENTWISE: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.01, "maximize": True},
    "AdamW": {"amsgrad": True, "maximize": True, "weight_decay": 0.1},
    "Adam": {"amsgrad": True, "maximize": True, "weight_decay": 0.01},
    "RMSprop": {"centered": True, "momentum": 0.5, "maximize": True},
    "Adagrad": {"weight_decay": 0.01, "maximize": True},
    "Adamax": {"weight_decay": 0.01},
    "NAdam": {"weight_decay": 0.01, "decoupled_weight_decay": True},
    "RAdam": {"weight_decay": 0.01},
    "Adadelta": {"weight_decay": 0.01},
    "ASGD": {"weight_decay": 0.01},
}
_FUSED = {"SGD", "Adam", "AdamW", "Adagrad"}
_RATES = {"SGD": 2e-2, "Adadelta": 0.5, "ASGD": 1e-2, "RMSprop": 2e-3, "Muon": 2e-3}


@st.composite
def _optimizers(draw: st.DrawFn, exact: bool) -> Call:
    others = [] if exact else ["Rprop", "Adafactor", "Muon"]
    name = draw(st.sampled_from([*_ELEMENTWISE, *others]))
    options: dict[str, Any] = {"lr": _RATES.get(name, 5e-3)}
    for flag, value in _ELEMENTWISE.get(name, {}).items():
        if draw(st.booleans()):
            options[flag] = value
    if name in _ELEMENTWISE and name not in ("SGD", "ASGD"):
        options["eps"] = _EPS
    # torch's own two forms of ASGD differ by 1e-9: they round `eta` to float32 at different places
    ways = [
        "",
        *(["foreach"] if name in _ELEMENTWISE and not (exact and name == "ASGD") else []),
        *(["fused"] if name in _FUSED else []),
    ]
    way = draw(st.sampled_from(ways))
    if way == "fused" and name == "SGD":
        options.pop("momentum", None)  # torch's kernel cannot step parameters with and without a buffer together
    if way:
        options[way] = True
    return Call(name, options)


@st.composite
def _settings(draw: st.DrawFn, exact: bool, hostile: str) -> Setting:
    low = not exact and hostile in ("edits below the rounding of the dtype", "caps the updates of bfloat16")
    # torch itself rounds NAdam's `mu_product` when it loads a state, in all dtypes but float32
    optimizer = draw(_optimizers(exact).filter(lambda one: not (low and one.name == "NAdam")))
    linear = optimizer.name == "SGD"
    subclass = hostile == "goes on after the optimizer failed" or draw(st.booleans())
    dtype = torch.float64 if exact else draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    if optimizer.name == "NAdam" and not exact:
        dtype = torch.float32
    model = draw(st.sampled_from(["stack", "stack", "llama"]))
    caps = [None, None, 0.5]
    if hostile == "caps the updates of bfloat16":
        dtype, caps = torch.bfloat16, [0.5]
    elif hostile == "edits below the rounding of the dtype" and not exact:
        dtype, caps = torch.bfloat16, [None]
    elif exact or dtype == torch.bfloat16:
        caps = [None]
    decays = optimizer.name not in ("Rprop",)
    factorization = draw(st.sampled_from(_FACTORIZATIONS))
    plain_sites = model == "llama" or getattr(factorization, "expansion", None) is not None
    return Setting(
        model=model,
        hidden=draw(st.sampled_from([(8, 8), (8,), (8, 5, 8), (4, 8, 4, 8)])),
        rank=draw(st.sampled_from([4, 3, 2, 1])),
        dtype=dtype,
        zero_start=draw(st.booleans()),
        factorization=factorization,
        sites=None if plain_sites else draw(st.none() | st.integers(0, 99)),
        scheduler=draw(st.sampled_from(_SCHEDULERS)),
        optimizer=optimizer,
        groups=draw(st.sampled_from([1, 2])),
        rates=draw(st.tuples(st.sampled_from(["", "LambdaLR", "OneCycleLR"]), st.sampled_from(["before", "after"]))),
        core_ratio=draw(st.sampled_from([None, 0.5, 2.0])),
        core_weight_decay=draw(st.sampled_from([None, 0.0, 0.05])) if decays else None,
        # of a second moment the hand-over is an estimate, which only the engine can repeat
        handover=draw(st.sampled_from(["warm", "restart"])) if linear or not exact else "restart",
        max_update=draw(st.sampled_from(caps)),
        subclass=subclass,
        wrapped_step="autocast" if hostile == "steps inside autocast" else "",
        hook=_HOOKS.get(hostile, ""),
        joins=draw(st.booleans()),
    )


def _moves(setting: Setting, exact: bool, hostile: str) -> st.SearchStrategy[Move]:
    some = st.lists(
        st.integers(0, 3), min_size=0 if hostile == "has steps without gradients" else 1, max_size=3, unique=True
    ).map(tuple)
    step = st.builds(
        Step,
        used=st.none() | some,
        micro_batches=st.sampled_from([1, 2]),
        zero=st.sampled_from(["none", "zeros", "model", "keep"]),
        closure=st.booleans(),
    )
    kinds = ["in-place", "data", "load"]
    if hostile == "edits below the rounding of the dtype":
        kinds += ["back", "back", "entry", "entry"]
    elif setting.dtype == torch.float64:
        kinds.append("back")
    fails = [Fail("closure"), Fail("nan")]
    if setting.subclass:
        goes_on = hostile == "goes on after the optimizer failed"
        ways = [
            "recover",
            *(["go on", "accumulate"] if goes_on else []),
            *(["restore"] if goes_on and not exact else []),
        ]
        fails += [Fail(kind, then) for kind in ("before", "after") for then in ways]
    return st.one_of(
        step,
        step,
        step,
        st.builds(Edit, kind=st.sampled_from(kinds), which=st.integers(0, 7)),
        st.builds(Reload, first=st.sampled_from(["adapter", "optimizer"])),
        st.sampled_from(fails),
        st.sampled_from([Fold(1), Fold(2), Detach(), Again(), Again()]),
    )


@st.composite
def plans(draw: st.DrawFn, *, exact: bool = False, hostile: str = "") -> Plan:
    """Whole runs.

    Args:
        exact: only what autograd can follow to rounding: float64 and optimizers that work element by element, without a cap.
        hostile: one of `HOSTILE`; in these runs that happens too.
    """
    setting = draw(_settings(exact, hostile))
    moves = draw(st.lists(_moves(setting, exact, hostile), min_size=2, max_size=14))
    return Plan(setting, (Step(), *moves, Step()))
