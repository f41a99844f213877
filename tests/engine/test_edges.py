"""Edges at which training once went wrong without a word: one test for each, in the words of a user."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tnadapt import MPO, SVD, Event, LoraOver, OverParamAdapter, Static, TaylorRuntime, find_lora_matrices

from .models import Experts, adapters, backward_through, expert_loss, same, trainable, values


def step_through(model: nn.ModuleList, optimizer: torch.optim.Optimizer, *chosen: int) -> None:
    backward_through(model, *(chosen or range(len(model))))
    optimizer.step()
    optimizer.zero_grad()


def twice(prepare: Callable[[torch.optim.Optimizer], None], kind: Any = torch.optim.SGD) -> tuple[Any, Any]:
    """The gradients of all matrices after two steps, as LoraOver and as plain LoRA."""
    found = []
    for over in (True, False):
        model = adapters(12, 12)
        optimizer = kind(trainable(model), lr=0.0)
        prepare(optimizer)
        if over:
            LoraOver(model, optimizer, MPO(order=3), Static("0"))
        for _ in range(2):
            backward_through(model, 0, 1)
            optimizer.step()
        found.append([p.grad for p in trainable(model)])
    return found[0], found[1]


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_in_a_post_hook_is_not_undone(set_to_none: bool) -> None:
    def zeroes(optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_post_hook(lambda o, *_: o.zero_grad(set_to_none))

    mine, plain = twice(zeroes)
    assert same(mine, plain)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_at_the_end_of_a_subclass_is_not_undone(set_to_none: bool) -> None:
    class Zeroes(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            self.zero_grad(set_to_none)
            return result

    mine, plain = twice(lambda _: None, Zeroes)
    assert same(mine, plain)


def test_hooks_of_others_see_gradients_before_and_refolded_matrices_after() -> None:
    """Whether they were registered before or after attaching, and a pre-hook that clips acts on the cores."""

    def run(clip_first: bool, by_hand: bool) -> tuple[nn.ModuleList, list[Tensor]]:
        model = adapters(12, 12)
        optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
        seen: list[Tensor] = []

        def clip(*_: Any) -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

        optimizer.register_step_post_hook(lambda *_: seen.append(model[0].lora_A.weight.detach().clone()))
        if clip_first and not by_hand:
            optimizer.register_step_pre_hook(clip)
        over = LoraOver(model, optimizer, MPO(order=3))
        if not clip_first and not by_hand:
            optimizer.register_step_pre_hook(clip)
        for _ in range(3):
            backward_through(model, 0, 1)
            if by_hand:
                clip()
            optimizer.step()
            assert torch.equal(seen[-1], model[0].lora_A.weight)
            optimizer.zero_grad()
        assert over.step == 3
        return model, seen

    wanted, _ = run(True, by_hand=True)
    for clip_first in (True, False):
        got, _ = run(clip_first, by_hand=False)
        assert same(values(got), values(wanted))


class Clips(torch.optim.AdamW):
    """Clips the parameters that it was made with inside its step."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        self.mine = list(parameters)
        super().__init__(self.mine, **options)

    def step(self, closure: Any = None) -> Any:
        torch.nn.utils.clip_grad_norm_(self.mine, 1e-3)
        return super().step(closure)


def test_a_subclass_that_clips_inside_its_step_is_told_that_cores_do_not_follow() -> None:
    model = adapters(12)
    optimizer = Clips(trainable(model), lr=1e-2)
    LoraOver(model, optimizer, MPO(order=3))
    backward_through(model, 0)
    with pytest.raises(
        RuntimeError, match=r"Clips changed gradients of expanded matrices inside its step.*clip before optimizer.step"
    ):
        optimizer.step()


def test_steps_without_gradients_do_not_count() -> None:
    """A scheduler that waits for scores would otherwise expand by the order of the model."""
    model = adapters(12, 12, 12)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    scheduler = TaylorRuntime(top_n=1, split=1, every=2)
    over = LoraOver(model, optimizer, MPO(order=3), scheduler, groups=lambda matrix: matrix.kind)
    for _ in range(5):
        optimizer.step()
    assert (over.step, over.history) == (0, [])
    for _ in range(2):
        step_through(model, optimizer, 2)
    assert set(over.expanded) == {"2.A", "2.B"}


