"""Faults at every stage of a step: all is what it was before it, and the next good step is that of a run without the fault."""

from __future__ import annotations

import copy
import errno
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from engine.models import Experts, everything, expert_loss, same, trainable, when_lent
from torch import nn

from tnadapt import MPO, LoraOver, TaylorRuntime
from tnadapt.backends.kernels import ChainKernel
from tnadapt.backends.torch_backend import TorchBackend
from tnadapt.engine import ranks
from tnadapt.schedulers import Budget, Scheduler

STEPS = 7
START, EXPANDS, ORDINARY, RELEASES = 1, 3, 4, 5


class Plan(Scheduler):
    """Expands and releases at fixed steps, counts what it has seen, and raises where it is told to."""

    ROUNDS: ClassVar[dict[int, Any]] = {
        0: ((), ("experts.0.A",)),
        EXPANDS: ((), ("experts.1.A", "experts.1.B", "experts.0.B")),
        RELEASES: (("experts.0.A", "experts.1.B"), ("experts.2.A", "experts.2.B")),
    }

    def __init__(self) -> None:
        self.seen = 0
        self.failing = ""

    def _maybe_fail(self, method: str) -> None:
        if method == self.failing:
            raise ZeroDivisionError(f"in {method}")

    def observe(self, step: int, matrices: Any) -> None:
        self.seen += 1
        self._maybe_fail("observe")

    def release(self, step: int, matrices: Any) -> Any:
        self._maybe_fail("release")
        return self.ROUNDS.get(step, ((), ()))[0]

    def select(self, step: int, matrices: Any) -> Any:
        self._maybe_fail("select")
        return self.ROUNDS.get(step, ((), ()))[1]

    def due(self, step: int) -> bool:
        self._maybe_fail("due")
        return step in self.ROUNDS

    def state_dict(self) -> dict[str, Any]:
        self._maybe_fail("state_dict")
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self._maybe_fail("load_state_dict")
        self.seen = state["seen"]


class Run:
    """A model in training with everything that a fault must leave alone."""

    def __init__(self, scheduler: Scheduler | None = None, elementwise: bool = True, **settings: Any) -> None:
        self.model = Experts()
        self.scheduler = scheduler or Plan()
        if elementwise:
            self.optimizer: Any = torch.optim.AdamW(trainable(self.model), lr=1e-2, weight_decay=0.1)
        else:
            self.optimizer = torch.optim.Adafactor(trainable(self.model), lr=1e-2)
        self.over = LoraOver(self.model, self.optimizer, MPO(order=4), self.scheduler, **settings)
        self.losses: dict[int, float] = {}

    def gradients(self, step: int) -> None:
        self.optimizer.zero_grad()
        loss = expert_loss(self.model, step)
        loss.backward()
        self.losses[step] = float(loss.detach())

    def go(self, steps: range) -> Run:
        for step in steps:
            self.gradients(step)
            self.optimizer.step()
        return self

    def all_of_it(self) -> dict[str, Any]:
        cohorts = self.over._expanded.now.cohorts
        return {
            # what is not a copy of a public state comes first: asking for a state dict may mend things
            "cores": [cohort.buffer.clone() for cohort in cohorts],
            "lent": [piece.parameter.grad is not None for cohort in cohorts for piece in cohort.pieces],
            "norms": self.over.update_norms(),
            "rate": self.over.core_rate(),
            "scales": [matrix.grad_scale for matrix in self.over.matrices.values()],
            "state": {name: copy.deepcopy(self.optimizer.state.get(p)) for name, p in self.model.named_parameters()},
            "history": [(e.step, e.action, e.names) for e in self.over.history],
            "step": self.over.step,
            "trained": self.over.trained_parameters,
            **everything(self.model, self.optimizer, self.over),
        }


def require_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert same(value, after[key]), f"{key} changed"


def require_same_end(ended: dict[str, Any], run: Run) -> None:
    """`run` is where another one has ended."""
    require_same({**ended, "groups": None}, {**run.all_of_it(), "groups": None})


@pytest.fixture(scope="module")
def clean() -> Callable[..., dict[str, Any]]:
    """What a run without faults ends with."""
    known: dict[Any, dict[str, Any]] = {}

    def ended(elementwise: bool = True) -> dict[str, Any]:
        if elementwise not in known:
            known[elementwise] = Run(elementwise=elementwise).go(range(1, STEPS + 1)).all_of_it()
        return known[elementwise]

    return ended


@contextmanager
def failing_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int, error: Any) -> Iterator[list[int]]:
    """The call number `at` of `owner.name` raises; gives a list of the numbers of the calls so far (-1: never raise)."""
    original = getattr(owner, name)
    numbers = itertools.count(1)
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(next(numbers))
        if calls[-1] == at:
            raise error()
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, counted)
        yield calls


