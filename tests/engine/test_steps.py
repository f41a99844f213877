"""What happens around and inside optimizer steps: closures, errors, accumulation, idle and edited matrices, folding."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from tnadapt import MPO, SVD, LoraOver, OverParamAdapter, Static, TaylorRuntime

from .models import Experts, backward, everything, expert_loss, llama, same, trainable, values


def attached(optimizer=torch.optim.AdamW, scheduler=None, factorization=None, count=3, **options):
    model = Experts(count)
    stepped = optimizer(trainable(model), lr=1e-2)
    return model, stepped, LoraOver(model, stepped, factorization or MPO(order=3), scheduler, **options)


def train(model, optimizer, steps, used=(0, 1, 2)):
    for step in steps:
        optimizer.zero_grad()
        expert_loss(model, step, used).backward()
        optimizer.step()


def end(model, over):
    return values(model), over.state_dict(), over.history


# -- closures and hooks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_closure_that_zeroes_and_goes_backward(how):
    """As Lightning has it."""
    model, optimizer, over = attached(scheduler=TaylorRuntime(top_n=2, split=2, every=2))
    losses, calls = [], []
    for step in range(5):

        def closure(step=step):
            calls.append(step)
            optimizer.zero_grad()
            loss = expert_loss(model, step)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure))
    plain, plain_optimizer, plain_over = attached(scheduler=TaylorRuntime(top_n=2, split=2, every=2))
    train(plain, plain_optimizer, range(5))
    assert calls == list(range(5)), "evaluated once"
    assert float(losses[0]) == float(expert_loss(attached()[0], 0))
    assert same(end(model, over), end(plain, plain_over))


def test_error_in_a_closure_changes_nothing():
    model, optimizer, over = attached()
    train(model, optimizer, range(2))
    before = everything(model, optimizer, over)

    def closure():
        raise ZeroDivisionError("in the model")

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert same(before, everything(model, optimizer, over))


class Calls(torch.optim.AdamW):
    """As many libraries do: a step of its own around that of a torch optimizer."""

    def step(self, closure=None):
        return super().step(closure)


class CallsDirectly(torch.optim.Adam):
    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.mul_(1 - 0.01 * group["lr"])
        return torch.optim.Adam.step(self, closure)


def test_subclass_that_calls_its_base():
    """Hooks fire twice then; the cores are stepped once."""
    model, optimizer, over = attached(Calls)
    plain, plain_optimizer, plain_over = attached()
    train(model, optimizer, range(3))
    train(plain, plain_optimizer, range(3))
    assert over.step == 3
    for name, value in values(model).items():
        assert torch.allclose(value, values(plain)[name], rtol=0, atol=1e-12)
    assert plain_over.step == 3


def test_subclass_that_does_more_than_its_base():
    model, optimizer, over = attached(CallsDirectly)
    train(model, optimizer, range(3))
    plain, plain_optimizer, _ = attached()
    train(plain, plain_optimizer, range(3))
    for name, value in values(model).items():
        assert torch.allclose(value, values(plain)[name], rtol=0, atol=1e-12)
    assert over.step == 3


class Fails(torch.optim.AdamW):
    """Raises when told to: at once, or after the parameters have been stepped."""

    failing: str | None = None

    def step(self, closure=None):
        if self.failing == "before":
            raise ZeroDivisionError("in the optimizer")
        result = super().step(closure)
        if self.failing == "after":
            raise ZeroDivisionError("in the optimizer")
        return result


@pytest.mark.parametrize("then", ["step", "state_dict", "fold", "detach"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_error_inside_the_optimizer(when, then):
    model, optimizer, over = attached(Fails, Static(r"experts\.[01]"))
    train(model, optimizer, range(2))
    optimizer.failing = when
    optimizer.zero_grad()
    expert_loss(model, 2).backward()
    gradients = [p.grad.clone() for p in trainable(model)]
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    optimizer.failing = None
    if then == "step":
        optimizer.zero_grad()
        train(model, optimizer, range(3, 5))
        assert over.step == 5
    elif then == "state_dict":
        state = optimizer.state_dict()
        assert len(state["param_groups"]) == 1
        assert len(state["tnadapt"]["cores"]) == 4
        assert same(gradients, [p.grad for p in trainable(model)])
    elif then == "fold":
        over.fold()
    else:
        over.detach()
    assert len(optimizer.param_groups) == 1
    assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}
    assert over.changed_outside() == ()


def test_error_of_a_foreign_optimizer_is_not_taken_for_forgetting_the_cores():
    model, optimizer, over = attached(Fails)
    optimizer.failing = "before"
    expert_loss(model, 0).backward()
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    optimizer.failing = None
    train(model, optimizer, range(2))
    assert over.step == 3


# -- gradients ----------------------------------------------------------------------------------------------------------


def test_gradient_accumulation():
    model, optimizer, over = attached()
    summed, summed_optimizer, summed_over = attached()
    for step in range(3):
        optimizer.zero_grad()
        for part in range(4):
            (expert_loss(model, 10 * step + part) / 4).backward()
        optimizer.step()
        summed_optimizer.zero_grad()
        (sum(expert_loss(summed, 10 * step + part) for part in range(4)) / 4).backward()
        summed_optimizer.step()
    for name, value in values(model).items():
        assert torch.allclose(value, values(summed)[name], rtol=0, atol=1e-9)
    assert over.step == summed_over.step == 3


def test_gradients_that_accumulate_across_steps():
    """A loop without zero_grad: the gradient of the matrix is there again after the step, and grows."""
    model, optimizer, over = attached()
    parameter = over.matrices["experts.0.A"].parameter
    train(model, optimizer, range(1))
    first = parameter.grad.clone()
    expert_loss(model, 1).backward()
    second = torch.autograd.grad(expert_loss(model, 1), parameter)[0]
    assert torch.allclose(parameter.grad, first + second)
    optimizer.step()
    assert torch.allclose(parameter.grad, first + second)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adafactor])
def test_idle_matrices_do_not_move(kind):
    """An expert that no token was sent to: each trains as it would alone."""
    plan = [(0, 1, 2), (0, 2), (1,), (0, 1, 2), (2,), (0, 1)]
    model, optimizer, over = attached(kind)
    for step, used in enumerate(plan):
        before = values(model)
        train(model, optimizer, range(step, step + 1), used)
        for name, value in values(model).items():
            assert torch.equal(value, before[name]) == (int(name.split(".")[1]) not in used)
    # each expert on its own, given the gradients it had: its loss does not depend on a mean over experts
    replayed = copy.deepcopy(values(model))
    separate = Experts()
    optimizers = [kind(expert.parameters(), lr=1e-2) for expert in separate.experts]
    for expert in separate.experts:
        expert.base.requires_grad_(False)
    overs = [LoraOver(e, o, MPO(order=3)) for e, o in zip(separate.experts, optimizers, strict=True)]
    for step, used in enumerate(plan):
        separate.zero_grad()
        expert_loss(separate, step, used).backward()
        for k in used:
            optimizers[k].step()
    for name, value in values(separate).items():
        assert torch.allclose(value, replayed[name], rtol=0, atol=1e-11), name
    assert [o.step for o in overs] == [4, 4, 4]
    assert over.step == len(plan)


def test_step_without_any_gradient():
    model, optimizer, over = attached()
    before = values(model)
    optimizer.step()
    assert same(before, values(model))
    train(model, optimizer, range(1))
    assert not same(before, values(model))
    assert len(over.expanded) == 6


def test_the_empty_step_that_distributed_checkpoints_take_is_ignored():
    """They make the state of an optimizer by one step with zero rates and zero gradients."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    scheduler = TaylorRuntime(top_n=3, split=1, every=1)
    model, optimizer, over = attached(scheduler=scheduler)
    before = values(model)
    get_optimizer_state_dict(model, optimizer)
    assert len(optimizer.state) == 6, "the step was taken"
    assert (over.step, over.expanded, scheduler.rounds_done, scheduler.scores()) == (0, (), 0, {})
    assert same(before, values(model))
    assert optimizer.param_groups[0]["lr"] == 1e-2
    train(model, optimizer, range(1))
    assert (over.step, len(over.expanded)) == (1, 6)


