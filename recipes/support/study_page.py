"""What the runs of a study say: its tables, its figures, and the sentences with numbers in them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from support import marked, study_figures
from support.findings import REFERENCE, Finding, findings, good, shown, verdict
from support.paired import Difference, difference
from support.provenance import read_json, write_text
from support.search import Arm, Study, Task
from support.tables import Table, percent

#: A gain has to be seen on at least so many tasks.
TASKS_OF_A_GAIN = 2


# -- tables and sentences ---------------------------------------------------------------------------------------------


def task_table(task: Task, mine: Sequence[Finding]) -> str:
    """A row for each arm, from the lowest loss to the highest."""
    rows = []
    for each in sorted(mine, key=lambda finding: finding.loss):
        losses = [run.loss for run in each.runs]
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        rate = f"{each.point[0]:g}{'' if each.inside else ' (edge)'}"
        row = [
            each.arm.label,
            f"{each.loss:.4f}{spread}",
            percent(each.accuracy),
            shown(each.apart),
            verdict(each),
            rate,
        ]
        if len(task.steps) > 1:
            left = ", ".join(str(steps) for steps in task.steps if steps not in each.tried)
            row.append(f"{each.point[1]} ({left} not tried)" if left else str(each.point[1]))
        rows.append([*row, good(each), str(len(losses))])
    columns = ["arm", "loss", "accuracy", "less LoRA's", "", "rate", "good rates", "seeds"]
    if len(task.steps) > 1:
        columns.insert(6, "steps")
    return Table(task.label, columns, rows).markdown()


Found = Mapping[tuple[str, str], Finding]


def arms_of(found: Found) -> dict[str, Arm]:
    """The arms by name."""
    return {finding.arm.name: finding.arm for finding in found.values()}


def tally(found: Found, held_out: str) -> dict[str, dict[str, list[str]]]:
    """For each arm that was compared: the labels of the tasks on which it is ``better``, ``equal`` and ``worse``.

    The task that was held back does not count.
    """
    counted: dict[str, dict[str, list[str]]] = {}
    for (task, name), finding in found.items():
        if finding.apart is not None and task != held_out and name != REFERENCE:
            words: dict[str, list[str]] = counted.setdefault(name, {"better": [], "equal": [], "worse": []})
            words[verdict(finding)].append(finding.task.label)
    return counted


def overall(found: Found, tasks: Sequence[Task], held_out: str) -> list[Sequence[str]]:
    """For each arm that was compared: on how many tasks it is better, equal, worse; and what it is on the held-out one."""
    rows: list[tuple[float, Sequence[str]]] = []
    for name, words in tally(found, held_out).items():
        mine = [found[task.name, name] for task in tasks if task.name != held_out and (task.name, name) in found]
        share = median(each.apart.mean / (each.loss - each.apart.mean) for each in mine if each.apart)
        last = found.get((held_out, name))
        held = verdict(last) if last is not None else "not run"
        counts = (str(len(labels)) for labels in words.values())
        rows.append((share, (arms_of(found)[name].label, *counts, f"{100 * share:+.1f} %", held)))
    return [row for _, row in sorted(rows, key=lambda each: each[0])]


def _is_over(arm: Arm) -> bool:
    return arm.method.startswith("lora-over")


def _gaining(counted: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    return [name for name, words in counted.items() if len(words["better"]) >= TASKS_OF_A_GAIN]


def answer(found: Found, held_out: str) -> str:
    """The study's answer in sentences."""
    arms, counted = arms_of(found), tally(found, held_out)
    gains, over = _gaining(counted), [name for name in counted if _is_over(arms[name])]
    lines = []
    if gaining := [name for name in gains if name in over]:
        lines.append(
            f"**At its own best rate, {_names(arms, gaining)} beats LoRA at LoRA's best rate** on at least {TASKS_OF_A_GAIN} tasks."
        )
    else:
        few = sum(sum(map(len, counted[name].values())) < TASKS_OF_A_GAIN for name in over)
        lines.append(
            f"**At rates that are tuned for each, none of the {len(over)} arms of LoRA-Over that were compared beats LoRA** by two "
            f"standard errors on {TASKS_OF_A_GAIN} tasks; {few} of them have been compared on fewer tasks than that."
        )
    once = [(name, counted[name]["better"][0]) for name in over if 0 < len(counted[name]["better"]) < TASKS_OF_A_GAIN]
    if once:
        lines.append(f"Better on one task only: {'; '.join(f'{arms[name].label} ({label})' for name, label in once)}.")
    if losing := [name for name in over if len(counted[name]["worse"]) >= TASKS_OF_A_GAIN]:
        lines.append(f"Worse on {TASKS_OF_A_GAIN} tasks or more: {_names(arms, losing)}.")
    if others := [name for name in gains if name not in over]:
        lines.append(
            f"Of the other ways to fine-tune these beat LoRA on {TASKS_OF_A_GAIN} tasks or more: {_names(arms, others)}."
        )
    for name in gains:
        last = found.get((held_out, name))
        if last is not None and last.apart is not None:
            lines.append(
                f"On the task that was held back, {arms[name].label} is {verdict(last)}: {shown(last.apart)} nats a token."
            )
    return "\n".join(f"- {line}" for line in lines)


