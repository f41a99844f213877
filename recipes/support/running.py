"""One run of a recipe: train one method with one seed, evaluate it, and leave a folder that tells all about it."""

from __future__ import annotations

import json
import logging
import shutil
import time
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns when imported, of kernels that nothing here uses

from transformers import logging as transformers_logging  # noqa: E402
from transformers.trainer_utils import set_seed  # noqa: E402

from support.adapters import attach, save_initial, save_trained  # noqa: E402
from support.config import Config  # noqa: E402
from support.encoding import encode  # noqa: E402
from support.folders import RunFolder  # noqa: E402
from support.generation import generate  # noqa: E402
from support.loading import load_model, load_shape, target_modules  # noqa: E402
from support.methods import METHODS  # noqa: E402
from support.provenance import config_hash, environment, write_text  # noqa: E402
from support.recipe import Recipe, Record  # noqa: E402
from support.results import write_report  # noqa: E402
from support.training import Training, train  # noqa: E402


def hush() -> None:
    """Leave out messages that ask for nothing: of progress bars of other libraries, of version notes and of retries."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def run(
    recipe: Recipe,
    config: Config,
    root: Path = Path("runs"),
    name: str = "",
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train and evaluate one method with one seed, and leave the run's folder below ``root``.

    A finished run of the same configuration is not repeated when ``resume`` is set; an unfinished one goes on.

    Returns:
        What ``result.json`` holds, and under ``folder`` where that is.

    Raises:
        ValueError: for what cannot work, before anything is evaluated or written.
    """
    config = recipe.resolve(config)
    settings = config.settings()
    name = name or f"{recipe.name}-{config.preset}-{config.method}-seed{config.seed}-{config_hash(settings)}"
    folder = RunFolder(root, name)
    done = folder.finished(settings)
    if not quiet and (notice := folder.notice(resume)):
        print(notice)
    if done and resume:
        return {**done, "folder": str(folder.final)}
    target_modules(config, load_shape(recipe, config))
    records, evaluation = recipe.load(config)
    method = METHODS[config.method]
    result = {"name": name, "label": method.label, "config": settings, "environment": environment(recipe.path.parent)}
    start = time.perf_counter()
    with folder.working(result, keep=resume) as work:
        base = evaluate_base(recipe, config.base(), quiet)
        model, tokenizer = load_model(recipe, config)
        examples = encode(
            tokenizer,
            records,
            recipe.prompt,
            recipe.answer,
            config.train_size,
            config.max_length,
            model.config.is_encoder_decoder,
        )
        set_seed(config.seed)
        training = Training(tokenizer, examples, config, work, quiet)
        model = attach(model, method, config, training.steps, lambda size: training.batches(size, model.device))
        save_initial(model, method, work / "initial")
        result |= train(model, method, training)
        scores = evaluate(recipe, model, tokenizer, evaluation, config, quiet)
        result["metrics"] |= {
            "accuracy": scores["accuracy"],
            "format_rate": scores["format_rate"],
            "base_accuracy": base["accuracy"],
            "base_format_rate": base["format_rate"],
            "problems": len(evaluation),
            "training_examples": len(examples),
            "seconds": time.perf_counter() - start,
        }
        save_trained(model, method, work)
        write_text(work / "predictions.jsonl", "".join(json.dumps(answer) + "\n" for answer in scores["answers"]))
        write_report(result, work, recipe.measure)
        for leftover in ("checkpoints", "initial"):
            shutil.rmtree(work / leftover, ignore_errors=True)
    return {**result, "folder": str(folder.final)}


def evaluate(
    recipe: Recipe, model: Any, tokenizer: Any, records: Sequence[Record], config: Config, quiet: bool
) -> dict[str, Any]:
    """Answer all records and grade the answers."""
    outputs = generate(model, tokenizer, [recipe.prompt(record) for record in records], config, quiet)
    grades = [recipe.grade(record, output) for record, output in zip(records, outputs, strict=True)]
    answers = [
        {**record, "output": output, "correct": right}
        for record, output, (_, right) in zip(records, outputs, grades, strict=True)
    ]
    return {
        "accuracy": sum(right for _, right in grades) / len(grades),
        "format_rate": sum(formed for formed, _ in grades) / len(grades),
        "answers": answers,
    }


@lru_cache(maxsize=1)
def evaluate_base(recipe: Recipe, config: Config, quiet: bool) -> dict[str, Any]:
    """The base model's scores before any training; ``config`` is one that ``Config.base`` made, so they come once."""
    model, tokenizer = load_model(recipe, config)
    return evaluate(recipe, model, tokenizer, recipe.load(config)[1], config, quiet)
