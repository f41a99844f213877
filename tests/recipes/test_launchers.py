"""Recipes on two ranks, however they are started: what one process trains, written once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import psutil
import torch
from safetensors.torch import load_file
from support import running, training
from support.training import Training
from transformers import AutoTokenizer

from recipes import llama31_gsm8k as recipe
from tnadapt import LoraOver

ROOT = Path(__file__).parents[2]
RECIPE, AS_ON_GPUS = str(ROOT / "recipes" / "llama31_gsm8k.py"), str(ROOT / "tests" / "recipes" / "as_on_gpus.py")
OPTIONS = [
    *("--method", "lora-over-mpo-r", "--lr", "1e-2", "--every", "1", "--train-size", "64", "--eval-size", "4"),
    *("--batch", "4", "--micro-batch", "2", "--max-new-tokens", "4", "--max-steps", "4"),
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
WRAP = [
    "--fsdp_auto_wrap_policy",
    "TRANSFORMER_BASED_WRAP",
    "--fsdp_transformer_layer_cls_to_wrap",
    "LlamaDecoderLayer",
]
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

#: command up to the recipe's options, environment
LAUNCHERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "torchrun, DDP": ([*TORCHRUN, RECIPE], {}),
    "torchrun, FSDP2": ([*TORCHRUN, AS_ON_GPUS, "llama31_gsm8k"], SHARDED),
    "accelerate, DDP": ([*ACCELERATE, "--multi_gpu", RECIPE], {}),
    "accelerate, FSDP2": ([*ACCELERATE, "--use_fsdp", "--fsdp_version", "2", *WRAP, AS_ON_GPUS, "llama31_gsm8k"], {}),
    "Ray Train, DDP": ([sys.executable, str(ROOT / "recipes" / "on_ray.py"), "--ranks", "2", RECIPE], {}),
}


def environment(**changes: str) -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed, **changes}


def started(command: list[str], folder: Path, changes: dict[str, str], *options: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    words = [*command, *OPTIONS, "--runs", str(folder / "runs"), *options]
    return subprocess.Popen(
        words,
        cwd=folder,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(command: list[str], folder: Path, changes: dict[str, str], *options: str) -> str:
    process = started(command, folder, changes, *options)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said[-4000:]
    return said


def result_of(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], set[str]]:
    """The result, the adapter, and the names of all files; there is one run, and nothing of it is left unfinished."""
    (file,) = (folder / "runs").glob("*/result.json")
    assert not list((folder / "runs" / "unfinished").iterdir())
    files = {str(path.relative_to(file.parent)) for path in file.parent.rglob("*")}
    return json.loads(file.read_text()), load_file(file.parent / "adapter" / "adapter_model.safetensors"), files


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, torch.Tensor], set[str]]:
    folder = tmp_path_factory.mktemp("alone")
    finished([sys.executable, RECIPE], folder, {})
    return result_of(folder)


DEALT_OUT = [pytest.param(how, ("--shard",), id=f"{how}, cores dealt out") for how in LAUNCHERS if "torchrun" in how]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "options"), [*(pytest.param(how, (), id=how) for how in LAUNCHERS), *DEALT_OUT])
def test_two_ranks_train_what_one_process_trains_and_write_it_once(
    how: str, options: tuple[str, ...], alone: Any, tmp_path: Path
) -> None:
    if "Ray" in how:
        pytest.importorskip("ray")
    said = finished(*_placed(how, tmp_path), *options)
    result, adapter, files = result_of(tmp_path)
    first, first_adapter, first_files = alone
    assert (result["environment"]["ranks"], first["environment"]["ranks"]) == (2, 1)
    assert files == first_files
    assert [step for step, _ in result["curve"]] == [1, 2, 3, 4]
    assert [loss for _, loss in result["curve"]] == pytest.approx([loss for _, loss in first["curve"]], rel=1e-4)
    assert result["metrics"]["tokens"] == first["metrics"]["tokens"]
    assert [m["expanded_at"] for m in result["matrices"]] == [m["expanded_at"] for m in first["matrices"]]
    assert adapter.keys() == first_adapter.keys()
    for name, value in adapter.items():
        torch.testing.assert_close(value, first_adapter[name], rtol=1e-2, atol=1e-4)
    assert said.count("comparison: ") == 1
    assert said.count("parameters in the matrices, ") == 1


def _placed(how: str, folder: Path) -> tuple[list[str], Path, dict[str, str]]:
    command, changes = LAUNCHERS[how]
    return command, folder, changes


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torchrun, DDP", "torchrun, FSDP2"])
def test_a_base_of_four_bits(how: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    one, two = tmp_path / "one", tmp_path / "two"
    finished([sys.executable, RECIPE], one, {}, "--quantize", "4bit")
    finished(*_placed(how, two), "--quantize", "4bit")
    (first, first_adapter, _), (result, adapter, _) = result_of(one), result_of(two)
    assert [loss for _, loss in result["curve"]] == pytest.approx([loss for _, loss in first["curve"]], rel=1e-3)
    for name, value in adapter.items():
        torch.testing.assert_close(value, first_adapter[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", ["full", "pissa", "lora-ga", "alpha-lora", "tt-lora", "lokr"])
def test_methods_that_need_the_numbers_of_the_base(method: str) -> None:
    config = recipe.Config(method=method, quantize="4bit", lr=1e-3)
    with pytest.raises(ValueError, match=f"--quantize is 4bit, and --method is {method}"):
        config.check()
    recipe.Config(method="lora-over-mpo-r", quantize="4bit").check()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "options"), [("torchrun, DDP", ()), ("torchrun, FSDP2", ()), *DEALT_OUT])
def test_ranks_that_are_killed_go_on_to_the_same_bits(how: str, options: tuple[str, ...], tmp_path: Path) -> None:
    longer = ("--max-steps", "12", "--save-every", "2", "--resume", *options)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finished(*_placed(how, whole), *longer)
    process = started(*_placed(how, broken), *longer)
    deadline = time.monotonic() + 400
    while not list(broken.glob("runs/unfinished/*/checkpoints/checkpoint-4/trainer_state.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.05)
    # the ranks are sessions of their own, which outlive their launcher
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.communicate()
    assert not list(broken.glob("runs/*/result.json"))
    finished(*_placed(how, broken), *longer)
    (first, first_adapter, _), (result, adapter, _) = result_of(whole), result_of(broken)
    assert result["curve"] == first["curve"]
    assert all(torch.equal(value, first_adapter[name]) for name, value in adapter.items())


@pytest.mark.slow
def test_what_cannot_work_is_said_once(tmp_path: Path) -> None:
    process = started(*_placed("torchrun, DDP", tmp_path), "--batch", "3", "--micro-batch", "3")
    said, _ = process.communicate(timeout=400)
    assert process.returncode != 0
    assert said.count("error: --batch is 3: 2 ranks cannot have equal shares") == 1
    process = started(*_placed("torchrun, DDP", tmp_path), "--rank", "0")
    said, _ = process.communicate(timeout=400)
    assert said.count("error: --rank is 0") == 1


@pytest.mark.parametrize("shard", [False, True])
def test_cores_are_dealt_out_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: str, shard: bool
) -> None:
    made: list[LoraOver] = []
    monkeypatch.setattr(training, "LoraOver", lambda *a, **how: made.append(LoraOver(*a, **how)) or made[0])
    small = {"train_size": 4, "eval_size": 1, "batch": 2, "micro_batch": 2, "max_new_tokens": 1, "max_steps": 1}
    config = recipe.Config(method="lora-over-svd", model=tiny_model, lr=1e-3, shard=shard, **small)
    result = running.run(recipe.RECIPE, config, tmp_path, quiet=True)
    assert made[0].config()["shard"] == shard
    assert ("shard" in result["config"]) == shard, "runs from before there was the option keep their identity"


@pytest.mark.parametrize(
    ("world", "batch", "micro", "size"), [(1, 32, 8, 8), (2, 32, 8, 8), (2, 32, 32, 16), (4, 4, 2, 1), (3, 6, 8, 2)]
)
def test_shares_of_a_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world: int, batch: int, micro: int, size: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert _training(tmp_path, batch, micro).per_device() == size
    assert batch % (size * world) == 0


@pytest.mark.parametrize(("world", "batch", "micro"), [(3, 32, 8), (2, 24, 8), (8, 4, 2)])
def test_batches_that_ranks_cannot_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world: int, batch: int, micro: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=f"--batch is {batch}: {world} ranks cannot have equal shares"):
        _training(tmp_path, batch, micro).per_device()


def _training(folder: Path, batch: int, micro: int) -> Training:
    tokenizer = AutoTokenizer.from_pretrained(recipe.RECIPE.embedded_model)
    config = recipe.Config(batch=batch, micro_batch=micro)
    return Training(tokenizer, [{"input_ids": [1], "labels": [1]}], config, folder, quiet=True)
