"""Fine-tune a Llama 3.1 on grade-school maths with LoRA and with LoRA-Over, and compare the final numbers.

On any machine, with the small model and the generated word problems that this repository ships::

    python recipes/llama31_gsm8k.py --method lora lora-over-mpo-r

The setting of LoRA-Over (arXiv:2605.16470): Llama 3.1 8B, 100k examples of MetaMathQA, GSM8K, one GPU::

    python recipes/llama31_gsm8k.py --preset paper --method lora lora-over-mpo-r

Your own model and data: a hub id or a folder for the model; a hub id, a folder (``train.jsonl`` and ``test.jsonl``) or a
file in GSM8K's format for the data. The end of a file that has no companion in ``--test-data`` is evaluated on::

    python recipes/llama31_gsm8k.py --model FOLDER --data FILE --lr 2e-4 --train-size 2000 --eval-size 100

``--help`` lists every option with its default, ``--preset paper --help`` with the paper's. An interrupted run goes on
with the same command and ``--resume``. Each run leaves a folder under ``runs/``.

Choices: the prompt is ``"Q: {question}\\nA: "``, the loss is on the answer and its end-of-sequence token; GSM8K's
calculator marks <<...>> are kept, as part of the text to learn; examples longer than ``max_length`` are left out rather
than cut; gradients are clipped to norm 1 (the paper does not say). The validation split is for choosing
hyper-parameters. Where the data have none, it is the end of the training problems, which are then not trained on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from embedded.word_problems import generate
from support.command_line import main
from support.config import EMBEDDED, GenerationConfig, Rates
from support.recipe import Recipe, Record
from support.records import hold_out, load_hub, local_file, read_jsonl

HUB_MODEL = "meta-llama/Llama-3.1-8B"


@dataclass(frozen=True)
class Config(GenerationConfig):
    """The shared settings; the defaults are the laptop preset."""

    def check(self) -> None:
        super().check()
        if self.model == HUB_MODEL:
            import torch

            if not torch.cuda.is_available():
                raise ValueError(f"{self.model} needs a GPU and there is none; use --preset laptop, or a small --model")


PRESETS = {
    "laptop": Config(),
    "paper": Config(
        preset="paper",
        model=HUB_MODEL,
        data="meta-math/MetaMathQA",
        test_data="openai/gsm8k",
        train_size=100_000,
        eval_size=1319,
        batch=64,
        micro_batch=8,
        top_n=30,
        split=8,
        every=50,
        dtype="bfloat16",
        activation_checkpointing=True,
        max_new_tokens=512,
        eval_batch=64,
        temperature=0.8,
        top_p=0.95,
        save_every=200,
    ),
}

# laptop: chosen on the validation split by
#   python recipes/ablate.py tune --methods lora lora-over-svd lora-over-mpo lora-over-mpo-r \
#       --lrs 1.25e-3 2.5e-3 5e-3 1e-2 2e-2 4e-2 --core-ratios 1 0.5 --eval-split validation --workers 2
# paper: the paper's table. It gives none for LoRA, a baseline that it takes from GoRA (arXiv:2502.12171): 5e-5 there.
LEARNING_RATES: dict[str, Rates] = {
    "laptop": {
        "lora": (2e-2, None),
        "lora-over-svd": (2e-2, None),
        "lora-over-mpo": (1e-2, None),
        "lora-over-mpo-r": (1e-2, None),
    },
    "paper": {
        "lora": (5e-5, None),
        "lora-over-svd": (1.7e-4, None),
        "lora-over-mpo": (1.7e-4, None),
        "lora-over-mpo-p": (2e-4, 1.7e-4),
        "lora-over-mpo-r": (2e-4, 1.7e-4),
    },
}

#: GSM8K accuracy in % that the paper prints for Llama 3.1 8B.
PAPER = {
    "Full fine-tuning": "73.69",
    "LoRA": "67.78",
    "LoRA, equal parameters": "72.24",
    "PiSSA": "68.56",
    "rsLoRA": "68.36",
    "OLoRA": "68.54",
    "LoRA+": "71.29",
    "LoRA-GA": "71.39",
    "AdaLoRA": "70.63",
    "DoRA": "69.17",
    "LoRA-Over-SVD": "68.92",
    "LoRA-Over-MPO": "72.14",
    "LoRA-Over-MPO_P": "72.73",
    "LoRA-Over-MPO_R": "73.95",
}

# -- data -------------------------------------------------------------------------------------------------------------


def load_problems(config: Config) -> tuple[list[Record], list[Record]]:
    """The problems to train on (more than needed, as long ones are left out) and those to evaluate on.

    Raises:
        ValueError: there are none of either.
    """
    option, place = ("test-data", config.test_data) if config.test_data else ("data", config.data)
    train = read_split(config.data, "train", config.train_size)
    own_file = config.test_data is None and Path(config.data).expanduser().is_file()
    evaluation = [] if own_file else read_split(place, config.eval_split, config.eval_size, option)[: config.eval_size]
    if not evaluation and (own_file or config.eval_split == "validation"):
        lender = train if place == config.data else read_split(place, "train", None, option)
        _, evaluation = hold_out(lender, config.eval_size, identity)
        held_out = {identity(problem) for problem in evaluation}
        train = [problem for problem in train if identity(problem) not in held_out]
    if not evaluation:
        raise ValueError(f"{place} has no problems in its {config.eval_split} split; choose another --test-data")
    if not train:
        raise ValueError(f"{config.data} has no problem left to train on; lower --eval-size ({config.eval_size})")
    return train, evaluation


def identity(problem: Record) -> str:
    """The question that a problem is, or was made from."""
    return problem.get("source", problem["question"])


def read_split(place: str, split: str, size: int | None, option: str = "data") -> list[Record]:
    """A split of the embedded problems, a folder, a file or a hub data set; empty where it has no such split."""
    if place == EMBEDDED:
        return list(generate("composed", split, size or PRESETS["laptop"].train_size))
    if file := local_file(place, split):
        return read_jsonl(file, ("question", "answer"), problem_with)
    if Path(place).expanduser().is_dir():
        if split == "validation":
            return []
        raise ValueError(f"{place}/{split}.jsonl does not exist; a data folder holds train.jsonl and test.jsonl")
    if "MetaMathQA" in place:
        rows = load_hub(option, place, split="train") if split == "train" else []
        return [problem for problem in map(from_metamath, rows) if problem]
    rows = load_hub(option, place, "main").get(split, [])
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def problem_with(problem: Record) -> str:
    """What is wrong with a problem of a file."""
    return "" if final_number(problem["answer"]) is not None else "the answer does not end in '#### number'"


def from_metamath(row: dict[str, str]) -> Record | None:
    """A MetaMathQA row as LoRA-GA trains on it: made from GSM8K, and cut before the words "The answer is"."""
    answer = row["response"].split("\nThe answer is:")[0].strip()
    if "GSM" not in row["type"] or final_number(answer) is None:
        return None
    return {"question": row["query"], "answer": answer, "source": row["original_question"]}


def prompt(problem: Record) -> str:
    """What the model reads before it answers."""
    return f"Q: {problem['question']}\nA: "


# -- grading ----------------------------------------------------------------------------------------------------------

_FINAL = re.compile(
    r"####\s*(?P<sign>[-−–]?)\s*\$?\s*(?P<sign_inside>[-−–]?)(?P<whole>\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?P<rest>\.\d+)?"
    r"(?!\d|[.,/]\d)"
)


def final_number(text: str) -> Decimal | None:
    """The last ``#### number`` of a text: "#### 1,234", "#### -5", "#### $3.50"; None if there is none."""
    found = [*_FINAL.finditer(text)]
    if not found:
        return None
    sign = "-" if found[-1]["sign"] or found[-1]["sign_inside"] else ""
    return Decimal(f"{sign}{found[-1]['whole'].replace(',', '')}{found[-1]['rest'] or ''}")


def grade(problem: Record, output: str) -> tuple[bool, bool]:
    """Whether there is a final number, and whether it is exactly the problem's."""
    number = final_number(output)
    return number is not None, number == final_number(problem["answer"])


RECIPE = Recipe(
    path=Path(__file__).resolve(),
    description=(__doc__ or "").partition("\n")[0],
    config=Config,
    presets=PRESETS,
    rates=LEARNING_RATES,
    load=load_problems,
    prompt=prompt,
    answer=lambda problem: problem["answer"],
    grade=grade,
    measure="Exact match of the final number",
    paper=lambda config: {} if config.preset == "laptop" else PAPER,
)


if __name__ == "__main__":
    main(RECIPE)
