"""Files of JSON lines: problems are read whole and checked, results are appended and survive an interruption."""

from __future__ import annotations

import gzip
import json
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_records(
    path: str | Path, columns: Mapping[str, type], problem: Callable[[Record], str] = lambda record: ""
) -> list[Record]:
    """The objects of a ``.jsonl`` or ``.jsonl.gz`` file, in its order.

    ``columns`` are the names and types that every object must have; an object may have more. ``problem`` says what else is
    wrong with one, or nothing. Blank lines are skipped. Raises ``ValueError`` with the file, the number of the line and what is
    wrong with it.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    records = _records(raw, path, columns, problem)
    if not records:
        raise ValueError(f"{path} holds no record; every line should be an object with {', '.join(columns)}")
    return records


def _records(
    raw: bytes, path: Path, columns: Mapping[str, type], problem: Callable[[Record], str] = lambda record: ""
) -> list[Record]:
    found = []
    # bytes.split, because str.splitlines also breaks at characters such as U+2028, which JSON allows inside a string
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            found.append(_parse(line, f"{path}, line {number}", columns))
            if wrong := problem(found[-1]):
                raise ValueError(f"{path}, line {number}: {wrong}")
    return found


def _parse(line: bytes, where: str, columns: Mapping[str, type]) -> Record:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start} is not UTF-8; convert the file to UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, found {type(record).__name__}")
    missing = [name for name in columns if name not in record]
    if missing:
        raise ValueError(f"{where}: no column {', '.join(missing)}; found {', '.join(record) or 'none'}")
    for name, kind in columns.items():
        if not isinstance(record[name], kind):
            found = type(record[name]).__name__
            raise ValueError(f"{where}: column {name} should be {kind.__name__}, found {found}")
    return record


class Journal:
    """Results appended to a file of JSON lines as they arrive, so that an interrupted run can go on.

    ``columns`` are what every result has; those in ``key`` identify it. A result that is recorded again replaces the earlier
    one. A last line without its line break was being written when the process died: it is removed. Any other broken line
    is a ``ValueError``. One process may write a journal at a time.
    """

    def __init__(self, path: str | Path, columns: Mapping[str, type], key: Sequence[str]) -> None:
        self.path = Path(path)
        self._key = tuple(key)
        self._results: dict[tuple[Any, ...], Record] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        for result in _records(raw[:whole], self.path, columns):
            self._results[self._key_of(result)] = result
        if whole < len(raw):
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def _key_of(self, result: Record) -> tuple[Any, ...]:
        return tuple(result[name] for name in self._key)

    def __contains__(self, key: Sequence[Any]) -> bool:
        return tuple(key) in self._results

    def __getitem__(self, key: Sequence[Any]) -> Record:
        return self._results[tuple(key)]

    def get(self, key: Sequence[Any]) -> Record | None:
        """The result with this key, or ``None``."""
        return self._results.get(tuple(key))

    def append(self, result: Record) -> None:
        """Write one result; it is in the file when this returns."""
        with self.path.open("ab") as file:
            file.write(json.dumps(result).encode("ascii") + b"\n")
        self._results[self._key_of(result)] = result

    def fill(self, tasks: Iterable[Callable[[], Record]], workers: int) -> None:
        """Run tasks in ``workers`` threads and append each result as soon as it is there.

        After an error no further task starts; what is running finishes and is appended, then the error is raised.
        """
        if workers < 1:
            raise ValueError(f"workers is {workers}; it should be at least 1")
        stopped, writing = threading.Event(), threading.Lock()

        def run(task: Callable[[], Record]) -> None:
            if stopped.is_set():
                return
            try:
                result = task()
                with writing:
                    self.append(result)
            except BaseException:
                stopped.set()
                raise

        with ThreadPoolExecutor(workers) as pool:
            pending = [pool.submit(run, task) for task in tasks]
            try:
                for future in pending:
                    future.result()
            finally:
                stopped.set()