# -- writes of others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("edit", ["rolled back", "small entries zeroed", "one bit"])
def test_small_edits_of_low_precision_matrices_are_seen(dtype: torch.dtype, edit: str) -> None:
    torch.manual_seed(0)
    layer = OverParamAdapter.from_linear(nn.Linear(64, 64), rank=4, alpha=8).to(dtype)
    nn.init.normal_(layer.lora_B.weight, std=0.5)
    optimizer = torch.optim.AdamW([layer.lora_A.weight, layer.lora_B.weight], lr=2e-3)
    over = LoraOver(layer, optimizer, MPO(order=3))

    def step() -> None:
        layer(torch.ones(2, 64, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    earlier = layer.lora_B.weight.detach().clone()
    step()
    now = layer.lora_B.weight.detach()
    with torch.no_grad():
        if edit == "rolled back":
            layer.lora_B.weight.copy_(earlier)
        elif edit == "small entries zeroed":
            layer.lora_B.weight[now.abs() < torch.finfo(dtype).eps * now.abs().max()] = 0
            if torch.equal(layer.lora_B.weight, now):
                layer.lora_B.weight.view(-1)[now.abs().argmin()] = 0
        else:
            layer.lora_B.weight.data.view(torch.int16)[3, 1] ^= 1
    assert over.changed_outside() == ("B",)
    with pytest.warns(UserWarning, match="^B changed outside"):
        step()


@pytest.mark.parametrize("factorization", [SVD(), MPO(order=5)])
def test_a_step_that_diverged_is_not_blamed_on_somebody_else(factorization: Any) -> None:
    model = adapters(12, 12)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e200)  # the product of two cores is infinite
    over = LoraOver(model, optimizer, factorization)
    step_through(model, optimizer)
    assert not any(bool(torch.isfinite(p).all()) for p in trainable(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert over.changed_outside() == ()
        with pytest.raises(
            FloatingPointError, match=r"the gradient of .* holds NaN or infinity.*Lower the learning rate"
        ):
            step_through(model, optimizer)
    with torch.no_grad():
        trainable(model)[0].fill_(1.0)
    assert over.changed_outside() == (next(iter(over.expanded)),)


class Dies(torch.optim.AdamW):
    dying = False

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        if self.dying:
            raise ZeroDivisionError("in the optimizer")
        return result


def died() -> tuple[nn.ModuleList, Dies, LoraOver, Any]:
    """After two steps and one that died; with the states of before that one."""
    model = adapters(12, 12)
    optimizer = Dies(trainable(model), lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3))
    for _ in range(2):
        step_through(model, optimizer)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer.dying = True
    backward_through(model, 0, 1)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    optimizer.dying = False
    return model, optimizer, over, kept


def test_an_adapter_that_is_restored_after_a_step_that_died_stays() -> None:
    model, optimizer, over, (weights, _) = died()
    model.load_state_dict(weights)
    optimizer.zero_grad()
    backward_through(model, 0, 1)
    optimizer.param_groups[0]["lr"] = 1e-9
    with pytest.warns(UserWarning, match="changed outside"):
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, weights[name], rtol=1e-6, atol=1e-7), name
    assert over.step == 4


def test_model_and_optimizer_are_restored_after_a_step_that_died() -> None:
    model, optimizer, _, (weights, state) = died()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    optimizer.zero_grad()
    other = adapters(12, 12)
    its_optimizer = Dies(trainable(other), lr=1e-2)
    LoraOver(other, its_optimizer, MPO(order=3))
    for _ in range(2):
        step_through(other, its_optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step_through(model, optimizer)
            step_through(other, its_optimizer)
    assert same(values(model), values(other))


@pytest.mark.parametrize("zeroed", [True, False])
def test_gradients_after_a_step_that_died_are_as_for_plain_lora(zeroed: bool) -> None:
    """Zeroed, or accumulated onto."""
    found = []
    for over in (True, False):
        model = adapters(12, 12)
        optimizer = Dies(trainable(model), lr=0.0)
        if over:
            LoraOver(model, optimizer, MPO(order=3))
        optimizer.dying = True
        backward_through(model, 0, 1)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        if zeroed:
            optimizer.zero_grad()
        backward_through(model, 0, 1)
        found.append([p.grad for p in trainable(model)])
    for mine, plain in zip(*found, strict=True):
        assert torch.allclose(mine, plain, rtol=1e-9, atol=1e-12)


# -- states -----------------------------------------------------------------------------------------------------------


def test_a_state_that_another_thread_asks_for_waits_for_the_step() -> None:
    """As an asynchronous checkpoint does: in the middle of the step, the cores are on loan."""
    inside, go_on = threading.Event(), threading.Event()

    class Slow(torch.optim.AdamW):
        slow = False

        def step(self, closure: Any = None) -> Any:
            if self.slow:
                inside.set()
                go_on.wait(10)
            return super().step(closure)

    model = adapters(12)
    optimizer = Slow(trainable(model), lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3))
    step_through(model, optimizer)
    states: list[Any] = []

    def checkpoint() -> None:
        inside.wait(10)
        threading.Timer(0.05, go_on.set).start()
        states.append(copy.deepcopy(optimizer.state_dict()))

    thread = threading.Thread(target=checkpoint)
    thread.start()
    optimizer.slow = True
    step_through(model, optimizer)
    optimizer.slow = False
    thread.join(10)
    assert len(states[0]["param_groups"]) == 1
    assert states[0]["tnadapt"]["step"] == 2
    assert same(states[0]["tnadapt"], over.state_dict())


def test_a_state_from_a_hook_that_was_there_before_attaching_can_be_loaded() -> None:
    model = adapters(12)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    states: list[Any] = []
    optimizer.register_step_post_hook(lambda o, *_: states.append(copy.deepcopy(o.state_dict())))
    over = LoraOver(model, optimizer, MPO(order=3))
    for _ in range(2):
        step_through(model, optimizer)
    assert [len(state["param_groups"]) for state in states] == [1, 1]
    optimizer.load_state_dict(states[-1])
    assert same(states[-1]["tnadapt"], over.state_dict())


def test_an_optimizer_that_asks_for_its_state_inside_its_step_is_told_why_not() -> None:
    class Asks(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            self.state_dict()
            return super().step(closure)

    model = adapters(12)
    optimizer = Asks(trainable(model), lr=1e-2)
    LoraOver(model, optimizer, MPO(order=3))
    backward_through(model, 0)
    with pytest.raises(RuntimeError, match="inside a step, while the optimizer has the cores on loan"):
        optimizer.step()


def test_step_counts_of_a_saved_state_go_where_the_optimizer_reads_them() -> None:
    """`map_location="cpu"` leaves them on the CPU; torch itself moves those of fused and capturable optimizers."""
    model = adapters(12)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=True)
    over = LoraOver(model, optimizer, MPO(order=3))
    step_through(model, optimizer)
    state = copy.deepcopy(over.state_dict())
    moved: list[torch.device] = []

    class Count(Tensor):
        def to(self, *args: Any, **kwargs: Any) -> Tensor:
            moved.append(args[0])
            return super().to(*args, **kwargs)

    for entry in state["cores"].values():
        for core_state in entry["state"]:
            core_state["step"] = core_state["step"].as_subclass(Count)
    over.load_state_dict(state)
    assert set(moved) == {torch.device("cpu")}
    assert len(moved) >= len(over.expanded)


# -- rates ------------------------------------------------------------------------------------------------------------


def rates_of_cores(
    optimizer: torch.optim.Optimizer, model: nn.ModuleList, steps: int, schedule: Any = None
) -> list[float]:
    over = LoraOver(model, optimizer, MPO(order=3), core_lr=1e-4)
    found = []
    for _ in range(steps):
        step_through(model, optimizer)
        rate = over.core_rate()
        assert rate is not None
        found.append(rate)
        if schedule is not None:
            schedule.step()
    return found


def test_core_lr_where_the_rate_is_given_in_groups() -> None:
    model = adapters(12)
    optimizer = torch.optim.AdamW([{"params": trainable(model), "lr": 2e-4}])  # its default is 1e-3
    assert rates_of_cores(optimizer, model, 2) == pytest.approx([1e-4, 1e-4])


def test_core_lr_is_the_peak_of_a_one_cycle_schedule() -> None:
    model = adapters(12)
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10)
    assert max(rates_of_cores(optimizer, model, 9, schedule)) == pytest.approx(1e-4, rel=1e-2)


