"""The two programs that ``sandbox`` runs under bubblewrap. They use the standard library alone and import nothing of ours.

``candidate`` executes the tested program and then answers calls of its entry point. ``checker`` executes the benchmark's
test, in which the entry point is a proxy: arguments and results travel as plain data. So the tested program never shares
an interpreter with the test. It sees neither the expected values nor the place where the verdict is written, and what
it returns cannot carry behaviour, such as an ``__eq__`` that is always true.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import resource
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

#: Bytes of one message. A longer one ends the check.
LONGEST_MESSAGE = 1 << 24


def limit(limits: dict[str, int]) -> None:
    """Set the limits of this process. It has no capabilities, so it cannot raise them again."""
    for name in ("CPU", "AS", "FSIZE", "NOFILE"):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limits[name], limits[name]))
    # The process itself and bubblewrap's own reach this limit already: every fork and every thread is refused.
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Where the machine runs out of memory, the kernel should end this process first.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def silence(*standard: int) -> None:
    """Let standard streams lead nowhere: nothing that is printed is kept, however much it is."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in standard:
        os.dup2(nowhere, stream)


# -- the tested program -----------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A copy that is made of built-in types alone; ``TypeError`` for anything else."""
    if value is None or isinstance(value, bool):
        return value
    scalars: tuple[Any, ...] = (int, float, complex, str, bytes)
    for kind in scalars:
        if isinstance(value, kind):
            return kind(value)
    containers: tuple[Any, ...] = (list, tuple, set, frozenset)
    for kind in containers:
        if isinstance(value, kind):
            return kind(plain(item) for item in value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    raise TypeError(f"a result of type {type(value).__name__} is not plain data")


def run_candidate(limits: dict[str, int]) -> None:
    requests, replies = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    limit(limits)
    silence(0, 1, 2)
    replies.send_bytes(pickle.dumps(("ready", None)))
    program, entry_point = pickle.loads(requests.recv_bytes())
    namespace: dict[str, Any] = {"__name__": "candidate"}
    try:
        exec(compile(program, "candidate", "exec"), namespace)
        function = namespace[entry_point]
        reply: tuple[str, Any] = ("ready", None)
    except Exception as error:
        reply = ("error", (type(error).__name__, str(error)))
    while True:
        replies.send_bytes(pickle.dumps(reply))
        arguments, named = pickle.loads(requests.recv_bytes())
        try:
            value = function(*arguments, **named)
            reply = ("iterator", plain(list(value))) if isinstance(value, Iterator) else ("value", plain(value))
        except Exception as error:
            reply = ("error", (type(error).__name__, str(error)))


# -- the test ---------------------------------------------------------------------------------------------------------


class Plain(pickle.Unpickler):
    """Reads plain data; a message that asks for any other class is refused before the class is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "complex"):
            return complex
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


class Candidate:
    """The tested program, seen from the checker."""

    def __init__(self, requests: Connection, replies: Connection) -> None:
        self._requests, self._replies = requests, replies

    def send(self, message: Any) -> None:
        self._requests.send_bytes(pickle.dumps(message))

    def receive(self) -> Any:
        kind, content = Plain(io.BytesIO(self._replies.recv_bytes(LONGEST_MESSAGE))).load()
        if kind == "error":
            name, text = map(str, content)
            raised = getattr(builtins, name, None)
            known = isinstance(raised, type) and issubclass(raised, Exception)
            # some classes (UnicodeDecodeError) cannot be made from a message
            try:
                error = raised(text) if known else RuntimeError(f"{name}: {text}")  # type: ignore[misc]
            except TypeError:
                error = RuntimeError(f"{name}: {text}")
            raise error
        return iter(content) if kind == "iterator" else content

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.send((arguments, named))
        return self.receive()


def run_checker(limits: dict[str, int], requests: int, replies: int) -> None:
    verdicts = os.fdopen(os.dup(1), "w", encoding="ascii")
    task = json.load(sys.stdin)
    candidate = Candidate(Connection(requests, readable=False), Connection(replies, writable=False))
    limit(limits)

    def report(**content: Any) -> None:
        print(json.dumps(content), file=verdicts, flush=True)

    candidate.receive()
    report(ready=True)
    silence(0, 1, 2)
    try:
        candidate.send((task["program"], task["entry_point"]))
        candidate.receive()
        check(task, candidate)
    except (EOFError, BrokenPipeError):
        report(passed=False, reason="the program ended before it answered")
    except Exception as error:
        report(passed=False, reason=f"{type(error).__name__}: {error}"[:500].rstrip(": "))
    else:
        report(passed=True, reason="")


def check(task: dict[str, str], candidate: Callable[..., Any]) -> None:
    """Run the benchmark's test. Functions of the prompt that the test calls are the prompt's own, not the candidate's."""
    namespace: dict[str, Any] = {"__name__": "test"}
    exec(compile(task["prompt"], "prompt", "exec"), namespace)
    namespace[task["entry_point"]] = candidate
    exec(compile(task["test"], "test", "exec"), namespace)
    namespace["check"](candidate)


if __name__ == "__main__":
    role, limits, *channels = sys.argv[1:]
    if role == "candidate":
        run_candidate(json.loads(limits))
    else:
        run_checker(json.loads(limits), *map(int, channels))
