"""`tnadapt report`: runs of the recipes side by side, in the terminal and as one HTML page."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tnadapt.cli.tables import aligned

__all__ = ["run"]

Run = Mapping[str, Any]

_RESULT = "result.json"
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40
_COLUMNS = ("run", "status", "accuracy", "base model", "loss", "lr", "core lr", "seed", "LoRA", "trained", "training")
#: settings that have a column of their own
_SHOWN = {"lr", "core_lr", "seed"}


def run(folders: Sequence[Path], page: Path | None = None, as_json: bool = False) -> str:
    """The comparison as text or JSON; the HTML page is written where `page` is given."""
    runs = read_runs(folders)
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(html_page(runs), encoding="utf-8")
    if as_json:
        return json.dumps([dict(one) for one in runs], indent=2)
    return text(runs) + (f"\n\nThe page with the pictures is {page}." if page is not None else "")


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The results in the folders, or one level below them; a folder that is given twice counts once.

    Raises:
        FileNotFoundError: a folder is not there or holds no result.
        ValueError: a result cannot be read.
    """
    files: list[Path] = []
    for folder in folders:
        found = [folder / _RESULT] if (folder / _RESULT).is_file() else sorted(folder.glob(f"*/{_RESULT}"))
        if not found:
            what = f"has no {_RESULT}, nor have the folders in it" if folder.is_dir() else "is not a folder"
            raise FileNotFoundError(f"{folder} {what}; give folders of finished runs of the recipes, such as runs/*")
        files += [file for file in found if file not in files]
    runs: list[Run] = []
    for file in files:
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
            runs.append({"folder": str(file.parent), "metrics": {}, "curve": [], "matrices": [], **read})
            if not {"label", "config", "status"} <= read.keys():
                raise ValueError("it has no label, config or status")
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{file} is not the result of a recipe: {error}") from error
    return runs


def names(runs: Sequence[Run]) -> list[str]:
    """A short name for every run: its label, and what tells it from others of the same label."""
    labels = [str(one["label"]) for one in runs]
    shown = []
    for label, one in zip(labels, runs, strict=True):
        same = [other for other, its in zip(runs, labels, strict=True) if its == label]
        values = {key: [_plain(other["config"].get(key)) for other in same] for key in differing(same)}
        # one setting that tells all of them apart says more than a list of several
        telling = next(([key] for key, its in values.items() if len(set(its)) == len(same)), list(values)[:3])
        marks = ", ".join(f"{key} {_plain(one['config'].get(key))}" for key in telling)
        shown.append(f"{label} ({marks})" if marks else label)
    if len(set(shown)) < len(shown):
        return [f"{label} [{Path(one['folder']).name}]" for label, one in zip(labels, runs, strict=True)]
    return shown


def differing(runs: Sequence[Run]) -> list[str]:
    """Settings in which the runs differ, but for the method, which the label tells."""
    keys = dict.fromkeys(key for one in runs for key in one["config"])
    return [key for key in keys if key != "method" and len({_plain(one["config"].get(key)) for one in runs}) > 1]


def result_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """One row of cells per run."""
    rows: list[tuple[str, ...]] = []
    for name, one in zip(names(runs), runs, strict=True):
        metrics, config = one["metrics"], one["config"]
        seconds = metrics.get("training_seconds")
        rows.append(
            (
                name,
                str(one["status"]),
                _percent(metrics.get("accuracy")),
                _percent(metrics.get("base_accuracy")),
                _number(metrics.get("loss")),
                _number(config.get("lr")),
                _number(config.get("core_lr")),
                _number(config.get("seed")),
                _number(metrics.get("lora_parameters")),
                _number(metrics.get("trained_parameters")),
                "–" if seconds is None else f"{seconds:.0f} s",
            )
        )
    return rows


