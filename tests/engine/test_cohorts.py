"""Which matrices share storage and work, and how changes from outside are noticed cheaply."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Mapping

import peft
import pytest
import torch
from torch import nn

from tnadapt import CP, MPO, LoraOver, OverParamAdapter, Scheduler, TaylorRuntime, Tucker
from tnadapt.engine.cores import Batch, Cohort
from tnadapt.engine.ranks import local_parts, stack_rows, write_rows
from tnadapt.matrices import TrainedMatrix


@pytest.mark.parametrize("factorization", [MPO(order=5), Tucker(), CP()], ids=lambda f: f.label)
def test_transposed_shapes_share_a_cohort_and_train_as_alone(factorization: object) -> None:
    """A [4, 12] and B [12, 4] have the same cores but for what is a row of them; each is trained as by itself."""

    def model() -> OverParamAdapter:
        torch.manual_seed(0)
        layer = OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4, alpha=8).double()
        nn.init.normal_(layer.lora_B.weight)
        return layer

    def run(layer: OverParamAdapter, *groups: list[nn.Parameter]) -> LoraOver:
        optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-2)
        over = LoraOver(layer, optimizer, factorization)
        for k in range(5):
            generator = torch.Generator().manual_seed(k)
            layer(torch.randn(3, 12, generator=generator, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return over

    together, apart = model(), model()
    one = run(together, [together.lora_A.weight, together.lora_B.weight])
    two = run(apart, [apart.lora_A.weight], [apart.lora_B.weight])
    assert (len(one._expanded.now.cohorts), len(two._expanded.now.cohorts)) == (1, 2)
    for name, parameter in together.named_parameters():
        assert torch.allclose(parameter, dict(apart.named_parameters())[name], rtol=1e-10, atol=1e-12), name
    for name, matrix in one.matrices.items():
        cores = one.state_dict()["cores"][name]["cores"]
        assert tuple(tuple(core.shape) for core in cores) == factorization.core_shapes(matrix.shape)
        assert torch.allclose(factorization.fold(cores), matrix.parameter, rtol=1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_rows_are_copies_of_any_shape_and_stride(count: int) -> None:
    tensors = [torch.randn(3, 4), torch.randn(4, 3), torch.randn(4, 3).T][:count]
    rows = stack_rows(tensors)
    assert all(torch.equal(row, t.reshape(-1)) for row, t in zip(rows, tensors, strict=True))
    kept = [t.clone() for t in tensors]
    rows.zero_()
    assert all(map(torch.equal, tensors, kept)), "not the same memory"
    assert [part.shape for part in local_parts(tensors, rows)] == [t.shape for t in tensors]
    write_rows(tensors, torch.arange(12.0).expand(count, 12))
    assert all(torch.equal(t, torch.arange(12.0).view(t.shape)) for t in tensors)


def trained(dtype: torch.dtype = torch.float32) -> tuple[OverParamAdapter, torch.optim.Optimizer, LoraOver]:
    torch.manual_seed(0)
    layer = OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4, alpha=8).to(dtype)
    nn.init.normal_(layer.lora_B.weight)
    optimizer = torch.optim.SGD([layer.lora_A.weight, layer.lora_B.weight], lr=1e-3)
    over = LoraOver(layer, optimizer, MPO(order=3))
    step(layer, optimizer)
    return layer, optimizer, over


def step(layer: OverParamAdapter, optimizer: torch.optim.Optimizer) -> None:
    layer(torch.ones(2, 12, dtype=layer.lora_A.weight.dtype)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_bits_without_meaning_are_no_change() -> None:
    """Zeros changed their signs, which torch counted: looked at in full, and found to be equal."""
    layer, optimizer, over = trained()
    cohort = next(iter(over._expanded.now.cohorts))
    with torch.no_grad():
        for site in cohort.stack.sites:
            site.zero_()
    with torch.no_grad():
        Batch([cohort]).refold()
    with torch.no_grad():
        layer.lora_A.weight.neg_()
    assert cohort.was_written_to()
    assert cohort.edited() is None
    assert over.changed_outside() == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(layer, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_write_that_torch_does_not_count_is_seen_at_the_next_step(dtype: torch.dtype) -> None:
    layer, optimizer, over = trained(dtype)
    cohort = next(iter(over._expanded.now.cohorts))
    assert cohort.edited() is None
    layer.lora_A.weight.data[1, 2] += 0.25
    with pytest.warns(UserWarning, match="^A changed outside") as record:
        step(layer, optimizer)
    assert len(record) == 1


def test_off_the_cpu_a_write_is_followed_before_it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """There matrices are looked at in step 51, and what is found is unfolded in that step: it trains from the new values."""
    layer, optimizer, over = trained()
    for _ in range(49):
        step(layer, optimizer)
    cohort = next(iter(over._expanded.now.cohorts))
    monkeypatch.setattr(cohort, "key", cohort.key._replace(device=torch.device("cuda")))
    layer.lora_A.weight.data.mul_(3)
    layer.lora_B.weight.data.mul_(3)
    wanted = layer.lora_A.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 1e-6
    with pytest.warns(UserWarning, match="^A, B changed outside"):
        step(layer, optimizer)
    assert over.step == 51
    assert float((layer.lora_A.weight - wanted).abs().max()) < 0.01 * float(wanted.abs().max())


def two_adapters() -> nn.Module:
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 12)), peft.LoraConfig(r=4, target_modules=["0"]))
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["0"]))
    return model


def test_switching_adapters_is_said_once() -> None:
    """The matrices of the adapter left behind rest, those of the new one are trained as plain LoRA: neither without a word."""
    model = two_adapters()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_" in n], lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3))
    assert [s.name for s in over.skipped] == ["0.other.A", "0.other.B"]

    def train() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                model(torch.ones(2, 12)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return [str(warning.message) for warning in caught]

    assert train() == []
    kept = {name: matrix.parameter.detach().clone() for name, matrix in over.matrices.items()}
    model.set_adapter("other")
    rest, woken = train()
    assert "0.A, 0.B" in rest
    assert "rest" in rest
    assert "0.other.A, 0.other.B" in woken
    assert "plain LoRA" in woken
    assert all(torch.equal(over.matrices[name].parameter, value) for name, value in kept.items())
    model.set_adapter("default")
    assert train() == []
    assert not all(torch.equal(over.matrices[name].parameter, value) for name, value in kept.items())


def test_no_warning_for_woken_matrices_that_the_optimizer_does_not_hold() -> None:
    model = two_adapters()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "default" in n], lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3))
    over.skipped[0].parameter.requires_grad_(True).grad = torch.ones(4, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(2, 12)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_first_step_is_capped_too(dtype: torch.dtype) -> None:
    """Fresh moments jump furthest there."""
    torch.manual_seed(0)
    layer = OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4, alpha=8).to(dtype)
    nn.init.normal_(layer.lora_B.weight)
    optimizer = torch.optim.AdamW([layer.lora_A.weight, layer.lora_B.weight], lr=1e-1)
    over = LoraOver(layer, optimizer, MPO(order=9), max_update=0.5)
    for _ in range(3):
        step(layer, optimizer)
        norms = over.update_norms()
        assert norms.keys() == over.matrices.keys()
        assert max(norms.values()) <= 0.5 * 1e-1 * 48**0.5 * 1.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [None, 0.1])
def test_a_refold_that_failed_is_made_up_for(
    dtype: torch.dtype, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing fails once, after the step was shortened: the next call writes what a run without failure has."""

    def run(fails: bool) -> tuple[OverParamAdapter, LoraOver]:
        torch.manual_seed(0)
        layer = OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4, alpha=8).to(dtype)
        nn.init.normal_(layer.lora_B.weight)
        optimizer = torch.optim.AdamW([layer.lora_A.weight, layer.lora_B.weight], lr=1e-1)
        over = LoraOver(layer, optimizer, MPO(order=4), max_update=cap)
        step(layer, optimizer)
        if not fails:
            step(layer, optimizer)
            return layer, over
        with monkeypatch.context() as patched:
            patched.setattr(torch, "_foreach_copy_", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
            with pytest.raises(MemoryError, match="full"):
                step(layer, optimizer)
        optimizer.state_dict()
        optimizer.zero_grad()
        return layer, over

    (layer, over), (other, whole) = run(True), run(False)
    for name, parameter in layer.named_parameters():
        assert torch.allclose(parameter, dict(other.named_parameters())[name], rtol=1e-5, atol=1e-6), name
    assert over.update_norms() == pytest.approx(whole.update_norms(), rel=1e-3)
    step(layer, over.optimizer)


def frozen_half(layers: int) -> tuple[nn.ModuleList, torch.optim.Optimizer, LoraOver]:
    torch.manual_seed(0)
    model = nn.ModuleList(OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4, alpha=8) for _ in range(layers))
    for layer in model:
        nn.init.normal_(layer.lora_B.weight)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, optimizer, LoraOver(model, optimizer, MPO(order=5))


