"""Runs in several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

RECIPES = Path(__file__).parents[2] / "recipes"

DRIVER = """
import multiprocessing, sys, time
from concurrent.futures import ProcessPoolExecutor
sys.path.insert(0, sys.argv[1])
from support.many import _begin_worker
import os

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin_worker) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def test_workers_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    """Also in the middle of a run; else they would train on beside the command that goes on."""
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py"), str(RECIPES)]
    said = tmp_path / "said"  # Python tells of what a killed process leaves
    with (
        said.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as driver,
    ):
        assert driver.stdout is not None
        line = driver.stdout.readline()
        assert line, said.read_text()
        worker = int(line)
        driver.send_signal(signal.SIGKILL)
        driver.stdout.close()
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if "Z" in Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2]:
            return  # ended, and not yet collected
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker went on without its driver")
