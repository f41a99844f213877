"""The search for an arm's best rate and number of steps, and the seeds around it: what a study and a comparison run.

An *arm* is a method with its options; a *task* is a recipe with its data. One lane, an arm on a task, asks for runs in stages:

1. rates on the grid, with the first seed, until the best one has a worse one on both sides; for each number of steps;
2. all seeds at the best rate and at its two neighbours; where a neighbour turns out better, at its neighbours too.

What a lane asks for next follows from the runs that there are, so a search that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Self

from tqdm import tqdm

from support.grid import beside, on_grid
from support.many import Job, Sweep
from support.provenance import commit_of, write_text

#: A learning rate and a number of optimizer steps; 0: as many as the recipe takes by itself.
Point = tuple[float, int]


@dataclass(frozen=True)
class Arm:
    """A method with options of its own."""

    name: str
    label: str
    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    start: float = 1.0
    """The rate that the search begins with, as a multiple of the task's."""
    beside: str = "lora"
    """The arm that it is compared with."""


@dataclass(frozen=True)
class Task:
    """A recipe with data of some kind and amount."""

    name: str
    label: str
    recipe: str
    """The recipe's file, in the folder of the recipes."""
    changes: Mapping[str, Any]
    steps: tuple[int, ...]
    """The numbers of optimizer steps that are tried."""
    start: float
    """The rate that a search begins with."""


@dataclass(frozen=True)
class Run:
    """What is kept of a run."""

    arm: str
    lr: float
    steps: int
    seed: int
    loss: float
    """On the answers that are evaluated on, in nats a token; infinite where training failed or diverged."""
    accuracy: float | None = None
    losses: tuple[float, ...] = ()
    """Of each answer, in nats."""
    tokens: tuple[int, ...] = ()
    """Of each answer."""
    trained: int = 0
    """Numbers that were trained."""
    seconds: float = 0.0
    """That training took."""
    peak: int = 0
    """Bytes of GPU memory in training; 0 on a CPU."""
    commit: str = ""
    error: str = ""

    @classmethod
    def of(cls, arm: str, config: Any, result: Mapping[str, Any]) -> Self:
        """What is kept of the ``result`` that a recipe gives."""
        common = {"arm": arm, "lr": config.lr, "steps": config.max_steps, "seed": config.seed}
        if "error" in result:
            return cls(**common, loss=math.inf, error=result["error"].splitlines()[-1][:200])
        metrics = result["metrics"]
        loss = metrics["eval_loss"]
        pairs = result.get("losses") or []
        return cls(
            **common,
            loss=float(f"{loss:.6g}") if loss is not None and math.isfinite(loss) else math.inf,
            accuracy=metrics.get("accuracy"),
            losses=tuple(float(f"{nats:.4g}") for nats, _ in pairs),
            tokens=tuple(tokens for _, tokens in pairs),
            trained=metrics["trained_parameters"],
            seconds=round(metrics["training_seconds"], 2),
            peak=metrics.get("peak_bytes") or 0,
            commit=commit_of(result["environment"]["git"]) or "",
        )


#: What LoraOver raises where gradients are no finite numbers any more.
DIVERGED = "FloatingPointError"


class Lane:
    """An arm on a task, and the runs that there are of it."""

    def __init__(self, task: Task, arm: Arm, runs: Iterable[Run] = ()) -> None:
        self.task, self.arm = task, arm
        self.table: dict[Point, dict[int, Run]] = {}
        for run in runs:
            self.add(run)

    def add(self, run: Run) -> None:
        """Take in one more run of this lane."""
        self.table.setdefault((run.lr, run.steps), {})[run.seed] = run

    @property
    def tried(self) -> tuple[int, ...]:
        """The numbers of steps that there are runs of."""
        return tuple(sorted({steps for _, steps in self.table}))

    def of_steps(self, numbers: Sequence[int]) -> Lane:
        """The same lane with the runs of these numbers of steps alone."""
        runs = (run for (_, steps), seeds in self.table.items() if steps in numbers for run in seeds.values())
        return Lane(self.task, self.arm, runs)

    def loss(self, point: Point, seeds: Sequence[int]) -> float:
        """The mean loss of the seeds at a point."""
        return mean(self.table[point][seed].loss for seed in seeds)

    def complete(self, seeds: Sequence[int]) -> list[Point]:
        """The points at which all ``seeds`` have run."""
        return [point for point, runs in self.table.items() if all(seed in runs for seed in seeds)]

    def best(self, seeds: Sequence[int]) -> Point | None:
        """The point of the lowest mean loss among those that have all ``seeds``; the lower rate of two that are equal."""
        points = [point for point in self.complete(seeds) if math.isfinite(self.loss(point, seeds))]
        return min(points, key=lambda point: (self.loss(point, seeds), point)) if points else None

    def settled(self, seeds: Sequence[int]) -> Point | None:
        """The best point where it and its neighbours have all ``seeds``, so that the optimum is inside; else None."""
        best = self.best(seeds)
        inside = best is not None and all(point in self.complete(seeds) for point in neighbours(best))
        return best if inside else None

    @property
    def error(self) -> str:
        """Why a run failed for another reason than its rate; empty where none did. At other rates it would fail alike."""
        runs = [run for seeds in self.table.values() for run in seeds.values()]
        return next((run.error for run in runs if run.error and not run.error.startswith(DIVERGED)), "")

    def wanted(self, seeds: Sequence[int]) -> list[tuple[Point, int]]:
        """The points and seeds to run next; none when the search is over, or cannot go on."""
        if self.error:
            return []
        first = seeds[:1]
        missing = [point for steps in self.task.steps for point in self._missing(steps, first)]
        if missing:
            return [(point, first[0]) for point in missing]
        # the best of one seed too: a number of steps that was added later has no other seeds yet
        centres = [point for point in (self.best(seeds), self.best(first)) if point is not None]
        around = sorted({point for centre in centres for point in (centre, *neighbours(centre))})
        return [(point, seed) for seed in seeds for point in around if seed not in self.table.get(point, {})]

    def _missing(self, steps: int, first: Sequence[int]) -> list[Point]:
        tried = [point for point in self.complete(first) if point[1] == steps]
        finite = [point for point in tried if math.isfinite(self.loss(point, first))]
        if not tried:
            centre = (on_grid(self.task.start * self.arm.start), steps)
            return [centre, *neighbours(centre)]
        if not finite:
            return [point for point in neighbours(min(tried)) if point < min(tried)]
        best = min(finite, key=lambda point: (self.loss(point, first), point))
        return [point for point in neighbours(best) if point not in tried]


