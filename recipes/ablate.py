"""Many runs of a recipe: one factor at a time, learning rates on a grid, and the committed table over seeds.

What does the order of the MPO do, what the number of expanded matrices (everything else as in the preset)::

    python recipes/ablate.py vary --methods lora-over-mpo-r --factor order 2 4 10 16 --factor top_n 1 2 3 4

What changes with the decomposition and what only with the learning rate: every value at each of the rates, into one
report that later commands add their factors to (``study.py`` tunes the rate of each instead, and has seeds)::

    python recipes/ablate.py vary --methods lora-over-mpo --factor factorization svd mpo tucker cp --lrs 5e-3 1e-2 \
        --report FOLDER

Which learning rate, for every method on the same grid and on the validation split::

    python recipes/ablate.py tune --methods lora lora-over-mpo --lrs 1e-3 3e-3 1e-2 --eval-split validation

The same from one rate, in steps of 10^(1/4) for as long as the best one has no worse neighbour on either side, into the
table that the repository keeps::

    python recipes/ablate.py tune --methods lora dora --lrs 1e-2 --extend --eval-split validation --tuned recipes/results/tuning

The table over seeds that the recipe prints beside its own result, at the recipe's own rates::

    python recipes/ablate.py seeds --methods lora lora-over-mpo lora-over-mpo-r --seeds 0 1 2

Any option of the recipe can be added (``--max-steps 100``). A run that is finished is not made again, an interrupted one
goes on from its last checkpoint, so the same command continues after an interruption. ``--workers 2`` makes two runs at
once with one thread each, which takes less time than one run after the other with two threads each. ``--cluster`` makes the
runs on a Ray cluster (see ``support/cluster.py``), where a run whose node is lost goes on on another one.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from support.command_line import OneLine, config_from, ended, options_of, preset_of
from support.grid import beside, same_rate
from support.many import HERE, Sweep, load_recipe, recipe_of
from support.methods import METHODS
from support.pictures import score_against
from support.provenance import commit_of, config_hash, environment, read_json, write_json, write_text
from support.tables import Table, percent, percent_over_seeds, rate
from support.tuned import best_of_lane, lanes, loss_of
from tqdm import tqdm

# -- what to run, and what came out -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting, run with several seeds."""

    factor: str
    value: Any
    configs: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A cell and the results of those of its runs that succeeded."""

    cell: Cell
    results: tuple[dict[str, Any], ...]
    errors: tuple[str, ...]

    @property
    def method(self) -> str:
        return str(self.cell.configs[0].method)

    @property
    def accuracies(self) -> list[float]:
        found = [result["metrics"].get("accuracy") for result in self.results]
        return [accuracy for accuracy in found if accuracy is not None]

    @property
    def eval_losses(self) -> list[float]:
        """Losses on the answers that are evaluated on; a run that diverged has an infinite one."""
        found = [result["metrics"].get("eval_loss") for result in self.results]
        return [loss if math.isfinite(loss) else math.inf for loss in found if loss is not None]

    @property
    def rank(self) -> tuple[float, float]:
        """What the best cell has most of: the lower loss on the evaluated answers, then accuracy.

        Where that loss was not measured: accuracy, then the lower loss in training.
        """
        if not self.results:
            return (-math.inf, 0.0)
        accuracy = mean(self.accuracies) if self.accuracies else 0.0
        if self.eval_losses:
            return (-mean(self.eval_losses), accuracy)
        return (accuracy, -mean(result["metrics"]["loss"] for result in self.results))


def best_of(outcomes: Iterable[Outcome]) -> Outcome:
    """The outcome with the highest rank.

    Raises:
        ValueError: the loss on the evaluated answers was measured in some of the runs only.
    """
    known = list(outcomes)
    missing = [
        result["name"] for each in known for result in each.results if result["metrics"].get("eval_loss") is None
    ]
    if missing and any(outcome.eval_losses for outcome in known):
        raise ValueError(f"the run {missing[0]} did not measure the loss that others measured: delete its folder")
    return max(known, key=lambda outcome: outcome.rank)


def run_cells(cells: Sequence[Cell], options: argparse.Namespace) -> list[Outcome]:
    """Run all configurations of all cells, those that occur twice once.

    Raises:
        ValueError: before any run, if one of the configurations cannot work.
    """
    resolve = load_recipe(options.recipe).resolve
    cells = [dataclasses.replace(cell, configs=tuple(map(resolve, cell.configs))) for cell in cells]
    distinct = list(dict.fromkeys(config for cell in cells for config in cell.configs))
    results = dict(zip(distinct, Sweep.of(options).run([(options.recipe, config) for config in distinct]), strict=True))
    outcomes = []
    for cell in cells:
        mine = [results[config] for config in cell.configs]
        errors = tuple(result["error"] for result in mine if "error" in result)
        outcomes.append(Outcome(cell, tuple(result for result in mine if "error" not in result), errors))
    for outcome in outcomes:
        for error in outcome.errors:
            tqdm.write(f"FAILED: {outcome.method}, {outcome.cell.factor} {outcome.cell.value}: {error}")
    return outcomes


def over_seeds(config: Any, seeds: Sequence[int]) -> tuple[Any, ...]:
    """``config`` once per seed."""
    return tuple(dataclasses.replace(config, seed=seed) for seed in seeds)


def table_of(title: str, outcomes: Sequence[Outcome], best: Sequence[Outcome] = ()) -> Table:
    """A row per cell; the ``best`` ones carry a star."""
    rows = []
    for outcome in outcomes:
        cell, results = outcome.cell, outcome.results
        label = f"{outcome.method}{' *' if outcome in best and results else ''}"
        row = [label, cell.factor, rate(cell.value) if isinstance(cell.value, float) else str(cell.value)]
        if not results:
            rows.append([*row, "failed", *"–––––––"])
            continue
        config, metrics = results[0]["config"], [result["metrics"] for result in results]
        row += [percent_over_seeds(outcome.accuracies)]
        row += [f"{mean(outcome.eval_losses):.4f}" if outcome.eval_losses else "–"]
        row += [f"{mean(each['loss'] for each in metrics):.4f}"]
        row += [rate(config["lr"]), rate(config["core_lr"]), f"{metrics[0]['trained_parameters']:,}"]
        row += [f"{mean(each['training_seconds'] for each in metrics):.0f}", str(len(results))]
        rows.append(row)
    columns = (
        "method",
        "factor",
        "value",
        "accuracy",
        "eval loss",
        "loss",
        "lr",
        "core lr",
        "trained",
        "train s",
        "runs",
    )
    return Table(title, columns, rows, "Accuracy: mean ± sample standard deviation over the runs. * is the best.")


def record_of(outcome: Outcome) -> dict[str, Any]:
    """A row of a table as data."""
    metrics = [result["metrics"] for result in outcome.results]
    return {
        "method": outcome.method,
        "factor": outcome.cell.factor,
        "value": outcome.cell.value,
        "lr": outcome.cell.configs[0].lr,
        "core_lr": outcome.cell.configs[0].core_lr,
        "decomposition": outcome.results[0]["plan"].partition(": ")[0] if metrics else "",
        "accuracy": outcome.accuracies,
        "eval_loss": outcome.eval_losses,
        "loss": [each["loss"] for each in metrics],
        "trained_parameters": [each["trained_parameters"] for each in metrics],
        "training_seconds": [each["training_seconds"] for each in metrics],
        "problems": [each["problems"] for each in metrics],
        "runs": [result["name"] for result in outcome.results],
        "errors": outcome.errors,
    }


def write_table(table: Table, outcomes: Sequence[Outcome], folder: Path) -> None:
    """The table as JSON, CSV and Markdown, and a picture per factor."""
    table.show()
    rows = [record_of(outcome) for outcome in outcomes]
    write_json(folder / "table.json", {"environment": environment(HERE), "rows": rows})
    write_text(folder / "table.csv", table.csv())
    write_text(folder / "table.md", f"# {table.title}\n\n{table.markdown()}")
    for factor in dict.fromkeys(outcome.cell.factor for outcome in outcomes):
        lines: dict[str, list[tuple[Any, float]]] = {}
        settings = [(outcome.method, outcome.cell.value) for outcome in outcomes if outcome.cell.factor == factor]
        several = len(set(settings)) < len(settings)  # rates at each value
        for outcome in outcomes:
            if outcome.cell.factor == factor and outcome.results:
                name = f"{outcome.method}, lr {outcome.results[0]['config']['lr']:g}" if several else outcome.method
                lines.setdefault(name, []).append((outcome.cell.value, mean(outcome.accuracies)))
        if lines:
            score_against(folder / f"{factor}.png", factor, lines, logarithmic=factor in ("lr", "core_lr"))
    print(f"tables and pictures: {folder}")


# -- the report over several commands ---------------------------------------------------------------------------------


def add_to_report(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Add settings to the report in ``folder``, in place of what it has of the same ones, and write it anew."""
    path = folder / "rows.json"
    known = [*(read_json(path)["rows"] if path.exists() else []), *map(record_of, outcomes)]
    rows = list({(row["factor"], row["value"], row["method"], row["lr"]): row for row in known}.values())
    where = environment(HERE)
    write_json(path, {"environment": where, "rows": rows})
    columns = ("factor", "value", "method", "lr", "accuracy", "loss", "trained", "train s", "runs")
    cells = [
        [
            *(row["factor"], str(row["value"]), row["method"], rate(row["lr"])),
            *([f"{mean(row[k]):.4f}" for k in ("accuracy", "loss")] if row["accuracy"] else ["failed", "–"]),
            *([f"{mean(row[k]):.0f}" for k in ("trained_parameters", "training_seconds")] if row["accuracy"] else "––"),
            str(len(row["accuracy"])),
        ]
        for row in rows
    ]
    write_text(folder / "table.csv", Table("All runs", columns, cells).csv())
    seeds_each = " or ".join(map(str, sorted({len(row["accuracy"]) for row in rows} - {0})))
    parts = [
        "# What changes with a factor, and what only with the learning rate\n",
        "Made by `python recipes/ablate.py vary … --report`, "
        f"{where['hardware']['processor']}, {(where['git'] or {}).get('commit') or 'no commit'}. One factor at a time; "
        f"number of seeds: {seeds_each} (what the seed does comes on top of what is said of chance); "
        "accuracies in %. Every number is in [table.csv](table.csv), with the names of the runs in [rows.json](rows.json).\n",
    ]
    reference = [row for row in rows if row["factor"] == "method" and row["accuracy"]]
    for factor in dict.fromkeys(row["factor"] for row in rows):
        mine = [row for row in rows if row["factor"] == factor]
        parts += section(factor, [row for row in mine if row["accuracy"]], reference, folder)
        parts += [
            f"- FAILED: {row['value']} at lr {rate(row['lr'])}: {row['errors'][0]}" for row in mine if row["errors"]
        ]
    write_text(folder / "report.md", "\n".join(parts))
    print(f"report: {folder / 'report.md'}")


