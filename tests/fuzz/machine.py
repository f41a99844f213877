"""Makes the moves of a plan with `LoraOver`, and checks after each what must hold in every run.

- The optimizer's groups and state are the user's own: the same lists, the same parameters, no cores.
- Gradients are after a step what they were before it.
- What has no gradient does not move by a bit, whether it is expanded or not.
- An expanded matrix is what its cores contract to, to rounding; so is one that a step is just expanding, before it is stepped.
- A step that fails changes nothing, unless the optimizer itself failed.
- An edit from outside is noticed, and said at the next step.
- A matrix moves no further than `max_update` allows, and `update_norms` says how far it did.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from engine.models import everything, llama, loss_of, same, tokens, when_lent
from oracle import contract
from torch import Tensor, nn

import tnadapt
from tnadapt import LoraOver, OverParamAdapter

from .plans import Again, Detach, Edit, Fail, Fold, Move, Plan, Reload, Setting, Step

__all__ = ["Run", "make_optimizer", "matrix_parameters"]

WIDTH = 6


class OptimizerFailed(Exception):
    """Raised by an optimizer that was told to."""


class Stack(nn.Module):
    """Residual layers `x + down(tanh(up(x)))` of two adapters each; a forward pass uses those it is told to."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(len(setting.hidden))

        def adapter(d_in: int, d_out: int) -> OverParamAdapter:
            pair = OverParamAdapter.from_linear(nn.Linear(d_in, d_out), rank=setting.rank, alpha=2 * setting.rank)
            if not setting.zero_start:
                nn.init.normal_(pair.lora_B.weight, std=0.3)
            return pair

        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": adapter(WIDTH, hidden), "down": adapter(hidden, WIDTH)}) for hidden in setting.hidden
        )
        self.shift = nn.Parameter(torch.zeros(WIDTH))  # trained, and no matrix
        self.to(setting.dtype)

    def forward(self, x: Tensor, used: tuple[int, ...] | None) -> Tensor:
        chosen = range(len(self.layers)) if used is None else sorted({k % len(self.layers) for k in used})
        for k in chosen:
            x = x + self.layers[k]["down"](torch.tanh(self.layers[k]["up"](x)))
        return x + self.shift if used != () else x


def make_model(setting: Setting) -> nn.Module:
    if setting.model == "stack":
        return Stack(setting)
    return llama(
        setting.dtype, layers=2, zero_start=setting.zero_start, r=setting.rank, target_modules=["q_proj", "down_proj"]
    )


def backward(model: nn.Module, number: int, used: tuple[int, ...] | None) -> None:
    """Adds the gradients of a batch."""
    if not isinstance(model, Stack):
        if used == ():
            return
        ids = tokens(number)
        loss_of(model(input_ids=ids).logits.double(), ids).backward()
        return
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(9, WIDTH, generator=generator, dtype=torch.float64)
    y = model(x.to(model.shift.dtype), used)
    if y.requires_grad:
        (y.double() - x.roll(1, 1).sin()).square().mean().backward()


def matrix_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA matrices by their raw names."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def make_optimizer(setting: Setting, model: nn.Module) -> Any:
    base: Any = getattr(torch.optim, setting.optimizer.name)
    options = dict(setting.optimizer.options)
    if setting.subclass:

        class Failing(base):  # type: ignore[misc]
            armed = ""

            def step(self, closure: Any = None) -> Any:
                if self.armed == "before":
                    raise OptimizerFailed
                loss = super().step(closure)
                if self.armed == "after":
                    raise OptimizerFailed
                return loss

        base = Failing
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if setting.optimizer.name == "Muon":
        trained = {name: p for name, p in trained.items() if p.dim() == 2}
    if setting.groups == 1:
        return base(list(trained.values()), **options)
    A, rest = ([p for name, p in trained.items() if ("lora_A" in name) == is_a] for is_a in (True, False))
    return base([{"params": A}, {"params": rest, "lr": 2 * options["lr"]}], **options)


