"""TT-LoRA: the layer against a dense tensor train that is contracted by one einsum."""

from __future__ import annotations

import math
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tnadapt import MPO, OverParamAdapter, TTLoraLinear

MODES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
SHAPES = st.tuples(MODES, MODES)


def largest_rank(shape) -> int:
    """Of all bonds at full rank."""
    modes = (*shape[0], *shape[1])
    return max(min(math.prod(modes[:k]), math.prod(modes[k:])) for k in range(1, len(modes)))


@st.composite
def shapes_and_ranks(draw):
    shape = draw(SHAPES)
    return shape, draw(st.integers(1, min(6, largest_rank(shape))))


EPS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def layer(shape, rank: int, dtype: torch.dtype = torch.float64, seed: int = 0, **options) -> TTLoraLinear:
    """A layer with random cores of norms that keep `dW` near 1."""
    torch.manual_seed(seed)
    base = nn.Linear(math.prod(shape[1]), math.prod(shape[0]), dtype=dtype)
    made = TTLoraLinear.from_linear(base, rank, shape, **options)
    with torch.no_grad():
        for core in made.cores:
            core.normal_().div_(math.sqrt(core.shape[-1]))
    return made


def dense(made: TTLoraLinear, cores=None) -> torch.Tensor:
    """`alpha dW` by the definition: the sum over all bonds of products of core entries, rows then columns."""
    cores = list(made.cores) if cores is None else cores
    letters = iter(string.ascii_letters)
    bond, terms, modes = next(letters), [], []
    left = bond
    for _ in cores:
        mode, bond_after = next(letters), next(letters)
        terms.append(bond + mode + bond_after)
        modes.append(mode)
        bond = bond_after
    flat = [core.reshape(core.shape[0], -1, core.shape[-1]) for core in cores]
    tensor = torch.einsum(",".join(terms) + "->" + left + "".join(modes) + bond, *flat)
    return made.alpha * tensor.reshape(made.out_features, made.in_features)


# -- what it computes -------------------------------------------------------------------------------------------------


@given(
    shape_and_rank=shapes_and_ranks(),
    batch=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from(list(EPS)),
    alpha=st.sampled_from([1.0, 0.25, -3.0]),
)
def test_forward_equals_the_dense_product(shape_and_rank, batch, dtype, alpha):
    shape, rank = shape_and_rank
    made = layer(shape, rank, dtype, alpha=alpha)
    x = torch.randn(*batch, made.in_features, dtype=dtype)
    expected = made.base(x).double() + x.double() @ dense(made).double().T
    got = made(x)
    assert got.dtype == dtype
    assert got.shape == (*batch, made.out_features)
    scale = float(expected.detach().abs().max()) if expected.numel() else 1.0
    assert torch.allclose(got.double(), expected, rtol=0, atol=EPS[dtype] * max(scale, 1.0))


@given(shape_and_rank=shapes_and_ranks(), seed=st.integers(0, 100))
def test_gradients_equal_autograd_of_the_dense_form(shape_and_rank, seed):
    shape, rank = shape_and_rank
    made = layer(shape, rank, alpha=0.5, seed=seed)
    x = torch.randn(3, made.in_features, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, made.out_features, dtype=torch.float64)
    inputs = [x, *made.cores]
    got = torch.autograd.grad((weights * made(x).tanh()).sum(), inputs)
    y = nn.functional.linear(x, made.base.weight + dense(made), made.base.bias)
    expected = torch.autograd.grad((weights * y.tanh()).sum(), inputs)
    assert all(torch.allclose(g, e, rtol=1e-9, atol=1e-11) for g, e in zip(got, expected, strict=True))


