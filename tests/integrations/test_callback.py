"""`LoraOverCallback`: the trainer makes the optimizer, and TRL's the model too."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback

from tnadapt import LoraOver, Scheduler, Static, TaylorRuntime
from tnadapt.integrations.transformers import (
    LoraOverCallback,
    LoraOverOptimizer,
    checkpoint_fault,
    last_complete_checkpoint,
)

from .tiny import (
    STEPS,
    arguments,
    base_model,
    batch,
    dataset,
    lora_config,
    lora_model,
    lora_parameters,
    lora_weights,
    loss_of,
    mpo,
    rounds,
)

SAVING = {"save_strategy": "steps", "save_steps": 2}


def callback(**options: Any) -> LoraOverCallback:
    return LoraOverCallback(mpo(), rounds(), **{"core_lr": 1e-2, **options})


def trainer_with(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Trainer:
    return Trainer(
        lora_model(),
        arguments(folder, **changes),
        train_dataset=dataset(),
        eval_dataset=dataset(8),
        callbacks=list(callbacks),
    )


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a run with checkpoints at steps 2, 4, 6 and 8, and the weights it ended with."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = trainer_with(folder, callback(), **SAVING)
    trainer.train()
    return folder, lora_weights(trainer.model)


@pytest.fixture
def run(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Path:
    """A copy of that folder, to be spoilt."""
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


# -- training ---------------------------------------------------------------------------------------------------------


def test_trains_what_an_optimizer_passed_in_trains(tmp_path: Path) -> None:
    by_callback, ours = trainer_with(tmp_path), callback()
    by_callback.add_callback(ours)
    start, loss = lora_weights(by_callback.model), loss_of(by_callback.model)
    by_callback.train()
    after = lora_weights(by_callback.model)
    assert all(not torch.equal(after[name], start[name]) for name in after)
    assert loss_of(by_callback.model) < loss - 0.03
    assert ours.report is not None
    assert ours.report.steps == STEPS
    assert ours.report.folded == tuple(ours.over.matrices)  # type: ignore[union-attr]
    assert ours.report.trained_parameters > ours.report.lora_parameters
    assert [event.step for event in ours.report.history] == [3, 6, 8]

    model = lora_model()
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=2e-2, weight_decay=0.0, fused=True)
    LoraOver(model, optimizer, mpo(), rounds(), core_lr=1e-2)
    Trainer(model, arguments(tmp_path), train_dataset=dataset(), optimizers=(optimizer, None)).train()
    assert equal(after, lora_weights(model))


def test_logs(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Reader(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer = trainer_with(tmp_path, callback(), Reader(), lr_scheduler_type="cosine")
    trainer.train()
    for history in (trainer.state.log_history, seen):
        rows = [row for row in history if "loss" in row]
        assert len(rows) == STEPS
        assert [row["expanded_matrices"] for row in rows] == [0, 0, 6, 6, 6, 12, 12, 12]
        assert all(row["core_learning_rate"] == pytest.approx(row["learning_rate"] / 2) for row in rows[2:])
        assert all(row["largest_update_norm"] > 0 for row in rows[2:])
    json.dumps(trainer.state.log_history)


@pytest.mark.parametrize("first", [True, False], ids=["before-ours", "after-ours"])
def test_gradients_are_there_for_other_callbacks(tmp_path: Path, first: bool) -> None:
    norms: list[float] = []

    class Reader(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.before = [p.grad.clone() for p in lora_parameters(kwargs["model"])]

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            after = [p.grad for p in lora_parameters(kwargs["model"])]
            assert all(torch.equal(a, b) for a, b in zip(after, self.before, strict=True))
            norms.append(sum(float(g.norm()) for g in after))

    callbacks = [Reader(), callback()] if first else [callback(), Reader()]
    trainer_with(tmp_path, *callbacks).train()
    assert len(norms) == STEPS
    assert min(norms) > 0


def test_training_twice_starts_the_rounds_again(tmp_path: Path) -> None:
    ours = callback()
    trainer = trainer_with(tmp_path, ours)
    trainer.train()
    first, weights = ours.over, lora_weights(trainer.model)
    trainer.train()
    assert ours.over is not first
    assert [(e.step, e.action) for e in ours.over.history] == [(3, "expand"), (6, "expand"), (8, "fold")]  # type: ignore[union-attr]
    assert not equal(lora_weights(trainer.model), weights)


def test_training_again_after_an_error(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    ours = callback()
    trainer = trainer_with(tmp_path, ours, Fails(), **SAVING)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Fails)
    trainer.train(resume_from_checkpoint=True)
    assert ours.over is not None
    assert ours.over.step == STEPS
    whole = trainer_with(tmp_path / "whole", callback())
    whole.train()
    assert equal(lora_weights(trainer.model), lora_weights(whole.model))


def test_load_best_model_at_end(tmp_path: Path) -> None:
    """The best checkpoint is not the last one: the rate explodes after it."""
    ours = LoraOverCallback(mpo(), Static())
    model = lora_model()
    args = arguments(tmp_path, **SAVING, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)

    class Explodes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                for group in kwargs["optimizer"].param_groups:
                    group["lr"] = group["initial_lr"] = 3.0
                kwargs["lr_scheduler"].base_lrs = [3.0] * len(kwargs["optimizer"].param_groups)

    trainer = Trainer(model, args, train_dataset=dataset(), eval_dataset=dataset(8), callbacks=[ours, Explodes()])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*changed outside the optimizer")
        trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "checkpoint-4")
    assert ours.report is not None
    assert ours.report.steps == STEPS
    stored = PeftModel.from_pretrained(base_model(), best)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, stored.eval()(**batch()).logits)


def test_checkpoints_are_adapters_that_peft_loads(tmp_path: Path) -> None:
    logits: dict[int, torch.Tensor] = {}

    class Keep(TrainerCallback):
        @torch.no_grad()
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs["model"].eval()
            logits[state.global_step] = model(**batch()).logits.clone()
            model.train()

    trainer_with(tmp_path, callback(), Keep(), **SAVING).train()
    assert list(logits) == [2, 4, 6, 8]
    for step, kept in logits.items():
        model = PeftModel.from_pretrained(base_model(), tmp_path / f"checkpoint-{step}").eval()
        with torch.no_grad():
            assert torch.equal(model(**batch()).logits, kept)
    assert not torch.equal(logits[2], logits[4])


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resume_from_the_output_folder(run: Path, saved: tuple[Path, dict[str, torch.Tensor]], step: int) -> None:
    ours = callback()
    trainer = trainer_with(run, ours, **SAVING)
    trainer.train(resume_from_checkpoint=str(run / f"checkpoint-{step}"))
    assert equal(lora_weights(trainer.model), saved[1])
    assert ours.report is not None
    assert [event.step for event in ours.report.history] == [3, 6, 8]


def test_resume_from_elsewhere(run: Path, saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    elsewhere = run / "checkpoint-4"
    moved = elsewhere.rename(tmp_path / "kept-for-later")
    trainer = trainer_with(tmp_path / "new", callback(resume_from=moved))
    trainer.train(resume_from_checkpoint=str(moved))
    assert equal(lora_weights(trainer.model), saved[1])
    with pytest.raises(FileNotFoundError, match=r"new/checkpoint-4 is not there.*resume_from="):
        trainer_with(tmp_path / "new", callback()).train(resume_from_checkpoint=str(moved))


def test_resume_from_that_is_not_resumed_from(run: Path, tmp_path: Path) -> None:
    given = run / "checkpoint-4"
    with pytest.raises(ValueError, match=r"starts at step 0.*resume_from_checkpoint="):
        trainer_with(tmp_path / "new", callback(resume_from=given)).train()
    with pytest.raises(ValueError, match=r"resumes at step 2.*saved at step 4"):
        trainer_with(run, callback(resume_from=given)).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        trainer_with(run, callback(resume_from=run / "nowhere"))


def test_cores_of_another_run(run: Path, tmp_path: Path) -> None:
    """Its checkpoint has the same step and is found in the output folder, but the adapter comes from elsewhere."""
    other = tmp_path / "other"
    trainer_with(other, callback(), learning_rate=1e-2, **SAVING).train()
    with pytest.raises(ValueError, match=r"not those of the adapter.*resume_from="):
        trainer_with(run, callback()).train(resume_from_checkpoint=str(other / "checkpoint-6"))


def test_save_only_model_cannot_be_resumed(tmp_path: Path) -> None:
    trainer_with(tmp_path, callback(), save_only_model=True, **SAVING).train()
    with pytest.raises(ValueError, match=r"optimizer\.pt is not there.*save_only_model"):
        trainer_with(tmp_path, callback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert last_complete_checkpoint(tmp_path) is None


def test_saved_without_lora_over(tmp_path: Path) -> None:
    trainer_with(tmp_path, **SAVING).train()
    with pytest.raises(ValueError, match="saved without LoraOver"):
        trainer_with(tmp_path, callback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_an_error_on_resume_leaves_nothing_attached(run: Path) -> None:
    model = lora_model()
    args = arguments(run)
    other = LoraOverCallback(mpo(), TaylorRuntime(top_n=1, split=1, every=2))
    trainer = Trainer(model, args, train_dataset=dataset(), callbacks=[other])
    with pytest.raises(ValueError, match="split"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-6"))
    LoraOver(model, torch.optim.AdamW(lora_parameters(model)), mpo()).detach()


class WritesAsFsdp(Trainer):  # type: ignore[misc]
    """Keeps the optimizer in a file of another name that has its own state only, as Trainer does under FSDP."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        file = Path(output_dir) / "optimizer.pt"
        state = torch.load(file)
        assert state.pop("tnadapt")
        torch.save(state, file.with_suffix(".bin"))
        file.unlink()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.optimizer.load_state_dict(torch.load(Path(checkpoint) / "optimizer.bin"))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt"))