def sentence(found: Found, held_out: str) -> str:
    """The answer in one plain sentence, for who has just seen one run of each of two methods; empty without a comparison."""
    arms, counted = arms_of(found), tally(found, held_out)
    over = [name for name in counted if _is_over(arms[name])]
    if not over:
        return ""
    tasks = {label for words in counted.values() for labels in words.values() for label in labels}
    gains = [name for name in _gaining(counted) if name in over]
    what = _names(arms, gains) if gains else f"none of {len(over)} variants of LoRA-Over"
    return (
        f"at rates tuned for each, over several seeds and up to {len(tasks)} small tasks, {what} beat LoRA beyond noise on "
        f"{TASKS_OF_A_GAIN} of them (docs/study.md)"
    )


#: The tasks that differ in the width of the model alone, by column.
WIDTHS = {"width 64": "width-64", "width 128": "llama-1600", "width 256": "width-256"}
#: The arms that the README shows.
README_ARMS = ("lora", "svd", "mpo-10", "mpo-r", "mpo-10-matched", "lora+", "lora-rite")


def readme_table(found: Found, tasks: Sequence[Task]) -> str:
    """For a few arms the loss at their best rate, by task; what is lower than LoRA's by two standard errors is bold. Models of other
    widths are on the page alone."""
    shown_tasks = [
        task
        for task in tasks
        if task.name not in (WIDTHS["width 64"], WIDTHS["width 256"])
        and any(name == task.name and each.apart for (name, _), each in found.items())
    ]
    arms = arms_of(found)
    rows = []
    for name in (name for name in README_ARMS if name in arms):
        cells = []
        for task in shown_tasks:
            finding = found.get((task.name, name))
            if finding is None or len(finding.runs) < 2:
                cells.append("–")
                continue
            spread = stdev(run.loss for run in finding.runs)
            text = f"{finding.loss:.3f} ± {spread:.3f}"
            cells.append(f"{f'**{text}**' if verdict(finding) == 'better' else text} ({finding.point[0]:.2g})")
        rows.append((arms[name].label, *cells))
    kept = {task.name for task in shown_tasks}
    counts = {
        len(finding.runs)
        for (task, name), finding in found.items()
        if task in kept and name in README_ARMS and len(finding.runs) > 1
    }
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)}))) if counts else "no"
    caption = (
        f"Loss of an answer's token on held-out examples, in nats: mean ± standard deviation over {seeds} seeds, and the rate; "
        "bold: lower than LoRA's by two standard errors."
    )
    return Table("", ("", *(task.label for task in shown_tasks)), rows, caption).markdown() if rows else "Not run yet."


def _names(arms: Mapping[str, Arm], names: Iterable[str]) -> str:
    return "; ".join(arms[name].label for name in names)  # labels have commas


def transfer(found: Found, tasks: Sequence[Task]) -> str:
    """The best rate by order, with steps as they come and with matched ones, and by rank."""
    columns = ("LoRA", "order 2", "order 4", "order 10", "order 16")
    lanes = {
        "as it comes": ("lora", "svd", "mpo-4", "mpo-10", "mpo-16"),
        "matched steps": ("lora", "svd-matched", "mpo-4-matched", "mpo-10-matched", "mpo-16-matched"),
    }
    return _rates(found, tasks, columns, lanes)


def over_ranks(found: Found, tasks: Sequence[Task]) -> str:
    """The best rate by rank."""
    lanes = {
        "LoRA": ("lora-rank-2", "lora", "lora-rank-32"),
        "MPO of order 10": ("mpo-10-rank-2", "mpo-10", "mpo-10-rank-32"),
    }
    return _rates(found, tasks, ("rank 2", "rank 8", "rank 32"), lanes)


OVER_WIDTHS = (REFERENCE, "svd", "mpo-10", "mpo-10-matched")


def over_widths(found: Found) -> str:
    """The best rate by width of the model."""
    rows = []
    for name in OVER_WIDTHS:
        known = [found.get((task, name)) for task in WIDTHS.values()]
        if sum(each is not None for each in known) > 1:
            rows.append((arms_of(found)[name].label, *_by_column(known)))
    return Table("", ("arm", *WIDTHS, "highest over lowest"), rows).markdown() if rows else "Not run yet."


