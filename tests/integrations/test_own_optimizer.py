"""Trainer's own optimizer with LoraOver attached: `optimizer_cls_and_kwargs`. And what a run leaves beside its adapter."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from tnadapt import MPO, LoraOver, Scheduler, Static, TaylorRuntime
from tnadapt.card import save_card
from tnadapt.integrations.transformers import LoraOverCallback, LoraOverOptimizer, create_loraover_optimizer

from .tiny import (
    STEPS,
    arguments,
    base_model,
    dataset,
    lora_config,
    lora_model,
    lora_parameters,
    lora_weights,
    mpo,
    rounds,
    tokenizer,
)

SAVING = {"save_strategy": "steps", "save_steps": 2}


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "factorization": mpo(),
        "scheduler": rounds(),
        "core_lr": 1e-2,
        "lr": 2e-2,
        "weight_decay": 0.0,
        "fused": True,
        **changes,
    }


def trainer(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> Trainer:
    return Trainer(
        lora_model(),
        arguments(folder, **changes),
        train_dataset=dataset(),
        eval_dataset=dataset(8),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=(LoraOverOptimizer, settings()),
    )


def test_a_rate_that_the_trainer_would_not_hand_over_is_asked_for(tmp_path: Path) -> None:
    """`TrainingArguments.learning_rate` reaches no optimizer that is made this way; AdamW's own rate would count in silence."""
    given = settings()
    del given["lr"]
    made = Trainer(
        lora_model(),
        arguments(tmp_path),
        train_dataset=dataset(),
        optimizer_cls_and_kwargs=(LoraOverOptimizer, given),
    )
    with pytest.raises(ValueError, match=r"has no lr, .*'lr': args\.learning_rate"):
        made.train()


