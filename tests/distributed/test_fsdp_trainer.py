"""FSDP2 and DDP through HF Trainer: a PEFT model, `LoraOverCallback` and its `tnadapt.pt`; cores on every rank, or dealt out."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler

from tnadapt import MPO, Static, TaylorRuntime

from .conftest import pool
from .models import difference, drift, load_values, outcome, whole_values
from .ranks import Ranks

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from tests.integrations.tiny import tokenizer
from tnadapt.integrations.transformers import (
    LoraOverCallback,
    LoraOverOptimizer,
    checkpoint_fault,
    last_complete_checkpoint,
)

from .accelerated import OPTIONS, fresh, on_cpu_ranks

STEPS = 8
SAVED_AT = 5  # two of three expansions are behind, one is to come
CHECKPOINT = f"checkpoint-{SAVED_AT}"
LAST = f"checkpoint-{STEPS}"
SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"


def _model(seed: int) -> Any:
    """A base that is always the same, in float64, with adapters of `seed`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    base = LlamaForCausalLM(config).double()
    torch.manual_seed(1 + seed)
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(base, lora)


def _rounds() -> TaylorRuntime:
    """Expands at steps 2, 4 and 6."""
    return TaylorRuntime(top_n=3, split=3, every=2)


def _data() -> list[dict[str, Tensor]]:
    rows = torch.randint(0, 29, (8 * STEPS, 12), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in rows]


