"""What `plan(...).costs()` says, against numbers that are counted by hand and against tensors that are really there."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tnadapt import CP, MPO, SVD, LoraOver, OverParamAdapter, TaylorRuntime, TensorRing, Tucker, plan
from tnadapt.costs import _bytes
from tnadapt.engine.owners import deal

SIZE, RANK, LAYERS = 768, 8, 4
MATRIX = SIZE * RANK
#: 768x8 at order 9 has the sites (24, 2), seven 1x1, (32, 4) and so bonds of min(48, 128) = 48; the sweep begins at the side of 48
CORES = 48 * 48 + 7 * 48 * 48 + 48 * 128
FOLD = 2 * (7 * 48 * 48 * 48 + 48 * 48 * 128)
SVD_FLOPS = 6 * 128 * 48**2 + 20 * 48**3


def model(layers: int = LAYERS, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.ModuleList(
        OverParamAdapter.from_linear(nn.Linear(SIZE, SIZE, bias=False, device="meta"), rank=RANK).to(dtype)
        for _ in range(layers)
    )


def costs(layers: int = LAYERS, factorization=None, dtype: torch.dtype = torch.float32, top_n=None, **options):
    options.setdefault("decompose_rate", 1e9)
    return plan(model(layers, dtype), factorization or MPO(order=9), top_n).costs(**options)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_of_one_rank_counted_by_hand():
    found, count = costs().memory, 2 * LAYERS
    assert found.cores == 4 * count * CORES
    assert found.optimizer_state == 2 * found.cores
    assert found.gradients_and_prefixes == found.cores  # 1x1 sites: a prefix is as large as the core that it ends at
    assert found.copies == 4 * count * MATRIX
    assert found.scratch == 4 * count * (2 * MATRIX + 2 * 48 * 48)  # A and B are one cohort
    assert (found.residuals, found.messages) == (0, 0)
    assert found.spared == 2 * found.copies
    assert found.total == 4 * count * (4 * CORES + MATRIX + 2 * MATRIX + 2 * 48 * 48 - 2 * MATRIX)


@pytest.mark.parametrize(("order", "squares"), [(2, 0), (3, 1), (4, 2), (16, 2)])
def test_scratch_has_two_squares_of_the_bond_from_order_four(order, squares):
    assert costs(factorization=MPO(order=order)).memory.scratch == 8 * 4 * (2 * MATRIX + squares * 48 * 48)


def test_matrices_of_low_precision_have_cores_of_float32():
    found, wide = costs(dtype=torch.bfloat16).memory, costs().memory
    assert (found.cores, found.scratch) == (wide.cores, wide.scratch)
    assert (2 * found.copies, 2 * found.spared) == (wide.copies, wide.spared)
    assert costs(dtype=torch.float64).memory.cores == 2 * wide.cores


def test_what_a_truncated_factorization_misses_is_kept():
    assert costs(factorization=MPO(order=4, max_bond=5)).memory.residuals == 4 * 8 * MATRIX


def test_prefixes_that_are_larger_than_their_cores_count():
    """768x8 in the sites (8, 2), (1, 1), (8, 2), (12, 2) with bonds of 4: cores of 16x4, 4x4, 4x16x4 and 4x24 numbers. From the left,
    which is cheaper, the prefix of two sites is 16x4 and that of three 16x16x4; each is larger than the core that it ends at."""
    sites = {(768, 8): [(8, 2), (1, 1), (8, 2), (12, 2)], (8, 768): [(2, 8), (1, 1), (2, 8), (2, 12)]}
    found = costs(factorization=MPO(sites=sites, max_bond=4)).memory
    assert found.cores == 4 * 8 * (16 * 4 + 4 * 4 + 4 * 16 * 4 + 4 * 24)
    assert found.gradients_and_prefixes == 4 * 8 * (16 * 4 + 16 * 4 + 16 * 16 * 4 + 4 * 24)


@pytest.mark.parametrize(
    "factorization", [SVD(), MPO(order=5), Tucker(order=3, max_rank=3), CP(rank=4), TensorRing(order=4)]
)
@pytest.mark.parametrize("state", [0, 1, 2])
def test_cores_and_state_are_those_of_a_run(factorization, state):
    torch.manual_seed(0)
    net = nn.ModuleList(OverParamAdapter.from_linear(nn.Linear(24, 16), rank=4) for _ in range(3))
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = {
        0: lambda: torch.optim.SGD(parameters, lr=1e-3),
        1: lambda: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
        2: lambda: torch.optim.AdamW(parameters, lr=1e-3),
    }[state]()
    over = LoraOver(net, optimizer, factorization)
    sum(layer(torch.ones(1, 24)).sum() for layer in net).backward()
    optimizer.step()
    found = plan(net, factorization).costs(optimizer_state=state, decompose_rate=1.0).memory
    members = over.state_dict()["cores"].values()
    assert found.cores == sum(core.nbytes for entry in members for core in entry["cores"])
    tensors = [v for entry in members for one in entry["state"] for v in one.values() if isinstance(v, torch.Tensor)]
    assert found.optimizer_state == sum(tensor.nbytes for tensor in tensors if tensor.dim())
    assert found.residuals == sum(e["residual"].nbytes for e in members if e["residual"] is not None)


def test_only_what_is_expanded_is_counted():
    assert costs(top_n=1).memory == costs(layers=1).memory
    assert costs(top_n=TaylorRuntime(top_n=2, split=1, every=1)).flops == costs(layers=2).flops


# -- several ranks ----------------------------------------------------------------------------------------------------


def test_cores_fall_with_the_ranks_that_they_are_dealt_to():
    whole = costs().memory
    for ranks in (1, 2, 4, 8):
        found = costs(ranks=ranks, shard=True)
        assert ranks * found.memory.cores == whole.cores
        assert ranks * found.memory.gradients_and_prefixes == whole.gradients_and_prefixes
        assert ranks * found.memory.copies == whole.copies
        assert ranks * found.memory.scratch == whole.scratch
        assert costs(ranks=ranks).memory == whole
        assert ranks * found.flops == costs(ranks=ranks).flops
        assert ranks * found.expansion.flops == costs(ranks=ranks).expansion.flops
    # 8 matrices on 3 ranks: 3, 3 and 2; more ranks than matrices: one
    assert 8 * costs(ranks=3, shard=True).memory.cores == 3 * whole.cores
    assert 8 * costs(ranks=100, shard=True).memory.cores == whole.cores


def test_messages_counted_by_hand():
    """Four ranks with two of the eight matrices each: its own message, and the same again as it is sent; those of four ranks, as the
    backend receives them and as it gives them back. On three ranks messages are of three matrices. Under FSDP2 the six matrices of
    others, of one size, are stacked twice beside what all ranks have sent, and this rank's quarter of them is made."""
    assert costs(ranks=4, shard=True).memory.messages == 4 * MATRIX * (2 + 2 + 4 * 2 + 4 * 2)
    three = costs(ranks=3, shard=True)
    assert three.memory.messages == 4 * MATRIX * (3 + 3 + 3 * 3 + 3 * 3)
    assert three.sent.broadcast == 3 * 3 * MATRIX
    # they come when the scratch of the contraction is free again
    held = costs(ranks=4, shard=True).memory
    assert held.total == 4 * (2 * 4 * CORES + 2 * MATRIX - 2 * 8 * MATRIX) + held.messages
    fsdp = costs(ranks=4, shard=True, engine="fsdp2").memory
    assert fsdp.copies == 4 * (2 * MATRIX + 6 * MATRIX // 4)
    assert fsdp.messages == 4 * (4 * 2 * MATRIX + 2 * 6 * MATRIX + 6 * MATRIX // 4)


def test_the_rank_with_the_longest_message_decides_what_is_sent():
    """Layers of 768 and of 96 have two matrices each. On four ranks everybody owns one, and all messages are as long as those of 768."""
    layers = [OverParamAdapter.from_linear(nn.Linear(size, size, bias=False), rank=RANK) for size in (SIZE, 96)]
    sent = plan(nn.ModuleList(layers), SVD()).costs(ranks=4, shard=True, decompose_rate=1e9).sent
    assert sent.broadcast_bytes == 4 * 4 * MATRIX
    assert sent.plain == 2 * MATRIX + 2 * 96 * RANK


def test_what_is_sent_counted_by_hand():
    count = 2 * LAYERS * MATRIX
    for engine, shard, gathered, broadcast in (
        ("ddp", False, 0, 0),
        ("ddp", True, 0, count),
        ("fsdp2", False, count, 0),
        ("fsdp2", True, count, count),
    ):
        sent = costs(ranks=2, engine=engine, shard=shard, dtype=torch.bfloat16).sent
        assert (sent.gathered, sent.broadcast, sent.plain) == (gathered, broadcast, count)
        assert (sent.gathered_bytes, sent.broadcast_bytes, sent.plain_bytes) == (2 * gathered, 2 * broadcast, 2 * count)
        assert sent.added <= 2 * sent.plain
        alone = costs(ranks=1, engine=engine, shard=shard).sent
        assert alone.added == alone.plain == 0
    assert (
        costs(ranks=2, engine="fsdp2", top_n=1).sent.added == 2 * MATRIX
    )  # gradients of what is not expanded stay shards


def test_fsdp_divides_what_plain_lora_has():
    ddp, fsdp = costs(ranks=4), costs(ranks=4, engine="fsdp2")
    for name, numbers in (("plain_bytes", 4 * 2 * LAYERS * MATRIX), ("base_bytes", LAYERS * SIZE * SIZE)):
        assert getattr(ddp, name) == 4 * numbers
        assert getattr(fsdp, name) == numbers
    assert 4 * fsdp.memory.spared == ddp.memory.spared
    assert fsdp.memory.cores == ddp.memory.cores


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 3))
def test_the_fullest_owner_is_within_four_thirds_of_the_best_assignment(sizes, ranks):
    """Graham's bound of the largest-first rule, 4/3 - 1/(3 R), against all assignments: memory of a rank is not far from the least."""

    def most(chosen):
        return max(sum(s for s, owner in zip(sizes, chosen, strict=True) if owner == rank) for rank in range(ranks))

    best = min(most(chosen) for chosen in itertools.product(range(ranks), repeat=len(sizes)))
    dealt = deal([str(k) for k in range(len(sizes))], {}, {str(k): size for k, size in enumerate(sizes)}, ranks)
    assert 3 * ranks * most([dealt[str(k)] for k in range(len(sizes))]) <= (4 * ranks - 1) * best


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_a_step_folds_once_and_pulls_back_for_twice_that():
    assert costs().flops == 8 * 3 * FOLD


