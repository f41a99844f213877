"""How many small faults in the code the tests notice: a mutation run.

    python tests/mutation/run.py --workers 2
    python tests/mutation/run.py --modules tnadapt/planning.py --survivors

Each mutant is one module with one change. It runs in a fork of a process that has imported the libraries already, on a copy of the
tree, so that it costs its tests and little else; the change is put in when the module is imported. A mutant is killed by a failing
test, or by running far longer than the tests take.

What is finished is kept in `runs/mutation` and not run again while the module stays as it is; `--survivors` runs those that no test
failed on again, after tests were added. The outcome goes to `docs/mutation/results.json`, where a reason can be written beside each survivor
(the next run keeps it), and from there into the tables of `docs/mutation.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
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
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE, CACHE = ROOT / "docs/mutation/results.json", ROOT / "docs/mutation.md", ROOT / "runs/mutation"
TREE = ("tnadapt", "tests", "docs", "recipes", "benchmarks")
FILES = ("pyproject.toml", "README.md", "Makefile", "constraints.txt")
DEFAULT = (
    *("tnadapt/planning.py", "tnadapt/assignment.py", "tnadapt/finders.py", "tnadapt/matrices.py", "tnadapt/state.py"),
    *("tnadapt/lora_over.py", "tnadapt/adapter", "tnadapt/backends", "tnadapt/factorizations", "tnadapt/schedulers"),
    "tnadapt/engine",
)

FACTORIZATION_TESTS = ["gauges", "structure", "layout", "kernels", "bad_input", "truncation", "zero_start", "precision",
                       "gradients", "batches", "round_trip", "docs"]  # fmt: skip
RANKS_TESTS = ["fsdp", "ddp", "ddp_and_fsdp", "agreement", "sharded_cores", "offload", "refused", "checkpoint"]
ENGINE_TESTS = ["steps", "edges", "matched", "scaling", "mixed", "cohorts", "coupling", "handover", "bad_input", "model_untouched", "state", "equivalence",
                "factorizations_train"]  # fmt: skip
#: the tests that mutants of a module run, those that find most first
TESTS = {
    "tnadapt/planning.py": ["tests/test_planning.py", "tests/engine/test_mixed.py"],
    "tnadapt/assignment.py": ["tests/engine/test_mixed.py"],
    "tnadapt/finders.py": ["tests/test_finders.py", "tests/engine/test_mixed.py"],
    "tnadapt/matrices.py": ["tests/test_matrices.py", "tests/engine/test_edges.py"],
    "tnadapt/state.py": ["tests/engine/test_state.py", "tests/engine/test_edges.py"],
    "tnadapt/lora_over.py": [
        *(f"tests/engine/test_{name}.py" for name in ("edges", "state", "bad_input", "steps", "mixed")),
        *("tests/test_public_api.py", "tests/integrations/test_own_optimizer.py"),
    ],
    "tnadapt/adapter": ["tests/test_adapter.py", "tests/test_adapter_models.py"],
    "tnadapt/backends": [
        *(
            f"tests/factorizations/test_{name}.py"
            for name in ("kernels", "backends_agree", "precision", "gradients", "round_trip")
        ),
    ],
    "tnadapt/schedulers": [
        *("tests/test_schedulers.py", "tests/test_loss_ablation.py"),
        *(f"tests/distributed/test_{name}.py" for name in ("fsdp", "offload")),
    ],
    "tnadapt/factorizations": [f"tests/factorizations/test_{name}.py" for name in FACTORIZATION_TESTS],
    "tnadapt/engine": [
        *(f"tests/engine/test_{name}.py" for name in ENGINE_TESTS),
        "tests/trust/test_faults.py",
        "tests/test_public_api.py",
        *(f"tests/distributed/test_{name}.py" for name in RANKS_TESTS),
    ],
}


def digest_of(file: Path) -> str:
    """A short digest of a source file, empty where there is none."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.exists() else ""