def test_resume_where_the_optimizer_file_has_no_room(
    tmp_path: Path, saved: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    def make() -> Trainer:
        return WritesAsFsdp(
            lora_model(), arguments(tmp_path, **SAVING), train_dataset=dataset(), callbacks=[callback()]
        )

    make().train()
    trainer = make()
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path))  # of the last step: nothing to do
    folder = tmp_path / "checkpoint-4"
    trainer.train(resume_from_checkpoint=str(folder))
    assert equal(lora_weights(trainer.model), saved[1])

    own = folder / "tnadapt.pt"
    whole = own.read_bytes()
    cut_off(own)
    with pytest.raises(ValueError, match=r"checkpoint-4 is not whole.*tnadapt\.pt"):
        make().train(resume_from_checkpoint=str(folder))
    own.unlink()
    with pytest.raises(ValueError, match=r"was not finished \(tnadapt\.pt comes last"):
        make().train(resume_from_checkpoint=str(folder))
    own.write_bytes(whole)
    make().train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("passed", [True, False])
def test_an_unfinished_checkpoint_is_not_resumed_without_its_cores(passed: bool, tmp_path: Path) -> None:
    """The first checkpoint of a run that was killed before `tnadapt.pt` was there, so that no other tells that one is missing."""

    def make() -> Trainer:
        model, args = lora_model(), arguments(tmp_path, **SAVING)
        reporting = {"train_dataset": dataset(), "callbacks": [LoraOverCallback()]}
        if passed:
            optimizer = torch.optim.AdamW(lora_parameters(model), lr=2e-2)
            LoraOver(model, optimizer, mpo(), rounds())
            return WritesAsFsdp(model, args, optimizers=(optimizer, None), **reporting)
        settings = {"factorization": mpo(), "scheduler": rounds(), "lr": 2e-2}
        return WritesAsFsdp(model, args, optimizer_cls_and_kwargs=(LoraOverOptimizer, settings), **reporting)

    make().train()
    for folder in tmp_path.glob("checkpoint-*"):
        (folder / "tnadapt.pt").unlink()
    with pytest.raises(ValueError, match=r"was not finished \(tnadapt\.pt comes last"):
        make().train(resume_from_checkpoint=last_complete_checkpoint(tmp_path))


