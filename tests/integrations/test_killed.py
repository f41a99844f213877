"""A run that is killed while it writes a checkpoint goes on in a new process, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tnadapt.integrations.transformers import last_complete_checkpoint

from . import killed_run

#: right after the expansion of step 3, and two steps on, before that of step 6 is on disk: checkpoints 3 and 5 are whole
AFTER_EXPANSION, BETWEEN = 4, 6


ROOT = Path(__file__).parent.parent.parent


def command_of(*arguments: object) -> dict[str, object]:
    return {
        "args": [sys.executable, "-m", "integrations.killed_run", *map(str, arguments)],
        "cwd": ROOT,
        "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    }


def test_killed_twice_and_resumed(tmp_path: Path) -> None:
    """Each run is a process of its own, forked from one that has computed nothing."""
    done = subprocess.run(
        **command_of(tmp_path, AFTER_EXPANSION, BETWEEN, 0), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for way in killed_run.WAYS:
        for kill_at in (AFTER_EXPANSION, BETWEEN):
            wanted = f"{way} {kill_at} {-signal.SIGKILL} {tmp_path / way / f'checkpoint-{kill_at - 1}'}\n"
            assert wanted in done.stderr, done.stderr
        assert f"{way} 0 0 " in done.stderr, done.stderr
        whole, rounds = killed_run.run(way, tmp_path / "whole" / way)
        resumed, rounds_again = torch.load(tmp_path / way / "final.pt")
        assert set(resumed) == set(whole)
        different = [name for name in whole if not torch.equal(resumed[name], whole[name])]
        assert not different, way
        assert [chosen["step"] for chosen in rounds] == [3, 6]
        assert rounds_again == rounds


@pytest.mark.slow
@pytest.mark.parametrize("way", killed_run.WAYS)
def test_killed_twenty_times_at_random(way: str, tmp_path: Path) -> None:
    """By a clock that knows nothing of the run: while it starts, steps, expands and writes. Ten times each way, twenty in all."""
    whole, rounds = killed_run.run(way, tmp_path / "whole", steps=killed_run.LONG)
    folder = tmp_path / way
    folder.mkdir()
    draw = random.Random(way)
    kills, incomplete, reached = 0, 0, []
    while kills < 10:
        child = subprocess.Popen(
            **command_of(folder, "--clocked", way, killed_run.LONG), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        assert child.stderr is not None
        try:
            # the imports take most of a run's time: the clock starts when they are done
            assert b"ready\n" in iter(child.stderr.readline, b"")
            time.sleep(draw.uniform(0.2, 3.0))
        finally:
            child.kill()
            child.communicate()
        kills += child.returncode == -signal.SIGKILL
        assert child.returncode in (-signal.SIGKILL, 0), "it failed by itself"
        newest = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
        complete = last_complete_checkpoint(folder)
        incomplete += bool(newest) and (complete is None or Path(complete) != newest[-1])
        reached.append(0 if complete is None else int(complete.rsplit("-", 1)[1]))
        if reached[-1] > killed_run.LONG * 0.8 and kills < 10:  # from the start again: there is more to kill
            shutil.rmtree(folder)
            folder.mkdir()
    print(f"{way}: whole checkpoints after each kill {reached}, {incomplete} times half a checkpoint was the newest")
    done = subprocess.run(
        **command_of(folder, "--clocked", way, killed_run.LONG), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    resumed, rounds_again = torch.load(folder / "final.pt")
    assert set(resumed) == set(whole)
    assert not [name for name in whole if not torch.equal(resumed[name], whole[name])]
    assert rounds_again == rounds
    assert max(reached) > 0, "some were killed after a checkpoint"
