"""Every method in every recipe, on its laptop preset: the loss falls, the method carries its own signature, and what is saved
loads on the untouched base model.

``make recipes`` runs all pairs of recipe and method. Those without the mark ``slow`` have every method once at least, and every
family of methods in every recipe.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from peft import PeftModel
from safetensors.torch import load_file
from support import adapters, running, training
from support.encoding import encode
from support.evaluation.generate import Generator
from support.evaluation.tokenization import IGNORED
from support.methods import METHODS
from support.recipe import Recipe
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from recipes import llama31_gsm8k, llama31_humaneval, llama31_mtbench, t5_glue
from tnadapt import RowRescale, TTLoraLinear, find_adapters, load_adapters

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

KINDS = {"llama": llama31_gsm8k.RECIPE, "t5": t5_glue.RECIPE}
SMALL: dict[str, Any] = {
    "train_size": 16,
    "eval_size": 2,
    "max_steps": 4,
    "batch": 4,
    "micro_batch": 2,
    "rank": 4,
    "alpha": 8,
    "order": 4,
    "top_n": 1,
    "split": 1,
    "every": 1,
    "max_new_tokens": 2,
    "save_every": 2,
    "lr": 5e-3,
    "targets": "all-linear",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A random Llama and a random T5, each of one layer, in folders."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    tokenizers = {kind: AutoTokenizer.from_pretrained(recipe.embedded_model) for kind, recipe in KINDS.items()}
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=len(tokenizers["llama"]),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=512,
        eos_token_id=tokenizers["llama"].eos_token_id,
        pad_token_id=tokenizers["llama"].pad_token_id,
    )
    LlamaForCausalLM(llama).save_pretrained(folders["llama"])
    t5 = T5Config(
        vocab_size=len(tokenizers["t5"]),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizers["t5"].pad_token_id,
        eos_token_id=tokenizers["t5"].eos_token_id,
        decoder_start_token_id=tokenizers["t5"].pad_token_id,
    )
    T5ForConditionalGeneration(t5).save_pretrained(folders["t5"])
    for kind, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folders[kind])
    return folders


def configuration(kind: str, model: Path, method: str, **changes: Any) -> Any:
    return dataclasses.replace(
        KINDS[kind].presets["laptop"], **{**SMALL, "model": str(model), "method": method, **changes}
    )


@dataclasses.dataclass
class Trained:
    """A finished run, with the model as it was right after training and the optimizer that trained it."""

    folder: Path
    result: dict[str, Any]
    model: Any
    optimizer: Any
    before: dict[str, torch.Tensor]
    base: Any
    batch: dict[str, torch.Tensor]


def trained(recipe: Recipe, config: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    seen: dict[str, Any] = {}
    make, real_train = training.make_optimizer, running.train

    def watching(model: Any, method: Any, of: Any) -> dict[str, Any]:
        seen["model"] = model
        seen["before"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        seen["batch"] = of.batches(4)[0]
        return real_train(model, method, of)

    monkeypatch.setattr(running, "train", watching)
    monkeypatch.setattr(training, "make_optimizer", lambda *a: seen.setdefault("optimizer", make(*a)))
    result = running.run(recipe, config, root, quiet=True)
    kind = AutoModelForSeq2SeqLM if seen["model"].config.is_encoder_decoder else AutoModelForCausalLM
    base = kind.from_pretrained(recipe.embedded_model)
    return Trained(Path(result["folder"]), result, base=base, **seen)


RECIPES = {module.RECIPE.name: module.RECIPE for module in (llama31_gsm8k, llama31_humaneval, llama31_mtbench, t5_glue)}
FAMILIES = (
    ("full", "opf"),
    ("lora", "lora-equal", "rslora", "lora+", "dora"),
    ("pissa", "olora", "lora-ga", "lora-ga-peft"),
    ("adalora", "loha", "lokr", "tt-lora"),
    ("alpha-lora", "op-lora", "riemannian", "lora-rite", "muon"),
    ("deep-lora", "lora-over-svd", "lora-over-mpo", "lora-over-tucker", "lora-over-cp"),
    ("lora-over-mpo-p", "lora-over-mpo-r", "lora-over-mpo-random"),
)
#: Every method at least once, and every family in every recipe; the recipes take turns.
IN_CI = {
    ([*RECIPES][turn % len(RECIPES)], family[turn % len(family)])
    for family in FAMILIES
    for turn in range(max(len(RECIPES), len(family)))
}
PAIRS = [
    pytest.param(recipe, method, id=f"{recipe}-{method}", marks=[] if (recipe, method) in IN_CI else pytest.mark.slow)
    for recipe in RECIPES
    for method in METHODS
]
#: The preset, for a few steps on the same few examples.
FEW: dict[str, Any] = {"train_size": 2, "batch": 2, "micro_batch": 1, "max_steps": 6, "every": 2, "save_every": 100}
FEW |= {"eval_size": 2, "max_new_tokens": 4}
#: Rates at which so few steps show that a method learns.
RATES = dict.fromkeys(("full", "opf", "lora+", "op-lora", "pissa", "olora", "lora-rite"), 1e-3) | {
    "adalora": 5e-2,
    "lora-ga": 3e-3,
}


def test_the_families_are_all_methods() -> None:
    assert sorted(method for family in FAMILIES for method in family) == sorted(METHODS)
    assert {method for _, method in IN_CI} == set(METHODS)
    for family in FAMILIES:
        assert {recipe for recipe, method in IN_CI if method in family} == set(RECIPES)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_method_learns_in_a_recipe_and_loads_on_the_untouched_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    recipe = RECIPES[name]
    lr = RATES.get(method, 1e-2) * (0.1 if name == "t5_glue" else 1)  # where the small T5 jumps at larger steps
    config = dataclasses.replace(recipe.presets["laptop"], method=method, lr=lr, **FEW)
    monkeypatch.setattr(running, "write_report", lambda *a: None)  # its pictures take longer than the training
    run = trained(recipe, config, tmp_path, monkeypatch)
    curve = [loss for _, loss in run.result["curve"]]
    assert len(curve) == FEW["max_steps"]
    assert max(curve[-2:]) < 0.95 * curve[0], "the loss falls"
    now = {name: p for name, p in run.model.named_parameters() if name in run.before}
    if method == "op-lora":  # whose parameters are others after training than during it
        now = {name: p for name, p in now.items() if not p.requires_grad}
        moved = layers(run.model)
    else:
        moved = [name for name, p in now.items() if p.requires_grad and not torch.equal(p, run.before[name])]
    assert moved
    assert all(torch.equal(p, run.before[name]) for name, p in now.items() if not p.requires_grad)
    assert run.result["label"] == METHODS[method].label
    run.model.eval()
    if METHODS[method].adapter is None:
        assert not (run.folder / "adapter").exists()
        loaded = type(run.base).from_pretrained(run.folder / "model")
    elif method == "tt-lora":
        load_adapters(run.base, run.folder / "adapter" / "tt_lora.safetensors", kind=TTLoraLinear)
        loaded = run.base
    else:
        loaded = PeftModel.from_pretrained(run.base, run.folder / "adapter")
    if method == "alpha-lora":
        RowRescale.from_file(loaded, run.folder / "adapter" / "alpha.safetensors")
    with torch.no_grad():
        there = run.model(**run.batch).logits
        torch.testing.assert_close(loaded.eval()(**run.batch).logits, there, rtol=1e-4, atol=1e-4)
    SIGNATURES.get(method, lambda run: None)(run)


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def base_weight_of(run: Trained, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's base weight during training, and that of the model on disk."""
    inside = dict(run.model.base_model.model.named_modules())[name]
    fresh = type(run.base).from_pretrained(run.base.name_or_path)
    return inside.get_base_layer().weight, dict(fresh.named_modules())[name].weight


