"""MT-Bench: answers to two-turn questions, and the mean grade that a judge gives them.

The benchmark is Zheng et al. 2023 (arXiv:2306.05685); files have FastChat's format. The judge grades each turn alone. For
the second turn it reads the whole conversation. In mathematics, reasoning and coding it is shown a reference answer.
LoRA-Over (arXiv:2605.16470) reports the first turn; the mean over both turns is the benchmark's own number.

Differences from FastChat: answers are sampled as the caller's ``generate`` does it, not at a temperature of each
category's own, and a reply without a grade is asked for anew.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from .answers import Generate, collect_answers
from .judge import PROMPTS, Judge, JudgePrompt, read_judge_prompts
from .records import Journal, Record, read_records

#: Categories that are graded against a reference answer (FastChat, llm_judge/common.py).
WITH_REFERENCE = ("math", "reasoning", "coding")

#: A conversation so far, turn by turn, ending with the user's. Its length is odd.
Conversation = Sequence[str]


def read_questions(path: str | Path) -> list[Record]:
    """A question file: ``question_id``, ``category`` and ``turns``, which are two texts."""
    questions = read_records(path, {"question_id": int, "category": str, "turns": list})
    seen: set[int] = set()
    for question in questions:
        number, turns = question["question_id"], question["turns"]
        if number in seen:
            raise ValueError(f"{path}: two questions have the question_id {number}")
        if len(turns) != 2 or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{path}, question {number}: turns should be two texts, found {turns!r:.80}")
        seen.add(number)
    return questions


def read_references(path: str | Path) -> dict[int, list[str]]:
    """Reference answers to both turns, by ``question_id``, from a file of FastChat's answers."""
    references = {}
    for record in read_records(path, {"question_id": int, "choices": list}):
        try:
            first, second = record["choices"][0]["turns"]
        except (LookupError, TypeError, ValueError) as error:
            number = record["question_id"]
            raise ValueError(f"{path}, question {number}: choices should begin with an answer of two turns") from error
        references[record["question_id"]] = [str(first), str(second)]
    return references


def answer_questions(
    path: str | Path,
    questions: Sequence[Record],
    generate: Generate,
    prompt_of: Callable[[Conversation], str],
    batch: int = 32,
) -> dict[int, list[str]]:
    """Answer both turns of all questions; what the file holds already is kept. Returns two answers by ``question_id``."""
    first_turns = [
        ({"question_id": question["question_id"], "turn": 1}, prompt_of(question["turns"][:1]))
        for question in questions
    ]
    first = collect_answers(path, first_turns, generate, batch)
    second_turns = []
    for question, answered in zip(questions, first, strict=True):
        conversation = [question["turns"][0], answered["answer"], question["turns"][1]]
        second_turns.append(({"question_id": question["question_id"], "turn": 2}, prompt_of(conversation)))
    second = collect_answers(path, second_turns, generate, batch)
    return {one["question_id"]: [one["answer"], two["answer"]] for one, two in zip(first, second, strict=True)}


@dataclass(frozen=True)
class Scores:
    """The judgments of both turns of every question."""

    judgments: tuple[Record, ...]

    @property
    def unscored(self) -> tuple[Record, ...]:
        """Judgments without a grade; no mean counts them."""
        return tuple(judgment for judgment in self.judgments if judgment["score"] is None)

    def mean(self, turn: int | None = None, category: str | None = None) -> float | None:
        """The mean grade of a turn (both where it is ``None``) and of a category; ``None`` where nothing is graded."""
        grades = [
            judgment["score"]
            for judgment in self.judgments
            if turn in (None, judgment["turn"]) and category in (None, judgment["category"])
        ]
        scored = [grade for grade in grades if grade is not None]
        return statistics.fmean(scored) if scored else None

    def __str__(self) -> str:
        def shown(mean: float | None) -> str:
            return "no grade" if mean is None else f"{mean:.2f}"

        text = f"first turn {shown(self.mean(turn=1))}, both turns {shown(self.mean())}"
        if not self.unscored:
            return text
        one = self.unscored[0]
        return (
            f"{text}; {len(self.unscored)} of {len(self.judgments)} without a grade, such as question {one['question_id']}, "
            f"turn {one['turn']}: {one['problem']}"
        )


