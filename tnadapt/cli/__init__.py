"""The command `tnadapt`. Its parser needs argparse alone; what a command needs is imported when the command runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; `sys.argv` where no arguments are given.

    Returns:
        The exit status: 0, or 2 where the input cannot be used, which is said in one sentence.
    """
    options = _parser().parse_args(arguments)
    try:
        text = _COMMANDS[options.command](options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"tnadapt {options.command}: error: {error}", file=sys.stderr)
        return 2
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # who reads has seen enough, as `head` does; the interpreter is not to flush into the closed pipe when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _plan(options: argparse.Namespace) -> str:
    from tnadapt.cli.plan import run

    return run(options)


def _inspect(options: argparse.Namespace) -> str:
    from tnadapt.cli.inspect import run

    return run(options.checkpoint, as_json=options.json)


def _report(options: argparse.Namespace) -> str:
    from tnadapt.cli.report import run

    return run(options.runs, options.html, as_json=options.json)


_COMMANDS = {"plan": _plan, "inspect": _inspect, "report": _report}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tnadapt", description="Train LoRA adapters through tensor networks and fold them back to plain LoRA."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_plan(commands.add_parser("plan", help="what would be expanded in a model, from its configuration alone"))
    one = commands.add_parser("inspect", help="what a checkpoint of a run with LoraOver holds")
    one.description = (
        "What is expanded, its bonds and norms, the scheduler, and whether the adapter beside it agrees with the cores."
    )
    one.add_argument("checkpoint", type=Path, help="optimizer.pt, tnadapt.pt, or a checkpoint folder of HF Trainer")
    one.add_argument("--json", action="store_true", help="print JSON")
    many = commands.add_parser("report", help="compare finished runs of the recipes")
    many.description = "Compare runs of the recipes: results, settings that differ, loss curves and expansions."
    many.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN_FOLDER", help="a folder with result.json, or one of such folders"
    )
    many.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the pictures in it")
    many.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What a factorization would make of a model's LoRA matrices, and what that costs. Reads no weights."
    )
    parser.add_argument("model", help="a folder with config.json, that file, or a hub id")
    parser.add_argument(
        "--targets",
        default="all-linear",
        help="modules that get LoRA, with commas; all-linear (default) for every linear layer",
    )
    parser.add_argument("--rank", type=int, default=8, help="rank of LoRA (default: 8)")
    parser.add_argument("--top-n", type=int, help="matrices to expand in each group (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    where = parser.add_argument_group("costs", "With AdamW. What a step needs above plain LoRA.")
    where.add_argument("--ranks", type=int, default=1, help="ranks that train together (default: 1)")
    where.add_argument("--engine", choices=("ddp", "fsdp2"), default="ddp", help="what they train with (default: ddp)")
    where.add_argument("--shard", action="store_true", help="the cores of each matrix are on one rank only")
    where.add_argument("--tokens-per-step", type=int, help="of one optimizer step, over all ranks and micro-batches")
    where.add_argument(
        "--decompose-gflops",
        type=float,
        help="10^9 flops a second of the CPU that decomposes, in float64 (default: measured here)",
    )
    how = parser.add_argument_group("factorization", "Those that are not given keep the defaults of the factorization.")
    how.add_argument(
        "--factorization",
        default="MPO",
        help='MPO (default), SVD, Tucker, CP, TensorRing, or what to_dict() gives, as JSON: \'{"type": "MPO", "order": 9}\'',
    )
    how.add_argument("--order", type=int, help="number of sites")
    how.add_argument("--expansion", type=float, help="parameters over the matrix's own, instead of the order")
    how.add_argument(
        "--sites", help="rows x columns of each site, such as 64x2,1x1,64x4; for models with one shape of matrix"
    )
    how.add_argument("--max-bond", type=int, help="cap on the bonds of an MPO, SVD or tensor ring")
    how.add_argument("--max-rank", type=int, help="cap on the ranks of a Tucker or CP")
    how.add_argument("--components", type=int, help="number of components of a CP")
    how.add_argument("--gauge", help="gauge of an MPO, SVD, Tucker or CP")
    how.add_argument("--backend", help="who contracts: torch, opt_einsum, tensorly, tensornetwork")
