"""Started by torchrun: a plain loop, and HF Trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .models import difference, drift, on_one_process

HERE = Path(__file__).parent


def _run(script: str, *arguments: str, world: int = 2) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    root = HERE.parent.parent
    path = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH", "")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *launcher, str(HERE / script), *arguments],
        env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def _load(folder: Path, name: str, world: int = 2) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}{rank}.pt") for rank in range(world)]


def test_a_plain_loop(tmp_path: Path) -> None:
    _run("torchrun_loop.py", str(tmp_path))
    for how in ("ddp", "fsdp"):
        results = _load(tmp_path, how)
        assert drift(results) == 0
        assert difference(results[0], on_one_process(results[0]["initial"])) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("how", ["optimizer", "callback"])
def test_trainer(tmp_path: Path, how: str) -> None:
    pytest.importorskip("transformers")
    _run("torchrun_trainer.py", str(tmp_path), how)
    _run("torchrun_trainer.py", str(tmp_path), how, world=1)
    first, second = _load(tmp_path, "end2-")
    (alone,) = _load(tmp_path, "end1-", world=1)
    assert [event[0] for event in alone["history"] if event[1] == "expand"] == [2, 4, 6]
    for other, allowed in ((second, 0.0), (alone, 1e-9)):
        assert other["history"] == first["history"]
        assert max(float((first["values"][n] - other["values"][n]).abs().max()) for n in alone["values"]) <= allowed
