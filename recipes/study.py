"""Does depth pay? Arms x tasks x rates x seeds, each arm at its own best rate, and one page of what came out.

The whole sweep, which goes on where it stopped::

    python recipes/study.py run --workers 2 --encoder FOLDER --sst2 FOLDER --widths FOLDER

A part of it, for two hours, with three seeds::

    python recipes/study.py run --tasks llama-1600 llama-128 --arms lora mpo-10 --seeds 3 --hours 2

Every figure and every number of ``docs/study.md``, from the results that the repository keeps::

    python recipes/study.py report

The direction and the length of steps through cores, beside plain LoRA's, which the report shows too::

    python recipes/study.py steps

``docs/study.md`` has the protocol. A run that is in ``recipes/results/study`` is not made again. ``--cluster`` makes the runs on a
Ray cluster. For a model and data of your own see ``compare.py``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import study_page
from support.command_line import ended
from support.grid import on_grid
from support.many import HERE, Job, Sweep, load_recipe
from support.provenance import environment, write_json
from support.search import Arm, Lane, Point, Request, Study, Task

RESULTS = HERE / "results" / "study"
PAGE, README = HERE.parent / "docs" / "study.md", HERE.parent / "README.md"

ARMS = (
    Arm("lora", "LoRA", "lora"),
    # other ways to train a pair
    Arm("lora+", "LoRA+", "lora+", start=0.316),
    Arm("rslora", "rsLoRA", "rslora", start=0.562),
    Arm("lora-equal", "LoRA, as many parameters as MPO_R", "lora-equal"),
    Arm("lora-decay", "LoRA, weight decay 0.1", "lora", {"weight_decay": 0.1}),
    Arm("riemannian", "Riemannian LoRA", "riemannian"),
    Arm("lora-rite", "LoRA-RITE", "lora-rite", start=0.562),
    Arm("muon", "LoRA with Muon", "muon"),
    # depth
    Arm("svd", "LoRA-Over, SVD", "lora-over-svd"),
    Arm("mpo-4", "LoRA-Over, MPO of order 4", "lora-over-mpo", {"order": 4}, start=0.562),
    Arm("mpo-10", "LoRA-Over, MPO of order 10", "lora-over-mpo", {"order": 10}, start=0.562),
    Arm("mpo-16", "LoRA-Over, MPO of order 16", "lora-over-mpo", {"order": 16}, start=0.562),
    Arm("mpo-3x", "LoRA-Over, MPO of 3x the parameters", "lora-over-mpo", {"expansion": 3.0}, start=0.562),
    Arm("mpo-5x", "LoRA-Over, MPO of 5x the parameters", "lora-over-mpo", {"expansion": 5.0}, start=0.562),
    Arm("tucker", "LoRA-Over, Tucker", "lora-over-tucker", start=0.562),
    Arm("cp", "LoRA-Over, CP", "lora-over-cp", start=0.562),
    Arm("mpo-decay", "MPO of order 10, weight decay 0.1", "lora-over-mpo", {"weight_decay": 0.1}, start=0.562),
    # its frame
    Arm("mpo-balanced", "MPO of order 10, balanced", "lora-over-mpo", {"gauge": "balanced"}, start=0.562),
    Arm("mpo-gradient", "MPO of order 10, frame of the gradient", "lora-over-mpo", {"gauge": "gradient"}, start=0.562),
    Arm("mpo-null", "MPO of order 10, random frame", "lora-over-mpo", {"gauge": "random"}, start=0.562),
    # its direction alone
    Arm("svd-matched", "SVD, matched steps", "lora-over-svd", {"matched": True}),
    Arm("mpo-4-matched", "MPO of order 4, matched steps", "lora-over-mpo", {"order": 4, "matched": True}),
    Arm("mpo-10-matched", "MPO of order 10, matched steps", "lora-over-mpo", {"order": 10, "matched": True}),
    Arm("mpo-16-matched", "MPO of order 16, matched steps", "lora-over-mpo", {"order": 16, "matched": True}),
    # which matrices
    Arm("mpo-r", "LoRA-Over, MPO_R", "lora-over-mpo-r", start=0.562),
    Arm("mpo-p", "LoRA-Over, MPO_P", "lora-over-mpo-p", start=0.562),
    Arm("mpo-random", "MPO on matrices drawn at random", "lora-over-mpo-random", start=0.562),
    # looked for, when no arm of the paper had won: depth for a while, and depth on one side
    Arm("svd-half", "SVD, folded half way", "lora-over-svd", {"fold_after": 0.5}),
    Arm("mpo-10-half", "MPO of order 10, folded half way", "lora-over-mpo", {"fold_after": 0.5}, start=0.562),
    Arm("mpo-10-a", "MPO of order 10 on A alone", "lora-over-mpo", {"which": r"\.A$"}, start=0.562),
    Arm("mpo-10-b", "MPO of order 10 on B alone", "lora-over-mpo", {"which": r"\.B$"}, start=0.562),
    Arm("svd-anew", "SVD, matched steps, ten frames", "lora-over-svd", {"matched": True, "refreshes": 9}),
    Arm(
        "mpo-10-anew",
        "MPO of order 10, matched steps, ten frames",
        "lora-over-mpo",
        {"order": 10, "matched": True, "refreshes": 9},
    ),
    Arm(
        "mpo-10-anew-gradient",
        "MPO of order 10, matched steps, ten frames of gradients",
        "lora-over-mpo",
        {"order": 10, "matched": True, "refreshes": 9, "gauge": "gradient"},
    ),
    # depth of other kinds
    Arm("deep-lora", "Deep LoRA", "deep-lora"),
    Arm("op-lora", "OP-LoRA", "op-lora", start=0.0562),
    # rates over ranks
    Arm("lora-rank-2", "LoRA of rank 2", "lora", {"rank": 2, "alpha": 4}),
    Arm("lora-rank-32", "LoRA of rank 32", "lora", {"rank": 32, "alpha": 64}),
    Arm("mpo-10-rank-2", "MPO of order 10, rank 2", "lora-over-mpo", {"rank": 2, "alpha": 4}, 0.562, "lora-rank-2"),
    Arm(
        "mpo-10-rank-32", "MPO of order 10, rank 32", "lora-over-mpo", {"rank": 32, "alpha": 64}, 0.562, "lora-rank-32"
    ),
    # the rest of the papers' tables
    Arm("full", "Full fine-tuning", "full", start=0.316),
    Arm("opf", "OPF", "opf", start=0.1),
    Arm("pissa", "PiSSA", "pissa", start=0.562),
    Arm("olora", "OLoRA", "olora", start=0.316),
    Arm("lora-ga", "LoRA-GA", "lora-ga", start=0.562),
    Arm("dora", "DoRA", "dora"),
    Arm("adalora", "AdaLoRA", "adalora", start=1.78),
    Arm("loha", "LoHa", "loha", start=1.78),
    Arm("lokr", "LoKr", "lokr", start=1.78),
    Arm("tt-lora", "TT-LoRA", "tt-lora"),
    Arm("alpha-lora", "α-LoRA", "alpha-lora"),
)

_LLAMA = {"batch": 16, "micro_batch": 16, "eval_size": 125, "eval_split": "validation"}
_GLUE = {"task": "sst2", "eval_split": "validation"}
_MINILM = {
    **_GLUE,
    **{"model": "ENCODER", "data": "SST2", "eval_size": 250, "batch": 16, "micro_batch": 16},
    **{"targets": "query,key,value", "order": 10, "top_n": 2, "split": 2},
}
TASKS = (
    Task("llama-1600", "Llama, 1,600 examples", "llama31_gsm8k.py", {**_LLAMA, "train_size": 1600}, (0,), 1.78e-2),
    Task(
        "llama-1600-wrong",
        "Llama, 1,600 examples, 20 % of them wrong",
        "llama31_gsm8k.py",
        {**_LLAMA, "train_size": 1600, "wrong_answers": 0.2},
        (0,),
        1.78e-2,
    ),
    Task("llama-128", "Llama, 128 examples", "llama31_gsm8k.py", {**_LLAMA, "train_size": 128}, (50, 100), 1.78e-2),
    Task("llama-32", "Llama, 32 examples", "llama31_gsm8k.py", {**_LLAMA, "train_size": 32}, (25, 50, 100), 1e-2),
    *(
        Task(
            f"width-{width}",
            f"Llama of width {width}, 1,600 examples",
            "llama31_gsm8k.py",
            {**_LLAMA, "train_size": 1600, "model": f"WIDTHS/{width}"},
            (0,),
            1.78e-2,
        )
        for width in (64, 256)
    ),
    Task("t5-3200", "T5, 3,200 examples", "t5_glue.py", {**_GLUE, "eval_size": 250}, (0,), 3.16e-3),
    Task(
        "t5-256", "T5, 256 examples", "t5_glue.py", {**_GLUE, "eval_size": 250, "train_size": 256}, (50, 100), 3.16e-3
    ),
    Task("sst2-64", "MiniLM on SST-2, 64 examples", "t5_glue.py", {**_MINILM, "train_size": 64}, (25, 50), 3.16e-3),
    Task("sst2-400", "MiniLM on SST-2, 400 examples", "t5_glue.py", {**_MINILM, "train_size": 400}, (50,), 3.16e-3),
    Task(
        "sst2-4000", "MiniLM on SST-2, 4,000 examples", "t5_glue.py", {**_MINILM, "train_size": 4000}, (250,), 3.16e-3
    ),
)
#: Folders of models and data that are not in the repository, by the name that tasks give them: the option, and what it is.
PLACES = {
    "ENCODER": ("encoder", "a local folder with an encoder, such as sentence-transformers/all-MiniLM-L6-v2"),
    "SST2": ("sst2", "a folder with SST-2's train.tsv"),
    "WIDTHS": (
        "widths",
        "a folder with Llamas of other widths: `cd recipes && python -m embedded.pretrain --hidden 64 --folder FOLDER/64` makes one, and "
        "`--hidden 256 --steps 2000 --folder FOLDER/256` the other",
    ),
}
#: The task that was held back until everything else had been run and said.
HELD_OUT = "sst2-400"
#: Rates at which all arms in `study_page.AT_ONE_RATE` are run, to see what a comparison at one rate for all says: multiples of the one
#: that a task's search begins with, which suits LoRA; the others are too low for it.
SHARED = (1.0, 0.316, 0.1, 0.0316)


def configure(lane: Lane, point: Point, seed: int, places: dict[str, str | None]) -> Job:
    """The recipe and the configuration of a run.

    Raises:
        ValueError: the task is of a model or data that no option gives.
    """
    recipe = HERE / lane.task.recipe
    loaded = load_recipe(recipe)
    changes: dict[str, Any] = {**lane.task.changes, **lane.arm.changes}
    for name in ("model", "data"):
        place, _, inside = str(changes.get(name)).partition("/")
        if place in places:
            option, what = PLACES[place]
            folder = places[place]
            if folder is None:
                raise ValueError(f"the task {lane.task.name} needs --{option}, {what}")
            changes[name] = str(Path(folder, inside))
    lr, steps = point
    config = loaded.config(method=lane.arm.method, seed=seed, lr=lr, max_steps=steps, **changes)
    return recipe, loaded.resolve(config)


def at_shared_rates(lanes: Sequence[Lane], seeds: Sequence[int]) -> list[Request]:
    """What is missing of the runs at one rate for all, with the largest number of steps of each task."""
    return [
        (lane, point, seed)
        for lane in lanes
        if lane.arm.name in study_page.AT_ONE_RATE
        for point in ((on_grid(lane.task.start * share), lane.task.steps[-1]) for share in SHARED)
        for seed in seeds
        if seed not in lane.table.get(point, {})
    ]


def run(options: argparse.Namespace) -> None:
    """Make the runs that are missing."""
    for name in ("seeds", "hours"):
        if not (value := getattr(options, name)) > 0:
            raise ValueError(f"--{name} is {value:g}: give a number above 0")
    places = {name: getattr(options, option) for name, (option, _) in PLACES.items()}
    tasks = _named(TASKS, options.tasks)
    if options.tasks is None:
        for task in list(tasks):
            named = {str(value).partition("/")[0] for value in task.changes.values()}
            lacking = [f"--{option}" for name, (option, _) in PLACES.items() if name in named and places[name] is None]
            if lacking:
                tasks.remove(task)
                print(f"without {task.name}, which needs {' and '.join(lacking)}")
    study = Study(options.results, [(task, arm) for task in tasks for arm in _named(ARMS, options.arms)])
    until = time.monotonic() + 3600 * options.hours
    seeds = range(options.seeds)

    def configured(lane: Lane, point: Point, seed: int) -> Job:
        return configure(lane, point, seed, places)

    def wanted() -> list[Request]:
        return study.wanted(seeds) or at_shared_rates(study.lanes, seeds)

    over = study.run(wanted, Sweep.of(options), configured, until)
    print(f"{'finished' if over else 'time is up; the same command goes on'}: {options.results}")


#: The arms whose steps are watched, and the task on which.
WATCHED = ("svd", "mpo-4", "mpo-10", "mpo-16", "mpo-null", "lora")
WATCHED_ON = "llama-1600"


def steps(options: argparse.Namespace) -> None:
    """Watch the steps of a few arms beside plain AdamW's, at their best rates."""
    from support.probe import measure

    study = Study(options.results, [(task, arm) for task in TASKS for arm in ARMS if task.name == WATCHED_ON])
    lanes = {lane.arm.name: lane for lane in study.lanes}
    rows = []
    for name in WATCHED:
        best = lanes[name].best(range(1))
        if best is None:
            raise ValueError(
                f"{name} has no run on {WATCHED_ON} yet: python recipes/study.py run --tasks {WATCHED_ON} --arms {name}"
            )
        seen = measure(configure(lanes[name], best, 0, {}))
        rows.append({"arm": name, "label": lanes[name].arm.label, "lr": best[0], **seen})
        print(f"{name}: cosine {seen['cosines'][0]:.3f} at the first step, {seen['cosines'][-1]:.3f} at the last")
    write_json(options.results / study_page.STEPS, {"environment": environment(HERE), "rows": rows})