def survives(run: Run, step: int, fault: Callable[[], None]) -> None:
    """`fault` steps and fails; nothing has changed, and the same batch then goes through."""
    before = run.all_of_it()
    fault()
    require_same(before, run.all_of_it())
    run.optimizer.step()
    run.go(range(step + 1, STEPS + 1))


# -- NaN ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize("step", [START, EXPANDS, ORDINARY, RELEASES])
@pytest.mark.parametrize("name", ["experts.0.A", "experts.1.B"])
def test_nan_in_a_gradient(clean: Any, step: int, name: str, elementwise: bool) -> None:
    run = Run(elementwise=elementwise).go(range(1, step))
    run.gradients(step)
    matrix = run.over.matrices[name]
    good = matrix.parameter.grad.clone()
    matrix.parameter.grad[1, 2] = float("nan")
    before = run.all_of_it()
    with pytest.raises(FloatingPointError, match=rf"(?s){name}.*NaN or infinity.*skip this batch"):
        run.optimizer.step()
    require_same(before, run.all_of_it())
    matrix.parameter.grad.copy_(good)
    run.optimizer.step()
    run.go(range(step + 1, STEPS + 1))
    require_same_end(clean(elementwise), run)


# -- out of memory ------------------------------------------------------------------------------------------------------


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def spread(count: int) -> list[int]:
    return sorted({1, 2, (count + 1) // 2, count} & set(range(1, count + 1)))


OWNERS = {"pull_back": ChainKernel, "contract": ChainKernel, "chain_decompose": TorchBackend}


@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize("step", [START, EXPANDS, ORDINARY, RELEASES])
@pytest.mark.parametrize("operation", ["pull_back", "contract", "chain_decompose"])
def test_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, clean: Any, operation: str, step: int, elementwise: bool
) -> None:
    """Raised by the backend at the first, second, middle and last call of the step before the optimizer's own."""
    probe = Run(elementwise=elementwise).go(range(1, step))
    probe.gradients(step)
    count = 0

    with failing_call(monkeypatch, OWNERS[operation], operation, -1, out_of_memory) as calls:

        def look(*_: Any) -> None:
            nonlocal count
            count = len(calls)

        when_lent(probe.over, look)
        probe.optimizer.step()
    if operation == "pull_back" or (operation == "chain_decompose" and step != ORDINARY):
        assert count, "the fault would not happen"
    for k in spread(count):
        run = Run(elementwise=elementwise).go(range(1, step))
        run.gradients(step)

        def fault(run: Run = run, k: int = k) -> None:
            with (
                failing_call(monkeypatch, OWNERS[operation], operation, k, out_of_memory),
                pytest.raises(torch.OutOfMemoryError) as raised,
            ):
                run.optimizer.step()
            assert "what they were before the step" in raised.value.__notes__[0]
            assert "top_n" in raised.value.__notes__[0]

        survives(run, step, fault)
        require_same_end(clean(elementwise), run)


@pytest.mark.parametrize("then", ["step", "state_dict", "fold"])
@pytest.mark.parametrize("k", [1, 2])
def test_out_of_memory_in_the_refold(monkeypatch: pytest.MonkeyPatch, clean: Any, k: int, then: str) -> None:
    """The optimizer has stepped by then: the step counts, and the matrices are refolded by whoever comes next."""
    run = Run().go(range(1, ORDINARY))
    run.gradients(ORDINARY)
    gradients = [p.grad.clone() for p in trainable(run.model)]
    inside = False

    def about_to_step(*_: Any) -> None:
        nonlocal inside
        inside = True

    when_lent(run.over, about_to_step)
    original, calls = ChainKernel.contract, itertools.count(1)

    def full(self: Any) -> Any:
        if inside and next(calls) == k:
            raise out_of_memory()
        return original(self)

    with monkeypatch.context() as patched:
        patched.setattr(ChainKernel, "contract", full)
        with pytest.raises(torch.OutOfMemoryError) as raised:
            run.optimizer.step()
    assert "do not repeat the batch" in raised.value.__notes__[0]
    inside = False
    assert len(run.optimizer.param_groups) == 1
    assert same(gradients, [p.grad for p in trainable(run.model)])
    if then == "fold":
        run.over.fold()
        other = Run().go(range(1, ORDINARY + 1))
        other.over.fold()
        assert same(dict(run.model.named_parameters()), dict(other.model.named_parameters()))
        return
    if then == "state_dict":
        run.optimizer.state_dict()
        assert run.over.changed_outside() == ()
        run.go(range(ORDINARY + 1, STEPS + 1))
        require_same_end(clean(), run)
        return
    # the gradients of the next batch are those of the matrices as they were: the step is taken, and goes on from the cores
    run.go(range(ORDINARY + 1, STEPS + 1))
    assert run.over.step == STEPS
    assert run.over.changed_outside() == ()


# -- schedulers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [EXPANDS, ORDINARY, RELEASES])
@pytest.mark.parametrize("method", ["observe", "due", "release", "select", "state_dict"])
def test_a_scheduler_that_raises(clean: Any, method: str, step: int) -> None:
    if step == ORDINARY and method in ("release", "select"):
        step = EXPANDS  # it is not asked in between
    run = Run().go(range(1, step))
    run.gradients(step)

    def fault() -> None:
        run.scheduler.failing = method
        with pytest.raises(ZeroDivisionError, match=f"in {method}"):
            run.optimizer.step()
        run.scheduler.failing = ""

    survives(run, step, fault)
    require_same_end(clean(), run)


def test_a_scheduler_that_cannot_even_be_put_back(clean: Any) -> None:
    """Everything else is what it was; it alone is to blame for itself."""
    run = Run().go(range(1, RELEASES))
    run.gradients(RELEASES)
    before = run.all_of_it()
    matrix = run.over.matrices["experts.1.A"].parameter
    good = matrix.grad.clone()
    matrix.grad[0, 0] = float("nan")
    run.scheduler.failing = "load_state_dict"
    with pytest.raises(ZeroDivisionError, match="in load_state_dict") as raised:
        run.optimizer.step()
    assert isinstance(raised.value.__context__, FloatingPointError)
    run.scheduler.failing = ""
    run.scheduler.seen -= 1
    matrix.grad.copy_(good)
    require_same(before, run.all_of_it())
    run.optimizer.step()
    run.go(range(RELEASES + 1, STEPS + 1))
    require_same_end(clean(), run)


@pytest.mark.parametrize("through", ["optimizer", "over"])
def test_a_scheduler_that_refuses_its_state(through: str, clean: Any) -> None:
    state = copy.deepcopy(Run().go(range(1, RELEASES + 1)).optimizer.state_dict())
    run = Run().go(range(1, ORDINARY))
    run.gradients(ORDINARY)

    def fault() -> None:
        class Refuses(Plan):
            def load_state_dict(self, new: Any) -> None:
                if new["seen"] == RELEASES:
                    raise ZeroDivisionError("in load_state_dict")
                super().load_state_dict(new)

        run.scheduler.__class__ = Refuses
        state["tnadapt"]["scheduler"]["label"] = "Refuses"
        load = run.optimizer.load_state_dict if through == "optimizer" else run.over.load_state_dict
        with pytest.raises(ZeroDivisionError):
            load(state if through == "optimizer" else state["tnadapt"])
        run.scheduler.__class__ = Plan

    survives(run, ORDINARY, fault)
    require_same_end(clean(), run)


# -- ranks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("step", [EXPANDS, RELEASES])
def test_broadcast_that_fails(monkeypatch: pytest.MonkeyPatch, clean: Any, step: int, k: int) -> None:
    run = Run().go(range(1, step))
    run.gradients(step)

    def fault() -> None:
        with (
            failing_call(
                monkeypatch,
                ranks,
                "broadcast_from_first",
                k,
                lambda: dist.DistBackendError("connection closed by peer"),
            ),
            pytest.raises(RuntimeError, match="connection closed by peer") as raised,
        ):
            run.optimizer.step()
        assert "Restart all ranks from the last whole checkpoint" in raised.value.__notes__[0]

    survives(run, step, fault)
    require_same_end(clean(), run)


@pytest.mark.parametrize("name", ["agree_any", "gather_objects"])
@pytest.mark.parametrize("step", [EXPANDS, RELEASES])
def test_agreement_that_fails(monkeypatch: pytest.MonkeyPatch, clean: Any, step: int, name: str) -> None:
    run = Run().go(range(1, step))
    run.gradients(step)

    def fault() -> None:
        with (
            monkeypatch.context() as patched,
            failing_call(monkeypatch, ranks, name, 1, lambda: dist.DistBackendError("timed out")),
        ):
            patched.setattr(run.over._step, "_distributed", True)
            with pytest.raises(RuntimeError, match="timed out"):
                run.optimizer.step()

    survives(run, step, fault)
    require_same_end(clean(), run)


# -- checkpoints --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
@pytest.mark.parametrize("what", ["optimizer", "over"])
def test_full_disk(clean: Any, what: str) -> None:
    run = Run().go(range(1, EXPANDS + 1))
    run.gradients(ORDINARY)

    def fault() -> None:
        state = (run.optimizer if what == "optimizer" else run.over).state_dict()
        with pytest.raises((OSError, RuntimeError)), open("/dev/full", "wb") as stream:  # noqa: PT012
            torch.save(state, stream)
            stream.flush()

    survives(run, ORDINARY, fault)
    require_same_end(clean(), run)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999])
