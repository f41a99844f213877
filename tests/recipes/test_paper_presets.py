"""The paper's presets without the paper's weights: models from their published configurations, on the meta device.

Expected values are those of LoRA-Over (arXiv:2605.16470): its tables of hyper-parameters, of tensor structures and of data, and
its section on the experimental set-up. They are written out here and not derived from the recipes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

from support import adapters
from support.methods import METHODS
from support.recipe import Recipe
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    PreTrainedConfig,
    T5Config,
)

from recipes import llama31_gsm8k, llama31_humaneval, llama31_mtbench, t5_glue
from tnadapt import TaylorRuntime, plan

#: config.json of meta-llama/Llama-3.1-8B, meta-llama/Llama-2-7b-hf and google-t5/t5-base, as far as it decides shapes.
PUBLISHED: dict[str, PreTrainedConfig] = {
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "meta-llama/Llama-2-7b-hf": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "google-t5/t5-base": T5Config(vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One column of the paper's tables."""

    recipe: Recipe
    preset: str
    model: str
    changes: dict[str, Any]
    # section "experimental set-up"
    length: int
    batch: int
    decay: float
    train: int
    # table of hyper-parameters: LR of "all", LR and core LR of MPO_P and MPO_R, split number, top-N, eval step
    all_lr: float
    lr: float
    core_lr: float
    split: int
    top_n: int
    every: int
    # table of structures
    order: int
    matrices: int
    per_group: int


def glue(task: str, train: int, split: int, every: int) -> Setting:
    # 12 layers of 4 attention and 2 feed-forward matrices, 12 of 8 and 2; A and B of each
    return Setting(
        t5_glue.RECIPE, "paper", "google-t5/t5-base", {"task": task}, 128, 32, 0.0, train,
        4.9e-4, 5e-4, 4.9e-4, split, 9, every, 16, 2 * 12 * (6 + 10), 12,
    )  # fmt: skip


LLAMA_31: tuple[Any, ...] = ("paper", "meta-llama/Llama-3.1-8B", {}, 512, 64, 5e-4)
LLAMA_2: tuple[Any, ...] = ("paper-llama2", "meta-llama/Llama-2-7b-hf", {}, 1024, 32, 0.0)
MATRICES_31, MATRICES_2 = 2 * 32 * 4, 2 * 32 * 7  # attention only; all linear layers
GSM8K, CODE, CHAT = llama31_gsm8k.RECIPE, llama31_humaneval.RECIPE, llama31_mtbench.RECIPE

SETTINGS = {
    "mnli": glue("mnli", 392_702, 5, 100),
    "sst2": glue("sst2", 67_349, 7, 50),
    "cola": glue("cola", 8_551, 8, 5),
    "qnli": glue("qnli", 104_743, 7, 80),
    "mrpc": glue("mrpc", 3_668, 8, 5),
    "gsm8k-3.1": Setting(GSM8K, *LLAMA_31, 100_000, 1.7e-4, 2e-4, 1.7e-4, 8, 30, 50, 10, MATRICES_31, 32),
    "mtbench-3.1": Setting(CHAT, *LLAMA_31, 52_000, 1.7e-4, 2e-4, 1.7e-4, 6, 30, 50, 10, MATRICES_31, 32),
    "humaneval-3.1": Setting(CODE, *LLAMA_31, 100_000, 7e-5, 1e-4, 7e-5, 4, 28, 50, 8, MATRICES_31, 32),
    "gsm8k-2": Setting(GSM8K, *LLAMA_2, 100_000, 9.3e-5, 1e-4, 9.3e-5, 8, 30, 50, 9, MATRICES_2, 32),
    "mtbench-2": Setting(CHAT, *LLAMA_2, 52_000, 9.3e-5, 1e-4, 9.3e-5, 6, 30, 50, 9, MATRICES_2, 32),
    "humaneval-2": Setting(CODE, *LLAMA_2, 100_000, 1.1e-4, 1.2e-4, 1.1e-4, 8, 30, 50, 9, MATRICES_2, 32),
}
each_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The presets of Llama are refused without one; nothing here computes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def resolved(setting: Setting, method: str) -> Any:
    config = dataclasses.replace(setting.recipe.presets[setting.preset], method=method, **setting.changes)
    return setting.recipe.resolve(config)


def on_meta(setting: Setting, config: Any) -> Any:
    """The published model with LoRA, without weights."""
    published = PUBLISHED[setting.model]
    kind = AutoModelForSeq2SeqLM if published.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(published)
        return peft.get_peft_model(model, adapters.adapter_config(METHODS[config.method], config, 100, model))