def test_core_lr_is_reached_at_the_end_of_a_warm_up() -> None:
    model = adapters(12)
    optimizer = torch.optim.AdamW(trainable(model), lr=5e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 4, 1.0))
    assert rates_of_cores(optimizer, model, 6, schedule) == pytest.approx([0.0, 2.5e-5, 5e-5, 7.5e-5, 1e-4, 1e-4])


def test_core_lr_keeps_the_ratio_between_groups() -> None:
    """As LoRA+ has it: the base rate is that of the first group."""
    model = adapters(12)
    sides = [[p for n, p in model.named_parameters() if side in n] for side in ("lora_A", "lora_B")]
    optimizer = torch.optim.SGD([{"params": sides[0]}, {"params": sides[1], "lr": 16e-3}], lr=1e-3)
    over = LoraOver(model, optimizer, MPO(order=3), core_lr=1e-4)
    lent: list[list[float]] = []
    original = over._step._lend

    def look(loan: Any) -> None:
        original(loan)
        lent.append([group["lr"] for group in optimizer.param_groups[2:]])

    over._step._lend = look
    step_through(model, optimizer)
    assert sorted(lent[0]) == pytest.approx([1e-4, 16e-4])


def test_a_first_step_that_fails_leaves_the_base_rate_open() -> None:
    """What is found out in a preparation that fails is forgotten, the base rate too."""
    model = adapters(12)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    over = LoraOver(model, optimizer, MPO(order=3), core_lr=0.2)
    backward_through(model, 0)
    before = copy.deepcopy(over.state_dict())
    matrix = next(iter(over.matrices.values()))
    good = matrix.parameter.grad.clone()
    matrix.parameter.grad.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert same(over.state_dict(), before)
    assert before["rates"]["base"] is None
    matrix.parameter.grad.copy_(good)
    optimizer.step()
    assert over.state_dict()["rates"]["base"] == 0.1


