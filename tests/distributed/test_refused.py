"""Engines that do not keep LoRA matrices whole are refused with the way out; without ranks, nothing is spent on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tnadapt import MPO, LoraOver
from tnadapt.matrices import find_lora_matrices

from .models import net, optimizer_of, train, trainable
from .ranks import Ranks


def _fsdp1(start: Callable[[], None], strategy: str, original: bool) -> tuple[str, str]:
    start()
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    model = net(0)
    if not original:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = FullyShardedDataParallel(
            model, sharding_strategy=ShardingStrategy[strategy], use_orig_params=original, device_id=torch.device("cpu")
        )
    optimizer = optimizer_of(trainable(wrapped))
    said = []
    for look in (lambda: find_lora_matrices(wrapped), lambda: LoraOver(wrapped, optimizer, MPO(order=4))):
        try:
            look()
        except TypeError as error:
            said.append(str(error))
        else:
            said.append("")
    return said[0], said[1]


@pytest.mark.parametrize(
    ("strategy", "original"),
    [("FULL_SHARD", False), ("FULL_SHARD", True), ("SHARD_GRAD_OP", True), ("NO_SHARD", False)],
)
def test_fsdp1(two: Ranks, strategy: str, original: bool) -> None:
    for messages in two.run(_fsdp1, strategy, original):
        assert all("FSDP1" in message and "fully_shard" in message for message in messages)


def test_fsdp1_that_keeps_parameters_whole(two: Ranks) -> None:
    assert two.run(_fsdp1, "NO_SHARD", True) == [("", "")] * 2


def _fsdp1_afterwards(start: Callable[[], None]) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = net(0)
    optimizer = optimizer_of(trainable(model))
    LoraOver(model, optimizer, MPO(order=4))
    start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer.param_groups[0]["params"] = trainable(wrapped)
    try:
        train(wrapped, optimizer, range(1, 2))
    except RuntimeError as error:
        return str(error)
    return ""


def test_fsdp1_after_the_attachment(two: Ranks) -> None:
    assert all("FSDP1 flattens parameters" in message for message in two.run(_fsdp1_afterwards))


def test_flat_parameters_wherever_they_are() -> None:
    model = net(0)
    model.flat = nn.Parameter(torch.zeros(3))
    model.flat._is_flat_param = True  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"flat is a FlatParameter.*fully_shard"):
        find_lora_matrices(model)


class DeepSpeedEngine(nn.Module):
    """Stands for DeepSpeed's, which is known by its name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class DeepSpeedZeroOptimizer(torch.optim.AdamW):
    """Stands for DeepSpeed's."""


def test_deepspeed() -> None:
    model = net(0)
    optimizer = optimizer_of(trainable(model))
    with pytest.raises(TypeError, match=r"DeepSpeed engine.*fully_shard"):
        LoraOver(DeepSpeedEngine(model), optimizer, MPO(order=4))
    with pytest.raises(TypeError, match=r"ZeRO.*FSDP2 or DDP"):
        LoraOver(model, DeepSpeedZeroOptimizer(trainable(model)), MPO(order=4))
    model.head.lora_A.weight.ds_id = 3
    with pytest.raises(TypeError, match=r"head.lora_A.weight is partitioned by DeepSpeed ZeRO.*fully_shard"):
        LoraOver(model, optimizer, MPO(order=4))
