"""One rank with a process group: DDP, and FSDP2 whose shards are on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_a_rank_alone_trains_as_without_a_process_group(device: str, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("one_rank.py")), device, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["moved"] > 1e-2
    assert report["ddp"]["difference"] <= 1e-6
    assert report["ddp"]["places"] == [device]
    # the optimizer steps shards on the CPU, whose arithmetic is another
    assert report["fsdp2"]["difference"] <= 1e-4
    assert report["fsdp2"]["places"] == ["cpu"]
    assert report["ddp"]["expanded"] == report["fsdp2"]["expanded"] == 4
