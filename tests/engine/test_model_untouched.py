"""The model is plain LoRA before, during and after: nobody who looks at it, or at the optimizer, sees cores."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

from tnadapt import MPO, LoraOver, Static, TaylorRuntime

from .models import adapters, backward, base_llama, llama, loss_of, same, tokens, train, trainable, when_lent

STEPS = 6


def attached(**options):
    model = options.pop("model", None) or llama()
    optimizer = options.pop("optimizer", None) or torch.optim.AdamW(trainable(model), lr=3e-3)
    scheduler = options.pop("scheduler", None) or TaylorRuntime(top_n=2, split=2, every=2)
    return model, optimizer, LoraOver(model, optimizer, MPO(order=4), scheduler, **options)


def look(model: nn.Module) -> dict:
    """Everything that a model shows of its structure."""
    return {
        "parameters": [
            (name, id(p), type(p), p.shape, p.dtype, p.is_leaf, p.requires_grad) for name, p in model.named_parameters()
        ],
        "buffers": [(name, id(b)) for name, b in model.named_buffers()],
        "modules": [(name, id(m), type(m)) for name, m in model.named_modules()],
        "keys": list(model.state_dict()),
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "memory": [p.data_ptr() for p in model.parameters()],
    }


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tokens(999)).logits


def test_objects_names_and_keys_are_the_same_throughout():
    model = llama()
    before, start = look(model), logits(model)
    model, optimizer, over = attached(model=model)
    assert look(model) == before
    assert torch.equal(logits(model), start)
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1))
        assert look(model) == before
    assert len(over.expanded) == len(over.matrices)
    end = logits(model)
    over.fold()
    assert look(model) == before
    assert torch.equal(logits(model), end)


def test_frozen_parameters_do_not_move():
    model, optimizer, _ = attached(scheduler=Static())
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(model, optimizer, range(3))
    assert same(frozen, {name: p.detach() for name, p in model.named_parameters() if name in frozen})


def test_expanding_alone_moves_nothing():
    """Cores that are not stepped (rate 0) fold to the matrix they came from."""
    model, optimizer, over = attached(scheduler=Static(), optimizer=None)
    start = logits(model)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, range(2))
    assert over.step == 2
    assert len(over._expanded.now.cohorts) > 0
    assert torch.allclose(logits(model), start, rtol=0, atol=1e-5)


def test_saved_adapters_load_into_stock_peft(tmp_path):
    model, optimizer, over = attached(model=llama(zero_start=True))
    for step in range(STEPS):
        folder = tmp_path / str(step)
        model.save_pretrained(folder)
        stock = PeftModel.from_pretrained(base_llama(), folder)
        assert torch.equal(logits(stock), logits(model)), f"step {step}"
        assert torch.equal(logits(stock.merge_and_unload()), logits(copy.deepcopy(model).merge_and_unload()))
        train(model, optimizer, range(step, step + 1))
    over.fold()
    model.save_pretrained(tmp_path / "end")
    assert torch.equal(logits(PeftModel.from_pretrained(base_llama(), tmp_path / "end")), logits(model))


def llama_loss(model: nn.Module, step: int) -> torch.Tensor:
    return loss_of(model(input_ids=tokens(step)).logits, tokens(step))


def layer_loss(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (model(x) - x.roll(1, 1)).square().mean()


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        pytest.param(lambda: nn.Sequential(*adapters(12)), layer_loss, id="one layer"),
        pytest.param(
            lambda: llama(layers=1),
            llama_loss,
            marks=pytest.mark.skipif(
                not hasattr(torch.compiler, "is_exporting"),
                reason="compiled transformers ask for torch.compiler.is_exporting, of torch 2.7 and later",
            ),
            id="Llama",
        ),
    ],
)
def test_a_compiled_model_is_not_compiled_anew_at_expansion(make, loss):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def train(steps):
        for step in steps:
            optimizer.zero_grad()
            loss(compiled, step).backward()
            optimizer.step()

    torch._dynamo.reset()
    model = make()
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-3)
    over = LoraOver(compiled, optimizer, MPO(order=4), TaylorRuntime(top_n=1, split=1, every=4))
    train(range(3))  # before any expansion
    assert over.expanded == ()
    count = len(graphs)
    assert count > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        train(range(3, 7))
        assert len(over.expanded) == len(over.matrices)
        over.fold()
        train(range(7, 9))
    assert len(graphs) == count


def test_gradients_are_given_back():
    model, optimizer, _ = attached(scheduler=Static())
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        before = {name: (id(p.grad), p.grad.clone()) for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert id(parameter.grad) == before[name][0]
                assert torch.equal(parameter.grad, before[name][1])


def test_gradients_are_hidden_from_the_optimizer_while_it_steps():
    """It must not move the matrices itself, nor keep moments of them."""
    model, optimizer, over = attached(scheduler=Static(r"q_proj\.A$"))
    train(model, optimizer, range(2))
    held = {id(over.matrices[name].parameter) for name in over.expanded}
    assert held
    assert not held & {id(p) for p in optimizer.state}
    assert len(optimizer.state) == len(over.matrices) - len(over.expanded)


def groups(optimizer) -> list:
    return [{k: [id(p) for p in v] if k == "params" else v for k, v in g.items()} for g in optimizer.param_groups]


def test_groups_are_the_users_outside_steps():
    model = llama()
    sides = [[p for name, p in model.named_parameters() if f"lora_{side}" in name] for side in "AB"]
    optimizer = torch.optim.AdamW([{"params": sides[0]}, {"params": sides[1], "lr": 1e-2}], lr=1e-3)
    before, during = groups(optimizer), []
    model, optimizer, over = attached(model=model, optimizer=optimizer)
    when_lent(over, lambda: during.append(len(optimizer.param_groups)))
    for step in range(STEPS):
        train(model, optimizer, range(step, step + 1))
        assert groups(optimizer) == before
        assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}
        saved = optimizer.state_dict()
        assert [len(g["params"]) for g in saved["param_groups"]] == [14, 14]
        assert all(isinstance(key, int) and key < 28 for key in saved["state"])
    assert max(during) > 2, "cores are in groups of their own while the optimizer steps"
    over.fold()
    assert "tnadapt" not in optimizer.state_dict()


SCHEDULES = {
    "LambdaLR": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "lambda per group": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda s: 0.5**s, lambda s: 0.9**s]
    ),
    "OneCycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS + 1),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_schedules(name, when):
    """Made before or after attaching: rates of the groups are those of a plain run, and cores follow their group."""
    rates, core_rates = {}, []
    for kind in ("plain", "over"):
        model = llama(layers=1)
        sides = [[p for name, p in model.named_parameters() if f"lora_{side}" in name] for side in "AB"]
        optimizer = torch.optim.AdamW([{"params": sides[0]}, {"params": sides[1], "lr": 1e-2}], lr=1e-3)
        schedule = SCHEDULES[name](optimizer) if when == "before" else None
        if kind == "over":
            *_, over = attached(model=model, optimizer=optimizer, scheduler=Static(), core_lr=2e-3)
            when_lent(over, lambda o=optimizer: core_rates.append([g["lr"] for g in o.param_groups]))
        schedule = schedule or SCHEDULES[name](optimizer)
        rates[kind] = []
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, step)
            rates[kind].append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
    assert rates["plain"] == rates["over"]
    assert len(rates["plain"]) == len(core_rates) == STEPS
    for mine, lent in zip(rates["over"], core_rates, strict=True):
        ratio = 2e-3 / (1e-2 if name == "OneCycle" else 1e-3)  # the peak of the schedule, or the initial rate
        assert lent[:2] == mine
        assert {round(rate / ratio, 12) for rate in lent[2:]} == {round(rate, 12) for rate in mine}


def test_the_rate_of_the_cores_is_told():
    model, optimizer, over = attached(scheduler=Static(), core_lr=1e-3)
    assert over.core_rate() is None
    train(model, optimizer, range(1))
    assert over.core_rate() == pytest.approx(1e-3)
    norms = over.update_norms()
    train(model, optimizer, range(1, 2))
    assert norms.keys() <= over.update_norms().keys() == over.matrices.keys()
    assert all(norm > 0 for norm in over.update_norms().values())


def test_update_norms_are_those_of_the_matrices():
    model, optimizer, over = attached(scheduler=Static())
    train(model, optimizer, range(2))
    before = {name: m.parameter.detach().clone() for name, m in over.matrices.items()}
    train(model, optimizer, range(2, 3))
    for name, norm in over.update_norms().items():
        assert norm == pytest.approx(float((over.matrices[name].parameter - before[name]).norm()), rel=1e-3)


def test_named_parameters():
    model = llama()
    optimizer = torch.optim.AdamW([(name, p) for name, p in model.named_parameters() if p.requires_grad], lr=3e-3)
    model, optimizer, over = attached(model=model, optimizer=optimizer)
    names = list(optimizer.param_groups[0]["param_names"])
    train(model, optimizer, range(3))
    assert over.expanded
    assert optimizer.param_groups[0]["param_names"] == names
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(3, 4))
    optimizer.load_state_dict(state)
    train(model, optimizer, range(3, 4))


def test_a_copy_of_the_optimizer_is_refused():
    """It would have no hooks, and train plain LoRA without a word."""
    model, optimizer, over = attached(scheduler=Static())
    train(model, optimizer, range(2))
    with pytest.raises(TypeError, match=r"a copy of it would train them without cores.*attach a LoraOver to both"):
        copy.deepcopy((model, optimizer))
    over.detach()
    copied = copy.deepcopy(optimizer)
    assert "tnadapt" not in copied.state_dict()
    assert groups(copied)[0].keys() == groups(optimizer)[0].keys()


def test_a_copy_of_the_model_is_plain():
    model, optimizer, _ = attached(scheduler=Static())
    train(model, optimizer, range(1))
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    before = logits(copied)
    train(model, optimizer, range(1, 2))
    assert torch.equal(logits(copied), before)