def test_a_warm_up_from_zero_is_no_empty_step():
    model, optimizer, over = attached()
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, range(1))
    assert over.step == 1


@pytest.mark.parametrize("factorization", [SVD(max_bond=2), MPO(order=4, max_bond=3)], ids=lambda f: f.label)
def test_truncated_expansion_does_not_move_the_matrices(factorization):
    """What the cores miss is kept, at the first step and at every later one."""
    model, optimizer, over = attached(torch.optim.SGD, factorization=factorization)
    optimizer.param_groups[0]["lr"] = 0.0
    before = values(model)
    train(model, optimizer, range(3))
    assert over.step == 3
    for name, value in values(model).items():
        assert torch.allclose(value, before[name], rtol=0, atol=1e-12)


# -- matrices that others write -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["data", "copy_", "load_state_dict"])
def test_edited_matrices_are_unfolded_anew(how):
    model, optimizer, over = attached()
    train(model, optimizer, range(2))
    parameter = model.experts[1].lora_B.weight
    wanted = parameter.detach() * 2 + 1
    if how == "data":
        parameter.data = wanted.clone()
    elif how == "copy_":
        with torch.no_grad():
            parameter.copy_(wanted)
    else:
        model.load_state_dict({**model.state_dict(), "experts.1.lora_B.weight": wanted})
    assert over.changed_outside() == ("experts.1.B",)
    optimizer.zero_grad()
    expert_loss(model, 2).backward()
    with pytest.warns(UserWarning, match=r"experts\.1\.B changed outside the optimizer.*unfolding anew"):
        optimizer.step()
    assert float((parameter - wanted).abs().max()) < 0.2, "trained from the new value"
    assert not torch.equal(parameter, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(3, 5))


