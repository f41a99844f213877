"""Makes the embedded base model: a tokenizer and a small Llama, pre-trained on the ``basic`` word problems.

The result is committed under ``recipes/embedded/model``, so nobody has to run this. To make it again::

    cd recipes && python -m embedded.pretrain

takes about ten minutes on two idle CPU cores. Every ``--checkpoint-every`` steps a checkpoint is written (to a
temporary file first, which then replaces the old one), and the same command continues from the last one: same
batches, same optimizer state, same weights as without the interruption.

The architecture is that of Llama 3.1 (grouped-query attention, RoPE with Llama 3 scaling, SwiGLU, RMSNorm) with
tied embeddings and fewer than two million parameters. Prompts are ``"Q: {question}\\nA: "``, followed by the
answer and an end-of-sequence token; the loss is on the answer, and a tenth as much on the question.
"""

from __future__ import annotations

import argparse
import math
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from embedded.descent import descend, save
from embedded.scoring import score
from embedded.word_problems import FAMILIES, generate
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
CHECKPOINT = FOLDER / "pretraining.pt"

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
CONTEXT = 1024

# A word takes the space behind it along and a digit stands alone. So every space is the end of a token, and a
# prompt that ends with one is cut into the same tokens whether or not the answer follows.
_PIECES = r"\p{N}|\p{L}+ ?|[^\p{L}\p{N}\s]+ ?|\s"


_README = """# The embedded base model

A Llama of {parameters:,} parameters, so that the recipes have something to fine-tune where nothing can be
downloaded. It knows no language: it was trained from scratch on made-up word problems only, and is of no use
beyond this project.

* Architecture of Llama 3.1: {layers} layers of width {hidden}, {heads} heads over {kv_heads} key-value heads, SwiGLU of
  width {intermediate}, RMSNorm, RoPE with Llama 3 scaling, tied embeddings, float32.
* Byte-level BPE of {tokens} tokens: it encodes any text, and every digit is a token of its own.
* Made by `cd recipes && python -m embedded.pretrain` from the family `basic` of `recipes/embedded/word_problems.py`:
  {steps} steps of {batch} problems, AdamW, learning rate {lr}, warmed up for {warmup} steps,
  cosine towards step {horizon}, cooled down over the last {cooldown} steps, seed {seed}.

Greedy answers to {problems} test problems of each family, none of which it was trained on:

| family | well formed | right |
|---|---|---|
{rows}
`composed` is the family that the recipes fine-tune it on.
"""


@dataclass(frozen=True)
class Pretraining:
    """Everything that decides what comes out.

    Data and learning rates are laid out up to ``horizon``; a run may end before that, at ``steps``, and what
    comes before its cool-down is the same whichever step it ends at.
    """

    steps: int = 4000
    horizon: int = 7000
    cooldown: int = 500
    batch: int = 32
    lr: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.05
    clip: float = 1.0
    question_weight: float = 0.1
    seed: int = 0
    vocabulary: int = 768
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384


