"""Fine-tune a Llama 3.1 on grade-school maths with LoRA and with LoRA-Over, and compare the final numbers.

On any machine, with the small model and the generated word problems that this repository ships::

    python recipes/llama31_gsm8k.py --method lora lora-over-mpo-r

The setting of LoRA-Over (arXiv:2605.16470): Llama 3.1 8B, 100k examples of MetaMathQA, GSM8K, one GPU::

    python recipes/llama31_gsm8k.py --preset paper --method lora lora-over-mpo-r

Your own model and data, as local folders (``train.jsonl`` and ``test.jsonl`` in GSM8K's format) or hub ids::

    python recipes/llama31_gsm8k.py --model FOLDER --data FOLDER --train-size 2000 --eval-size 100 --max-new-tokens 300

Every field of ``Config`` is an option (``--lr``, ``--core-lr``, ``--order``, ``--top-n``, ``--max-steps``, ...). An
interrupted run goes on with the same command and ``--resume``. Each run leaves a folder under ``runs/``.

Choices: the prompt is ``"Q: {question}\\nA: "``, the loss is on the answer and its end-of-sequence token; GSM8K's
calculator marks <<...>> are kept, as part of the text to learn; examples longer than ``max_length`` are left out rather
than cut; gradients are clipped to norm 1 (the paper does not say). The validation split is for choosing
hyper-parameters. Where the data have none, it is the end of the training problems, which are then not trained on.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns when imported, of kernels that nothing here uses

import torch
from peft import LoraConfig, get_peft_model
from support.folders import RunFolder
from support.options import add_options, check_fields, given_options
from support.provenance import config_hash, environment, read_json, write_text
from support.results import compare, expansions, write_report
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers import logging as transformers_logging
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import set_seed

from tnadapt import MPO, SVD, LoraOver, Static, TaylorRuntime, plan
from tnadapt.backends import BACKENDS
from tnadapt.factorizations import CP, Factorization, Tucker
from tnadapt.integrations.transformers import last_complete_checkpoint

sys.path.append(str(HERE.parent))  # the recipe is a file; this finds its neighbours from any folder
from recipes.embedded.word_problems import generate

COMMITTED = HERE / "results" / "llama31_gsm8k-laptop.json"
EMBEDDED = "embedded"
DTYPES = ("float32", "bfloat16")

# -- methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """What is trained through which factorization, chosen by which scheduler; plain LoRA without a factorization."""

    label: str
    factorization: Callable[[Config], Any] | None = None
    scheduler: Callable[[Config], Any] | None = None
    paper: str = "–"  # the paper's GSM8K accuracy in % for Llama 3.1 8B
    two_rates: bool = False  # some matrices have cores and some do not, so that lr and core_lr both count


FACTORIZATIONS = ("svd", "mpo", "tucker", "cp")


def make_factorization(config: Config, own: str) -> Factorization:
    """The factorization that ``config`` asks for, or else the method's ``own``."""
    kind = config.factorization or own
    if kind == "svd" and config.expansion is not None:
        raise ValueError(f"--expansion is {config.expansion}: an SVD has one structure only; take --factorization mpo")
    if kind == "svd":
        return SVD(gauge=config.gauge, backend=config.backend)
    settings: dict[str, Any] = {"backend": config.backend}
    if config.expansion is None:
        settings["order"] = config.order
    else:
        settings["expansion"] = config.expansion
    # the default gauge stands for that of each factorization, which CP calls otherwise
    if not (kind == "cp" and config.gauge == "svd"):
        settings["gauge"] = config.gauge
    return {"mpo": MPO, "tucker": Tucker, "cp": CP}[kind](**settings)


METHODS = {
    "lora": Method("LoRA", paper="67.78"),
    "lora-over-svd": Method("LoRA-Over-SVD", lambda c: make_factorization(c, "svd"), lambda c: Static(), "68.92"),
    "lora-over-mpo": Method("LoRA-Over-MPO", lambda c: make_factorization(c, "mpo"), lambda c: Static(), "72.14"),
    "lora-over-mpo-r": Method(
        "LoRA-Over-MPO_R",
        lambda c: make_factorization(c, "mpo"),
        lambda c: TaylorRuntime(top_n=c.top_n, split=c.split, every=c.every),
        "73.95",
        two_rates=True,
    ),
}