def test_a_file_that_was_cut(tmp_path: Path, share: float, clean: Any) -> None:
    torch.save(Run().go(range(1, RELEASES + 1)).optimizer.state_dict(), tmp_path / "optimizer.pt")
    whole = (tmp_path / "optimizer.pt").read_bytes()
    (tmp_path / "optimizer.pt").write_bytes(whole[: int(len(whole) * share)])
    run = Run().go(range(1, ORDINARY))
    run.gradients(ORDINARY)

    def fault() -> None:
        with pytest.raises((RuntimeError, EOFError, OSError)):
            run.optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))

    survives(run, ORDINARY, fault)
    require_same_end(clean(), run)


def test_full_disk_in_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run dies with the disk; that checkpoint is not taken for whole, and going on from the one before ends the same."""
    from integrations import tiny
    from transformers import Trainer

    from tnadapt.integrations.transformers import last_complete_checkpoint

    def trainer(folder: Path) -> tuple[Any, Any]:
        model = tiny.lora_model()
        args = tiny.arguments(folder, max_steps=6, save_strategy="steps", save_steps=2)
        optimizer = torch.optim.AdamW(tiny.lora_parameters(model), lr=args.learning_rate)
        LoraOver(model, optimizer, tiny.mpo(), tiny.rounds())
        return model, Trainer(model, args, train_dataset=tiny.dataset(), optimizers=(optimizer, None))

    model, whole = trainer(tmp_path / "whole")
    whole.train()
    _, broken = trainer(tmp_path / "broken")
    original, seen = torch.save, itertools.count()

    def full(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-4" in str(file) and next(seen) >= 0:
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        original(value, file, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            broken.train()
    assert last_complete_checkpoint(tmp_path / "broken") == str(tmp_path / "broken" / "checkpoint-2")
    resumed_model, resumed = trainer(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "broken"))
    assert same(tiny.lora_weights(model), tiny.lora_weights(resumed_model))


@pytest.mark.parametrize("scheduler", ["taylor", "budget"])
def test_state_of_another_model(scheduler: str) -> None:
    def made() -> Scheduler:
        return TaylorRuntime(2, split=2, every=2) if scheduler == "taylor" else Budget(300, every=2)

    class Renamed(nn.Module):
        """The same shapes under other names, which torch alone would take."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = Experts()

    run = Run(made()).go(range(1, ORDINARY))
    run.gradients(ORDINARY)
    other = Renamed()
    optimizer = torch.optim.AdamW(trainable(other), lr=1e-2)
    LoraOver(other, optimizer, MPO(order=4), made())
    for step in range(1, ORDINARY):
        optimizer.zero_grad()
        expert_loss(other.inner, step).backward()
        optimizer.step()
    state = optimizer.state_dict()
    before = run.all_of_it()
    with pytest.raises(ValueError, match=r"(?s)inner\.experts.*(saved from|own)"):
        run.optimizer.load_state_dict(state)
    require_same(before, run.all_of_it())
    run.optimizer.step()
    assert run.over.step == ORDINARY


def damage(state: Any, way: str) -> None:
    """Spoil the optimizer's state of one core."""
    entry = next(e for e in state["tnadapt"]["cores"].values() if e["state"])
    first = dict(entry["state"][0])
    if way == "missing moment":
        del first["exp_avg_sq"]
    elif way == "step lost":
        del first["step"]
    elif way == "moment as a list":
        first["exp_avg"] = first["exp_avg"].tolist()
    elif way == "step is NaN":
        first["step"] = torch.tensor(float("nan"))
    entry["state"] = [first, *entry["state"][1:]]


@pytest.mark.parametrize("way", ["missing moment", "step lost", "moment as a list", "step is NaN"])
def test_damaged_optimizer_state_of_the_cores(way: str, clean: Any) -> None:
    state = copy.deepcopy(Run().go(range(1, RELEASES + 1)).optimizer.state_dict())
    damage(state, way)
    run = Run().go(range(1, ORDINARY))
    run.gradients(ORDINARY)

    def fault() -> None:
        with pytest.raises(ValueError, match="earlier checkpoint"):
            run.optimizer.load_state_dict(state)

    survives(run, ORDINARY, fault)
    require_same_end(clean(), run)
