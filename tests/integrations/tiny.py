"""A small Llama with LoRA, data that it can learn, and trainer arguments, for the tests of this folder."""

from __future__ import annotations

import random
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from tnadapt import MPO, TaylorRuntime

VOCABULARY = 40
STEPS = 8


def lora_config(**changes: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **changes})


def base_model(seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def lora_model(seed: int = 0, **changes: Any) -> PeftModel:
    return get_peft_model(base_model(seed), lora_config(**changes))


def lora_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def lora_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of everything that is trained, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def dataset(size: int = 48, length: int = 12) -> list[dict[str, Tensor]]:
    """Sequences in which the next token follows from the one before."""
    draw = random.Random(0)
    rows = []
    for _ in range(size):
        tokens = [draw.randrange(VOCABULARY)]
        while len(tokens) < length:
            tokens.append((3 * tokens[-1] + 1) % VOCABULARY)
        ids = torch.tensor(tokens)
        rows.append({"input_ids": ids, "labels": ids.clone()})
    return rows


def batch(size: int = 16) -> dict[str, Tensor]:
    rows = dataset()[:size]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@torch.no_grad()
def loss_of(model: torch.nn.Module) -> float:
    was_training = model.training
    model.eval()
    loss = float(model(**batch(48)).loss)
    model.train(was_training)
    return loss


def arguments(folder: object, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**{**settings, **changes})


def mpo() -> MPO:
    return MPO(order=4)


def rounds() -> TaylorRuntime:
    """Two of each group's matrices in two rounds: at steps 3 and 6."""
    return TaylorRuntime(top_n=2, split=2, every=3)


def tokenizer() -> Any:
    """What TRL asks for beside token ids that are made already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {str(k): k for k in range(40)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), pad_token="0", eos_token="1"
    )
