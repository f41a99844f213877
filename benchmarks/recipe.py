"""The main recipe's paper preset at full size, on a Llama 3.1-8B with random weights: speed of training and of answering.

    python benchmarks/recipe.py training --method lora                   # plain LoRA; needs CUDA
    python benchmarks/recipe.py training --method lora-over-mpo-r        # the same with rounds, beside it
    python benchmarks/recipe.py answering --method lora-over-mpo-r       # by the adapter that this has trained
    python benchmarks/recipe.py training --device cpu --quick            # a Llama of a few layers, seconds

The model is made from its configuration, with the embedded tokenizer, which has fewer words than the model; the problems are made
of the generated ones, joined until they are as long as those of MetaMathQA in Llama's tokens (about 250). So the figures say
nothing of what is learned. `recipes/llama31_gsm8k.py --preset paper` is started as anybody would start it (its own answers are
cut to a few tokens), for 50 steps of 64 problems, with all eight rounds in these; once it has saved step 25 it is killed, and
started again with `--resume`. Of the second process it is measured how many tokens it trains in a second, what it spends on
starting included. `answering` loads the adapter and answers one batch of the size that the preset evaluates with.

Writes the numbers with their provenance to recipe-PART-METHOD.json in --output.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from devices import DEVICES, require, synchronize, watched_memory
from provenance import environment, read_json, write_json
from step_overhead import CASES, build_base, on

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "recipes" / "llama31_gsm8k.py"
RESULTS = HERE / "results"
WORK = HERE.parent / "build" / "recipe"


@dataclass(frozen=True)
class Size:
    """How much is trained and answered."""

    steps: int = 50
    save: int = 25
    every: int = 6
    batch: int = 64
    micro: int = 8
    answers: int = 64
    new_tokens: int = 512
    own_tokens: int = 16  # of the answers that the recipe itself writes, of which only the time would be known
    words: tuple[int, int] = (100, 400)  # of the model's vocabulary, in a problem with its answer


QUICK = Size(steps=6, save=3, every=2, batch=2, micro=1, answers=2, new_tokens=4, own_tokens=4, words=(20, 60))


def make_model(folder: Path, device: str, quick: bool) -> None:
    """A folder with a model of random weights and the embedded tokenizer, unless it is there."""
    if (folder / "made").exists():
        return
    from embedded.word_problems import __file__ as embedded
    from transformers import AutoTokenizer

    case = on(CASES["llama31-gpu"], device, quick)
    base = build_base(case)[0]
    tokenizer = AutoTokenizer.from_pretrained(Path(embedded).parent / "model")
    base.config.eos_token_id = base.generation_config.eos_token_id = tokenizer.eos_token_id
    base.config.pad_token_id = base.generation_config.pad_token_id = tokenizer.pad_token_id
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "made").touch()


def problems(split: str, count: int, words: tuple[int, int], tokenizer: Any) -> Iterator[dict[str, str]]:
    """Generated problems, several in one, which is between so many tokens long."""
    from embedded.word_problems import generate

    draw = random.Random(f"{split} of a benchmark")
    stream = iter(generate("composed", split, 8 * count))
    for _ in range(count):
        wanted, parts, length = draw.uniform(*words), list[dict[str, str]](), 0
        while not parts or length < wanted:
            part = next(stream)
            longer = length + len(tokenizer(part["question"] + part["answer"])["input_ids"])
            if parts and longer > words[1]:
                break
            parts, length = [*parts, part], longer
        question = " ".join(part["question"] for part in parts)
        lines = "\n".join(part["answer"].replace("#### ", "It is ") for part in parts[:-1])
        yield {"question": question, "answer": f"{lines}\n{parts[-1]['answer']}".strip()}


def make_data(folder: Path, size: Size, tokenizer: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", size.steps * size.batch), ("test", size.answers)):
        lines = (json.dumps(problem) for problem in problems(split, count, size.words, tokenizer))
        (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def command_of(method: str, model: Path, data: Path, runs: Path, size: Size, quick: bool) -> list[str]:
    """What is typed in a shell, but for the Python."""
    words = [str(RECIPE), "--preset", "paper", "--method", method, "--model", str(model), "--data", str(data)]
    words += ["--test-data", str(data), "--runs", str(runs), "--name", "benchmark", "--greedy-beside", "False"]
    words += ["--lr", "2e-4", "--max-steps", size.steps, "--save-every", size.save, "--every", size.every]
    words += ["--train-size", size.steps * size.batch, "--eval-size", size.answers, "--eval-batch", size.answers]
    words += ["--batch", size.batch, "--micro-batch", size.micro, "--max-new-tokens", size.own_tokens]
    if quick:
        words += ["--dtype", "float32", "--order", 4, "--top-n", 1, "--split", 1]
    return [str(word) for word in words]


def killed_after(command: list[str], checkpoint: Path) -> None:
    """Run a command until a checkpoint is whole, then kill it.

    Raises:
        SystemExit: it ended before that.
    """
    process = subprocess.Popen([sys.executable, *command])
    try:
        while not (checkpoint / "trainer_state.json").exists():  # what a checkpoint gets last
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)}: ended with {process.returncode} before {checkpoint} was saved")
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def places(place: Path, method: str) -> tuple[Path, Path, Path]:
    """The folders of the model, the data and the runs."""
    return place / "model", place / "data", place / f"runs-{method}"


def training(method: str, device: str, quick: bool, place: Path) -> dict[str, Any]:
    """Train as the recipe does, killed and resumed once."""
    from transformers import AutoTokenizer

    size = QUICK if quick else Size()
    model, data, runs = places(place, method)
    make_model(model, device, quick)
    make_data(data, size, AutoTokenizer.from_pretrained(model))
    shutil.rmtree(runs, ignore_errors=True)
    command = command_of(method, model, data, runs, size, quick)
    checkpoint = runs / "unfinished" / "benchmark" / "checkpoints" / f"checkpoint-{size.save}"
    killed_after(command, checkpoint)
    saved = read_json(checkpoint / "trainer_state.json")
    assert saved["global_step"] == size.save
    subprocess.run([sys.executable, *command, "--resume"], check=True)
    result = read_json(runs / "benchmark" / "result.json")
    metrics = result["metrics"]
    assert metrics["steps"] == size.steps
    tokens = metrics["tokens"] - int(saved["num_input_tokens_seen"])
    return {
        "trained_parameters": metrics["trained_parameters"],
        "rounds": sorted({row["expanded_at"] for row in result["matrices"] if row["expanded_at"] is not None}),
        "resumed_at": size.save,
        "steps": size.steps - size.save,
        "tokens": tokens,
        "seconds": metrics["training_seconds"],
        "tokens_per_second": tokens / metrics["training_seconds"],
        "command": command,
    }


def answering(method: str, device: str, quick: bool, place: Path) -> dict[str, Any]:
    """One batch of answers by the adapter that `training` has left, sampled as the preset does."""
    from llama31_gsm8k import prompt
    from peft import PeftModel
    from support.evaluation.generate import Generator, Sampling
    from transformers import AutoModelForCausalLM, AutoTokenizer

    size = QUICK if quick else Size()
    model, data, runs = places(place, method)
    adapter = runs / "benchmark" / "adapter"
    if not adapter.is_dir():
        raise SystemExit(f"{adapter} is not there: `python benchmarks/recipe.py training --method {method}` makes it")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32 if quick else torch.bfloat16).to(device)
    trained = PeftModel.from_pretrained(base, adapter)
    tokenizer = AutoTokenizer.from_pretrained(model)
    records = [json.loads(line) for line in (data / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [prompt(record) for record in records]
    Generator(trained, tokenizer, 4, Sampling())(prompts)  # warms up
    lengths: list[int] = []
    whole = trained.generate

    def counted(**settings: Any) -> Any:
        answers = whole(**settings)
        lengths.append(answers.shape[1] - settings["input_ids"].shape[1])
        return answers

    trained.generate = counted
    with watched_memory(device) as memory:
        synchronize(device)
        started = time.perf_counter()
        Generator(trained, tokenizer, size.new_tokens, Sampling())(prompts)
        synchronize(device)
        seconds = time.perf_counter() - started
    return {
        "parameters": sum(p.numel() for p in base.parameters()),
        "batch": len(prompts),
        "new_tokens": lengths[0],
        "seconds": seconds,
        "tokens_per_second": len(prompts) * lengths[0] / seconds,
        "peak_bytes": memory.peak,
    }


PARTS = {"training": training, "answering": answering}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--method", default="lora-over-mpo-r", help="a method of the recipe")
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--quick", action="store_true", help="a small model, a few steps")
    parser.add_argument("--work", type=Path, default=WORK, help="for model, data and runs; they stay")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    require(arguments.device, "--device cuda")
    quick = arguments.quick
    row = PARTS[arguments.part](
        arguments.method, arguments.device, quick, arguments.work / ("quick" if quick else "full")
    )
    print(f"\n{arguments.method}, {arguments.part}: {row['tokens_per_second']:,.0f} tokens / s\n")
    file = arguments.output / f"recipe-{arguments.part}-{arguments.method}.json"
    about = {"method": arguments.method, "device": arguments.device, "size": vars(QUICK if quick else Size())}
    write_json(file, {**about, **row, "provenance": environment(HERE)})
    print(f"written: {file}")


if __name__ == "__main__":
    main()
