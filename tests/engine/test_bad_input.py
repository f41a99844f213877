"""Wrong input is an error that says what, where and how to go on, raised before anything changed."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tnadapt import MPO, SVD, LoraOver, OverParamAdapter, Scheduler, Static, TaylorRuntime
from tnadapt.engine.checks import REFUSED, shown

from .models import Experts, backward, everything, expert_loss, llama, same, trainable


class Kept:
    """Checks that a block of code changes nothing."""

    def __init__(self, model: nn.Module, optimizer: Any, over: LoraOver | None = None) -> None:
        self.inputs = (model, optimizer, over)

    def __enter__(self) -> None:
        self.before = everything(*self.inputs)

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            after = everything(*self.inputs)
            for key, value in self.before.items():
                assert same(value, after[key]), f"{key} changed"


def started(steps: int = 2, scheduler: Any = None, optimizer: Any = torch.optim.AdamW, **options: Any) -> Any:
    """Experts in the middle of training, with a gradient waiting for its step."""
    model = Experts()
    stepped = optimizer(model.parameters(), lr=1e-2)
    over = LoraOver(model, stepped, MPO(order=3), scheduler or Static(r"experts\.[01]\."), **options)
    for step in range(steps):
        stepped.zero_grad()
        expert_loss(model, step).backward()
        stepped.step()
    stepped.zero_grad()
    expert_loss(model, steps).backward()
    return model, stepped, over


def refused(model: nn.Module, optimizer: Any, error: type[Exception], *said: str, **options: Any) -> None:
    """Attaching is refused with words, and leaves model and optimizer as they were."""
    inner = optimizer if isinstance(optimizer, torch.optim.Optimizer) else torch.optim.SGD(trainable(model), lr=0.1)
    arguments = {"factorization": MPO(order=3), **options}
    with Kept(model, inner), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error) as raised:
            LoraOver(model, optimizer, **arguments)
    for words in said:
        assert re.search(words, str(raised.value)), f"{words!r} is not in {raised.value}"
    # and nothing stays behind that would keep another from attaching
    good = Experts() if isinstance(model, Experts) else None
    if good is not None:
        LoraOver(good, torch.optim.SGD(good.parameters(), lr=0.1), SVD()).fold()


# -- optimizers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_optimizers_by_name(name):
    kind = type(name, (torch.optim.SGD,), {})
    model = Experts()
    refused(model, kind(model.parameters(), lr=0.1), TypeError, name, re.escape(REFUSED[name]), "use ")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_their_subclasses_are_refused_too(name):
    kind = type("Mine", (type(name, (torch.optim.SGD,), {}),), {})
    model = Experts()
    refused(model, kind(model.parameters(), lr=0.1), TypeError, name)


def test_lbfgs():
    model = Experts()
    refused(model, torch.optim.LBFGS(model.parameters()), TypeError, "LBFGS", "several times", "AdamW")


def test_lora_fa_of_peft():
    from peft.optimizers import create_lorafa_optimizer

    model = llama(layers=1)
    optimizer = create_lorafa_optimizer(model=model, r=4, lora_alpha=8, lr=1e-3)
    refused(model, optimizer, TypeError, "LoraFAOptimizer", "AdamW")


def test_riemannian_of_peft():
    from peft.optimizers import create_riemannian_optimizer

    model = llama(layers=1)
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-3)
    refused(model, optimizer, TypeError, "RiemannianPreconditionedOptimizer", "base class")


def test_zero_redundancy_of_torch():
    """The class in torch has the name that the table has."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    assert ZeroRedundancyOptimizer.__name__ in REFUSED


def test_adagrad_is_refused_where_it_cannot_step_what_comes_after_its_constructor():
    """Before torch 2.12 it has no state of such parameters, and fails at its step."""
    later = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(2))])
    optimizer.add_param_group({"params": [later]})
    later.grad = torch.ones(2)
    try:
        optimizer.step()
    except KeyError:
        assert "Adagrad" in REFUSED
    else:
        assert "Adagrad" not in REFUSED


def test_schedule_free():
    class ScheduleFree(torch.optim.SGD):
        def train(self) -> None: ...

        def eval(self) -> None: ...

    model = Experts()
    refused(model, ScheduleFree(model.parameters(), lr=0.1), TypeError, "ScheduleFree", "train", "AdamW")


