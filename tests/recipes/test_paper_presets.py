"""The paper's presets without the paper's weights: models from their published configurations, on the meta device.

Expected values are those of LoRA-Over (arXiv:2605.16470): its tables of hyper-parameters, of tensor structures and of data, and
its section on the experimental set-up. They are written out here and not derived from the recipes.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache
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


def glue(task: str, train: int, split: int, every: int) -> Setting:
    return Setting(
        t5_glue.RECIPE, "paper", "google-t5/t5-base", {"task": task}, 128, 32, 0.0, train,
        4.9e-4, 5e-4, 4.9e-4, split, 9, every, 16,
    )  # fmt: skip


LLAMA_31: tuple[Any, ...] = ("paper", "meta-llama/Llama-3.1-8B", {}, 512, 64, 5e-4)
LLAMA_2: tuple[Any, ...] = ("paper-llama2", "meta-llama/Llama-2-7b-hf", {}, 1024, 32, 0.0)
GSM8K, CODE, CHAT = llama31_gsm8k.RECIPE, llama31_humaneval.RECIPE, llama31_mtbench.RECIPE

SETTINGS = {
    "mnli": glue("mnli", 392_702, 5, 100),
    "sst2": glue("sst2", 67_349, 7, 50),
    "cola": glue("cola", 8_551, 8, 5),
    "qnli": glue("qnli", 104_743, 7, 80),
    "mrpc": glue("mrpc", 3_668, 8, 5),
    "gsm8k-3.1": Setting(GSM8K, *LLAMA_31, 100_000, 1.7e-4, 2e-4, 1.7e-4, 8, 30, 50, 10),
    "mtbench-3.1": Setting(CHAT, *LLAMA_31, 52_000, 1.7e-4, 2e-4, 1.7e-4, 6, 30, 50, 10),
    "humaneval-3.1": Setting(CODE, *LLAMA_31, 100_000, 7e-5, 1e-4, 7e-5, 4, 28, 50, 8),
    "gsm8k-2": Setting(GSM8K, *LLAMA_2, 100_000, 9.3e-5, 1e-4, 9.3e-5, 8, 30, 50, 9),
    "mtbench-2": Setting(CHAT, *LLAMA_2, 52_000, 9.3e-5, 1e-4, 9.3e-5, 6, 30, 50, 9),
    "humaneval-2": Setting(CODE, *LLAMA_2, 100_000, 1.1e-4, 1.2e-4, 1.1e-4, 8, 30, 50, 9),
}
each_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The presets of Llama are refused without one; nothing here computes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def resolved(setting: Setting, method: str) -> Any:
    config = dataclasses.replace(setting.recipe.presets[setting.preset], method=method, **setting.changes)
    return setting.recipe.resolve(config)


@cache
def adapted(model: str, targets: str) -> Any:
    """The published model with LoRA of rank 8 on the paper's layers, without weights."""
    published = PUBLISHED[model]
    kind = AutoModelForSeq2SeqLM if published.is_encoder_decoder else AutoModelForCausalLM
    recipe, preset = (t5_glue.RECIPE, "paper") if published.is_encoder_decoder else (GSM8K, "paper")
    config = dataclasses.replace(recipe.presets[preset], model=model, targets=targets)
    with torch.device("meta"):
        made = kind.from_config(published)
        return peft.get_peft_model(made, adapters.adapter_config(METHODS["lora"], config, 100, made))


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


