"""A trained adapter passes the check by which TRL decides whether it may be sent to a vLLM server as it is.

The check is `validate_lora_for_vllm_sync` of TRL's asynchronous trainers, which reads the configuration; the rank is compared with the
server's. What vLLM itself reads is the file, so its contents are looked at here too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.tiny import batch, lora_model, lora_parameters
from tnadapt import MPO, LoraOver, OverParamAdapter, Static, export_peft

trl = pytest.importorskip("trl")

from trl.experimental.async_grpo.async_grpo_trainer import round_lora_rank, validate_lora_for_vllm_sync  # noqa: E402


def run(folder: Path, **changes: Any) -> Any:
    """An adapter trained through cores, saved, and read again by PEFT alone."""
    import peft

    from tests.integrations.tiny import base_model

    model = lora_model(**changes)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    over = LoraOver(model, optimizer, MPO(order=4), Static())
    for _ in range(3):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    validate_lora_for_vllm_sync(model)  # in mid-training, when an asynchronous trainer sends it
    over.fold()
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(base_model(), folder)


def test_the_adapter_may_go_to_vllm(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = run(tmp_path)
    config = validate_lora_for_vllm_sync(model)
    assert round_lora_rank(max([config.r, *config.rank_pattern.values()])) == 8
    weights = load_file(tmp_path / "adapter_model.safetensors")
    ranks = {value.shape[0] if "lora_A" in name else value.shape[1] for name, value in weights.items()}
    assert ranks == {config.r}  # the rank of training, whatever the cores had
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in weights)


def test_adapters_of_ones_own_model_are_exported_for_it(tmp_path: Path) -> None:
    """`export_peft` writes a configuration that passes as well."""
    import peft

    from tests.integrations.tiny import base_model

    model = base_model()
    layer = model.model.layers[0].self_attn
    layer.q_proj = OverParamAdapter.from_linear(layer.q_proj, rank=4, alpha=8)
    export_peft(model, tmp_path)
    validate_lora_for_vllm_sync(peft.PeftModel.from_pretrained(base_model(), tmp_path))


def test_the_check_can_fail(tmp_path: Path) -> None:
    """What LoraOver trains and vLLM does not serve: TRL says so, and so does the guide."""
    with pytest.raises(ValueError, match="DoRA"):
        run(tmp_path, use_dora=True)
