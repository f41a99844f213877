"""Train a method as PEFT's method comparison does, and write a result file that its board can read.

The protocol is that of ``method_comparison/MetaMathQA`` in huggingface/peft: Llama 3.2 3B, LoRA of rank 32 on ``q_proj`` and
``v_proj``, 5,000 steps of 4 examples of MetaMathQA in a plain loop, 50 problems of GSM8K every 250 steps, GSM8K's test problems at the end, and
what the model forgets, as the loss on 100 texts. One GPU; the board's own run of LoRA took 16 minutes on an L40S and has 47.8 %::

    python recipes/peft_board.py --method lora-over-mpo-r --lr 1e-4
    python recipes/peft_board.py --method lora --name lora/llama-3.2-3B-rank32

On any machine, with what this repository ships in place of model and data, which shows that everything runs: the small model does not know
the prompt, and in the 100 steps of the preset the loss falls to 2.5 nats a token and no test problem is answered rightly::

    python recipes/peft_board.py --preset laptop --method lora-over-mpo-r

``--model``, ``--data``, ``--test-data`` and ``--texts`` take local folders too: ``train.jsonl`` with ``query`` and ``response``,
``train.jsonl`` and ``test.jsonl`` with ``question`` and ``answer``, ``train.jsonl`` with ``text``.

Choices: the board has files of its own for other methods, so this runs plain LoRA, for comparison, and what trains LoRA through
cores from gradients alone. Of each group's 28 matrices 26 are expanded in 8 rounds, at order 10, where LoRA-Over expands 30 of 32 in
Llama 3.1 8B. All rows of the board share one rate, which does not tell methods apart from rates: tune ``--lr`` and ``--core-lr``
on problems that are no test problems. In the file, ``optimizer_kwargs`` has the settings of ``LoraOver`` and
``num_trainable_params`` counts the cores at the end of training. As there, ``train_time`` includes the test problems, and a
run that ends early is kept apart with its error; it is not resumed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from support.command_line import OneLine, options_for
from support.config import EMBEDDED, Config, option
from support.methods import METHODS

#: Plain LoRA, and what trains its matrices through cores with no other training before.
TRAINED = tuple(
    name
    for name, method in METHODS.items()
    if name == "lora" or (method.over and not method.over.weights and method.over.choice in ("all", "runtime"))
)
WARM_UP = 0.1


@dataclass(frozen=True)
class Board(Config):
    """The board's settings, and those of the cores; the defaults are ``default_training_params.json`` of the board."""

    preset: str = option("board", "board: PEFT's protocol; laptop: the same with what this repository ships")
    method: str = option("lora-over-mpo-r", "what is trained", TRAINED)
    model: str = option("meta-llama/Llama-3.2-3B", "base model: embedded, a local folder or a hub id")
    data: str = option("meta-math/MetaMathQA", "what to train on: embedded, a local folder or file, or a hub id")
    test_data: str = option("openai/gsm8k", "problems to validate and test on: embedded, a local folder, or a hub id")
    texts: str = option("HuggingFaceFW/finewiki", "texts to forget: embedded, a local folder or file, or a hub id")
    texts_size: int = option(100, "texts")
    max_length: int = option(768, "tokens after which a training example, and a text, are cut")
    batch: int = option(4, "training examples per optimizer step")
    max_steps: int = option(5000, "optimizer steps")
    lr: float | None = option(1e-4, "peak learning rate of the LoRA matrices")
    core_lr: float | None = option(None, "peak learning rate of the cores; None: that of --lr")
    weight_decay: float = option(0.1, "weight decay of AdamW")
    rank: int = option(32, "LoRA's rank")
    alpha: int = option(64, "LoRA's alpha; the adapter is scaled by alpha / rank")
    targets: str = option("q_proj,v_proj", "names of linear layers that get adapters, with commas, or all-linear")
    top_n: int = option(26, "matrices to expand in each group")
    split: int = option(8, "rounds in which MPO_R expands them")
    every: int = option(50, "steps between two rounds of MPO_R")
    dtype: str = option("bfloat16", "dtype of the base model", ("float32", "bfloat16"))
    eval_every: int = option(250, "steps between two validations")
    valid_size: int = option(50, "problems of a validation")
    eval_size: int = option(1319, "problems of the test")
    eval_batch: int = option(50, "answers that are generated at once")
    max_new_tokens: int = option(300, "longest answer in tokens")
    max_total: int = option(800, "longest prompt and answer in tokens")

    PLACES: ClassVar[tuple[str, ...]] = ("data", "test_data", "texts")
    LEAST: ClassVar[Mapping[str, int]] = {**Config.LEAST, "max_steps": 1}

    def check(self) -> None:
        super().check()
        if self.max_steps < self.eval_every:
            raise ValueError(f"--eval-every is {self.eval_every}: give at most --max-steps, which is {self.max_steps}")


