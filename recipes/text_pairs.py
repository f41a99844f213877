"""Fine-tune any model on prompts and answers of your own, with LoRA, LoRA-Over and its competitors.

The data are a folder with ``train.jsonl`` and ``test.jsonl`` (``validation.jsonl``, where there is one, is for choosing
hyper-parameters), or one file. Each line is an object with ``prompt`` and ``answer``::

    python recipes/text_pairs.py --model FOLDER --data FOLDER --lr 2e-4 --method lora lora-over-mpo-r

Without ``--data``, the embedded Llama trains on generated word problems. To find the method and its rate, see ``compare.py``.

Choices: the loss is on the answer and its end-of-sequence token; an answer is right if it is the record's, word for word. A file,
and a folder without ``validation.jsonl``, lend the end of their training records for choosing hyper-parameters; these are then not
trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from embedded.word_problems import generate
from support.benchmark import ExactMatch
from support.command_line import main
from support.config import EMBEDDED, GenerationConfig, option
from support.evaluation import prompts
from support.evaluation.records import read_records
from support.recipe import Recipe, Record
from support.records import hold_out, local_file

COLUMNS: dict[str, type] = {"prompt": str, "answer": str}


@dataclass(frozen=True)
class Config(GenerationConfig):
    """Those of every recipe that generates, and data from a local place; the defaults are the laptop preset."""

    data: str = option(EMBEDDED, "what to train on: embedded, or a local folder or file of prompts and answers")


PRESETS = {"laptop": Config()}


def load_pairs(config: Config) -> tuple[list[Record], list[Record]]:
    """The records to train on (more than needed, as long ones are left out) and those to evaluate on.

    Raises:
        ValueError: there are none of either, or a line is no such object.
    """
    train = read_split(config.data, "train", config.train_size)
    alone = config.test_data is None and Path(config.data).expanduser().is_file()
    evaluation = [] if alone else read_split(config.test_data or config.data, config.eval_split, config.eval_size)
    if not evaluation and (alone or config.eval_split == "validation"):
        train, evaluation = hold_out(train, config.eval_size, lambda record: str(record["prompt"]))
    if not train or not evaluation:
        missing = "train" if not train else "evaluate"
        raise ValueError(f"{config.data} has no record to {missing} on; give other --data, or lower --eval-size")
    return train, evaluation[: config.eval_size]


def read_split(place: str, split: str, size: int) -> list[Record]:
    """The records of a split; empty where a folder has no such file."""
    if place == EMBEDDED:
        problems = generate("composed", split, size)
        return [{"prompt": prompts.gsm8k_prompt(each["question"]), "answer": each["answer"]} for each in problems]
    file = local_file(place, split)
    if file is None and not Path(place).expanduser().is_dir():
        raise ValueError(
            f"--data is {place}: give a folder with train.jsonl and test.jsonl, or a file; hub ids are not read here"
        )
    return read_records(file, COLUMNS) if file else []


def grade(record: Record, output: str) -> tuple[bool, bool]:
    """Whether there is an answer, and whether it is the record's."""
    return bool(output.strip()), output.strip() == record["answer"].strip()


RECIPE = Recipe(
    path=Path(__file__).resolve(),
    description=(__doc__ or "").partition("\n")[0],
    config=Config,
    presets=PRESETS,
    rates={},
    load=load_pairs,
    prompt=lambda record: record["prompt"],
    answer=lambda record: record["answer"],
    benchmark=ExactMatch("Exact match of the answer", lambda record: record["prompt"], grade),
)


if __name__ == "__main__":
    main(RECIPE)
