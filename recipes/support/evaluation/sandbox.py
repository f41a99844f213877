"""Runs code that a model wrote, under bubblewrap, and says whether it passes a test.

Two sandboxes work on each check. One executes the tested program, the other the test, which calls the program through a
pipe (see ``sandboxed``). The verdict is what the second one reports. A program that prints "passed", leaves with
``os._exit(0)``, looks for secrets in its interpreter or returns objects that equal everything gains nothing by it: the
only way to pass is to return the right plain data.

Each sandbox has

- no network, no capabilities, no way to gain any, an empty environment, and process numbers, host name and IPC of its own;
- a read-only file system of the operating system's ``/usr`` and the Python installation, without home directories and
  without the packages of the virtual environment, and a small ``/tmp`` in memory;
- limits on CPU time, address space, file size and open files, and no second process or thread;
- an end: the whole process tree dies at the time limit, and with the process that started it.

Root is bound as well. The limit on processes does not hold for the real root, also not in a user namespace, so root first
becomes the user ``nobody``, in an outer sandbox that shows ``nobody`` the Python installation wherever it lies.

What remains: faults of the kernel; memory that no limit on a process covers (System V shared memory, which dies with the
sandbox; its processes are the first that the kernel ends when memory runs out); faults of the interpreter's
``pickle`` that plain data could trigger in the checker, which is sandboxed too. A program can learn how fast the machine is and that it
is being tested. Results differ from running test and program in one interpreter where the program changes an argument in
place and the test looks at it, or returns what is neither plain data nor an iterator.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_PROGRAMS = Path(__file__).with_name("sandboxed.py")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_PYTHON = "/python"  # where the Python installation lies inside
_NOBODY = "65534"
_START_SECONDS = 60.0
_LONGEST_REPORT = 1 << 16


class SandboxError(ValueError):
    """The sandbox cannot be used on this machine, or did not start: nothing was learnt about the tested program."""


@dataclass(frozen=True)
class Limits:
    """What a tested program may use."""

    seconds: float = 10.0
    """Wall-clock time of one check, from the moment that both sandboxes are running."""
    memory: int = 1 << 30
    """Bytes of address space."""
    files: int = 1 << 24
    """Bytes of ``/tmp``, and of one file."""

    def __post_init__(self) -> None:
        for name, least in (("seconds", 0.1), ("memory", 1 << 27), ("files", 1 << 12)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; the least that works is {least}")

    def as_rlimits(self) -> str:
        cpu = math.ceil(self.seconds) + 1
        return json.dumps({"CPU": cpu, "AS": self.memory, "FSIZE": self.files, "NOFILE": 64})


@dataclass(frozen=True)
class Verdict:
    """``reason`` says why the check failed; it is empty where the check passed."""

    passed: bool
    reason: str


class Sandbox:
    """Checks programs under bubblewrap. Several threads may use one sandbox.

    Raises ``SandboxError`` where bubblewrap is missing, does not work, or does not keep what this module promises: a probe
    program tries to start processes, to write, to reach the network and to take memory before anything else is run.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._command = [*_as_nobody(), *_confined(_PYTHON if os.geteuid() == 0 else sys.base_prefix, self.limits)]
        verdict = self.check(_PROBE, "", _PROBE_TEST, "escapes")
        if not verdict.passed:
            raise SandboxError(
                f"the sandbox does not hold on this machine ({verdict.reason}); run the check on another"
            )

    def check(self, program: str, prompt: str, test: str, entry_point: str) -> Verdict:
        """Whether ``check(entry_point)``, defined by ``test``, raises nothing.

        ``program`` is the tested source, which defines ``entry_point``. ``prompt`` is the benchmark's own source with the
        functions that ``test`` may call besides.
        """
        task = json.dumps({"program": program, "prompt": prompt, "test": test, "entry_point": entry_point})
        requests_out, requests_in = os.pipe()
        replies_out, replies_in = os.pipe()
        ends = [requests_out, requests_in, replies_out, replies_in]
        started: list[subprocess.Popen[bytes]] = []
        try:
            candidate = subprocess.Popen(
                self._line("candidate"), stdin=requests_out, stdout=replies_in, stderr=subprocess.PIPE
            )
            started.append(candidate)
            checker = subprocess.Popen(
                self._line("checker", requests_in, replies_out),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(requests_in, replies_out),
            )
            started.append(checker)
            while ends:  # a sandbox that dies must be the last to hold its ends, for the other one to notice
                os.close(ends.pop())
            return self._verdict(checker, candidate, task)
        finally:
            for end in ends:
                os.close(end)
            for process in started:
                process.kill()
                process.wait()
                for stream in (process.stdin, process.stdout, process.stderr):
                    if stream is not None:
                        with suppress(BrokenPipeError):  # closing writes what is left
                            stream.close()

    def _line(self, role: str, *channels: int) -> list[str]:
        source = _PROGRAMS.read_text(encoding="utf-8")
        return [*self._command, "-c", source, role, self.limits.as_rlimits(), *map(str, channels)]

    def _verdict(self, checker: subprocess.Popen[bytes], candidate: subprocess.Popen[bytes], task: str) -> Verdict:
        assert checker.stdin is not None
        assert checker.stdout is not None
        with suppress(BrokenPipeError):  # a checker that did not start reads nothing; its missing report shows below
            checker.stdin.write(task.encode("ascii"))
            checker.stdin.close()
        lines = _Lines(checker.stdout)
        if lines.next(time.monotonic() + _START_SECONDS) is None:
            raise SandboxError(f"the sandbox did not start: {_first_error(candidate, checker)}")
        report = lines.next(time.monotonic() + self.limits.seconds)
        if report is None:
            ended = (
                "the check ended without a verdict" if lines.ended else f"longer than {self.limits.seconds:g} seconds"
            )
            return Verdict(False, ended)
        return Verdict(**json.loads(report))


