"""One run of a recipe: train one method with one seed, evaluate it, and leave a folder that tells all about it."""

from __future__ import annotations

import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns when imported, of kernels that nothing here uses

from tqdm import tqdm  # noqa: E402
from transformers import logging as transformers_logging  # noqa: E402
from transformers.trainer_utils import set_seed  # noqa: E402

from support import ranks  # noqa: E402
from support.adapters import attach, save_initial, save_trained  # noqa: E402
from support.benchmark import Scores  # noqa: E402
from support.config import Config  # noqa: E402
from support.encoding import encode, with_wrong_answers  # noqa: E402
from support.evaluation import tokenization  # noqa: E402
from support.evaluation.answers import Generate  # noqa: E402
from support.evaluation.generate import Chooser, Generator, Sampling  # noqa: E402
from support.evaluation.loss import answer_losses  # noqa: E402
from support.evaluation.prompts import Example  # noqa: E402
from support.folders import RunFolder  # noqa: E402
from support.loading import choices_of, load_model, load_shape, target_modules  # noqa: E402
from support.methods import METHODS  # noqa: E402
from support.provenance import config_hash, environment, write_json, write_text  # noqa: E402
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

    A finished run of the same configuration is not repeated when ``resume`` is set; an unfinished one goes on. Where there are
    several ranks, all call this; the first one evaluates and writes, and all train.

    Returns:
        What ``result.json`` holds, and under ``folder`` where that is.

    Raises:
        ValueError: for what cannot work, before anything is evaluated or written.
    """
    config = recipe.resolve(config)
    ranks.start()
    if not ranks.is_first():
        return train_along(recipe, config)
    try:
        result = run_alone(recipe, config, root, name, resume, quiet)
    except BaseException as error:
        ranks.tell(ranks.FirstFailed(f"{type(error).__name__} on the first rank: {error}"))
        raise
    ranks.tell(result)
    return result


def run_alone(recipe: Recipe, config: Config, root: Path, name: str, resume: bool, quiet: bool) -> dict[str, Any]:
    """``run`` on the first rank, or the only one."""
    settings = config.settings()
    name = name or f"{recipe.name}-{config.preset}-{config.method}-seed{config.seed}-{config_hash(settings)}"
    folder = RunFolder(root, name)
    done = folder.finished(settings)
    if not quiet and (notice := folder.notice(resume)):
        print(notice)
    if done and resume:
        known = done.get("scoring", {})
        if recipe.benchmark.scores(config) and (done.get("note") or known != config.scoring()):
            score_again(recipe, config, done, folder.final)
        return {**done, "folder": str(folder.final)}
    target_modules(config, load_shape(recipe, config))
    records, evaluation = recipe.load(config)
    method = METHODS[config.method]
    result: dict[str, Any] = {
        "name": name,
        "label": method.label,
        "config": settings,
        "environment": {**environment(recipe.path.parent), "ranks": ranks.world()},
    }
    start = time.perf_counter()
    with folder.working(result, keep=resume) as work:
        base = evaluate_base(recipe, config, evaluation, work, quiet)
        with ranks.training_together(work):
            model, tokenizer, training = adapted(recipe, config, records, work, quiet)
            save_initial(model, method, work / "initial")
            result |= train(model, method, training)
            if ranks.sharded():
                values = ranks.whole(model)
        if ranks.sharded():
            model, tokenizer, _ = adapted(recipe, config, records, work, quiet)
            unknown = model.load_state_dict(values, strict=False).unexpected_keys
            assert not unknown, f"{unknown[0]} was trained, and the model has no such parameter"
        scores = evaluate(recipe, config, evaluation, lambda: (model, tokenizer), work, TRAINED, quiet)
        record_scores(result, config, work, scores, base)
        if recipe.benchmark.answered:
            result["losses"] = losses = losses_on(recipe, config, evaluation, model, tokenizer)
            total, tokens = (sum(column) for column in zip(*losses, strict=True)) if losses else (0.0, 0)
            result["metrics"]["eval_loss"] = total / tokens if tokens else None
        result["metrics"] |= {
            "problems": len(evaluation),
            "training_examples": len(training.examples),
            "seconds": time.perf_counter() - start,
        }
        save_trained(model, method, work)
        write_report(result, work, recipe.benchmark.measure)
        for leftover in ("checkpoints", "initial"):
            shutil.rmtree(work / leftover, ignore_errors=True)
    return {**result, "folder": str(folder.final)}


def adapted(
    recipe: Recipe, config: Config, records: Sequence[Record], work: Path, quiet: bool
) -> tuple[Any, Any, Training]:
    """The model as it is before training, its tokenizer, and what it is trained on; the same on all ranks."""
    model, tokenizer = load_model(recipe, config)
    examples = encode(
        tokenizer,
        records,
        recipe.prompt,
        with_wrong_answers(records[: config.train_size], recipe.answer, config.wrong_answers),
        config.train_size,
        config.max_length,
        model.config.is_encoder_decoder,
        choices_of(recipe, config, model.config),
    )
    set_seed(config.seed)
    training = Training(tokenizer, examples, config, work, quiet)
    method = METHODS[config.method]
    model = attach(model, method, config, training.steps, lambda size: training.batches(size, model.device))
    return model, tokenizer, training


def train_along(recipe: Recipe, config: Config) -> dict[str, Any]:
    """What the other ranks do while the first one runs: they train when it trains, and return what it returns."""
    while isinstance(heard := ranks.hear(), Path):
        model, _, training = adapted(recipe, config, recipe.load(config)[0], heard, quiet=True)
        train(model, METHODS[config.method], training)
        if ranks.sharded():
            ranks.whole(model)
    result: dict[str, Any] = heard
    return result


def losses_on(
    recipe: Recipe, config: Config, records: Sequence[Record], model: Any, tokenizer: Any
) -> list[tuple[float, int]]:
    """The loss on the answer of each record that fits into ``--max-length`` tokens, in nats, and its tokens."""
    pairs = [Example(recipe.prompt(record), recipe.answer(record)) for record in records]
    kind = model.config.is_encoder_decoder, choices_of(recipe, config, model.config)
    examples = [tokenization.encode(tokenizer, pair, config.max_length, *kind) for pair in pairs]
    return answer_losses(model, tokenizer, [example for example in examples if example], config.micro_batch)


TRAINED, BASE = "trained", "base"
#: Who answers: the name of a file in ``answers/`` begins with it.


def evaluate(
    recipe: Recipe,
    config: Config,
    records: Sequence[Record],
    load: Callable[[], tuple[Any, Any]],
    work: Path,
    who: str,
    quiet: bool = True,
) -> Scores:
    """Answer all records in every way that ``config`` asks for, and score the answers.

    Args:
        recipe: whose benchmark.
        config: how to decode.
        records: what to answer.
        load: gives model and tokenizer; called only where an answer is missing.
        work: the run's folder; answers go to ``answers/`` in it.
        who: ``TRAINED`` or ``BASE``.
        quiet: without a progress bar.

    Returns:
        The figures of all decodings, those of further ones with their prefix; rows of the first.
    """
    (work / "answers").mkdir(exist_ok=True)
    all_scores = []
    for prefix, drawn in config.decodings().items():
        stem = work / "answers" / "-".join(filter(None, (who, prefix.strip("_"))))

        @cache
        def generator(drawn: tuple[float, float] | None = drawn) -> Generate:
            model, tokenizer = load()
            choices = choices_of(recipe, config, model.config)
            if choices is not None:
                return Chooser(model, tokenizer, choices)
            return Generator(model, tokenizer, config.max_new_tokens, drawn and Sampling(config.seed, *drawn))

        with tqdm(desc=f"answers, {stem.name}", unit="prompt", disable=quiet) as bar:

            def generate(prompts: Sequence[str], number: int, made: Any = generator, bar: Any = bar) -> list[str]:
                answers: list[str] = made()(prompts, number)
                bar.update(len(prompts))
                return answers

            answers = recipe.benchmark.answer(config, records, generate, stem.with_name(f"{stem.name}.jsonl"))
        all_scores.append((prefix, recipe.benchmark.score(config, records, answers, stem)))
    figures = {f"{prefix}{name}": value for prefix, scores in all_scores for name, value in scores.figures.items()}
    return Scores(figures, all_scores[0][1].rows, all_scores[0][1].note)


_base_answers: dict[tuple[str, Config], dict[str, bytes]] = {}


def evaluate_base(recipe: Recipe, config: Config, records: Sequence[Record], work: Path, quiet: bool) -> Scores:
    """The base model's scores before any training. It answers once for all methods of a command."""
    key = (recipe.name, config.base())
    (work / "answers").mkdir(exist_ok=True)
    for name, content in _base_answers.get(key, {}).items():
        (work / "answers" / name).write_bytes(content)
    scores = evaluate(recipe, config, records, cache(lambda: load_model(recipe, config)), work, BASE, quiet)
    _base_answers.clear()
    _base_answers[key] = {path.name: path.read_bytes() for path in (work / "answers").glob(f"{BASE}*.jsonl")}
    return scores


def record_scores(result: dict[str, Any], config: Config, work: Path, scores: Scores, base: Scores) -> None:
    """Put the figures into ``result`` and the answers with their verdicts into ``predictions.jsonl``."""
    result["metrics"] |= {**scores.figures, **{f"base_{name}": value for name, value in base.figures.items()}}
    result["scoring"] = config.scoring()
    result["note"] = scores.note or (f"Base model: {base.note}" if base.note else "")
    write_text(work / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in scores.rows))


def score_again(recipe: Recipe, config: Config, result: dict[str, Any], folder: Path) -> None:
    """Score the answers of a finished run, which was not scored or in part only, and write its result and report anew.

    Raises:
        ValueError: an answer is missing.
    """

    def no_model() -> Any:
        raise ValueError(f"{folder}/answers lacks an answer; delete the folder and start the run again")

    records = recipe.load(config)[1]
    scores, base = (evaluate(recipe, config, records, no_model, folder, who) for who in (TRAINED, BASE))
    record_scores(result, config, folder, scores, base)
    write_report(result, folder, recipe.benchmark.measure)
    write_json(folder / "result.json", {name: value for name, value in result.items() if name != "folder"})