def test_the_model_multiplies_frozen_weights_twice_and_trained_ones_three_times():
    """Two flops for each weight and token: forward, gradient of the input; of a trained weight also its own."""
    found = costs(tokens_per_step=1000, ranks=2)
    assert found.model_flops == 1000 * (4 * LAYERS * SIZE * SIZE + 6 * 2 * LAYERS * MATRIX) // 2
    assert found.ratio == pytest.approx(found.flops / found.model_flops)
    assert costs().model_flops is None
    assert costs().ratio is None


def test_embeddings_are_looked_up_and_heads_multiply():
    """A tied head multiplies by the embedding's numbers, which are stored once. Of vectors and scalars nothing is multiplied."""

    class Net(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, SIZE).requires_grad_(False)
            self.norm = nn.LayerNorm(SIZE).requires_grad_(False)
            self.layer = OverParamAdapter.from_linear(nn.Linear(SIZE, SIZE, bias=False), rank=RANK)
            self.head = nn.Linear(SIZE, 50, bias=False).requires_grad_(False)
            if tied:
                self.head.weight = self.embedding.weight

    for tied in (True, False):
        size = plan(Net(tied), SVD()).model
        assert size.frozen == SIZE * SIZE + 50 * SIZE
        assert size.trained == size.trained_numbers == 2 * MATRIX
        assert size.frozen_bytes == 4 * (SIZE * SIZE + (1 if tied else 2) * 50 * SIZE + 2 * SIZE)


