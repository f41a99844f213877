"""How many small faults in the code the tests notice: a mutation run.

    python tests/mutation/run.py --workers 2
    python tests/mutation/run.py --modules tnadapt/planning.py --sample 12
    python tests/mutation/run.py --modules tnadapt/planning.py --survivors

Each mutant is one module with one change (`operators.py`). It runs in a fork of a process that has imported the libraries already, on
a copy of the tree, so that it costs its tests and little else; the change is put in when the module is imported.

The tests are those that `targets.py` names for the module, and of these the files that come to the changed line; with the examples
that `make test` draws, without shrinking; not the slow ones, and not the largest cases (`forks.py`). So a survivor may still be found
by `make test` or `make test-all`. A mutant is killed when a test fails, also because the module cannot be imported any more, or when
it takes more than one and a half times of what the tests take while they are traced (about three times of what they take otherwise),
measured on the CPU. A change on a line that no test comes to is not run, and survives.

What is finished is kept in `runs/mutation` and not run again while the module stays as it is; `--survivors` runs those that no test
failed on again, after tests were added. The outcome goes to `docs/mutation/results.json`, where a reason is written beside each
survivor by hand (the next run keeps it), and a table of it is printed. The figures in `docs/mutation.md` are checked against it by
`tests/trust/test_mutation.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from forks import outcomes
from operators import mutants
from targets import MUTATED, TESTS
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
RESULTS, CACHE = ROOT / "docs/mutation/results.json", ROOT / "runs/mutation"
TREE = ("tnadapt", "tests", "docs", "recipes", "benchmarks")
FILES = ("pyproject.toml", "README.md", "Makefile", "constraints.txt")


def digest_of(file: Path) -> str:
    """A short digest of a source file, empty where there is none."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.exists() else ""


def run_module(
    path: str, workers: int, again: bool, sample: int | None, seed: int, scratch: Path
) -> tuple[int, list[dict[str, Any]]]:
    """How many mutants a module has, and the outcomes of all or of a random sample, also those known from earlier."""
    source = (scratch / path).read_text()
    cache = CACHE / f"{path.removesuffix('.py').replace('/', '.')}-{digest_of(scratch / path)}.jsonl"
    cache.parent.mkdir(parents=True, exist_ok=True)
    whole = mutants(source)
    every = whole if sample is None else random.Random(seed).sample(whole, min(sample, len(whole)))
    known = {}
    for line in cache.read_text().splitlines() if cache.exists() else ():
        entry = json.loads(line)
        known[entry["operator"], entry["line"], entry["after"]] = entry
    keys = [(mutant.operator, mutant.line, mutant.after) for mutant in every]
    todo = [
        m
        for m, key in zip(every, keys, strict=True)
        if key not in known or (again and known[key]["outcome"] != "killed")
    ]
    if todo:
        prefix = max((name for name in TESTS if path.startswith(name)), key=len)
        with cache.open("a") as file:
            for entry in tqdm(
                outcomes(path, todo, tuple(TESTS[prefix]), workers, scratch), path, len(todo), unit="mutant"
            ):
                known[entry["operator"], entry["line"], entry["after"]] = entry
                print(json.dumps(entry, ensure_ascii=False), file=file, flush=True)
    return len(whole), [known[key] for key in keys]


def recorded() -> dict[str, Any]:
    """Outcomes of the modules that there still are."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {path: found for path, found in results.items() if (ROOT / path).exists()}


def record(path: str, scratch: Path, exist: int, seed: int | None, found: list[dict[str, Any]]) -> None:
    """Write the outcome of a module beside the others; reasons that stand there are kept. `seed` is that of a sample."""
    results = recorded()
    reasons = {
        (s["operator"], s["before"], s["after"]): s["reason"] for s in results.get(path, {}).get("survivors", [])
    }
    survivors = [
        {**{k: entry[k] for k in ("line", "operator", "before", "after", "outcome")},
         "reason": reasons.get((entry["operator"], entry["before"], entry["after"]), "")}
        for entry in found if entry["outcome"] in ("survived", "unreached")
    ]  # fmt: skip
    counts = {outcome: sum(entry["outcome"] == outcome for entry in found) for outcome in ("killed", "time")}
    results[path] = {
        "source": digest_of(scratch / path),
        "exist": exist,
        "seed": seed,
        "mutants": len(found),
        **counts,
        "survivors": survivors,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1, ensure_ascii=False) + "\n")


def table() -> str:
    """A line of figures per module."""
    rows = []
    for path, found in recorded().items():
        unreached = sum(one["outcome"] == "unreached" for one in found["survivors"])
        since = "" if digest_of(ROOT / path) == found["source"] else " (changed since)"
        rows.append(
            (
                path + since,
                found["exist"],
                found["mutants"],
                found["killed"],
                found["time"],
                len(found["survivors"]),
                unreached,
            )
        )
    columns = list(zip(*rows, strict=True))
    rows.append(("all", *(sum(column) for column in columns[1:])))
    titles = ("module", "mutants", "drawn", "killed", "by time", "survived", "not reached")
    width = max(len(row[0]) for row in rows)
    return "\n".join("  ".join([f"{row[0]:{width}}", *(f"{cell:>11}" for cell in row[1:])]) for row in (titles, *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=MUTATED, help="files or folders of tnadapt")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--survivors", action="store_true", help="run those that survived again")
    parser.add_argument(
        "--sample", type=int, help="so many mutants of each module, drawn at random; all where it is not given"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--report", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    paths = [ROOT / name for name in arguments.modules]
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    torch.set_num_threads(1)
    os.environ.update(TNADAPT_HYPOTHESIS_PROFILE="mutation", TNADAPT_RANKS="fork", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name).resolve()
        for folder in TREE:
            shutil.copytree(ROOT / folder, scratch / folder, ignore=shutil.ignore_patterns("__pycache__"))
        for file in FILES:
            shutil.copy(ROOT / file, scratch / file)
        os.chdir(scratch)
        sys.path.insert(0, str(scratch))
        for file in () if arguments.report else files:
            path = file.resolve().relative_to(ROOT).as_posix()
            exist, found = run_module(
                path, arguments.workers, arguments.survivors, arguments.sample, arguments.seed, scratch
            )
            if found:
                record(path, scratch, exist, None if arguments.sample is None else arguments.seed, found)
    print(table())


if __name__ == "__main__":
    main()