def test_a_refused_one_inside_the_wrapper_of_accelerate():
    model = Experts()
    wrapper = type("AcceleratedOptimizer", (), {"optimizer": torch.optim.LBFGS(model.parameters())})()
    refused(model, wrapper, TypeError, "LBFGS", "AdamW")


def test_something_that_is_no_optimizer():
    refused(Experts(), object(), TypeError, "object", "torch optimizer")
    lookalike = type("Lookalike", (), {"_optimizer_step_pre_hooks": {}, "param_groups": []})()
    refused(Experts(), lookalike, TypeError, "Lookalike", "torch optimizer")


def test_optimizer_in_backward():
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = Experts()
    _apply_optimizer_in_backward(torch.optim.SGD, trainable(model), {"lr": 0.1})
    refused(model, torch.optim.SGD(trainable(model), lr=0.1), TypeError, r"experts\.0\.A", "in backward", "loop")


def test_optimizer_that_does_not_hold_the_matrices():
    model = Experts()
    held = [p for name, p in model.named_parameters() if "experts.1.lora_A" not in name and p.requires_grad]
    said = ("1 of 6", r"experts\.1\.A", "requires_grad")
    refused(model, torch.optim.SGD(held, lr=0.1), ValueError, *said)


class Counting(torch.optim.SGD):
    """Keeps a number of its own in every group."""

    def step(self, closure=None):
        super().step()
        for k, group in enumerate(self.param_groups):
            group["count"] = group.get("count", 0) + k + 1


class Caching(torch.optim.SGD):
    """Steps the parameters that it was made with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mine = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.mine:
            if parameter.grad is not None:
                parameter.sub_(self.param_groups[0]["lr"] * parameter.grad)


@pytest.mark.parametrize(
    ("kind", "said"), [(Counting, "keeps state in its parameter groups"), (Caching, "its own list")]
)
def test_optimizers_that_turn_out_wrong_at_the_first_step(kind, said):
    model, optimizer, _ = started(0, optimizer=kind)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with pytest.raises(RuntimeError, match=said):
        optimizer.step()
    assert len(optimizer.param_groups) == 1
    assert all(p in set(model.parameters()) for p in optimizer.state)
    for name, gradient in gradients.items():
        assert torch.equal(dict(model.named_parameters())[name].grad, gradient)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor"])
def test_steps_too_small_to_be_seen_are_no_error(name):
    """A warm-up's first rates move no entry of a float32 core: that does not mean that the optimizer forgot them."""
    model = Experts(dtype=torch.float32)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-20)
    LoraOver(model, optimizer, SVD())
    expert_loss(model, 0).backward()
    optimizer.step()


@pytest.mark.parametrize("rates", [(0.0, 0.1), (0.0, 0.0)])
def test_a_rate_of_zero_moves_nothing_and_is_no_error(rates):
    """Nor when the optimizer is not torch's own, whose first steps are watched."""

    class Mine(torch.optim.SGD): ...

    model = Experts()
    optimizer = Mine(model.parameters(), lr=0.1)
    LoraOver(model, optimizer, MPO(order=3))
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        before = [p.detach().clone() for p in trainable(model)]
        optimizer.zero_grad()
        expert_loss(model, 0).backward()
        optimizer.step()
        # up to the rounding of an expansion
        moved = [not torch.allclose(p, old, rtol=1e-12) for p, old in zip(trainable(model), before, strict=True)]
        assert all(moved) if rate else not any(moved)


# -- models and arguments -----------------------------------------------------------------------------------------------


def test_model_without_lora():
    model = nn.Sequential(nn.Linear(4, 4))
    said = ("no LoRA matrices", "get_peft_model", "OverParamAdapter")
    refused(model, torch.optim.SGD(model.parameters(), lr=0.1), ValueError, *said)


def test_model_with_frozen_lora_only():
    model = Experts().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(model, optimizer, ValueError, r"experts\.0\.A", "frozen", "requires_grad")


def test_attaching_twice():
    model, optimizer, over = started()
    said = ("attached to these matrices, or to this optimizer, already", r"fold\(\) or detach\(\)")
    with Kept(model, optimizer, over), pytest.raises(ValueError, match=said[0]) as raised:
        LoraOver(model, optimizer, SVD())
    assert re.search(said[1], str(raised.value))
    with Kept(model, optimizer, over), pytest.raises(ValueError, match=said[0]):
        LoraOver(model, torch.optim.SGD(model.parameters(), lr=0.1), SVD())
    over.detach()
    LoraOver(model, optimizer, SVD()).fold()


