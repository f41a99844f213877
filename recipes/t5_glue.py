"""Fine-tune a T5 on tasks of GLUE with LoRA, LoRA-Over and its competitors, and compare accuracies.

On any machine, with the small T5 and the generated sentences that this repository ships::

    python recipes/t5_glue.py --method lora lora-over-mpo-p

Its rates were tuned on sst2, which 100 steps are enough to learn; cola and mrpc need more of them. The setting of LoRA-Over (arXiv:2605.16470): T5-Base, the
whole of each task, all linear layers::

    python recipes/t5_glue.py --preset paper --task mnli sst2 cola qnli mrpc --method lora lora-over-mpo-r

Your own model and data: a hub id or a folder for the model, which is an encoder-decoder, a decoder, or an encoder such as BERT,
which gets a new head and chooses the label instead of writing it; a hub id with GLUE's configurations, or a folder with
``train`` and ``dev`` as ``.tsv`` (GLUE's, with a header) or ``.jsonl`` for the data::

    python recipes/t5_glue.py --task sst2 --model FOLDER --data FOLDER --lr 3e-4 --targets all-linear

Choices: prompts and labels are T5's own (see ``support/glue.py``); the loss is on the label's words and the end-of-sequence
token; an answer is right if it is the label, word for word, as GoRA scores it. GLUE's test labels are not public, so the
``test`` split here is GLUE's development set, which the paper reports, and ``validation``, for choosing hyper-parameters, is
the end of the training records, which are then not trained on. CoLA is scored by accuracy, as in the paper.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from embedded.sentences import generate
from support.benchmark import ExactMatch
from support.command_line import main
from support.config import EMBEDDED, Rates, option
from support.config import Config as SharedConfig
from support.elsewhere import tuned_lora
from support.evaluation.records import read_records
from support.glue import TASKS
from support.recipe import Recipe, Record
from support.records import hold_out, load_hub, local_file
from support.tuned import tried_rates, tuned_rates


@dataclass(frozen=True)
class Published:
    """What the paper has for one task: its records, and MPO_R's rounds (split number, eval step)."""

    train: int
    evaluated: int
    split: int
    every: int


PUBLISHED = {
    "mnli": Published(392_702, 9_815, split=5, every=100),
    "sst2": Published(67_349, 872, split=7, every=50),
    "cola": Published(8_551, 1_043, split=8, every=5),
    "qnli": Published(104_743, 5_463, split=7, every=80),
    "mrpc": Published(3_668, 408, split=8, every=5),
}


@dataclass(frozen=True)
class Config(SharedConfig):
    """The shared settings for an encoder-decoder and one task; the defaults are the laptop preset."""

    # None stands for what the paper has for the task; ``completed`` fills it in
    task: str = option("sst2", "task of GLUE", tuple(TASKS))
    train_size: int | None = option(3200, "training records; None: all of the task")  # type: ignore[assignment]
    eval_size: int | None = option(500, "records to evaluate on; None: all of the task")  # type: ignore[assignment]
    max_length: int = option(128, "longest prompt in tokens; longer ones are left out, not cut")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    targets: str = option("all-linear", "names of linear layers that get adapters, with commas, or all-linear")
    order: int = option(16, "order of the factorization: cores of an MPO")
    top_n: int = option(1, "matrices to expand in each group")
    split: int | None = option(1, "rounds in which MPO_R expands them; None: the paper's for the task")  # type: ignore[assignment]
    every: int | None = option(10, "steps between two rounds of MPO_R; None: the paper's for the task")  # type: ignore[assignment]
    max_new_tokens: int = option(8, "longest answer in tokens")

    DECIDE_BASE: ClassVar[tuple[str, ...]] = (*SharedConfig.DECIDE_BASE, "task")

    def completed(self) -> Self:
        known = PUBLISHED[self.task]
        return dataclasses.replace(
            self,
            train_size=known.train if self.train_size is None else self.train_size,
            eval_size=known.evaluated if self.eval_size is None else self.eval_size,
            split=known.split if self.split is None else self.split,
            every=known.every if self.every is None else self.every,
        )


PRESETS = {
    "laptop": Config(),
    "paper": Config(
        preset="paper",
        model="google-t5/t5-base",
        data="nyu-mll/glue",
        train_size=None,
        eval_size=None,
        top_n=9,
        split=None,
        every=None,
        max_new_tokens=16,
        eval_batch=256,
        save_every=500,
    ),
}

#: The table of rates that were tuned for the laptop preset.
TUNED = "t5_glue-laptop-sst2"
# laptop: tuned on sst2; results/tuning has the table and its commands.
# paper: the paper's table. It gives none for LoRA, a baseline that it takes from GoRA (arXiv:2502.12171): 1e-4 there.
LEARNING_RATES: dict[str, Rates] = {
    "laptop": tuned_rates(TUNED),
    "paper": {
        "lora": (1e-4, None),
        "lora-over-svd": (4.9e-4, None),
        "lora-over-mpo": (4.9e-4, None),
        "lora-over-mpo-p": (5e-4, 4.9e-4),
        "lora-over-mpo-r": (5e-4, 4.9e-4),
    },
}