@given(shape_and_rank=shapes_and_ranks())
def test_update_and_merge_equal_the_dense_form(shape_and_rank):
    shape, rank = shape_and_rank
    made = layer(shape, rank, alpha=2.0)
    before = made.base.weight.detach().clone()
    assert torch.allclose(made.delta_weight(), dense(made), rtol=1e-11, atol=1e-12)
    merged = made.merge()
    assert type(merged) is nn.Linear
    assert torch.allclose(merged.weight, before + dense(made), rtol=1e-11, atol=1e-12)
    assert torch.equal(merged.bias, made.base.bias)
    assert torch.equal(made.base.weight, before)
    x = torch.randn(4, made.in_features, dtype=torch.float64)
    assert torch.allclose(merged(x), made(x), rtol=1e-9, atol=1e-10)


@given(shape_and_rank=shapes_and_ranks())
def test_the_cores_are_those_of_an_mpo(shape_and_rank):
    """The sites are (m, 1) and (1, n); MPO.fold is written for another purpose and gives the same matrix."""
    shape, rank = shape_and_rank
    made = layer(shape, rank)
    sites = [(m, 1) for m in shape[0]] + [(1, n) for n in shape[1]]
    dims = (math.prod(shape[0]), math.prod(shape[1]))
    assert tuple(tuple(core.shape) for core in made.cores) == MPO(sites=sites, max_bond=rank).core_shapes(dims)
    assert torch.allclose(MPO(order=2).fold(list(made.cores)), dense(made), rtol=1e-11, atol=1e-12)


def test_one_mode_for_each_dimension_is_lora():
    made = layer(((10,), (6,)), 3)
    a, b = made.halves()
    pair = OverParamAdapter.from_linear(made.base, rank=3)
    with torch.no_grad():
        pair.lora_A.weight.copy_(a)
        pair.lora_B.weight.copy_(b)
    x = torch.randn(2, 6, dtype=torch.float64)
    assert torch.allclose(made(x), pair(x), rtol=0, atol=1e-14)
    assert made.num_parameters == 3 * (10 + 6)


# -- the start --------------------------------------------------------------------------------------------------------


@given(shape_and_rank=shapes_and_ranks(), dtype=st.sampled_from(list(EPS)))
def test_starts_as_the_base_and_the_gradient_reaches_a_core(shape_and_rank, dtype):
    shape, rank = shape_and_rank
    torch.manual_seed(0)
    base = nn.Linear(math.prod(shape[1]), math.prod(shape[0]), dtype=dtype)
    made = TTLoraLinear.from_linear(base, rank, shape)
    x = torch.randn(5, made.in_features, dtype=dtype)
    assert torch.equal(made(x), base(x))
    made(x).float().sum().backward()
    assert float(made.cores[0].grad.abs().max()) > 0
    assert base.weight.grad is None
    assert [name for name, p in made.named_parameters() if p.requires_grad] == [
        f"cores.{k}" for k in range(len(made.cores))
    ]
    wide = torch.promote_types(dtype, torch.float32)
    assert {core.dtype for core in made.cores} == {wide}


