"""Fine-tune a Llama 3.1 on instructions with LoRA and with LoRA-Over, and compare a judge's grades of MT-Bench.

On any machine, with the small model and the generated instructions that this repository ships::

    python recipes/llama31_mtbench.py --method lora lora-over-mpo-r --lr 1e-2

The small model is too small to learn this in a few minutes: it shows that everything runs. With ``--method lora --lr 1e-2`` the loss falls
from 9.7 to 3.1 nats a token in the 100 steps of the preset. What it then writes has the form of an answer, a list of words or a number, and
none of the 80 first turns is right. So no rate was tuned, and ``--lr`` is asked for. The setting of LoRA-Over (arXiv:2605.16470): Llama 3.1 8B,
52k examples of WizardLM, MT-Bench, one GPU; ``--preset paper-llama2`` is the one for Llama 2 7B::

    python recipes/llama31_mtbench.py --preset paper --method lora lora-over-mpo-r --judge gpt-4

The judge is any model behind an OpenAI-compatible endpoint, ``--judge-url``; its key is read from the environment variable
``--judge-key``. Without ``--judge`` the answers are kept, and the same command with ``--resume --judge MODEL`` has them graded
later. Grades that are there already are not asked for again.

Your own data: a folder with ``train.jsonl``, or a file, of rows with ``instruction`` and ``output`` for ``--data``; MT-Bench's
``question.jsonl``, with ``reference_answer*.jsonl`` beside it, for ``--test-data``::

    python recipes/llama31_mtbench.py --model FOLDER --data FILE --test-data question.jsonl --lr 2e-4 --judge gpt-4

Choices: prompts are LoRA-GA's (see ``support/evaluation/prompts.py``); the judge's are MT-Bench's own. The main figure is the mean
grade of the first turn, as in the paper; that of both turns stands beside it. The generated questions have one right answer
each, so for them the share of first turns that give it, word for word, is reported with and without a judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from embedded import instructions
from support import llama
from support.benchmark import Scores
from support.command_line import main
from support.config import EMBEDDED, Rates, option
from support.evaluation import mtbench, prompts
from support.evaluation.judge import Judge
from support.llama import LLAMA_2, LLAMA_31, LlamaConfig
from support.recipe import Recipe, Record
from support.records import evaluation_file, load_hub, training_examples

if TYPE_CHECKING:
    from support.evaluation.answers import Generate


@dataclass(frozen=True)
class Config(LlamaConfig):
    """The settings of the recipes for a Llama, and the judge; the defaults are the laptop preset."""

    eval_size: int = option(80, "questions to evaluate on")
    max_new_tokens: int = option(40, "longest answer in tokens")
    judge: str | None = option(None, "model that grades the answers; None: they are kept ungraded")
    judge_url: str | None = option(None, "the judge's address, OpenAI-compatible; None: OpenAI's own")
    judge_key: str = option("OPENAI_API_KEY", "environment variable with the key for that address")
    judge_requests: int = option(4, "requests to the judge at once")

    SCORING: ClassVar[tuple[str, ...]] = ("judge", "judge_url", "judge_key", "judge_requests")


PAPER = {
    "data": "silk-road/Wizard-LM-Chinese-instruct-evol",
    "test_data": "lighteval/mt-bench",
    "train_size": 52_000,
    "eval_size": 80,
    "max_new_tokens": 1024,
}

PRESETS = {
    "laptop": Config(),
    LLAMA_31: Config(**llama.settings(LLAMA_31, **PAPER, split=6)),
    LLAMA_2: Config(**llama.settings(LLAMA_2, **PAPER, split=6)),
}

# paper and paper-llama2: the paper's table, and GoRA's rate of plain LoRA, which the paper does not print.
LEARNING_RATES: dict[str, Rates] = {
    LLAMA_31: llama.rates(1.7e-4, 2e-4, lora=5e-5),
    LLAMA_2: llama.rates(9.3e-5, 1e-4),
}

# -- data -------------------------------------------------------------------------------------------------------------


def load_questions(config: Config) -> tuple[list[Record], list[Record]]:
    """The examples to train on (more than needed, as long ones are left out) and the questions to evaluate on.

    Raises:
        ValueError: there are none of either.
    """
    columns, otherwise = {"instruction": str, "output": str}, "every answer is a refusal"
    examples = training_examples(config, instructions.examples, columns, prompts.wizardlm, otherwise)
    return examples, read_questions(config)[: config.eval_size]


def read_questions(config: Config) -> list[Record]:
    """The questions of the configuration's split, those with a reference answer with ``reference``."""
    place = config.test_data or config.data
    if place == EMBEDDED:
        return instructions.questions(config.eval_split, config.eval_size)
    name = "question" if config.eval_split == "test" else config.eval_split
    if file := evaluation_file(config, name, "questions", "MT-Bench's question.jsonl"):
        references: dict[int, list[str]] = {}
        for path in sorted(file.parent.glob("reference_answer*.jsonl")):
            references |= mtbench.read_references(path)
        return [
            {**question, "reference": references.get(question["question_id"])}
            for question in mtbench.read_questions(file)
        ]
    columns = ("question_id", "category", "turns", "reference")
    return [{name: row[name] for name in columns} for row in load_hub("test-data", place, split="train")]


