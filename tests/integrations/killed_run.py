"""Runs of HF Trainer in processes of their own, to be killed and resumed: `python -m integrations.killed_run FOLDER KILL_AT [KILL_AT ...]`.

In FOLDER/passed an optimizer with `LoraOver` attached is given to the trainer, in FOLDER/callback the trainer makes it. Each
run resumes from the newest whole checkpoint of its folder, if any, and dies without notice at the end of the step KILL_AT,
while a checkpoint of that step is being written; with 0 it goes on to its end and writes `final.pt`. Printed is how each
ended, as `WAY KILL_AT CODE WHOLE`: the exit code, negative for a signal, and the newest checkpoint that is whole.

`FOLDER --clocked WAY STEPS` is one such run in this very process, of STEPS steps, for others to kill: "ready" is printed before.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from tnadapt import LoraOver
from tnadapt.integrations.transformers import LoraOverCallback, last_complete_checkpoint

from .tiny import arguments, dataset, lora_model, lora_parameters, lora_weights, mpo, rounds

STEPS = 10
#: of a run that is killed by a clock
LONG = 80
WAYS = ("passed", "callback")


class KillWhileWriting(TrainerCallback):
    """At the end of `step`, dies with half a checkpoint on disk."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            half = self.folder / f"checkpoint-{self.step}"
            kwargs["model"].save_pretrained(half)
            torch.save(kwargs["optimizer"].state_dict(), half / "optimizer.pt")
            with (half / "optimizer.pt").open("r+b") as stream:
                stream.truncate(1000)
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    way: str, folder: Path, kill_at: int = 0, steps: int = STEPS
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The weights that the run ended with, and what each round of expansion knew."""
    torch.set_num_threads(1)
    model = lora_model(lora_dropout=0.1)
    args = arguments(
        folder,
        max_steps=steps,
        save_strategy="steps",
        save_steps=1,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        lr_scheduler_type="cosine",
    )
    callbacks: list[TrainerCallback] = [KillWhileWriting(folder, kill_at)]
    optimizer, scheduler = None, rounds()
    if way == "passed":
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=args.learning_rate, foreach=True)
        LoraOver(model, optimizer, mpo(), scheduler, core_lr=1e-2)
    else:
        callbacks.append(LoraOverCallback(mpo(), scheduler, core_lr=1e-2))
    trainer = Trainer(model, args, train_dataset=dataset(64), optimizers=(optimizer, None), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    assert trainer.state.global_step == steps
    return lora_weights(model), scheduler.rounds


def run_in_child(way: str, folder: Path, kill_at: int) -> int:
    """The exit code of a process that runs this. Nothing has been computed before it is forked."""
    child = os.fork()
    if child == 0:
        try:
            torch.save(run(way, folder, kill_at), folder / "final.pt")
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__" and sys.argv[2] == "--clocked":
    print("ready", file=sys.stderr, flush=True)
    torch.save(run(sys.argv[3], Path(sys.argv[1]), steps=int(sys.argv[4])), Path(sys.argv[1]) / "final.pt")
elif __name__ == "__main__":
    for kill_at in map(int, sys.argv[2:]):
        for way in WAYS:
            own = Path(sys.argv[1]) / way
            print(way, kill_at, run_in_child(way, own, kill_at), last_complete_checkpoint(own), file=sys.stderr)
