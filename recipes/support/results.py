"""Tables, pictures and the report of runs that train an adapter and score it on problems.

A result is a dictionary with ``label``, ``config``, ``metrics``, ``curve`` and ``matrices``, as the recipes make it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tnadapt.pictures import expansion_map, loss_curves

from . import pictures
from .advice import advise
from .elsewhere import TunedLora
from .methods import METHODS
from .provenance import config_hash, write_text
from .tables import Table, grade, percent, percent_over_seeds, rate, span

Result = Mapping[str, Any]


def expansions(over: Any) -> list[dict[str, Any]]:
    """Every LoRA matrix of a ``LoraOver``, and the step at which it was expanded, if it was."""
    expanded_at = {name: event.step for event in over.history if event.action == "expand" for name in event.names}
    return [
        {
            "name": matrix.name,
            "kind": matrix.kind,
            "layer": matrix.layer,
            "module": matrix.module,
            "expanded_at": expanded_at.get(matrix.name),
        }
        for matrix in over.matrices.values()
    ]


#: The figures that a benchmark may give, the main one first, with the heading of their column and how they are written.
FIGURES: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "grade": ("grade, 1st turn", grade),
    "grade_both_turns": ("both turns", grade),
    "accuracy": ("accuracy", percent),
    "greedy_accuracy": ("greedy", percent),
}


#: The label of plain LoRA, which is the baseline of all others.
LORA = METHODS["lora"].label


def _figures(metrics: Mapping[str, Any], names: Sequence[str], prefix: str = "") -> list[str]:
    return [FIGURES[name][1](metrics.get(f"{prefix}{name}")) for name in names]


@dataclass(frozen=True)
class Beside:
    """What stands beside the figures of runs, each in columns of its own."""

    committed: Mapping[str, Any] | None = None
    """The table over several seeds that the repository keeps."""
    grids: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The rates that were tried for a method when the preset's were tuned."""
    paper: Mapping[str, str] = field(default_factory=dict)
    """The paper's own figures by label, which are nobody's measurement here."""
    elsewhere: Sequence[TunedLora] = ()
    """LoRA with the rates that other papers tuned."""


def result_table(results: Sequence[Result], measure: str, beside: Beside | None = None) -> Table:
    """One row for the base model and one per result; where no result is LoRA's, a row for what others report of it.

    Args:
        results: of runs on the same problems.
        measure: what the accuracy is a share of.
        beside: what stands beside.
    """
    beside = beside or Beside()
    first = results[0]["metrics"]
    figures = [name for name in FIGURES if any(result["metrics"].get(name) is not None for result in results)]
    figures = figures or ["accuracy"]
    columns = [
        "method",
        *(FIGURES[name][0] for name in figures),
        "format",
        "train loss",
        "lr",
        "core lr",
        "trained",
        "train s",
    ]
    rows = [["base model", *_figures(first, figures, "base_"), percent(first["base_format_rate"]), *"–––––"]]
    for result in results:
        config, metrics = result["config"], result["metrics"]
        rows.append(
            [
                result["label"],
                *_figures(metrics, figures),
                percent(metrics["format_rate"]),
                f"{metrics['loss']:.4f}",
                rate(config["lr"]),
                rate(config["core_lr"]),
                f"{metrics['trained_parameters']:,}",
                f"{metrics['training_seconds']:.0f}",
            ]
        )
    caption = f"{first['problems']} examples, {first['steps']} steps."
    methods = [result["config"]["method"] for result in results]
    if beside.grids:
        columns.append("rates tried")
        rows[0].append("–")
        for row, method in zip(rows[1:], methods, strict=True):
            row.append(span(beside.grids.get(method, ())))
        caption += " Rates tried: how many, and from where to where, when the preset's rate was tuned."
    if committed := beside.committed:
        columns.append(f"{len(committed['seeds'])} seeds")
        rows[0].append(percent(committed["base_accuracy"]))
        for row, method in zip(rows[1:], methods, strict=True):
            known = committed["methods"].get(method)
            row.append(f"{percent_over_seeds(known['accuracy'])} at {rate(known['lr'])}" if known else "–")
        caption += (
            f" {columns[-1].capitalize()}: committed mean ± std over seeds {', '.join(map(str, committed['seeds']))} with "
            f"{committed['steps']} steps, and the rate; not this run."
        )
    labels = [result["label"] for result in results]
    if (beside.paper or beside.elsewhere) and LORA not in labels:
        labels.append(LORA)
        rows.append([LORA, *"–" * (len(columns) - 1)])
    if beside.paper:
        columns.append("paper's" if figures[0] == "grade" else "paper's %")
        rows[0].append("–")
        for row, label in zip(rows[1:], labels, strict=True):
            row.append(beside.paper.get(label, "–"))
        caption += f" {columns[-1].capitalize()}: printed in the paper, not measured here."
    if beside.elsewhere:
        columns.append("tuned elsewhere %")
        rows[0].append("–")
        for row, label in zip(rows[1:], labels, strict=True):
            row.append("; ".join(each.figure for each in beside.elsewhere) if label == LORA else "–")
        caption += (
            f" Tuned elsewhere: LoRA as others measured it, not in every detail alike: {'; '.join(map(str, beside.elsewhere))}. "
            "Where the paper's LoRA, or the one here, is far below, a gain over it may be its learning rate's."
        )
    # why figures are missing, and what to do for them
    notes = dict.fromkeys(filter(None, (result.get("note") for result in results)))
    return Table(measure, columns, rows, " ".join([caption, *notes]))


