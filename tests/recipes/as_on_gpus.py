"""Started by a launcher: runs a recipe where accelerate takes CPU ranks for ranks with a GPU each, which FSDP needs.

The first argument is the recipe's name, the others are its own.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT)]
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from support.command_line import main  # noqa: E402

from tests.distributed.accelerated import on_cpu_ranks  # noqa: E402

with on_cpu_ranks():
    main(importlib.import_module(sys.argv[1]).RECIPE, sys.argv[2:])
