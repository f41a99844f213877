"""A recipe run as a script imports from its own folder first; the tests put that folder on the path too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