class _Watching(TrainerCallback):
    """Keeps what the run began with, and its cores and choices before they are folded."""

    def __init__(self, callback: LoraOverCallback) -> None:
        self.callback = callback
        self.initial: dict[str, Tensor] = {}
        self.first_cores: dict[str, list[Tensor]] = {}
        self.last: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.initial = whole_values(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.callback.over is not None
        if self.callback.over.config()["shard"] and state.global_step < STEPS:
            return  # to look is to consolidate, which the callback must do by itself
        self.last = outcome(kwargs["model"], self.callback.over)
        for name, cores in self.last["cores"].items():
            self.first_cores.setdefault(name, cores)


def _trained(
    folder: str,
    seed: int = 0,
    choice: Any = _rounds,
    resume: bool = False,
    best: bool = False,
    initial: dict[str, Tensor] | None = None,
    cores: dict[str, Any] | None = None,
    ddp: bool = False,
    factory: bool = False,
    sft: bool = False,
    **fsdp: Any,
) -> dict[str, Any]:
    """One run of Trainer, on the ranks that there are; from adapters of `seed`, from `initial` or from the checkpoint.

    `LoraOver` is attached by the callback, or with `factory` where the trainer makes its own optimizer. With `sft` the trainer is
    TRL's for supervised fine-tuning.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    model = _model(seed)
    if initial is not None:
        load_values(model, initial)
    offload = fsdp.pop("cpu_offload", None)
    sharded = world > 1 and not ddp
    engine: dict[str, Any] = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **fsdp},
    }
    several = {
        **({"use_cpu": True, "ddp_backend": "gloo", "ddp_find_unused_parameters": False} if ddp else engine),
        "save_strategy": "steps",
        "save_steps": 2 if best else SAVED_AT,
        "load_best_model_at_end": best,
    }
    kind, data, extra = Trainer, _data(), dict[str, Any]()
    if sft:
        trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
        kind, extra = trl.SFTTrainer, {"processing_class": tokenizer()}
        data = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in data])
        several |= {
            "max_length": None,
            "bf16": False,  # which TRL's default is not
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "gradient_checkpointing": False,
        }
    args = (trl.SFTConfig if sft else TrainingArguments)(
        output_dir=folder,
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=0.01,
        lr_scheduler_type="cosine",
        max_grad_norm=0.05,
        eval_strategy="steps",
        eval_steps=2,
        report_to=[],
        disable_tqdm=True,
        optim="adamw_torch",
        **(several if world > 1 else {"use_cpu": True, "save_strategy": "no"}),
    )
    if offload is not None:
        args.fsdp_plugin_args["cpu_offload"] = offload
    settings = {"factorization": MPO(order=4), "scheduler": choice(), "lr": args.learning_rate, "weight_decay": 0.0}
    callback = LoraOverCallback() if factory else LoraOverCallback(MPO(order=4), choice(), **(cores or {}))
    watching = _Watching(callback)
    trainer = kind(
        model,
        args,
        train_dataset=data,
        eval_dataset=data.select(range(4)) if sft else data[:4],
        callbacks=[callback, watching],
        optimizer_cls_and_kwargs=(LoraOverOptimizer, settings) if factory else None,
        **extra,
    )
    trainer._get_train_sampler = lambda *_: SequentialSampler(_data())  # the same global batches in every world
    trainer.train(resume_from_checkpoint=str(Path(folder) / CHECKPOINT) if resume else None)
    assert trainer.is_fsdp_enabled == sharded
    assert trainer.state.global_step == STEPS
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert all(isinstance(p, DTensor) == sharded for p in trained)
    assert (callback.report is None) == factory
    end = whole_values(trainer.model)
    if best:
        return {"end": end, "last": watching.last["values"], "best": trainer.state.best_model_checkpoint}
    assert all(
        torch.equal(value, end[name]) for name, value in watching.last["values"].items()
    )  # folding moves nothing
    return {**watching.last, "initial": watching.initial, "first cores": watching.first_cores}


def _on_ranks(start: Callable[[], None], folder: str, seed: int = 0, **options: Any) -> dict[str, Any]:
    start()
    # accelerate knows DDP on the CPU; the process group is there already, so nobody meets at that address
    with (
        fresh(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500") if options.get("ddp") else on_cpu_ranks(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        return _trained(folder, seed + dist.get_rank(), **options)


def _expansions(result: dict[str, Any]) -> list[int]:
    return [step for step, action, _ in result["history"] if action == "expand"]


@pytest.mark.parametrize(
    "how", [pytest.param(o, marks=[pytest.mark.slow] * (o not in ("default", "CPU offload"))) for o in OPTIONS]
)
def test_expansions_at_runtime(two: Ranks, tmp_path: Path, how: str) -> None:
    results = two.run(partial(_on_ranks, **OPTIONS[how]), str(tmp_path / "ranks"))
    first = results[0]
    alone = _trained(str(tmp_path / "alone"), initial=first["initial"])
    assert _expansions(first) == [2, 4, 6]
    assert drift(results) == 0
    assert difference(first, alone) < 1e-9
    assert len(first["first cores"]) == 18
    for name, cores in first["first cores"].items():
        moved = [float((now - then).abs().max()) for now, then in zip(first["cores"][name], cores, strict=True)]
        assert min(moved) > 1e-4


@pytest.fixture(scope="module", params=[SHARDED, FULL])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    ("kind", "choice"),
    [
        pytest.param(SHARDED, Static, id="sharded-static"),
        pytest.param(FULL, _rounds, id="full-runtime"),
        pytest.param(SHARDED, _rounds, id="sharded-runtime", marks=pytest.mark.slow),
        pytest.param(FULL, Static, id="full-static", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_on_to_the_same_end(two: Ranks, tmp_path: Path, kind: str, choice: Any) -> None:
    run = partial(_on_ranks, choice=choice, state_dict_type=kind)
    whole = two.run(run, str(tmp_path))
    own = torch.load(tmp_path / CHECKPOINT / "tnadapt.pt", weights_only=True)
    assert own["step"] == SAVED_AT
    assert not (tmp_path / CHECKPOINT / "optimizer.pt").exists()
    resumed = two.run(partial(run, resume=True), str(tmp_path), 50)
    assert drift(whole) == 0
    assert drift(resumed) == 0
    assert difference(resumed[0], whole[0]) == 0


def test_trls_trainer_resumes_with_nothing_said(two: Ranks, tmp_path: Path) -> None:
    run = partial(_on_ranks, factory=True, sft=True)
    whole = two.run(run, str(tmp_path))
    resumed = two.run(partial(run, resume=True), str(tmp_path), 50)
    assert _expansions(whole[0]) == [2, 4, 6]
    assert drift([*whole, *resumed]) == 0


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_cores_that_are_dealt_out_come_together_in_a_checkpoint(two: Ranks, tmp_path: Path, how: str) -> None:
    """Under DDP in `optimizer.pt`, which one rank writes alone; as with cores on every rank, to the last digits."""
    run = partial(_on_ranks, cores={"shard": True}, ddp=how == "ddp")
    whole = two.run(run, str(tmp_path))
    assert (tmp_path / CHECKPOINT / "optimizer.pt").exists() == (how == "ddp")
    resumed = two.run(partial(run, resume=True), str(tmp_path), 50)
    assert drift([*whole, *resumed]) == 0
    alone = _trained(str(tmp_path / "alone"), initial=whole[0]["initial"])
    assert difference(whole[0], alone) < 1e-9


@pytest.mark.parametrize(
    "choice", [pytest.param(_rounds, id="runtime"), pytest.param(Static, id="static", marks=pytest.mark.slow)]
)
def test_the_trainers_own_optimizer_resumes_with_nothing_said(
    two: Ranks, tmp_path: Path, kind: str, choice: Any
) -> None:
    """To the same bits as the run that was not broken off, and as the callback that attaches."""
    run = partial(_on_ranks, choice=choice, state_dict_type=kind)
    attached = two.run(run, str(tmp_path / "callback"))
    initial = attached[0]["initial"]
    whole = two.run(partial(run, factory=True, initial=initial), str(tmp_path / "factory"))
    resumed = two.run(partial(run, factory=True, resume=True), str(tmp_path / "factory"), 50)
    for results in (whole, resumed):
        assert drift(results) == 0
        assert difference(results[0], attached[0]) == 0
        assert _expansions(results[0]) == _expansions(attached[0])


@pytest.fixture(scope="module")
def saved(
    kind: str, tmp_path_factory: pytest.TempPathFactory, _pools: dict[int, Ranks]
) -> tuple[Path, dict[str, Tensor]]:
    """The folder of a run with checkpoints at steps 5 and 8, and the weights it ended with."""
    folder = tmp_path_factory.mktemp(kind)
    results = pool(_pools, 2).run(partial(_on_ranks, state_dict_type=kind), str(folder))
    return folder, results[0]["values"]


@pytest.fixture
def run(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """A copy of that folder, to be spoilt."""
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


def test_what_is_saved_is_an_ordinary_adapter(saved: tuple[Path, dict[str, Tensor]], kind: str) -> None:
    folder, values = saved
    assert (folder / LAST / "adapter_model.safetensors").exists() == (kind == FULL)
    if kind == FULL:
        base = _model(0).unload()
        stock = PeftModel.from_pretrained(base, str(folder / LAST), is_trainable=True)
        assert all(torch.equal(value, values[name]) for name, value in whole_values(stock).items())


def test_the_best_model_is_loaded_at_the_end(two: Ranks, tmp_path: Path) -> None:
    for result in two.run(partial(_on_ranks, best=True), str(tmp_path)):
        stock = whole_values(PeftModel.from_pretrained(_model(0).unload(), result["best"], is_trainable=True))
        assert all(torch.equal(value, stock[name]) for name, value in result["end"].items())
        assert any(not torch.equal(value, stock[name]) for name, value in result["last"].items())


def test_whole_checkpoints_are_found_to_be_whole(run: Path) -> None:
    assert checkpoint_fault(run / CHECKPOINT) is None
    assert last_complete_checkpoint(run) == str(run / LAST)


def test_a_checkpoint_that_was_not_finished_is_passed_over(run: Path) -> None:
    (run / LAST / "tnadapt.pt").unlink()  # written last
    assert last_complete_checkpoint(run) == str(run / CHECKPOINT)


def test_any_file_that_is_cut_off_is_noticed(run: Path) -> None:
    folder = run / LAST
    files = [p for p in folder.rglob("*") if p.suffix in (".pt", ".bin", ".pth", ".distcp") or p.name == ".metadata"]
    files = [p for p in files if p.name != "training_args.bin"]  # which nobody reads
    assert len(files) >= 6
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        fault = checkpoint_fault(folder)
        assert fault is not None, file
        assert file.name in fault
        assert last_complete_checkpoint(run) == str(run / CHECKPOINT)
        file.write_bytes(content)
    assert checkpoint_fault(folder) is None


def test_shards_that_are_not_there_are_noticed(run: Path, kind: str) -> None:
    folders = [path for path in (run / LAST).iterdir() if path.is_dir()]
    assert len(folders) == (2 if kind == SHARDED else 0)
    for folder in folders:
        for name in ("__1_0.distcp", ".metadata"):
            content = (folder / name).read_bytes()
            (folder / name).unlink()
            assert name in str(checkpoint_fault(run / LAST))
            (folder / name).write_bytes(content)