# -- whole checkpoints ------------------------------------------------------------------------------------------------

FILES = ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def removed(path: Path) -> None:
    path.unlink()


def zeroed(path: Path) -> None:
    """Pages that never reached the disk."""
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(bytes(size - size // 2))


# safetensors has no checksums, but Trainer writes it first, so the other files tell
@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        (name, spoil)
        for name in FILES
        for spoil in (cut_off, emptied, removed, zeroed)
        if (name, spoil) != ("adapter_model.safetensors", zeroed)
    ],
)
def test_half_written_checkpoints_are_passed_over(run: Path, name: str, spoil: Any) -> None:
    newest = run / "checkpoint-8"
    assert last_complete_checkpoint(run) == str(newest)
    spoil(newest / name)
    assert name in (checkpoint_fault(newest) or "")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-6")


def test_one_flipped_bit_in_the_optimizer(run: Path) -> None:
    file = run / "checkpoint-8" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    assert "optimizer.pt" in (checkpoint_fault(file.parent) or "")


def test_one_flipped_bit_in_a_header_is_a_fault_and_no_crash(run: Path) -> None:
    """The bit that says that a part of a zip archive is encrypted, in the archive's directory."""
    file = run / "checkpoint-8" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] ^= 1
    file.write_bytes(bytes(content))
    assert "optimizer.pt" in (checkpoint_fault(file.parent) or "")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-6")


def test_other_layouts(run: Path) -> None:
    from safetensors.torch import save_file

    newest = run / "checkpoint-8"
    # sharded weights
    (newest / "adapter_model.safetensors").rename(newest / "model-00001-of-00001.safetensors")
    index = newest / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors", "b": "missing.safetensors"}}))
    assert "missing.safetensors" in (checkpoint_fault(newest) or "")
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert checkpoint_fault(newest) is None
    # a second adapter in a folder of its own
    second = newest / "second"
    second.mkdir()
    (second / "adapter_config.json").write_text("{}")
    assert "second" in (checkpoint_fault(newest) or "")
    save_file({"w": torch.ones(2)}, second / "adapter_model.safetensors")
    assert checkpoint_fault(newest) is None
    # a copy under another number
    copied = shutil.copytree(newest, run / "checkpoint-9")
    assert "step 8" in (checkpoint_fault(copied) or "")