def neighbours(point: Point) -> list[Point]:
    """The points one rate above and one below."""
    lr, steps = point
    return [(rate, steps) for rate in beside(lr)]


# -- files ------------------------------------------------------------------------------------------------------------


def read_runs(path: Path) -> list[Run]:
    """The runs in a file with one as JSON on each line; none where there is no file.

    Raises:
        ValueError: names the line that holds no run.
    """
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), start=1):
        try:
            row = json.loads(line)
            runs.append(Run(**{**row, "losses": tuple(row.get("losses", ())), "tokens": tuple(row.get("tokens", ()))}))
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a run ({error}); delete the line, and it is run again"
            ) from error
    return runs


def write_runs(path: Path, runs: Iterable[Run]) -> None:
    """One run as JSON on each line, by arm, steps, rate and seed; fields that have their default are left out."""
    default = {f.name: f.default for f in dataclasses.fields(Run)}
    ordered = sorted(runs, key=lambda run: (run.arm, run.steps, run.lr, run.seed))
    rows = [{k: v for k, v in dataclasses.asdict(run).items() if v != default[k]} for run in ordered]
    write_text(path, "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))


# -- running ----------------------------------------------------------------------------------------------------------


#: A lane, a point and a seed that are to be run.
Request = tuple[Lane, Point, int]


class Study:
    """Lanes, and the files that their runs are kept in: one for each task."""

    def __init__(self, folder: Path, pairs: Iterable[tuple[Task, Arm]]) -> None:
        self.folder = folder
        pairs = list(pairs)
        known = {name: read_runs(self.path(task)) for name, task in {task.name: task for task, _ in pairs}.items()}
        self.lanes = [Lane(task, arm, [run for run in known[task.name] if run.arm == arm.name]) for task, arm in pairs]

    def path(self, task: Task) -> Path:
        """The file of a task's runs."""
        return self.folder / f"{task.name}.jsonl"

    def keep(self, lane: Lane, run: Run) -> None:
        """Take in a run, and write it down; one that failed for a reason other than its rate is made again another time."""
        lane.add(run)
        if run.error and not run.error.startswith(DIVERGED):
            return
        path = self.path(lane.task)
        # read again: other commands may add to it, of other arms
        others = [
            known
            for known in read_runs(path)
            if (known.arm, known.lr, known.steps, known.seed) != (run.arm, run.lr, run.steps, run.seed)
        ]
        write_runs(path, [*others, run])

    def wanted(self, seeds: Sequence[int]) -> list[Request]:
        """What all lanes ask for next."""
        return [(lane, point, seed) for lane in self.lanes for point, seed in lane.wanted(seeds)]

    def run(
        self,
        wanted: Callable[[], list[Request]],
        sweep: Sweep,
        configure: Callable[[Lane, Point, int], Job],
        until: float = math.inf,
        budget: int | None = None,
    ) -> bool:
        """Run what is wanted until nothing is, or no run is to begin any more.

        Args:
            wanted: gives the runs to make next, as the runs that there are suggest; none ends the search.
            sweep: where runs are made.
            configure: the recipe and the configuration of what is wanted.
            until: the time, of ``time.monotonic``, after which no run begins; those that are at work then are not kept.
            budget: runs to make, at most.

        Returns:
            Whether the search is over.

        Raises:
            ValueError: a configuration that cannot work; of its round nothing was run.
        """
        made = 0
        while requests := wanted():
            left = requests if budget is None else requests[: budget - made]
            if not left or time.monotonic() > until:
                return False
            jobs = [configure(*request) for request in left]
            results = sweep.results(jobs)
            for index, result in results:
                made += 1
                lane = left[index][0]
                run = Run.of(lane.arm.name, jobs[index][1], result)
                self.keep(lane, run)
                if run.error:
                    tqdm.write(f"FAILED: {run.arm} at {run.lr:g}: {run.error}")
                if time.monotonic() > until:
                    results.close()
                    break
        return True
