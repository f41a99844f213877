"""Where a result comes from: configuration, software, code and hardware; and files that are never half written."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("tnadapt", "torch", "transformers", "peft", "accelerate", "datasets", "trl", "numpy")


def environment(repository: Path | None = None) -> dict[str, Any]:
    """Versions, code and hardware of this process.

    Args:
        repository: a folder inside the git work tree that the code was run from, if there is one.
    """
    return {
        "python": platform.python_version(),
        "packages": versions(),
        "git": git_state(repository) if repository is not None else None,
        "hardware": hardware(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The installed versions of those ``packages`` that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that ``folder`` is at and whether files differ from it; None outside of git.

    ``commit`` is None where nothing has been committed yet.
    """
    status = git(folder, "status", "--porcelain")
    if status is None:
        return None
    return {"commit": git(folder, "rev-parse", "HEAD"), "dirty": bool(status)}


def commit_of(state: Mapping[str, Any] | None) -> str | None:
    """The commit of a ``git_state``, with a ``+`` where files differed from it; None outside of git."""
    return f"{state['commit']}{'+' * state['dirty']}" if state else None


def git(folder: Path, *arguments: str) -> str | None:
    """What a git command says in ``folder``; None where there is no git, or it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    """Processor, threads and accelerators."""
    import torch  # takes seconds, which a command line that only reads JSON need not wait

    cuda = torch.cuda.is_available()
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
    }


def _processor() -> str:
    """The processor's name. Linux tells it in a file, and ``platform`` often knows no more than the family."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def config_hash(config: Mapping[str, Any]) -> str:
    """Eight characters that tell one configuration from another, whatever the order of its fields."""
    text = json.dumps(dict(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one move, so that an interruption leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """Replace ``path`` by ``data`` as JSON, in one move."""
    write_text(path, json.dumps(data, indent=2, allow_nan=True) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in ``path``.

    Raises:
        ValueError: if the file does not hold JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} does not hold JSON ({error}); delete it, and it is made again") from error
