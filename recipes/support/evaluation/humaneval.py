"""HumanEval: the programs in a model's answers, and the share of problems that they solve.

The benchmark and the estimator of pass@k are Chen et al. 2021, "Evaluating Large Language Models Trained on Code"
(arXiv:2107.03374). Answers come first (``answers.collect_answers``), code is executed afterwards, and only on request.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from .records import Journal, Record, read_records
from .sandbox import Limits, Sandbox

_COLUMNS = {"task_id": str, "prompt": str, "test": str, "entry_point": str}
_FENCE = re.compile(r"^[ \t]*```[^\n]*\n?", re.MULTILINE)
#: Where a continuation of the prompt ends: the stop sequences of Chen et al. 2021.
_STOPS = re.compile(r"\n(?:class|def|#|if|print)")
_FIRST_CODE = re.compile(r"^(?:import \w|from [\w.]+ import|(?:async )?def |class |@)", re.MULTILINE)


def read_problems(path: str | Path) -> list[Record]:
    """A problem file, ``.jsonl`` or ``.jsonl.gz``: ``task_id``, ``prompt``, ``test``, ``entry_point``."""
    problems = read_records(path, _COLUMNS)
    seen: set[str] = set()
    for problem in problems:
        if problem["task_id"] in seen:
            raise ValueError(f"{path}: two problems have the task_id {problem['task_id']}")
        seen.add(problem["task_id"])
    return problems


def program_of(problem: Record, answer: str) -> str:
    """The source that an answer stands for: the prompt, and behind it the answer's code.

    An answer may define the whole function, in a fenced block or among other lines, with or without the opening fence
    (which the prompt may have ended in); or it continues the prompt. Indentation is left as it is.
    """
    parts = _FENCE.split(answer)
    defines = re.compile(rf"^(?:async )?def {re.escape(problem['entry_point'])}\b", re.MULTILINE)
    whole = next((part for part in parts if defines.search(part)), None)
    if whole is not None:
        return f"{problem['prompt']}\n{_code_in(whole)}\n"
    continuation = parts[0] if parts[0][:1].isspace() or len(parts) == 1 else parts[1]
    stop = _STOPS.search(continuation)
    return f"{problem['prompt']}{continuation[: stop.start()] if stop else continuation}\n"


def _code_in(text: str) -> str:
    """From the first line of code, the most lines that are valid Python; all lines where none are."""
    first = _FIRST_CODE.search(text)
    lines = text[first.start() if first else 0 :].splitlines()
    for count in range(len(lines), 0, -1):
        source = "\n".join(lines[:count])
        try:
            ast.parse(source)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
        return source
    return "\n".join(lines)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of the probability that one of ``k`` samples is right (Chen et al. 2021, equation 1)."""
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass@{k} of {samples} samples, {right} right: expected 1 <= k <= samples and 0 <= right <= samples"
        )
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


@dataclass(frozen=True)
class Scores:
    """Verdicts on the samples of every problem."""

    verdicts: tuple[Record, ...]
    """``task_id``, ``sample``, ``passed`` and ``reason``, in the order of the answers."""

    def pass_at(self, k: int) -> float:
        """pass@k, the mean over the problems."""
        passed = defaultdict(list)
        for verdict in self.verdicts:
            passed[verdict["task_id"]].append(verdict["passed"])
        return math.fsum(pass_at_k(len(each), sum(each), k) for each in passed.values()) / len(passed)


def score(
    problems: Sequence[Record],
    answers: Sequence[Record],
    verdicts: str | Path,
    *,
    execute: bool,
    limits: Limits | None = None,
    workers: int = 1,
) -> Scores:
    """Execute the programs of all answers in the sandbox and count those that pass their problem's test.

    ``answers`` are records with ``task_id``, ``sample`` and ``answer``; every problem needs one at least. ``verdicts`` is a
    file: what it holds of the same program, test and limits is not executed again. Raises ``ValueError`` unless ``execute``
    is true, and ``SandboxError`` where there is no sandbox; verdicts that were reached before are kept.
    """
    by_task = {problem["task_id"]: problem for problem in problems}
    answered = {answer["task_id"] for answer in answers}
    if answered != set(by_task):
        stray = sorted(answered ^ set(by_task))
        raise ValueError(f"problems and answers differ in {len(stray)} of their task_ids, {stray[0]} among them")
    if not execute:
        raise ValueError("scoring executes code that a model wrote; allow it explicitly (execute=True, --execute)")
    sandbox = Sandbox(limits)
    columns = {"task_id": str, "sample": int, "passed": bool, "reason": str, "of": str}
    journal = Journal(verdicts, columns, key=("task_id", "sample"))

    keys = [(answer["task_id"], answer["sample"]) for answer in answers]
    tasks = []
    for key, answer in zip(keys, answers, strict=True):
        problem = by_task[answer["task_id"]]
        program = program_of(problem, answer["answer"])
        identity = json.dumps([program, problem, asdict(sandbox.limits)], sort_keys=True)
        of = hashlib.sha256(identity.encode("ascii")).hexdigest()
        known = journal.get(key)
        if known is None or known["of"] != of:
            tasks.append(partial(_judge, sandbox, problem, program, answer["sample"], of))
    journal.fill(tasks, workers)
    return Scores(tuple(journal[key] for key in keys))


def _judge(sandbox: Sandbox, problem: Record, program: str, sample: int, of: str) -> Record:
    verdict = sandbox.check(program, problem["prompt"], problem["test"], problem["entry_point"])
    return {"task_id": problem["task_id"], "sample": sample, **asdict(verdict), "of": of}
