"""A run that is killed while it writes a checkpoint goes on in a new process, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from tnadapt.integrations.transformers import last_complete_checkpoint

from . import killed_run

#: right after the expansion of step 3, and two steps on, before that of step 6 is on disk: checkpoints 3 and 5 are whole
AFTER_EXPANSION, BETWEEN = 4, 6


def in_new_process(folder: Path, kill_at: int) -> str:
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "integrations.killed_run", str(folder), str(kill_at)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_killed_twice_and_resumed(tmp_path: Path) -> None:
    for kill_at in (AFTER_EXPANSION, BETWEEN):
        output = in_new_process(tmp_path, kill_at)
        for way in killed_run.WAYS:
            assert f"{way} {-signal.SIGKILL}\n" in output, output
            assert (tmp_path / way / f"checkpoint-{kill_at}" / "optimizer.pt").is_file()
            assert last_complete_checkpoint(tmp_path / way) == str(tmp_path / way / f"checkpoint-{kill_at - 1}")
    output = in_new_process(tmp_path, 0)
    for way in killed_run.WAYS:
        assert f"{way} 0\n" in output, output
        whole, rounds = killed_run.run(way, tmp_path / "whole" / way)
        resumed, rounds_again = torch.load(tmp_path / way / "final.pt")
        assert set(resumed) == set(whole)
        different = [name for name in whole if not torch.equal(resumed[name], whole[name])]
        assert not different, way
        assert [chosen["step"] for chosen in rounds] == [3, 6]
        assert rounds_again == rounds
