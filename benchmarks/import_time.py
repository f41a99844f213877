"""What `import tnadapt` adds to `import torch`.

    python benchmarks/import_time.py

Starts fresh interpreters, those that import torch alone and those that import torch and then tnadapt in turn, and takes the
medians. In each, the time of the import of tnadapt itself is taken too, torch being there already; and it is checked that
neither transformers nor peft came along. Goal: less than 0.2 s.

Prints a Markdown table and writes the numbers with their provenance to benchmarks/results/import_time.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from provenance import environment, write_json
from rich.console import Console
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
GOAL = 0.2
UNWANTED = ("transformers", "peft")

CHILD = """
import json, sys, time
import torch
started = time.perf_counter()
{statement}
seconds = time.perf_counter() - started
print(json.dumps({{"seconds": seconds, "unwanted": [name for name in {unwanted!r} if name in sys.modules]}}))
"""


def start(statement: str) -> dict[str, Any]:
    """Seconds of a whole interpreter that imports torch and runs `statement`, and of the statement alone."""
    code = CHILD.format(statement=statement, unwanted=UNWANTED)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    whole = time.perf_counter() - started
    return {"whole": whole, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="two interpreters of each kind")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    repeats = 2 if arguments.quick else arguments.repeats
    if not arguments.quick:
        start("import tnadapt")  # reads files into the system's cache and writes bytecode
    torch_alone: list[float] = []
    both: list[float] = []
    inside: list[float] = []
    for k in tqdm(range(repeats), unit="round"):
        for with_us in (False, True) if k % 2 else (True, False):
            run = start("import tnadapt" if with_us else "pass")
            if not with_us:
                torch_alone.append(run["whole"])
                continue
            both.append(run["whole"])
            inside.append(run["seconds"])
            if run["unwanted"]:
                raise SystemExit(f"import tnadapt imported {', '.join(run['unwanted'])}")
    added = [b - a for a, b in zip(torch_alone, both, strict=True)]
    rows = {"python -c 'import torch'": torch_alone, "python -c 'import torch, tnadapt'": both}
    rows |= {"the difference": added, "`import tnadapt` after torch, timed inside": inside}
    table = ["| | median | quartiles |", "|---|---:|---:|"]
    summary = {}
    for name, series in rows.items():
        low, middle, high = statistics.quantiles(series, n=4)
        summary[name] = {"median": middle, "quartiles": [low, high]}
        table.append(f"| {name} | {middle:.3f} s | {low:.3f} - {high:.3f} s |")
    console = Console(soft_wrap=True)
    console.print("\n<!-- import-time -->", *table, "", sep="\n", markup=False, highlight=False)
    seconds = statistics.median(inside)
    console.print(f"goal: below {GOAL} s; timed inside: {seconds:.3f} s: {'met' if seconds < GOAL else 'MISSED'}")
    file = arguments.output / "import_time.json"
    provenance = environment(Path(__file__).parent)
    write_json(file, {"goal_seconds": GOAL, "repeats": repeats, "rows": summary, "provenance": provenance})
    console.print(f"written: {file}")


if __name__ == "__main__":
    main()