def train(model: nn.ModuleList, optimizer: torch.optim.Optimizer, steps: int, rests: str = "") -> None:
    for _ in range(steps):
        sum(layer(torch.ones(2, 12)).square().mean() for layer in model).backward()
        for name, parameter in model.named_parameters():
            if rests and rests in name:
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()


def test_what_rests_is_a_cohort_of_its_own_and_left_alone() -> None:
    """Half of a cohort without gradient: not a cohort per matrix, and not a bit of it changes."""
    model, optimizer, over = frozen_half(4)
    train(model, optimizer, 1, rests="lora_A")
    kept = {n: (p._version, p.detach().clone()) for n, p in model.named_parameters() if "lora_A" in n}
    assert len(kept) == 4
    train(model, optimizer, 3, rests="lora_A")
    assert [len(cohort.pieces) for cohort in over._expanded.now.cohorts] == [1, 1]
    for name, parameter in model.named_parameters():
        if name in kept:
            assert parameter._version == kept[name][0]
            assert torch.equal(parameter, kept[name][1])
    assert sorted(over.update_norms()) == [f"{k}.B" for k in range(4)]
    train(model, optimizer, 1)
    assert sorted(over.update_norms()) == sorted(over.matrices)
    states = over.state_dict()["cores"]
    counts = {name: {float(s["step"]) for s in entry["state"]} for name, entry in states.items()}
    assert counts == {f"{k}.{side}": {1.0 if side == "A" else 5.0} for k in range(4) for side in "AB"}


