"""Training of a method through an unmodified Trainer, with checkpoints that a killed run goes on from."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from support import ranks
from support.adapters import callbacks_of, finder_of, make_optimizer
from support.config import Config
from support.evaluation.tokenization import IGNORED, collator
from support.generated import drop_generators
from support.methods import METHODS, Method
from support.provenance import read_json, write_json
from support.results import expansions
from tnadapt import LoraOver, finders, plan, predefined
from tnadapt.integrations.transformers import LoraOverCallback, last_complete_checkpoint

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


class Made:
    """What the Trainer makes its optimizer with, once the model is where it is trained."""

    def __call__(self, model: Any, make: MakeOptimizer) -> torch.optim.Optimizer:
        return make(model)


class Training:
    """The training examples of one run, their batches, and the Trainer's settings."""

    def __init__(
        self, tokenizer: Any, examples: Sequence[dict[str, list[int]]], config: Config, work: Path, quiet: bool
    ) -> None:
        self.examples = list(examples)
        self.config = config
        self.work = work
        self.quiet = quiet
        self.collate = collator(tokenizer)
        self.steps = config.max_steps or config.epochs * -(-len(self.examples) // config.batch)

    def batches(self, size: int, device: Any = None) -> list[dict[str, torch.Tensor]]:
        """The first ``size`` examples, in batches of at most ``micro_batch``."""
        chosen, step = self.examples[:size], self.config.micro_batch
        made = [self.collate(chosen[start : start + step]) for start in range(0, len(chosen), step)]
        return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in made]

    def draw(self, rng: random.Random, device: Any = None) -> dict[str, torch.Tensor]:
        """A batch of ``micro_batch`` examples that are drawn at random."""
        chosen = rng.sample(self.examples, min(self.config.micro_batch, len(self.examples)))
        return {name: tensor.to(device) for name, tensor in self.collate(chosen).items()}

    def per_device(self) -> int:
        """Examples at once on each rank.

        Raises:
            ValueError: a batch that cannot be divided over the ranks.
        """
        config, world = self.config, ranks.world()
        share = config.batch // world
        size = min(config.micro_batch, max(share, 1))
        if config.batch % world or share % size:
            raise ValueError(
                f"--batch is {config.batch}: {world} ranks cannot have equal shares of it in batches of --micro-batch "
                f"{config.micro_batch}; give a multiple of {world * config.micro_batch}, or a --micro-batch that divides the shares"
            )
        return size

    def trainer(self, model: Any, make: MakeOptimizer, callbacks: Sequence[Any], name: str) -> Trainer:
        """An unmodified Trainer whose checkpoints go to the folder ``name``.

        Raises:
            ValueError: the model is to be sharded, and accelerate shards none here.
        """
        config, size = self.config, self.per_device()
        # accelerate takes CPU ranks for ranks only where it is told that they have no GPU
        on_cpu = ranks.world() > 1 and not torch.accelerator.is_available() and not ranks.sharded()
        arguments = TrainingArguments(
            output_dir=str(self.work / name),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=config.batch // (size * ranks.world()),
            max_steps=self.steps,
            lr_scheduler_type="cosine",
            max_grad_norm=0.0 if METHODS[config.method].clips else config.clip,
            seed=config.seed,
            bf16=config.dtype == "bfloat16",
            activation_checkpointing=config.activation_checkpointing,
            logging_steps=max(1, self.steps // 50),
            save_strategy="steps",
            save_steps=config.save_every,
            save_total_limit=2,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            include_num_input_tokens_seen="non_padding",
            disable_tqdm=self.quiet,
            report_to="none",
            use_cpu=on_cpu,
            ddp_find_unused_parameters=False if ranks.world() > 1 else None,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=self.examples,
            data_collator=self.collate,
            optimizer_cls_and_kwargs=(Made, {"make": make}),
            callbacks=list(callbacks),
        )
        if ranks.sharded() and not trainer.is_fsdp_enabled:
            raise ValueError(
                "accelerate was told to shard the model (FSDP), which it does on GPUs only, and there are none: start the ranks "
                "with torchrun, or with accelerate launch --cpu, for DDP"
            )
        trainer.remove_callback(PrinterCallback)
        if not self.quiet:
            trainer.remove_callback(ProgressCallback)
            trainer.add_callback(LossBar)
        return trainer

    def run(
        self,
        model: Any,
        make: MakeOptimizer,
        callbacks: Sequence[Any] = (),
        stop_after: int = 0,
        name: str = "checkpoints",
    ) -> Any:
        """Train ``model`` in place, from the last complete checkpoint in the folder ``name``.

        Args:
            model: what is trained.
            make: makes its optimizer.
            callbacks: for the Trainer.
            stop_after: steps after which training ends; 0: with its schedule.
            name: of the folder with the checkpoints.

        Returns:
            The Trainer's state.
        """
        trainer = self.trainer(model, make, [*callbacks, Until(stop_after or self.steps)], name)
        try:
            trainer.train(resume_from_checkpoint=last_complete_checkpoint(self.work / name))
        except Trained:
            trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        return trainer.state


def train(model: Any, method: Method, training: Training, watching: Sequence[Any] = ()) -> dict[str, Any]:
    """Train ``model`` in place with ``method``, and tell what happened: ``metrics``, ``curve``, ``plan`` and ``matrices``.

    Args:
        model: as ``attach`` has made it.
        method: what to train it with.
        training: the examples and the settings.
        watching: callbacks of the Trainer that look on.
    """
    config = training.config
    scores = None
    if method.over is not None and method.over.choice == "predefined":
        scores = scores_of_ablation(model, method, training)
    elif method.over is not None and method.over.choice == "random":
        drawn = random.Random(config.seed)
        scores = {name: drawn.random() for name in finders.collect(model, finder_of(method, config, model))[0]}
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    overs: list[LoraOver] = []
    table, settings, beside = "", None, trainable
    if method.over is not None:
        finder = finder_of(method, config, model)
        matrices = finders.collect(model, finder)[0].values()
        beside -= sum(matrix.parameter.numel() for matrix in matrices)
        shapes = {(matrix.parameter.shape[0], matrix.parameter.shape[1]) for matrix in matrices}
        factorization = method.over.make_factorization(config, shapes)
        scheduler = method.over.make_scheduler(config, training.steps, scores)
        if not (config.which or method.over.which):  # the table is of whole groups
            table = str(plan(model, factorization, top_n=getattr(scheduler, "top_n", None), matrices=finder))
        if not training.quiet:
            print(table)
        settings = (factorization, scheduler, finder)

    def make(model: Any) -> torch.optim.Optimizer:
        optimizer = make_optimizer(model, method, config)
        if settings is not None:
            factorization, scheduler, finder = settings
            choices: dict[str, Any] = {"core_lr": config.core_lr, "matrices": finder}
            choices |= {"matched": config.matched, "shard": config.shard}
            overs.append(LoraOver(model, optimizer, factorization, scheduler, **choices))
        return optimizer

    callbacks = [*callbacks_of(model, method, training), *watching]
    if settings is not None and (ranks.sharded() or config.shard):
        # the optimizer's files have no cores under FSDP, and this rank's alone where they are dealt out
        callbacks.append(LoraOverCallback())
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    state = training.run(model, make, callbacks, config.stop_after)
    over = overs[0] if overs else None
    curve = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
    tail = [loss for _, loss in curve[-5:]]
    result = {
        "metrics": {
            "loss": sum(tail) / len(tail) if tail else float("nan"),
            "steps": state.global_step,
            "tokens": int(state.num_input_tokens_seen),
            "training_seconds": time.perf_counter() - start,
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "lora_parameters": trainable,
            "trained_parameters": beside + over.trained_parameters if over else trainable,
        },
        "curve": curve,
        "plan": table,
        "matrices": expansions(over) if over else [],
    }
    if over:
        over.fold()
    if method.generated:
        drop_generators(model)
    return result


#: Training examples on which MPO_P's ablation measures the loss; LoRA-Over does not say which it takes.
ABLATION_EXAMPLES = 256


def scores_of_ablation(model: Any, method: Method, training: Training) -> dict[str, float]:
    """The first stage of MPO_P: train plain LoRA, and score each matrix by what zeroing it does to the loss.

    ``model`` is afterwards what it was. The scores are kept in ``ablation.json``; a run that goes on reads them from there, and
    goes on in the first stage's checkpoints if it was interrupted before.
    """
    file = training.work / "ablation.json"
    if file.exists():
        scores: dict[str, float] = read_json(file)
        return scores
    batches = training.batches(ABLATION_EXAMPLES, model.device)

    @torch.no_grad()
    def mean_loss() -> float:
        losses = [(float(model(**batch).loss), int((batch["labels"] != IGNORED).sum())) for batch in batches]
        return sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)

    def train_plain() -> None:
        training.run(model, lambda model: make_optimizer(model, method, training.config), name="ablation")

    scores = predefined(model, train_plain, mean_loss, training.config.top_n).scores
    if ranks.is_first():
        write_json(file, scores)
        shutil.rmtree(training.work / "ablation", ignore_errors=True)
    return scores


class Trained(Exception):
    """The checkpoint that was read is of the end of training."""


class Until(TrainerCallback):
    """Ends training after a number of steps; the Trainer by itself takes one more where a checkpoint has them all.

    Raises:
        Trained: everything of such a checkpoint has been read.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.steps:
            raise Trained

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.steps


class LossBar(ProgressCallback):
    """The Trainer's progress bar, with the loss in it instead of in lines of its own."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}")
