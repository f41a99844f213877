"""The guides run as they are printed, and give what they promise: a plain adapter, and runs that go on where they stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.pages import DOCS, ROOT, as_script, run
from tnadapt import LoraOver

GUIDES = DOCS / "guides"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guides write into the folder that they are run in."""
    monkeypatch.chdir(tmp_path)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def require_plain(folder: str, base: Any, model: Any) -> None:
    """PEFT alone reads the adapter, which holds LoRA matrices only: those that were trained, and they change the function."""
    import peft
    from safetensors.torch import load_file

    weights = load_file(Path(folder) / "adapter_model.safetensors")
    assert weights
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in weights)
    alone = peft.PeftModel.from_pretrained(base, folder)
    read, mine = peft.get_peft_model_state_dict(alone), peft.get_peft_model_state_dict(model)
    assert read.keys() == mine.keys()
    assert all(torch.equal(read[name], mine[name].to(read[name].dtype)) for name in read)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        adapted = alone(input_ids=ids).logits
        with alone.disable_adapter():
            assert not torch.allclose(alone(input_ids=ids).logits, adapted, atol=1e-3)


def test_plain_loop() -> None:
    page = run(GUIDES / "plain_loop.md")
    assert page["over"].step == 40


def test_own_model() -> None:
    from tnadapt import load_adapters

    page = run(GUIDES / "own_model.md")
    torch.manual_seed(0)
    fresh = page["Tagger"]()
    load_adapters(fresh, "adapters.safetensors")
    tokens = page["tokens"]
    assert torch.equal(fresh(tokens), page["model"](tokens))


def test_peft_and_trainer() -> None:
    page = run(GUIDES / "trainer.md")
    # the page trains other models after this one was saved, the second of them under the same name
    first = page["new_model"]()
    first.load_adapter("adapter", "default")
    require_plain("adapter", page["new_model"]().unload(), first)
    assert page["callback"].report.steps == 8
    resumed = LoraOver.of(page["trainer"].model)
    assert resumed is not None
    assert (resumed.step, [event.step for event in resumed.history]) == (8, [2])


def test_trl() -> None:
    pytest.importorskip("trl")
    page = run(GUIDES / "trl.md")
    require_plain("dpo/adapter", page["base"](), page["trainer"].model)
    assert Path("sft/adapter/adapter_model.safetensors").is_file()
    assert Path("sft/checkpoint-4/tnadapt.json").is_file()
    assert page["callback"].report.trained_parameters > page["callback"].report.lora_parameters


def test_lightning_goes_on_to_the_same_bits() -> None:
    pytest.importorskip("lightning")
    page = run(GUIDES / "lightning.md")
    whole, resumed = trained(page["module"]), trained(page["resumed"])
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    start = trained(page["Finetune"]())
    assert not any(torch.equal(start[name], whole[name]) for name in whole)


def test_lightning_checkpoints_can_be_inspected(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning")
    from tnadapt.cli import main

    run(GUIDES / "lightning.md")
    capsys.readouterr()
    assert main(["inspect", "checkpoints/step=4.ckpt"]) == 0
    assert "step 4: 2 of 4 matrices are expanded" in capsys.readouterr().out


def test_qlora() -> None:
    pytest.importorskip("bitsandbytes")
    page = run(GUIDES / "qlora.md")
    assert any(type(module).__name__ == "Linear4bit" for module in page["model"].modules())
    assert page["losses"][-1] < page["losses"][0] - 0.1
    base = page["AutoModelForCausalLM"].from_pretrained(
        "base", quantization_config=page["four_bits"], device_map={"": "cpu"}
    )
    base = page["prepare_model_for_kbit_training"](base)
    require_plain("adapter", base, page["model"])


@pytest.mark.slow
def test_accelerate_on_two_ranks(tmp_path: Path) -> None:
    """All blocks are one script, which torchrun starts; each rank takes half of the steps that one process takes."""
    pytest.importorskip("accelerate")
    (tmp_path / "train.py").write_text(as_script(GUIDES / "accelerate.md"), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "folded 2 matrices after 4 steps" in done.stdout
    assert "2 steps are behind it, 2 matrices are expanded" in done.stdout


def test_accelerate() -> None:
    pytest.importorskip("accelerate")
    page = run(GUIDES / "accelerate.md")
    assert page["over"].step == 4
    assert page["over"].expanded