@each_setting
def test_hyper_parameters_are_the_papers(setting: Setting) -> None:
    for method in ("lora-over-svd", "lora-over-mpo"):
        config = resolved(setting, method)
        assert (config.lr, config.core_lr) == (setting.all_lr, None)
    for method in ("lora-over-mpo-p", "lora-over-mpo-r"):
        config = resolved(setting, method)
        assert (config.lr, config.core_lr) == (setting.lr, setting.core_lr)
    assert (config.model, config.max_length, config.batch, config.weight_decay) == (
        setting.model, setting.length, setting.batch, setting.decay,
    )  # fmt: skip
    assert (config.train_size, config.epochs, config.rank, config.alpha) == (setting.train, 1, 8, 16)
    assert (config.split, config.top_n, config.every, config.order) == (
        setting.split, setting.top_n, setting.every, setting.order,
    )  # fmt: skip
    if setting.model != "google-t5/t5-base":
        assert (config.temperature, config.top_p) == (0.8, 0.95)


#: Rows x columns of a matrix -> row and column modes of its first and last site ("structures used"); A has them exchanged.
ENDS = {
    (768, 8): ((24, 2), (32, 4)),
    (3072, 8): ((48, 2), (64, 4)),
    (4096, 8): ((64, 2), (64, 4)),
    (11008, 8): ((86, 2), (128, 4)),
    (1024, 8): ((32, 2), (32, 4)),
    (14336, 8): ((112, 2), (128, 4)),
}


@pytest.mark.parametrize("name", ["mrpc", "gsm8k-3.1", "humaneval-3.1", "gsm8k-2"])
@pytest.mark.parametrize("method", ["lora-over-svd", "lora-over-mpo-r"])
def test_plan_and_rounds_are_the_papers(name: str, method: str) -> None:
    setting = SETTINGS[name]
    config = resolved(setting, method)
    model = on_meta(setting, config)
    over = METHODS[method].over
    assert over is not None
    factorization = over.make_factorization(config)
    runtime = method == "lora-over-mpo-r"
    planned = plan(model, factorization, top_n=config.top_n if runtime else None)
    groups: dict[str, int] = {}
    for row in planned.rows:
        groups[row.group] = groups.get(row.group, 0) + row.count
        assert row.expanded == (setting.top_n if runtime else row.count)
        rows, columns = row.structure.shape
        sites = row.structure.sites
        assert len(sites) == (setting.order if runtime else 2)
        first, last = ENDS[max(rows, columns), min(rows, columns)]
        if rows < columns:
            first, last = first[::-1], last[::-1]
        assert (sites[0], sites[-1]) == (first, last)
        assert all(site == (1, 1) for site in sites[1:-1])
    assert sum(groups.values()) == setting.matrices
    assert set(groups.values()) == {setting.per_group}


#: The prompts of one known record, written out from LoRA-GA's code for the Llamas and from T5's paper (appendix D) for GLUE.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


def test_prompts_are_those_of_the_set_up() -> None:
    assert GSM8K.prompt({"question": "How many?"}) == "Q: How many?\nA: "
    row = {"query": "Add.", "answer": "Thus:\n```python\na + b\n```\nDone."}
    example = llama31_humaneval.prompts.codefeedback(row)
    assert example is not None
    assert CODE.prompt(example._asdict()) == ALPACA.format("Add.")
    assert CODE.answer(example._asdict()) == "Thus:\n```python\na + b\n```"
    example = llama31_mtbench.prompts.wizardlm({"instruction": "Sing.", "output": "La."})
    assert example is not None
    assert CHAT.prompt(example._asdict()) == ALPACA.format("Sing.")
    record = {"sentence1": "A b.", "sentence2": "B a.", "label": 1, "task": "mrpc"}
    assert SETTINGS["mrpc"].recipe.prompt(record) == "mrpc sentence1: A b. sentence2: B a."
    assert SETTINGS["mrpc"].recipe.answer(record) == "equivalent"


@each_setting
def test_rounds_end_before_training_does(setting: Setting) -> None:
    """The last round of MPO_R comes while there is something left to train, in one epoch of the setting's data."""
    config = resolved(setting, "lora-over-mpo-r")
    assert config.split * config.every < -(-setting.train // setting.batch)
    over = METHODS["lora-over-mpo-r"].over
    assert over is not None
    scheduler = over.make_scheduler(config)
    assert isinstance(scheduler, TaylorRuntime)
    assert (scheduler.top_n, scheduler.split, scheduler.every) == (setting.top_n, setting.split, setting.every)