def section(factor: str, rows: list[dict[str, Any]], reference: list[dict[str, Any]], folder: Path) -> list[str]:
    """What the report says of one factor; draws its pictures."""
    parts = [f"\n## {factor}\n"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for method in methods if factor != "method" else ["all"]:
        mine = [row for row in rows if method in (row["method"], "all")]
        lrs = sorted({row["lr"] for row in mine})
        scores: dict[Any, dict[float, float]] = {}
        for row in mine:
            scores.setdefault(row["value"], {})[row["lr"]] = mean(row["accuracy"])
        trained = {row["value"]: mean(row["trained_parameters"]) for row in mine}
        form = {row["value"]: row["decomposition"] or "–" for row in mine}
        body = [
            [
                str(value),
                form[value],
                f"{trained[value]:,.0f}",
                *(percent(by_lr.get(lr)) for lr in lrs),
                percent(max(by_lr.values())),
            ]
            for value, by_lr in scores.items()
        ]
        title = f"{factor} of {method}" if factor != "method" else "method"
        table = Table(title, (factor, "decomposition", "trained", *(f"lr {lr:g}" for lr in lrs), "best"), body)
        if factor != "method":
            parts.append(f"Method {method}:\n")
        parts += [table.markdown(), *verdict(factor, scores, min(each for row in mine for each in row["problems"]))]
        stem = f"{factor}-{method}" if len(methods) > 1 and factor != "method" else factor
        if len(lrs) > 1:
            lines = {f"{factor} {value}": sorted(by_lr.items()) for value, by_lr in scores.items()}
            for row in reference if factor != "method" else []:
                lines.setdefault(str(row["value"]), []).append((row["lr"], mean(row["accuracy"])))
            score_against(folder / f"{stem}-by-lr.png", "lr", lines, logarithmic=True)
            parts.append(f"![accuracy against the rate]({stem}-by-lr.png)\n")
        if len(scores) > 1 and factor not in ("lr", "core_lr"):
            by_value = {f"lr {lr:g}": [(v, by[lr]) for v, by in scores.items() if lr in by] for lr in lrs}
            score_against(folder / f"{stem}.png", factor, by_value)
            parts.append(f"![accuracy against the factor]({stem}.png)\n")
    return parts


def verdict(factor: str, scores: dict[Any, dict[float, float]], problems: int) -> list[str]:
    """How far the values lie apart at one rate, how far at the best rate of each, and how far rates lie apart."""
    if len(scores) < 2:
        return []
    noise = 2 * (2 * 0.25 / problems) ** 0.5
    common = set.intersection(*(set(by_lr) for by_lr in scores.values()))
    at_one = {lr: spread([by_lr[lr] for by_lr in scores.values()]) for lr in common}
    lines = []
    if at_one:
        lr = max(at_one, key=lambda each: at_one[each])
        lines.append(f"- At one rate for all values, they lie up to {100 * at_one[lr]:.1f} points apart (at {lr:g}).")
    if any(len(by_lr) > 1 for by_lr in scores.values()):
        best = {value: max(by_lr.values()) for value, by_lr in scores.items()}
        apart, rates = spread(best.values()), max(spread(by_lr.values()) for by_lr in scores.values())
        top = max(best, key=lambda value: best[value])
        lines.append(f"- Each at its own best rate: {100 * apart:.1f} points apart, {top} being the best.")
        lines.append(f"- The rate alone moves one and the same value by up to {100 * rates:.1f} points.")
        if apart > noise:
            what = f"{factor} seems to matter beyond the rate; more seeds must tell"
        elif at_one and max(at_one.values()) > noise:
            what = f"what {factor} seems to change at one rate, the rate explains"
        else:
            what = f"{factor} changes nothing beyond chance"
        lines.append(
            f"- Two accuracies on {problems} problems differ by chance by up to {100 * noise:.1f} points (two standard "
            f"errors at 50 %): here {what}."
        )
        grid = sorted({lr for by_lr in scores.values() for lr in by_lr})
        edge = [v for v, by in scores.items() if len(by) > 1 and max(by, key=lambda lr: by[lr]) in (grid[0], grid[-1])]
        if edge:
            named = ", ".join(map(str, edge))
            lines.append(f"- Best at an end of the grid, so that another rate may be better still: {named}.")
    else:
        lines.append(f"- Differences below {100 * noise:.1f} points are within chance on {problems} problems.")
    return [*lines, ""]


def spread(values: Iterable[float]) -> float:
    """Largest less smallest."""
    known = list(values)
    return max(known) - min(known)


# -- the three commands -----------------------------------------------------------------------------------------------


def vary(options: argparse.Namespace) -> list[Outcome]:
    """One factor at a time, everything else as the preset and the command line have it; each value at all ``--lrs``."""
    recipe = load_recipe(options.recipe)
    fields = [field.name for field in dataclasses.fields(recipe.config) if field.name != "preset"]
    parser = options_of(recipe, options.preset, exit_on_error=False)
    cells = []
    for name, *texts in options.factor:
        if name not in fields:
            raise ValueError(f"--factor {name} {' '.join(texts)}: give one of {', '.join(fields)}, and its values")
        if not texts:
            raise ValueError(f"--factor {name}: give the values to try too")
        for text in texts:
            try:
                value = getattr(parser.parse_args([f"--{name}", text]), name)
            except argparse.ArgumentError as error:
                raise ValueError(f"--factor {name} {text}: {error.message}") from error
            for config in base_configs(options, texts[:1] if name == "method" else options.methods):
                for lr in options.lrs or [config.lr]:
                    changed = dataclasses.replace(config, **{"lr": lr, name: value})
                    runs = (changed,) if name == "seed" else over_seeds(changed, options.seeds)
                    cells.append(Cell(name, value, runs))
    outcomes = run_cells(cells, options)
    by_factor = [[o for o in outcomes if o.cell.factor == name] for name, *_ in options.factor]
    best = [best_of(group) for group in by_factor]
    folder = options.runs / "ablations" / f"vary-{identity(cells)}"
    write_table(table_of("One factor at a time", outcomes, best), outcomes, folder)
    if options.report is not None:
        add_to_report(outcomes, options.report)
    return outcomes


def tune(options: argparse.Namespace) -> list[Outcome]:
    """The grid of learning rates, the same for every method, with the best of each method marked."""
    lanes = [
        (config, ratio)
        for config in base_configs(options, options.methods)
        for ratio in (options.core_ratios if METHODS[config.method].two_rates else [1.0])
    ]
    outcomes: list[Outcome] = []
    for group in [[lane] for lane in lanes] if options.extend else [lanes]:
        cells = [cell_at(*lane, lr, options.seeds) for lane in group for lr in sorted(options.lrs)]
        found = run_cells(cells, options)
        while options.extend and (beside := untried_beside(found)):
            found += run_cells([cell_at(*group[0], lr, options.seeds) for lr in beside[: options.workers]], options)
        outcomes += sorted(found, key=lambda outcome: (options.methods.index(outcome.method), outcome.cell.value))
        if options.tuned is not None:
            add_to_tuned(found, options)
    best = [best_of(each for each in outcomes if each.method == method) for method in options.methods]
    folder = options.runs / "ablations" / f"tune-{identity([outcome.cell for outcome in outcomes])}"
    split = outcomes[0].cell.configs[0].eval_split
    write_table(table_of(f"Learning rates on the {split} split", outcomes, best), outcomes, folder)
    for outcome in best:
        config = outcome.cell.configs[0]
        print(f'best: "{outcome.method}": ({config.lr:g}, {config.core_lr and f"{config.core_lr:g}"}),')
        tried = [each.cell.value for each in outcomes if each.method == outcome.method]
        for warning in warnings_about(outcome, tried):
            print(f"\n!!! {outcome.method}: {warning}\n")
    if options.eval_split != "validation":
        print("\n!!! tuned on the test split: add --eval-split validation before anything is reported\n")
    return outcomes


def cell_at(config: Any, ratio: float, lr: float, seeds: Sequence[int]) -> Cell:
    """``config`` at a rate, with its cores at ``ratio`` of it."""
    changed = dataclasses.replace(config, lr=lr, core_lr=None if ratio == 1.0 else lr * ratio)
    factor = "lr" if ratio == 1.0 else f"lr, cores at {ratio:g} of it"
    return Cell(factor, lr, over_seeds(changed, seeds))


def untried_beside(outcomes: Sequence[Outcome]) -> list[float]:
    """The rates one step above and below the best one that were not tried yet; below the lowest one if all runs failed."""
    tried = [outcome.cell.value for outcome in outcomes]
    best = best_of(outcomes)
    near = beside(best.cell.value) if best.results else [lr for lr in beside(min(tried)) if lr < min(tried)]
    return [lr for lr in near if not any(same_rate(lr, other) for other in tried)]


def warnings_about(best: Outcome, lrs: Sequence[float]) -> Iterator[str]:
    """Why a grid does not settle the rate."""
    if not best.results:
        yield "every run failed"
    elif best.cell.value in (min(lrs), max(lrs)):
        end = "lowest" if best.cell.value == min(lrs) else "highest"
        yield f"the best rate, {best.cell.value:g}, is the {end} of the grid; the optimum may lie outside, widen --lrs"


def add_to_tuned(outcomes: Sequence[Outcome], options: argparse.Namespace) -> None:
    """Add rates to the repository's table, in place of what it has of the same methods and rates, and write it anew.

    Raises:
        ValueError: the table was made with other settings.
    """
    recipe, config = load_recipe(options.recipe), outcomes[0].cell.configs[0]
    path = options.tuned / f"{recipe.table_name(config)}.json"
    common = ("method", "lr", "core_lr", "seed", *recipe.config.SCORING)
    settings = {name: value for name, value in config.settings().items() if name not in common}
    command = environment(HERE)["command"]
    known: dict[str, Any] = {"settings": settings, "commands": [], "rows": []}
    if path.exists():
        known = read_json(path)
    if known["settings"] != settings:
        differing = ", ".join(sorted(k for k in settings if settings[k] != known["settings"].get(k)))
        raise ValueError(f"{path} was made with other settings ({differing}); give another --tuned, or delete it")
    rows = [*known["rows"], *({**record_of(outcome), "commits": commits_of(outcome)} for outcome in outcomes)]
    rows = [*{(row["method"], row["factor"], row["value"]): row for row in rows}.values()]
    commands = [*dict.fromkeys([*known["commands"], command])]
    where = {name: value for name, value in environment(HERE).items() if name in ("python", "packages", "hardware")}
    write_json(path, {"commands": commands, "environment": where, "settings": settings, "rows": rows})
    write_text(path.with_suffix(".md"), tuned_page(path.stem, settings, rows))


def commits_of(outcome: Outcome) -> list[str | None]:
    """The commits that an outcome's runs were made at, with a ``+`` where files differed from it."""
    return [commit_of(result["environment"]["git"]) for result in outcome.results]


def tuned_page(name: str, settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """A row for each method, a column for each rate; the lowest loss of a method is bold."""
    lrs = sorted({row["value"] for row in rows})
    cells = []
    order = [*METHODS]
    for (method, factor), lane in sorted(lanes(rows).items(), key=lambda each: (order.index(each[0][0]), each[0][1])):
        best, inside = best_of_lane(lane)
        losses = {row["value"]: "failed" if math.isinf(loss_of(row)) else f"{loss_of(row):.4f}" for row in lane}
        if inside:
            losses[best["value"]] = f"**{losses[best['value']]}**"
        accuracy = percent(mean(best["accuracy"])) if best["accuracy"] else "–"
        known = f"{best['value']:g}" if inside else "outside"
        cells.append([method + factor.removeprefix("lr"), known, accuracy, *(losses.get(lr, "") for lr in lrs)])
    columns = ("method", "best rate", "accuracy there", *(f"{lr:g}" for lr in lrs))
    said = ", ".join(
        f"{key} {settings[key]}" for key in ("train_size", "batch", "max_steps", "eval_size") if key in settings
    )
    return (
        f"# {name}: learning rates\n\nThe loss on the answers of the {settings['eval_split']} split, in nats a token, by method and "
        f"rate; the lowest of each method is bold, where lower and higher rates were tried. Made by `python recipes/ablate.py tune --extend --tuned …` with {said}; the "
        f"commands, every setting, the commit of each run and more figures are in [{name}.json]({name}.json).\n\n"
        + Table(name, columns, cells).markdown()
    )


def seeds(options: argparse.Namespace) -> list[Outcome]:
    """The table over seeds, written where the recipe reads it."""
    cells = [Cell("method", config.method, over_seeds(config, options.seeds)) for config in base_configs(options)]
    outcomes = run_cells(cells, options)
    broken = [outcome.method for outcome in outcomes if outcome.errors]
    if broken:
        raise ValueError(
            f"runs of {', '.join(broken)} failed, so no table is written; mend that and repeat the command"
        )
    name = load_recipe(options.recipe).table_name(outcomes[0].cell.configs[0])
    title = f"{name}, {options.eval_split} split"
    table = table_of(title, outcomes)
    table.show()
    first = outcomes[0].results[0]
    summary = {
        "recipe": options.recipe.stem,
        "seeds": options.seeds,
        "steps": first["metrics"]["steps"],
        "problems": first["metrics"]["problems"],
        "base_accuracy": first["metrics"].get("base_accuracy"),
        "base_format_rate": first["metrics"]["base_format_rate"],
        "config": {
            key: value for key, value in first["config"].items() if key not in ("method", "seed", "lr", "core_lr")
        },
        "environment": first["environment"],
        "methods": {outcome.method: summary_of(outcome) for outcome in outcomes},
    }
    path = options.results / f"{name}.json"
    write_json(path, summary)
    commit = (first["environment"]["git"] or {}).get("commit") or "no commit"
    origin = f"Made by `python recipes/ablate.py seeds`, {first['environment']['hardware']['processor']}, {commit}."
    write_text(path.with_suffix(".md"), f"# {title}\n\n{table.markdown()}\n{origin}\n")
    print(f"committed table: {path}")
    return outcomes


def summary_of(outcome: Outcome) -> dict[str, Any]:
    """What the committed table keeps of one method."""
    config, metrics = outcome.results[0]["config"], [result["metrics"] for result in outcome.results]
    return {
        "label": outcome.results[0]["label"],
        "accuracy": outcome.accuracies,
        "mean": mean(outcome.accuracies) if outcome.accuracies else None,
        "std": stdev(outcome.accuracies) if len(outcome.accuracies) > 1 else None,
        "format_rate": [each["format_rate"] for each in metrics],
        "loss": [each["loss"] for each in metrics],
        "tokens": [each["tokens"] for each in metrics],
        "training_seconds": [each["training_seconds"] for each in metrics],
        "lora_parameters": metrics[0]["lora_parameters"],
        "trained_parameters": metrics[0]["trained_parameters"],
        "lr": config["lr"],
        "core_lr": config["core_lr"],
    }


def base_configs(options: argparse.Namespace, methods: Sequence[str] | None = None) -> list[Any]:
    """The preset with what the command line gives, once per method."""
    recipe = load_recipe(options.recipe)
    return [config_from(recipe, options, method=method, seed=0) for method in methods or options.methods]


def identity(cells: Sequence[Cell]) -> str:
    """A name for what a table is about, so that another table does not replace it."""
    return config_hash({str(index): repr(cell) for index, cell in enumerate(cells)})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    first, recipe = recipe_of(arguments, HERE / "llama31_gsm8k.py")
    parser = OneLine(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    fields = options_of(recipe, preset_of(recipe, arguments), ("method", "seed"), add_help=False)
    for name, command in (("vary", vary), ("tune", tune), ("seeds", seeds)):
        sub = commands.add_parser(
            name, parents=[first, fields], help=command.__doc__, formatter_class=fields.formatter_class
        )
        sub.set_defaults(action=command)
        methods = list(recipe.default_methods)
        sub.add_argument("--methods", nargs="+", choices=METHODS, default=methods, help="what is trained")
        sub.add_argument(
            "--seeds",
            type=int,
            nargs="+",
            default=[0, 1, 2] if name == "seeds" else [0],
            help="seeds; one run with each",
        )
        Sweep.add_options(sub)
        if name == "vary":
            sub.add_argument(
                "--factor",
                nargs="+",
                action="append",
                required=True,
                metavar=("NAME", "VALUE"),
                help="an option of the recipe and the values to try; may be given several times",
            )
            sub.add_argument("--lrs", type=float, nargs="+", help="run every value at each of these rates")
            sub.add_argument("--report", type=Path, help="folder of a report that these factors are added to as well")
        if name == "tune":
            sub.add_argument("--lrs", type=float, nargs="+", required=True, help="learning rates to try")
            sub.add_argument(
                "--extend",
                action="store_true",
                help="try further rates, in steps of 10^(1/4), until the best of each method has a worse one on both sides",
            )
            sub.add_argument("--tuned", type=Path, help="folder of a table that these rates are added to as well")
            sub.add_argument(
                "--core-ratios",
                type=float,
                nargs="+",
                default=[1.0],
                help="rates of the cores to try, as multiples of lr",
            )
        if name == "seeds":
            sub.add_argument("--results", type=Path, default=HERE / "results", help="where the committed table goes")
    options = parser.parse_args(arguments)

    def act() -> None:
        if not any(outcome.results for outcome in options.action(options)):
            parser.exit(1, "error: every run failed; the reasons stand above\n")

    ended(parser, act)


if __name__ == "__main__":
    main()