class InTwoRounds(Scheduler):
    """One half at each of two steps."""

    def __init__(self, first: int, second: int) -> None:
        self.steps = (first, second)

    def select(self, step: int, matrices: Mapping[str, TrainedMatrix]) -> list[str]:
        names = list(matrices)
        half = len(names) // 2
        return {self.steps[0]: names[:half], self.steps[1]: names[half:]}.get(step, [])


@pytest.mark.parametrize(
    ("handover", "cohorts"), [("warm", 1), ("restart", 2)], ids=["with equal step counts", "with others"]
)
def test_later_rounds_join_those_of_equal_step_counts(handover: str, cohorts: int) -> None:
    """Moments that were handed over bring their step count along; the matrices train as if they were in cohorts of their own."""

    def run(*sides: str) -> tuple[nn.ModuleList, LoraOver]:
        model, _, first = frozen_half(2)
        first.detach()
        groups = [[p for n, p in model.named_parameters() if "lora" in n and (not side or side in n)] for side in sides]
        optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-2)
        over = LoraOver(model, optimizer, MPO(order=5), InTwoRounds(2, 4), handover=handover)
        train(model, optimizer, 6)
        return model, over

    (together, one), (apart, two) = run(""), run("0.lora_A", "0.lora_B", "1.lora_A", "1.lora_B")
    assert len(one._expanded.now.cohorts) == cohorts
    assert len(two._expanded.now.cohorts) == 4
    for parameter, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.allclose(parameter, other, rtol=1e-4, atol=1e-6)


def test_step_counts_survive_saving_and_loading() -> None:
    model, optimizer, over = frozen_half(2)
    train(model, optimizer, 2)
    train(model, optimizer, 2, rests="lora_A")
    state = over.state_dict()
    fresh, its_optimizer, other = frozen_half(2)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    for name, entry in other.state_dict()["cores"].items():
        assert {float(s["step"]) for s in entry["state"]} == {2.0 if name.endswith("A") else 4.0}
    train(model, optimizer, 3)
    train(fresh, its_optimizer, 3)
    assert all(map(torch.equal, model.parameters(), fresh.parameters()))


def test_one_cohort_of_different_step_counts_is_refused() -> None:
    """One number cannot count the steps of both."""
    model, optimizer, over = frozen_half(2)
    train(model, optimizer, 2)
    train(model, optimizer, 2, rests="lora_A")
    state = over.state_dict()
    for entry in state["cores"].values():
        entry["cohort"] = 0
    with pytest.raises(ValueError, match="differs in step counts"):
        frozen_half(2)[2].load_state_dict(state)


def test_groups_that_are_merged_keep_step_counts() -> None:
    model, _, first = frozen_half(2)
    first.detach()
    sides = [[p for n, p in model.named_parameters() if side in n] for side in ("lora_A", "lora_B")]
    optimizer = torch.optim.AdamW([{"params": side} for side in sides], lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=5))
    train(model, optimizer, 3, rests="lora_A")
    train(model, optimizer, 1)
    optimizer.param_groups[0]["params"] += optimizer.param_groups.pop()["params"]
    train(model, optimizer, 1)
    assert {cohort.key.group for cohort in over._expanded.now.cohorts} == {0}
    members = over.state_dict()["cores"]
    assert {n: float(e["state"][0]["step"]) for n, e in members.items()} == {"0.A": 2, "1.A": 2, "0.B": 5, "1.B": 5}


