"""Fine-tune a Llama 3.1 on code with LoRA and with LoRA-Over, and compare how many HumanEval problems they solve.

On any machine, with the small model and the generated programs that this repository ships::

    python recipes/llama31_humaneval.py --method lora lora-over-mpo-r --lr 1e-2 --execute

The small model is too small to learn this in a few minutes: it shows that everything runs. With ``--method lora --lr
1e-2`` the loss falls from 10.0 to 4.9 nats a token in the 100 steps of the preset, and none of the 164 problems is
solved. So no rate was tuned, and ``--lr`` is asked for. The setting of LoRA-Over (arXiv:2605.16470): Llama 3.1 8B,
100k examples of CodeFeedback, HumanEval, one GPU; ``--preset paper-llama2`` is the one for Llama 2 7B::

    python recipes/llama31_humaneval.py --preset paper --method lora lora-over-mpo-r --execute

Without ``--execute`` no code is executed: the answers are kept, and the same command with ``--resume --execute`` scores them
later. Programs run under bubblewrap, without network, files or further processes; where there is none, nothing is run.

Your own data: a folder with ``train.jsonl``, or a file, of rows with ``query`` and ``answer`` for ``--data``; HumanEval's problem
file, ``.jsonl`` or ``.jsonl.gz``, for ``--test-data``::

    python recipes/llama31_humaneval.py --model FOLDER --data FILE --test-data HumanEval.jsonl.gz --lr 2e-4 --execute

Choices: prompts are LoRA-GA's (see ``support/evaluation/prompts.py``); pass@1 is the share of problems whose one answer passes.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from embedded import programs
from support import llama
from support.benchmark import Scores
from support.command_line import main
from support.config import EMBEDDED, Rates, option
from support.evaluation import humaneval, prompts
from support.evaluation.answers import collect_answers
from support.evaluation.sandbox import Sandbox
from support.llama import LLAMA_2, LLAMA_31, LlamaConfig
from support.recipe import Recipe, Record
from support.records import evaluation_file, load_hub, training_examples

if TYPE_CHECKING:
    from support.evaluation.answers import Generate


@dataclass(frozen=True)
class Config(LlamaConfig):
    """The settings of the recipes for a Llama, and whether code is executed; the defaults are the laptop preset."""

    eval_size: int = option(164, "problems to evaluate on")
    max_new_tokens: int = option(150, "longest answer in tokens")
    execute: bool = option(False, "execute the programs that the model wrote, in a sandbox, to score them")

    SCORING: ClassVar[tuple[str, ...]] = ("execute",)


PAPER = {
    "data": "m-a-p/CodeFeedback-Filtered-Instruction",
    "test_data": "openai/openai_humaneval",
    "train_size": 100_000,
    "eval_size": 164,
    "max_new_tokens": 512,
    "greedy_beside": True,
}

PRESETS = {
    "laptop": Config(),
    LLAMA_31: Config(**llama.settings(LLAMA_31, **PAPER, order=8, top_n=28, split=4)),
    LLAMA_2: Config(**llama.settings(LLAMA_2, **PAPER, split=8)),
}

# paper and paper-llama2: the paper's table, and GoRA's rate of plain LoRA, which the paper does not print.
LEARNING_RATES: dict[str, Rates] = {
    LLAMA_31: llama.rates(7e-5, 1e-4, lora=5e-5),
    LLAMA_2: llama.rates(1.1e-4, 1.2e-4),
}

# -- data -------------------------------------------------------------------------------------------------------------


def load_problems(config: Config) -> tuple[list[Record], list[Record]]:
    """The examples to train on (more than needed, as long ones are left out) and the problems to evaluate on.

    Raises:
        ValueError: there are none of either.
    """
    columns, otherwise = {"query": str, "answer": str}, "no answer has a code block to learn"
    examples = training_examples(config, programs.examples, columns, prompts.codefeedback, otherwise)
    return examples, read_problems(config)[: config.eval_size]


def read_problems(config: Config) -> list[Record]:
    """The problems of the configuration's split."""
    place = config.test_data or config.data
    if place == EMBEDDED:
        return [*programs.problems(config.eval_split, config.eval_size)]
    if file := evaluation_file(config, config.eval_split, "problems", "HumanEval's problem file"):
        return humaneval.read_problems(file)
    return [dict(row) for row in load_hub("test-data", place, split="test")]


# -- examination ------------------------------------------------------------------------------------------------------


class HumanEval:
    """One program for each problem; pass@1 where code may be executed."""

    measure = "HumanEval, pass@1"
    answered = False

    def check(self, config: Config) -> None:
        if config.execute:
            Sandbox()

    def scores(self, config: Config) -> bool:
        return config.execute

    def answer(self, config: Config, records: Sequence[Record], generate: Generate, file: Path) -> list[Record]:
        questions: list[tuple[Record, str]] = [
            ({"task_id": problem["task_id"], "sample": 0}, prompts.humaneval_prompt(problem)) for problem in records
        ]
        return collect_answers(file, questions, generate, config.eval_batch)

    def score(self, config: Config, records: Sequence[Record], answers: Sequence[Record], stem: Path) -> Scores:
        sources = [
            humaneval.program_of(problem, answer["answer"]) for problem, answer in zip(records, answers, strict=True)
        ]
        entries = [problem["entry_point"] for problem in records]
        figures: dict[str, float | None] = {
            "format_rate": sum(map(is_written, sources, entries)) / len(sources),
            "accuracy": None,
        }
        rows = [
            {"task_id": problem["task_id"], "output": answer["answer"], "program": source}
            for problem, answer, source in zip(records, answers, sources, strict=True)
        ]
        if not config.execute:
            return Scores(figures, rows, "No code was executed, so nothing is scored: add --resume --execute for that.")
        verdicts = stem.with_name(f"{stem.name}-verdicts.jsonl")
        workers = len(os.sched_getaffinity(0))
        scores = humaneval.score(records, answers, verdicts, execute=True, workers=workers)
        rows = [
            {**row, "correct": verdict["passed"], "reason": verdict["reason"]}
            for row, verdict in zip(rows, scores.verdicts, strict=True)
        ]
        return Scores(figures | {"accuracy": scores.pass_at(1)}, rows)


def is_written(source: str, entry_point: str) -> bool:
    """Whether a program is valid Python, and its function does more than to have a docstring, as that of the prompt does."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == entry_point]
    return bool(functions) and any(not isinstance(each, ast.Expr) for each in functions[-1].body)


RECIPE = Recipe(
    path=Path(__file__).resolve(),
    description=(__doc__ or "").partition("\n")[0],
    config=Config,
    presets=PRESETS,
    rates=LEARNING_RATES,
    load=load_problems,
    prompt=lambda example: example["prompt"],
    answer=lambda example: example["answer"],
    benchmark=HumanEval(),
    paper=partial(llama.printed, "humaneval"),
)


if __name__ == "__main__":
    main(RECIPE)