# -- examination ------------------------------------------------------------------------------------------------------


class MTBench:
    """Answers to both turns of every question, and a judge's grades of them."""

    measure = "MT-Bench"
    answered = False

    def check(self, config: Config) -> None:
        if config.judge:
            judge_of(config)

    def scores(self, config: Config) -> bool:
        return config.judge is not None

    def answer(self, config: Config, records: Sequence[Record], generate: Generate, file: Path) -> list[Record]:
        answers = mtbench.answer_questions(file, records, generate, prompts.mt_bench_prompt, config.eval_batch)
        return [{"question_id": number, "turns": turns} for number, turns in answers.items()]

    def score(self, config: Config, records: Sequence[Record], answers: Sequence[Record], stem: Path) -> Scores:
        turns = {answer["question_id"]: answer["turns"] for answer in answers}
        rows = [{**question, "output": turns[question["question_id"]]} for question in records]
        written = [bool(text.strip()) for row in rows for text in row["output"]]
        figures: dict[str, Any] = {"format_rate": sum(written) / len(written), "accuracy": None}
        if all(question.get("exact") for question in records):
            right = [row["output"][0].strip() == row["reference"][0] for row in rows]
            figures["accuracy"] = sum(right) / len(right)
        if not config.judge:
            note = "No judge was asked, so there is no grade: add --resume --judge MODEL for that."
            return Scores({**figures, "grade": None}, rows, note)
        references = {row["question_id"]: row["reference"] for row in rows if row.get("reference")}
        file = stem.with_name(f"{stem.name}-judgments.jsonl")
        graded = mtbench.judge_answers(
            file, records, turns, references, judge_of(config), workers=config.judge_requests
        )
        figures |= {"grade": graded.mean(turn=1), "grade_both_turns": graded.mean(), "judge": config.judge}
        note = f"Not all is graded: {graded}. Add --resume to ask again." if graded.unscored else ""
        return Scores(figures | {"ungraded": len(graded.unscored)}, rows, note)


def judge_of(config: Config) -> Judge:
    """The judge that the options name."""
    assert config.judge is not None
    return Judge(config.judge, config.judge_url, key_variable=config.judge_key)


RECIPE = Recipe(
    path=Path(__file__).resolve(),
    description=(__doc__ or "").partition("\n")[0],
    config=Config,
    presets=PRESETS,
    rates=LEARNING_RATES,
    load=load_questions,
    prompt=lambda example: example["prompt"],
    answer=lambda example: example["answer"],
    benchmark=MTBench(),
    paper=partial(llama.printed, "mtbench"),
)


if __name__ == "__main__":
    main(RECIPE)
