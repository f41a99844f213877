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

``--preset paper-llama2`` is the paper's setting for Llama 2 7B.

Choices: prompts are LoRA-GA's (see ``support/evaluation/prompts.py``), the loss is on the answer and its end-of-sequence
token; GSM8K's calculator marks <<...>> are kept, as part of the text to learn; examples longer than ``max_length`` are left
out rather than cut; gradients are clipped to norm 1 (the paper does not say). The final number of an answer is the first one
behind a ``####``, as GSM8K's authors read it. The paper's presets sample, as the paper does, and answer greedily beside it.
The validation split is for choosing hyper-parameters. Where the data have none, it is the end of the training problems,
which are then not trained on.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from embedded.word_problems import generate
from support import llama
from support.benchmark import ExactMatch
from support.command_line import main
from support.config import EMBEDDED, Rates
from support.elsewhere import tuned_lora
from support.evaluation import prompts
from support.evaluation.gsm8k import marked_number, read_problems, reference_number
from support.llama import LLAMA_2, LLAMA_31
from support.llama import LlamaConfig as Config
from support.recipe import Recipe, Record
from support.records import hold_out, load_hub, local_file
from support.tuned import tried_rates, tuned_rates

PAPER = {
    "data": "meta-math/MetaMathQA",
    "test_data": "openai/gsm8k",
    "train_size": 100_000,
    "eval_size": 1319,
    "max_new_tokens": 512,
    "greedy_beside": True,
}

PRESETS = {
    "laptop": Config(train_size=1600, batch=16, micro_batch=16),
    LLAMA_31: Config(**llama.settings(LLAMA_31, **PAPER, split=8)),
    LLAMA_2: Config(**llama.settings(LLAMA_2, **PAPER, split=8)),
}

#: The table of rates that were tuned for the laptop preset.
TUNED = "llama31_gsm8k-laptop"
# laptop: chosen on the validation split; results/tuning has the table and its commands.
# paper and paper-llama2: the paper's table, and GoRA's rate of plain LoRA, which the paper does not print.
LEARNING_RATES: dict[str, Rates] = {
    "laptop": tuned_rates(TUNED),
    LLAMA_31: llama.rates(1.7e-4, 2e-4, lora=5e-5),
    LLAMA_2: llama.rates(9.3e-5, 1e-4),
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
    return str(problem.get("source", problem["question"]))


def read_split(place: str, split: str, size: int | None, option: str = "data") -> list[Record]:
    """A split of the embedded problems, a folder, a file or a hub data set; empty where it has no such split."""
    if place == EMBEDDED:
        return list(generate("composed", split, size or PRESETS["laptop"].train_size))
    if file := local_file(place, split):
        return read_problems(file)
    if Path(place).expanduser().is_dir():
        if split == "validation":
            return []
        raise ValueError(f"{place}/{split}.jsonl does not exist; a data folder holds train.jsonl and test.jsonl")
    if "MetaMathQA" in place:
        rows = load_hub(option, place, split="train") if split == "train" else []
        return [problem for problem in map(from_metamath, rows) if problem]
    rows = load_hub(option, place, "main").get(split, [])
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def from_metamath(row: dict[str, str]) -> Record | None:
    """A MetaMathQA row as LoRA-GA trains on it; None if it was not made from GSM8K or its answer marks no number."""
    example = prompts.metamath(row)
    if example is None or marked_number(example.answer) is None:
        return None
    return {"question": row["query"], "answer": example.answer, "source": row["original_question"]}


def prompt(problem: Record) -> str:
    """What the model reads before it answers."""
    return prompts.gsm8k_prompt(problem["question"])


def grade(problem: Record, output: str) -> tuple[bool, bool]:
    """Whether a final number is marked, and whether it is exactly the problem's."""
    number = marked_number(output)
    return number is not None, number == reference_number(problem)


RECIPE = Recipe(
    path=Path(__file__).resolve(),
    description=(__doc__ or "").partition("\n")[0],
    config=Config,
    presets=PRESETS,
    rates=LEARNING_RATES,
    load=load_problems,
    prompt=prompt,
    answer=lambda problem: problem["answer"],
    benchmark=ExactMatch("Exact match of the final number", prompt, grade),
    paper=partial(llama.printed, "gsm8k"),
    elsewhere=partial(tuned_lora, "gsm8k"),
    grids={"laptop": tried_rates(TUNED)},
)


if __name__ == "__main__":
    main(RECIPE)