def judge_answers(
    path: str | Path,
    questions: Sequence[Record],
    answers: Mapping[int, Sequence[str]],
    references: Mapping[int, Sequence[str]],
    judge: Judge,
    prompts: str | Path = PROMPTS,
    workers: int = 1,
) -> Scores:
    """Have both turns of all questions graded; what the file holds a grade of is kept, the rest is asked for.

    A record of the file holds the judge's model, name and hash of the prompt, hash of the filled prompt (and so of question,
    answer and reference), all raw replies, the score, and the problem where there is none. Raises ``ValueError`` where an
    answer, a reference or a prompt is missing or the file was made with another judge or prompt, before the judge is asked.
    """
    columns = {"question_id": int, "turn": int, "judge": str, "prompt_hash": str, "filled_hash": str, "replies": list}
    journal = Journal(path, columns, key=("question_id", "turn"))
    known_prompts = read_judge_prompts(prompts)
    keys, tasks = [], []
    for question in questions:
        for turn in (1, 2):
            name, fields = _asked(question, turn, answers, references)
            if name not in known_prompts:
                raise ValueError(f"{prompts} has no judge prompt {name}; it has {', '.join(known_prompts)}")
            prompt = known_prompts[name]
            identity = {
                "judge": judge.model,
                "prompt": name,
                "prompt_hash": prompt.hash,
                "filled_hash": hashlib.sha256(prompt.fill(fields).encode("utf-8", "surrogatepass")).hexdigest(),
            }
            key = (question["question_id"], turn)
            known = journal.get(key)
            if known is not None:
                _require_same(path, known, identity)
            if known is None or known["score"] is None:
                facts = {"question_id": key[0], "turn": turn, "category": question["category"], **identity}
                tasks.append(partial(_judge, judge, prompt, fields, facts))
            keys.append(key)
    journal.fill(tasks, workers)
    return Scores(tuple(journal[key] for key in keys))


def _judge(judge: Judge, prompt: JudgePrompt, fields: Mapping[str, str], facts: Record) -> Record:
    return {**facts, **asdict(judge.grade(prompt, fields))}


def _require_same(path: str | Path, known: Record, identity: Mapping[str, str]) -> None:
    for name, value in identity.items():
        if known.get(name) != value:
            where = f"question {known['question_id']}, turn {known['turn']}"
            raise ValueError(
                f"{path} judges {where} with {name} {known.get(name)!r:.40}, this run with {value!r:.40}; "
                "give this run a file of its own"
            )


def _asked(
    question: Record, turn: int, answers: Mapping[int, Sequence[str]], references: Mapping[int, Sequence[str]]
) -> tuple[str, dict[str, str]]:
    """The name of the judge's prompt and what it is filled with."""
    number = question["question_id"]
    if len(answers.get(number, ())) != 2:
        raise ValueError(f"question {number} has no answers to both turns; answer the questions first")
    fields = {"question": question["turns"][0], "answer": answers[number][0]}
    if turn == 2:
        fields = {f"{name}_{each}": text for each in (1, 2) for name, text in _turn(question, answers, each).items()}
    if question["category"] not in WITH_REFERENCE:
        return ("single-v1", "single-v1-multi-turn")[turn - 1], fields
    if number not in references:
        raise ValueError(
            f"question {number} ({question['category']}) is graded against a reference answer; there is none"
        )
    fields |= {f"ref_answer_{each}": references[number][each - 1] for each in range(1, turn + 1)}
    return ("single-math-v1", "single-math-v1-multi-turn")[turn - 1], fields


def _turn(question: Record, answers: Mapping[int, Sequence[str]], turn: int) -> dict[str, str]:
    return {"question": question["turns"][turn - 1], "answer": answers[question["question_id"]][turn - 1]}