def test_attaching_after_the_first_handle_was_garbage_collected():
    model = Experts()
    for _ in range(3):
        LoraOver(model, torch.optim.SGD(model.parameters(), lr=0.1), SVD())


def test_folding_twice_does_nothing():
    model, optimizer, over = started()
    first = over.fold()
    with Kept(model, optimizer, over):
        second = over.fold()
    assert first.folded
    assert second.folded == ()
    assert second.trained_parameters == second.lora_parameters


def test_loading_into_one_that_is_folded():
    model, optimizer, over = started()
    state = copy.deepcopy(over.state_dict())
    over.fold()
    with Kept(model, optimizer, over), pytest.raises(RuntimeError, match="folded or detached; attach a new one"):
        over.load_state_dict(state)


@pytest.mark.parametrize("names", [["nothing.A"], ["experts.0.A", "experts.2.A"]])
def test_folding_what_is_not_expanded(names):
    model, optimizer, over = started()
    with (
        Kept(model, optimizer, over),
        pytest.raises(ValueError, match=f"{names[-1]}: not expanded; expanded are experts.0.A"),
    ):
        over.fold(names)


def test_folding_one_name_without_a_list():
    model, optimizer, over = started()
    with (
        Kept(model, optimizer, over),
        pytest.raises(TypeError, match=r"names is 'experts\.0\.A'; give names of matrices in a list"),
    ):
        over.fold("experts.0.A")
    with Kept(model, optimizer, over), pytest.raises(TypeError, match="names has 3 among the names"):
        over.fold(["experts.0.A", 3])


def test_folding_a_name_twice_folds_it_once():
    _, _, over = started()
    assert over.fold(["experts.0.A", "experts.0.A"]).folded == ("experts.0.A",)
    assert over.history[-1].names == ("experts.0.A",)


@pytest.mark.parametrize("order", [1, 0, -2, 2.0, True, "3"])
def test_order_below_two(order):
    with pytest.raises(ValueError, match=r"order=.*at least 2"):
        MPO(order=order)


def test_sites_that_do_not_multiply_to_the_dimension():
    model = Experts()
    sites = MPO(sites=[(2, 3), (2, 4)])  # 4x12: A, not B
    said = ("multiply to 4x12", "the matrix is 6x4", "mapping")
    refused(model, torch.optim.SGD(model.parameters(), lr=0.1), ValueError, *said, factorization=sites)


@pytest.mark.parametrize("rate", [0, -1e-3, float("nan")])
def test_core_lr_that_is_not_positive(rate):
    model = Experts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(model, optimizer, ValueError, "core_lr=.* must be positive", "leave it out", core_lr=rate)


@pytest.mark.parametrize("name", ["core_lr", "core_weight_decay", "max_update"])
@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (True, TypeError, "give a number"),
        ("1e-3", TypeError, "give a number"),
        (float("inf"), ValueError, "is infinite"),
    ],
)
def test_rates_that_are_no_finite_numbers(name, value, error, said):
    model = Experts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(model, optimizer, error, f"{name}={value!r}".replace("'", "."), said, **{name: value})


def test_core_lr_without_a_base():
    model = Experts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    over = LoraOver(model, optimizer, MPO(order=3), core_lr=1e-3)
    expert_loss(model, 0).backward()
    before = everything(model, optimizer, over)
    with pytest.raises(ValueError, match=r"core_lr=0.001 is the rate of the cores at the base rate.*that is 0.0"):
        optimizer.step()
    assert same(before, everything(model, optimizer, over))


@pytest.mark.parametrize("decay", [-0.1, float("nan")])
def test_negative_core_weight_decay(decay):
    model = Experts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(model, optimizer, ValueError, "core_weight_decay", "negative", core_weight_decay=decay)


def test_no_weight_decay_is_one():
    model = Experts()
    LoraOver(model, torch.optim.SGD(model.parameters(), lr=0.1), SVD(), core_weight_decay=0.0)


def test_how_many_names_a_message_shows():
    assert shown([]) == "nothing"
    assert shown(name for name in "abc") == "a, b, c"
    assert shown("abcd") == "a, b, c and 1 more"
    assert shown("abcdef", limit=2) == "a, b and 4 more"


