"""Files of JSON lines: broken ones are one clear error, interrupted ones go on, intervals are Wilson's."""

from __future__ import annotations

import gzip
import json
import math
import statistics
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")

from hypothesis import given
from hypothesis import strategies as st

from recipes.support.evaluation.accuracy import Accuracy
from recipes.support.evaluation.answers import collect_answers
from recipes.support.evaluation.records import Journal, read_records

COLUMNS = {"name": str, "size": int}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"name": "a", "size": 1}\n{"name": "b"', r"line 2: not valid JSON"),
        ('{"name": "a", "size": 1}\n\n["b", 2]', r"line 3: expected an object, found list"),
        ('{"name": "a"}', r"line 1: no column size; found name"),
        ("{}", r"line 1: no column name, size; found none"),
        ('{"name": "a", "size": "1"}', r"line 1: column size should be int, found str"),
        ("\n \n", r"holds no record; every line should be an object with name, size"),
        ("", r"holds no record"),
    ],
)
def test_a_broken_file_is_one_error_that_names_file_and_line(tmp_path: Path, lines: str, message: str):
    path = tmp_path / "data.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=rf"data\.jsonl.*{message}"):
        read_records(path, COLUMNS)


def test_what_is_no_text_or_no_archive_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"absent\.jsonl does not exist"):
        read_records(tmp_path / "absent.jsonl", COLUMNS)
    with pytest.raises(ValueError, match="cannot be read"):
        read_records(tmp_path, COLUMNS)
    (tmp_path / "latin.jsonl").write_bytes(b'{"name": "a", "size": 1}\n{"name": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 2: byte 10 is not UTF-8"):
        read_records(tmp_path / "latin.jsonl", COLUMNS)
    whole = gzip.compress(b'{"name": "a", "size": 1}\n' * 99)
    for name, content in {"plain.jsonl.gz": b"{}", "cut.jsonl.gz": whole[:-9]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read"):
            read_records(tmp_path / name, COLUMNS)


@given(st.lists(st.builds(lambda name, size: {"name": name, "size": size}, st.text(), st.integers()), min_size=1))
def test_plain_and_compressed_files_are_read_alike(tmp_path_factory: pytest.TempPathFactory, records):
    folder = tmp_path_factory.mktemp("records")
    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode("utf-8", "replace")
    expected = [json.loads(line) for line in text.split(b"\n")]
    (folder / "a.jsonl").write_bytes(text)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(text))
    assert read_records(folder / "a.jsonl", COLUMNS) == read_records(folder / "a.jsonl.gz", COLUMNS) == expected


@given(st.data())
def test_a_journal_cut_anywhere_keeps_its_whole_lines_and_goes_on(tmp_path_factory: pytest.TempPathFactory, data):
    path = tmp_path_factory.mktemp("journal") / "results.jsonl"
    journal = Journal(path, COLUMNS, key=("name",))
    results = [{"name": name, "size": size} for size, name in enumerate(data.draw(st.lists(st.text(), unique=True)))]
    for result in results:
        journal.append(result)
    written = path.read_bytes() if results else b""
    cut = data.draw(st.integers(0, len(written)))
    path.write_bytes(written[:cut])
    again = Journal(path, COLUMNS, key=("name",))
    kept = written[:cut].count(b"\n")
    assert [again.get((result["name"],)) for result in results] == [*results[:kept], *[None] * (len(results) - kept)]
    for result in results[kept:]:
        again.append(result)
    assert path.read_bytes() == written


def test_a_journal_with_a_broken_line_inside_is_refused_and_left_alone(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"name": "a", "si\n{"name": "b", "size": 1}\n{"na')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: not valid JSON"):
        Journal(path, COLUMNS, key=("name",))
    assert path.read_bytes() == before


def test_a_result_recorded_again_replaces_the_earlier_one(tmp_path: Path):
    journal = Journal(tmp_path / "deep" / "results.jsonl", COLUMNS, key=("name",))
    journal.append({"name": "a", "size": 1})
    journal.append({"name": "a", "size": 2})
    assert Journal(journal.path, COLUMNS, key=("name",))["a",]["size"] == journal["a",]["size"] == 2


@pytest.mark.parametrize("workers", [1, 3])
def test_after_an_error_finished_work_is_kept_and_no_task_starts(tmp_path: Path, workers: int):
    journal = Journal(tmp_path / "results.jsonl", COLUMNS, key=("name",))
    started: list[int] = []
    lock = threading.Lock()

    def task(number: int) -> dict[str, Any]:
        with lock:
            started.append(number)
        if number == 3:
            raise ValueError("the judge is gone")
        return {"name": str(number), "size": number}

    with pytest.raises(ValueError, match="the judge is gone"):
        journal.fill([lambda number=number: task(number) for number in range(2000)], workers)
    finished = [number for number in started if number != 3]
    assert {0, 1, 2} <= set(finished)
    assert len(started) < 2000
    again = Journal(journal.path, COLUMNS, key=("name",))
    assert all((str(number),) in again for number in finished)


def test_a_journal_needs_a_worker(tmp_path: Path):
    with pytest.raises(ValueError, match="workers is 0"):
        Journal(tmp_path / "results.jsonl", COLUMNS, key=("name",)).fill([], 0)


# -- answers ----------------------------------------------------------------------------------------------------------

QUESTIONS = [({"task_id": f"t{number}", "sample": number % 2}, f"prompt {number}") for number in range(7)]


class Model:
    """Answers with the prompt and the number of its batch; dies in batch ``dies_in``."""

    def __init__(self, dies_in: int | None = None) -> None:
        self.dies_in, self.asked = dies_in, []

    def __call__(self, prompts: Sequence[str], number: int) -> list[str]:
        if number == self.dies_in:
            raise KeyboardInterrupt
        self.asked.append(number)
        return [f"{prompt}, batch {number}" for prompt in prompts]


@pytest.mark.parametrize("dies_in", [0, 1, 2])
def test_an_interrupted_run_answers_the_rest_as_an_uninterrupted_one(tmp_path: Path, dies_in: int):
    whole = collect_answers(tmp_path / "whole.jsonl", QUESTIONS, Model(), batch=3)
    path = tmp_path / "parts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        collect_answers(path, QUESTIONS, Model(dies_in), batch=3)
    rest = Model()
    assert collect_answers(path, QUESTIONS, rest, batch=3) == whole
    assert rest.asked == [number for number in range(3) if number >= dies_in]
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [record["prompt"] for record in whole] == [prompt for _, prompt in QUESTIONS]


def test_a_batch_that_was_cut_is_asked_whole_and_keeps_what_it_had(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    whole = collect_answers(path, QUESTIONS, Model(), batch=3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:10])
    model = Model()
    assert collect_answers(path, QUESTIONS, model, batch=3) == whole
    assert model.asked == [1, 2]


def test_answers_to_other_prompts_and_ambiguous_keys_are_refused(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    collect_answers(path, QUESTIONS[:2], Model())
    with pytest.raises(ValueError, match=r"answers\.jsonl answers \('t0', 0\) to another prompt"):
        collect_answers(path, [(QUESTIONS[0][0], "changed"), QUESTIONS[1]], Model())
    with pytest.raises(ValueError, match=r"two questions have the key \('t0', 0\)"):
        collect_answers(path, [QUESTIONS[0], QUESTIONS[0]], Model())
    with pytest.raises(ValueError, match="2 prompts were given and 1 answers came back"):
        collect_answers(tmp_path / "short.jsonl", QUESTIONS[:2], lambda prompts, number: ["one"])
    with pytest.raises(ValueError, match="batch is 0"):
        collect_answers(path, QUESTIONS, Model(), batch=0)
    assert collect_answers(path, [], Model()) == []


# -- accuracy ---------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 5000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))), st.floats(0.5, 0.999)
)
def test_the_interval_is_wilsons(counts, confidence):
    """Its ends are the shares p at which the observed share is z standard errors of p away."""
    right, total = counts
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = Accuracy(right, total).interval(confidence)
    assert (
        0 <= low <= right / total <= high <= 1 or math.isclose(low, right / total) or math.isclose(high, right / total)
    )
    for end in (low, high):
        assert (right / total - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / total, rel=1e-6, abs=1e-12)
    assert high > low


def test_an_accuracy_shows_share_counts_and_interval():
    assert str(Accuracy(3, 4)).startswith("75.00% (3 of 4; 95 % interval 30.06% to 95.44%)")


@pytest.mark.parametrize(("right", "total"), [(-1, 3), (4, 3), (0, 0)])
def test_impossible_counts_are_refused(right: int, total: int):
    with pytest.raises(ValueError, match=f"{right} right of {total}"):
        Accuracy(right, total)
