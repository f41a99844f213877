"""A run that is killed while it writes a checkpoint goes on in a new process, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tnadapt.integrations.transformers import last_complete_checkpoint

from . import killed_run

#: after the expansion of step 3, and between that of step 3 and that of step 6
AFTER_EXPANSION, BETWEEN = 4, 6


def in_new_process(way: str, folder: Path, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "integrations.killed_run", way, str(folder), *([str(kill_at)] if kill_at else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("way", ["passed", "callback"])
def test_killed_twice_and_resumed(tmp_path: Path, way: str) -> None:
    whole, rounds = killed_run.run(way, tmp_path / "whole")
    folder = tmp_path / "killed"
    for kill_at in (AFTER_EXPANSION, BETWEEN):
        killed = in_new_process(way, folder, kill_at)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert (folder / f"checkpoint-{kill_at}" / "optimizer.pt").is_file()
        assert last_complete_checkpoint(folder) == str(folder / f"checkpoint-{kill_at - 1}")
    ended = in_new_process(way, folder)
    assert ended.returncode == 0, ended.stderr
    resumed, rounds_again = torch.load(folder / "final.pt")
    assert set(resumed) == set(whole)
    different = [name for name in whole if not torch.equal(resumed[name], whole[name])]
    assert not different
    assert [chosen["step"] for chosen in rounds] == [3, 6]
    assert rounds_again == rounds