def test_trains_what_an_optimizer_passed_in_trains(tmp_path: Path) -> None:
    mine = trainer(tmp_path)
    mine.train()
    model = lora_model()
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=2e-2, weight_decay=0.0, fused=True)
    LoraOver(model, optimizer, mpo(), rounds(), core_lr=1e-2)
    Trainer(model, arguments(tmp_path), train_dataset=dataset(), optimizers=(optimizer, None)).train()
    left, right = lora_weights(mine.model), lora_weights(model)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resuming_needs_nothing_said(tmp_path: Path, step: int) -> None:
    whole = trainer(tmp_path, **SAVING)
    whole.train()
    resumed = trainer(tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    over = LoraOver.of(resumed.model)
    assert over is not None
    assert over.step == STEPS
    assert [event.step for event in over.history] == [3, 6]
    left, right = lora_weights(whole.model), lora_weights(resumed.model)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_trl_resumes_with_nothing_said(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")

    def sft() -> Any:
        rows = [{"input_ids": row["input_ids"].tolist()} for row in dataset()]
        datasets = pytest.importorskip("datasets")
        return trl.SFTTrainer(
            base_model(),
            trl.SFTConfig(
                **{
                    **arguments(tmp_path, **SAVING).to_dict(),
                    "max_length": None,
                    "dataset_kwargs": {"skip_prepare_dataset": True},
                }
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            peft_config=lora_config(),
            processing_class=tokenizer(),
            optimizer_cls_and_kwargs=(LoraOverOptimizer, settings()),
        )

    whole = _seeded(sft)
    whole.train()
    resumed = _seeded(sft)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    left, right = lora_weights(whole.model), lora_weights(resumed.model)
    assert all(torch.equal(left[name], right[name]) for name in left)


def _seeded(make: Any) -> Any:
    torch.manual_seed(0)
    return make()


def test_peft_convention() -> None:
    model = lora_model()
    optimizer = create_loraover_optimizer(
        model, torch.optim.SGD, MPO(order=3), Static(), core_lr=1e-3, lr=1e-2, momentum=0.9
    )
    over = LoraOver.of(model)
    assert over is not None
    assert over.optimizer is optimizer
    assert optimizer.defaults["momentum"] == 0.9
    assert over.rates.lr == 1e-3


# -- logs -------------------------------------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    """As those of TensorBoard and W&B: called before the user's own callbacks."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.rows.append(dict(logs))


@pytest.mark.parametrize("way", ["callback", "passed in", "own"])
def test_reporters_get_the_metrics(tmp_path: Path, way: str) -> None:
    reporter = Reporter()
    if way == "own":
        run = trainer(tmp_path, reporter, LoraOverCallback())
    elif way == "callback":
        run = Trainer(
            lora_model(),
            arguments(tmp_path),
            train_dataset=dataset(),
            callbacks=[reporter, LoraOverCallback(mpo(), rounds())],
        )
    else:
        model = lora_model()
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=2e-2)
        LoraOver(model, optimizer, mpo(), rounds())
        run = Trainer(
            model,
            arguments(tmp_path),
            train_dataset=dataset(),
            optimizers=(optimizer, None),
            callbacks=[reporter, LoraOverCallback()],
        )
    run.train()
    rows = [row for row in reporter.rows if "loss" in row]
    assert [row["expanded_matrices"] for row in rows] == [0, 0, 6, 6, 6, 12, 12, 12]
    assert all(row["largest_update_norm"] > 0 for row in rows[2:])


def test_expansions_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tnadapt"):
        trainer(tmp_path).train()
    assert [record.getMessage()[:14] for record in caplog.records if record.name == "tnadapt"] == [
        "step 3: expand",
        "step 6: expand",
    ]


def test_a_round_that_cannot_come_is_said_at_the_start(tmp_path: Path) -> None:
    late = LoraOverCallback(mpo(), TaylorRuntime(top_n=2, split=2, every=50))
    run = Trainer(lora_model(), arguments(tmp_path), train_dataset=dataset(), callbacks=[late])
    with (
        pytest.warns(UserWarning, match=f"first round at step 50, and training has {STEPS} steps"),
        pytest.warns(UserWarning, match="nothing was expanded"),
    ):
        run.train()


# -- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_saved_adapter_says_how_it_was_trained(tmp_path: Path) -> None:
    run = trainer(tmp_path, LoraOverCallback(), **SAVING)
    run.train()
    run.save_model(str(tmp_path))
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        described = json.loads((folder / "tnadapt.json").read_text())
        assert described["config"]["core_lr"] == 1e-2
        assert described["events"][0]["step"] == 3
        assert described["versions"]["torch"] == torch.__version__.partition("+")[0] or described["versions"]["torch"]
        readme = (folder / "README.md").read_text()
        assert readme.count("## Trained through tensor networks") == 1
        assert "step 3: expand 6 matrices" in readme
        assert readme.startswith("---"), "what PEFT writes stays"
    model = lora_model()
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=2e-2)
    over = LoraOver.from_config(model, optimizer, tmp_path)
    assert over.config() == described["config"]


def test_a_card_is_renewed_and_not_repeated(tmp_path: Path) -> None:
    model = lora_model()
    over = LoraOver(
        model, torch.optim.AdamW(lora_parameters(model)), {r"\.A$": MPO(order=3), "": MPO(order=4)}, matched=True
    )
    model.save_pretrained(tmp_path)
    for _ in range(2):
        save_card(over, tmp_path)
    assert (tmp_path / "README.md").read_text().count("Trained through") == 1
    other = lora_model()
    again = LoraOver.from_config(other, torch.optim.AdamW(lora_parameters(other)), tmp_path / "tnadapt.json")
    assert again.config() == over.config()
    assert [m.factorization for m in again.matrices.values()] == [m.factorization for m in over.matrices.values()]


@pytest.mark.parametrize(
    "written",
    [
        b"",
        "Größe\n".encode("latin-1"),
        b"mine\n\n<!-- tnadapt -->\nearlier section\n<!-- /tnadapt -->\nmine too\n",
        b"<!-- tnadapt -->\nits end is gone, mine too\n",
    ],
)
def test_what_others_wrote_into_a_readme_is_kept(written: bytes, tmp_path: Path) -> None:
    model = lora_model()
    over = LoraOver(model, torch.optim.AdamW(lora_parameters(model)), mpo())
    readme = tmp_path / "README.md"
    readme.write_bytes(written)
    save_card(over, tmp_path)
    first = readme.read_bytes()
    assert b"earlier section" not in first
    for kept in (b"mine", b"mine too", "Größe".encode("latin-1")):
        assert (kept in first) == (kept in written)
    save_card(over, tmp_path)
    assert readme.read_bytes() == first


def test_functions_have_to_be_given_again() -> None:
    model = lora_model()
    over = LoraOver(model, torch.optim.AdamW(lora_parameters(model)), mpo(), groups=lambda matrix: matrix.kind)
    other = lora_model()
    optimizer = torch.optim.AdamW(lora_parameters(other))
    with pytest.raises(ValueError, match="groups was a function"):
        LoraOver.from_config(other, optimizer, over.config())
    again = LoraOver.from_config(other, optimizer, over.config(), groups=lambda matrix: matrix.kind)
    assert {m.group for m in again.matrices.values()} == {"A", "B"}


def test_settings_of_a_run_on_another_model_or_of_no_run_are_named(tmp_path: Path) -> None:
    model = lora_model()
    optimizer = torch.optim.AdamW(lora_parameters(model))
    over = LoraOver(model, optimizer, {r"\.A$": MPO(order=3), "": MPO(order=4)})
    config = over.config()
    over.detach()
    name = next(iter(over.matrices))
    del config["factorization"][name]
    with pytest.raises(ValueError, match=f"{re.escape(name)} has no factorization: pass one"):
        LoraOver.from_config(model, optimizer, config)
    with pytest.raises(ValueError, match="the config has no factorization and no scheduler; give what config"):
        LoraOver.from_config(model, optimizer, {"steps": 3})
    for text in ("[]", "null"):
        (tmp_path / "tnadapt.json").write_text(text)
        with pytest.raises(ValueError, match="and no mapping; give what config"):
            LoraOver.from_config(model, optimizer, tmp_path)


def test_what_is_given_again_need_not_be_rebuilt() -> None:
    class Unknown(Scheduler):
        def select(self, step: int, matrices: Any) -> list[str]:
            return list(matrices) if step == 0 else []

    model = lora_model()
    optimizer = torch.optim.AdamW(lora_parameters(model))
    config = LoraOver(model, optimizer, mpo(), Unknown()).config()
    with pytest.raises(ValueError, match="Unknown"):
        LoraOver.from_config(model, optimizer, config, replace=True)
    given = Unknown()
    assert LoraOver.from_config(model, optimizer, config, scheduler=given, replace=True).scheduler is given


def test_a_card_needs_its_folder(tmp_path: Path) -> None:
    model = lora_model()
    over = LoraOver(model, torch.optim.AdamW(lora_parameters(model)), mpo())
    with pytest.raises(FileNotFoundError, match="save the adapter first"):
        save_card(over, tmp_path / "nowhere")