def test_a_packed_weight_multiplies_as_many_numbers_as_it_stands_for():
    """As bitsandbytes packs four bits: two numbers a byte, and the layer knows its dimensions."""
    net = model(1)
    base = next(m for m in net.modules() if isinstance(m, nn.Linear) and m.out_features == m.in_features)
    base.weight = nn.Parameter(torch.empty(SIZE * SIZE // 2, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
    size = plan(net, SVD()).model
    assert size.frozen == SIZE * SIZE
    assert size.frozen_bytes == SIZE * SIZE // 2


# -- expanding --------------------------------------------------------------------------------------------------------


def test_time_to_expand_is_arithmetic_over_the_rate():
    found = costs(decompose_rate=2e9).expansion
    assert found.flops == 8 * SVD_FLOPS
    assert found.seconds == pytest.approx(8 * SVD_FLOPS / 2e9)
    assert not found.measured
    assert found.handover_flops == 33 * costs().flops


def test_without_a_rate_it_is_measured():
    found = costs(decompose_rate=None).expansion
    assert found.measured
    assert 0 < found.seconds < 60
    assert found.seconds == pytest.approx(found.flops / found.rate)


def test_a_gauge_without_decompositions_takes_no_time_for_them():
    found = costs(factorization=MPO(order=9, gauge="identity"), decompose_rate=None).expansion
    assert (found.flops, found.seconds) == (0, 0)


# -- shown, and refused -----------------------------------------------------------------------------------------------


def test_what_is_printed_is_what_is_known():
    found = costs(ranks=4, engine="fsdp2", shard=True, tokens_per_step=4096)
    text = str(found)
    assert text.startswith("4 ranks, FSDP2, each matrix's cores on one rank:")
    assert f"{found.sent.added:,} numbers" in text
    assert f"{found.memory.total / 2**20:,.1f} MiB" in text
    assert re.search(r"of the model's arithmetic +[\d.]+% of", text)
    assert "as measured here" not in text
    assert "sent in a step" not in str(costs())
    data = found.as_data()
    assert json.loads(json.dumps(data)) == data
    assert data["memory_bytes"]["total"] == found.memory.total
    assert data["sent"]["added"] == found.sent.gathered + found.sent.broadcast
    assert data["ratio"] == found.ratio


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 0}, "ranks=0: give a whole number of at least 1"),
        ({"ranks": 2.0}, r"ranks=2\.0"),
        ({"tokens_per_step": 0}, "tokens_per_step=0"),
        ({"optimizer_state": -1}, "optimizer_state=-1"),
        ({"engine": "fsdp1"}, "engine='fsdp1' is unknown; choose one of ddp, fsdp2"),
        ({"decompose_rate": 0.0}, r"decompose_rate=0\.0"),
        ({"decompose_rate": math.nan}, "decompose_rate=nan"),
    ],
)
def test_numbers_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        costs(**options)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(-3, "0.0 MiB"), (0, "0.0 MiB"), (-(2**20), "-1.0 MiB"), (3 * 2**29, "1.50 GiB"), (-3 * 2**30, "-3.00 GiB")],
)
def test_bytes_are_shown_without_a_sign_where_nothing_is_left(count: int, shown: str) -> None:
    assert _bytes(count) == shown