def make_rates(setting: Setting, optimizer: Any) -> Any:
    name = setting.rates[0]
    if name == "LambdaLR":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    if name == "OneCycleLR":
        highest = [group["lr"] for group in optimizer.param_groups]
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=60, cycle_momentum=False)
    return None


def random_sites(shape: tuple[int, int], seed: int, count: int) -> list[tuple[int, int]]:
    """Prime factors of both dimensions, dealt out to `count` sites."""
    chance = random.Random(f"{seed} {shape}")
    sites = [[1, 1] for _ in range(count)]
    for side, n in enumerate(shape):
        divisor = 2
        while n > 1:
            if n % divisor:
                divisor += 1
                continue
            sites[chance.randrange(count)][side] *= divisor
            n //= divisor
    return [(i, j) for i, j in sites]


def make_factorization(setting: Setting, model: nn.Module) -> Any:
    if setting.sites is None:
        return setting.factorization
    shapes = {(p.shape[0], p.shape[1]) for p in matrix_parameters(model).values()}
    sites = {shape: random_sites(shape, setting.sites, setting.factorization.order) for shape in shapes}
    return dataclasses.replace(setting.factorization, sites=sites)


def make_scheduler(setting: Setting, model: nn.Module, factorization: Any) -> Any:
    """Scores and budgets, which depend on the model, are made up here."""
    options = dict(setting.scheduler.options)
    matrices, _ = tnadapt.matrices.find_lora_matrices(model)
    if setting.scheduler.name == "LossAblation":
        options["scores"] = {name: random.Random(name).random() for name in matrices}
    if setting.scheduler.name == "Budget":
        costs = [factorization.added_parameters(m.shape) for m in matrices.values()]
        costs = [cost for cost in costs if cost > 0]
        if not costs:
            return tnadapt.Static()
        options["added_parameters"] = max(min(costs), int(options.pop("fraction") * sum(costs)))
        if options.get("per_group"):
            # enough for one matrix in one group
            groups = tnadapt.schedulers.by_group(matrices).values()
            shares = [[c for m in members if (c := factorization.added_parameters(m.shape)) > 0] for members in groups]
            least = min(-(-min(own) * sum(costs) // sum(own)) for own in shares if own)
            options["added_parameters"] = max(least, options["added_parameters"])
    schedulers: Any = tnadapt.schedulers
    return getattr(schedulers, setting.scheduler.name)(**options)


def cores_of(over: LoraOver) -> dict[str, tuple[list[Tensor], Tensor | None]]:
    """Cores of every expanded matrix, and what they miss of it. The one place that knows how a state is laid out."""
    members = over.state_dict()["cores"]
    return {name: (list(entry["cores"]), entry["residual"]) for name, entry in members.items()}


def folded(over: LoraOver, cores: list[Tensor], residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """What cores contract to, in float64, and the error that rounding in the cores' dtype may make of it."""
    wide = [core.detach().double() for core in cores]
    value = contract(over.factorization, wide)
    # no sum has more terms than all cores together have entries along their longest axis
    terms = sum(max(core.shape) for core in cores)
    size = contract(over.factorization, [core.abs() for core in wide])
    if residual is not None:
        value, size = value + residual.double(), size + residual.double().abs()
    return value, size * terms * torch.finfo(cores[0].dtype).eps


class Run:
    """A model in training.

    Args:
        plan: what happens.
        reload: whether `Reload` moves are made; otherwise they are left out.
        reference: follows the run, see `reference.Reference`; called with `follow(run)` before each step of the optimizer and told
            of each move.
    """

    def __init__(self, plan: Plan, *, reload: bool = True, reference: Callable[[Run], Any] | None = None) -> None:
        self.setting, self.plan, self.reloads = plan.setting, plan, reload
        self.batch = 0
        #: whether there was no step since a state was loaded, in a run that leaves reloads out too
        self.loaded = False
        #: expanded matrices that were written from outside since the last step, by name, and what they were
        self.edited: dict[str, Tensor] = {}
        self.trace: list[dict[str, Any]] = []
        self._build()
        self.previous = self.values()
        self.reference = None if reference is None else reference(self)

    # -- what there is ------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        self.model = make_model(self.setting)
        self.optimizer = make_optimizer(self.setting, self.model)
        self.over: LoraOver | None = None
        self.rates = None
        if self.setting.rates[1] == "before":
            self.rates = make_rates(self.setting, self.optimizer)
        if self.setting.hook:
            self.optimizer.register_step_post_hook(self._post_hook)
        self.attach()
        if self.setting.rates[1] == "after":
            self.rates = make_rates(self.setting, self.optimizer)

    def attach(self) -> None:
        setting = self.setting
        factorization = self.factorization = make_factorization(setting, self.model)
        decay = setting.core_weight_decay if "weight_decay" in self.optimizer.defaults else None
        lr = setting.optimizer.options["lr"]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*top_n=")
            self.over = LoraOver(
                self.model,
                self.optimizer,
                factorization,
                make_scheduler(setting, self.model, factorization),
                core_lr=None if setting.core_ratio is None else setting.core_ratio * lr,
                core_weight_decay=decay,
                handover=setting.handover,
                max_update=setting.max_update,
            )
        self.raw = {id(p): name for name, p in self.model.named_parameters()}
        self._pre_handle = self.optimizer.register_step_pre_hook(self._pre_hook)
        when_lent(self.over, self._lent)

    def raw_name(self, name: str) -> str:
        """Raw name of the parameter of a matrix."""
        assert self.over is not None
        return self.raw[id(self.over.matrices[name].parameter)]

    def expanded(self) -> set[str]:
        """Raw names of the matrices that are expanded."""
        return set() if self.over is None else {self.raw_name(name) for name in self.over.expanded}

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def _groups(self) -> list[tuple[int, list[int]]]:
        return [(id(group["params"]), [id(p) for p in group["params"]]) for group in self.optimizer.param_groups]

    # -- hooks of the user --------------------------------------------------------------------------------------------

    def _pre_hook(self, *_: Any) -> None:
        if self.setting.hook == "look":
            visible = {name: p.grad for name, p in self.model.named_parameters()}
            assert same(visible, self.gradients), "a pre hook does not see the gradients"

    def _lent(self) -> None:
        """Runs when cores are about to be stepped: expansion has not moved anything."""
        assert self.over is not None
        for name, (cores, residual) in cores_of(self.over).items():
            parameter = self.over.matrices[name].parameter
            if name in self.edited and self.gradients[self.raw_name(name)] is None:
                continue  # it rests, and its edit may wait
            value, error = folded(self.over, cores, residual)
            allowed = error + parameter.detach().double().abs() * torch.finfo(parameter.dtype).eps
            # a decomposition has errors of its own, of the size of the largest entry
            allowed = allowed + 64 * torch.finfo(cores[0].dtype).eps * value.abs().max()
            assert bool(((parameter.detach().double() - value).abs() <= allowed).all()), (
                f"{name} was moved by expansion"
            )

    def _post_hook(self, *_: Any) -> None:
        if self.setting.hook == "zero_grad":
            self.optimizer.zero_grad()
        elif self.setting.hook == "save":
            if self.over is not None and self.over._step is not None and self.over._step._loan is not None:
                return  # torch runs hooks for the step of the base class too, in the middle of that of the subclass
            saved = self.optimizer.state_dict()
            assert len(saved["param_groups"]) == self.setting.groups, "saved with cores in the groups"
        elif self.setting.hook == "look":
            self.seen_after = self.values()

    # -- moves --------------------------------------------------------------------------------------------------------

    def go(self) -> Run:
        """All moves of the plan."""
        with patch("tnadapt.engine.cores.JOIN_BYTES", 2**19 if self.setting.joins else 0):
            self._go()
        return self

    def _go(self) -> None:
        for move in self.plan.moves:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.warned = caught
                self.make(move)
                self._consistent()
            ours = [str(w.message) for w in caught if w.category is UserWarning]
            expected = ("outside the optimizer", "lr_scheduler.step()", "had a gradient before the round")
            assert all(any(part in text for part in expected) for text in ours), f"warned: {ours}"
            self.trace.append(
                {
                    "values": self.values(),
                    "expanded": sorted(self.expanded()),
                    "rates": [float(group["lr"]) for group in self.optimizer.param_groups],
                    "history": [] if self.over is None else [(e.step, e.action, e.names) for e in self.over.history],
                }
            )
            if self.reference is not None:
                self.reference.compare(f"after {move}")

    def end(self) -> dict[str, Any]:
        """Everything, at the end of the run."""
        return everything(self.model, self.optimizer, self.over)

    def make(self, move: Move) -> None:
        if isinstance(move, Step):
            self._step(move)
            self.loaded = False
        elif isinstance(move, Edit):
            self._edit(move)
        elif isinstance(move, Fold):
            self._fold(move)
        elif isinstance(move, Reload):
            self.loaded = True
            self._take_back_what_loading_hides()
            if self.reloads:
                self._reload(move)
        elif isinstance(move, Fail):
            self._fail(move)
        elif isinstance(move, Detach):
            if self.over is not None and self.over.step > 0:
                self.over.detach()
                self._tell("detach")
                self.over = None
                self._pre_handle.remove()
                self.edited.clear()
        elif isinstance(move, Again) and self.over is None:
            self.attach()
            self._tell("attach")

    def _tell(self, what: str, *args: Any) -> None:
        if self.reference is not None:
            getattr(self.reference, what)(*args)

    def _gradients(self, step: Step) -> None:
        if step.zero == "model":
            self.model.zero_grad()
        elif step.zero != "keep":
            self.optimizer.zero_grad(set_to_none=step.zero == "none")
        self._tell("zero", step.zero)
        for _ in range(step.micro_batches):
            self.batch += 1
            backward(self.model, self.batch, step.used)
            self._tell("backward", self.batch, step.used)
        #: what the user's optimizer is told of each parameter at the coming step
        # after a step that died, stand-ins are in the groups until the loan is taken back: what was known of a matrix still holds
        known = getattr(self, "hyper", {})
        self.hyper = known | {
            self.raw[id(p)]: {k: v for k, v in group.items() if k not in ("params", "param_names")}
            for group in self.optimizer.param_groups
            for p in group["params"]
            if id(p) in self.raw
        }
        self.gradients = {n: None if p.grad is None else p.grad.clone() for n, p in self.model.named_parameters()}

    def _give_up(self) -> None:
        """The loop drops the gradients of a step that was refused."""
        self.optimizer.zero_grad()
        self.gradients = {name: p.grad for name, p in self.model.named_parameters()}
        self._tell("zero", "none")

    def _call(self, step: Step) -> None:
        """`optimizer.step()` as a loop calls it."""
        autocast = torch.autocast("cpu", torch.bfloat16) if self.setting.wrapped_step == "autocast" else nullcontext()
        if step.closure:

            def closure() -> Tensor:
                with torch.autocast("cpu", enabled=False):
                    self._gradients(step)
                return torch.zeros(())

            with autocast:
                self.optimizer.step(closure)
            return
        self._gradients(step)
        with autocast:
            self.optimizer.step()

    def _step(self, step: Step) -> None:
        before, groups = self.values(), self._groups()
        count = 0 if self.over is None else self.over.step
        known = len(self.over.history) if self.over is not None else 0
        noticed = dict(self.edited)
        try:
            self._call(step)
        except ValueError as error:
            if "has had a gradient since the scores began" not in str(error):
                raise
            self._check_nothing_to_rank(before, groups, count)
            return
        # the edit of a matrix that rests may wait until the matrix is trained again
        pending = [] if self.over is None else self.over.changed_outside()
        self.edited = {
            n: was for n, was in noticed.items() if n in pending and self.gradients[self.raw_name(n)] is None
        }
        noticed = {n: was for n, was in noticed.items() if n not in self.edited}
        self._check_warned(noticed)
        self._own(groups)
        if self.over is not None and all(grad is None for grad in self.gradients.values()):
            assert self.over.step == count, "a step without gradients was counted"
            assert len(self.over.history) == known, "a step without gradients expanded"
        self._check_gradients()
        self._check_moved(before)
        self._tell("follow", before, noticed)
        self._stepped()
        if self.rates is not None:
            self.rates.step()
        self.previous = before

    def _stepped(self) -> None:
        """The optimizer has stepped, and hooks after it have run."""
        self._tell("step")
        if self.setting.hook == "zero_grad":
            self._tell("zero", "none")

    def _check_nothing_to_rank(
        self, before: dict[str, Tensor], groups: list[tuple[int, list[int]]], count: int
    ) -> None:
        """A round where every matrix that waits has rested is refused, before anything changed; the loop goes on after it."""
        assert self.over is not None
        waiting = [name for name, matrix in self.over.matrices.items() if not matrix.expanded]
        assert waiting, "nothing waits, and the round was refused"
        assert all(self.gradients[self.raw_name(name)] is None for name in waiting), "a matrix with a gradient waits"
        assert self.over.step == count, "a step that was refused is counted"
        assert same(before, self.values()), "a step that was refused moved a matrix"
        self._own(groups)
        self._check_gradients(hooks_ran=False)
        self._give_up()

    def _check_gradients(self, hooks_ran: bool = True) -> None:
        for name, parameter in self.model.named_parameters():
            if self.setting.hook == "zero_grad" and hooks_ran and name in self.hyper:
                assert parameter.grad is None, f"{name} has a gradient after zero_grad() in a hook"
            else:
                assert same([parameter.grad], [self.gradients[name]]), f"the gradient of {name} is not what it was"

    def _check_moved(self, before: Mapping[str, Tensor]) -> None:
        after = self.values()
        for name in after:
            if self.gradients[name] is None:
                assert torch.equal(before[name], after[name]), f"{name} moved without a gradient"
        if self.setting.hook == "look":
            assert same(self.seen_after, after), "a post hook does not see the matrices of its step"
        if self.over is None:
            return
        norms = self.over.update_norms()
        for name in self.over.expanded:
            raw = self.raw_name(name)
            if self.gradients[raw] is None:
                continue
            moved = float((after[raw].double() - before[raw].double()).norm())
            rounding = float(after[raw].double().norm()) * torch.finfo(self.setting.dtype).eps * 16
            apart = abs(norms[name] - moved)
            assert apart <= 1e-3 * moved + rounding, f"update_norms of {name} is {norms[name]}, it moved {moved}"
            if self.setting.max_update is not None:
                rate = self.hyper[raw]["lr"] * (self.setting.core_ratio or 1.0)
                cap = self.setting.max_update * rate * math.sqrt(after[raw].numel())
                assert moved <= 1.01 * cap + rounding, f"{name} moved {moved}, more than {cap}"

    def _check_warned(self, noticed: Mapping[str, Tensor]) -> None:
        if self.over is None:
            return
        said = [str(w.message) for w in self.warned if "outside the optimizer" in str(w.message)]
        # one that the scheduler folded back in this step keeps its edit, and is not unfolded anew
        unfolded = sorted(noticed.keys() & set(self.over.expanded))
        assert not unfolded or said, f"an edit of {unfolded} was not noticed"
        assert noticed or not said, f"nobody edited, but: {said}"

    def _own(self, groups: list[tuple[int, list[int]]]) -> None:
        assert self._groups() == groups, "the groups are not the user's own"
        own = {id(p) for p in self.model.parameters()}
        assert {id(p) for p in self.optimizer.state} <= own, "cores are left in the optimizer's state"

    def _consistent(self) -> None:
        """Expanded matrices are what their cores contract to, unless somebody edited them."""
        if self.over is None:
            return
        for name, (cores, residual) in cores_of(self.over).items():
            if name in self.edited:
                continue
            parameter = self.over.matrices[name].parameter.detach().double()
            value, error = folded(self.over, cores, residual)
            allowed = error + value.abs() * torch.finfo(self.setting.dtype).eps
            # one that was never written by its cores is off by what its decomposition missed
            allowed = allowed + 64 * torch.finfo(cores[0].dtype).eps * value.abs().max()
            assert bool(((parameter - value).abs() <= allowed).all()), f"{name} is not what its cores contract to"

    def _edit(self, edit: Edit) -> None:
        parameters = matrix_parameters(self.model)
        raw = list(parameters)[edit.which % len(parameters)]
        parameter = parameters[raw]
        was = parameter.detach().clone()
        with torch.no_grad():
            if edit.kind == "in-place":
                parameter.mul_(1.25).add_(0.01)
            elif edit.kind == "data":
                parameter.data = parameter.data * 0.75 - 0.02
            elif edit.kind == "load":
                self.model.load_state_dict({**self.model.state_dict(), raw: was.flip(0) + 0.03})
            elif edit.kind == "back":
                parameter.copy_(self.previous[raw])
            else:
                flat = parameter.view(-1)
                flat[flat.abs().argmin()] = 0.0
        if self.loaded and self._within_rounding(raw, was):
            with torch.no_grad():
                parameter.copy_(was)
            return
        self._tell("edit", raw, parameter.detach().clone())
        if self.over is None or torch.equal(was, parameter.detach()):
            return
        for name in cores_of(self.over):
            if self.raw_name(name) == raw:
                if torch.equal(self.edited.setdefault(name, was), parameter.detach()):
                    del self.edited[name]  # and back again
                else:
                    assert name in self.over.changed_outside(), f"{edit} of {name} is not seen"

    def _take_back_what_loading_hides(self) -> None:
        """Edits that nobody has noticed yet and that nobody can after loading, see `_within_rounding`: in a run that leaves reloads
        out too, so that both go on alike."""
        for name, was in list(self.edited.items()):
            raw = self.raw_name(name)
            if self._within_rounding(raw, was):
                with torch.no_grad():
                    matrix_parameters(self.model)[raw].copy_(was)
                self._tell("edit", raw, was)
                del self.edited[name]

    def _within_rounding(self, raw: str, was: Tensor) -> bool:
        """Whether an edit is too small to be told from what cores fold to, the only thing to compare with after loading."""
        cores = {} if self.over is None else {self.raw_name(n): cores for n, (cores, _) in cores_of(self.over).items()}
        if raw not in cores:
            return False
        now, was = matrix_parameters(self.model)[raw].detach().double(), was.double()
        decomposed = 128 * len(cores[raw]) * torch.finfo(cores[raw][0].dtype).eps * was.abs().max()
        written = 2 * torch.finfo(self.setting.dtype).eps * was.abs()
        return bool(((now - was).abs() <= decomposed + written).all())

    def _fold(self, fold: Fold) -> None:
        if self.over is None or self.over.step == 0:
            return
        names = self.over.expanded[:: fold.stride]
        if names:
            before = self.values()
            report = self.over.fold(names)
            self._tell("follow", before, {})
            self.edited = {name: was for name, was in self.edited.items() if name not in names}
            assert report.folded == tuple(names)
            assert same(before, self.values()), "fold() wrote a matrix"

    def _reload(self, move: Reload) -> None:
        saved = io.BytesIO()
        grads = {name: p.grad for name, p in self.model.named_parameters()}
        torch.save(
            {
                "adapter": {n: p.detach() for n, p in self.model.named_parameters()},
                "optimizer": self.optimizer.state_dict(),
                "rates": {} if self.rates is None else self.plain(self.rates.state_dict()),
            },
            saved,
        )
        saved.seek(0)
        state = torch.load(saved, weights_only=True)
        attached = self.over is not None
        self._build()
        if not attached:
            assert self.over is not None
            self.over.detach()
            self.over = None
            self._pre_handle.remove()
        with torch.no_grad():
            for p in matrix_parameters(self.model).values():
                p.zero_()
        loads: dict[str, Callable[[], Any]] = {
            "adapter": lambda: self.model.load_state_dict(state["adapter"], strict=False),
            "optimizer": lambda: self.optimizer.load_state_dict(state["optimizer"]),
        }
        for what in sorted(loads, key=lambda what: what != move.first):
            loads[what]()
        if self.rates is not None:
            self.rates.load_state_dict(state["rates"])
        for name, p in self.model.named_parameters():
            p.grad = grads[name]

    @staticmethod
    def plain(state: dict[str, Any]) -> dict[str, Any]:
        """The state of an LR scheduler without what cannot be read back safely."""
        return {k: v for k, v in state.items() if isinstance(v, (int, float, list))}

    def _fail(self, move: Fail) -> None:
        groups = self._groups()
        step = Step()
        if move.kind == "closure":

            def broken() -> Tensor:
                raise ZeroDivisionError

            with self._nothing_changes(), pytest.raises(ZeroDivisionError):
                self.optimizer.step(broken)
        elif move.kind == "nan":
            if self.over is None:
                return
            self._gradients(step)
            name, victim = next((n, p) for n, p in matrix_parameters(self.model).items() if p.grad is not None)
            assert victim.grad is not None
            victim.grad[0, 0] = math.nan
            self.gradients[name] = victim.grad.clone()
            with self._nothing_changes(), pytest.raises((FloatingPointError, ValueError), match="NaN or infinity"):
                self.optimizer.step()
            self._give_up()
        else:
            self._optimizer_fails(move, groups)
        self._own(groups)

    def _optimizer_fails(self, move: Fail, groups: list[tuple[int, list[int]]]) -> None:
        before = self.values()
        restored = copy.deepcopy((self.optimizer.state_dict(), self.model.state_dict()))
        noticed, self.edited = self.edited, {}
        self._gradients(Step())
        self.optimizer.armed = move.kind
        with pytest.raises(OptimizerFailed):
            self.optimizer.step()
        self.optimizer.armed = ""
        self._check_warned(noticed)
        if move.then == "restore":
            self.model.load_state_dict(restored[1])
            self.optimizer.load_state_dict(restored[0])
            self._own(groups)
            assert same(before, self.values()), "restored, and not what it was"
            self._call(Step())
            return
        self._tell("follow", before, noticed)
        if move.kind == "after":
            self._stepped()
        if move.then == "recover":
            if self.over is not None:
                self.over.recover()
            self._own(groups)
            self._check_gradients(hooks_ran=move.kind == "after")  # those of the base class's step
        else:
            if move.then == "accumulate" and self.over is not None:
                # the optimizer may have stepped the cores; zero_grad() refolds them, and a loop without it has to ask for that
                self.over.recover()
            between = self.values()
            self._call(Step(zero="keep" if move.then == "accumulate" else "none"))
            self._tell("follow", between, {})
            self._stepped()
            self._own(groups)
            self._check_gradients()

    @contextmanager
    def _nothing_changes(self) -> Iterator[None]:
        before = everything(self.model, self.optimizer, self.over)
        yield
        after = everything(self.model, self.optimizer, self.over)
        for key, value in before.items():
            assert same(value, after[key]), f"a step that failed changed {key}"