# (rate of the LoRA matrices, rate of the cores; None: the cores take their matrix's) when no --lr is given.
# laptop: chosen on the validation split by
#   python recipes/ablate.py tune --methods lora lora-over-svd lora-over-mpo lora-over-mpo-r \
#       --lrs 1.25e-3 2.5e-3 5e-3 1e-2 2e-2 4e-2 --core-ratios 1 0.5 --eval-split validation --workers 2
# paper: the paper's table. It gives none for LoRA, a baseline that it takes from GoRA (arXiv:2502.12171): 5e-5 there.
LEARNING_RATES: dict[str, dict[str, tuple[float, float | None]]] = {
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
        "lora-over-mpo-r": (2e-4, 1.7e-4),
    },
}

# -- configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Everything that decides a result. The defaults are the laptop preset."""

    preset: str = "laptop"
    method: str = "lora"
    model: str = EMBEDDED
    data: str = EMBEDDED
    test_data: str | None = None  # where the problems to evaluate on come from; None: from data
    eval_split: str = "test"
    train_size: int = 3200
    eval_size: int = 500
    seed: int = 0
    max_length: int = 512
    batch: int = 32
    micro_batch: int = 32
    epochs: int = 1
    max_steps: int = 0  # 0: as many as the epochs have
    lr: float | None = None
    core_lr: float | None = None
    weight_decay: float = 5e-4
    clip: float = 1.0
    rank: int = 8
    alpha: int = 16
    targets: str = "q_proj,k_proj,v_proj,o_proj"  # module names with commas between, or all-linear
    order: int = 10
    gauge: str = "svd"
    top_n: int = 3
    split: int = 3
    every: int = 10
    dtype: str = "float32"
    activation_checkpointing: bool = False
    max_new_tokens: int = 80
    eval_batch: int = 125
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    save_every: int = 25
    factorization: str | None = None  # svd, mpo, tucker or cp, in place of the method's own
    expansion: float | None = None  # parameters of a matrix's cores over its own, in place of order
    backend: str = "torch"

    def resolved(self) -> Config:
        """The configuration with its learning rates filled in.

        Raises:
            ValueError: for a value that cannot work, before anything is loaded.
        """
        choices: dict[str, Any] = {
            "preset": PRESETS,
            "method": METHODS,
            "eval_split": ("validation", "test"),
            "dtype": DTYPES,
        }
        choices |= {"backend": BACKENDS} | ({"factorization": FACTORIZATIONS} if self.factorization is not None else {})
        least = {"order": 2, "max_steps": 0, "seed": 0}
        check_fields(self, choices, least, may_be_zero=("weight_decay", "clip", "temperature"))
        if self.batch % self.micro_batch:
            raise ValueError(f"--micro-batch is {self.micro_batch}: it must divide --batch, which is {self.batch}")
        if self.top_p > 1:
            raise ValueError(f"--top-p is {self.top_p}: give a share of at most 1")
        if self.model == PRESETS["paper"].model and not torch.cuda.is_available():
            raise ValueError(f"{self.model} needs a GPU and there is none; use --preset laptop, or a small --model")
        for option, place in (("model", self.model), ("data", self.data), ("test-data", self.test_data or EMBEDDED)):
            hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place)
            if not (hub_id or place == EMBEDDED or Path(place).expanduser().is_dir()):
                raise ValueError(f"--{option} is {place!r}: there is no such folder, and a hub id reads owner/name")
        make = METHODS[self.method].factorization
        if make is not None:
            try:
                make(self)
            except ImportError as error:  # the library of a backend
                raise ValueError(str(error)) from error
        lr, core_lr = LEARNING_RATES[self.preset][self.method]
        if self.lr is not None:
            lr, core_lr = self.lr, None
        return dataclasses.replace(self, lr=lr, core_lr=self.core_lr or core_lr)

    def settings(self) -> dict[str, Any]:
        """What tells one run from another: all fields, but those of ``_LATER`` only where they are not the default, so
        that runs from before they came stay valid."""
        default = Config()
        fields = dataclasses.asdict(self)
        return {k: v for k, v in fields.items() if k not in _LATER or v != getattr(default, k)}


