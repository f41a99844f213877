"""What tnadapt adds to `import torch`, and how long the command line takes to start.

    python benchmarks/import_time.py

Starts fresh interpreters in turn and takes the medians: those that import torch alone, those that import torch and then every
public name of tnadapt, and those of two commands that need no torch: the command line's help, and a report on a folder that
holds no run. Times are those of the processor, user and system, so that other work on the machine changes them little. The
import of tnadapt after torch is timed on its own as well. The script fails if transformers or peft came along, or torch into
a command. Goals: less than 0.2 s for the names, less than 1 s for a command.

Prints a Markdown table and writes the numbers with their provenance to benchmarks/results/import_time.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from provenance import environment, write_json
from rich.console import Console
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
GOAL, COMMAND_GOAL = 0.2, 1.0
UNWANTED = ("transformers", "peft")
NAMES = "from tnadapt import *"
COMMAND = """
import contextlib, io
from tnadapt.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    main({arguments!r})
"""

CHILD = """
import json, sys, time
{before}
started = time.process_time()
{statement}
seconds = time.process_time() - started
print(json.dumps({{"seconds": seconds, "unwanted": [name for name in {unwanted!r} if name in sys.modules]}}))
"""


def processor_seconds() -> float:
    """Of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start(statement: str, before: str = "import torch", unwanted: tuple[str, ...] = UNWANTED) -> dict[str, Any]:
    """Processor seconds of a whole interpreter that runs `before` and `statement`, and of the statement alone."""
    code = CHILD.format(before=before, statement=statement, unwanted=unwanted)
    started = processor_seconds()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"whole": processor_seconds() - started, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="two interpreters of each kind")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    repeats = 2 if arguments.quick else arguments.repeats
    if not arguments.quick:
        start(NAMES)  # reads files into the system's cache and writes bytecode
    help_page, report = COMMAND.format(arguments=["--help"]), COMMAND.format(arguments=["report", str(RESULTS)])
    without_torch = ("pass", ("torch", *UNWANTED))
    kinds = {
        "torch": ("pass",),
        "names": (NAMES,),
        "help": (help_page, *without_torch),
        "report": (report, *without_torch),
    }
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for k in tqdm(range(repeats), unit="round"):
        for kind in list(kinds)[:: 1 if k % 2 else -1]:
            run = start(*kinds[kind])
            if run["unwanted"]:
                raise SystemExit(f"the run {kind!r} imported {', '.join(run['unwanted'])}")
            runs[kind].append(run)
    whole = {kind: [run["whole"] for run in series] for kind, series in runs.items()}
    inside = [run["seconds"] for run in runs["names"]]
    rows = {
        "python -c 'import torch'": whole["torch"],
        f"python -c 'import torch; {NAMES}'": whole["names"],
        "the difference": [b - a for a, b in zip(whole["torch"], whole["names"], strict=True)],
        f"`{NAMES}` after torch, on its own": inside,
        "tnadapt --help": whole["help"],
        "tnadapt report": whole["report"],
    }
    table = ["| processor time | median | quartiles |", "|---|---:|---:|"]
    summary = {}
    for name, series in rows.items():
        low, middle, high = statistics.quantiles(series, n=4)
        summary[name] = {"median": middle, "quartiles": [low, high]}
        table.append(f"| {name} | {middle:.3f} s | {low:.3f} - {high:.3f} s |")
    console = Console(soft_wrap=True)
    console.print("\n<!-- import-time -->", *table, "", sep="\n", markup=False, highlight=False)
    goals = ((NAMES, inside, GOAL), ("help", whole["help"], COMMAND_GOAL), ("report", whole["report"], COMMAND_GOAL))
    for what, series, goal in goals:
        seconds = statistics.median(series)
        console.print(f"goal: below {goal} s; {what}: {seconds:.3f} s: {'met' if seconds < goal else 'MISSED'}")
    file = arguments.output / "import_time.json"
    provenance = environment(Path(__file__).parent)
    write_json(
        file,
        {
            "goal_seconds": GOAL,
            "command_goal_seconds": COMMAND_GOAL,
            "repeats": repeats,
            "rows": summary,
            "provenance": provenance,
        },
    )
    console.print(f"written: {file}")


if __name__ == "__main__":
    main()
