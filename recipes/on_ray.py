"""A recipe on several ranks of a Ray cluster, by Ray Train. Options before the recipe are about the ranks, those after it are the recipe's::

    python recipes/on_ray.py --ranks 8 --gpus recipes/llama31_gsm8k.py --preset paper --method lora-over-mpo-r

Every node sees the recipes, the data and ``--runs`` under the same paths. For FSDP2, set what ``accelerate launch`` would set; it is
handed to the ranks::

    ACCELERATE_USE_FSDP=true FSDP_VERSION=2 python recipes/on_ray.py …
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.cluster import LOCAL, connected, require_gpus

HERE = Path(__file__).resolve().parent


def on_a_rank(settings: dict[str, Any]) -> None:
    """The recipe, on one of the ranks; Ray Train has brought them together."""
    import os
    import sys

    os.chdir(settings["folder"])
    os.environ.update(settings["environment"])
    sys.path.insert(0, settings["recipes"])
    from support.command_line import main
    from support.many import load_recipe

    try:
        main(load_recipe(Path(settings["recipe"])), settings["arguments"])
    except SystemExit as ended:  # of which Ray Train takes no notice
        if ended.code:
            raise RuntimeError(f"the recipe ended with status {ended.code}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("::")[0], allow_abbrev=False)
    parser.add_argument("--ranks", type=int, required=True, help="processes that train together")
    parser.add_argument("--gpus", action="store_true", help="each rank has a GPU")
    parser.add_argument(
        "--cluster", default=LOCAL, metavar="ADDRESS", help=f"of the Ray cluster; {LOCAL} (default) starts one here"
    )
    parser.add_argument("recipe", type=Path, help="the file of the recipe")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the recipe's own options")
    options = parser.parse_args(arguments)
    try:
        train(options)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def train(options: argparse.Namespace) -> None:
    """Run the recipe on all ranks.

    Raises:
        ValueError: less than one rank, no such recipe, no Ray, no cluster or not enough GPUs in it, before anything is run; or the recipe
            failed.
    """
    if options.ranks < 1:
        raise ValueError(f"--ranks is {options.ranks}: give a number of at least 1")
    if not options.recipe.is_file():
        raise ValueError(f"{options.recipe} does not exist; the recipes lie in {HERE}")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it would print everything twice
    with connected(options.cluster, options.ranks + 1, shown=True) as ray:
        if options.gpus:
            require_gpus(ray, options.cluster, 1.0)
            there = ray.cluster_resources().get("GPU", 0.0)
            if there < options.ranks:
                raise ValueError(f"--ranks is {options.ranks}: the cluster has {there:g} GPUs; add nodes, or give less")
        from ray.train import RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer

        settings = {
            "folder": str(Path.cwd()),
            "recipes": str(HERE),
            "recipe": str(options.recipe.resolve()),
            "arguments": options.arguments,
            "environment": {k: v for k, v in os.environ.items() if k.startswith(("ACCELERATE_", "FSDP_"))},
        }
        trainer = TorchTrainer(
            on_a_rank,
            train_loop_config=settings,
            scaling_config=ScalingConfig(num_workers=options.ranks, use_gpu=options.gpus),
            run_config=RunConfig(storage_path=str(Path("runs/ray").resolve())),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"the ranks failed, and have said why above ({reason})") from error


if __name__ == "__main__":
    main()