def test_no_warning_without_an_edit():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for factorization in (MPO(order=16), SVD(gauge="identity"), SVD(max_bond=2)):
            model = Experts(dtype=torch.float64).to(dtype)
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
            LoraOver(model, optimizer, factorization)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                train(model, optimizer, range(6))


def test_fold_never_writes_the_matrix():
    """load_best_model_at_end puts earlier values into the model just before the end."""
    model, optimizer, over = attached()
    train(model, optimizer, range(2))
    best = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(2, 5))
    model.load_state_dict(best)
    with pytest.warns(UserWarning, match="load_best_model_at_end"):
        over.fold()
    assert same(best, model.state_dict())


def test_fold_of_matrices_that_were_not_touched_says_nothing():
    model, optimizer, over = attached()
    train(model, optimizer, range(2))
    kept = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        over.fold()
    assert same(kept, model.state_dict())


# -- folding and detaching ----------------------------------------------------------------------------------------------


def test_report():
    model, optimizer, over = attached(factorization=MPO(order=5))
    train(model, optimizer, range(3))
    trained, lora = over.trained_parameters, over.lora_parameters
    assert lora == sum(p.numel() for p in trainable(model)) == 3 * (4 * 12 + 6 * 4)
    held = sum(core.numel() for entry in over.state_dict()["cores"].values() for core in entry["cores"])
    assert trained == held > lora
    report = over.fold()
    assert (report.steps, report.lora_parameters, report.trained_parameters) == (3, lora, trained)
    assert set(report.folded) == set(over.matrices)
    assert [(event.step, event.action) for event in report.history] == [(0, "expand"), (3, "fold")]
    assert "folded 6 matrices after 3 steps" in str(report)
    assert over.expanded == ()
    assert over.trained_parameters == lora


def test_folding_some_goes_on_training_the_others_through_cores():
    model, optimizer, over = attached()
    train(model, optimizer, range(2))
    before = copy.deepcopy(over.state_dict())
    report = over.fold(["experts.0.A", "experts.2.B"])
    assert report.folded == ("experts.0.A", "experts.2.B")
    assert over.attached
    kept = over.state_dict()["cores"]
    assert set(kept) == {"experts.0.B", "experts.1.A", "experts.1.B", "experts.2.A"}
    for name, entry in kept.items():
        assert same(entry, before["cores"][name])
    train(model, optimizer, range(2, 4))
    assert over.matrices["experts.0.A"].parameter in optimizer.state, "stepped by itself now"
    assert len(over.fold().folded) == 4


