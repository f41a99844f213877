"""Many runs on a Ray cluster: each is a task, which goes to another node where its own is lost.

Every node sees the recipes, the data and the folder of the runs under the same paths (a shared file system), and has the same
environment. What a run leaves are the same files as on one machine.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.folders import UNFINISHED
from support.provenance import config_hash

__all__ = ["LOCAL", "connected", "require_gpus", "run_on_cluster"]

LOCAL = "local"
#: How often a run is begun again on another node before it counts as failed.
RETRIES = 5
_ANSWERS_WITHIN = 10.0


def run_on_cluster(
    address: str, gpus_per_run: float, jobs: Sequence[tuple[Path, dict[str, Any]]], root: Path, workers: int = 1
) -> Generator[tuple[int, dict[str, Any]]]:
    """The number and the result of each run, as they come; a result is what `many.run_one` gives.

    Args:
        address: of the cluster (``host:port``, ``ray://host:port``, or ``auto`` on one of its nodes); ``local`` for a new one on this
            machine.
        gpus_per_run: GPUs that each run has, possibly a share of one; 0 for runs on the CPU.
        jobs: the recipe's file and the settings of each run.
        root: the folder of the runs.
        workers: runs at once on a new local cluster; another cluster runs as many as it has CPUs and GPUs for.

    Raises:
        ValueError: there is no Ray, nothing answers at the address, no node has as many GPUs, or a number of GPUs that means nothing.
            Nothing was run then.
    """
    if gpus_per_run < 0 or (gpus_per_run > 1 and gpus_per_run % 1):
        raise ValueError(f"--gpus-per-run is {gpus_per_run:g}: give a share of one GPU, or a whole number")
    with connected(address, workers) as ray:
        require_gpus(ray, address, gpus_per_run)
        # workers have yet to find the recipes, so the function goes to them whole and not by its name
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        task = ray.remote(num_cpus=1, num_gpus=gpus_per_run, max_retries=RETRIES)(_in_worker)
        here = (str(Path(__file__).resolve().parents[1]), str(Path.cwd()))
        waiting = {}
        for index, (recipe, settings) in enumerate(jobs):
            lock = root.resolve() / UNFINISHED / f"{config_hash(settings)}.lock"
            waiting[task.remote(here, str(recipe.resolve()), settings, str(root.resolve()), str(lock))] = index
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            index = waiting.pop(done)
            try:
                yield index, ray.get(done)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                yield index, {"config": jobs[index][1], "error": f"{type(error).__name__}: {reason}"}


def _in_worker(here: tuple[str, str], recipe: str, settings: dict[str, Any], root: str, lock: str) -> dict[str, Any]:
    """One run, on some node. Of the recipes nothing is known before they are on the path."""
    recipes, folder = here
    for needed in (recipes, folder, recipe):
        if not Path(needed).exists():
            return {
                "config": settings,
                "error": f"FileNotFoundError: {needed} is not on {socket.gethostname()}; --cluster needs the same files under the "
                "same paths on every node",
            }
    os.chdir(folder)
    sys.path.insert(0, recipes)
    import torch
    from filelock import FileLock

    from support.many import run_one

    torch.set_num_threads(1)
    Path(lock).parent.mkdir(parents=True, exist_ok=True)
    # A node that is cut off is lost to the cluster, and may still be at work on the run for a while.
    with FileLock(lock):
        result: dict[str, Any] = run_one(Path(recipe), settings, Path(root), quiet=True)
    return result


@contextmanager
def connected(address: str, workers: int, shown: bool = False) -> Iterator[Any]:
    """Ray, connected to the cluster; disconnected afterwards, which ends a new local one.

    Args:
        address: see `run_on_cluster`.
        workers: CPUs of a new local cluster.
        shown: whether what workers print is printed here.

    Raises:
        ValueError: there is no Ray, or nothing answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError("--cluster needs Ray, which is not installed: pip install 'tnadapt[cluster]'") from error
    quiet: dict[str, Any] = {"log_to_driver": shown, "logging_level": "ERROR"}
    if address == LOCAL:
        ray.init(num_cpus=workers, include_dashboard=False, **quiet)
    else:
        _require_answer(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(_unreachable(address, str(error).strip().splitlines()[0])) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Ray itself waits long for an address where nothing is."""
    if address == "auto":
        return
    host, colon, port = address.rpartition("//")[2].rpartition(":")
    if not colon or not port.isdigit():
        raise ValueError(
            f"--cluster is {address!r}: give host:port of a Ray cluster, ray://host:port, auto, or {LOCAL} for a new one"
        )
    try:
        socket.create_connection((host, int(port)), _ANSWERS_WITHIN).close()
    except (OSError, OverflowError) as error:
        raise ValueError(_unreachable(address, str(error))) from error


def _unreachable(address: str, reason: str) -> str:
    return (
        f"--cluster is {address!r}: no Ray cluster answers there ({reason}); start one (`ray start --head` prints its address), or "
        f"give --cluster {LOCAL}"
    )


def require_gpus(ray: Any, address: str, wanted: float) -> None:
    """Ray would wait for such a node for ever."""
    found = [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]]
    if wanted > max(found, default=0.0):
        raise ValueError(
            f"--gpus-per-run is {wanted:g}: no node of the cluster {address!r} has as many GPUs (they have "
            f"{', '.join(f'{count:g}' for count in sorted(found, reverse=True))}); add such a node, or give less"
        )