class _Lines:
    """Lines of a pipe, each up to a moment; ``None`` where no whole line came by then."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._descriptor = stream.fileno()
        self._unread = b""
        self.ended = False

    def next(self, until: float) -> bytes | None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._descriptor, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if len(self._unread) > _LONGEST_REPORT or not selector.select(max(0.0, until - time.monotonic())):
                    return None
                part = os.read(self._descriptor, _LONGEST_REPORT)
                if not part:
                    self.ended = True
                    return None
                self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line


def _first_error(*processes: subprocess.Popen[bytes]) -> str:
    """What a sandbox that did not start says."""
    for process in processes:
        process.kill()
        assert process.stderr is not None
        text = process.stderr.read(2000).decode("utf-8", "replace").strip()
        if text:
            return text.splitlines()[-1]
    return f"no answer within {_START_SECONDS:g} seconds"


def _tool(name: str, package: str) -> str:
    found = shutil.which(name, path="/usr/bin:/bin:/usr/local/bin:/usr/sbin")
    if found is None:
        raise SandboxError(
            f"generated code is executed only under bubblewrap, and there is no {name} in /usr/bin; install {package} "
            f"(Debian: apt install {package})"
        )
    return found


def _system(python: str) -> list[str]:
    binds = [argument for place in _SYSTEM if Path(place).exists() for argument in ("--ro-bind", place, place)]
    return [*binds, "--ro-bind", python, _PYTHON, "--dev", "/dev"]


def _as_nobody() -> list[str]:
    """The outer sandbox, through which root becomes ``nobody``; nothing for other users."""
    bubblewrap = _tool("bwrap", "bubblewrap")
    if os.geteuid() != 0:
        return []
    keep = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    # With process numbers of its own, whose end ends all in it: a process without capabilities could not end nobody's.
    # bubblewrap needs a place for its own mounts, and the host's /proc, without which no new one may be mounted
    places = ["--dir", "/tmp", "--bind", "/proc", "/proc", "--remount-ro", "/"]
    outer = [
        bubblewrap,
        "--die-with-parent",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        *keep,
        *_system(sys.base_prefix),
        *places,
    ]
    return [*outer, _tool("setpriv", "util-linux"), "--reuid", _NOBODY, "--regid", _NOBODY, "--clear-groups"]


def _confined(python: str, limits: Limits) -> list[str]:
    """The sandbox proper, up to the interpreter and its options."""
    isolation = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    identity = ["--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv"]
    # a fixed hash seed, so that a program that depends on the order of a set gets the same verdict again
    variables = {"LD_LIBRARY_PATH": f"{_PYTHON}/lib", "LC_ALL": "C.UTF-8", "HOME": "/tmp", "PYTHONHASHSEED": "0"}
    environment = [argument for name, value in variables.items() for argument in ("--setenv", name, value)]
    scratch = ["--proc", "/proc", "--size", str(limits.files), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    sealed = ["--remount-ro", "/dev", "--remount-ro", "/"]
    interpreter = f"{_PYTHON}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    options = ["-s", "-S", "-P", "-B"]
    bubblewrap = _tool("bwrap", "bubblewrap")
    return [bubblewrap, *isolation, *identity, *environment, *_system(python), *scratch, *sealed, interpreter, *options]


_PROBE = """
import ctypes, os, socket, threading

def tries(action):
    try:
        return action() is not False
    except (OSError, MemoryError, RuntimeError):
        return False

def fork():
    if os.fork() == 0:
        os._exit(0)

def write(path, size=1):
    with open(path, "wb") as file:
        file.write(bytes(size))

def escapes():
    memory = int(next(line for line in open("/proc/self/limits") if line.startswith("Max address space")).split()[3])
    files = int(next(line for line in open("/proc/self/limits") if line.startswith("Max file size")).split()[3])
    found = {
        "a process can be started": tries(fork),
        "a thread can be started": tries(lambda: threading.Thread(target=int).start()),
        "other processes are visible": len([name for name in os.listdir("/proc") if name.isdigit()]) > 2,
        "the file system can be written to": any(tries(lambda: write(f"{at}/probe")) for at in ("", "/usr", "/dev", "/python")),
        "/tmp has no bound": all(tries(lambda: write(f"/tmp/probe{n}", files)) for n in (1, 2)),
        "there is a network": [name for _, name in socket.if_nameindex()] not in ([], ["lo"]),
        "memory has no bound": tries(lambda: bytearray(memory)),
        "a new user namespace can be made": tries(lambda: ctypes.CDLL(None).unshare(0x10000000) == 0),
    }
    return [name for name, escaped in found.items() if escaped]
"""
_PROBE_TEST = "def check(candidate):\n    found = candidate()\n    assert found == [], '; '.join(found)\n"
