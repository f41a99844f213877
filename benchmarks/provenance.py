"""Where a result comes from, as the recipes write it: for scripts that are run from any folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes"))

from support.provenance import environment, read_json, write_json

__all__ = ["environment", "read_json", "write_json"]
