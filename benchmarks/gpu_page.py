"""The tables of docs/gpu.md and docs/performance.md that come from runs on a GPU, made anew from the results of `make gpu`.

    python benchmarks/gpu_page.py            # writes the parts between the pages' marks

The tables are those of one device: that of RESULTS below.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import scaling
from provenance import read_json  # before `support`, which it makes importable
from support.marked import replaced
from support.tables import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu" / "nvidia-h200"
#: (title, step of `make gpu`, case of step_overhead.py)
CASES = (
    ("Llama 3.1-8B, attention, order 10, 64x512", "llama31", "llama31-gpu"),
    ("Llama 2-7B, all linear layers, order 9, 32x1024", "llama2", "llama2-gpu"),
    ("T5-Base, order 16, 32x128", "t5", "t5-gpu"),
    ("T5-Base, order 16, one sequence of 32", "t5", "t5-gpu-short"),
)
WAYS = ("svd", "mpo", "mpo-r", "paper's way")
#: where the methods of OTHERS are timed, in one run with ours
OTHERS_STEP = "t5-others"
RECIPES = (("LoRA", "recipe-lora", "lora"), ("LoRA-Over-MPO_R", "recipe-mpo-r", "lora-over-mpo-r"))
OTHERS = ("dora", "adalora", "α-lora, T = 20", "tt-lora, 2 + 2 modes", "tt-lora, 3 + 3 modes", "full", "opf")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The Markdown of a table that needs no title: it stands under a sentence."""
    return Table("", head, rows).markdown()


def median(value: float, quartiles: Sequence[float], digits: int) -> str:
    """A median to so many digits, and its quartiles."""
    low, high = quartiles
    return f"{value:.{digits}f} ({low:.2f} to {high:.2f})"


def case_of(results: Path, step: str, case: str) -> dict[str, Any]:
    """What step_overhead.py found in a case, with its rows by variant."""
    found = read_json(results / f"{step}.json")["results"][f"step_overhead-{case}.json"]
    return {**found, "rows": {row["variant"]: row for row in found["rows"]}}


def costs(results: Path) -> str:
    """Times of a step beside plain LoRA's."""
    rows = []
    for title, step, name in CASES:
        found = case_of(results, step, name)
        ratios = [median(row["ratio"], row["ratio_quartiles"], 3) for row in map(found["rows"].get, WAYS)]
        rows.append([title, f"{found['goal']:.2f}", *ratios, f"{found['rows']['plain']['seconds']:.2f} s"])
    head = ["case", "goal", "svd", "mpo", "mpo-r, after its last round", "the paper's way", "a step of plain LoRA"]
    return table(head, rows)


def others(results: Path) -> str:
    """The same of other methods, for T5."""
    names = [(title, case_of(results, OTHERS_STEP, name)["rows"]) for title, step, name in CASES if step == "t5"]
    rows = [
        [name + (" (beside full)" if name == "opf" else ""), *(f"{each[name]['ratio']:.2f}" for _, each in names)]
        for name in OTHERS
    ]
    return table(["method", *(title for title, _ in names)], rows)


def memory(results: Path) -> str:
    """Peaks and what is kept, for the large models."""
    rows = []
    for title, step, name in CASES[:2]:
        for variant in ("plain", *WAYS):
            row = case_of(results, step, name)["rows"][variant]
            kept, peak = (f"{row[key] / 2**20:,.0f}" for key in ("kept_bytes", "peak_bytes"))
            rows.append([f"{title.partition(',')[0]}, {variant}", f"{row['trained_parameters']:,}", kept, peak])
    return table(["", "trained numbers", "kept between steps, MiB", "peak of a step above that, MiB"], rows)


def expansion(results: Path) -> str:
    """Pauses of an expansion."""
    found = read_json(results / "expansion.json")["results"]["expansion.json"]["rows"]
    rows = [[row["way"], str(row["matrices"]), median(row["seconds"], row["quartiles"], 2)] for row in found]
    return table(["expansion of 4 matrices of each group of an 8B model", "matrices", "s"], rows)


