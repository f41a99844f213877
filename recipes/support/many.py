"""Many runs of recipes: one after the other, in several processes, or on a Ray cluster."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import multiprocessing
import os
import sys
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from tqdm import tqdm

from support.cluster import LOCAL, run_on_cluster
from support.recipe import Recipe

#: The folder of the recipes.
HERE = Path(__file__).resolve().parents[1]

#: The file of a recipe, and a configuration of its.
Job = tuple[Path, Any]


@lru_cache(maxsize=4)
def load_recipe(path: Path) -> Recipe:
    """The ``RECIPE`` of the file ``path``."""
    if not path.exists():
        raise ValueError(f"--recipe is {path}, which does not exist; the recipes lie in {HERE}")
    name = f"ablated_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    if specification is None or specification.loader is None:
        raise ValueError(f"--recipe is {path}, which is no Python file; the recipes lie in {HERE}")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"--recipe is {path}, which has no RECIPE; the recipes lie in {HERE}")
    return recipe


def recipe_of(arguments: Sequence[str] | None, default: Path) -> tuple[argparse.ArgumentParser, Recipe]:
    """The parser of ``--recipe`` alone, and the recipe that the command line names; what is none ends the script in one line."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--recipe", type=Path, default=default, help="the file of the recipe")
    try:
        return parser, load_recipe(parser.parse_known_args(arguments)[0].recipe)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def run_one(recipe: Path, settings: dict[str, Any], root: Path, quiet: bool) -> dict[str, Any]:
    """One run of the recipe; what failed is a result with an ``error``, so that the other runs go on."""
    from support.running import hush, run

    hush()
    loaded = load_recipe(recipe)
    try:
        result = run(loaded, loaded.config(**settings), root, resume=True, quiet=quiet)
    except Exception as error:
        return {"config": settings, "error": f"{type(error).__name__}: {error}"}
    return result


def _begin_worker() -> None:
    """One thread for each worker, which ends with the process that gives it runs, also where that one is killed."""
    torch.set_num_threads(1)
    driver = multiprocessing.parent_process()
    assert driver is not None

    def end_with_driver() -> None:
        driver.join()
        os._exit(1)

    threading.Thread(target=end_with_driver, daemon=True).start()


@dataclass(frozen=True)
class Sweep:
    """Where runs are made, and how many at once."""

    runs: Path
    """The folder of the runs. A run that is finished there is not made again; an unfinished one goes on."""
    workers: int = 1
    cluster: str | None = None
    gpus_per_run: float = 0.0

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """The options that ``of`` reads."""
        parser.add_argument("--workers", type=int, default=1, help="runs at once, each with one thread if above 1")
        parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders and tables go")
        parser.add_argument(
            "--cluster",
            nargs="?",
            const=LOCAL,
            metavar="ADDRESS",
            help=f"make the runs on this Ray cluster; {LOCAL}, or no address, starts one here with --workers CPUs",
        )
        parser.add_argument(
            "--gpus-per-run",
            type=float,
            default=0.0,
            help="GPUs of each run on the cluster, also fractions; 0: the CPU alone",
        )

    @classmethod
    def of(cls, options: argparse.Namespace) -> Self:
        """The sweep that parsed options ask for.

        Raises:
            ValueError: options that do not go together.
        """
        if options.workers < 1:
            raise ValueError(f"--workers is {options.workers}: give at least 1")
        if options.gpus_per_run and options.cluster is None:
            raise ValueError(
                f"--gpus-per-run is {options.gpus_per_run:g}, which is for runs on a cluster; add --cluster"
            )
        return cls(options.runs, options.workers, options.cluster, options.gpus_per_run)

    def run(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """The results of all ``jobs``, in their order; one that failed has an ``error``."""
        results = dict(self.results(jobs))
        return [results[index] for index in range(len(jobs))]

    def results(self, jobs: Sequence[Job]) -> Generator[tuple[int, dict[str, Any]]]:
        """The number of each of the ``jobs`` and its result, as they come. Who stops asking ends the runs that have not begun."""
        settings = [(recipe, dataclasses.asdict(config)) for recipe, config in jobs]
        if self.cluster is not None:
            found = run_on_cluster(self.cluster, self.gpus_per_run, settings, self.runs, self.workers)
        elif self.workers == 1:
            found = ((index, run_one(*each, self.runs, quiet=False)) for index, each in enumerate(settings))
        else:
            found = self._in_processes(settings)
        with closing(found), tqdm(total=len(settings), desc="runs", unit="run") as bar:
            for each in found:
                bar.update()
                yield each

    def _in_processes(self, settings: Sequence[tuple[Path, dict[str, Any]]]) -> Generator[tuple[int, dict[str, Any]]]:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.workers, context, _begin_worker)
        try:
            made = {pool.submit(run_one, *each, self.runs, True): index for index, each in enumerate(settings)}
            for future in as_completed(made):
                yield made[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
