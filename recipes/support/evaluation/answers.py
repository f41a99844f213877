"""A model's answers to the questions of a benchmark, kept in a file so that an interrupted run can go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .records import Journal, Record

#: From prompts to as many answers. The number is that of the batch, for a seed that does not depend on what ran before.
Generate = Callable[[Sequence[str], int], Sequence[str]]


def collect_answers(
    path: str | Path, questions: Sequence[tuple[Record, str]], generate: Generate, batch: int = 32
) -> list[Record]:
    """Answer questions that have no answer in the file yet, and return a record for every question, in their order.

    A question is its key (columns that identify it, such as ``task_id`` and ``sample``) and its prompt. A record holds the
    key, ``prompt`` and ``answer``. Batches are the same whatever is answered already, so a resumed run samples what an
    uninterrupted one does. Raises ``ValueError`` where the file holds answers to other prompts.
    """
    if not questions:
        return []
    if batch < 1:
        raise ValueError(f"batch is {batch}; it should be at least 1")
    columns = {name: type(value) for name, value in questions[0][0].items()}
    keys = [tuple(key[name] for name in columns) for key, _ in questions]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"two questions have the key {twice}; every question needs a key of its own")
    journal = Journal(path, {**columns, "prompt": str, "answer": str}, key=tuple(columns))
    for key, (_, prompt) in zip(keys, questions, strict=True):
        record = journal.get(key)
        if record is not None and record["prompt"] != prompt:
            raise ValueError(f"{path} answers {key} to another prompt; give this run a file of its own")
    for number, start in enumerate(range(0, len(questions), batch)):
        rows = range(start, min(start + batch, len(questions)))
        if all(keys[row] in journal for row in rows):
            continue
        answers = generate([questions[row][1] for row in rows], number)
        if len(answers) != len(rows):
            raise ValueError(f"{len(rows)} prompts were given and {len(answers)} answers came back")
        for row, answer in zip(rows, answers, strict=True):
            if keys[row] not in journal:
                journal.append({**questions[row][0], "prompt": questions[row][1], "answer": answer})
    return [journal[key] for key in keys]
