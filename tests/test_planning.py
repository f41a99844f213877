"""`plan` tells before training what is found after it."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings

import pytest
import torch
from torch import nn

from tnadapt import MPO, SVD, LoraOver, OverParamAdapter, Static, TaylorRuntime, plan


class Net(nn.Module):
    """Adapters of given `(d_in, d_out, rank)`."""

    def __init__(self, *pairs: tuple[int, int, int], device: str = "cpu") -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            OverParamAdapter.from_linear(nn.Linear(d_in, d_out, device=device), rank=rank)
            for d_in, d_out, rank in pairs
        )


def after_training(model: nn.Module, factorization, scheduler, steps: int) -> tuple[int, int]:
    """LoRA parameters and numbers in real tensors that were trained."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    over = LoraOver(model, optimizer, factorization, scheduler)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(layer(torch.ones(1, layer.lora_A.in_features)).sum() for layer in model.layers).backward()
        optimizer.step()
    members = over.state_dict()["cores"]
    cores = sum(core.numel() for entry in members.values() for core in entry["cores"])
    left = sum(m.parameter.numel() for name, m in over.matrices.items() if name not in members)
    assert over.trained_parameters == cores + left
    return over.lora_parameters, cores + left


@pytest.mark.parametrize(
    "factorization", [SVD(), MPO(order=5), MPO(order=5, max_bond=3), MPO(order=3, gauge="identity")]
)
def test_counts_are_those_of_the_tensors(factorization):
    pairs = [(24, 16, 4), (24, 16, 4), (12, 30, 6)]
    expected = plan(Net(*pairs), factorization)
    assert (expected.lora_parameters, expected.trained_parameters) == after_training(
        Net(*pairs), factorization, Static(), 1
    )