def first_layer(run: Trained) -> str:
    return next(name for name, m in run.model.base_model.model.named_modules() if hasattr(m, "lora_A"))


def changed_base(run: Trained) -> None:
    during, before = base_weight_of(run, first_layer(run))
    assert not torch.allclose(during, before)
    saved = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in saved.values()} == {2 * run.result["config"]["rank"]}


def unchanged_function(run: Trained) -> None:
    """The initialization does not move the model: base and adapter together give what the base gave."""
    for name, parameter in run.model.named_parameters():
        if name in run.before:
            parameter.data.copy_(run.before[name])
    fresh = type(run.base).from_pretrained(run.base.name_or_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(run.model(**run.batch).logits, fresh(**run.batch).logits, rtol=1e-4, atol=1e-4)


def full(run: Trained) -> None:
    assert sum(p.numel() for p in run.model.parameters()) == run.result["metrics"]["trained_parameters"]


def whole_weights(run: Trained) -> None:
    over(run)
    weights = {name for name, module in run.model.named_modules() if isinstance(module, torch.nn.Linear)}
    targets = run.result["config"]["targets"].split(",")
    meant = {name for name in weights if targets == ["all-linear"] or name.rpartition(".")[2] in targets}
    assert {matrix["name"].removesuffix(".W") for matrix in run.result["matrices"]} == meant - {"lm_head"}
    assert all(p.requires_grad for p in run.model.parameters())


def mutated(run: Trained) -> None:
    changed_base(run)
    unchanged_function(run)


def rslora(run: Trained) -> None:
    config = run.result["config"]
    assert {module.scaling["default"] for module in layers(run.model)} == {config["alpha"] / config["rank"] ** 0.5}


def loraplus(run: Trained) -> None:
    rates = {}
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = group["initial_lr"]
    for module in layers(run.model):
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert rates[id(b)] == pytest.approx(16 * rates[id(a)])


def dora(run: Trained) -> None:
    magnitudes = [name for name in run.before if "magnitude" in name]
    assert magnitudes
    assert all(not torch.equal(dict(run.model.named_parameters())[name], run.before[name]) for name in magnitudes)


def adalora(run: Trained) -> None:
    pattern = run.model.peft_config["default"].rank_pattern
    ranks = [sum(kept) for kept in pattern.values()]
    rank = run.result["config"]["rank"]
    assert sum(ranks) == rank * len(ranks), "the budget ends at the rank"
    assert {len(kept) for kept in pattern.values()} == {rank * 3 // 2}, "it starts at one and a half times it"


def of_type(name: str) -> Any:
    def check(run: Trained) -> None:
        assert run.model.peft_config["default"].peft_type == name

    return check


def equal(run: Trained) -> None:
    assert run.model.peft_config["default"].r > run.result["config"]["rank"]


def over(run: Trained) -> None:
    metrics = run.result["metrics"]
    assert metrics["trained_parameters"] > metrics["lora_parameters"]
    assert any(matrix["expanded_at"] is not None for matrix in run.result["matrices"])


def predefined(run: Trained) -> None:
    over(run)
    assert all(matrix["expanded_at"] in (None, 0) for matrix in run.result["matrices"])
    assert (run.folder / "ablation.json").exists()
    assert not (run.folder / "ablation").exists()


def drawn(run: Trained) -> None:
    """From step 0, as many matrices of each group as ``--top-n``, and those that the seed draws."""
    over(run)
    config = run.result["config"]
    chosen = {matrix["name"] for matrix in run.result["matrices"] if matrix["expanded_at"] == 0}
    groups = Counter(re.sub(r"\d+", "*", matrix["name"]) for matrix in run.result["matrices"])
    assert len(chosen) == sum(min(config["top_n"], size) for size in groups.values())
    assert all(matrix["expanded_at"] in (None, 0) for matrix in run.result["matrices"])


def tensor_train(run: Trained) -> None:
    adapters = find_adapters(run.model, TTLoraLinear).values()
    assert {adapter.rank for adapter in adapters} == {run.result["config"]["rank"]}
    assert run.result["metrics"]["trained_parameters"] == sum(adapter.num_parameters for adapter in adapters)


def rescaled(run: Trained) -> None:
    alphas = run.model.row_rescale.alphas
    assert len(alphas) == len(layers(run.model))
    assert all(not torch.equal(alpha, torch.ones_like(alpha)) for alpha in alphas.values())


def three_factors(run: Trained) -> None:
    expanded = {
        m["kind"]: {each["expanded_at"] for each in run.result["matrices"] if each["kind"] == m["kind"]}
        for m in run.result["matrices"]
    }
    assert expanded == {"A": {0}, "B": {None}}
    # a square core of rank x rank for every A, beside the core of A's own size
    added = run.result["metrics"]["trained_parameters"] - run.result["metrics"]["lora_parameters"]
    assert added == len(layers(run.model)) * run.result["config"]["rank"] ** 2


def generated(run: Trained) -> None:
    pairs = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and "parametrizations" not in name for name in pairs), "the MLPs are dropped"
    assert run.result["metrics"]["trained_parameters"] > 32 * sum(p.numel() for p in pairs.values())
    assert all(module.lora_B["default"].weight.abs().sum() > 0 for module in layers(run.model))


def optimizer_called(name: str) -> Any:
    def check(run: Trained) -> None:
        assert type(run.optimizer).__name__ == name

    return check


SIGNATURES: dict[str, Any] = {
    "full": full,
    "lora-equal": equal,
    "pissa": mutated,
    "olora": mutated,
    "lora-ga": mutated,
    "lora-ga-peft": mutated,
    "rslora": rslora,
    "lora+": loraplus,
    "dora": dora,
    "adalora": adalora,
    "loha": of_type("LOHA"),
    "lokr": of_type("LOKR"),
    "tt-lora": tensor_train,
    "alpha-lora": rescaled,
    "op-lora": generated,
    "riemannian": optimizer_called("RiemannianPreconditionedOptimizer"),
    "lora-rite": optimizer_called("LoRARite"),
    "muon": optimizer_called("Muon"),
    **{name: over for name, method in METHODS.items() if method.over is not None},
    "opf": whole_weights,
    "deep-lora": three_factors,
    "lora-over-mpo-p": predefined,
    "lora-over-mpo-random": drawn,
}


# -- what is ours -----------------------------------------------------------------------------------------------------


def test_lora_ga_starts_where_its_authors_start(models: dict[str, Path]) -> None:
    """The formula, from a full SVD of a gradient that is computed here: out^(1/4)/sqrt(16) on both factors, u's from r+1."""
    config = configuration("llama", models["llama"], "lora-ga", targets="q_proj,down_proj")
    base = LlamaForCausalLM.from_pretrained(models["llama"])
    reference = LlamaForCausalLM.from_pretrained(models["llama"])
    torch.manual_seed(1)
    ids = torch.randint(5, 100, (2, 12))
    batch = {"input_ids": ids, "labels": ids}
    reference(**batch).loss.backward()
    model = adapters.attach(base, METHODS["lora-ga"], config, 4, lambda size: [batch])
    rank, scaling = 4, 8 / 4**0.5
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        layer = reference.model.layers[0].get_submodule(name)
        u, _, v = torch.linalg.svd(layer.weight.grad.double(), full_matrices=False)
        scale = layer.weight.shape[0] ** 0.25 / 4
        made = model.base_model.model.model.layers[0].get_submodule(name)
        a, b = made.lora_A["default"].weight.double(), made.lora_B["default"].weight.double()
        # singular vectors are known up to their sign
        assert torch.allclose((a @ v[:rank].T).abs(), scale * torch.eye(rank, dtype=torch.float64), atol=1e-3)
        assert torch.allclose(
            (u[:, rank : 2 * rank].T @ b).abs(), scale * torch.eye(rank, dtype=torch.float64), atol=1e-3
        )
        torch.testing.assert_close(
            made.get_base_layer().weight.double() + scaling * b @ a, layer.weight.double(), rtol=1e-4, atol=1e-5
        )


def test_lora_ga_refuses_layers_that_are_too_small(models: dict[str, Path]) -> None:
    config = configuration("llama", models["llama"], "lora-ga", targets="v_proj", rank=12)
    base = LlamaForCausalLM.from_pretrained(models["llama"])
    batch = {"input_ids": torch.arange(5, 15)[None], "labels": torch.arange(5, 15)[None]}
    with pytest.raises(
        ValueError, match=r"--rank is 12: LoRA-GA needs 24 singular vectors, and a layer of 16x32 has 16"
    ):
        adapters.attach(base, METHODS["lora-ga"], config, 4, lambda size: [batch])


def pair_model(models: dict[str, Path], method: str, scale: float = 1.0, **changes: Any) -> tuple[Any, Any]:
    """A Llama in float64 whose pairs are random and rescaled, A by ``scale`` and B by its inverse; and its optimizer."""
    config = configuration("llama", models["llama"], method, weight_decay=0.0, **changes)
    torch.manual_seed(3)
    base = LlamaForCausalLM.from_pretrained(models["llama"]).double()
    model = adapters.attach(base, METHODS[method], config, 4).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for module in layers(model):
            for side, factor in (("lora_A", scale), ("lora_B", 1 / scale)):
                weight = getattr(module, side)["default"].weight
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.3 * factor)
    return model, adapters.make_optimizer(model, METHODS[method], config)