def report(options: argparse.Namespace) -> None:
    """Write the figures and the numbers of the page anew."""
    study = Study(options.results, [(task, arm) for task in TASKS for arm in ARMS])
    study_page.write(study, TASKS, HELD_OUT, options.page, options.readme)
    print(f"{options.page} and {options.readme}: renewed")


def _named(known: Sequence[Any], names: Sequence[str] | None) -> list[Any]:
    return [each for each in known if names is None or each.name in names]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="make the runs that are missing", allow_abbrev=False)
    running.add_argument(
        "--tasks", nargs="+", choices=[task.name for task in TASKS], help="tasks to run; all if none is named"
    )
    running.add_argument(
        "--arms", nargs="+", choices=[arm.name for arm in ARMS], help="arms to run; all if none is named"
    )
    running.add_argument("--seeds", type=int, default=5, help="number of seeds at the best rate and its neighbours")
    running.add_argument("--hours", type=float, default=float("inf"), help="hours after which no further run begins")
    running.add_argument("--encoder", help="folder of the encoder that the tasks of SST-2 train")
    running.add_argument("--sst2", help="folder with SST-2's train.tsv")
    running.add_argument("--widths", help="folder with the pre-trained Llamas of other widths, in 64 and 256")
    Sweep.add_options(running)
    running.set_defaults(action=run)
    reporting = commands.add_parser("report", help="write the page's figures and numbers anew", allow_abbrev=False)
    reporting.add_argument("--page", type=Path, default=PAGE, help="the page")
    reporting.add_argument("--readme", type=Path, default=README, help="the README, which has the answer too")
    reporting.set_defaults(action=report)
    watching = commands.add_parser("steps", help="watch steps through cores beside plain ones", allow_abbrev=False)
    watching.set_defaults(action=steps)
    for each in (running, reporting, watching):
        each.add_argument("--results", type=Path, default=RESULTS, help="the folder of the kept results")
    options = parser.parse_args(arguments)
    ended(parser, lambda: options.action(options))


if __name__ == "__main__":
    main()