#: Fields of the other recipes that this protocol leaves no choice in.
FIXED = (
    *("preset", "eval_split", "train_size", "micro_batch", "epochs", "save_every", "quantize"),
    *("activation_checkpointing", "wrong_answers", "stop_after", "shard"),
)
PRESETS = {
    "board": Board(),
    "laptop": Board(
        **{"preset": "laptop", "model": EMBEDDED, "data": EMBEDDED, "test_data": EMBEDDED, "texts": EMBEDDED},
        **{"dtype": "float32", "rank": 8, "alpha": 16, "lr": 1e-2, "top_n": 2, "split": 2, "every": 10},
        **{"batch": 8, "max_steps": 100, "eval_every": 50, "valid_size": 20, "eval_size": 100, "max_new_tokens": 80},
    ),
}


def train_config(config: Board, over: Any = None) -> dict[str, Any]:
    """The settings as the board writes them; ``over`` is the attached ``LoraOver``."""
    from support.board.data import TEMPLATE

    rates: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    return {
        "model_id": config.model,
        "dtype": config.dtype,
        "max_seq_length": config.max_length,
        "batch_size": config.batch,
        "batch_size_eval": config.eval_batch,
        "max_steps": config.max_steps,
        "eval_steps": config.eval_every,
        "compile": False,
        "use_gc": False,
        "query_template": TEMPLATE,
        "seed": config.seed,
        "grad_norm_clip": config.clip,
        "optimizer_type": "LoraOver(AdamW)" if over else "AdamW",
        "optimizer_kwargs": rates | ({"lora_over": over.config()} if over else {}),
        "lr_scheduler": "cosine",
        "use_amp": False,
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_length": config.max_total, "max_new_tokens": config.max_new_tokens},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


# -- the model --------------------------------------------------------------------------------------------------------


def load(config: Board) -> tuple[Any, Any]:
    """The base model with its adapter, and its tokenizer, which pads on the right with the end-of-sequence token."""
    import torch
    from support.adapters import attach
    from support.loading import reaching
    from transformers import AutoModelForCausalLM, AutoTokenizer

    embedded = Path(__file__).resolve().parent / "embedded" / "model"
    place = str(embedded if config.model == EMBEDDED else Path(config.model).expanduser())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with reaching("model", config.model):
        tokenizer = AutoTokenizer.from_pretrained(place)
        base = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, config.dtype))
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.eos_token
    return attach(base.to(device), METHODS[config.method], config, config.max_steps), tokenizer


def optimizer_of(model: Any, config: Board) -> tuple[Any, Any, Any]:
    """AdamW, the ``LoraOver`` that is attached to it, if the method has one, and the schedule."""
    from support.adapters import make_optimizer
    from transformers import get_cosine_schedule_with_warmup

    from tnadapt import LoraOver

    method = METHODS[config.method]
    optimizer, over = make_optimizer(model, method, config), None
    if method.over is not None:
        shapes = {tuple(p.shape) for p in model.parameters() if p.requires_grad}
        factorization = method.over.make_factorization(config, shapes)
        scheduler = method.over.make_scheduler(config, config.max_steps)
        choices: dict[str, Any] = {"core_lr": config.core_lr, "matched": config.matched}
        over = LoraOver(model, optimizer, factorization, scheduler, **choices)
    warm_up = int(WARM_UP * config.max_steps)
    return optimizer, over, get_cosine_schedule_with_warmup(optimizer, warm_up, config.max_steps)