def test_core_lr_survives_an_optimizer_with_another_default() -> None:
    model = adapters(12)
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-4)
    over = LoraOver(model, optimizer, MPO(order=3), core_lr=1e-4)
    step_through(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    other = adapters(12)
    other.load_state_dict(model.state_dict())
    its_optimizer = torch.optim.AdamW(trainable(other), lr=7e-3)
    resumed = LoraOver(other, its_optimizer, MPO(order=3), core_lr=1e-4)
    its_optimizer.load_state_dict(state)
    for m, o in ((model, optimizer), (other, its_optimizer)):
        step_through(m, o)
    assert resumed.core_rate() == over.core_rate() == pytest.approx(1e-4)
    assert same(values(model), values(other))


@pytest.mark.parametrize("order", range(2, 10))
@pytest.mark.parametrize("size", [1e2, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_capped_update_ends_at_its_cap(order: int, size: float, dtype: torch.dtype) -> None:
    """To 1 %, however far the step went beyond it; the other matrix, within the cap, is not touched."""

    def run(cap: float | None) -> tuple[nn.ModuleList, LoraOver]:
        torch.manual_seed(0)
        model = nn.ModuleList(OverParamAdapter.from_linear(nn.Linear(64, 48), rank=8) for _ in range(2)).to(dtype)
        for layer in model:
            nn.init.normal_(layer.lora_B.weight, std=0.1)
        optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
        over = LoraOver(model, optimizer, MPO(order=order), max_update=cap)
        generator = torch.Generator().manual_seed(order)
        for layer, scale in zip(model, (size, 1e-4), strict=True):
            for parameter in trainable(layer):
                parameter.grad = scale * torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.step()
        return model, over

    model, over = run(1.0)
    for side, numel in (("A", 8 * 64), ("B", 48 * 8)):
        assert over.update_norms()[f"0.{side}"] == pytest.approx(1e-3 * numel**0.5, rel=1e-2)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    free, _ = run(None)
    for mine, other in zip(trainable(model[1]), trainable(free[1]), strict=True):
        assert torch.allclose(mine, other, rtol=1e-6, atol=1e-8)


# -- crashes ----------------------------------------------------------------------------------------------------------


def test_a_step_inside_autocast() -> None:
    """As Lightning's manual optimization has it."""

    def run(autocast: bool) -> dict[str, Tensor]:
        model = Experts(dtype=torch.float32)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        over = LoraOver(model, optimizer, MPO(order=4), TaylorRuntime(top_n=2, split=1, every=2), max_update=1.0)
        for step in range(4):
            optimizer.zero_grad()
            expert_loss(model, step).backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                optimizer.step()
        assert len(over.expanded) == 4
        return values(model)

    assert same(run(True), run(False))


def test_a_compiled_step() -> None:
    def run(compiled: bool) -> dict[str, Tensor]:
        model = adapters(12, 12)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, foreach=False)
        over = LoraOver(model, optimizer, MPO(order=3))
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            backward_through(model, 0, 1)
            step()
            optimizer.zero_grad()
        assert over.step == 3
        assert over.changed_outside() == ()
        return values(model)

    for name, value in run(True).items():
        # torch itself compiles the step counts into float32: a plain run differs by 1e-7 too
        assert torch.allclose(value, run(False)[name], rtol=1e-4, atol=1e-5), name


def test_another_default_device() -> None:
    """What is made without a device of its own would be on the default one, which need not be that of the matrices."""

    def run() -> dict[str, Tensor]:
        model = Experts()
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        scheduler = TaylorRuntime(top_n=2, split=2, every=2)
        over = LoraOver(model, optimizer, MPO(order=4), scheduler, max_update=10.0)
        losses = [expert_loss(model, step) for step in range(1)]
        del losses
        for step in range(5):
            optimizer.zero_grad()
            with torch.device("cpu"):
                expert_loss(model, step).backward()
            optimizer.step()
        assert len(over.expanded) == 4
        over.load_state_dict(copy.deepcopy(over.state_dict()))
        over.fold()
        return values(model)

    wanted = run()
    before = torch.get_default_device()
    try:
        with torch.device("cpu"):
            model = Experts()
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        scheduler = TaylorRuntime(top_n=2, split=2, every=2)
        torch.set_default_device("meta")
        over = LoraOver(model, optimizer, MPO(order=4), scheduler, max_update=10.0)
        for step in range(5):
            optimizer.zero_grad()
            with torch.device("cpu"):
                expert_loss(model, step).backward()
                # the optimizer itself makes its step counts where the default is
                for parameter in [*trainable(model)]:
                    if not optimizer.state[parameter]:
                        optimizer.state[parameter].update(
                            step=torch.tensor(0.0),
                            exp_avg=torch.zeros_like(parameter),
                            exp_avg_sq=torch.zeros_like(parameter),
                        )
            optimizer.step()
        assert len(over.expanded) == 4
        assert same(values(model), wanted)
    finally:
        torch.set_default_device(before)


# -- in a user's hands ------------------------------------------------------------------------------------------------


def test_modules_of_equal_canonical_names_are_not_dropped_silently() -> None:
    model = nn.Module()
    model.proj = OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4)
    model.add_module("_orig_mod", nn.Module())
    model._orig_mod.proj = OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4)
    matrices, skipped = find_lora_matrices(model)
    assert list(matrices) == ["proj.A", "proj.B"]
    assert [(s.name, "same name" in s.reason) for s in skipped] == [("proj.A", True), ("proj.B", True)]
    with pytest.warns(UserWarning, match=r"proj.A, proj.B: left as plain LoRA, since another matrix has the same name"):
        LoraOver(model, torch.optim.SGD(trainable(model), lr=1e-2), MPO(order=3))