def test_nothing_there(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-5").write_text("a file")
    assert last_complete_checkpoint(tmp_path) is None


def test_newest_by_number(run: Path) -> None:
    shutil.copytree(run / "checkpoint-8", run / "checkpoint-10")
    state = run / "checkpoint-10" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "global_step": 10}))
    assert last_complete_checkpoint(run) == str(run / "checkpoint-10")


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_state.pth"])
def test_resuming_from_an_incomplete_checkpoint_names_it(run: Path, name: str) -> None:
    """Trainer itself goes on without them, and without the optimizer's state."""
    folder = run / "checkpoint-6"
    (folder / name).unlink()
    ours = callback()
    with pytest.raises(ValueError, match=rf"checkpoint-6 is not whole.*{name}.*last_complete_checkpoint"):
        trainer_with(run, ours).train(resume_from_checkpoint=str(folder))
    assert ours.over is None


def test_resume_from_a_broken_checkpoint_is_refused_before_training(run: Path) -> None:
    folder = run / "checkpoint-6"
    cut_off(folder / "optimizer.pt")
    with pytest.raises(ValueError, match=r"checkpoint-6 is not whole.*optimizer\.pt"):
        trainer_with(run, callback(resume_from=folder))


def test_it_needs_lora(tmp_path: Path) -> None:
    trainer = Trainer(base_model(), arguments(tmp_path), train_dataset=dataset(), callbacks=[callback()])
    with pytest.raises(ValueError, match="no LoRA matrices"):
        trainer.train()


class Chosen(Scheduler):
    """Expands what a function chooses."""

    def __init__(self, choose: Any) -> None:
        self.choose = choose

    def select(self, step: int, matrices: Any) -> list[str]:
        return [name for name in matrices if step == 0 and self.choose(name)]


@pytest.mark.parametrize("attached", [False, True])
def test_settings_that_no_file_can_keep_are_said_before_the_first_step(tmp_path: Path, attached: bool) -> None:
    """And not when the first checkpoint is written, or at the end."""
    options = {"factorization": mpo(), "scheduler": Chosen(lambda name: True)}
    trainer = trainer_with(tmp_path, LoraOverCallback(**{} if attached else options), **SAVING)
    if attached:
        trainer.create_optimizer()
        LoraOver(trainer.model, trainer.optimizer, **options)
    with pytest.raises(TypeError, match=r"choose=.* of Chosen is no JSON data; the class needs a to_dict of its own"):
        trainer.train()
    assert trainer.state.global_step == 0


# -- TRL --------------------------------------------------------------------------------------------------------------


def test_sft_trainer_makes_model_and_optimizer(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *(f"w{k}" for k in range(30))]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    texts = [" ".join(f"w{(k + 7 * j) % 30}" for j in range(10)) for k in range(48)]

    def train(folder: Path, resume: str | None = None) -> tuple[Any, LoraOverCallback]:
        args = trl.SFTConfig(
            **{
                **arguments(folder, **SAVING).to_dict(),
                "max_length": 16,
                "activation_checkpointing": True,
                "bf16": False,
                "logging_steps": 1,
            }
        )
        ours = callback()
        trainer = trl.SFTTrainer(
            base_model(),
            args=args,
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=wrapped,
            peft_config=lora_config(),
            callbacks=[ours],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, ours

    trainer, ours = train(tmp_path)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.05
    assert ours.report is not None
    assert [event.step for event in ours.report.history] == [3, 6, 8]
    assert all(bool(p.any()) for p in lora_parameters(trainer.model))
    resumed, _ = train(tmp_path, str(tmp_path / "checkpoint-4"))
    assert equal(lora_weights(resumed.model), lora_weights(trainer.model))


@pytest.mark.parametrize(("limit", "sharded"), [(1, True), (2, True), (1, False)])
def test_a_single_checkpoint_under_fsdp_is_warned_of(
    tmp_path: Path, limit: int, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer deletes older checkpoints before the callback writes its file into the new one."""
    monkeypatch.setattr("tnadapt.integrations.transformers.ranks", SimpleNamespace(is_sharded=lambda tensor: sharded))
    begun = callback()
    trainer = trainer_with(tmp_path, begun, save_total_limit=limit)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        begun.on_train_begin(
            trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=trainer.create_optimizer()
        )
    told = [str(each.message) for each in caught if "save_total_limit" in str(each.message)]
    assert len(told) == (limit == 1 and sharded), told