def _by_column(known: Sequence[Finding | None]) -> list[str]:
    """The best rates, and how far they are apart."""
    numbers = [each.point[0] for each in known if each is not None]
    return [
        *(f"{each.point[0]:g}" if each is not None else "–" for each in known),
        f"{max(numbers) / min(numbers):.2g}",
    ]


def _rates(
    found: Found,
    tasks: Sequence[Task],
    columns: Sequence[str],
    lanes: Mapping[str, Sequence[str]],
) -> str:
    rows = []
    for task in tasks:
        for name, arms in lanes.items():
            known = [found.get((task.name, arm)) for arm in arms]
            if sum(each is not None for each in known) > 1:
                rows.append((task.label, name, *_by_column(known)))
    return Table("", ("task", "", *columns, "highest over lowest"), rows).markdown() if rows else "Not run yet."


def _side(apart: Difference) -> str:
    return "lower" if apart.better else "higher" if apart.worse else "equal"


def pairs(found: Found, tasks: Sequence[Task], compared: Sequence[tuple[str, str]]) -> str:
    """Differences between two arms, both at their best rates."""
    rows = []
    for one, other in compared:
        for task in tasks:
            a, b = found.get((task.name, one)), found.get((task.name, other))
            if a is None or b is None or (apart := difference(a.runs, b.runs)) is None:
                continue
            rows.append((f"{a.arm.label} less {b.arm.label}", task.label, shown(apart), _side(apart)))
    return Table("", ("difference of losses", "task", "nats a token", ""), rows).markdown() if rows else "Not run yet."


#: A rate is far below LoRA's best where it is less than this share of it: a third or less, on the grid.
FAR_BELOW = 0.4
#: The arms that are compared at one rate for all, LoRA first.
AT_ONE_RATE = (REFERENCE, "svd", "mpo-10", "mpo-r")


def at_one_rate(study: Study, found: Found, tasks: Sequence[Task]) -> str:
    """At each rate that LoRA and another arm have been run at with two seeds: LoRA's loss, and the differences from it."""
    lanes = {(lane.task.name, lane.arm.name): lane for lane in study.lanes}
    labels = {lane.arm.name: lane.arm.label for lane in study.lanes if lane.arm.name in AT_ONE_RATE[1:]}
    rows = []
    far_below = {name: list[Difference]() for name in labels}
    for task in tasks:
        plain, best = lanes.get((task.name, REFERENCE)), found.get((task.name, REFERENCE))
        if plain is None or best is None:
            continue
        for point in sorted(plain.of_steps(task.steps[-1:]).table, reverse=True):
            runs = list(plain.table[point].values())
            apart = {
                name: difference(list(lane.table.get(point, {}).values()), runs)
                for name in labels
                if (lane := lanes.get((task.name, name))) is not None
            }
            if not any(apart.values()):
                continue
            for name, one in apart.items():
                if one is not None and point[0] < FAR_BELOW * best.point[0]:
                    far_below[name].append(one)
            cells = [f"{shown(one)} {_side(one)}" if (one := apart.get(name)) is not None else "–" for name in labels]
            mark = " (LoRA's best)" if point == best.point else ""
            rows.append((task.label, f"{point[0]:g}{mark}", f"{mean(run.loss for run in runs):.4f}", *cells))
    columns = ("task", "rate", "LoRA's loss", *(f"{label}, less LoRA's" for label in labels.values()))
    counts = (
        f"{labels[name]} at {sum(one.better for one in known)} of {len(known)}"
        for name, known in far_below.items()
        if known
    )
    caption = f"Lower at rates of a third of LoRA's best and below: {'; '.join(counts)}."
    return Table("", columns, rows, caption).markdown() if rows else "Not run yet."


#: What is compared within LoRA-Over: its frame, the choice of matrices, weight decay.
FRAMES = (
    *(("mpo-null", "mpo-10"), ("mpo-balanced", "mpo-10"), ("mpo-gradient", "mpo-10"), ("mpo-10-matched", "mpo-10")),
    *(("svd-anew", "svd-matched"), ("mpo-10-anew", "mpo-10-matched"), ("mpo-10-anew-gradient", "mpo-10-anew")),
)
CHOICES = (("mpo-r", "mpo-random"), ("mpo-p", "mpo-random"), ("mpo-10", "mpo-random"))
DECAY = (("lora-decay", "lora"), ("mpo-decay", "mpo-10"))
#: Depth in the weights themselves, beside full fine-tuning.
WEIGHTS = (("opf", "full"),)