def steps_of(model: Any, optimizer: Any, count: int) -> list[torch.Tensor]:
    """The products of all pairs after ``count`` steps on one batch."""
    ids = torch.arange(5, 25).view(2, 10)
    for _ in range(count):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return [(m.lora_B["default"].weight @ m.lora_A["default"].weight).detach() for m in layers(model)]


@pytest.mark.parametrize(("method", "invariant"), [("lora-rite", True), ("lora", False)])
def test_rite_does_not_see_how_a_product_is_shared_by_its_pair(
    models: dict[str, Path], method: str, invariant: bool
) -> None:
    """Yen et al. 2024 (arXiv:2410.20625): the product moves alike for (A, B) and (sA, B/s). With AdamW it does not."""
    plain, rescaled = (steps_of(*pair_model(models, method, scale), count=3) for scale in (1.0, 8.0))
    start = steps_of(*pair_model(models, method), count=0)
    moved = sum(float((after - before).norm()) for after, before in zip(plain, start, strict=True))
    apart = sum(float((one - other).norm()) for one, other in zip(plain, rescaled, strict=True))
    assert moved > 0
    assert (apart < 1e-3 * moved) == invariant


def test_clipping_does_not_see_it_either(tmp_path: Path, models: dict[str, Path]) -> None:
    """Nor does a run with a threshold that every gradient is above, in which the norm of raw gradients differs by much."""
    ids = torch.arange(5, 15).tolist()
    examples = [{"input_ids": ids, "attention_mask": [1] * 10, "labels": ids}] * 8
    products = []
    for scale in (1.0, 8.0):
        changes = {"max_steps": 3, "clip": 1e-2, "lr": 1e-3}
        model, optimizer = pair_model(models, "lora-rite", scale, **changes)
        tokenizer = AutoTokenizer.from_pretrained(models["llama"])
        config = configuration("llama", models["llama"], "lora-rite", **changes)
        before = steps_of(model, optimizer, count=0)
        run = training.Training(tokenizer, examples, config, tmp_path / str(scale), quiet=True)
        run.run(model, lambda _, optimizer=optimizer: optimizer)
        products.append((before, steps_of(model, optimizer, count=0)))
    (start, plain), (_, rescaled) = products
    moved = sum(float((after - before).norm()) for after, before in zip(plain, start, strict=True))
    apart = sum(float((one - other).norm()) for one, other in zip(plain, rescaled, strict=True))
    assert moved > 0
    assert apart < 1e-3 * moved