@pytest.mark.parametrize("shape", [((64,), (64,)), ((8, 8), (8, 8)), ((4, 4, 4), (4, 4, 4))])
def test_what_the_first_core_sees_varies_as_in_lora(shape):
    """Variance 1 / (3 d_in), over many draws."""
    torch.manual_seed(0)
    rank, squares = 4, []
    for _ in range(100):
        made = TTLoraLinear.from_linear(nn.Linear(64, 64), rank, shape)
        bond = made.cores[0].shape[-1]
        with torch.no_grad():
            # unit vectors in place of the first core: dW then lists what it is contracted with
            made.cores[0].copy_(torch.eye(shape[0][0], bond)[None, :, None, :])
            squares.append(made.delta_weight()[: bond * 64 // shape[0][0]].square().mean())
    assert float(torch.stack(squares).mean()) == pytest.approx(1 / (3 * 64), rel=0.15)


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rank", "count"),
    [
        # 16*5 + 4 * 5*16*5 + 5*16
        (((16, 16, 16), (16, 16, 16)), 5, 1_760),
        # 64*8 + 8*16*8 + 8*9*8 + 8*64
        (((64, 12), (12, 64)), 8, 512 + 768 + 768 + 512),
        # 12*10 + 4 * 10*8*10 + 10*12
        (((12, 8, 8), (8, 8, 12)), 10, 3_440),
        # LoRA of rank 8 on 768 x 3072
        (((768,), (3072,)), 8, 8 * (768 + 3072)),
    ],
)
def test_parameter_counts_follow_the_formula_of_the_paper(shape, rank, count):
    """The TT format of arXiv:2408.01008 with TT ranks [1, r, ..., r, 1] has `sum of r_{k-1} k_i r_k` parameters. The shapes
    here are examples of ours with the counts worked out by hand. All modes at the ends are at least r, so no bond is smaller
    than r."""
    base = nn.Linear(math.prod(shape[1]), math.prod(shape[0]), device="meta")
    made = TTLoraLinear.from_linear(base, rank, shape)
    ranks = [1, *[rank] * (len(shape[0]) + len(shape[1]) - 1), 1]
    modes = (*shape[0], *shape[1])
    assert count == sum(a * k * b for a, k, b in zip(ranks[:-1], modes, ranks[1:], strict=True))
    assert made.num_parameters == count == sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert made.cores[0].is_meta


#: Tensor shapes of 768 x 768, where they are cut between the two sides, and the trainable parameters that the authors counted:
#: RoBERTa-base, query, key and value of 12 layers, TT rank 6, nothing else trained. Source: all_runs_export.csv in
#: phases/2.1.ttlora_core_count_study of github.com/kunwarpradip/characterize_ttlora, commit dbb0fb5.
ROBERTA = [
    ((768, 768), 1, 331_776),
    ((768, 12, 64), 1, 195_264),
    ((64, 12, 12, 64), 2, 58_752),
    ((64, 12, 6, 4, 32), 2, 49_248),
    ((32, 4, 6, 6, 4, 32), 3, 39_744),
    ((32, 4, 6, 4, 4, 3, 16), 3, 37_584),
    ((16, 3, 4, 4, 4, 4, 3, 16), 4, 35_424),
    ((16, 3, 4, 4, 4, 3, 2, 2, 16), 4, 35_424),
    ((16, 3, 4, 4, 3, 2, 2, 2, 2, 16), 4, 35_424),
    ((16, 2, 2, 3, 4, 3, 2, 2, 2, 2, 16), 5, 35_424),
    ((16, 2, 2, 2, 2, 3, 3, 2, 2, 2, 2, 16), 6, 35_424),
    ((16, 2, 2, 2, 2, 3, 2, 2, 2, 2, 2, 2, 12), 6, 35_856),
    ((12, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 12), 7, 36_288),
    ((12, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 6), 7, 37_584),
    ((6, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 6), 8, 38_880),
]


def meta_layer(d_out: int, d_in: int, rank: int, shape) -> TTLoraLinear:
    return TTLoraLinear.from_linear(nn.Linear(d_in, d_out, device="meta"), rank, shape)


@pytest.mark.parametrize(("modes", "cut", "published"), ROBERTA)
def test_parameter_counts_are_those_that_the_authors_published(modes, cut, published):
    made = meta_layer(768, 768, 6, (modes[:cut], modes[cut:]))
    assert 36 * made.num_parameters == published


@pytest.mark.parametrize(
    ("modes", "cut", "published", "without_effect"),
    [
        # one bond has full rank 3: 6-rank cores 3 x 6 and 6 x 2 x 6 have 54 numbers there, 3 x 3 and 3 x 2 x 6 have 45
        ((6, *(2,) * 15, 3), 8, 40_824, 36 * 45),
        ((3, *(2,) * 16, 3), 9, 42_768, 2 * 36 * 45),
    ],
)
def test_published_counts_above_full_rank_are_larger(modes, cut, published, without_effect):
    """The authors give every bond the TT rank. Beside a mode of 3 that is 6 where full rank is 3; ours stops there."""
    made = meta_layer(768, 768, 6, (modes[:cut], modes[cut:]))
    assert 36 * made.num_parameters == published - without_effect
    assert made.cores[-1].shape == (3, 1, 3, 1)


def test_two_percent_of_loras_parameters():
    """Abstract of arXiv:2504.21190: experts of TT-LoRA have 2 % of LoRA's parameters. Llama-3.2-1B, query and value of 16
    layers, TT rank 5 against LoRA's rank 16; shapes from Artifact_1.2/single_TTLoRA_training.py of github.com/lanl/TTLoRAMoE."""
    query = meta_layer(2048, 2048, 5, ((16, 8, 4, 4), (4, 4, 8, 16)))
    # the authors list the modes of d_in first; read from the other end, a train is the same
    value = meta_layer(512, 2048, 5, ((16, 16, 2), (2, 4, 16, 16)))
    trains = 16 * (query.num_parameters + value.num_parameters)
    lora = 16 * 16 * ((2048 + 2048) + (512 + 2048))
    assert (trains, lora) == (33_920, 1_703_936)
    assert round(trains / lora, 2) == 0.02


def test_bonds_stop_at_full_rank():
    made = layer(((2, 6), (6, 2)), rank=8)
    assert [tuple(core.shape) for core in made.cores] == [(1, 2, 1, 2), (2, 6, 1, 8), (8, 1, 6, 2), (2, 1, 2, 1)]


@given(shape=SHAPES, budget=st.integers(1, 2000))
def test_a_budget_takes_the_largest_rank_that_fits(shape, budget):
    base = nn.Linear(math.prod(shape[1]), math.prod(shape[0]), device="meta")
    smallest = sum((*shape[0], *shape[1]))
    if budget < smallest:
        with pytest.raises(ValueError, match=f"parameters={budget}: a tensor train of rank 1 .* has {smallest}"):
            TTLoraLinear.from_linear(base, shape=shape, parameters=budget)
        return
    made = TTLoraLinear.from_linear(base, shape=shape, parameters=budget)
    assert made.num_parameters <= budget
    if made.rank < largest_rank(shape):
        assert TTLoraLinear.from_linear(base, made.rank + 1, shape).num_parameters > budget


def test_the_default_shape_is_near_square():
    assert TTLoraLinear.from_linear(nn.Linear(768, 4096), rank=2).shape == ((64, 64), (24, 32))


class Largest(TorchDispatchMode):
    """The largest number of entries of a floating-point tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_the_update_is_never_dense_in_training():
    """For three inputs, nothing that the update makes is larger than the wider of its halves."""
    made = layer(((8, 8, 4), (4, 8, 8)), rank=5, dtype=torch.float32)
    made.base = nn.Identity()  # only the update is watched
    x = torch.randn(3, 256, requires_grad=True)
    with Largest() as watch:
        made(x).sum().backward()
    assert watch.numel <= 5 * 256
    with Largest() as watch:
        made.delta_weight()
    assert watch.numel == 256 * 256, "the watch sees a dense tensor where there is one"


# -- surroundings -----------------------------------------------------------------------------------------------------


def test_autocast_and_low_precision_bases():
    made = layer(((4, 4), (4, 4)), 3, torch.bfloat16)
    x = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    expected = made.base(x.bfloat16()).float() + x @ dense(made).T
    assert torch.allclose(y.float(), expected, atol=0.1)
    y.float().sum().backward()
    assert all(torch.isfinite(core.grad).all() for core in made.cores)


def test_compiled_and_checkpointed_layers_train_the_same():
    made = layer(((4, 4), (4, 4)), 3)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(made(x).square().sum(), list(made.cores))
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    got = torch.autograd.grad(compiled(x).square().sum(), list(made.cores))
    again = torch.utils.checkpoint.checkpoint(made, x, use_reentrant=False)
    recomputed = torch.autograd.grad(again.square().sum(), list(made.cores))
    for g, r, e in zip(got, recomputed, expected, strict=True):
        assert torch.allclose(g, e, rtol=1e-12, atol=1e-12)
        assert torch.equal(r, e)


def test_a_regression_whose_solution_is_a_tensor_train_is_solved():
    torch.manual_seed(0)
    shape = ((4, 3), (3, 4))
    target = layer(shape, 2, seed=1)
    made = TTLoraLinear.from_linear(nn.Linear(12, 12, dtype=torch.float64), 2, shape)
    with torch.no_grad():
        made.base.weight.copy_(target.base.weight)
        made.base.bias.copy_(target.base.bias)
    x = torch.randn(256, 12, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(made.cores, max_iter=500, line_search_fn="strong_wolfe", tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = (made(x) - target(x).detach()).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() < 1e-12


def test_state_dict_round_trip():
    made, other = layer(((4, 2), (2, 3)), 3), layer(((4, 2), (2, 3)), 3, seed=5)
    other.load_state_dict(made.state_dict())
    x = torch.randn(2, 6, dtype=torch.float64)
    assert torch.equal(made(x), other(x))
    assert "rank=3, alpha=1, parameters=" in repr(made)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0: the rank of a tensor train"),
        ({"rank": True}, "rank=True"),
        ({"rank": 2.0}, "rank=2.0"),
        ({}, "rank=None and parameters=None: give one of the two"),
        ({"rank": 2, "parameters": 100}, "rank=2 and parameters=100: give one of the two"),
        ({"parameters": 9}, "parameters=9: .* has 12; give at least that"),
        ({"parameters": 50.5}, "parameters=50.5"),
        ({"rank": 2, "alpha": float("nan")}, "alpha=nan"),
        ({"rank": 2, "alpha": "8"}, "alpha='8'"),
        (
            {"rank": 2, "shape": ((5, 2), (3, 3))},
            r"multiplies to 10 and 9, but the layer has d_out=10 and d_in=6.*\(2, 5\)",
        ),
        ({"rank": 2, "shape": ((10,),)}, "give the modes of d_out and those of d_in"),
        ({"rank": 2, "shape": ((10,), ())}, "integers of at least 1"),
        ({"rank": 2, "shape": ((10,), (6.0,))}, "integers of at least 1"),
        ({"rank": 2, "shape": (10, 6)}, "integers of at least 1"),
        ({"rank": 2, "shape": 60}, "shape=60"),
        ({"rank": 7}, r"rank=7 is above the full rank of every bond of \(\(2, 5\), \(2, 3\)\), at most 6"),
    ],
)
def test_bad_arguments_are_refused_and_freeze_nothing(options, message):
    base = nn.Linear(6, 10)
    with pytest.raises(ValueError, match=message):
        TTLoraLinear.from_linear(base, **options)
    assert base.weight.requires_grad


def test_bad_bases_are_refused():
    with pytest.raises(TypeError, match=r"needs an nn\.Linear, got Conv1d; TTLoraLinear adapts"):
        TTLoraLinear.from_linear(nn.Conv1d(4, 4, 1), 2)
    with pytest.raises(TypeError, match="out_proj"):
        TTLoraLinear.from_linear(nn.MultiheadAttention(8, 2).out_proj, 2)


def test_quantized_layers_are_adapted_and_not_merged():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32).to("cpu")
    made = TTLoraLinear.from_linear(base, 4)
    x = torch.randn(3, 64)
    assert torch.equal(made(x), base(x))
    nn.init.normal_(made.cores[0])
    assert torch.allclose(made(x), base(x) + x @ dense(made).T, atol=1e-4)
    with pytest.raises(TypeError, match="base of type Linear4bit"):
        made.merge()
