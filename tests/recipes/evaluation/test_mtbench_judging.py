"""MT-Bench against a local server that speaks OpenAI's protocol: what is sent, kept, repeated, resumed and refused."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")

from recipes.support.evaluation import mtbench
from recipes.support.evaluation.judge import PROMPTS, Judge, JudgeError, grade_in, read_judge_prompts

CATEGORIES = ["writing", "math", "coding", "reasoning", "stem"]
QUESTIONS = [
    {"question_id": 81 + at, "category": category, "turns": [f"q{at}a {{x}}", f"q{at}b"]}
    for at, category in enumerate(CATEGORIES)
]
ANSWERS = {81 + at: [f"a{at}a {{}} [[9]]", f"a{at}b"] for at in range(len(CATEGORIES))}
REFERENCES = {
    81 + at: [f"r{at}a", f"r{at}b"] for at in range(len(CATEGORIES)) if CATEGORIES[at] in mtbench.WITH_REFERENCE
}


class Server(ThreadingHTTPServer):
    """Says the next of ``replies`` (the last one for ever): a text, a status, a delay in seconds, or a body as it is."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Any] = ["Rating: [[7]]"]
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.paths.append(self.path)
            self.server.keys.append(self.headers["Authorization"])
            reply = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        if isinstance(reply, float):
            time.sleep(reply)
            reply = "Rating: [[1]]"
        status, content = 200, reply
        if isinstance(reply, int):
            status, content = reply, {"error": {"message": f"status {reply}", "type": "test"}}
        elif isinstance(reply, str):
            message = {"role": "assistant", "content": reply}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            content = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [choice],
            }
        sent = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client stopped waiting

    def log_message(self, format: str, *arguments: Any) -> None:
        return None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)  # the client pauses for seconds between attempts
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def judge(server: Server, **changes: Any) -> Judge:
    settings = {"key_variable": "JUDGE_KEY", "timeout": 10.0, "attempts": 2, **changes}
    return Judge("judge-1", server.url, **settings)


def judged(server: Server, path: Path, **changes: Any) -> mtbench.Scores:
    return mtbench.judge_answers(path, QUESTIONS, ANSWERS, REFERENCES, judge(server, **changes))


def test_both_turns_of_all_questions_are_graded_with_the_right_prompt(server: Server, tmp_path: Path):
    scores = judged(server, tmp_path / "judgments.jsonl")
    assert len(server.requests) == len(scores.judgments) == 2 * len(QUESTIONS)
    prompts = read_judge_prompts()
    sent = {json.dumps(request["messages"]) for request in server.requests}
    for at, category in enumerate(CATEGORIES):
        first = {"question": f"q{at}a {{x}}", "answer": f"a{at}a {{}} [[9]]"}
        both = {
            "question_1": f"q{at}a {{x}}", "question_2": f"q{at}b", "answer_1": f"a{at}a {{}} [[9]]", "answer_2": f"a{at}b",
        }  # fmt: skip
        name = "single-v1"
        if category in ("math", "coding", "reasoning"):
            name = "single-math-v1"
            first |= {"ref_answer_1": f"r{at}a"}
            both |= {"ref_answer_1": f"r{at}a", "ref_answer_2": f"r{at}b"}
        for prompt, fields in ((prompts[name], first), (prompts[f"{name}-multi-turn"], both)):
            user = re.sub(r"\{(\w+)\}", lambda found, fields=fields: fields[found[1]], prompt.template)
            messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": user}]
            assert json.dumps(messages) in sent
    for request in server.requests:
        assert (request["model"], request["temperature"], request["max_tokens"]) == ("judge-1", 0.0, 2048)
    assert set(server.paths) == {"/v1/chat/completions"}
    assert set(server.keys) == {"Bearer secret"}


