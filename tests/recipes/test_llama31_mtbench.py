"""The recipe of MT-Bench: its generated instructions, answers that are kept first, and a judge that grades them later."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("openai")

from embedded import instructions
from support import running

from recipes import llama31_mtbench as recipe

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


class Judge(BaseHTTPRequestHandler):
    """Grades first turns 6 and second turns 3, save that the first ``silent`` requests get no grade.

    It grades ``patience`` requests, and hangs up on those that come after.
    """

    asked = 0
    silent = 0
    patience = 1000

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Judge.asked += 1
        if Judge.asked > Judge.patience:
            self.close_connection = True
            return
        second = "### User:" in body["messages"][1]["content"]
        said = "None." if Judge.asked <= Judge.silent else f"Rating: [[{3 if second else 6}]]"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        reply = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("JUDGE", "word")
    Judge.asked, Judge.silent, Judge.patience = 0, 0, 1000
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def configuration(model: str, **changes: Any) -> recipe.Config:
    settings: dict[str, Any] = {
        "model": model,
        "lr": 1e-2,
        "train_size": 8,
        "eval_size": 4,
        "max_steps": 1,
        "batch": 4,
        "micro_batch": 2,
        "max_new_tokens": 4,
        "judge_key": "JUDGE",
    }
    return dataclasses.replace(recipe.Config(), **(settings | changes))


def test_rules_decide_the_answers_of_generated_instructions() -> None:
    for question in instructions.questions("test", 200):
        (first, second), (one, two) = question["turns"], question["reference"]
        if question["category"] == "math":
            words = first.rstrip(".").split()
            a, b, c = int(words[1]), int(words[3]), int(second.split()[2])
            assert int(one) == (a + b if words[0] == "Add" else a * b)
            assert int(two) == int(one) + c
            continue
        given, written = first.rstrip(".").partition(": ")[2].split(", "), one.split(", ")
        if "alphabetical" in first:
            assert written == sorted(given)
        elif "reverse" in first:
            assert all(written[i] == given[-1 - i] for i in range(len(given)))
        else:
            assert written == (given[1:] if "first one" in first else given[:-1])
        assert two == written[0 if "first one" in second else -1]


def test_splits_share_no_instruction() -> None:
    train = {row["instruction"] for row in instructions.examples("train", 1000)}
    assert not train & {question["turns"][0] for question in instructions.questions("test", 200)}
    assert len(train) == 1000


def test_answers_are_graded_later_and_only_once(tmp_path: Path, tiny_model: str, judge: str) -> None:
    config = configuration(tiny_model)
    result = running.run(recipe.RECIPE, config, tmp_path, "run", quiet=True)
    folder = Path(result["folder"])
    assert result["metrics"]["grade"] is None
    assert Judge.asked == 0
    assert "add --resume --judge MODEL" in (folder / "report.md").read_text()
    assert len((folder / "answers" / "trained.jsonl").read_text().splitlines()) == 8, "both turns of four questions"
    asking = dataclasses.replace(config, judge="m", judge_url=judge)
    graded = running.run(recipe.RECIPE, asking, tmp_path, "run", resume=True, quiet=True)
    assert graded["metrics"]["grade"] == graded["metrics"]["base_grade"] == 6.0
    assert graded["metrics"]["grade_both_turns"] == 4.5
    assert Judge.asked == 16
    assert graded["started"] == result["started"], "it is not trained again"
    report = (folder / "report.md").read_text()
    assert "| 6.00 |" in report
    assert "add --resume --judge" not in report
    running.run(recipe.RECIPE, asking, tmp_path, "run", resume=True, quiet=True)
    assert Judge.asked == 16
    with pytest.raises(ValueError, match="with judge 'm', this run with 'other'"):
        running.run(recipe.RECIPE, dataclasses.replace(asking, judge="other"), tmp_path, "run", resume=True, quiet=True)


def test_what_stays_ungraded_is_said_and_asked_for_again(tmp_path: Path, tiny_model: str, judge: str) -> None:
    Judge.silent = 6
    config = configuration(tiny_model, judge="m", judge_url=judge, judge_requests=1, eval_size=1)
    result = running.run(recipe.RECIPE, config, tmp_path, "run", quiet=True)
    assert "Add --resume to ask again" in result["note"]
    asked = Judge.asked
    again = running.run(recipe.RECIPE, config, tmp_path, "run", resume=True, quiet=True)
    assert Judge.asked > asked
    assert again["note"] == ""
    assert again["metrics"]["base_grade"] == 6.0


def test_a_judge_that_goes_away_is_one_line_and_all_that_is_finished_is_kept(
    tmp_path: Path, tiny_model: str, judge: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It grades both turns of two questions for the base model, and the first of the trained one's four answers."""
    Judge.patience = 5
    sizes = ["--train-size", "8", "--eval-size", "2", "--max-steps", "1", "--batch", "4", "--micro-batch", "2"]
    command = ["--method", "lora", "--model", tiny_model, "--lr", "1e-2", "--max-new-tokens", "4", *sizes]
    command += [
        "--runs",
        str(tmp_path),
        "--name",
        "run",
        "--judge",
        "m",
        "--judge-key",
        "JUDGE",
        "--judge-requests",
        "1",
    ]
    command += ["--judge-url", judge, "--resume"]
    with pytest.raises(SystemExit) as stopped:
        recipe.main(recipe.RECIPE, command)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stopped.value.code == 2
    assert len(said) == 1
    assert said[0].startswith(f"error: m at {judge}/ cannot be asked: Connection error")
    unfinished = tmp_path / "unfinished" / "run"
    written = (unfinished / "answers" / "trained.jsonl").read_bytes()
    assert written.count(b"\n") == 4, "both turns of two questions"
    asked = Judge.asked
    Judge.patience = 1000
    recipe.main(recipe.RECIPE, command)
    assert Judge.asked == asked + 3, "grades that are there are not asked for again"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["metrics"]["grade"], result["metrics"]["base_grade"], result["note"]) == (6.0, 6.0, "")
    assert (tmp_path / "run" / "answers" / "trained.jsonl").read_bytes() == written
    assert [step for step, _ in result["curve"]] == [1], "training went on from its last checkpoint, which is its end"


def test_without_a_key_nothing_is_trained() -> None:
    with pytest.raises(ValueError, match="no key for the judge: set the environment variable NO_SUCH_KEY"):
        recipe.RECIPE.resolve(recipe.Config(lr=1e-3, judge="m", judge_key="NO_SUCH_KEY"))


def test_questions_are_read_with_their_references(tmp_path: Path) -> None:
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["a", "b"]},
        {"question_id": 111, "category": "math", "turns": ["c", "d"]},
    ]
    reference = {"question_id": 111, "choices": [{"turns": ["e", "f"]}]}
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    (tmp_path / "reference_answer_gpt-4.jsonl").write_text(json.dumps(reference) + "\n")
    rows = [{"instruction": "Do.", "output": "Done."}, {"instruction": "Do.", "output": "Sorry, as an AI I cannot."}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for place in (tmp_path, tmp_path / "question.jsonl"):
        config = recipe.Config(data=str(tmp_path), test_data=str(place))
        train, evaluation = recipe.load_questions(config)
        assert [each["reference"] for each in evaluation] == [None, ["e", "f"]]
        assert [example["answer"] for example in train] == ["Done."]
    with pytest.raises(ValueError, match="there are no validation questions"):
        recipe.load_questions(dataclasses.replace(config, test_data=str(tmp_path), eval_split="validation"))