def test_folding_says_that_the_optimizer_was_never_stepped() -> None:
    model = adapters(12)
    over = LoraOver(model, torch.optim.AdamW(trainable(model)), MPO(order=3))
    other = torch.optim.AdamW(trainable(model))
    step_through(model, other)
    with pytest.warns(
        UserWarning, match="nothing was trained: the AdamW that LoraOver is attached to never took a step"
    ):
        over.fold()


def test_folding_says_that_no_round_came() -> None:
    model = adapters(12)
    optimizer = torch.optim.AdamW(trainable(model))
    over = LoraOver(model, optimizer, MPO(order=3), TaylorRuntime(top_n=1, split=1, every=50))
    for _ in range(3):
        step_through(model, optimizer)
    with pytest.warns(
        UserWarning, match=r"nothing was expanded in 3 steps: TaylorRuntime\(.*every=50\) chose no matrix"
    ):
        over.fold()


def test_a_checkpoint_that_was_loaded_before_attaching_is_noticed() -> None:
    model = adapters(12)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    LoraOver(model, optimizer, MPO(order=3))
    step_through(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    other = adapters(12)
    its_optimizer = torch.optim.AdamW(trainable(other), lr=1e-2)
    its_optimizer.load_state_dict(state)
    late = LoraOver(other, its_optimizer, MPO(order=3))
    backward_through(other, 0)
    with pytest.raises(
        RuntimeError, match=r"checkpoint of a LoraOver.*before this one was attached.*attach first, then load"
    ):
        its_optimizer.step()
    its_optimizer.load_state_dict(state)
    its_optimizer.step()
    assert late.step == 2


def test_attaching_again_where_the_handle_is_lost() -> None:
    model = adapters(12)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3))
    assert LoraOver.of(model) is over
    new = torch.optim.AdamW(trainable(model), lr=1e-2)
    with pytest.raises(ValueError, match=r"attached .* already.*LoraOver.of\(model\).*replace=True"):
        LoraOver(model, new, MPO(order=3))
    again = LoraOver(model, new, MPO(order=3), replace=True)
    assert not over.attached
    assert LoraOver.of(model) is again
    step_through(model, new)
    assert (over.step, again.step) == (0, 1)