def answers(model: Any, tokenizer: Any, questions: Sequence[str], config: Board) -> list[str]:
    """Prompts with the model's answers, greedily, whole texts."""
    import torch
    from support.board.data import prompt
    from transformers import GenerationConfig

    found: list[str] = []
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(questions), config.eval_batch):
            tokens = tokenizer([prompt(question) for question in questions[start : start + config.eval_batch]])
            cut = {name: [row[: config.max_length] for row in rows] for name, rows in tokens.items()}
            batch = tokenizer.pad(cut, return_tensors="pt", padding_side="left").to(model.device)
            longest = min(batch["input_ids"].shape[1] + config.max_new_tokens, config.max_total)
            settings = GenerationConfig(max_length=longest, pad_token_id=tokenizer.pad_token_id)
            written = model.generate(**batch, generation_config=settings)
            found += tokenizer.batch_decode(written, skip_special_tokens=True)
    model.train()
    return found


def accuracy(model: Any, tokenizer: Any, problems: Sequence[Mapping[str, Any]], config: Board) -> float:
    """The share of problems whose final answer is right."""
    from support.board.data import is_right

    outputs = answers(model, tokenizer, [problem["question"] for problem in problems], config)
    return fmean(is_right(output, problem["answer"]) for output, problem in zip(outputs, problems, strict=True))


def loss_on(model: Any, tokenizer: Any, texts: Sequence[str], config: Board) -> float:
    """The mean loss of a token over all tokens of all texts, in nats."""
    import torch
    from torch.nn.functional import cross_entropy

    losses: list[float] = []
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(texts), config.batch):
            cut = tokenizer(list(texts[start : start + config.batch]), truncation=True, max_length=config.max_length)
            batch = tokenizer.pad(cut, return_tensors="pt", padding_side="left").to(model.device)
            for row, ids, mask in zip(model(**batch).logits, batch["input_ids"], batch["attention_mask"], strict=True):
                length = int(mask.sum())
                losses += (
                    cross_entropy(row[-length:-1], ids[-length + 1 :], reduction="none").tolist() if length > 1 else []
                )
    model.train()
    return fmean(losses)


# -- a run ------------------------------------------------------------------------------------------------------------


@dataclass
class Course:
    """What a run leaves, also where it ends early."""

    metrics: list[dict[str, Any]] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    validation_seconds: float = 0.0
    error: str = ""


def course_of(model: Any, tokenizer: Any, optimizer: Any, schedule: Any, config: Board, course: Course) -> None:
    """Train, validate and test, writing down in ``course`` what happens.

    Raises:
        ValueError: for data that are missing, too few or broken, before anything is trained.
    """
    import torch
    from support.board import data
    from tqdm import tqdm

    begin, start_memory = time.perf_counter(), torch.cuda.max_memory_reserved()
    rows = data.training_rows(config.data, config.batch * config.max_steps)
    valid = data.validation_problems(config.test_data, config.valid_size)
    test = data.problems(config.test_data, "test", config.eval_size)
    texts = data.texts(config.texts, config.texts_size)
    with model.disable_adapter():
        before = loss_on(model, tokenizer, texts, config)
    every = config.eval_every
    made = data.batches(tokenizer, rows, config.batch, config.max_length)
    for step, batch in zip(tqdm(range(1, config.max_steps + 1), unit="step"), made, strict=False):
        tic = time.perf_counter()
        sizes = batch["attention_mask"].sum(1)
        course.tokens.append(int(sizes.sum()) + len(sizes))
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        optimizer.zero_grad()
        loss = model(**inputs, num_items_in_batch=int(sizes.sum())).loss
        loss.backward()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        course.losses.append(loss.item())
        course.allocated.append(torch.cuda.memory_allocated() - start_memory)
        course.reserved.append(torch.cuda.memory_reserved() - start_memory)
        course.seconds.append(time.perf_counter() - tic)
        if step % every == 0:
            tic = time.perf_counter()
            share = accuracy(model, tokenizer, valid, config)
            took, trained = time.perf_counter() - tic, sum(course.seconds[-every:])
            course.validation_seconds += took
            course.metrics.append(
                {
                    "step": step,
                    "valid accuracy": share,
                    "train loss": fmean(course.losses[-every:]),
                    "train samples": step * config.batch,
                    "train time": trained,
                    "eval time": took,
                    "tokens / sec": sum(course.tokens[-every:]) / trained,
                    "mem allocated avg": fmean(course.allocated[-every:]),
                    "mem reserved avg": fmean(course.reserved[-every:]),
                    "elapsed time": time.perf_counter() - begin,
                }
            )
        if step % 10 == 0:
            torch.cuda.empty_cache()
    course.metrics.append(
        {
            "step": config.max_steps,
            "test accuracy": accuracy(model, tokenizer, test, config),
            "train loss": fmean(course.losses[-every:]),
            "train samples": config.max_steps * config.batch,
            "train total tokens": sum(course.tokens),
            "forgetting": loss_on(model, tokenizer, texts, config) - before,
        }
    )


