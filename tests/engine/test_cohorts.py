"""Which matrices share storage and work, and how changes from outside are noticed cheaply."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tnadapt import CP, MPO, LoraOver, OverParamAdapter, Tucker
from tnadapt.engine.tensors import checksums, local_parts, stack_rows, write_rows


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
    assert (len(one._engine.cohorts), len(two._engine.cohorts)) == (1, 2)
    for name, parameter in together.named_parameters():
        assert torch.allclose(parameter, dict(apart.named_parameters())[name], rtol=1e-10, atol=1e-12), name
    for name, matrix in one.matrices.items():
        cores = one.state_dict()["engine"]["members"][name]["cores"]
        assert tuple(tuple(core.shape) for core in cores) == factorization.core_shapes(matrix.shape)
        assert torch.allclose(factorization.fold(cores), matrix.parameter, rtol=1e-12)


@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    n=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_a_change_of_one_entry_changes_its_checksum(
    shape: tuple[int, int], n: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    rows = torch.randn(n, shape[0] * shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    before = checksums(rows)
    assert torch.equal(checksums(rows.clone()), before)
    m, entry = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, rows.shape[1] - 1))
    kind = data.draw(st.sampled_from(["negated", "nearest", "nan"]))
    old = rows[m, entry].clone()
    rows[m, entry] = {"negated": -old, "nearest": torch.nextafter(old, 2 * old), "nan": old * float("nan")}[kind]
    assert (checksums(rows) != before).tolist() == [k == m for k in range(n)]


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
    """Zero changed its sign: suspected, and found to be equal."""
    layer, optimizer, over = trained()
    cohort = next(iter(over._engine.cohorts.values()))
    with torch.no_grad():
        for site in cohort.stacked(cohort.buffer):
            site.zero_()
    cohort.stepped = True
    over._engine.refold()
    layer.lora_A.weight.data.neg_()
    assert over._engine.may_be_changed(cohort).any()
    assert over.changed_outside() == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(layer, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_write_that_torch_does_not_count_is_seen_at_the_next_step(dtype: torch.dtype) -> None:
    layer, optimizer, over = trained(dtype)
    cohort = next(iter(over._engine.cohorts.values()))
    assert not over._engine.may_be_changed(cohort).any()
    layer.lora_A.weight.data[1, 2] += 0.25
    with pytest.warns(UserWarning, match="^A changed outside") as record:
        step(layer, optimizer)
    assert len(record) == 1


def test_what_checksums_miss_is_seen_by_the_exact_comparison() -> None:
    """Entries changed places without torch counting the write: a checkpoint and fold() compare values."""
    layer, _, over = trained()
    values = layer.lora_A.weight.data.clone()
    layer.lora_A.weight.data.copy_(values.roll(2, dims=1))
    assert len(over.changed_outside()) == 1


def test_no_copy_of_matrices_that_tell_what_was_written() -> None:
    _, _, over = trained()
    assert all(cohort.written is None for cohort in over._engine.cohorts.values())
    _, _, low = trained(torch.bfloat16)
    assert all(cohort.written is not None for cohort in low._engine.cohorts.values())


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


def test_a_switch_that_the_optimizer_does_not_step_is_nobodys_business() -> None:
    model = two_adapters()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "default" in n], lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=3))
    over.skipped[0].parameter.requires_grad_(True).grad = torch.ones(4, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(2, 12)).square().sum().backward()
        optimizer.step()
