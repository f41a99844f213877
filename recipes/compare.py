"""Which adapter, at which learning rate, for a model and data of your own: tunes each method, compares them, and writes one page.

An encoder on sentences with labels, within an hour::

    python recipes/compare.py --recipe recipes/t5_glue.py --task sst2 --model FOLDER --data FOLDER --targets query,key,value \
        --methods lora lora-over-svd lora-over-mpo-r --hours 1

A decoder on prompts and answers of your own (``train.jsonl`` with ``prompt`` and ``answer``), 60 runs at most::

    python recipes/compare.py --recipe recipes/text_pairs.py --model FOLDER --data FOLDER --methods lora dora lora-over-svd --budget 60

Every other option is the recipe's. Rates are tried on one grid until the best of each method has a worse one on both sides, all with
one seed. Then the methods train at their best rates with further seeds: all of them with two, and more where two are too close to
tell. The seed that chose the rates takes no part in the comparison. What is evaluated on is the validation split. The same command
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import compare_page
from support.command_line import OneLine, config_from, ended, options_of, preset_of
from support.many import HERE, Job, Sweep, load_recipe, recipe_of
from support.methods import METHODS
from support.provenance import config_hash
from support.search import Arm, Lane, Point, Request, Study, Task

#: Seeds that every method gets before it can be left behind.
SEEDS_FOR_ALL = 2


class Comparison:
    """The methods on one task, the runs that there are, and those to make next."""

    def __init__(self, study: Study, tuning_seed: int, seeds: Sequence[int]) -> None:
        self.study, self.tuning, self.seeds = study, tuning_seed, list(seeds)

    def wanted(self) -> list[Request]:
        """The runs to make next: rates first, then seeds for all, then seeds where it is close; none when all is said."""
        if rates := self.study.wanted([self.tuning]):
            return rates
        tuned = [(lane, best) for lane in self.study.lanes if (best := lane.best([self.tuning])) is not None]
        for count in range(1, len(self.seeds) + 1):
            close = self.contenders(tuned) if count > SEEDS_FOR_ALL else tuned
            if count > SEEDS_FOR_ALL and len(close) < 2:
                return []
            seed = self.seeds[count - 1]
            missing = [(lane, point, seed) for lane, point in close if seed not in lane.table[point]]
            if missing:
                return missing
        return []

    def contenders(self, tuned: Sequence[tuple[Lane, Point]]) -> list[tuple[Lane, Point]]:
        """Those that are not worse than the leader by two standard errors, the leader with them."""
        compared = compare_page.against_leader(tuned, self.seeds)
        return [(lane, point) for lane, point, apart in compared if apart is None or not apart.worse]


def start_of(recipe: Any, method: str, given: float | None) -> float:
    """The rate that the search of a method begins with: the given one, times what the method takes on the shipped model over LoRA."""
    known = recipe.rates.get("laptop", {})
    lora = known.get("lora", (1e-2, None))[0]
    share = known[method][0] / lora if method in known else 1.0
    return (given if given is not None else lora) * share


def compare(options: argparse.Namespace) -> Path:
    """Run what is missing, within the budget, and write the page; returns its path.

    Raises:
        ValueError: for what cannot work, before any run.
    """
    if options.seeds < SEEDS_FOR_ALL:
        raise ValueError(f"--seeds is {options.seeds}: give at least {SEEDS_FOR_ALL}, or no difference has an error")
    if len(set(options.methods)) < 2:
        raise ValueError(
            f"--methods is {' '.join(options.methods)}: give two methods or more, one of them lora perhaps"
        )
    for name in ("start", "hours", "budget"):
        if (value := getattr(options, name)) is not None and not value > 0:
            raise ValueError(f"--{name} is {value:g}: give a number above 0")
    recipe = load_recipe(options.recipe)
    if not recipe.benchmark.answered:
        raise ValueError(
            f"--recipe is {options.recipe}, whose questions have no answers that a loss could be measured on"
        )
    options.eval_split = "validation"
    base = config_from(recipe, options, method="lora", seed=0, lr=1.0)
    kept = {k: v for k, v in base.settings().items() if k not in ("method", "seed", "lr", "core_lr")}
    name = f"compare-{recipe.name}-{config_hash(kept | {'first_seed': options.first_seed})}"
    task = Task(name, recipe.title(base), options.recipe.name, {}, (options.max_steps,), 1.0)
    arms = [
        Arm(method, METHODS[method].label, method, start=start_of(recipe, method, options.start))
        for method in dict.fromkeys(options.methods)
    ]

    def configure(lane: Lane, point: Point, seed: int) -> Job:
        config = config_from(recipe, options, method=lane.arm.method, seed=seed, lr=point[0])
        return options.recipe, recipe.resolve(config)

    for arm in arms:  # refuse before any run what one of the methods cannot do
        configure(Lane(task, arm), (1e-3, options.max_steps), 0)
    folder = options.runs / name
    study = Study(folder, [(task, arm) for arm in arms])
    first = options.first_seed
    comparison = Comparison(study, first, range(first + 1, first + 1 + options.seeds))
    until = time.monotonic() + 3600 * options.hours
    over = study.run(comparison.wanted, Sweep.of(options), configure, until, options.budget)
    return compare_page.write(comparison, base, over, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    first, recipe = recipe_of(arguments, HERE / "text_pairs.py")
    without = ("method", "seed", "lr", "core_lr", "eval_split")
    fields = options_of(recipe, preset_of(recipe, arguments), without, add_help=False)
    parser = OneLine(
        description=(__doc__ or "").split("\n")[0], parents=[first, fields], formatter_class=fields.formatter_class
    )
    parser.set_defaults(core_lr=None)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["lora", "lora-over-svd", "lora-over-mpo-r"],
        help="methods to compare, two or more",
    )
    parser.add_argument("--seeds", type=int, default=5, help="largest number of seeds of the comparison")
    parser.add_argument(
        "--first-seed", type=int, default=0, help="seed of the search for rates; those of the comparison follow it"
    )
    parser.add_argument(
        "--start",
        type=float,
        help="LoRA's rate to begin the search with, other methods' in proportion; None: as on the embedded model",
    )
    parser.add_argument("--hours", type=float, default=math.inf, help="hours after which no further run begins")
    parser.add_argument("--budget", type=int, default=None, help="largest number of runs to make; None: no limit")
    Sweep.add_options(parser)
    options = parser.parse_args(arguments)
    ended(parser, lambda: print(f"the page: {compare(options)}"))


if __name__ == "__main__":
    main()