def run(config: Board, root: Path, name: str = "") -> dict[str, Any]:
    """Train one method by the protocol, and leave its adapter and its file below ``root``.

    Returns:
        What the file holds, and under ``path`` where that is.

    Raises:
        ValueError: for what cannot work, before anything is trained.
    """
    config = dataclasses.replace(config, micro_batch=config.batch)
    config.check()
    name = name or f"{config.method}/{Path(config.model).name}-rank{config.rank}"
    if len(name.split("/")) != 2 or not all(name.split("/")):
        raise ValueError(f"--name is {name!r}: the board's names read method/variant")
    import numpy as np
    import torch
    from support.board.record import checkout_of, meta_info, peft_config_of, write_record
    from transformers.trainer_utils import set_seed

    created, start = datetime.now(UTC).replace(microsecond=0).isoformat(), time.perf_counter()
    meta = meta_info(config.model, config.data, config.test_data)
    set_seed(config.seed)
    start_memory = torch.cuda.max_memory_reserved()
    model, tokenizer = load(config)
    optimizer, over, schedule = optimizer_of(model, config)
    settings, course, begin = train_config(config, over), Course(), time.perf_counter()
    try:
        course_of(model, tokenizer, optimizer, schedule, config, course)
    except (KeyboardInterrupt, Exception) as error:
        if not course.losses:
            raise
        course.error = "manually canceled" if isinstance(error, KeyboardInterrupt) else str(error) or repr(error)
    seconds = time.perf_counter() - begin - course.validation_seconds
    trained, total = model.get_nb_trainable_parameters()
    if over is not None:
        trained += over.trained_parameters - over.lora_parameters
        over.fold()
    adapter = root / "adapters" / name
    model.save_pretrained(adapter)
    peft = checkout_of("peft") or {"branch": None, "dirty": None}
    record = {
        "run_info": {
            "created_at": created,
            "total_time": time.perf_counter() - start,
            "experiment_name": name,
            "peft_branch": peft["branch"],
            "peft_worktree_is_dirty": peft["dirty"],
            "train_config": settings,
            "peft_config": peft_config_of(model),
            "error_msg": course.error,
        },
        "train_info": {
            "accelerator_memory_reserved_avg": int(fmean(course.reserved)),
            "accelerator_memory_max": torch.cuda.max_memory_reserved() - start_memory,
            "accelerator_memory_reserved_99th": int(np.percentile(course.reserved, 99)),
            "train_time": seconds,
            "file_size": (adapter / "adapter_model.safetensors").stat().st_size,
            "num_trainable_params": trained,
            "num_total_params": total,
            "status": "canceled" if course.error else "success",
            "metrics": course.metrics,
        },
        "meta_info": meta,
    }
    return {**record, "path": str(write_record(record, root))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the method that the command line names."""
    first = OneLine(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="board")
    preset = PRESETS[first.parse_known_args(arguments)[0].preset]
    parser = options_for(Board, FIXED, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, help="board: PEFT's protocol; laptop: small and offline")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "peft_board", help="where adapters and files go")
    parser.add_argument("--name", default="", help="method/variant on the board; made up if empty")
    parser.set_defaults(**dataclasses.asdict(preset))
    options = parser.parse_args(arguments)
    names = {each.name for each in dataclasses.fields(Board)} - {*FIXED}
    try:
        result = run(
            dataclasses.replace(preset, **{name: getattr(options, name) for name in names}), options.runs, options.name
        )
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ncancelled before anything was trained\n")
    print(f"{result['train_info']['metrics'][-1:]}\n{result['path']}")
    if error := result["run_info"]["error_msg"]:
        parser.exit(1, f"the run ended early: {error}\n")


if __name__ == "__main__":
    main()