_LATER = ("factorization", "expansion", "backend")

PRESETS = {
    "laptop": Config(),
    "paper": Config(
        preset="paper",
        model="meta-llama/Llama-3.1-8B",
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


# -- data -------------------------------------------------------------------------------------------------------------

Problem = dict[str, str]  # question, answer


def load_problems(config: Config) -> tuple[list[Problem], list[Problem]]:
    """The problems to train on (more than needed, as long ones are left out) and those to evaluate on."""
    validating = config.eval_split == "validation"
    place = config.test_data or config.data
    evaluation = read_split(place, config.eval_split, config.eval_size)
    held_out = []
    if not evaluation and validating:
        evaluation = held_out = read_split(place, "train", None)[-config.eval_size :]
    evaluation = evaluation[: config.eval_size]
    if not evaluation:
        raise ValueError(f"{place} has no problems in its {config.eval_split} split; choose another --test-data")
    questions = {problem["question"] for problem in held_out}
    train = read_split(config.data, "train", config.train_size)
    train = [problem for problem in train if problem.get("source", problem["question"]) not in questions]
    if not train:
        raise ValueError(f"{config.data} has no problem left to train on; lower --eval-size ({config.eval_size})")
    return train, evaluation


def read_split(place: str, split: str, size: int | None) -> list[Problem]:
    """A split of the embedded problems, a folder or a hub data set; empty where it has no such split."""
    if place == EMBEDDED:
        return generate("composed", split, size or PRESETS["laptop"].train_size)
    folder = Path(place).expanduser()
    if folder.is_dir():
        return read_jsonl(folder / f"{split}.jsonl", needed=split != "validation")
    from datasets import load_dataset

    if "MetaMathQA" in place:
        rows = load_dataset(place, split="train") if split == "train" else []
        return [problem for problem in map(from_metamath, rows) if problem]
    loaded = load_dataset(place, "main")
    rows = loaded.get(split, [])
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def read_jsonl(path: Path, needed: bool) -> list[Problem]:
    """GSM8K's format: an object with question and answer on each line, the answer ending in ``#### number``."""
    if not path.exists():
        if needed:
            raise ValueError(f"{path} does not exist; a data folder holds train.jsonl and test.jsonl")
        return []
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = {"question": str(row["question"]), "answer": str(row["answer"])}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not an object with question and answer ({error!r})") from error
        if final_number(problem["answer"]) is None:
            raise ValueError(f"{path}, line {number}: the answer does not end in '#### number'")
        problems.append(problem)
    return problems


def from_metamath(row: dict[str, str]) -> Problem | None:
    """A MetaMathQA row as LoRA-GA trains on it: made from GSM8K, and cut before the words "The answer is"."""
    answer = row["response"].split("\nThe answer is:")[0].strip()
    if "GSM" not in row["type"] or final_number(answer) is None:
        return None
    return {"question": row["query"], "answer": answer, "source": row["original_question"]}


def tokenize(tokenizer: Any, problems: Sequence[Problem], size: int, max_length: int) -> list[dict[str, list[int]]]:
    """The first ``size`` problems that fit into ``max_length`` tokens; only answers and their EOS carry a label."""
    examples: list[dict[str, list[int]]] = []
    for problem in problems:
        prompt = tokenizer(prompt_of(problem))["input_ids"]
        answer = tokenizer(problem["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(prompt) + len(answer) <= max_length:
            examples.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        if len(examples) == size:
            break
    if not examples:
        raise ValueError(f"no training problem fits into --max-length {max_length} tokens; raise it")
    return examples


def prompt_of(problem: Problem) -> str:
    """What the model reads before it answers."""
    return f"Q: {problem['question']}\nA: "


# -- evaluation -------------------------------------------------------------------------------------------------------

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


@torch.inference_mode()
def evaluate(model: Any, tokenizer: Any, problems: Sequence[Problem], config: Config, quiet: bool) -> dict[str, Any]:
    """Answer all problems and compare final numbers exactly; problems of about one length share a batch."""
    prompts = [tokenizer(prompt_of(problem))["input_ids"] for problem in problems]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    outputs = [""] * len(problems)
    torch.manual_seed(config.seed)
    model.eval()
    with tqdm(total=len(prompts), desc="answering", unit="problem", disable=quiet) as bar:
        for start in range(0, len(order), config.eval_batch):
            rows = order[start : start + config.eval_batch]
            batch = {"input_ids": [prompts[row] for row in rows]}
            inputs = tokenizer.pad(batch, padding_side="left", return_tensors="pt")
            tokens = model.generate(
                **inputs.to(model.device),
                max_new_tokens=config.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **(sampling if config.temperature else {"do_sample": False}),
            )
            texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                outputs[row] = text
            bar.update(len(rows))
    answers = [
        {**problem, "output": output, "correct": final_number(output) == final_number(problem["answer"])}
        for problem, output in zip(problems, outputs, strict=True)
    ]
    return {
        "accuracy": sum(answer["correct"] for answer in answers) / len(answers),
        "format_rate": sum(final_number(output) is not None for output in outputs) / len(answers),
        "answers": answers,
    }


@lru_cache(maxsize=1)
def evaluate_base(config: Config, quiet: bool) -> dict[str, Any]:
    """The base model's scores before any training; ``config`` is one that ``base_config`` made, so they come once."""
    model, tokenizer = load_model(config)
    return evaluate(model, tokenizer, load_problems(config)[1], config, quiet)


def base_config(config: Config) -> Config:
    """``config`` with only those fields left that the base model's scores depend on."""
    data = ("model", "data", "test_data", "eval_split", "eval_size", "dtype")
    decoding = ("max_new_tokens", "eval_batch", "temperature", "top_p")
    return dataclasses.replace(Config(), **{name: getattr(config, name) for name in data + decoding})


# -- one run ----------------------------------------------------------------------------------------------------------


def load_model(config: Config) -> tuple[Any, Any]:
    """The base model, on the GPU if there is one, and its tokenizer."""
    place = str(HERE / "embedded" / "model") if config.model == EMBEDDED else str(Path(config.model).expanduser())
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, config.dtype))
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def run(config: Config, root: Path = Path("runs"), name: str = "", resume: bool = False, quiet: bool = False) -> dict:
    """Train and evaluate one method with one seed, and leave the run's folder below ``root``.

    A finished run of the same configuration is not repeated when ``resume`` is set; an unfinished one goes on.

    Returns:
        What ``result.json`` holds, and under ``folder`` where that is.
    """
    config = config.resolved()
    settings = config.settings()
    name = name or f"llama31_gsm8k-{config.preset}-{config.method}-seed{config.seed}-{config_hash(settings)}"
    folder = RunFolder(root, name)
    done = folder.finished(settings)
    if done and resume:
        return {**done, "folder": str(folder.final)}
    train, evaluation = load_problems(config)
    label = METHODS[config.method].label
    result: dict[str, Any] = {"name": name, "label": label, "config": settings, "environment": environment(HERE)}
    start = time.perf_counter()
    with folder.working(result, keep=resume) as work:
        base = evaluate_base(base_config(config), quiet)
        model, tokenizer = load_model(config)
        examples = tokenize(tokenizer, train, config.train_size, config.max_length)
        set_seed(config.seed)
        targets = config.targets if config.targets == "all-linear" else config.targets.split(",")
        model = get_peft_model(model, LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets))
        result |= train_model(model, tokenizer, examples, config, work, quiet)
        scores = evaluate(model, tokenizer, evaluation, config, quiet)
        result["metrics"] |= {
            "accuracy": scores["accuracy"],
            "format_rate": scores["format_rate"],
            "base_accuracy": base["accuracy"],
            "base_format_rate": base["format_rate"],
            "problems": len(evaluation),
            "training_examples": len(examples),
            "seconds": time.perf_counter() - start,
        }
        model.save_pretrained(work / "adapter")
        write_text(work / "predictions.jsonl", "".join(json.dumps(answer) + "\n" for answer in scores["answers"]))
        write_report(result, work)
        shutil.rmtree(work / "checkpoints", ignore_errors=True)
    return {**result, "folder": str(folder.final)}


def train_model(
    model: Any, tokenizer: Any, examples: list[dict[str, list[int]]], config: Config, work: Path, quiet: bool
) -> dict[str, Any]:
    """Train ``model`` in place, through an unmodified Trainer, and tell what happened."""
    method = METHODS[config.method]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay)
    over, table = None, ""
    if method.factorization and method.scheduler:
        factorization, scheduler = method.factorization(config), method.scheduler(config)
        table = str(plan(model, factorization, top_n=getattr(scheduler, "top_n", None)))
        if not quiet:
            print(table)
        over = LoraOver(model, optimizer, factorization, scheduler, core_lr=config.core_lr)
    steps = config.max_steps or config.epochs * -(-len(examples) // config.batch)
    arguments = TrainingArguments(
        output_dir=str(work / "checkpoints"),
        per_device_train_batch_size=config.micro_batch,
        gradient_accumulation_steps=config.batch // config.micro_batch,
        max_steps=steps,
        lr_scheduler_type="cosine",
        max_grad_norm=config.clip,
        seed=config.seed,
        bf16=config.dtype == "bfloat16",
        activation_checkpointing=config.activation_checkpointing,
        logging_steps=max(1, steps // 50),
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        include_num_input_tokens_seen="non_padding",
        disable_tqdm=quiet,
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    if not quiet:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossBar)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(work / "checkpoints"))
    state = trainer.state
    curve = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
    tail = [loss for _, loss in curve[-5:]]
    result = {
        "metrics": {
            "loss": sum(tail) / len(tail) if tail else float("nan"),
            "steps": state.global_step,
            "tokens": int(state.num_input_tokens_seen),
            "training_seconds": time.perf_counter() - start,
            "lora_parameters": sum(parameter.numel() for parameter in trainable),
            "trained_parameters": over.trained_parameters if over else sum(p.numel() for p in trainable),
        },
        "curve": curve,
        "plan": table,
        "matrices": expansions(over) if over else [],
    }
    if over:
        over.fold()
    return result


class LossBar(ProgressCallback):
    """The Trainer's progress bar, with the loss in it instead of in lines of its own."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}")


# -- command line -----------------------------------------------------------------------------------------------------


NOT_OPTIONS = ("preset", "method")


def hush() -> None:
    """Leave out messages that ask for nothing: of progress bars of other libraries, and of version notes."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--method", nargs="+", default=["lora", "lora-over-mpo-r"], choices=METHODS, metavar="METHOD")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument("--name", default="", help="of the run folder; the method is added if there are several")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run, keep a finished one")
    parser.add_argument("--preset", choices=PRESETS, default="laptop")
    parser.add_argument("--threads", type=int, help="CPU threads; default: 1 for the embedded model, else all")
    add_options(parser, Config, NOT_OPTIONS)
    options = parser.parse_args(arguments)
    model = options.model or PRESETS[options.preset].model
    small = model == EMBEDDED  # so small that threads only wait for each other
    torch.set_num_threads(options.threads or (1 if small else torch.get_num_threads()))
    hush()
    try:
        preset = dataclasses.replace(PRESETS[options.preset], **given_options(options, Config, NOT_OPTIONS))
        methods = dict.fromkeys(options.method)
        configs = [dataclasses.replace(preset, method=method).resolved() for method in methods]
        results = []
        for config in configs:
            name = f"{options.name}-{config.method}" if options.name and len(configs) > 1 else options.name
            print(f"\n{METHODS[config.method].label}: {config.model} on {config.data}, seed {config.seed}")
            results.append(run(config, options.runs, name, options.resume))
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ncancelled; the same command with --resume goes on from the last checkpoint\n")
    for result in results:
        print(f"{result['label']}: {result['folder']}/report.md")
    laptop = options.preset == "laptop"
    embedded = preset.model == preset.data == EMBEDDED and preset.test_data is None
    committed = read_json(COMMITTED) if laptop and embedded and COMMITTED.exists() else None
    paper = None if laptop else {method.label: method.paper for method in METHODS.values()}
    print(f"comparison: {compare(results, options.runs, committed, paper)}")


if __name__ == "__main__":
    main()