def test_the_file_keeps_judge_prompt_and_raw_replies(server: Server, tmp_path: Path):
    server.replies = ["no idea", "Good.\nRating: [[6.5]]"]
    judged(server, tmp_path / "judgments.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "judgments.jsonl").read_text().splitlines()]
    by_key = {(line["question_id"], line["turn"]): line for line in lines}
    assert by_key.keys() == {(question["question_id"], turn) for question in QUESTIONS for turn in (1, 2)}
    first = by_key[81, 1]
    assert first["judge"] == "judge-1"
    assert first["prompt"] == "single-v1"
    assert first["prompt_hash"] == read_judge_prompts()["single-v1"].hash
    assert first["replies"] == ["no idea", "Good.\nRating: [[6.5]]"]
    assert (first["score"], first["problem"], first["category"]) == (6.5, "", "writing")


def test_means_are_of_the_first_turn_and_of_both(server: Server, tmp_path: Path):
    server.replies = [f"[[{grade}]]" for grade in (10, 2, 8, 4, 6, 6, 4, 8, 2, 10)]
    scores = judged(server, tmp_path / "judgments.jsonl")
    assert (scores.mean(turn=1), scores.mean(turn=2), scores.mean()) == (6.0, 6.0, 6.0)
    assert (scores.mean(turn=1, category="writing"), scores.mean(category="stem")) == (10.0, 6.0)
    assert scores.mean(category="absent") is None
    assert str(scores) == "first turn 6.00, both turns 6.00"


@pytest.mark.parametrize("reply", ["I cannot say.", "Rating: [[0]]", "Rating: [[11]]", "", {"choices": []}, {"odd": 1}])
def test_nonsense_is_asked_for_again_a_bounded_number_of_times(server: Server, tmp_path: Path, reply: Any):
    server.replies = [reply, "[[5]]"]
    assert judged(server, tmp_path / "once.jsonl").mean() == 5
    assert len(server.requests) == 2 * len(QUESTIONS) + 1
    server.requests.clear()
    server.replies = [reply]
    scores = judged(server, tmp_path / "always.jsonl", attempts=3)
    assert len(server.requests) == 3 * len(scores.judgments)
    assert len(scores.unscored) == len(scores.judgments)
    assert scores.mean() is None
    assert all("3 replies without a grade from 1 to 10" in judgment["problem"] for judgment in scores.unscored)
    assert all(len(judgment["replies"]) == 3 for judgment in scores.unscored)
    assert "10 of 10 without a grade, such as question 81, turn 1: 3 replies without" in str(scores)
    assert "\n" not in str(scores)


@pytest.mark.parametrize("trouble", [0.5, 429, 500, 503])
def test_a_judge_that_is_late_or_busy_is_asked_again_then_left_without_a_grade(
    server: Server, tmp_path: Path, trouble: float
):
    one = {"questions": QUESTIONS[:1], "answers": ANSWERS, "references": {}}
    server.replies = [trouble, "[[5]]"]
    scores = mtbench.judge_answers(tmp_path / "once.jsonl", judge=judge(server, timeout=0.2), **one)
    assert scores.mean() == 5
    assert len(server.requests) == 3
    server.replies = [trouble]
    scores = mtbench.judge_answers(tmp_path / "always.jsonl", judge=judge(server, timeout=0.2), **one)
    assert len(server.requests) == 3 + 2 * 2
    assert [judgment["score"] for judgment in scores.judgments] == [None, None]
    assert all("no reply after 2 attempts" in judgment["problem"] for judgment in scores.judgments)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_ends_the_run_with_one_line_and_keeps_finished_work(server: Server, tmp_path: Path, status: int):
    server.replies = ["[[4]]", "[[4]]", "[[4]]", status]
    with pytest.raises(JudgeError, match=rf"judge-1 at http://127\.0\.0\.1.* cannot be asked: .*{status}") as caught:
        judged(server, tmp_path / "judgments.jsonl")
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 4
    server.replies = ["[[8]]"]
    scores = judged(server, tmp_path / "judgments.jsonl")
    assert len(server.requests) == 4 + 7
    assert [judgment["score"] for judgment in scores.judgments] == [4] * 3 + [8] * 7


def test_a_finished_run_asks_nothing_and_one_without_grades_asks_for_those(server: Server, tmp_path: Path):
    path = tmp_path / "judgments.jsonl"
    server.replies = ["[[3]]", "none", "none", "[[3]]"]
    first = judged(server, path)
    assert len(first.unscored) == 1
    server.requests.clear()
    assert judged(server, path).unscored == ()
    assert len(server.requests) == 1
    server.requests.clear()
    assert judged(server, path).mean() == 3
    assert server.requests == []


def test_several_questions_are_judged_at_once(server: Server, tmp_path: Path):
    server.replies = [0.3]
    start = time.monotonic()
    scores = mtbench.judge_answers(
        tmp_path / "judgments.jsonl", QUESTIONS, ANSWERS, REFERENCES, judge(server), workers=10
    )
    assert scores.mean() == 1
    assert time.monotonic() - start < 0.3 * len(scores.judgments) * 0.7


def test_judgments_of_another_judge_prompt_or_answer_are_not_mixed(server: Server, tmp_path: Path):
    path = tmp_path / "judgments.jsonl"
    judged(server, path)
    server.requests.clear()
    with pytest.raises(ValueError, match="with judge 'judge-1', this run with 'judge-2'"):
        mtbench.judge_answers(
            path, QUESTIONS, ANSWERS, REFERENCES, Judge("judge-2", server.url, key_variable="JUDGE_KEY")
        )
    other = tmp_path / "prompts.jsonl"
    other.write_text(PROMPTS.read_text().replace("impartial judge", "strict judge"))
    with pytest.raises(ValueError, match="with prompt_hash"):
        mtbench.judge_answers(path, QUESTIONS, ANSWERS, REFERENCES, judge(server), prompts=other)
    with pytest.raises(ValueError, match="question 81, turn 1 with filled_hash"):
        mtbench.judge_answers(path, QUESTIONS, {**ANSWERS, 81: ["new", "new"]}, REFERENCES, judge(server))
    assert server.requests == []


def test_what_is_missing_is_named_before_the_judge_is_asked(server: Server, tmp_path: Path):
    path = tmp_path / "judgments.jsonl"
    with pytest.raises(ValueError, match=r"question 82 \(math\) is graded against a reference answer; there is none"):
        mtbench.judge_answers(path, QUESTIONS, ANSWERS, {}, judge(server))
    with pytest.raises(ValueError, match="question 85 has no answers to both turns"):
        mtbench.judge_answers(path, QUESTIONS, {**ANSWERS, 85: ["one"]}, REFERENCES, judge(server))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(PROMPTS.read_text().splitlines()[0])
    with pytest.raises(ValueError, match="has no judge prompt single-v1-multi-turn; it has single-v1"):
        mtbench.judge_answers(path, QUESTIONS, ANSWERS, REFERENCES, judge(server), prompts=prompts)
    odd = {"name": "single-v1", "system_prompt": "", "prompt_template": "{essay}"}
    prompts.write_text(json.dumps(odd))
    with pytest.raises(ValueError, match="judge prompt single-v1 cannot be filled with question, answer: KeyError"):
        mtbench.judge_answers(path, QUESTIONS, ANSWERS, REFERENCES, judge(server), prompts=prompts)
    assert server.requests == []


def test_a_judge_without_key_or_server_is_one_clear_error(server: Server, monkeypatch, tmp_path: Path):
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(JudgeError, match="set the environment variable JUDGE_KEY"):
        judge(server)
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with pytest.raises(ValueError, match="attempts is 0"):
        judge(server, attempts=0)
    with pytest.raises(ValueError, match="timeout is 0"):
        judge(server, timeout=0)
    nobody = Judge("judge-1", "http://127.0.0.1:9/v1", key_variable="JUDGE_KEY", attempts=1)
    with pytest.raises(JudgeError, match=r"judge-1 at http://127\.0\.0\.1:9/v1/ cannot be asked: Connection error"):
        mtbench.judge_answers(tmp_path / "judgments.jsonl", QUESTIONS, ANSWERS, REFERENCES, nobody)


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("Rating: [[10]]", 10),
        ("[[1]] or rather [[2]]", 1),
        ("[3] then [[4.5]]", 4.5),
        ("Rating: [7]", 7),
        ("[[10.5]]", None),
        ("[[0.5]]", None),
        ("Rating: 7", None),
        ("[[A]]", None),
    ],
)
def test_which_grade_a_reply_gives(reply: str, grade: float | None):
    assert grade_in(reply) == grade