@pytest.mark.parametrize("top_n", [1, 2, 3])
def test_counts_with_top_n(top_n):
    pairs = [(24, 16, 4)] * 3
    expected = plan(Net(*pairs), MPO(order=5), top_n=top_n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained = after_training(Net(*pairs), MPO(order=5), TaylorRuntime(top_n=top_n, split=1, every=1), 1)
    assert (expected.lora_parameters, expected.trained_parameters) == trained
    assert [(row.count, row.expanded) for row in expected.rows] == [(3, top_n), (3, top_n)]


def test_planning_changes_nothing():
    model = Net((24, 16, 4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan(model, MPO(order=5))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_llama_3_1_8b_on_the_meta_device():
    """The paper's setting: rank 8 on every linear layer, order 10."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    layers, hidden, kv, wide, r = 32, 4096, 1024, 14336, 8
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        model = peft.get_peft_model(model, peft.LoraConfig(r=r, target_modules="all-linear"), low_cpu_mem_usage=True)
    sizes = {
        "q_proj": (hidden, hidden), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (hidden, hidden),
        "gate_proj": (hidden, wide), "up_proj": (hidden, wide), "down_proj": (wide, hidden),
    }  # fmt: skip
    made = plan(model, MPO(order=10), top_n=9)
    assert len(made.rows) == 14
    assert {(row.count, row.expanded) for row in made.rows} == {(32, 9)}
    assert made.lora_parameters == layers * sum(r * (d_in + d_out) for d_in, d_out in sizes.values())

    def cores(d: int) -> int:
        """Eq. 4 by hand: ends of near-square factors with 2 and 4 columns, eight square cores between."""
        small = max(k for k in range(1, math.isqrt(d) + 1) if d % k == 0)
        first, last = small * 2, d // small * 4
        bond = min(first, last)
        return first * bond + 8 * bond * bond + bond * last

    added = sum(cores(d_in) - r * d_in + cores(d_out) - r * d_out for d_in, d_out in sizes.values())
    assert made.trained_parameters == made.lora_parameters + 9 * added
    assert "14336x8" in str(made)
    assert "4096x8" in str(made)
    assert made.advice == ()


def test_primes_have_little_to_gain():
    made = plan(Net((769, 30, 8)), MPO(order=16))
    [line] = [line for line in made.advice if line.startswith("8x769")]
    assert "little to gain" in line
    assert "1.01x" in line
    assert "769 is prime" in line
    assert "Static with a pattern" in line
    assert not any(line.startswith("30x8") for line in made.advice)


def test_cores_that_a_cap_makes_small_have_the_cap_for_a_cause():
    """36x4 splits into two sites of 12, so an exact SVD of it has twice its parameters, and two of its 12 ranks a third."""
    made = plan(Net((36, 36, 4)), SVD(max_bond=2))
    [line] = [line for line in made.advice if line.startswith("36x4: little")]
    assert "0.33x its parameters (the cores are truncated)" in line
    assert "raise the cap" in line
    assert "split" not in line


def test_dimensions_of_one():
    made = plan(Net((13, 1, 1)), MPO(order=4))
    [one] = [line for line in made.advice if line.startswith("1x1:")]
    assert "all cores but one are single numbers (1 cannot be split and 1 cannot be split)" in one
    [line] = [line for line in made.advice if line.startswith("1x13")]
    assert "little to gain, all cores but one are single numbers (13 is prime and 1 cannot be split)" in line


@pytest.mark.parametrize("n", range(2, 40))
def test_primes_are_named(n):
    """A cap of 1 leaves nothing to gain whatever the shape; why it is little depends on the number."""
    lines = plan(Net((n, 1, 1)), MPO(order=2, max_bond=1)).advice
    [line] = [line for line in lines if line.startswith(f"1x{n}: little")]
    assert (f"{n} is prime" in line) == (n in {2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37})


@pytest.mark.parametrize(
    ("factorization", "shape", "growth"),
    [(SVD(), "16x4", 2.0), (SVD(), "4x24", 5 / 3), (MPO(order=2, max_bond=1), "4x1", None), (SVD(), "17x1", None)],
)
def test_little_to_gain_only_where_it_is_little(factorization, shape, growth):
    """Growths by hand: 16x4 is 8x8 over 8 (a pair of 64s), 4x24 splits into 2x4 and 2x6 (a bond of 8); both are worth it."""
    made = plan(Net((24, 16, 4), (4, 4, 1), (17, 17, 1)), factorization)
    [row] = [row for row in made.rows if "{}x{}".format(*row.structure.shape) == shape]
    little = [line for line in made.advice if line.startswith(f"{shape}: little to gain")]
    if growth is None:
        # a 4x1 cut to two cores of two numbers each: little for its size, and not for being single numbers
        assert len(little) == 1
        assert ("single numbers" in little[0]) == (shape == "17x1")
    else:
        assert row.structure.expansion == pytest.approx(growth)
        assert not little


def test_truncation_is_said():
    made = plan(Net((24, 16, 4)), MPO(order=4, max_bond=2))
    assert sum("frozen residual" in line for line in made.advice) == 2


def test_matrices_that_are_not_expanded_give_no_advice():
    assert plan(Net((24, 16, 4)), MPO(order=4)).advice == ()


def test_skipped_weights_are_said():
    model = Net((24, 16, 4), (24, 16, 4))
    model.layers[0].lora_A.weight.requires_grad_(False)
    made = plan(model, MPO(order=4))
    assert [one.name for one in made.skipped] == ["layers.0.A"]
    assert any("1 LoRA weights are left as they are" in line and "frozen" in line for line in made.advice)


@pytest.mark.parametrize("count", [3, 4, 5])
def test_many_skipped_weights_are_counted(count):
    model = Net(*[(24, 16, 4)] * count)
    for layer in model.layers:
        layer.lora_A.weight.requires_grad_(False)
    [line] = [line for line in plan(model, SVD()).advice if "LoRA weights" in line]
    assert line.startswith(f"{count} LoRA weights are left")
    assert [f"layers.{k}.A" in line for k in range(count)] == [True] * 3 + [False] * (count - 3)
    assert re.findall(r"and (-?\d+) more", line) == ([] if count == 3 else [str(count - 3)])


def test_a_plan_cannot_be_changed():
    made = plan(Net((24, 16, 4)), SVD())
    for one, name in ((made, "rows"), (made.rows[0], "count"), (made.rows[0].structure, "shape")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, name, None)


def test_layout_of_the_table():
    """Columns under dashes as wide as their widest cell, names to the left and numbers to the right; advice after a blank line."""
    made = plan(Net((24, 16, 4), (769, 30, 8)), MPO(order=5))
    lines = str(made).splitlines()
    first = lines.index("") + 1
    table, rest = lines[first : first + 2 + len(made.rows)], lines[first + 2 + len(made.rows) :]
    spans = [match.span() for match in re.finditer("-+", table[1])]
    columns = [[line[a:b] for line in (table[0], *table[2:])] for a, b in spans]
    for k, ((a, b), cells) in enumerate(zip(spans, columns, strict=True)):
        assert max(len(cell.strip()) for cell in cells) == b - a
        assert all(cell == (cell.strip().ljust(b - a) if k == 0 else cell.strip().rjust(b - a)) for cell in cells)
    assert len({len(line) for line in table}) == 1
    assert made.advice
    assert rest == ["", *(f"- {line}" for line in made.advice)]
    quiet = str(plan(Net((24, 16, 4)), SVD()))
    assert quiet.splitlines()[-1].startswith("layers.*.B")


def test_table():
    text = str(plan(Net((24, 16, 4), (24, 16, 4)), MPO(order=5), top_n=1))
    lines = text.splitlines()
    trained = plan(Net((24, 16, 4), (24, 16, 4)), MPO(order=5), top_n=1).trained_parameters
    assert lines[0] == f"MPO(order=5): 320 parameters in the matrices, {trained:,} trained ({trained / 320:.2f}x)"
    [row] = [line for line in lines if line.startswith("layers.*.B")]
    structure = MPO(order=5).structure((16, 4))
    assert row.split()[1:4] == ["2", "16x4", "1"]
    assert f"64 -> {structure.num_parameters:,}" in row
    assert f"{structure.expansion:.2f}x" in row


def test_groups_of_ones_own():
    made = plan(Net((24, 16, 4), (24, 16, 4)), SVD(), top_n=1, groups=lambda matrix: "all")
    assert sum(row.expanded for row in made.rows) == 1
    assert sum(row.count for row in made.rows) == 4


@pytest.mark.parametrize("top_n", [0, -3, True])
def test_bad_top_n(top_n):
    with pytest.raises(ValueError, match=f"top_n={top_n} must be at least 1"):
        plan(Net((24, 16, 4)), SVD(), top_n=top_n)


def test_nothing_to_plan():
    with pytest.raises(ValueError, match=r"no LoRA matrices that can be expanded.*no lora_A/lora_B pair"):
        plan(nn.Linear(3, 3), SVD())
    model = Net((24, 16, 4)).requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        plan(model, SVD())


def test_sites_that_do_not_fit():
    with pytest.raises(ValueError, match="multiply to"):
        plan(Net((24, 16, 4)), MPO(sites=[(2, 3), (2, 4)]))
