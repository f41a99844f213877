"""Tables, pictures and the report of runs that train an adapter and score it on problems.

A result is a dictionary with ``label``, ``config``, ``metrics``, ``curve`` and ``matrices``, as the recipes make it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tnadapt.pictures import expansion_map, loss_curves

from . import pictures
from .advice import advise
from .provenance import config_hash, write_text
from .tables import Table, grade, percent, percent_over_seeds, rate

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


def _figures(metrics: Mapping[str, Any], names: Sequence[str], prefix: str = "") -> list[str]:
    return [FIGURES[name][1](metrics.get(f"{prefix}{name}")) for name in names]


def result_table(
    results: Sequence[Result],
    measure: str,
    committed: Mapping[str, Any] | None = None,
    paper: Mapping[str, str] | None = None,
) -> Table:
    """One row for the base model and one per result.

    Args:
        results: of runs on the same problems.
        measure: what the accuracy is a share of.
        committed: the table over several seeds that the repository keeps; it gets a column of its own.
        paper: the paper's own figures by label, which are nobody's measurement here; a column of their own, too.
    """
    first = results[0]["metrics"]
    figures = [name for name in FIGURES if any(result["metrics"].get(name) is not None for result in results)]
    figures = figures or ["accuracy"]
    columns = [
        "method",
        *(FIGURES[name][0] for name in figures),
        "format",
        "loss",
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
    if committed:
        columns.append(f"{len(committed['seeds'])} seeds")
        rows[0].append(percent(committed["base_accuracy"]))
        for row, result in zip(rows[1:], results, strict=True):
            method = committed["methods"].get(result["config"]["method"])
            row.append(percent_over_seeds(method["accuracy"]) if method else "–")
        caption += (
            f" Last column: committed mean ± std over seeds {', '.join(map(str, committed['seeds']))} with "
            f"{committed['steps']} steps, not this run."
        )
    if paper:
        columns.append("paper's" if figures[0] == "grade" else "paper's %")
        rows[0].append("–")
        for row, result in zip(rows[1:], results, strict=True):
            row.append(paper.get(result["label"], "–"))
        caption += " Last column: printed in the paper, not measured here."
    return Table(measure, columns, rows, caption)


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


def compare(
    results: Sequence[Result],
    root: Path,
    measure: str,
    committed: Mapping[str, Any] | None = None,
    paper: Mapping[str, str] | None = None,
) -> Path:
    """Print the results in one table and draw them in one picture below ``root``, whose path is returned."""
    result_table(results, measure, committed, paper).show()
    metrics = [result["metrics"] for result in results]
    figure = next((name for name in FIGURES if all(each.get(name) is not None for each in metrics)), None)
    heading, shown = FIGURES[figure or "accuracy"]
    scores = {} if figure is None else {"base model": metrics[0][f"base_{figure}"]}
    scores |= {result["label"]: result["metrics"][figure] for result in results if figure}
    curves = {result["label"]: result["curve"] for result in results}
    path = root / f"comparison-{config_hash({result['name']: '' for result in results})}.png"
    return pictures.comparison(path, scores, curves, heading, shown)
