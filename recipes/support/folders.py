"""The folder of a run. A run works in ``unfinished/`` and moves up when it is done, so that whole and broken never mix.

::

    runs/<name>/                    finished: what result.json says is final
    runs/unfinished/<name>/         running, cancelled, failed or killed; ``--resume`` continues it
    runs/unfinished/<name>--2/      an older unfinished one, kept when the run was started from the beginning again
"""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .provenance import read_json, write_json

UNFINISHED = "unfinished"
#: In what the configuration of an unfinished run may differ from that of the run that goes on with it.
MAY_CHANGE = frozenset({"stop_after"})
RESULT = "result.json"


@dataclass(frozen=True)
class RunFolder:
    """Where the run ``name`` works and where it ends up, below ``root``."""

    root: Path
    name: str

    @property
    def final(self) -> Path:
        """The folder of the finished run."""
        return self.root / self.name

    @property
    def work(self) -> Path:
        """The folder while the run is not finished."""
        return self.root / UNFINISHED / self.name

    def finished(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of the finished run, if there is one.

        Raises:
            ValueError: if the finished run of this name had another configuration.
        """
        path = self.final / RESULT
        return _read(path, config) if path.exists() else None

    def notice(self, resume: bool) -> str:
        """What a run does with what lies there already, in sentences; empty where nothing does.

        Args:
            resume: whether the run goes on in a folder that exists.
        """
        said = []
        if resume and (self.final / RESULT).exists():
            said.append(f"{self.final} holds this run, finished: it is kept and not repeated.")
        elif resume and self.work.exists():
            said.append(f"{self.work} holds this run, unfinished: it goes on from its last checkpoint.")
        elif not resume:
            if (self.final / RESULT).exists():
                said.append(
                    f"{self.final} holds this run, finished: it is repeated, and replaced when the new one is finished. "
                    "--resume keeps it instead."
                )
            if self.work.exists():
                said.append(
                    f"{self.work} holds this run, unfinished: it is moved to {self._aside()}, and the run starts from the "
                    "beginning. --resume goes on from its last checkpoint instead."
                )
        return "\n".join(said)

    @contextmanager
    def working(self, result: dict[str, Any], keep: bool) -> Iterator[Path]:
        """Run the body with the work folder; afterwards ``result`` has a status and the folder is where it belongs.

        Args:
            result: written to ``result.json`` at the start and at the end; the body fills it in.
            keep: go on in a work folder that exists, instead of moving it aside.

        Raises:
            ValueError: if the work folder to go on in belongs to a run with another configuration.
        """
        if self.work.exists() and keep:
            _read(self.work / RESULT, result["config"], MAY_CHANGE)
        elif self.work.exists():
            os.replace(self.work, self._aside())
        self.work.mkdir(parents=True, exist_ok=True)
        result.update(status="running", started=_now())
        write_json(self.work / RESULT, result)
        try:
            yield self.work
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            result.update(status="cancelled" if stopped else "failed", ended=_now())
            result["error"] = "".join(traceback.format_exception(error)).strip()
            write_json(self.work / RESULT, result)
            raise
        result.update(status="finished", ended=_now())
        write_json(self.work / RESULT, result)
        if self.final.exists():
            shutil.rmtree(self.final)
        os.replace(self.work, self.final)

    def _aside(self) -> Path:
        """Where an unfinished run is kept when the run starts from the beginning again."""
        number = 2
        while (aside := self.work.with_name(f"{self.name}--{number}")).exists():
            number += 1
        return aside


def _read(path: Path, config: Mapping[str, Any], may_differ: Collection[str] = ()) -> dict[str, Any]:
    """The result in ``path``, which has to be of the same configuration, save for what ``may_differ``."""
    result: dict[str, Any] = read_json(path)
    other = result["config"]
    differing = sorted(key for key in {*config, *other} - {*may_differ} if config.get(key) != other.get(key))
    if differing:
        shown = ", ".join(f"{key} {other.get(key)!r} there, {config.get(key)!r} here" for key in differing[:4])
        raise ValueError(
            f"{path.parent} holds a run with another configuration ({shown}); choose another --name, or delete it"
        )
    return result


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