# -- files and answers ------------------------------------------------------------------------------------------------


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_question_files_are_checked(tmp_path: Path):
    assert mtbench.read_questions(write(tmp_path / "q.jsonl", *QUESTIONS)) == QUESTIONS
    with pytest.raises(ValueError, match="question 1: turns should be two texts"):
        mtbench.read_questions(write(tmp_path / "q.jsonl", {"question_id": 1, "category": "math", "turns": ["one"]}))
    with pytest.raises(ValueError, match="two questions have the question_id 81"):
        mtbench.read_questions(write(tmp_path / "q.jsonl", QUESTIONS[0], QUESTIONS[0]))
    with pytest.raises(ValueError, match=r"q\.jsonl, line 1: no column category"):
        mtbench.read_questions(write(tmp_path / "q.jsonl", {"question_id": 1, "turns": ["a", "b"]}))


def test_reference_files_are_checked(tmp_path: Path):
    good = {"question_id": 101, "choices": [{"index": 0, "turns": ["one", "two"]}]}
    assert mtbench.read_references(write(tmp_path / "r.jsonl", good)) == {101: ["one", "two"]}
    for choices in ([], [{}], [{"turns": ["one"]}], ["text"]):
        with pytest.raises(ValueError, match="question 102: choices should begin with an answer of two turns"):
            mtbench.read_references(write(tmp_path / "r.jsonl", good, {"question_id": 102, "choices": choices}))


def test_the_second_turn_is_asked_with_the_first_answer_and_runs_resume(tmp_path: Path):
    asked: list[str] = []

    def generate(prompts, number):
        asked.extend(prompts)
        if len(asked) > 7:
            raise KeyboardInterrupt
        return [f"<{prompt}>" for prompt in prompts]

    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        mtbench.answer_questions(path, QUESTIONS, generate, "|".join, batch=2)
    asked = []
    answers = mtbench.answer_questions(path, QUESTIONS, lambda p, n: [f"<{each}>" for each in p], "|".join, batch=2)
    for at in range(len(CATEGORIES)):
        first = f"<q{at}a {{x}}>"
        assert answers[81 + at] == [first, f"<q{at}a {{x}}|{first}|q{at}b>"]
    assert mtbench.answer_questions(path, QUESTIONS, generate, "|".join, batch=2) == answers
    assert asked == []
