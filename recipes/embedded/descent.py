"""The loop that the embedded models are pre-trained in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


def descend(
    model: Any,
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int], torch.Tensor],
    steps: int,
    done: int = 0,
    clip: float = 1.0,
) -> Iterator[tuple[int, float]]:
    """Take the steps from ``done`` to ``steps``; after each, its number and its loss are given.

    Args:
        model: is trained in place.
        optimizer: of its parameters.
        loss_at: the loss of a step; may set the optimizer's learning rate.
        steps: of the whole training.
        done: steps that were taken before.
        clip: largest norm of the gradient.
    """
    model.train()
    with tqdm(total=steps, initial=done, unit="step") as bar:
        for step in range(done, steps):
            loss = loss_at(step)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            bar.update()
            if (step + 1) % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
            yield step, loss.item()
    model.eval()


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write both to ``folder``."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