def profile(results: Path) -> str:
    """Phases of a step, and what the device was given."""
    cases = read_json(results / "profile.json")["results"]["profile_step.json"]["cases"]
    titles = [f"{case['model']}, {'x'.join(map(str, case['batch']))}" for case in cases]
    phases = [row["phase"] for row in cases[0]["rows"]]
    by_phase = [{row["phase"]: row["seconds"] for row in case["rows"]} for case in cases]
    rows = [[phase, *(f"{1000 * each[phase]:.2f}" for each in by_phase)] for phase in phases]
    for label, key in (
        ("**`optimizer.step()`, not watched**", "step_seconds"),
        ("`optimizer.step()` of plain LoRA", "plain_step_seconds"),
        ("forward and backward of plain LoRA", "forward_and_backward_seconds"),
    ):
        rows.append([label, *(f"{1000 * case[key]:,.1f}" for case in cases)])
    for k, row in enumerate(cases[0]["traffic"][:2]):
        rows.append([f"kernels of {row['of']}", *(str(case["traffic"][k]["launches"]) for case in cases)])
        rows.append([f"waits of {row['of']}", *(str(len(case["traffic"][k]["waits"])) for case in cases)])
    return table(["one step, ms", *titles], rows)


def recipe(results: Path) -> str:
    """The main recipe's paper preset: training, resumed, and a batch of answers."""
    rows = []
    for title, step, method in RECIPES:
        (found,) = read_json(results / f"{step}.json")["results"].values()
        assert found["method"] == method
        rounds = ", ".join(map(str, found["rounds"])) or "–"
        speed = f"{found['tokens_per_second']:,.0f}"
        rows.append([title, f"{found['trained_parameters']:,}", rounds, str(found["resumed_at"]), speed])
    return table(
        ["method", "trained numbers", "rounds at steps", "killed and resumed at", "tokens / s after that"], rows
    )


def answers(results: Path) -> str:
    """A batch of answers, in one sentence."""
    (found,) = read_json(results / "answers.json")["results"].values()
    return (
        f"{found['batch']} answers of {found['new_tokens']} tokens in {found['seconds']:.0f} s, {found['tokens_per_second']:,.0f} tokens / s, "
        f"with at most {found['peak_bytes'] / 2**30:.1f} GiB beside the model."
    )


def growth(results: Path) -> str:
    """What the coupling costs, one factor at a time."""
    return scaling.markdown(read_json(results / "scaling.json")["results"]["scaling-cuda.json"]["factors"])


def software(results: Path) -> str:
    """Where the numbers come from."""
    found = {file.stem: read_json(file)["provenance"] for file in sorted(results.glob("*.json"))}
    seen = {
        f"{each['device']}, {each['driver']}, torch {each['torch']}, Python {each['python']}, {each['cpus']} CPU cores"
        for each in found.values()
    }
    assert len(seen) == 1, seen
    commits = sorted({each["commit"][:7] for each in found.values()})
    steps = [f"{commit} ({', '.join(n for n in found if found[n]['commit'].startswith(commit))})" for commit in commits]
    return f"{seen.pop()}. Commits: {'; '.join(steps)}."


def pages(results: Path = RESULTS) -> dict[Path, str]:
    """Each page with its generated parts."""
    made = {}
    for name, parts in {
        "performance.md": {"gpu-costs": costs(results)},
        "gpu.md": {
            "gpu-software": software(results),
            "gpu-costs": costs(results),
            "gpu-others": others(results),
            "gpu-memory": memory(results),
            "gpu-expansion": expansion(results),
            "gpu-recipe": recipe(results),
            "gpu-answers": answers(results),
            "gpu-growth": growth(results),
            "gpu-profile": profile(results),
        },
    }.items():
        path = ROOT / "docs" / name
        page = path.read_text(encoding="utf-8")
        for mark, text in parts.items():
            page = replaced(page, f"<!-- {mark} -->", f"<!-- /{mark} -->", text, path)
        made[path] = page
    return made


if __name__ == "__main__":
    for file, content in pages().items():
        file.write_text(content, encoding="utf-8")
        print(f"written: {file}")