def run_module(path: str, workers: int, again: bool, share: float, scratch: Path) -> tuple[int, list[dict[str, Any]]]:
    """How many mutants a module has, and the outcomes of all or of a random share of them, also those known from earlier."""
    source = (scratch / path).read_text()
    cache = CACHE / f"{path.removesuffix('.py').replace('/', '.')}-{digest_of(scratch / path)}.jsonl"
    cache.parent.mkdir(parents=True, exist_ok=True)
    whole = mutants(source)
    every = whole if share == 1 else random.Random(0).sample(whole, math.ceil(share * len(whole)))
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


def record(path: str, scratch: Path, exist: int, found: list[dict[str, Any]]) -> None:
    """Write the outcome of a module beside the others; reasons that stand there are kept."""
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
        "mutants": len(found),
        **counts,
        "survivors": survivors,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1, ensure_ascii=False) + "\n")


def agreeing(one: str, other: str) -> int:
    """How many characters are the same at the start."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def around(before: str, after: str, context: int = 60) -> tuple[str, str]:
    """Where two lines differ, with some of what is around it, as code in cells of a table."""
    same = agreeing(before, after)
    rest = agreeing(before[same:][::-1], after[same:][::-1])
    cut = []
    for text in (before, after):
        start, stop = max(0, same - context), min(len(text), len(text) - rest + context)
        shown = ("… " if start else "") + text[start:stop] + (" …" if stop < len(text) else "")
        cut.append(f"`` {shown} ``".replace("|", "\\|"))
    return cut[0], cut[1]


def scores(row: list[int]) -> str:
    """The share that was killed: of all that were drawn, and of those that the tests reach."""
    _, drawn, killed, _, _, unreached = row
    return f"{killed / drawn:.1%} | {killed / max(drawn - unreached, 1):.1%}"


def tables() -> str:
    """The results as Markdown: a line per module, then the survivors of each."""
    results = recorded()
    columns = (
        "module",
        "mutants",
        "drawn",
        "killed",
        "of them by time",
        "survived",
        "of them not reached",
        "score",
        "of what is reached",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    total = [0] * 6
    for path, found in results.items():
        row = [
            found["exist"],
            found["mutants"],
            found["killed"] + found["time"],
            found["time"],
            len(found["survivors"]),
            sum(one["outcome"] == "unreached" for one in found["survivors"]),
        ]
        total = [a + b for a, b in zip(total, row, strict=True)]
        since = "" if digest_of(ROOT / path) == found["source"] else " (changed since)"
        lines.append(f"| `{path}`{since} | {' | '.join(map(str, row))} | {scores(row)} |")
    lines.append(f"| all | {' | '.join(map(str, total))} | {scores(total)} |")
    for path, found in results.items():
        if found["survivors"]:
            lines += ["", f"### `{path}`", "", "| line | before | after | why it survives |", "|---|---|---|---|"]
        rows = []
        for one in found["survivors"]:
            before, after = around(one["before"], one["after"])
            if one["outcome"] == "unreached":
                before, after = around(one["before"], "")[0], "anything: these tests do not come here"
            rows.append(f"| {one['line']} | {before} | {after} | {one['reason'] or '**not looked at**'} |")
        lines += dict.fromkeys(rows)
    return "\n".join(lines)


def write_page() -> None:
    """Put the tables between the markers of the page."""
    start, end = "<!-- results -->", "<!-- end of results -->"
    text = PAGE.read_text() if PAGE.exists() else f"# Mutation run\n\n{start}\n{end}\n"
    head, tail = text.split(start)[0], text.split(end)[1]
    PAGE.write_text(f"{head}{start}\n\n{tables()}\n\n{end}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=DEFAULT, help="files or folders of tnadapt")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--survivors", action="store_true", help="run those that survived again")
    parser.add_argument("--share", type=float, default=1.0, help="part of the mutants of each module, drawn at random")
    parser.add_argument("--report", action="store_true", help="only write the tables anew")
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
            exist, found = run_module(path, arguments.workers, arguments.survivors, arguments.share, scratch)
            if found:
                record(path, scratch, exist, found)
    RESULTS.write_text(json.dumps(recorded(), indent=1, ensure_ascii=False) + "\n")
    write_page()


if __name__ == "__main__":
    main()
