"""Run tests on a mutant, in a fork of a process that has imported the libraries already."""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import importlib
import importlib.machinery
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from operators import Mutant

#: cases that take most of the time, and find what smaller ones beside them find
LARGE = ("binary", "(256, 256)", "(769, 8)", "11008", "14336", "papers_shapes", "fifty_steps", "for-loop-16", "foreach-16",
         "fused-16", "compiled_model")  # fmt: skip
OUT_OF_TIME = (signal.SIGKILL, signal.SIGXCPU)


class MutatedModule(importlib.machinery.SourceFileLoader):
    """Finds and loads one module, with other source than its file has."""

    def __init__(self, path: str, source: str) -> None:
        super().__init__(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."), path)
        self.source = source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


class Watcher:
    """A pytest plugin that leaves out large cases, and writes down the first test that fails; where it `traces` also which lines of
    tnadapt each file of tests runs, and what was imported.

    Lines of modules run while tests are collected: they are noted for no file, as those of all. Ranks are forks, that append what
    they run to a file, for all files that start ranks."""

    def __init__(self, directory: Path, traces: bool) -> None:
        self.directory, self.traces, self.package = directory, traces, f"{Path.cwd()}/tnadapt/"
        self.lines: dict[str, set[tuple[str, int]]] = {}
        self.process, self.tests, self.with_ranks = os.getpid(), "", set[str]()

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.package):
            return None
        line = frame.f_code.co_filename.removeprefix(self.package), frame.f_lineno
        seen = self.lines.setdefault(self.tests, set())
        if line not in seen:
            seen.add(line)
            if os.getpid() != self.process:
                with (self.directory / "ranks").open("a") as file:
                    print(*line, file=file)
        return self.trace

    def pytest_sessionstart(self) -> None:
        if self.traces:
            sys.settrace(self.trace)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        tests = item.nodeid.partition("::")[0]
        if self.traces and tests != self.tests:
            self.tests = tests
            for found in gc.get_objects():  # what is known from another file is not run
                if isinstance(found, functools._lru_cache_wrapper) and found.__module__.startswith("tnadapt"):
                    found.cache_clear()
        if {"two", "four", "ranks"} & set(getattr(item, "fixturenames", ())):
            self.with_ranks.add(tests)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if not any(large in item.name for large in LARGE)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            (self.directory / "failed").write_text(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            (self.directory / "failed").write_text(f"importing {report.nodeid}")

    def pytest_sessionfinish(self) -> None:
        if self.traces:
            sys.settrace(None)
            files = {name: getattr(module, "__file__", "") or "" for name, module in sys.modules.items()}
            imported = [name for name, file in files.items() if "-packages" in file]
            ranks = self.directory / "ranks"
            for line in set(ranks.read_text().splitlines()) if ranks.exists() else ():
                name, number = line.split()
                for tests in self.with_ranks:
                    self.lines.setdefault(tests, set()).add((name, int(number)))
            lines = {tests: sorted(found) for tests, found in self.lines.items()}
            (self.directory / "seen").write_text(json.dumps({"imported": imported, "lines": lines}))


def tests_in_fork(tests: tuple[str, ...], directory: Path, mutated: MutatedModule | None, limit: int) -> int:
    """Run `tests` in a child process, that leads a process group of its own and has `limit` seconds of a CPU; gives its id."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        output = os.open(directory / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if mutated is not None:
            sys.meta_path.insert(0, mutated)
        options = ["-x", "-m", "not slow", "-p", "no:cacheprovider", "--tb=short", "--basetemp", str(directory / "tmp")]
        status = int(pytest.main([*options, *tests], plugins=[Watcher(directory, traces=mutated is None)]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@functools.cache
def baseline(tests: tuple[str, ...], scratch: Path) -> tuple[float, dict[str, list[tuple[str, int]]]]:
    """Seconds of a CPU that `tests` take without a mutant (and with tracing), and the lines of tnadapt that each of their files runs
    (those of all under the empty name). The libraries that they use are imported here."""
    directory = scratch / "baseline"
    _, status, used = os.wait4(tests_in_fork(tests, directory, None, limit=3600), 0)
    if status != 0:
        raise SystemExit(f"the tests fail without a mutant:\n{(directory / 'output').read_text()[-4000:]}")
    seen = json.loads((directory / "seen").read_text())
    for name in seen["imported"]:
        try:
            importlib.import_module(name)
        except Exception:  # a module that cannot be imported by itself stays the tests' business
            continue
    gc.collect()
    gc.freeze()
    return used.ru_utime + used.ru_stime, seen["lines"]


def statement_of(line: int, source: str) -> range:
    """The lines of the innermost statement around `line`, without the body of one that has a body."""
    found = range(line, line + 1)
    for node in ast.walk(ast.parse(source)):  # from the outside in
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or line):
            body = getattr(node, "body", [])
            stop = min((part.lineno for part in body), default=(node.end_lineno or line) + 1)
            if line < stop:
                found = range(node.lineno, stop)
    return found


def plain(mutant: Mutant) -> dict[str, Any]:
    return {k: v for k, v in asdict(mutant).items() if k != "source"}


def outcomes(
    path: str, todo: list[Mutant], tests: tuple[str, ...], workers: int, scratch: Path
) -> Iterator[dict[str, Any]]:
    """Run mutants, `workers` at once; give each outcome as it comes."""
    seconds, lines = baseline(tests, scratch)
    limit = math.ceil(5 + 1.5 * seconds)
    module = path.partition("/")[2]
    reached = {name: {number for file, number in found if file == module} for name, found in lines.items()}
    source = (scratch / path).read_text()

    def that_run(mutant: Mutant) -> tuple[str, ...]:
        statement = set(statement_of(mutant.line, source))
        if mutant.operator == "RemoveDecorator" or statement & reached.get("", set()):
            return tests
        return tuple(name for name in tests if statement & reached.get(name, set()))

    unreached = [mutant for mutant in todo if not that_run(mutant)]
    for mutant in unreached:
        yield {**plain(mutant), "outcome": "unreached", "by": "", "seconds": 0.0}
    running: dict[int, tuple[Mutant, float, Path]] = {}
    waiting = [mutant for mutant in reversed(todo) if mutant not in unreached]
    slots = [scratch / f"worker-{k}" for k in range(workers)]
    try:
        while waiting or running:
            while waiting and slots:
                mutant, slot = waiting.pop(), slots.pop()
                pid = tests_in_fork(that_run(mutant), slot, MutatedModule(path, mutant.source), limit)
                running[pid] = (mutant, time.monotonic(), slot)
            time.sleep(0.02)
            for pid, (mutant, start, slot) in list(running.items()):
                seconds = time.monotonic() - start
                done, status = os.waitpid(pid, os.WNOHANG)
                if not done and seconds < 10 * limit:
                    continue
                if not done:  # it waits for something, for its time on a CPU is not used up
                    os.killpg(pid, signal.SIGKILL)
                    _, status = os.waitpid(pid, 0)
                with contextlib.suppress(ProcessLookupError):  # ranks that it left
                    os.killpg(pid, signal.SIGKILL)
                del running[pid]
                slots.append(slot)
                code = os.waitstatus_to_exitcode(status)
                if code in (4, 5, 70):
                    raise RuntimeError(f"no tests ran:\n{(slot / 'output').read_text()[-4000:]}")
                failed = slot / "failed"
                yield {
                    **plain(mutant),
                    "outcome": "survived" if code == 0 else "time" if -code in OUT_OF_TIME else "killed",
                    "by": failed.read_text() if failed.exists() else f"exit status {code}" if code else "",
                    "seconds": round(seconds, 2),
                }
    finally:
        for pid in running:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