def test_following_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, over = frozen_half(2)
    train(model, optimizer, 2)
    parameters = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = parameters[:1]
    optimizer.add_param_group({"params": parameters[1:2]})
    optimizer.add_param_group({"params": parameters[2:]})
    before = over._expanded.now.cohorts
    made = iter([None])

    def second_fails(*args: object) -> Cohort:
        next(made)
        return Cohort(*args)

    with monkeypatch.context() as patched:
        patched.setattr("tnadapt.engine.expanded.Cohort", second_fails)
        with pytest.raises((StopIteration, RuntimeError)):
            train(model, optimizer, 1)
    assert over._expanded.now.cohorts == before
    optimizer.zero_grad()
    train(model, optimizer, 1)
    assert sum(len(cohort.matrices) for cohort in over._expanded.now.cohorts) == 4


def test_precisions_side_by_side() -> None:
    """Matrices in float32 and in bfloat16 both have float32 cores; each is compared in its own precision."""
    model, _, first = frozen_half(2)
    first.detach()
    model[1].to(torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for layer in model:
                layer(torch.ones(2, 12, dtype=layer.lora_A.weight.dtype)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert sorted(len(cohort.matrices) for cohort in over._expanded.now.cohorts) == [2, 2]
    model[0].lora_A.weight.data += 1e-3
    assert over.changed_outside() == ("0.A",)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("old", "new", "of_cores"),
    [
        (torch.float64, torch.float32, torch.float32),
        (torch.float64, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_what_is_trained_goes_on_when_the_model_is_converted(
    old: torch.dtype, new: torch.dtype, of_cores: torch.dtype, fused: bool
) -> None:
    """Cores and moments are converted too, nothing is said of an edit, and step counts go on; torch's fused kernels take these in
    float32 only."""
    torch.manual_seed(0)
    layer = OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4, alpha=8).to(old)
    nn.init.normal_(layer.lora_B.weight)
    optimizer = torch.optim.AdamW([layer.lora_A.weight, layer.lora_B.weight], lr=1e-3, fused=fused)
    over = LoraOver(layer, optimizer, MPO(order=3))
    for _ in range(3):
        step(layer, optimizer)
    layer.to(new)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            step(layer, optimizer)
    entries = over.state_dict()["cores"].values()
    assert {core.dtype for entry in entries for core in entry["cores"]} == {of_cores}
    states = [state for entry in entries for state in entry["state"]]
    assert {state["exp_avg"].dtype for state in states} == {of_cores}
    assert {(float(state["step"]), state["step"].dtype) for state in states} == {(5.0, torch.float32)}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("new", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_is_converted_after_its_last_step_was_not_edited(new: torch.dtype, loaded: bool) -> None:
    """It holds what the cores fold to, rounded; what is written into it then is an edit."""
    layer, _, over = trained()
    if loaded:
        over.load_state_dict(copy.deepcopy(over.state_dict()))
    layer.to(new)
    assert over.changed_outside() == ()
    kept = layer.lora_B.weight.detach().clone()
    with torch.no_grad():
        layer.lora_B.weight[1, 2] += 1
    assert over.changed_outside() == ("B",)
    with torch.no_grad():
        layer.lora_B.weight.copy_(kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        over.fold()


def test_asked_in_inference_mode() -> None:
    layer, optimizer, over = trained()
    other = OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4, alpha=8)
    other.load_state_dict(layer.state_dict())
    its_optimizer = torch.optim.SGD([other.lora_A.weight, other.lora_B.weight], lr=1e-3)
    fresh = LoraOver(other, its_optimizer, MPO(order=3))
    fresh.load_state_dict(over.state_dict())
    with torch.inference_mode():
        assert fresh.changed_outside() == ()
    step(other, its_optimizer)
    step(layer, optimizer)
    assert torch.equal(other.lora_A.weight, layer.lora_A.weight)


@pytest.mark.parametrize("order", [2, 9, 16])
def test_float64_matrices_that_were_only_unfolded_are_not_changed(order: int) -> None:
    torch.manual_seed(order)
    layer = OverParamAdapter.from_linear(nn.Linear(96, 96), rank=8, alpha=8).double()
    nn.init.normal_(layer.lora_B.weight)
    optimizer = torch.optim.SGD([layer.lora_A.weight, layer.lora_B.weight], lr=0.0)
    over = LoraOver(layer, optimizer, MPO(order=order))
    over._expanded.expand(["A", "B"])
    assert over.changed_outside() == ()


def test_detached_cores_need_no_workspace() -> None:
    _, _, over = trained()
    over.detach()
    assert all(cohort.stack._kernel is None for cohort in over._expanded.now.cohorts)
    assert over.state_dict()["cores"].keys() == {"A", "B"}


def test_left_out_weights_are_not_kept_alive() -> None:
    model = two_adapters()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "default" in n], lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3))
    assert over.skipped[0].parameter is not None
    model.delete_adapter("other")
    gc.collect()
    assert over.skipped[0].parameter is None


def test_a_step_that_is_rolled_back_leaves_nothing_to_refold(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, over = frozen_half(2)
    train(model, optimizer, 2)
    versions = [p._version for p in model.parameters()]

    def fails(*_: object) -> None:
        raise RuntimeError("after the cores were lent")

    with monkeypatch.context() as patched:
        patched.setattr(over._step, "_loan_of", fails)
        with pytest.raises(RuntimeError, match="after the cores were lent"):
            train(model, optimizer, 1)
    assert not any(cohort.lent for cohort in over._expanded.now.cohorts)
    optimizer.state_dict()
    assert [p._version for p in model.parameters()] == versions


def test_weights_left_out_for_another_reason_are_not_woken() -> None:
    """LoRA of an embedding is trained as plain LoRA from the start, which attaching said."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(8, 12), nn.Linear(12, 12))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "1"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3))
    assert {s.name for s in over.skipped} == {"0.A", "0.B"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.arange(8)).square().sum().backward()
        assert over.skipped[0].parameter is not None
        assert over.skipped[0].parameter.grad is not None
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_cap_at_a_rate_of_zero_moves_nothing(dtype: torch.dtype) -> None:
    """The first step of a warm-up: `B` is zero and does not move at all, `A` moves by rounding, and neither may move."""
    torch.manual_seed(0)
    layer = OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4, alpha=8).to(dtype)
    optimizer = torch.optim.AdamW([layer.lora_A.weight, layer.lora_B.weight], lr=0.0)
    before = layer.lora_A.weight.detach().clone()
    LoraOver(layer, optimizer, MPO(order=4), max_update=1.0)
    layer(torch.ones(2, 12, dtype=dtype)).square().sum().backward()
    optimizer.step()
    assert torch.allclose(layer.lora_A.weight, before, rtol=1e-5)
    assert torch.equal(layer.lora_B.weight, torch.zeros(12, 4, dtype=dtype))


def test_off_the_cpu_a_counted_write_is_followed_in_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, optimizer, over = trained()
    step(layer, optimizer)
    cohort = next(iter(over._expanded.now.cohorts))
    monkeypatch.setattr(cohort, "key", cohort.key._replace(device=torch.device("cuda")))
    with torch.no_grad():
        layer.lora_A.weight.mul_(3)
        layer.lora_B.weight.mul_(3)
    with pytest.warns(UserWarning, match="^A, B changed outside"):
        step(layer, optimizer)
    assert over.step == 3


@pytest.mark.parametrize("limit", [1, 3])
def test_a_cohort_stacks_no_more_than_its_limit(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expanded in rounds and resumed, matrices fill cohorts up to the limit and train as they do without one."""

    def run(resume: bool) -> tuple[nn.Module, LoraOver]:
        torch.manual_seed(0)
        pairs = [OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4, alpha=8).double() for _ in range(5)]
        for pair in pairs:
            nn.init.normal_(pair.lora_B.weight, std=0.3)
        model = nn.Sequential(*pairs)

        def attach() -> tuple[torch.optim.Optimizer, LoraOver]:
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            return optimizer, LoraOver(model, optimizer, MPO(order=3), TaylorRuntime(top_n=4, split=2, every=2))

        optimizer, over = attach()
        for k in range(8):
            if resume and k == 6:
                saved = copy.deepcopy(optimizer.state_dict())
                over.detach()
                optimizer, over = attach()
                optimizer.load_state_dict(saved)
            generator = torch.Generator().manual_seed(k)
            model(torch.randn(3, 12, generator=generator, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, over

    free, unlimited = run(False)
    key = unlimited._expanded.now.cohorts[0].key
    monkeypatch.setattr("tnadapt.engine.cores.STACK_BYTES", limit * key.size * key.dtype.itemsize)
    for resume in (False, True):
        model, over = run(resume)
        sizes = [len(cohort.matrices) for cohort in over._expanded.now.cohorts]
        assert sum(sizes) == sum(len(c.matrices) for c in unlimited._expanded.now.cohorts) > limit
        assert max(sizes) == limit, sizes
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter, dict(free.named_parameters())[name], rtol=1e-9, atol=1e-11), name