def test_folding_before_the_first_step():
    model, _, over = attached()
    before = values(model)
    assert len(over.expanded) == 6
    report = over.fold()
    assert report.steps == 0
    assert same(before, values(model))


def test_detach():
    model, optimizer, over = attached()
    train(model, optimizer, range(2))
    hooks = sum(
        len(getattr(optimizer, n)) for n in vars(optimizer) if n.startswith("_optimizer_") and n.endswith("_hooks")
    )
    assert hooks > 0
    before = values(model)
    over.detach()
    over.detach()
    assert not over.attached
    assert same(before, values(model))
    assert not any(
        len(getattr(optimizer, n)) for n in vars(optimizer) if n.startswith("_optimizer_") and n.endswith("_hooks")
    )
    cores = copy.deepcopy(over.state_dict())
    train(model, optimizer, range(2, 3))
    assert len(optimizer.state) == 6, "every matrix is stepped by itself"
    assert same(cores, over.state_dict())
    LoraOver(model, optimizer, SVD()).fold()


def test_methods_that_were_put_on_the_optimizer_before_are_put_back():
    """As by code that counts calls; torch's own schedules replace `step` in the same way."""

    class Own(torch.optim.SGD):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)

    model = Experts()
    optimizer = Own(trainable(model), lr=0.1)
    called = []

    def counted(name):
        original = getattr(optimizer, name)

        def call(*args, **kwargs):
            called.append(name)
            return original(*args, **kwargs)

        return call

    names = ["zero_grad", "register_step_pre_hook", "load_state_dict"]
    for name in names:
        setattr(optimizer, name, counted(name))
    kept = {name: vars(optimizer)[name] for name in names}
    over = LoraOver(model, optimizer, MPO(order=3))
    optimizer.zero_grad()
    assert "zero_grad" in called
    over.fold()
    assert {name: vars(optimizer)[name] for name in names} == kept
    called.clear()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["zero_grad", "load_state_dict"]


def test_other_parameters_are_stepped_as_ever():
    """Heads and norms that train beside LoRA."""
    runs = []
    for over in (False, True):
        model = Experts()
        model.experts[0].base.bias.requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        if over:
            LoraOver(model, optimizer, SVD(), Static(["experts.2.A"]))
        train(model, optimizer, range(1))
        runs.append(values(model))
    different = [name for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])]
    assert different == ["experts.2.lora_A.weight"]


def test_block_of_ones_own():
    """The second way in of the public API."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = OverParamAdapter.from_linear(nn.Linear(16, 16), rank=4, alpha=8)
            lora_a, lora_b = nn.Linear(16, 4, bias=False), nn.Linear(4, 8, bias=False)
            self.out = OverParamAdapter(lora_a, lora_b, base=nn.Linear(16, 8), scaling=2.0)

        def forward(self, x):
            return self.out(torch.tanh(self.proj(x)))

    torch.manual_seed(0)
    model = Block()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    over = LoraOver(model, optimizer, SVD(), Static())
    assert list(over.matrices) == ["proj.A", "proj.B", "out.A", "out.B"]
    assert over.matrices["proj.A"].expanded
    x, losses = torch.randn(32, 16), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :8]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert over.fold().steps == 30


def test_a_gradient_that_was_zeroed_after_a_failed_step_does_not_come_back() -> None:
    class Failing(torch.optim.SGD):
        fail = True

        def step(self, closure=None):
            if self.fail:
                raise RuntimeError("out of order")
            return super().step(closure)

    model = llama()
    optimizer = Failing([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3))
    backward(model, 0)
    with pytest.raises(RuntimeError, match="out of order"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.fail = False
    before = {name: m.parameter.detach().clone() for name, m in over.matrices.items()}
    optimizer.step()
    assert all(m.parameter.grad is None for m in over.matrices.values())
    for name, m in over.matrices.items():
        assert torch.allclose(m.parameter, before[name], rtol=0, atol=1e-6), name