@pytest.mark.parametrize("anew", [True, False])
def test_attaching_again_after_a_step_that_died(anew: bool) -> None:
    """As where a cell of a notebook was interrupted: the optimizer has the cores still, in place of the matrices."""
    model, optimizer, over, _ = died()
    new = Dies(trainable(model), lr=1e-2) if anew else optimizer
    with pytest.raises(ValueError, match=r"attached .* already"):
        LoraOver(model, new, MPO(order=3))
    again = LoraOver(model, new, MPO(order=3), replace=True)
    assert not over.attached
    step_through(model, new)
    assert (again.step, len(again.expanded)) == (1, 4)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4]


def test_attaching_again_where_optimizer_and_handle_are_gone() -> None:
    """They refer to each other, and may wait for Python's collector, which is not to be waited for."""
    model = adapters(12)
    gc.collect()
    gc.disable()
    try:
        LoraOver(model, torch.optim.AdamW(trainable(model), lr=1e-2), MPO(order=3))
        assert LoraOver.of(model) is not None, "the cycle is not collected yet"
        new = torch.optim.AdamW(trainable(model), lr=1e-2)
        again = LoraOver(model, new, MPO(order=3))
    finally:
        gc.enable()
    assert LoraOver.of(model) is again
    step_through(model, new)
    assert again.step == 1


def test_attaching_again_in_a_wrong_way_leaves_the_first_attached() -> None:
    model = adapters(12)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3))
    with pytest.raises(ValueError, match="matches none"):
        LoraOver(model, optimizer, MPO(order=3), Static("nobody"), replace=True)
    assert over.attached


