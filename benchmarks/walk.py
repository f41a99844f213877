"""The walk of a gradient through an ordinary optimizer step: which functions of the package run, in which files.

    python benchmarks/walk.py            # prints the walk, and writes docs/walk.md

The model is small and has four LoRA matrices, all expanded at order 4; the optimizer is AdamW. In an "ordinary" step nothing is expanded,
folded back or unfolded anew. A scheduler that still scores waiting matrices is shown beside one that has nothing left to do.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import tnadapt
from tnadapt import MPO, LoraOver, OverParamAdapter, Scheduler, Static, TaylorRuntime

PACKAGE = Path(tnadapt.__file__).parent
PAGE = PACKAGE.parent / "docs" / "walk.md"


def ordinary_step(scheduler: Scheduler, order: int = 4, layers: int = 2) -> tuple[Callable[[], Any], LoraOver]:
    """A model in training, and its next optimizer step."""
    torch.manual_seed(0)
    model = nn.Sequential(*[OverParamAdapter.from_linear(nn.Linear(12, 12), rank=4, alpha=8) for _ in range(layers)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    over = LoraOver(model, optimizer, MPO(order=order), scheduler)

    def backward() -> None:
        optimizer.zero_grad()
        model(torch.ones(3, 12)).square().sum().backward()

    for _ in range(3):
        backward()
        optimizer.step()
    backward()
    return optimizer.step, over


def walk(step: Callable[[], Any]) -> list[tuple[int, str, str]]:
    """Depth, file and function of every call into the package while `step` runs, in order."""
    calls: list[tuple[int, str, str]] = []
    depth = 0

    def traced(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth
        file = Path(frame.f_code.co_filename)
        if PACKAGE not in file.parents or frame.f_code.co_name.startswith("<"):
            return
        if event == "call":
            calls.append((depth, file.relative_to(PACKAGE).as_posix(), frame.f_code.co_qualname))
            depth += 1
        elif event == "return":
            depth -= 1

    sys.setprofile(traced)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


def figures(calls: list[tuple[int, str, str]]) -> tuple[int, int, int, int]:
    """Calls, functions, files, and how often one call is in another file than the one before."""
    files = [file for _, file, _ in calls]
    changes = sum(a != b for a, b in itertools.pairwise(files))
    return len(calls), len({(file, name) for _, file, name in calls}), len(set(files)), changes


CASES: dict[str, Callable[[], Scheduler]] = {
    "every matrix expanded from the start (`Static`)": Static,
    "rounds that are over (`TaylorRuntime`)": lambda: TaylorRuntime(top_n=2, split=1, every=1),
    "matrices still waiting for their round (`TaylorRuntime`)": lambda: TaylorRuntime(top_n=2, split=2, every=3),
}


def page() -> str:
    """The walk in words."""
    lines = [
        "# The walk of a gradient",
        "",
        "This page lists the functions of the package that an ordinary optimizer step calls, with four matrices at order 4 and AdamW on a CPU.",
        "`python benchmarks/walk.py` writes it. *Changes of file* counts how often a call is in another file than the call before.",
        "",
        "| step | calls | functions | files | changes of file |",
        "|---|---:|---:|---:|---:|",
    ]
    shown: list[tuple[int, str, str]] = []
    for name, scheduler in CASES.items():
        step, _ = ordinary_step(scheduler())
        calls = walk(step)
        lines.append("| {} | {} | {} | {} | {} |".format(name, *figures(calls)))
        shown = shown or calls
    lines += ["", "The first step of the table, call by call:", "", "```"]
    lines += [f"{'  ' * depth}{name}    {file}" for depth, file, name in shown]
    return "\n".join([*lines, "```", ""])


def main() -> None:
    """Print the walk and write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write it (default: docs/walk.md)")
    text = page()
    parser.parse_args().page.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
