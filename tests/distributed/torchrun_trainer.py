"""Run by torchrun: HF Trainer under DDP, with LoraOver on an optimizer of the caller's or by callback; then one process alone
repeats it. Writes what test_torchrun.py compares to the folder of the first argument."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.distributed.models import Net, load_values, loss_of, net, scheduler, trainable, whole_values
from tests.distributed.ranks import leave
from tnadapt import MPO, LoraOver
from tnadapt.integrations.transformers import LoraOverCallback

ROWS = 64


class Regression(torch.nn.Module):
    """What Trainer wants: a loss from keyword arguments."""

    def __init__(self, inner: Net) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        return {"loss": loss_of(self.inner, x)}


class Done(TrainerCallback):
    """Keeps the whole history before the callback folds."""

    def __init__(self) -> None:
        self.history: list[Any] = []
        self.seen: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.history = [(e.step, e.action, e.names) for e in self.seen().history]


def main() -> None:
    folder, how = Path(sys.argv[1]), sys.argv[2]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = Regression(net(rank))
    initial = folder / "initial.pt"
    if world == 1:
        load_values(model.inner, torch.load(initial))
    elif rank == 0:
        torch.save(whole_values(model.inner), initial)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(ROWS, 10, generator=generator, dtype=torch.float64)
    args = TrainingArguments(
        output_dir=str(folder / f"out{world}"),
        per_device_train_batch_size=8 // world // 2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=0.01,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        ddp_backend="gloo" if world > 1 else None,
        ddp_find_unused_parameters=False if world > 1 else None,
        dataloader_num_workers=0,
        optim="adamw_torch",
        remove_unused_columns=False,
    )
    data = [{"x": row} for row in rows]
    done = Done()
    if how == "optimizer":
        optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
        over = LoraOver(model, optimizer, MPO(order=4), scheduler())
        done.seen = lambda: over
        trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[done])
    else:
        callback = LoraOverCallback(MPO(order=4), scheduler())
        done.seen = lambda: callback.over
        trainer = Trainer(model, args, train_dataset=data, callbacks=[done, callback])
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)  # the same global batches
    trainer.train()
    assert trainer.state.global_step == 8
    torch.save({"values": whole_values(model.inner), "history": done.history}, folder / f"end{world}-{rank}.pt")


main()
leave()
