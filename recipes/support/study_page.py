"""What the runs of a study say: its tables, its figures, and the sentences with numbers in them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from support import marked
from support.paired import Difference, difference
from support.provenance import read_json, write_text
from support.search import Arm, Lane, Point, Run, Study, Task
from support.tables import Table, percent

#: What every arm is compared with.
REFERENCE = "lora"
#: A rate is good where the loss is at most this much above the arm's best, as a share of it.
GOOD = 0.1
#: A gain has to be seen on at least so many tasks.
TASKS_OF_A_GAIN = 2


@dataclass(frozen=True)
class Finding:
    """What the runs of an arm on a task say."""

    task: Task
    arm: Arm
    point: Point
    """The best rate and number of steps."""
    inside: bool
    """Whether the neighbours of that rate were tried with the same seeds."""
    runs: tuple[Run, ...]
    """At the best point, by seed."""
    good: tuple[float, float, bool, bool]
    """The lowest and the highest good rate, and whether a worse one was tried below and above."""
    apart: Difference | None
    """From the reference, where both have two seeds or more."""

    @property
    def loss(self) -> float:
        return mean(run.loss for run in self.runs)

    @property
    def accuracy(self) -> float | None:
        found = [run.accuracy for run in self.runs if run.accuracy is not None]
        return mean(found) if found else None


def findings(study: Study) -> dict[tuple[str, str], Finding]:
    """By task and arm; arms without a run that trained are left out."""
    found: dict[tuple[str, str], Finding] = {}
    for lane in sorted(study.lanes, key=lambda lane: lane.arm.name != REFERENCE):
        if (finding := finding_of(lane, found.get((lane.task.name, REFERENCE)))) is not None:
            found[lane.task.name, lane.arm.name] = finding
    return found


def finding_of(lane: Lane, reference: Finding | None) -> Finding | None:
    """What the lane's runs say, with as many seeds as its optimum and both neighbours have."""
    most = max((len(runs) for runs in lane.table.values()), default=0)
    counts = [count for count in range(most, 0, -1) if lane.settled(range(count))]
    seeds = range(counts[0]) if counts else range(1)
    point = lane.best(seeds)
    if point is None:
        return None
    runs = tuple(lane.table[point][seed] for seed in seeds)
    apart = difference(runs, reference.runs) if reference is not None else None
    return Finding(lane.task, lane.arm, point, bool(counts), runs, good_rates(lane, point), apart)


def good_rates(lane: Lane, best: Point, seed: int = 0) -> tuple[float, float, bool, bool]:
    """The rates next to the best one, without a gap, whose loss with one seed is nearly as low.

    Returns:
        The lowest and the highest, and whether a worse rate was tried below and above.
    """
    tried = sorted(lr for lr, steps in lane.table if steps == best[1] and seed in lane.table[lr, steps])
    limit = (1 + GOOD) * lane.table[best][seed].loss
    place = tried.index(best[0])
    low = high = place
    while low > 0 and lane.table[tried[low - 1], best[1]][seed].loss <= limit:
        low -= 1
    while high < len(tried) - 1 and lane.table[tried[high + 1], best[1]][seed].loss <= limit:
        high += 1
    return tried[low], tried[high], low > 0, high < len(tried) - 1


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
        row += [str(each.point[1])] if len(task.steps) > 1 else []
        rows.append([*row, good(each), str(len(losses))])
    columns = ["arm", "loss", "accuracy", "less LoRA's", "", "rate", "good rates", "seeds"]
    if len(task.steps) > 1:
        columns.insert(6, "steps")
    return Table(task.label, columns, rows).markdown()


def shown(apart: Difference | None) -> str:
    """A difference and the interval that holds 95 % of the bootstrap."""
    return "–" if apart is None else f"{apart.mean:+.4f} [{apart.low:+.4f}, {apart.high:+.4f}]"


def verdict(finding: Finding) -> str:
    """Better, worse or neither than the reference, by two standard errors."""
    if finding.arm.name == REFERENCE:
        return "reference"
    if finding.apart is None:
        return "one seed"
    return "better" if finding.apart.better else "worse" if finding.apart.worse else "equal"


