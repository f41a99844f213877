"""Makes the embedded encoder-decoder: a tokenizer and a small T5, pre-trained to fill in what is missing in sentences.

The result is committed under ``recipes/embedded/t5``, so nobody has to run this. To make it again::

    cd recipes && python -m embedded.pretrain_t5

takes about ten minutes on two busy CPU cores. Like T5, it fills in spans of words that sentinels replace, and learns tasks: here
the ``basic`` records of ``sentences.py``. The sentences of ``composed`` records, which the recipe fine-tunes it on, are filled
in too, without their labels. Weights are T5 1.0's in form: ReLU, tied embeddings, relative positions.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from embedded.sentences import FAMILIES, generate
from support.glue import TASKS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

FOLDER = Path(__file__).parent / "t5"
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(2))
#: Words of prompts and labels that occur in no sentence.
WORDS = (
    "cola", "sst2", "mrpc", "qnli", "mnli", "sentence", "sentence1", "sentence2", "question", "premise", "hypothesis", ":",
    "acceptable", "unacceptable", "positive", "negative", "equivalent", "not_equivalent", "entailment", "not_entailment",
    "neutral", "contradiction",
)  # fmt: skip


@dataclass(frozen=True)
class Pretraining:
    """Everything that decides what comes out."""

    steps: int = 1200
    batch: int = 64
    lr: float = 3e-3
    warmup: int = 100
    seed: int = 0
    sentences: int = 20_000
    width: int = 96
    layers: int = 2
    heads: int = 4
    feed_forward: int = 256


def texts_of(family: str, task: str, n: int, seed: int) -> Iterator[list[str]]:
    """The texts of a task's training records, without their labels."""
    for record in generate(family, task, "train", n, seed):
        yield [str(value) for key, value in record.items() if key != "label"]


def labelled(task: str, n: int, seed: int) -> Iterator[tuple[str, str]]:
    """Prompts and answers of a task's ``basic`` training records."""
    for record in generate("basic", task, "train", n, seed):
        yield TASKS[task].prompt(record), TASKS[task].answer(record)


def make_tokenizer(settings: Pretraining) -> PreTrainedTokenizerFast:
    """Whole words and single characters, with an end-of-sequence token behind every text, as T5's has it."""
    seen = [
        " ".join(texts)
        for family in FAMILIES
        for task in TASKS
        for texts in texts_of(family, task, 3000, settings.seed)
    ]
    words = sorted({word for text in seen for word in text.split()})
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {
        word: i for i, word in enumerate(dict.fromkeys([PAD, EOS, UNKNOWN, *SENTINELS, *WORDS, *words, *letters]))
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(":", behavior="isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN,
        extra_special_tokens=list(SENTINELS), model_max_length=512,
    )  # fmt: skip


def make_model(settings: Pretraining, tokenizer: Any) -> T5ForConditionalGeneration:
    """An untrained T5 of the settings' size."""
    torch.manual_seed(settings.seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=settings.width,
        d_kv=settings.width // settings.heads,
        d_ff=settings.feed_forward,
        num_layers=settings.layers,
        num_heads=settings.heads,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = T5ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return model


def corrupt(texts: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Text with two spans of one or two words replaced by sentinels, and the spans."""
    words = " ".join(texts).split()
    first = rng.randrange(len(words) // 2)
    second = rng.randrange(len(words) // 2 + 1, len(words))
    starts = (first, second)
    ends = (min(first + rng.randint(1, 2), second), min(second + rng.randint(1, 2), len(words)))
    source = [*words[: starts[0]], SENTINELS[0], *words[ends[0] : starts[1]], SENTINELS[1], *words[ends[1] :]]
    target = [SENTINELS[0], *words[starts[0] : ends[0]], SENTINELS[1], *words[starts[1] : ends[1]]]
    return " ".join(source), " ".join(target)


def pretrain(settings: Pretraining, folder: Path = FOLDER) -> float:
    """Train model and tokenizer, save both to ``folder``, and return the mean loss of the last hundred steps."""
    rng = random.Random(settings.seed)
    tokenizer = make_tokenizer(settings)
    model = make_model(settings, tokenizer)
    size, seed = settings.sentences, settings.seed
    texts = [text for family in FAMILIES for task in TASKS for text in texts_of(family, task, size, seed)]
    tasks = [pair for task in TASKS for pair in labelled(task, size, seed)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.steps, pct_start=min(0.5, settings.warmup / settings.steps)
    )
    model.train()
    losses: list[float] = []
    for _ in (bar := tqdm(range(settings.steps), unit="step")):
        pairs = [corrupt(rng.choice(texts), rng) for _ in range(settings.batch // 2)]
        pairs += [rng.choice(tasks) for _ in range(settings.batch - len(pairs))]
        inputs = tokenizer([source for source, _ in pairs], padding=True, return_tensors="pt")
        labels = tokenizer([target for _, target in pairs], padding=True, return_tensors="pt")["input_ids"]
        labels[labels == tokenizer.pad_token_id] = -100
        loss = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / 50:.4f}")
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    final = sum(losses[-100:]) / len(losses[-100:])
    (folder / "README.md").write_text(
        f"# The embedded encoder-decoder\n\nA T5 of {model.num_parameters():,} parameters ({settings.layers} layers a side of "
        f"width {settings.width}), so that `recipes/t5_glue.py` has something to fine-tune where nothing can be downloaded. "
        "It knows the made-up sentences of `recipes/embedded/sentences.py` alone, and is of no use beyond this project.\n\n"
        f"Made by `cd recipes && python -m embedded.pretrain_t5`: {settings.steps} steps of {settings.batch} texts, AdamW, learning "
        f"rate {settings.lr}, seed {settings.seed}; mean loss of the last hundred steps {final:.3f}.\n"
    )
    return final


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    defaults = Pretraining()
    parser = argparse.ArgumentParser(description="Pre-train the embedded T5.")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"loss {pretrain(Pretraining(steps=options.steps), options.folder):.4f}")


if __name__ == "__main__":
    main()
