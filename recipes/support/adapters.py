"""What makes a base model into one that a method trains: its adapter, its initialization, its optimizer, its callbacks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraConfig, LoraGAConfig, preprocess_loraga
from safetensors.torch import load_file
from transformers import TrainerCallback

from support.config import Config
from support.generated import generate_pairs
from support.loading import target_modules
from support.methods import METHODS, Method
from support.rescaled import FILE as ALPHA_FILE
from support.rescaled import RowSteps
from tnadapt import TTLoraLinear, add_adapters, finders, plan, save_adapters

Batch = dict[str, torch.Tensor]

#: LoRA-GA: sequences whose gradient decides the initialization, and gamma of its stable scale. Both are the authors'.
GRADIENT_SAMPLES, STABLE_GAMMA = 8, 16
GRADIENT = "_peft_loraga_grad"
"""Where PEFT's ``preprocess_loraga`` leaves a layer's gradient."""


def attach(
    model: Any, method: Method, config: Config, steps: int, batches: Callable[[int], Sequence[Batch]] | None = None
) -> Any:
    """``model`` as ``method`` trains it.

    Args:
        model: the base model; LoRA-GA, PiSSA and OLoRA change its weights.
        method: what to make of it.
        config: rank, alpha and targets.
        steps: optimizer steps of the whole training, which AdaLoRA lays its budget over.
        batches: gives batches of that many training examples in all; for LoRA-GA.
    """
    if method.adapter is None:
        return model.requires_grad_(True)
    if method.tensor_train:
        layers = targeted_layers(config, model)
        add_adapters(model, layers, kind=TTLoraLinear, rank=config.rank, alpha=config.alpha / config.rank)
        return model
    adapter = adapter_config(method, config, steps, model)
    if method.gradient_init:
        assert batches is not None
        samples = batches(GRADIENT_SAMPLES)
        preprocess_loraga(model, gradient_config(adapter), lambda: _backward(model, samples))
    model = peft.get_peft_model(model, adapter)
    if method.gradient_init == "authors":
        for module in model.modules():
            if isinstance(module, LoraLinear):
                init_from_gradient(module)
    if method.generated:
        generate_pairs(model)
    return model


def adapter_config(method: Method, config: Config, steps: int, model: torch.nn.Module) -> Any:
    """PEFT's configuration of ``method``."""
    rank = equal_rank(config, model) if method.equal_parameters else config.rank
    targets: str | list[str] = target_modules(config, model)
    if method.gradient_init or new_layers(
        model
    ):  # PEFT spells all-linear out too late for gradients, and adapts new layers too
        targets = targeted_layers(config, model)
    shared: dict[str, Any] = {"target_modules": targets, "modules_to_save": [*new_layers(model)] or None}
    if method.adapter == "AdaLoraConfig":
        # Its authors start at one and a half times the rank, warm up for a tenth and end with a fixed budget for a third.
        budget = {"tinit": steps // 10, "tfinal": steps // 3, "deltaT": max(1, steps // 100), "total_step": steps}
        shared |= {"init_r": rank + rank // 2, "target_r": rank, "lora_alpha": config.alpha, **budget}
    elif method.adapter == "LoraConfig":
        shared |= {"r": rank, "lora_alpha": config.alpha}
    else:
        shared |= {"r": rank, "alpha": config.alpha}
    if method.gradient_init == "peft":
        shared["lora_ga_config"] = LoraGAConfig(stable_gamma=STABLE_GAMMA)
    return getattr(peft, str(method.adapter))(**shared, **method.settings)


def new_layers(model: Any) -> Sequence[str]:
    """The layers that an encoder got when it was loaded; they are trained and saved whole, and have no adapter."""
    return getattr(model, "new_layers", ())


def every_linear(model: Any) -> list[str]:
    """The linear layers that PEFT means by ``all-linear``: all but the output layer, and those that are new."""
    output = model.get_output_embeddings()
    new = new_layers(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not output and name not in new
    ]


def targeted_layers(config: Config, model: Any) -> list[str]:
    """The names of the linear layers that ``--targets`` means."""
    targets = target_modules(config, model)
    every = every_linear(model)
    if isinstance(targets, str):
        return every
    return [name for name in every if any(name == each or name.endswith(f".{each}") for each in targets)]


def finder_of(method: Method, config: Config, model: Any) -> finders.Finder | None:
    """Which matrices can have cores: None for LoRA's, which is what ``LoraOver`` finds by itself."""
    if method.over is None or not method.over.weights:
        return None
    return finders.full_weights(f"^({'|'.join(map(re.escape, targeted_layers(config, model)))})$")


def equal_rank(config: Config, model: Any) -> int:
    """The rank at which plain LoRA trains as many numbers as LoRA-Over-MPO_R does at the end with the same options."""
    over = METHODS["lora-over-mpo-r"].over
    assert over is not None
    with torch.device("meta"):
        copy: Any = type(model)(model.config)
    copy.new_layers = new_layers(model)
    targets = targeted_layers(config, copy)
    adapted = peft.get_peft_model(copy, LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets))
    planned = plan(adapted, over.make_factorization(config), top_n=config.top_n)
    return round(config.rank * planned.trained_parameters / planned.lora_parameters)


# -- LoRA-GA ----------------------------------------------------------------------------------------------------------


def gradient_config(adapter: LoraConfig) -> LoraConfig:
    """What ``preprocess_loraga`` asks for; the authors' initialization is none of PEFT's, so it has no such field."""
    return LoraConfig(target_modules=adapter.target_modules, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())


def _backward(model: Any, batches: Sequence[Batch]) -> None:
    for batch in batches:
        model(**batch).loss.backward()


@torch.no_grad()
def init_from_gradient(module: LoraLinear, adapter: str = "default") -> None:
    """The authors' initialization (LoRA-GA, arXiv:2407.05000, with ``ArB2r`` and the stable scale).

    With the gradient's singular vectors ``u_k`` and ``v_k``, of shape (out,) and (in,), A's rows are ``v_1 … v_r`` and B's
    columns ``u_(r+1) … u_2r``, both times ``out^(1/4) / sqrt(gamma)``; their product, scaled, is taken out of the base weight.

    Raises:
        ValueError: the layer is too small for 2r singular vectors.
    """
    base = module.get_base_layer()
    gradient = getattr(base, GRADIENT).float()
    rank = module.r[adapter]
    if min(gradient.shape) < 2 * rank:
        raise ValueError(
            f"--rank is {rank}: LoRA-GA needs {2 * rank} singular vectors, and a layer of "
            f"{'x'.join(map(str, gradient.shape))} has {min(gradient.shape)}; lower --rank or choose other --targets"
        )
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    scale = gradient.shape[0] ** 0.25 / STABLE_GAMMA**0.5
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    a.copy_(right[:rank] * scale)
    b.copy_(left[:, rank : 2 * rank] * scale)
    base.weight.sub_((module.scaling[adapter] * (b.float() @ a.float())).to(base.weight.dtype))
    delattr(base, GRADIENT)


# -- optimizers and callbacks -----------------------------------------------------------------------------------------


#: Of AdamW, in all that LoRA-Over trains.
BETAS = (0.9, 0.999)


def make_optimizer(model: Any, method: Method, config: Config) -> torch.optim.Optimizer:
    """AdamW with the betas of LoRA-Over, or the method's own optimizer."""
    assert config.lr is not None
    settings: dict[str, Any] = {"lr": config.lr, "betas": BETAS, "weight_decay": config.weight_decay}
    if method.optimizer == "riemannian":
        return cast("torch.optim.Optimizer", create_riemannian_optimizer(model, torch.optim.AdamW, **settings))
    if method.optimizer == "rite":
        from pytorch_optimizer import LoRARite

        # pairs in turn, A [r, d_in] before B [d_out, r]: the dimensions of the rank are the first and the last
        pairs = [
            m.get_parameter(f"lora_{side}.default.weight")
            for m in model.modules()
            if isinstance(m, LoraLinear)
            for side in "AB"
        ]
        settings["clip_unmagnified_grad"] = config.clip
        return cast("torch.optim.Optimizer", LoRARite(pairs, lora_l_dim=0, lora_r_dim=-1, **settings))
    if method.optimizer == "muon":
        # scaled to the size of an AdamW step, so that rates mean about the same
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.Muon(trained, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    if method.b_ratio is not None:
        optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=config.lr,
            loraplus_lr_ratio=method.b_ratio,
            loraplus_weight_decay=config.weight_decay,
            betas=BETAS,
        )
        return optimizer
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, **settings)