def good(finding: Finding) -> str:
    """The range of good rates in decades, the two outer half steps included; ``≥`` where it was not seen to end."""
    low, high, below, above = finding.good
    decades = math.log10(high / low) + 0.25
    return f"{'' if below and above else '≥ '}{decades:.2f}"


def overall(found: Mapping[tuple[str, str], Finding], tasks: Sequence[Task], held_out: str) -> list[Sequence[str]]:
    """For each arm with more than one seed somewhere: on how many tasks it is better, equal, worse; and on the held-out one."""
    rows: list[tuple[float, Sequence[str]]] = []
    arms = {finding.arm.name: finding.arm for finding in found.values() if finding.arm.name != REFERENCE}
    for name, arm in arms.items():
        mine = [found[task.name, name] for task in tasks if (task.name, name) in found]
        seen = Counter(verdict(each) for each in mine if each.task.name != held_out)
        compared = [each for each in mine if each.apart is not None and each.task.name != held_out]
        if not compared:
            continue
        shares = [each.apart.mean / (each.loss - each.apart.mean) for each in compared if each.apart]
        last = found.get((held_out, name))
        held = verdict(last) if last is not None else "not run"
        row = (
            arm.label,
            *(str(seen[word]) for word in ("better", "equal", "worse")),
            f"{100 * median(shares):+.1f} %",
            held,
        )
        rows.append((median(shares), row))
    return [row for _, row in sorted(rows, key=lambda each: each[0])]


def answer(found: Mapping[tuple[str, str], Finding], held_out: str) -> str:
    """The study's answer in sentences."""
    arms = {finding.arm.name: finding.arm for finding in found.values()}
    better: dict[str, list[str]] = {}
    worse: dict[str, list[str]] = {}
    for (task, name), finding in found.items():
        if finding.apart is None or task == held_out:
            continue
        if finding.apart.better:
            better.setdefault(name, []).append(finding.task.label)
        elif finding.apart.worse:
            worse.setdefault(name, []).append(finding.task.label)
    gains = [name for name in better if len(better[name]) >= TASKS_OF_A_GAIN]
    over = [name for name in arms if arms[name].method.startswith("lora-over")]
    compared = [name for name in over if any((task, name) in found and found[task, name].apart for task, _ in found)]
    gaining = [name for name in gains if name in over]
    lines = []
    if gaining:
        lines.append(
            f"**At its own best rate, {_names(arms, gaining)} beats LoRA at LoRA's best rate** on at least {TASKS_OF_A_GAIN} tasks."
        )
    else:
        lines.append(
            f"**At rates that are tuned for each, none of the {len(compared)} arms of LoRA-Over that were compared beats LoRA** by two "
            f"standard errors on {TASKS_OF_A_GAIN} tasks."
        )
    once = [name for name in over if 0 < len(better.get(name, ())) < TASKS_OF_A_GAIN]
    if once:
        lines.append(
            f"Better on one task only: {'; '.join(f'{arms[name].label} ({better[name][0]})' for name in once)}."
        )
    losing = [name for name in over if len(worse.get(name, ())) >= TASKS_OF_A_GAIN]
    if losing:
        lines.append(f"Worse on {TASKS_OF_A_GAIN} tasks or more: {_names(arms, losing)}.")
    others = [name for name in gains if name not in over]
    if others:
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


def sentence(found: Mapping[tuple[str, str], Finding], held_out: str) -> str:
    """The answer in one plain sentence, for who has just seen one run of each of two methods."""
    tasks = {finding.task.name for finding in found.values() if finding.apart is not None} - {held_out}
    over = {
        name for (_, name), finding in found.items() if finding.arm.method.startswith("lora-over") and finding.apart
    }
    gains = [
        name
        for name in sorted(over)
        if sum(_verdict_on(found, task, name) == "better" for task in tasks) >= TASKS_OF_A_GAIN
    ]
    if not over:
        return ""
    arms = {finding.arm.name: finding.arm for finding in found.values()}
    what = f"{_names(arms, gains)} beat LoRA" if gains else f"none of {len(over)} variants of LoRA-Over beat LoRA"
    return (
        f"at rates tuned for each, over several seeds and {len(tasks)} small tasks, {what} beyond noise (docs/study.md)"
    )


