"""The command line of a recipe: transformers' parser reads the options off the fields of the recipe's configuration."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from transformers.hf_argparser import HfArgumentParser

from support import ranks
from support.config import EMBEDDED, Config
from support.methods import METHODS
from support.provenance import read_json
from support.recipe import Recipe


class OneLine(HfArgumentParser):
    """Says what is wrong in one line, without the list of all options, which is long; ``--help`` has it."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; --help lists all options", file=sys.stderr)
        raise SystemExit(2)


def preset_of(recipe: Recipe, arguments: Sequence[str] | None) -> str:
    """The preset that a command line asks for: the others' defaults come from it."""
    first = OneLine(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=recipe.presets, default="laptop")
    preset: str = first.parse_known_args(arguments)[0].preset
    return preset


def options_of(recipe: Recipe, preset: str, without: Collection[str] = (), **settings: Any) -> OneLine:
    """A parser with an option for every field of the recipe's configuration; the defaults are the preset's.

    Args:
        recipe: whose configuration.
        preset: whose defaults; `preset_of` finds it.
        without: fields that get no option.
        settings: for ``argparse.ArgumentParser``.
    """
    parser = options_for(recipe.config, {*without, "preset"}, **settings)
    parser.add_argument(
        "--preset",
        choices=recipe.presets,
        help="laptop: small and offline; paper and paper-llama2, where there are such: the settings of LoRA-Over's paper",
    )
    parser.set_defaults(**dataclasses.asdict(recipe.presets[preset]))
    return parser


def options_for(config: type[Config], without: Collection[str], **settings: Any) -> OneLine:
    """A parser with an option for every field of ``config`` but those ``without``."""
    types = get_type_hints(config)
    fields = [
        (field.name, types[field.name], dataclasses.field(default=field.default, metadata=field.metadata))
        for field in dataclasses.fields(config)
        if field.name not in without
    ]
    return OneLine(dataclasses.make_dataclass("Options", fields), allow_abbrev=False, **settings)


def config_from(recipe: Recipe, options: argparse.Namespace, **changes: Any) -> Any:
    """The configuration that parsed options make."""
    names = {field.name for field in dataclasses.fields(recipe.config)} - changes.keys()
    return recipe.config(**{name: getattr(options, name) for name in names}, **changes)


def ended(parser: argparse.ArgumentParser, action: Callable[[], None]) -> None:
    """Do ``action``; what is wrong ends the script in one line, and an interruption with what the same command does."""
    try:
        action()
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ncancelled; the same command goes on where it stopped\n")


def main(recipe: Recipe, arguments: Sequence[str] | None = None) -> None:
    """Run the methods that the command line names, and compare them."""
    preset = preset_of(recipe, arguments)
    parser = options_of(recipe, preset, recipe.several, description=recipe.description)
    for field in dataclasses.fields(recipe.config):
        if field.name in recipe.several:
            default = getattr(recipe.presets[preset], field.name)
            parser.add_argument(
                f"--{field.name}",
                nargs="+",
                choices=field.metadata["choices"],
                default=list(recipe.default_methods) if field.name == "method" else [default],
                help=f"{field.metadata['help']}; each of several is run",
            )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument(
        "--name",
        default="",
        help="name of the run folder, to which the method is added if there are several; made up if empty",
    )
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run, keep a finished one")
    parser.add_argument("--threads", type=int, help="CPU threads; None: 1 for the embedded model, else torch's choice")
    options = parser.parse_args(arguments)
    values = [dict.fromkeys(getattr(options, name)) for name in recipe.several]
    changes = [dict(zip(recipe.several, each, strict=True)) for each in itertools.product(*values)]
    try:
        _run_all(recipe, [config_from(recipe, options, **each) for each in changes], options)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n" if ranks.is_first() else None)
    except ranks.FirstFailed:
        parser.exit(2)
    except KeyboardInterrupt:
        parser.exit(130, "\ncancelled; the same command with --resume goes on from the last checkpoint\n")
    finally:
        ranks.stop()


def _run_all(recipe: Recipe, configs: Sequence[Config], options: argparse.Namespace) -> None:
    # Torch and transformers are imported here and not above: they take seconds that --help and a wrong option need not wait.
    from support.results import compare
    from support.running import hush, run

    hush()
    configs = [recipe.resolve(config) for config in configs]
    first = configs[0]
    if options.threads or first.model == EMBEDDED:  # which is so small that threads only wait for each other
        import torch

        torch.set_num_threads(options.threads or 1)
    results = []
    for config in configs:
        ending = "-".join(str(getattr(config, name)) for name in recipe.several)
        name = f"{options.name}-{ending}" if options.name and len(configs) > 1 else options.name
        if ranks.is_first():
            print(f"\n{METHODS[config.method].label}: {config.model} on {recipe.title(config)}, seed {config.seed}")
        results.append(run(recipe, config, options.runs, name, options.resume))
    if not ranks.is_first():
        return
    for result in results:
        print(f"{result['label']}: {result['folder']}/report.md")
    for title, group in itertools.groupby(zip(configs, results, strict=True), lambda pair: recipe.title(pair[0])):
        pairs = list(group)
        first = pairs[0][0]
        measure = f"{recipe.benchmark.measure}, {title}" if len(recipe.several) > 1 else recipe.benchmark.measure
        picture = compare([result for _, result in pairs], options.runs, measure, beside(recipe, first))
        print(f"comparison: {picture}")
        for line in closing(recipe, first, [result for _, result in pairs]):
            print(line)


def closing(recipe: Recipe, config: Config, results: Sequence[Any]) -> list[str]:
    """What who ran the shipped model and data has seen, in a sentence, and what the study says about it."""
    if len(results) < 2 or not _shipped(config):
        return []
    scores = {result["label"]: result["metrics"].get("accuracy") for result in results}
    if None in scores.values():
        return []
    said = ", ".join(f"{label} {100 * score:.1f} %" for label, score in scores.items())
    lines = [f"What you have seen: one run each with one seed, {said}; seeds alone move these by several points."]
    study = recipe.path.parent / "results" / "study" / "answer.txt"
    if study.exists() and (text := study.read_text(encoding="utf-8").strip()):
        lines.append(f"What the study says: {text}.")
    return [
        *lines,
        "Next: your own model and data. recipes/compare.py finds the method and its rate; docs/quickstart.md has the code.",
    ]


def _shipped(config: Config) -> bool:
    return all(getattr(config, name) in (EMBEDDED, None) for name in ("model", *config.PLACES))


def beside(recipe: Recipe, config: Any) -> Any:
    """What stands beside results of ``config`` in the table."""
    from support.results import Beside

    grids = recipe.grids.get(config.preset, {}) if config.model == recipe.presets[config.preset].model else {}
    return Beside(committed_table(recipe, config), grids, recipe.paper(config), recipe.elsewhere(config))


def committed_table(recipe: Recipe, config: Config) -> Any:
    """The table over seeds that the repository keeps for the models and data that it ships."""
    path = recipe.path.parent / "results" / f"{recipe.table_name(config)}.json"
    return read_json(path) if _shipped(config) and path.exists() else None