WRONG: dict[str, tuple[Callable[[nn.Module, Any], Any], str]] = {
    "a word for a factorization": (
        lambda m, o: LoraOver(m, o, "mpo"),
        r"factorization is 'mpo'; pass one, such as MPO\(order=9\)",
    ),
    "a word for a switch": (
        lambda m, o: LoraOver(m, o, MPO(order=3), shard="no"),
        "shard is 'no'; pass True or False",
    ),
    "a number for a switch": (
        lambda m, o: LoraOver(m, o, MPO(order=3), matched=1),
        "matched is 1; pass True or False",
    ),
    "exchanged": (
        lambda m, o: LoraOver(m, o, Static(), MPO(order=3)),
        "factorization is a Static; that is a scheduler",
    ),
    "a factorization for a scheduler": (
        lambda m, o: LoraOver(m, o, SVD(), SVD()),
        "scheduler is a SVD; that is a factorization",
    ),
    "a class of a factorization": (
        lambda m, o: LoraOver(m, o, SVD),
        r"factorization is the class SVD; make one, such as SVD\(\)",
    ),
    "a class of a scheduler": (lambda m, o: LoraOver(m, o, SVD(), Static), r"scheduler is the class Static; make one"),
    "an optimizer for a model": (lambda m, o: LoraOver(o, m, SVD()), "model is a AdamW; pass the torch.nn.Module"),
    "a model for an optimizer": (
        lambda m, o: LoraOver(m, m, SVD()),
        "optimizer is a ModuleList, not a torch.optim.Optimizer",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_of_wrong_types_are_named(case: str) -> None:
    model = adapters(12)
    attach, said = WRONG[case]
    with pytest.raises(TypeError, match=said):
        attach(model, torch.optim.AdamW(trainable(model)))
    assert LoraOver.of(model) is None


def test_a_wrapper_without_hooks_names_the_inner_optimizer() -> None:
    class Lookahead(torch.optim.Optimizer):
        """As third parties write it: it never calls the constructor of its base."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

    model = adapters(12)
    with pytest.raises(
        TypeError, match=r"Lookahead wraps another optimizer.*attach to the inner one, its attribute 'optimizer'"
    ):
        LoraOver(model, Lookahead(torch.optim.AdamW(trainable(model))), MPO(order=3))


def test_lightnings_wrapper_is_unwrapped() -> None:
    """It makes a class of its own that derives from the optimizer's; taken for that, AdamW would not be elementwise."""

    class LightningOptimizer:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.__dict__ = {"_optimizer": optimizer}
            self.__class__ = type("Lightning" + type(optimizer).__name__, (type(self), type(optimizer)), {})

        @property
        def optimizer(self) -> torch.optim.Optimizer:
            return self.__dict__["_optimizer"]

    model = adapters(12)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    over = LoraOver(model, LightningOptimizer(optimizer), MPO(order=3))
    assert over.optimizer is optimizer
    step_through(model, optimizer)
    assert [len(cohort.pieces) for cohort in over._expanded.now.cohorts] == [1]


class DAdaptAdam(torch.optim.AdamW):
    """By its name, an optimizer that learns its rate."""


def test_optimizers_that_keep_their_step_size_in_groups_are_refused() -> None:
    model = adapters(12)
    with pytest.raises(TypeError, match=r"DAdaptAdam cannot train.*step size in the parameter groups"):
        LoraOver(model, DAdaptAdam(trainable(model)), MPO(order=3))


def test_peft_tuners_without_pairs_are_named() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(12, 12)), peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match="IA3 has no pairs of linear layers lora_A and lora_B"):
        LoraOver(model, torch.optim.AdamW(trainable(model)), MPO(order=3))


def test_what_is_printed_can_be_read() -> None:
    model = adapters(12, 12)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3), Static("0"))
    assert repr(over) == "LoraOver(MPO(order=3), Static('0'); step 0, 2 of 4 matrices expanded)"
    assert str(over.history[0]) == "step 0: expand 0.A, 0.B"
    assert str(Event(7, "fold", ("a", "b", "c"))) == "step 7: fold a, b, c"
    assert str(Event(7, "fold", ("a", "b", "c", "d"))) == "step 7: fold a, b, c and 1 more"
    over.detach()
    assert repr(over).endswith("; step 0, folded)")


def test_the_papers_order_takes_the_update_first_and_expands_after_it() -> None:
    """Algorithm 2 as printed: the update of the round is that of plain LoRA, and the next one goes through the cores."""

    def run(steps: int, scheduler: TaylorRuntime | None) -> tuple[dict[str, Tensor], LoraOver | None]:
        model = adapters(12, 12)
        optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
        over = None if scheduler is None else LoraOver(model, optimizer, MPO(order=4), scheduler)
        for _ in range(steps):
            step_through(model, optimizer)
        return values(model), over

    def rounds(after: bool) -> TaylorRuntime:
        return TaylorRuntime(top_n=4, split=1, every=2, expand_after_update=after)

    plain, _ = run(2, None)
    later, over = run(2, rounds(after=True))
    at_once, _ = run(2, rounds(after=False))
    assert same(later, plain)
    assert not same(at_once, plain)
    assert over is not None
    assert [(event.step, len(event.names)) for event in over.history] == [(2, 4)]
    third, _ = run(3, rounds(after=True))
    assert not same(third, run(3, None)[0])