class AdaLoraBudget(TrainerCallback):
    """Lets AdaLoRA reallocate its ranks after each optimizer step, which the Trainer does not do by itself.

    Its averages of importance are no part of the model, so they are kept beside each checkpoint and read back from there. The
    pattern of ranks is kept there too, and out of PEFT's configuration until the end of training: PEFT would cut the matrices
    of a checkpoint down to it, and they would no longer fit the optimizer's state.
    """

    FILE = "adalora.pt"
    AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")

    def __init__(self, model: Any) -> None:
        self.tuner = model.base_model
        self.config = self.tuner.peft_config["default"]
        self.allocator = self.tuner.rankallocator
        self.rank_pattern: dict[str, list[bool]] | None = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.rank_pattern = self.rank_pattern
        self.tuner.update_and_allocate(state.global_step + 1)
        self.rank_pattern, self.config.rank_pattern = self.config.rank_pattern, None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = {name: getattr(self.allocator, name) for name in self.AVERAGES}
        torch.save({"rank_pattern": self.rank_pattern, "averages": kept}, self._path(args, state))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            return
        path = self._path(args, state)
        if not path.exists():
            raise ValueError(f"{path} is missing, so that AdaLoRA cannot go on; delete {path.parent} and resume again")
        kept = torch.load(path, weights_only=True, map_location=self.tuner.device)
        self.rank_pattern = kept["rank_pattern"]
        for name, averages in kept["averages"].items():
            setattr(self.allocator, name, averages)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config.rank_pattern = self.rank_pattern

    def _path(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE


def callbacks_of(model: Any, method: Method, training: Any) -> list[TrainerCallback]:
    """What the Trainer has to call while ``method`` trains on the examples of ``training``."""
    if method.adapter == "AdaLoraConfig":
        return [AdaLoraBudget(model)]
    if method.rescaled:
        config = training.config
        rows = RowSteps(model, lambda rng: training.draw(rng, model.device), config.lr, config.seed)
        model.row_rescale = rows.rescale  # which save_trained writes
        return [rows]
    return []


# -- saving -----------------------------------------------------------------------------------------------------------


def save_initial(model: Any, method: Method, folder: Path) -> None:
    """Keep the untrained adapter where the trained one alone does not say what changed.

    Raises:
        ValueError: ``folder`` has one already, of the interrupted run that goes on, and this one differs from it.
    """
    if not method.changes_base:
        return
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        model.save_pretrained(folder)
        return
    known, made = load_file(file), peft.get_peft_model_state_dict(model)
    if not all(torch.equal(known[name], made[name].cpu()) for name in known):
        raise ValueError(
            f"{folder} holds another initialization of {method.label} than this machine makes, so that its checkpoints do not "
            "fit; start again without --resume, or resume where the run began"
        )


def save_trained(model: Any, method: Method, work: Path) -> None:
    """Write ``model/`` after full fine-tuning and ``adapter/`` else; an adapter fits the base model as it was.

    α-LoRA has the scales of the rows beside its adapter. TT-LoRA is no adapter of PEFT's: ``tnadapt.load_adapters`` reads it.

    PiSSA, OLoRA and LoRA-GA changed the base, so their adapter is written as plain LoRA of twice the rank.
    """
    if method.adapter is None:
        model.save_pretrained(work / "model")
    elif method.tensor_train:
        (work / "adapter").mkdir(exist_ok=True)
        save_adapters(model, work / "adapter" / "tt_lora.safetensors", kind=TTLoraLinear)
    elif method.changes_base:
        initial = str(work / "initial")
        model.save_pretrained(work / "adapter", path_initial_model_for_weight_conversion=initial)
    else:
        model.save_pretrained(work / "adapter")
        if method.rescaled:
            model.row_rescale.save(work / "adapter" / ALPHA_FILE)