def make_tokenizer(settings: Pretraining) -> PreTrainedTokenizerFast:
    """A byte-level BPE, which encodes any text, trained on both families."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    problems = generate("basic", "train", 5000, settings.seed) + generate("composed", "train", 5000, settings.seed)
    texts = (f"Q: {problem['question']}\nA: {problem['answer']}" for problem in problems)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=CONTEXT
    )


def make_model(settings: Pretraining, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama 3.1 of the settings' size."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        intermediate_size=settings.intermediate,
        max_position_embeddings=CONTEXT,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": CONTEXT // 8,
        },
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


@dataclass(frozen=True)
class Example:
    """A tokenized problem; the answer starts at ``prompt`` tokens."""

    tokens: list[int]
    prompt: int


def make_batches(settings: Pretraining, tokenizer: PreTrainedTokenizerFast) -> list[list[Example]]:
    """All batches up to the horizon, in order. A batch's examples are about equally long: little is padding."""
    problems = generate("basic", "train", settings.horizon * settings.batch, settings.seed)
    prompts = tokenizer([f"Q: {problem['question']}\nA: " for problem in problems])["input_ids"]
    answers = tokenizer([problem["answer"] for problem in problems])["input_ids"]
    examples = [
        Example([*prompt, *answer, tokenizer.eos_token_id], len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    batches = []
    for start in range(0, len(examples), window := 32 * settings.batch):
        ordered = sorted(examples[start : start + window], key=lambda example: len(example.tokens))
        batches += [ordered[i : i + settings.batch] for i in range(0, len(ordered), settings.batch)]
    random.Random(settings.seed).shuffle(batches)
    return batches


def batch_loss(model: LlamaForCausalLM, batch: Sequence[Example], settings: Pretraining) -> torch.Tensor:
    """The weighted mean loss of a batch. Padding is on the right, where causal attention never looks at it."""
    length = max(len(example.tokens) for example in batch)
    tokens = torch.zeros(len(batch), length, dtype=torch.long)
    weights = torch.zeros(len(batch), length)
    for row, example in enumerate(batch):
        end = len(example.tokens)
        tokens[row, :end] = torch.tensor(example.tokens)
        weights[row, :end] = 1.0
        weights[row, : example.prompt] = settings.question_weight
    logits = model(input_ids=tokens[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def learning_rate(step: int, settings: Pretraining) -> float:
    """Linear warm-up, a cosine that would reach zero at the horizon, and a cool-down to zero at the last step."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.horizon - settings.warmup)
    cooldown = min(1.0, (settings.steps - step) / settings.cooldown)
    return settings.lr * cooldown * 0.5 * (1.0 + math.cos(math.pi * done))


def save_checkpoint(
    path: Path, step: int, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, settings: Pretraining
) -> None:
    """Write the whole checkpoint beside ``path``, then put it there in one move."""
    state = {
        "step": step,
        "settings": asdict(settings),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, settings: Pretraining
) -> int:
    """Restore model and optimizer and return the number of steps done; 0 if there is no checkpoint.

    Raises:
        ValueError: if the checkpoint belongs to a run with other settings.
    """
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["settings"] != asdict(settings):
        raise ValueError(f"{path} belongs to a run with other settings; delete it or choose another --checkpoint")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def pretrain(
    settings: Pretraining, folder: Path = MODEL, checkpoint: Path = CHECKPOINT, checkpoint_every: int = 250
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train model and tokenizer and save both to ``folder``; continues from ``checkpoint`` if that exists."""
    tokenizer = make_tokenizer(settings)
    model = make_model(settings, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay, fused=True
    )
    done = load_checkpoint(checkpoint, model, optimizer, settings)
    batches = make_batches(settings, tokenizer)

    def loss_at(step: int) -> torch.Tensor:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        return batch_loss(model, batches[step], settings)

    for step, _ in descend(model, optimizer, loss_at, settings.steps, done, settings.clip):
        if (step + 1) % checkpoint_every == 0:
            save_checkpoint(checkpoint, step + 1, model, optimizer, settings)
    save(model, tokenizer, folder)
    checkpoint.unlink(missing_ok=True)
    return model, tokenizer


def of_width(hidden: int) -> dict[str, int]:
    """The settings of a model of another width: as many dimensions in a head, and the same shares of the width elsewhere.

    Raises:
        ValueError: it is no multiple of 64.
    """
    if hidden < 64 or hidden % 64:
        raise ValueError(f"--hidden is {hidden}: give a multiple of 64, so that heads of 32 share keys in pairs")
    return {"hidden": hidden, "heads": hidden // 32, "kv_heads": hidden // 64, "intermediate": 3 * hidden}


def write_readme(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Pretraining, problems: int
) -> None:
    """Measure the model on test problems of both families and write what it is beside it."""
    rows = []
    for family in FAMILIES:
        scores = score(model, tokenizer, generate(family, "test", problems))
        rows.append(f"| `{family}` | {scores.well_formed:.1%} | {scores.right:.1%} |\n")
    text = _README.format(
        parameters=model.num_parameters(),
        tokens=len(tokenizer),
        problems=problems,
        rows="".join(rows),
        **asdict(settings),
    )
    (folder / "README.md").write_text(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    defaults = Pretraining()
    parser = argparse.ArgumentParser(description="Pre-train the embedded base model.")
    parser.add_argument("--folder", type=Path, default=MODEL)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--checkpoint-every", type=int, default=250)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument(
        "--hidden",
        type=int,
        default=defaults.hidden,
        help="the model's width, a multiple of 64; heads and SwiGLU follow",
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    if options.hidden != defaults.hidden and MODEL in (options.folder, options.folder.resolve()):
        parser.error(f"--hidden {options.hidden} would replace the embedded model: give another --folder")
    try:
        width = of_width(options.hidden)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(options.threads)
    settings = Pretraining(steps=options.steps, batch=options.batch, lr=options.lr, seed=options.seed, **width)
    model, tokenizer = pretrain(settings, options.folder, options.checkpoint, options.checkpoint_every)
    write_readme(options.folder, model, tokenizer, settings, problems=500)


if __name__ == "__main__":
    main()
