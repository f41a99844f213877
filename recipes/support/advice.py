"""Plain sentences on what a result means and what to try next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .config import EMBEDDED


def noise(accuracy: float, total: int) -> float:
    """The standard error of an accuracy over ``total`` problems, of one that is neither 0 nor 1."""
    inside = min(max(accuracy, 1 / (total + 2)), 1 - 1 / (total + 2))
    return math.sqrt(inside * (1 - inside) / total)


def advise(result: Mapping[str, Any]) -> list[str]:
    """What the result of one run suggests, most urgent first."""
    metrics, config, curve = result["metrics"], result["config"], result["curve"]
    accuracy, base, total = metrics.get("accuracy"), metrics.get("base_accuracy"), metrics["problems"]
    advice = [*_about_loss(curve), *_about_expansion(result)]
    if metrics["format_rate"] < 0.95:
        advice.append(
            f"Only {100 * metrics['format_rate']:.0f} % of the answers are well formed. Look at predictions.jsonl:"
            " if answers are cut off, raise --max-new-tokens; if not, train longer (--train-size, --max-steps)."
        )
    if accuracy is None:
        return advice
    error = noise(accuracy, total)
    if accuracy == base == 0:
        advice.append(
            "No problem was solved before or after training, so the accuracy says nothing about the method. "
            + (
                "The embedded models know their own made-up texts alone; give a --model that can do some of the task."
                if config["model"] == EMBEDDED
                else "Give a --model that can do some of the task, or train for more steps."
            )
        )
    elif accuracy <= base + error:
        advice.append(
            "The trained model is not better than the base model beyond noise. Raise --lr or train for more steps."
        )
    if accuracy > 0.95:
        advice.append(
            "The task is nearly solved, so methods can hardly differ here; take fewer steps or a harder task."
        )
    advice.append(
        f"With {total} problems the accuracy is known to ± {100 * error:.1f} points (one standard error); smaller "
        "differences between two runs are noise. Compare methods over several seeds: recipes/ablate.py seeds."
    )
    if config["eval_split"] == "test":
        advice.append("Do not choose rates by this number: tune with recipes/ablate.py tune, on the validation split.")
    return advice


def _about_loss(curve: Sequence[Sequence[float]]) -> list[str]:
    losses = [loss for _, loss in curve]
    if any(not math.isfinite(loss) for loss in losses):
        return ["The loss stopped being a finite number: lower --lr and --core-lr."]
    if len(losses) < 8:
        return []
    quarter = len(losses) // 4
    early, late = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    if late > 0.98 * early:
        return [f"The loss hardly fell ({early:.3f} to {late:.3f}): raise --lr, or lower it if the curve is jagged."]
    return []


def _about_expansion(result: Mapping[str, Any]) -> list[str]:
    matrices, config = result["matrices"], result["config"]
    if not matrices:
        return []
    steps = sorted({matrix["expanded_at"] for matrix in matrices if matrix["expanded_at"] is not None})
    if not steps:
        return ["No matrix was expanded: the run ended before the first round. Lower --every."]
    if steps[-1] > 0.5 * result["metrics"]["steps"]:
        return [
            f"The last matrices were expanded at step {steps[-1]} of {result['metrics']['steps']} and had little time "
            f"to profit. Lower --every ({config['every']}) or --split ({config['split']})."
        ]
    return []