def test_riemannian_gradients_are_preconditioned_by_the_other_factor(models: dict[str, Path]) -> None:
    """Zhang and Pilanci 2024 (arXiv:2402.02347): (BᵀB + δ)⁻¹ ∂A and ∂B (AAᵀ + δ)⁻¹, with PEFT's δ of 0.01."""
    model, optimizer = pair_model(models, "riemannian")
    ids = torch.arange(5, 25).view(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    pairs = [(m.lora_A["default"].weight, m.lora_B["default"].weight) for m in layers(model)]
    damping = 0.01 * torch.eye(SMALL["rank"], dtype=torch.float64)
    expected = [
        (torch.linalg.solve(b.T @ b + damping, a.grad), torch.linalg.solve(a @ a.T + damping, b.grad.T).T)
        for a, b in pairs
    ]
    optimizer.step()
    for (a, b), (grad_a, grad_b) in zip(pairs, expected, strict=True):
        torch.testing.assert_close(a.grad, grad_a)
        torch.testing.assert_close(b.grad, grad_b)


def test_muon_moves_a_matrix_alike_in_all_its_singular_directions(models: dict[str, Path]) -> None:
    """And as far as AdamW would: the root mean square of a step is 0.2 times the rate, as ``match_rms_adamw`` says."""
    model, optimizer = pair_model(models, "muon", lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    steps_of(model, optimizer, 1)
    for name, p in model.named_parameters():
        if name in before:
            step = p.detach() - before[name]
            values = torch.linalg.svdvals(step)
            assert values.min() > 0.5 * values.max(), name
            assert float(step.square().mean().sqrt()) == pytest.approx(0.2 * 1e-2, rel=0.35)


def test_other_seeds_draw_other_matrices(tmp_path: Path) -> None:
    chosen = []
    for seed in (0, 1, 0):
        config = dataclasses.replace(
            llama31_gsm8k.PRESETS["laptop"], **FEW | {"max_steps": 1, "seed": seed, "lr": 1e-3}
        )
        config = dataclasses.replace(config, method="lora-over-mpo-random", top_n=1)
        result = running.run(llama31_gsm8k.RECIPE, config, tmp_path / f"{len(chosen)}", quiet=True)
        chosen.append({matrix["name"] for matrix in result["matrices"] if matrix["expanded_at"] == 0})
    assert chosen[0] == chosen[2]
    assert chosen[0] != chosen[1]


def test_op_lora_starts_as_lora_and_differentiates_through_its_mlp(models: dict[str, Path]) -> None:
    config = configuration("llama", models["llama"], "op-lora", targets="q_proj")
    torch.manual_seed(0)
    model = adapters.attach(LlamaForCausalLM.from_pretrained(models["llama"]), METHODS["op-lora"], config, 4)
    (layer,) = layers(model)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    assert torch.equal(b.weight, torch.zeros_like(b.weight))
    assert a.weight.abs().sum() > 0
    written = a.parametrizations.weight[0]
    assert written.hidden is b.parametrizations.weight[0].hidden, "one MLP writes both"
    with torch.no_grad():
        for matrix in (a, b):
            matrix.parametrizations.weight[0].head.normal_()
    h = torch.relu(written.hidden.inner.weight @ written.hidden.z + written.hidden.inner.bias)
    torch.testing.assert_close(a.weight, a.parametrizations.weight.original + (written.head @ h).view(4, 32))
    ids = torch.arange(5, 25).view(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    assert written.hidden.z.grad.abs().sum() > 0


def test_a_structure_of_its_own_takes_no_other(models: dict[str, Path]) -> None:
    config = configuration("llama", models["llama"], "deep-lora", factorization="cp")
    with pytest.raises(ValueError, match="--factorization is given: deep-lora has a structure of its own"):
        KINDS["llama"].resolve(config)


@pytest.mark.parametrize(
    ("sizes", "changes", "rank"),
    [
        ({"intermediate_size": 14336, "num_key_value_heads": 8}, {"order": 10}, 42),
        ({"intermediate_size": 11008, "num_key_value_heads": 32}, {"order": 9, "targets": "all-linear"}, 34),
    ],
    ids=["Llama 3.1 8B", "Llama 2 7B"],
)
def test_equal_rank_is_the_one_that_the_paper_compares_with(
    sizes: dict[str, int], changes: dict[str, Any], rank: int
) -> None:
    shape = LlamaConfig(vocab_size=1000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    config = dataclasses.replace(llama31_gsm8k.PRESETS["paper"], method="lora-equal", **changes)
    assert adapters.equal_rank(config, model) == rank


class Killed(adapters.TrainerCallback):
    """Ends the run behind the checkpoint of step 2."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def interrupted_run(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, config: Any, root: Path, name: str) -> None:
    """Begin a run, and leave it unfinished."""
    real = training.callbacks_of
    with monkeypatch.context() as patch:
        patch.setattr(training, "callbacks_of", lambda *a: [*real(*a), Killed()])
        with pytest.raises(KeyboardInterrupt):
            running.run(recipe, config, root, name, quiet=True)


@pytest.mark.parametrize(
    "method",
    [
        *("adalora", "lora-over-mpo-p", "lora+", "tt-lora", "lora-rite"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora-ga", "alpha-lora", "deep-lora", "op-lora")),
    ],
)
def test_an_interrupted_run_ends_where_a_whole_one_does(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    recipe, config = KINDS["llama"], configuration("llama", models["llama"], method)
    whole = running.run(recipe, config, tmp_path / "whole", quiet=True)
    interrupted_run(monkeypatch, recipe, config, tmp_path, "run")
    resumed = running.run(recipe, config, tmp_path, "run", resume=True, quiet=True)
    adapters_of = [sorted((Path(run["folder"]) / "adapter").glob("*.safetensors")) for run in (whole, resumed)]
    assert adapters_of[0]
    for one, other in zip(*adapters_of, strict=True):
        first, second = load_file(one), load_file(other)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed["curve"] == whole["curve"]


def test_a_run_that_is_stopped_early_reports_the_beginning_of_the_whole_one(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that was interrupted and goes on for less than it was begun for; a finished one stays what it is."""
    recipe, config = KINDS["llama"], configuration("llama", models["llama"], "lora-over-mpo-r")
    whole = running.run(recipe, config, tmp_path / "whole", quiet=True)
    shorter = dataclasses.replace(config, stop_after=3)
    stopped = running.run(recipe, shorter, tmp_path, quiet=True)
    interrupted_run(monkeypatch, recipe, config, tmp_path, "run")
    resumed = running.run(recipe, shorter, tmp_path, "run", resume=True, quiet=True)
    for result in (stopped, resumed):
        assert (result["status"], result["metrics"]["steps"]) == ("finished", 3)
        assert result["curve"] == whole["curve"][:3], "the schedule is the whole run's"
        assert "accuracy" in result["metrics"]
        assert (Path(result["folder"]) / "report.md").exists()
        assert (Path(result["folder"]) / "adapter").exists()
    with pytest.raises(ValueError, match=r"another configuration \(stop_after 3 there, None here\)"):
        running.run(recipe, config, tmp_path, "run", resume=True, quiet=True)


@pytest.mark.parametrize("method", ["adalora", "lora-over-mpo-r"])
def test_a_run_that_broke_after_training_is_not_trained_further(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    # an epoch is longer than training, so that there are batches that it could go on with
    recipe, config = KINDS["llama"], configuration("llama", models["llama"], method, train_size=32)
    whole = running.run(recipe, config, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(running, "record_scores", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            running.run(recipe, config, tmp_path, "run", quiet=True)
    resumed = running.run(recipe, config, tmp_path, "run", resume=True, quiet=True)
    assert (resumed["curve"], resumed["matrices"]) == (whole["curve"], whole["matrices"])
    for name in ("steps", "tokens", "trained_parameters", "loss"):
        assert resumed["metrics"][name] == whole["metrics"][name]
    first, second = (
        load_file(Path(run["folder"]) / "adapter" / "adapter_model.safetensors") for run in (whole, resumed)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_adalora_without_its_averages_is_not_resumed(tmp_path: Path, models: dict[str, Path]) -> None:
    config = configuration("llama", models["llama"], "adalora")
    base = LlamaForCausalLM.from_pretrained(models["llama"])
    budget = adapters.AdaLoraBudget(adapters.attach(base, METHODS["adalora"], config, 4))
    arguments = type("Arguments", (), {"output_dir": str(tmp_path)})
    state = type("State", (), {"global_step": 2})
    with pytest.raises(ValueError, match=r"checkpoint-2/adalora\.pt is missing"):
        budget.on_train_begin(arguments, state, None)


#: A task whose prompts differ in length.
UNEVEN: dict[str, dict[str, Any]] = {"llama": {}, "t5": {"task": "sst2"}}

# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_padding_and_masks_change_no_loss(tmp_path: Path, models: dict[str, Path], kind: str) -> None:
    """The loss of a padded batch is the mean over all answer tokens of its examples, each alone and without padding."""
    recipe = KINDS[kind]
    config = configuration(kind, models[kind], "lora", micro_batch=12, **UNEVEN[kind])
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(models[kind])
    model = (T5ForConditionalGeneration if kind == "t5" else LlamaForCausalLM).from_pretrained(models[kind]).eval()
    records = recipe.load(config)[0]
    examples = encode(tokenizer, records, recipe.prompt, recipe.answer, 12, 200, kind == "t5")
    assert len({len(example["input_ids"]) for example in examples}) > 1
    tokenizer.padding_side = "left"  # which the harness has to set right
    (batch,) = training.Training(tokenizer, examples, config, tmp_path, True).batches(12)
    with torch.no_grad():
        together = float(model(**batch).loss)
        total, count = 0.0, 0
        for example in examples:
            alone = {name: torch.tensor([ids]) for name, ids in example.items()}
            labelled = sum(label != IGNORED for label in example["labels"])
            total, count = total + float(model(**alone).loss) * labelled, count + labelled
    assert together == pytest.approx(total / count, rel=1e-5)
    for row, example in zip(batch["attention_mask"], examples, strict=True):
        assert row.tolist() == [1] * len(example["input_ids"]) + [0] * (len(row) - len(example["input_ids"]))


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_batch_of_prompts_answers_as_each_alone(models: dict[str, Path], kind: str) -> None:
    recipe = KINDS[kind]
    tokenizer = AutoTokenizer.from_pretrained(recipe.embedded_model)
    model = (T5ForConditionalGeneration if kind == "t5" else LlamaForCausalLM).from_pretrained(recipe.embedded_model)
    config = dataclasses.replace(recipe.presets["laptop"], **UNEVEN[kind])
    prompts = [recipe.prompt(record) for record in recipe.load(config)[1][:5]]
    assert len({len(tokenizer(prompt)["input_ids"]) for prompt in prompts}) > 1
    generate = Generator(model, tokenizer, max_new_tokens=12)
    together = generate(prompts)
    alone = [generate([prompt])[0] for prompt in prompts]
    assert together == alone
    assert any(text.strip() for text in together)