#: Others' LoRA, with the rate tuned: LoRA-One (ICML 2025), section 6.2, and AltLoRA, table 4.
TUNED_ELSEWHERE = {
    "gsm8k-2": ("59.3", "60.4", "LoRA-One"),
    "mrpc": ("86.03", "88.30", "AltLoRA"),
    **dict.fromkeys(("mnli", "sst2", "cola", "qnli"), ("87.88 over five tasks", "88.30", "AltLoRA")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_others_tuned_lora_stands_beside_the_papers_where_it_is_known(name: str) -> None:
    setting = SETTINGS[name]
    found = setting.recipe.elsewhere(resolved(setting, "lora-over-mpo-r"))
    if name not in TUNED_ELSEWHERE:
        assert not found
        return
    (other,) = found
    figure, rival, source = TUNED_ELSEWHERE[name]
    assert (other.figure, other.source.partition(",")[0]) == (figure, source)
    assert rival in other.rival


#: Rows x columns of a matrix -> row and column modes of its first and last site ("structures used"); A has them exchanged.
ENDS = {
    (768, 8): ((24, 2), (32, 4)),
    (3072, 8): ((48, 2), (64, 4)),
    (4096, 8): ((64, 2), (64, 4)),
    (11008, 8): ((86, 2), (128, 4)),
    (1024, 8): ((32, 2), (32, 4)),
    (14336, 8): ((112, 2), (128, 4)),
}


ATTENTION = {f"model.layers.*.self_attn.{side}_proj": 32 for side in "qkvo"}
T5_LAYERS = {
    **{f"encoder.block.*.layer.*.SelfAttention.{side}": 12 for side in "qkvo"},
    **{f"encoder.block.*.layer.*.DenseReluDense.{side}": 12 for side in ("wi", "wo")},
    **{
        f"decoder.block.*.layer.*.{kind}.{side}": 12 for kind in ("SelfAttention", "EncDecAttention") for side in "qkvo"
    },
    **{f"decoder.block.*.layer.*.DenseReluDense.{side}": 12 for side in ("wi", "wo")},
}
#: The groups that are ranked for themselves and the layers in each ("grouped by module"; T5's cross-attention is a group of its own).
GROUPS = {
    "google-t5/t5-base": T5_LAYERS,
    "meta-llama/Llama-3.1-8B": ATTENTION,
    "meta-llama/Llama-2-7b-hf": {
        **ATTENTION,
        **{f"model.layers.*.mlp.{side}_proj": 32 for side in ("gate", "up", "down")},
    },
}


def core_numbers(sites: list[tuple[int, int]]) -> int:
    """The parameters of a full MPO: the sum of i_k j_k d_(k-1) d_k, with the bonds of the paper's Eq. 4."""
    sizes = [rows * columns for rows, columns in sites]
    bonds = [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(len(sizes) + 1)]
    return sum(size * bonds[k] * bonds[k + 1] for k, size in enumerate(sizes))


@each_setting
@pytest.mark.parametrize("method", ["lora-over-svd", "lora-over-mpo", "lora-over-mpo-p", "lora-over-mpo-r"])
def test_structures_groups_and_parameters_are_the_papers(setting: Setting, method: str) -> None:
    config = resolved(setting, method)
    over = METHODS[method].over
    assert over is not None
    chosen = setting.top_n if over.choice != "all" else None
    planned = plan(adapted(setting.model, config.targets), over.make_factorization(config), top_n=chosen)
    groups: dict[str, int] = {}
    trained = 0
    for row in planned.rows:
        groups[row.group] = groups.get(row.group, 0) + row.count
        assert row.expanded == (chosen or row.count)
        rows, columns = row.structure.shape
        first, last = ENDS[max(rows, columns), min(rows, columns)]
        if rows < columns:
            first, last = first[::-1], last[::-1]
        sites = [first, *[(1, 1)] * ((setting.order if method != "lora-over-svd" else 2) - 2), last]
        assert list(row.structure.sites) == sites
        trained += row.expanded * core_numbers(sites) + (row.count - row.expanded) * rows * columns
    expected = GROUPS[setting.model]
    assert groups == {f"{group}.{side}": layers for group, layers in expected.items() for side in "AB"}
    assert planned.trained_parameters == trained


@each_setting
def test_rounds_are_the_papers_and_end_before_training_does(setting: Setting) -> None:
    """The last round of MPO_R comes while there is something left to train, in one epoch of the setting's data."""
    config = resolved(setting, "lora-over-mpo-r")
    over = METHODS["lora-over-mpo-r"].over
    assert over is not None
    scheduler = over.make_scheduler(config, -(-setting.train // setting.batch))
    assert isinstance(scheduler, TaylorRuntime)
    assert (scheduler.top_n, scheduler.split, scheduler.every) == (setting.top_n, setting.split, setting.every)
    assert setting.split * setting.every < -(-setting.train // setting.batch)


#: The prompts of one known record, written out from LoRA-GA's code for the Llamas and from T5's paper (appendix D) for GLUE.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


ADD = "Add two numbers."
BLOCK = "```python\na + b\n```"
SIGNATURE = "def add(a, b):\n"
#: Setting -> what a recipe makes of one known training record, and what the model is asked in evaluation.
PROMPTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "mnli": ({"premise": "P.", "hypothesis": "H.", "label": 2}, "mnli hypothesis: H. premise: P.", "contradiction"),
    "sst2": ({"sentence": "fine", "label": 1}, "sst2 sentence: fine", "positive"),
    "cola": ({"sentence": "He go.", "label": 0}, "cola sentence: He go.", "unacceptable"),
    "qnli": ({"question": "Q?", "sentence": "S.", "label": 0}, "qnli question: Q? sentence: S.", "entailment"),
    "mrpc": ({"sentence1": "A.", "sentence2": "B.", "label": 1}, "mrpc sentence1: A. sentence2: B.", "equivalent"),
    "gsm8k-3.1": ({"question": "How many?", "answer": "1 + 1 = 2\n#### 2"}, "Q: How many?\nA: ", "1 + 1 = 2\n#### 2"),
    "humaneval-3.1": ({"query": ADD, "answer": f"Thus:\n{BLOCK}\nDone."}, ALPACA.format(ADD), f"Thus:\n{BLOCK}"),
    "mtbench-3.1": ({"instruction": "Sing.", "output": "La."}, ALPACA.format("Sing."), "La."),
}
PROMPTS |= {name.replace("3.1", "2"): known for name, known in PROMPTS.items()}
MADE_FROM_ROWS: dict[str, Any] = {
    CODE.name: llama31_humaneval.prompts.codefeedback,
    CHAT.name: llama31_mtbench.prompts.wizardlm,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_prompts_are_those_of_the_set_up(name: str) -> None:
    setting, (row, prompt, answer) = SETTINGS[name], PROMPTS[name]
    made = MADE_FROM_ROWS.get(setting.recipe.name)
    record = {**(made(row)._asdict() if made else row), **setting.changes}
    assert (setting.recipe.prompt(record), setting.recipe.answer(record)) == (prompt, answer)


def test_questions_of_the_benchmarks_are_asked_in_the_form_of_training() -> None:
    asked = llama31_humaneval.prompts.humaneval_prompt({"prompt": SIGNATURE})
    head, tail = ALPACA.format("\0").split("\0")
    assert asked.startswith(head + "Complete the following Python code: \n")
    assert asked.endswith(f"code:\n```python\n{SIGNATURE}\n```{tail}```python\n")
    ask = llama31_mtbench.prompts.mt_bench_prompt
    assert ask(["Sing."]) == ALPACA.format("Sing.")
    assert (
        ask(["Sing.", "La.", "Again."]) == f"{ALPACA.format('Sing.')}La.\n\n### Instruction:\nAgain.\n\n### Response:\n"
    )