def write_report(result: Result, folder: Path, measure: str) -> None:
    """The pictures of a run, and a text about it that says what to do next."""
    config, metrics, label = result["config"], result["metrics"], result["label"]
    pictures.save(loss_curves({label: result["curve"]}), folder / "loss.png")
    shown = ["![loss](loss.png)\n"]
    if result["matrices"]:
        expanded_at = {matrix["name"]: matrix["expanded_at"] for matrix in result["matrices"]}
        pictures.save(expansion_map(expanded_at, metrics["steps"]), folder / "expansions.png")
        shown.append("![expansions](expansions.png)\n")
    settings = Table("configuration", ("option", "value"), [(key, str(value)) for key, value in config.items()])
    lines = [
        f"# {label}, seed {config['seed']}\n",
        f"{config['model']} trained on {metrics['training_examples']} examples of {config['data']}: {metrics['steps']} "
        f"steps of {config['batch']}, {metrics['tokens']:,} tokens. Evaluated on {metrics['problems']} examples of the "
        f"{config['eval_split']} split. {metrics['seconds']:.0f} s in all, {metrics['training_seconds']:.0f} s training.\n",
        result_table([result], measure).markdown(),
        *shown,
        "## What next\n",
        *(f"- {sentence}" for sentence in filter(None, [result.get("note"), *advise(result)])),
        "\nThe adapter is one of PEFT's: `PeftModel.from_pretrained(base, 'adapter')`; full fine-tuning leaves `model` instead. "
        "All answers are in `answers/`, those of the trained model with its verdicts in `predictions.jsonl`, all figures in `result.json`.\n",
        *([f"## Plan\n\n```\n{result['plan']}\n```\n"] if result["plan"] else []),
        "## Configuration\n",
        settings.markdown(),
    ]
    write_text(folder / "report.md", "\n".join(lines))


def compare(results: Sequence[Result], root: Path, measure: str, beside: Beside | None = None) -> Path:
    """Print the results in one table and draw them in one picture below ``root``, whose path is returned."""
    result_table(results, measure, beside).show()
    metrics = [result["metrics"] for result in results]
    figure = next((name for name in FIGURES if all(each.get(name) is not None for each in metrics)), None)
    heading, shown = FIGURES[figure or "accuracy"]
    scores = {} if figure is None else {"base model": metrics[0][f"base_{figure}"]}
    scores |= {result["label"]: result["metrics"][figure] for result in results if figure}
    curves = {result["label"]: result["curve"] for result in results}
    path = root / f"comparison-{config_hash({result['name']: '' for result in results})}.png"
    return pictures.comparison(path, scores, curves, heading, shown)
