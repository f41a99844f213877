"""The runner of PEFT's method comparison on MetaMathQA: its protocol, its answers, and the files that its board reads.

The source of every expected value is ``method_comparison/MetaMathQA`` of huggingface/peft at commit 5d602fdb (August 2026); the
file is named with each.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rich")

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from support.board import data, record
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import peft_board

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

#: default_training_params.json, save what the runner itself says of its optimizer.
DEFAULT_TRAINING_PARAMS = {
    "model_id": "meta-llama/Llama-3.2-3B",
    "dtype": "bfloat16",
    "max_seq_length": 768,
    "batch_size": 4,
    "batch_size_eval": 50,
    "max_steps": 5000,
    "eval_steps": 250,
    "compile": False,
    "use_gc": False,
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine",
    "use_amp": False,
    "autocast_adapter_dtype": True,
    "attn_implementation": None,
    "generation_kwargs": {"max_length": 800, "max_new_tokens": 300},
    "query_template": "Question: {query} Think step by step.\nAnswer:",
    "init_kv_cache_prefix": None,
}
#: experiments/lora/llama-3.2-3B-rank32/adapter_config.json and the targets in results/lora--llama-3.2-3B-rank32.json.
ADAPTER = {"rank": 32, "alpha": 64, "targets": "q_proj,v_proj"}
#: data.py: CHAR_LIMIT, VALID_SIZE, get_wiki_small; run.py: BUCKET_FACTOR, max_length of the texts; utils.py: WARMUP_STEP_RATIO.
CHAR_LIMIT, VALID_SIZE, TEXTS, BUCKET_FACTOR, WARMUP_STEP_RATIO = 1300, 50, 100, 20, 0.1

#: The fields of results/lora--llama-3.2-3B-rank32.json with the types of their values, and peft_worktree_is_dirty, which
#: log_results in utils.py writes since. "…" stands for any content of that type.
PERIODIC = {
    **{"step": int, "train samples": int},
    **dict.fromkeys(
        (
            "valid accuracy",
            "train loss",
            "train time",
            "eval time",
            "tokens / sec",
            "mem allocated avg",
            "mem reserved avg",
        ),
        float,
    ),
    "elapsed time": float,
}
FINAL = {
    **{"step": int, "train samples": int, "train total tokens": int},
    **{"test accuracy": float, "train loss": float, "forgetting": float},
}
KNOWN_FROM_THE_HUB = {"sha", "created_at"}
SCHEMA: dict[str, Any] = {
    "run_info": {
        *("created_at", "total_time", "experiment_name", "peft_branch", "peft_worktree_is_dirty"),
        *("train_config", "peft_config", "error_msg"),
    },
    "train_info": {
        *(
            "accelerator_memory_reserved_avg",
            "accelerator_memory_max",
            "accelerator_memory_reserved_99th",
            "train_time",
        ),
        *("file_size", "num_trainable_params", "num_total_params", "status", "metrics"),
    },
    "meta_info": {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"},
}
PACKAGES = {
    f"{package}-{what}"
    for package in ("transformers", "peft", "datasets", "bitsandbytes", "torch")
    for what in ("version", "commit-hash")
}
SYSTEM = {"system", "release", "version", "machine", "processor", "accelerator"}

TINY: dict[str, Any] = {
    **{"max_steps": 4, "eval_every": 2, "batch": 2, "valid_size": 2, "eval_size": 3, "texts_size": 3},
    **{"max_new_tokens": 3, "rank": 4, "alpha": 8, "order": 4, "top_n": 1, "split": 1, "every": 1},
}


def tiny(model: str, **changes: Any) -> peft_board.Board:
    return dataclasses.replace(peft_board.PRESETS["laptop"], **{**TINY, "model": model, **changes})


def test_the_settings_are_the_boards() -> None:
    config = peft_board.PRESETS["board"]
    assert peft_board.train_config(config) == DEFAULT_TRAINING_PARAMS
    assert {name: getattr(config, name) for name in ADAPTER} == ADAPTER
    assert (data.LONGEST, data.BUCKET, peft_board.WARM_UP) == (CHAR_LIMIT, BUCKET_FACTOR, WARMUP_STEP_RATIO)
    assert (config.valid_size, config.texts_size, config.eval_size) == (VALID_SIZE, TEXTS, 1319)
    assert (config.data, config.test_data) == ("meta-math/MetaMathQA", "openai/gsm8k")
    assert config.texts == "HuggingFaceFW/finewiki"


@pytest.mark.parametrize("method", ["lora", "lora-over-mpo-r"])
def test_a_run_leaves_a_file_with_the_boards_fields_and_an_adapter(
    tmp_path: Path, tiny_model: str, method: str
) -> None:
    config = tiny(tiny_model, method=method)
    result = peft_board.run(config, tmp_path, f"{method}/tiny")
    path = tmp_path / "results" / f"{method}--tiny.json"
    assert result.pop("path") == str(path)
    found = json.loads(path.read_text())
    assert found == json.loads(json.dumps(result))
    assert found.keys() == SCHEMA.keys()
    assert {name: {*found[name]} for name in SCHEMA} == SCHEMA
    run, train, meta = (found[name] for name in SCHEMA)
    assert run["train_config"].keys() == DEFAULT_TRAINING_PARAMS.keys()
    assert (run["peft_config"]["peft_type"], run["peft_config"]["r"]) == ("LORA", 4)
    assert sorted(run["peft_config"]["target_modules"]) == ["q_proj", "v_proj"]
    assert (run["error_msg"], train["status"]) == ("", "success")
    *periodic, final = train["metrics"]
    assert [{name: type(value) for name, value in each.items()} for each in periodic] == [PERIODIC] * 2
    assert {name: type(value) for name, value in final.items()} == FINAL
    assert [(each["step"], each["train samples"]) for each in train["metrics"]] == [(2, 4), (4, 8), (4, 8)]
    assert {*meta["model_info"]} == KNOWN_FROM_THE_HUB
    assert {name: {*each} for name, each in meta["dataset_info"].items()} == dict.fromkeys(
        ("metamath", "gsm8k"), KNOWN_FROM_THE_HUB
    )
    assert ({*meta["package_info"]}, {*meta["system_info"]}) == (PACKAGES, SYSTEM)
    adapter = tmp_path / "adapters" / method / "tiny"
    assert train["file_size"] == (adapter / "adapter_model.safetensors").stat().st_size
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = sum(p.numel() for name, p in PeftModel.from_pretrained(base, adapter).named_parameters() if "lora_" in name)
    if method == "lora":
        assert train["num_trainable_params"] == plain
        assert run["train_config"]["optimizer_type"] == "AdamW"
    else:
        assert train["num_trainable_params"] > plain, "cores are trained too"
        assert run["train_config"]["optimizer_kwargs"]["lora_over"]["scheduler"]


def test_what_is_forgotten_is_the_change_of_the_loss_on_texts(tmp_path: Path, tiny_model: str) -> None:
    result = peft_board.run(tiny(tiny_model, method="lora"), tmp_path, "lora/tiny")
    tokenizer, base = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)

    def loss(model: Any) -> float:
        losses: list[float] = []
        for text in data.texts("embedded", 3):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                losses += [float(model(input_ids=ids, labels=ids).loss)] * (ids.shape[1] - 1)
        return float(np.mean(losses))

    before = loss(base)
    after = loss(PeftModel.from_pretrained(base, tmp_path / "adapters" / "lora" / "tiny"))
    assert after != before
    assert result["train_info"]["metrics"][-1]["forgetting"] == pytest.approx(after - before, abs=1e-5)


def test_a_run_that_breaks_keeps_its_file_apart_with_the_error(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> float:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(peft_board, "accuracy", breaks)
    options = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    options += ["--model", tiny_model, "--runs", str(tmp_path), "--name", "a/b"]
    with pytest.raises(SystemExit, match="1"):
        peft_board.main(["--preset", "laptop", *options])
    assert not (tmp_path / "results").exists()
    (path,) = (tmp_path / "cancelled_results").glob("a--b--*.json")
    found = json.loads(path.read_text())
    assert (found["train_info"]["status"], found["run_info"]["error_msg"]) == ("canceled", "no memory left")
    assert {name: {*found[name]} for name in SCHEMA} == SCHEMA


# -- data -------------------------------------------------------------------------------------------------------------


def test_batches_are_bucketed_and_labels_end_behind_the_first_padding(tiny_model: str) -> None:
    """run.py and BucketIterator in utils.py: buckets of 20 batches in the data's order, sorted from long to short."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    rows = data.training_rows("embedded", 100)[:100]
    texts = [f"Question: {row['query']} Think step by step.\nAnswer:{row['response']}" for row in rows]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    cut = sorted(lengths)[-3]
    made = [*data.batches(tokenizer, rows, 2, cut)]
    sizes = [batch["attention_mask"].sum(1).tolist() for batch in made]
    for start in (0, 40, 80):
        bucket = [length for batch in sizes[start // 2 : start // 2 + 20] for length in batch]
        assert bucket == sorted((min(length, cut) for length in lengths[start : start + 40]), reverse=True)
    for batch in made:
        for ids, labels, length in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"].sum(1), strict=True
        ):
            assert labels[: length + 1].tolist() == ids[: length + 1].tolist()
            assert (ids[length:] == tokenizer.eos_token_id).all()
            assert (labels[length + 1 :] == -100).all()


def test_long_examples_are_left_out_by_characters(tmp_path: Path) -> None:
    """get_filtered_dataset in data.py: query, a space and response have at most 1300 characters."""
    rows = [{"query": "q" * 300, "response": "r" * length} for length in (999, 1000, 998)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [len(row["response"]) for row in data.training_rows(str(tmp_path), 2)] == [999, 998]
    with pytest.raises(
        ValueError, match=r"has 2 examples of at most 1300 characters; --batch times --max-steps needs 3"
    ):
        data.training_rows(str(tmp_path), 3)


def test_validation_problems_are_drawn_as_the_board_draws_them(tmp_path: Path) -> None:
    """get_train_valid_test_datasets in data.py: numpy's global generator with seed 0 shuffles the indices."""
    rows = [{"question": str(number), "answer": f"#### {number}"} for number in range(200)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.random.seed(0)  # noqa: NPY002
    indices = np.arange(200)
    np.random.shuffle(indices)  # noqa: NPY002
    found = data.validation_problems(str(tmp_path), 50)
    assert [int(each["question"]) for each in found] == indices[:50].tolist()
    with pytest.raises(ValueError, match=r"has no test\.jsonl with question, answer"):
        data.problems(str(tmp_path), "test")


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("... = 16.The answer is: 16", "16"),
        ("#### 5\nThe answer is: $7.", "7"),
        ("The answer is 1. The answer is: 2\n\nQuestion: more", "2"),
        ("The final answer is 50%!", "50"),
        ("so 3\n#### 12\nmore #### 13", "13"),
        ("It is 12.", None),
        ("The answer is:", None),
    ],
)
def test_which_answer_a_text_ends_in(text: str, answer: str | None) -> None:
    """parse_answer in utils.py."""
    assert data.final_answer(text) == answer


@given(st.integers(-(10**6), 10**6), st.integers(1, 999))
def test_numbers_are_compared_by_their_value(numerator: int, denominator: int) -> None:
    """convert_to_decimal and get_accuracy in utils.py: fractions, decimals and integers, as floats."""
    reference = f"Thus.\n#### {numerator}"
    assert data.is_right(f"The answer is: {numerator}.00", reference)
    assert data.is_right(f"The answer is: {numerator * denominator}/{denominator}", reference)
    assert not data.is_right(f"The answer is: {numerator + 1}", reference)
    assert not data.is_right(f"It is {numerator}", reference), "without a mark there is no answer"


def test_what_is_no_number_is_compared_as_it_stands() -> None:
    assert data.is_right("The answer is: x + 1", "#### x + 1")
    assert not data.is_right("The answer is: 1/0", "#### 1")
    assert not data.is_right("The answer is: 1/2/3", "#### 1")
    with pytest.raises(ValueError, match="should end in '#### number'"):
        data.is_right("The answer is: 1", "1")


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "pissa"], "invalid choice: 'pissa'"),
        (["--max-steps", "0"], "--max-steps is 0: give a whole number of at least 1"),
        (["--eval-every", "101"], "--eval-every is 101: give at most --max-steps, which is 100"),
        (["--name", "variant"], "--name is 'variant': the board's names read method/variant"),
        (["--data", "./nowhere"], "--data is './nowhere': there is no such folder or file"),
        (["--quantize", "4bit"], "unrecognized arguments: --quantize"),
    ],
)
def test_what_cannot_work_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        peft_board.main(["--preset", "laptop", "--runs", str(tmp_path / "runs"), *options])
    said = capsys.readouterr().err
    assert (stopped.value.code, said.count("\n")) == (2, 1)
    assert message in said
    assert not (tmp_path / "runs").exists()


def test_a_released_package_has_no_commit() -> None:
    assert record.checkout_of("torch") is None
    assert record.checkout_of("no_such_package") is None