def _verdict_on(found: Mapping[tuple[str, str], Finding], task: str, name: str) -> str:
    finding = found.get((task, name))
    return verdict(finding) if finding is not None else ""


#: The arms that the README shows.
README_ARMS = ("lora", "svd", "mpo-10", "mpo-r", "mpo-10-matched", "lora+", "lora-rite")


def readme_table(found: Mapping[tuple[str, str], Finding], tasks: Sequence[Task]) -> str:
    """For a few arms the loss at their best rate, by task; what is lower than LoRA's by two standard errors is bold."""
    shown_tasks = [task for task in tasks if any(name == task.name and each.apart for (name, _), each in found.items())]
    arms = {finding.arm.name: finding.arm for finding in found.values()}
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
    counts = {
        len(finding.runs) for (task, name), finding in found.items() if name in README_ARMS and len(finding.runs) > 1
    }
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)}))) if counts else "no"
    caption = (
        f"Loss of an answer's token on held-out examples, in nats: mean ± standard deviation over {seeds} seeds, and the rate; "
        "bold: lower than LoRA's by two standard errors."
    )
    return Table("", ("", *(task.label for task in shown_tasks)), rows, caption).markdown() if rows else "Not run yet."


def _names(arms: Mapping[str, Arm], names: Iterable[str]) -> str:
    return ", ".join(arms[name].label for name in names)


def transfer(found: Mapping[tuple[str, str], Finding], tasks: Sequence[Task]) -> str:
    """The best rate by order, with steps as they come and with matched ones, and by rank."""
    columns = ("LoRA", "order 2", "order 4", "order 10", "order 16")
    lanes = {
        "as it comes": ("lora", "svd", "mpo-4", "mpo-10", "mpo-16"),
        "matched steps": ("lora", "svd-matched", "mpo-4-matched", "mpo-10-matched", "mpo-16-matched"),
    }
    return _rates(found, tasks, columns, lanes)


def over_ranks(found: Mapping[tuple[str, str], Finding], tasks: Sequence[Task]) -> str:
    """The best rate by rank."""
    lanes = {
        "LoRA": ("lora-rank-2", "lora", "lora-rank-32"),
        "MPO of order 10": ("mpo-10-rank-2", "mpo-10", "mpo-10-rank-32"),
    }
    return _rates(found, tasks, ("rank 2", "rank 8", "rank 32"), lanes)


def _rates(
    found: Mapping[tuple[str, str], Finding],
    tasks: Sequence[Task],
    columns: Sequence[str],
    lanes: Mapping[str, Sequence[str]],
) -> str:
    rows = []
    for task in tasks:
        for name, arms in lanes.items():
            known = [found.get((task.name, arm)) for arm in arms]
            if sum(each is not None for each in known[1:]):
                rates = [f"{each.point[0]:g}" if each is not None else "–" for each in known]
                numbers = [each.point[0] for each in known if each is not None]
                rows.append((task.label, name, *rates, f"{max(numbers) / min(numbers):.2g}"))
    return Table("", ("task", "", *columns, "highest over lowest"), rows).markdown() if rows else "Not run yet."


def pairs(found: Mapping[tuple[str, str], Finding], tasks: Sequence[Task], compared: Sequence[tuple[str, str]]) -> str:
    """Differences between two arms, both at their best rates."""
    rows = []
    for one, other in compared:
        for task in tasks:
            a, b = found.get((task.name, one)), found.get((task.name, other))
            if a is None or b is None or (apart := difference(a.runs, b.runs)) is None:
                continue
            said = "lower" if apart.better else "higher" if apart.worse else "equal"
            rows.append((f"{a.arm.label} less {b.arm.label}", task.label, shown(apart), said))
    return Table("", ("difference of losses", "task", "nats a token", ""), rows).markdown() if rows else "Not run yet."


#: What is compared within LoRA-Over: its frame, the choice of matrices, weight decay.
FRAMES = (("mpo-null", "mpo-10"), ("mpo-balanced", "mpo-10"), ("mpo-gradient", "mpo-10"), ("mpo-10-matched", "mpo-10"))
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


# -- figures ----------------------------------------------------------------------------------------------------------


