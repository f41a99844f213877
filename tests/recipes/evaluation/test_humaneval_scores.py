"""HumanEval: which program an answer stands for, pass@k, and scoring on problems made here."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest

pytest.importorskip("scipy")

from hypothesis import given
from hypothesis import strategies as st

from recipes.support.evaluation import humaneval
from recipes.support.evaluation.sandbox import Limits, SandboxError

needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed, so NO program is scored"
)


def problem(name: str, body: str, *asserts: str) -> dict[str, str]:
    prompt = f'from typing import List\n\n\ndef {name}(x: int) -> int:\n    """Says it.\n\n    >>> {name}(1)\n    """\n'
    test = "\n\nMETADATA = {}\n\n\ndef check(candidate):\n" + "".join(f"    assert {each}\n" for each in asserts)
    return {"task_id": f"Made/{name}", "prompt": prompt, "canonical_solution": body, "test": test, "entry_point": name}


PROBLEMS = [
    problem("square", "    return x * x\n", "candidate(3) == 9", "candidate(-2) == 4"),
    problem(
        "halve", "    if x < 0:\n        return -halve(-x)\n    return x // 2\n", "candidate(5) == 2", "halve(-5) == -2"
    ),
    problem("digits", "    import re\n    return re.findall('[0-9]', str(x))\n", "candidate(10) == ['1', '0']"),
]


def answers(*texts: str, sample: int = 0) -> list[dict[str, object]]:
    return [
        {"task_id": each["task_id"], "sample": sample, "answer": text}
        for each, text in zip(PROBLEMS, texts, strict=True)
    ]


SHAPES = {
    "a continuation": lambda p: p["canonical_solution"],
    "a continuation that goes on": lambda p: p["canonical_solution"] + "\ndef other():\n    ret",
    "a continuation before a comment": lambda p: p["canonical_solution"] + "\n# Now the next",
    "a continuation before a fence": lambda p: p["canonical_solution"] + "```\nThis works.",
    "a fenced function": lambda p: f"Sure:\n```python\n{p['prompt']}{p['canonical_solution']}```\nIt works.",
    "the rest of an open fence": lambda p: f"{p['prompt']}{p['canonical_solution']}```\nIt works.",
    "a second fence": lambda p: f"Run\n```sh\npip\n```\nand\n```\n{p['prompt']}{p['canonical_solution']}\n```",
    "a fenced body": lambda p: f"Here:\n```\n{p['canonical_solution']}```",
    "a function among prose": lambda p: f"Of course!\n{p['prompt']}{p['canonical_solution']}\nThis is it.",
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("of", PROBLEMS, ids=lambda each: each["entry_point"])
def test_the_program_of_a_right_answer_is_right_whatever_its_shape(shape, of):
    namespace: dict[str, object] = {}
    exec(humaneval.program_of(of, SHAPES[shape](of)), namespace)  # answers made above, not by a model
    exec(of["test"], namespace)
    namespace["check"](namespace[of["entry_point"]])


@given(st.text(alphabet="def square(x):\n `#\tretun*'\"\\", max_size=80))
def test_every_answer_has_a_program_that_begins_with_the_prompt(answer):
    assert humaneval.program_of(PROBLEMS[0], answer).startswith(PROBLEMS[0]["prompt"])


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_sample(counts):
    samples, right, k = counts
    draws = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    assert math.isclose(humaneval.pass_at_k(samples, right, k), sum(map(any, draws)) / len(draws), abs_tol=1e-12)


@pytest.mark.parametrize("counts", [(3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="expected 1 <= k <= samples"):
        humaneval.pass_at_k(*counts)


@needs_bubblewrap
def test_canonical_solutions_pass_and_empty_answers_fail(tmp_path: Path):
    canonical = answers(*[each["canonical_solution"] for each in PROBLEMS])
    scores = humaneval.score(PROBLEMS, canonical, tmp_path / "right.jsonl", execute=True, workers=2)
    assert [verdict["passed"] for verdict in scores.verdicts] == [True] * 3
    assert scores.pass_at(1) == 1
    empty = humaneval.score(PROBLEMS, answers("", "", ""), tmp_path / "empty.jsonl", execute=True)
    assert empty.pass_at(1) == 0


@needs_bubblewrap
def test_several_samples_give_the_mean_over_problems(tmp_path: Path):
    right = [each["canonical_solution"] for each in PROBLEMS]
    samples = [*answers(right[0], right[1], "", sample=0), *answers(right[0], "    1 +", "", sample=1)]
    scores = humaneval.score(PROBLEMS, samples, tmp_path / "verdicts.jsonl", execute=True)
    assert scores.pass_at(1) == pytest.approx((1 + 0.5 + 0) / 3)
    assert scores.pass_at(2) == pytest.approx(2 / 3)
    assert [(verdict["task_id"], verdict["sample"]) for verdict in scores.verdicts] == [
        (each["task_id"], each["sample"]) for each in samples
    ]


@needs_bubblewrap
def test_verdicts_are_kept_and_only_changed_programs_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "verdicts.jsonl"
    right = [each["canonical_solution"] for each in PROBLEMS]
    humaneval.score(PROBLEMS, answers(*right), path, execute=True)
    checked: list[str] = []
    check = humaneval.Sandbox.check

    def counted(self, program, prompt, test, entry_point):
        checked.append(entry_point)
        return check(self, program, prompt, test, entry_point)

    monkeypatch.setattr(humaneval.Sandbox, "check", counted)
    again = humaneval.score(PROBLEMS, answers(right[0], "", right[2]), path, execute=True)
    assert checked == ["escapes", "halve"]
    assert [verdict["passed"] for verdict in again.verdicts] == [True, False, True]
    humaneval.score(PROBLEMS, answers(right[0], "", right[2]), path, execute=True, limits=Limits(seconds=9.0))
    assert checked[2:] == ["escapes", "square", "halve", "digits"]


@needs_bubblewrap
def test_a_sandbox_that_fails_midway_keeps_verdicts_and_the_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, check = tmp_path / "verdicts.jsonl", humaneval.Sandbox.check

    def fails(self, program, prompt, test, entry_point):
        if entry_point == "digits":
            raise SandboxError("the sandbox did not start: no memory")
        return check(self, program, prompt, test, entry_point)

    canonical = answers(*[each["canonical_solution"] for each in PROBLEMS])
    with monkeypatch.context() as patched:
        patched.setattr(humaneval.Sandbox, "check", fails)
        with pytest.raises(SandboxError, match="no memory"):
            humaneval.score(PROBLEMS, canonical, path, execute=True)
    assert len(path.read_text().splitlines()) == 2
    assert humaneval.score(PROBLEMS, canonical, path, execute=True).pass_at(1) == 1


def test_nothing_is_executed_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(humaneval, "Sandbox", lambda limits: pytest.fail("a sandbox was made"))
    with pytest.raises(ValueError, match=r"allow it explicitly \(execute=True, --execute\)"):
        humaneval.score(PROBLEMS, answers("", "", ""), tmp_path / "verdicts.jsonl", execute=False)
    with pytest.raises(ValueError, match="differ in 1 of their task_ids, Made/digits among them"):
        humaneval.score(PROBLEMS, answers("", "", "")[:2], tmp_path / "verdicts.jsonl", execute=True)


def test_problem_files_are_checked(tmp_path: Path):
    path = tmp_path / "problems.jsonl.gz"
    lines = [json.dumps(each) for each in PROBLEMS]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert humaneval.read_problems(path) == PROBLEMS
    path.write_bytes(gzip.compress("\n".join([*lines, lines[0]]).encode()))
    with pytest.raises(ValueError, match="two problems have the task_id Made/square"):
        humaneval.read_problems(path)
    path.write_bytes(gzip.compress("\n".join([*lines, '{"task_id": "x", "prompt": ""}']).encode()))
    with pytest.raises(ValueError, match=r"problems\.jsonl\.gz, line 4: no column test, entry_point"):
        humaneval.read_problems(path)
