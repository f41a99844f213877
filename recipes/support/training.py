"""Training of an adapter through an unmodified Trainer, with checkpoints that a killed run goes on from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from support.config import Config
from support.methods import Method
from support.results import expansions
from tnadapt import LoraOver, plan
from tnadapt.integrations.transformers import last_complete_checkpoint


def train(
    model: Any,
    tokenizer: Any,
    examples: list[dict[str, list[int]]],
    method: Method,
    config: Config,
    work: Path,
    quiet: bool,
) -> dict[str, Any]:
    """Train ``model`` in place and tell what happened: ``metrics``, ``curve``, ``plan`` and ``matrices``."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert config.lr is not None
    optimizer = torch.optim.AdamW(trainable, lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay)
    over, table = None, ""
    if method.over is not None:
        factorization, scheduler = method.over.make_factorization(config), method.over.make_scheduler(config)
        table = str(plan(model, factorization, top_n=getattr(scheduler, "top_n", None)))
        if not quiet:
            print(table)
        over = LoraOver(model, optimizer, factorization, scheduler, core_lr=config.core_lr)
    trainer = make_trainer(model, tokenizer, examples, optimizer, config, work / "checkpoints", quiet)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(work / "checkpoints"))
    state = trainer.state
    curve = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
    tail = [loss for _, loss in curve[-5:]]
    lora_parameters = sum(parameter.numel() for parameter in trainable)
    result = {
        "metrics": {
            "loss": sum(tail) / len(tail) if tail else float("nan"),
            "steps": state.global_step,
            "tokens": int(state.num_input_tokens_seen),
            "training_seconds": time.perf_counter() - start,
            "lora_parameters": lora_parameters,
            "trained_parameters": over.trained_parameters if over else lora_parameters,
        },
        "curve": curve,
        "plan": table,
        "matrices": expansions(over) if over else [],
    }
    if over:
        over.fold()
    return result


def make_trainer(
    model: Any,
    tokenizer: Any,
    examples: list[dict[str, list[int]]],
    optimizer: torch.optim.Optimizer,
    config: Config,
    checkpoints: Path,
    quiet: bool,
) -> Trainer:
    """A Trainer with the configuration's schedule; padding is on the right."""
    steps = config.max_steps or config.epochs * -(-len(examples) // config.batch)
    tokenizer.padding_side = "right"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=config.micro_batch,
        gradient_accumulation_steps=config.batch // config.micro_batch,
        max_steps=steps,
        lr_scheduler_type="cosine",
        max_grad_norm=config.clip,
        seed=config.seed,
        bf16=config.dtype == "bfloat16",
        activation_checkpointing=config.activation_checkpointing,
        logging_steps=max(1, steps // 50),
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        include_num_input_tokens_seen="non_padding",
        disable_tqdm=quiet,
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    if not quiet:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossBar)
    return trainer


class LossBar(ProgressCallback):
    """The Trainer's progress bar, with the loss in it instead of in lines of its own."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}")