#: Accuracy in % that the paper prints, by method and in the order of ``PAPER_TASKS``.
PAPER_TASKS = ("mnli", "sst2", "cola", "qnli", "mrpc")
PAPER = {
    "Full fine-tuning": ("86.33", "94.75", "80.70", "93.19", "84.56"),
    "LoRA": ("85.30", "94.04", "69.35", "92.96", "68.38"),
    "PiSSA": ("85.75", "94.07", "74.27", "93.15", "76.31"),
    "rsLoRA": ("85.73", "94.19", "72.32", "93.12", "52.86"),
    "LoRA+": ("85.81", "93.85", "77.53", "93.14", "74.43"),
    "LoRA-GA": ("85.70", "94.11", "80.57", "93.18", "85.29"),
    "DoRA": ("85.67", "94.04", "72.04", "93.04", "68.08"),
    "AdaLoRA": ("85.45", "93.69", "69.16", "91.66", "68.14"),
    "LoRA-Over-SVD": ("85.33 ± 0.06", "94.13 ± 0.29", "74.52 ± 0.39", "93.05 ± 0.11", "75.76 ± 0.23"),
    "LoRA-Over-MPO": ("85.42 ± 0.09", "94.35 ± 0.32", "80.79 ± 0.39", "93.14 ± 0.39", "82.84 ± 0.53"),
    "LoRA-Over-MPO_P": ("85.59 ± 0.08", "94.41 ± 0.14", "81.02 ± 0.16", "93.19 ± 0.05", "84.07 ± 0.69"),
    "LoRA-Over-MPO_R": ("85.79 ± 0.12", "94.50 ± 0.58", "81.21 ± 0.41", "93.26 ± 0.08", "85.38 ± 1.22"),
}


def paper_figures(config: Config) -> dict[str, str]:
    """The paper's accuracies for the configuration's task; none for the laptop preset."""
    if config.preset != "paper":
        return {}
    return {label: figures[PAPER_TASKS.index(config.task)] for label, figures in PAPER.items()}


# -- data -------------------------------------------------------------------------------------------------------------


def load_records(config: Config) -> tuple[list[Record], list[Record]]:
    """The records to train on and those to evaluate on, each with its task.

    Raises:
        ValueError: there are none of either.
    """
    sizes = config.completed()
    assert sizes.train_size is not None
    assert sizes.eval_size is not None
    train = read_split(config, "train", sizes.train_size)
    if config.eval_split == "test":
        evaluation = read_split(config, "test", sizes.eval_size)
    elif config.data == EMBEDDED:
        evaluation = read_split(config, "validation", sizes.eval_size)
    else:
        train, evaluation = hold_out(train, sizes.eval_size, TASKS[config.task].prompt)
    if not evaluation or not train:
        missing = "evaluate on" if not evaluation else "train on"
        raise ValueError(f"{config.data} has no record to {missing}; give other --data, or lower --eval-size")
    return train, evaluation[: sizes.eval_size]


def read_split(config: Config, split: str, size: int) -> list[Record]:
    """The records of a split; ``test`` is GLUE's development set."""
    task = TASKS[config.task]
    if config.data == EMBEDDED:
        return [{**record, "task": task.name} for record in generate("composed", task.name, split, size)]
    names = ("dev", "validation", "test") if split == "test" else (split,)
    path = Path(config.data).expanduser()
    if path.exists():
        for file in (local_file(config.data, name, suffix) for name in names for suffix in (".tsv", ".jsonl")):
            if file is not None:
                return [{**record, "task": task.name} for record in read_file(file, config)]
        raise ValueError(f"{config.data} has none of the files {', '.join(f'{n}.tsv, {n}.jsonl' for n in names)}")
    rows = load_hub("data", config.data, task.name, split=task.validation if split == "test" else split)
    return [{**{c: row[c] for c in task.columns}, "label": row["label"], "task": task.name} for row in rows]


def read_file(path: Path, config: Config) -> list[Record]:
    """Records of a file, whose labels are numbers.

    Raises:
        ValueError: names the line or the column that is missing or no label.
    """
    task = TASKS[config.task]
    columns = (*task.columns, "label")
    numbers = [str(number) for number in range(len(task.labels))]

    def problem(record: Record) -> str:
        label = record["label"]
        return "" if str(label) in numbers else f"label is {label!r}; {task.name} has {', '.join(numbers)}"

    if path.suffix != ".tsv":
        # a label is a number or its text
        found = read_records(path, {**dict.fromkeys(task.columns, str), "label": object}, problem)
        return [{column: str(record[column]) for column in columns} for record in found]
    raw = path.read_bytes()
    try:
        lines = io.StringIO(raw.decode("utf-8"), newline="")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number}: not UTF-8; convert the file to UTF-8") from error
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    records = []
    try:
        missing = [column for column in columns if column not in (rows.fieldnames or ())]
        if missing:
            has = ", ".join(rows.fieldnames or ()) or "nothing"
            raise ValueError(f"{path} has no column {', '.join(missing)} for {task.name}; its header has {has}")
        for row in rows:
            record = {column: row[column] for column in columns}
            if wrong := "columns are missing" if None in record.values() else problem(record):
                raise ValueError(f"{path}, line {rows.line_num}: {wrong}")
            records.append(record)
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from error
    return records


def grade(record: Record, output: str) -> tuple[bool, bool]:
    """Whether an answer is one of the task's labels, and whether it is the record's."""
    task, said = TASKS[record["task"]], output.strip()
    return said in task.labels, said == task.answer(record)


def prompt(record: Record) -> str:
    """What the model reads, in training and evaluation."""
    return TASKS[record["task"]].prompt(record)


RECIPE = Recipe(
    path=Path(__file__).resolve(),
    description=(__doc__ or "").partition("\n")[0],
    config=Config,
    presets=PRESETS,
    rates=LEARNING_RATES,
    load=load_records,
    prompt=prompt,
    answer=lambda record: TASKS[record["task"]].answer(record),
    benchmark=ExactMatch("Accuracy", prompt, grade),
    choices=lambda config: TASKS[config.task].labels,
    embedded="t5",
    several=("task", "method"),
    paper=paper_figures,
    elsewhere=lambda config: tuned_lora(config.task, config),
    grids={"laptop": tried_rates(TUNED)},
)


if __name__ == "__main__":
    main(RECIPE)