def provenance(study: Study) -> str:
    """How many runs, of which commits, and how long they took."""
    runs = [run for lane in study.lanes for seeds in lane.table.values() for run in seeds.values()]
    commits = Counter(run.commit.removesuffix("+")[:8] for run in runs if run.commit)
    failed = sum(not math.isfinite(run.loss) for run in runs)
    hours = sum(run.seconds for run in runs) / 3600
    named = ", ".join(f"`{commit}` ({count})" for commit, count in commits.most_common())
    return (
        f"{len(runs)} runs, of which {failed} diverged or failed; {hours:.1f} hours of training on one core each. Commits (and their "
        f"runs): {named}."
    )


# -- single steps -------------------------------------------------------------------------------------------------------


def step_table(rows: Sequence[dict[str, Any]]) -> str:
    """For each arm: direction and length of its steps over the course of training, and how even the product's spectrum is."""
    cells = []
    for row in rows:
        cosines, lengths, values = row["cosines"], row["lengths"], row["singular_values"]
        tenth = max(1, len(cosines) // 10)
        shares = [
            f"{mean(part[span]):.2f}" for part in (cosines, lengths) for span in (slice(tenth), slice(-tenth, None))
        ]
        weights = [value**2 / sum(each**2 for each in values) for value in values]
        effective = 1 / sum(weight**2 for weight in weights)
        cells.append((row["label"], f"{row['lr']:g}", *shares, f"{effective:.2f}"))
    columns = (
        "arm",
        "rate",
        "cosine, first tenth",
        "last tenth",
        "length, first tenth",
        "last tenth",
        "directions of BA",
    )
    return Table("", columns, cells).markdown() if cells else "Not run yet."


# -- the page ---------------------------------------------------------------------------------------------------------


def pages(study: Study, tasks: Sequence[Task], held_out: str, page: Path, readme: Path) -> dict[Path, dict[str, str]]:
    """The generated text of each mark of the page and of the README."""
    found = findings(study)
    by_task = {task.name: [each for (name, _), each in found.items() if name == task.name] for task in tasks}
    columns = ("arm", "better on", "equal on", "worse on", "median difference", "on the task held back")
    rows = overall(found, tasks, held_out)
    tables = [f"### {task.label}\n\n{task_table(task, by_task[task.name])}" for task in tasks if by_task[task.name]]
    said, origin = answer(found, held_out), provenance(study)
    return {
        page: {
            "answer": said,
            "overall": Table("", columns, rows).markdown() if rows else "Not run yet.",
            "tables": "\n".join(tables),
            "one rate": at_one_rate(study, found, tasks),
            "transfer": transfer(found, tasks),
            "ranks": over_ranks(found, tasks),
            "widths": over_widths(found),
            "frames": pairs(found, tasks, FRAMES),
            "choices": pairs(found, tasks, CHOICES),
            "decay": pairs(found, tasks, DECAY),
            "weights": pairs(found, tasks, WEIGHTS),
            "steps": step_table(watched(study)),
            "provenance": origin,
        },
        readme: {"readme": f"{said}\n\n{readme_table(found, tasks)}\n{origin}"},
    }


def filled(page: str, made: Mapping[str, str], path: Path) -> str:
    """``page`` with the generated text between its marks."""
    for name, text in made.items():
        page = marked.replaced(page, f"<!-- study: {name} -->", f"<!-- end of {name} -->", text, path)
    return page


#: The file with the study's answer in a sentence, and the one with what was seen of single steps; they lie beside the runs.
ANSWER, STEPS = "answer.txt", "steps.json"


def watched(study: Study) -> list[dict[str, Any]]:
    """What ``study.py steps`` has seen; empty where it was not run."""
    path = study.folder / STEPS
    rows: list[dict[str, Any]] = read_json(path)["rows"] if path.exists() else []
    return rows


def write(study: Study, tasks: Sequence[Task], held_out: str, page: Path, readme: Path) -> None:
    """Write the generated parts of the page and of the README, the figures beside the page, and the answer in a sentence."""
    made = pages(study, tasks, held_out, page, readme)
    texts = {path: filled(path.read_text(encoding="utf-8"), parts, path) for path, parts in made.items()}
    found, figures = findings(study), page.parent / "figures"
    study_figures.dot_grid(study, figures / "study-rates.png")
    study_figures.forest(found, tasks, figures / "study-differences.png")
    study_figures.draw_steps(watched(study), figures / "study-steps.png")
    for path, text in texts.items():
        write_text(path, text)
    write_text(study.folder / ANSWER, sentence(found, held_out) + "\n")