def test_core_weight_decay_of_an_optimizer_without_any():
    class Bare(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

    model = Experts()
    refused(model, Bare(model.parameters()), ValueError, "Bare has no weight_decay", core_weight_decay=0.1)


# -- schedulers ---------------------------------------------------------------------------------------------------------


class Naming(Scheduler):
    """Names what it was told to at one step."""

    def __init__(
        self, at: int, expand: tuple[str, ...] = (), fold: tuple[str, ...] = (), error: Exception | None = None
    ) -> None:
        self.at, self.chosen, self.folded, self.error = at, expand, fold, error

    def select(self, step, matrices):
        if step == self.at and self.error is not None:
            raise self.error
        return self.chosen if step == self.at else ("experts.0.A",) if step == 0 else ()

    def release(self, step, matrices):
        return self.folded if step == self.at else ()


def test_scheduler_that_names_strangers_at_once():
    model = Experts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said = ("Naming selected", "nobody.A", r"not among experts\.0\.A")
    refused(model, optimizer, ValueError, *said, scheduler=Naming(0, ("experts.1.A", "nobody.A")))


@pytest.mark.parametrize(
    ("scheduler", "error", "said"),
    [
        (Naming(3, ("experts.1.A", "nobody.A")), ValueError, "selected nobody.A, which is not among"),
        (Naming(3, ("experts.1.A", "experts.0.A")), ValueError, "selected experts.0.A, which is expanded already"),
        (Naming(3, ("experts.1.A",), fold=("experts.2.A",)), ValueError, "released experts.2.A, which is not expanded"),
        (Naming(3, fold=("experts.0.A",), expand=("nobody.A",)), ValueError, "selected nobody.A"),
        (Naming(3, error=ZeroDivisionError("in select")), ZeroDivisionError, "in select"),
        (Naming(3, "experts.1.A"), TypeError, "what Naming selected is 'experts.1.A'; give names"),
        (Naming(3, None), TypeError, "what Naming selected is None; give names"),
        (Naming(3, fold=None), TypeError, "what Naming released is None; give names"),
        (Naming(3, (["experts.1.A"],)), TypeError, "what Naming selected has a list among the names"),
    ],
)
def test_scheduler_that_goes_wrong_in_mid_run(scheduler, error, said):
    model, optimizer, over = started(2, scheduler)
    with Kept(model, optimizer, over), pytest.raises(error, match=said):
        optimizer.step()
    scheduler.at = None  # and it goes on once that is mended
    optimizer.step()
    assert over.step == 3


# -- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor])
def test_gradients_that_are_not_finite(value, kind):
    model, optimizer, over = started(2, optimizer=kind)
    model.experts[1].lora_B.weight.grad[2, 1] = value
    with (
        Kept(model, optimizer, over),
        pytest.raises(FloatingPointError, match=r"experts\.1\.B.*NaN or infinity.*GradScaler"),
    ):
        optimizer.step()
    optimizer.zero_grad()  # skipping the batch goes on
    expert_loss(model, 2).backward()
    optimizer.step()
    assert over.step == 3


def test_a_first_step_that_fails_does_not_fix_the_base_rate():
    """A schedule that is made after it is still followed: the rate that it starts from is what `core_lr` relates to."""
    model, optimizer, over = started(0, scheduler=Static(), core_lr=1e-3)
    model.experts[1].lora_B.weight.grad[2, 1] = float("nan")
    with Kept(model, optimizer, over), pytest.raises(FloatingPointError, match="NaN or infinity"):
        optimizer.step()
    optimizer.zero_grad()
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    expert_loss(model, 0).backward()
    optimizer.step()
    assert over.core_rate() == pytest.approx(5e-4)


def test_gradients_that_are_not_finite_undo_a_round_of_expansion():
    """Scores, rounds and cores of the step that failed are taken back too."""
    scheduler = TaylorRuntime(top_n=2, split=2, every=2)
    model, optimizer, over = started(3, scheduler)
    assert len(over.expanded) == 2
    broken = over.matrices[over.expanded[0]].parameter
    broken.grad[0, 0] = float("nan")
    with Kept(model, optimizer, over), pytest.raises(FloatingPointError):
        optimizer.step()  # the step of the second round
    assert (over.step, scheduler.rounds_done) == (3, 1)
    optimizer.zero_grad()
    expert_loss(model, 3).backward()
    optimizer.step()
    assert (over.step, scheduler.rounds_done, len(over.expanded)) == (4, 2, 4)


def test_a_score_that_is_not_finite():
    model, optimizer, over = started(1, TaylorRuntime(top_n=1, split=1, every=2))
    model.experts[0].lora_A.weight.grad.fill_(float("nan"))
    with (
        Kept(model, optimizer, over),
        pytest.raises(ValueError, match=r"score of experts\.0\.A is not finite at step 2"),
    ):
        optimizer.step()


def test_matrices_that_are_not_finite_at_attachment():
    model = Experts()
    with torch.no_grad():
        model.experts[1].lora_A.weight[0, 0] = float("inf")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(model, optimizer, ValueError, r"experts\.1\.A holds NaN or infinity", "before attaching")


def test_matrices_that_are_not_finite_at_expansion():
    model, optimizer, over = started(2, Naming(3, ("experts.1.A",)))
    with torch.no_grad():
        model.experts[1].lora_A.weight[0, 0] = float("nan")
    with Kept(model, optimizer, over), pytest.raises(ValueError, match=r"cannot expand experts\.1\.A.*NaN or infinity"):
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_overflow_of_a_grad_scaler_is_skipped(fused):
    scheduler = TaylorRuntime(top_n=3, split=1, every=2)
    model = Experts(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    over = LoraOver(model, optimizer, MPO(order=3), scheduler)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(k: int, spoil: bool = False) -> None:
        optimizer.zero_grad()
        scaler.scale(expert_loss(model, k)).backward()
        if spoil:
            model.experts[0].lora_A.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)

    step(0)
    scaler.update()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = copy.deepcopy(over.state_dict())
    step(1, spoil=True)
    assert same(kept, over.state_dict())
    assert same(before, {name: p.detach() for name, p in model.named_parameters()})
    assert len(optimizer.param_groups) == 1
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    for k in range(2, 6):
        step(k)
        scaler.update()
    assert over.step == 5
    assert len(over.expanded) == 6


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_changes_nothing_else(fused):
    """Powers of two scale exactly: the same cores, scores and gradients as without."""
    runs = []
    for scaled in (False, True):
        scheduler = TaylorRuntime(top_n=2, split=2, every=2)
        model = Experts(dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        over = LoraOver(model, optimizer, MPO(order=3), scheduler)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=scaled)
        for k in range(5):
            optimizer.zero_grad()
            scaler.scale(expert_loss(model, k)).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append((over.state_dict(), [p.detach() for p in trainable(model)], [p.grad for p in trainable(model)]))
    assert same(runs[0], runs[1])


def test_parameters_that_the_optimizer_lost():
    model, optimizer, over = started()
    old = model.experts[0].lora_A.weight
    model.experts[0].lora_A.weight = nn.Parameter(old.detach().clone())
    with pytest.raises(RuntimeError, match=r"parameter of experts\.0\.A any more.*Make a new optimizer"):
        optimizer.step()
    assert over.step == 2


@pytest.mark.parametrize("expanded", [True, False])
def test_parameters_that_were_taken_out_of_the_groups(expanded):
    """Nobody has replaced them: the way out is another one."""
    model, optimizer, over = started()
    if not expanded:
        over.fold(["experts.0.A"])
    (group,) = optimizer.param_groups
    group["params"] = [p for p in group["params"] if p is not model.experts[0].lora_A.weight]
    with pytest.raises(
        RuntimeError, match=r"experts\.0\.A was taken out of the optimizer's groups.*requires_grad_\(False\)"
    ):
        optimizer.step()
    assert over.step == 2


def test_a_pair_with_different_ranks():
    with pytest.raises(ValueError, match=r"rank 4.*rank 3.*agree"):
        OverParamAdapter(nn.Linear(8, 4, bias=False), nn.Linear(3, 8, bias=False))


def test_a_nonfinite_gradient_of_a_plain_matrix() -> None:
    model = llama()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    over = LoraOver(model, optimizer, MPO(order=3), TaylorRuntime(top_n=1, split=1, every=3))
    backward(model, 0)
    name, matrix = list(over.matrices.items())[5]
    assert not matrix.expanded
    matrix.parameter.grad[0, 0] = float("nan")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(FloatingPointError, match=re.escape(name)):
        optimizer.step()
    assert over.step == 0
    assert not over.scheduler.scores()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_scheduler_whose_rounds_are_over_is_not_attached_again() -> None:
    model = llama()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = TaylorRuntime(top_n=1, split=1, every=1)
    over = LoraOver(model, optimizer, MPO(order=3), scheduler)
    backward(model, 0)
    optimizer.step()
    over.fold()
    with pytest.raises(ValueError, match="1 of 1 rounds behind it; make a new one"):
        LoraOver(model, optimizer, MPO(order=3), scheduler)