def text(runs: Sequence[Run]) -> str:
    """The comparison for the terminal: results, settings, loss as bars, expansions by step."""
    parts = [aligned(_COLUMNS, result_rows(runs))]
    if settings := setting_rows(runs):
        parts.append(aligned(("settings that differ", *names(runs)), settings))
    curves = {name: one["curve"] for name, one in zip(names(runs), runs, strict=True) if one["curve"]}
    if curves:
        values = [loss for curve in curves.values() for _, loss in curve]
        low, high = min(values), max(values)
        widest = max(map(len, curves))
        lines = [f"loss from {low:.3g} (▁) to {high:.3g} (█), each run from its first to its last step"]
        lines += [
            f"{name.ljust(widest)}  {bars([loss for _, loss in curve], low, high)}" for name, curve in curves.items()
        ]
        parts.append("\n".join(lines))
    for name, one in zip(names(runs), runs, strict=True):
        if one["matrices"]:
            by_step: dict[int, int] = {}
            for matrix in one["matrices"]:
                if matrix["expanded_at"] is not None:
                    by_step[matrix["expanded_at"]] = by_step.get(matrix["expanded_at"], 0) + 1
            when = ", ".join(f"{count} at step {step}" for step, count in sorted(by_step.items())) or "none"
            parts.append(f"{name}: {sum(by_step.values())} of {len(one['matrices'])} matrices expanded ({when})")
    return "\n\n".join(parts)


def setting_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Settings in which the runs differ, one row each, without those that the table of results shows."""
    keys = [key for key in differing(runs) if key not in _SHOWN]
    return [(key, *(_plain(one["config"].get(key)) for one in runs)) for key in keys]


def bars(values: Sequence[float], low: float, high: float) -> str:
    """A curve as at most 40 blocks, each the mean of its part of the values."""
    count = min(_WIDTH, len(values))
    parts = [values[k * len(values) // count : (k + 1) * len(values) // count] for k in range(count)]
    means = [sum(part) / len(part) for part in parts]
    top = len(_BARS) - 1
    return "".join(_BARS[0 if high == low else round(top * (value - low) / (high - low))] for value in means)


# -- the page --------------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; }
pre { overflow-x: auto; background: #f5f5f5; padding: .8rem; font-size: .85rem; }
"""


def html_page(runs: Sequence[Run]) -> str:
    """The comparison as one HTML page that needs no other file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from tnadapt import pictures

    labels = names(runs)
    body = [
        f"<h1>{len(runs)} run{'s' * (len(runs) > 1)} compared</h1>",
        "<h2>Results</h2>",
        _table(_COLUMNS, result_rows(runs)),
        "<p>LoRA: parameters that the model keeps. Trained: parameters that were trained, cores in place of expanded matrices.</p>",
    ]
    if settings := setting_rows(runs):
        body += ["<h2>Settings that differ</h2>", _table(("setting", *labels), settings)]
    curves = {name: [(x, y) for x, y in one["curve"]] for name, one in zip(labels, runs, strict=True) if one["curve"]}
    if curves:
        body += ["<h2>Loss</h2>", _image(pictures.loss_curves(curves), "training loss of every run over its steps")]
    for name, one in zip(labels, runs, strict=True):
        if one["matrices"]:
            when = {matrix["name"]: matrix["expanded_at"] for matrix in one["matrices"]}
            figure = pictures.expansion_map(when, one["metrics"].get("steps"))
            body += [f"<h2>Expansions: {html.escape(name)}</h2>", _image(figure, f"when {name} expanded each matrix")]
        if one.get("error"):
            body += [f"<h2>Error: {html.escape(name)}</h2>", f"<pre>{html.escape(str(one['error']))}</pre>"]
    body.append("<h2>Where the runs are</h2>")
    commands = [
        (name, one["folder"], str(one.get("environment", {}).get("command", "–")))
        for name, one in zip(labels, runs, strict=True)
    ]
    body.append(_table(("run", "folder", "command"), commands))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(' · '.join(labels)[:120])}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f'<div class="wide"><table>\n<thead>{line("th", header)}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _image(figure: Any, what: str) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return f'<p><img alt="{html.escape(what, quote=True)}" src="data:image/png;base64,{data}"></p>'


def _plain(value: object) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