def dot_grid(study: Study, path: Path, figures: Any) -> None:
    """For each task: arms down, rates across, a dot for each rate tried; a ring around the best."""
    from matplotlib.colors import LogNorm

    tasks = list({lane.task.name: lane.task for lane in study.lanes if lane.table}.values())
    arms = list({lane.arm.name: lane.arm for lane in study.lanes if lane.table}.values())
    if not tasks:
        return
    figure = figures.Figure(figsize=(3.1 * len(tasks) + 2.6, 0.27 * len(arms) + 1.6), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    points = None
    for axis, task in zip(axes, tasks, strict=True):
        lanes = {lane.arm.name: lane for lane in study.lanes if lane.task is task}
        reference = lanes[REFERENCE].best(range(1)) if REFERENCE in lanes else None
        scale = lanes[REFERENCE].loss(reference, range(1)) if reference else 1.0
        for row, arm in enumerate(arms):
            lane = lanes.get(arm.name)
            if lane is None or not lane.table:
                continue
            best = lane.best(range(1))
            rates: dict[float, float] = {}
            for (lr, steps), runs in lane.table.items():
                if 0 in runs and (best is None or steps == best[1]):
                    rates[lr] = runs[0].loss / scale
            drawn = [min(max(share, 0.5), 4.0) if math.isfinite(share) else 4.0 for share in rates.values()]
            points = axis.scatter(
                list(rates), [row] * len(rates), c=drawn, cmap="viridis_r", norm=LogNorm(0.5, 4.0), s=34, zorder=3
            )
            if best is not None:
                axis.scatter([best[0]], [row], s=90, facecolors="none", edgecolors="black", linewidths=1.2, zorder=4)
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter("")
        axis.set_yticks(range(len(arms)), [arm.label for arm in arms], fontsize=7)
        axis.set_title(task.label, fontsize=8)
        axis.set_xlabel("learning rate", fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(alpha=0.25)
    axes[0].invert_yaxis()
    if points is not None:
        bar = figure.colorbar(points, ax=axes, fraction=0.02, ticks=[0.5, 1, 2, 4])
        bar.ax.set_yticklabels(["half", "LoRA's best", "twice", "4x or more"], fontsize=7)
        bar.ax.minorticks_off()
    figure.suptitle("Loss by rate, first seed; a ring marks each arm's best rate", fontsize=10)
    _save(figure, path)


def forest(found: Mapping[tuple[str, str], Finding], tasks: Sequence[Task], path: Path, figures: Any) -> None:
    """For each task: the difference of each arm from the reference, with its interval, as a share of the reference's loss."""
    shown_tasks = [task for task in tasks if any(name == task.name and f.apart for (name, _), f in found.items())]
    arms = list({f.arm.name: f.arm for f in found.values() if f.apart is not None and f.arm.name != REFERENCE}.values())
    if not shown_tasks or not arms:
        return
    figure = figures.Figure(figsize=(2.9 * len(shown_tasks) + 2.6, 0.27 * len(arms) + 1.4), layout="constrained")
    axes = figure.subplots(1, len(shown_tasks), squeeze=False, sharey=True)[0]
    for axis, task in zip(axes, shown_tasks, strict=True):
        for row, arm in enumerate(arms):
            finding = found.get((task.name, arm.name))
            if finding is None or finding.apart is None:
                continue
            apart, scale = finding.apart, 100 / (finding.loss - finding.apart.mean)
            colour = {"better": "#0072B2", "worse": "#D55E00"}.get(verdict(finding), "0.45")
            axis.plot([scale * apart.low, scale * apart.high], [row, row], color=colour, lw=1.6)
            axis.plot([scale * apart.mean], [row], "o", color=colour, ms=4)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_xscale("symlog", linthresh=20)
        low, high = axis.get_xlim()
        ticks = [tick for tick in (-50, -20, -10, 0, 10, 20, 50, 100) if low <= tick <= high]
        axis.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
        axis.minorticks_off()
        axis.set_yticks(range(len(arms)), [arm.label for arm in arms], fontsize=7)
        axis.set_title(task.label, fontsize=8)
        axis.set_xlabel("% of LoRA's loss", fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.grid(alpha=0.25)
    axes[0].invert_yaxis()
    figure.suptitle("Loss less tuned LoRA's, 95 % of a bootstrap over seeds and answers: left is better", fontsize=10)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=130, metadata={"Software": None})


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


def draw_steps(rows: Sequence[dict[str, Any]], path: Path, figures: Any) -> None:
    """Cosine and length by step, and the singular values at the end."""
    if not rows:
        return
    figure = figures.Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for index, row in enumerate(rows):
        style = {"color": f"C{index}", "label": row["label"], "lw": 1.3}
        axes[0].plot(range(1, len(row["cosines"]) + 1), row["cosines"], **style)
        axes[1].plot(range(1, len(row["lengths"]) + 1), row["lengths"], **style)
        axes[2].plot(range(1, len(row["singular_values"]) + 1), row["singular_values"], marker="o", ms=3, **style)
    axes[0].set_title("Cosine with plain AdamW's step", fontsize=9)
    axes[1].set_title("Length, in parts of plain AdamW's", fontsize=9)
    axes[2].set_title("Singular values of BA, largest at 1", fontsize=9)
    for axis, label in zip(axes, ("step", "step", "number"), strict=True):
        axis.set_xlabel(label, fontsize=8)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
    axes[1].set_yscale("log")
    axes[2].set_yscale("log")
    axes[0].legend(fontsize=6)
    _save(figure, path)


# -- the page ---------------------------------------------------------------------------------------------------------


def sections(study: Study, tasks: Sequence[Task], held_out: str) -> dict[str, str]:
    """The generated text of each mark of the page."""
    found = findings(study)
    by_task = {task.name: [each for (name, _), each in found.items() if name == task.name] for task in tasks}
    columns = ("arm", "better on", "equal on", "worse on", "median difference", "on the task held back")
    rows = overall(found, tasks, held_out)
    tables = [f"### {task.label}\n\n{task_table(task, by_task[task.name])}" for task in tasks if by_task[task.name]]
    return {
        "answer": answer(found, held_out),
        "overall": Table("", columns, rows).markdown() if rows else "Not run yet.",
        "tables": "\n".join(tables),
        "transfer": transfer(found, tasks),
        "ranks": over_ranks(found, tasks),
        "frames": pairs(found, tasks, FRAMES),
        "choices": pairs(found, tasks, CHOICES),
        "decay": pairs(found, tasks, DECAY),
        "weights": pairs(found, tasks, WEIGHTS),
        "steps": step_table(watched(study)),
        "provenance": provenance(study),
    }


def filled(page: str, made: Mapping[str, str], path: Path) -> str:
    """``page`` with the generated text between its marks."""
    for name, text in made.items():
        page = marked.replaced(page, f"<!-- study: {name} -->", f"<!-- end of {name} -->", text, path)
    return page


def write(study: Study, tasks: Sequence[Task], held_out: str, path: Path, readme: Path) -> None:
    """Write the generated parts of the page and of the README, the page's figures, which lie beside it in ``figures``, and the
    sentence that recipes end with, which lies beside the runs."""
    import matplotlib.figure as figures

    found = findings(study)
    pages = {path: sections(study, tasks, held_out), readme: readme_sections(study, tasks, held_out)}
    texts = {each: filled(each.read_text(encoding="utf-8"), made, each) for each, made in pages.items()}
    dot_grid(study, path.parent / "figures" / "study-rates.png", figures)
    forest(found, tasks, path.parent / "figures" / "study-differences.png", figures)
    draw_steps(watched(study), path.parent / "figures" / "study-steps.png", figures)
    for each, text in texts.items():
        write_text(each, text)
    write_text(study.folder / ANSWER, sentence(found, held_out) + "\n")


#: The file with the study's answer in a sentence, and the one with what was seen of single steps.
ANSWER, STEPS = "answer.txt", "steps.json"


def watched(study: Study) -> list[dict[str, Any]]:
    """What ``study.py steps`` has seen; empty where it was not run."""
    path = study.folder / STEPS
    rows: list[dict[str, Any]] = read_json(path)["rows"] if path.exists() else []
    return rows


def readme_sections(study: Study, tasks: Sequence[Task], held_out: str) -> dict[str, str]:
    """The generated text of the README's mark."""
    found = findings(study)
    return {"readme": f"{answer(found, held_out)}\n\n{readme_table(found, tasks)}\n{provenance(study)}"}
