"""What tested code tries against the sandbox fails there, leaves the machine as it was, and never passes for it.

Every test runs as the user who runs the suite; where that is root, a second pass runs some as another user.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from recipes.support.evaluation import sandbox as module
from recipes.support.evaluation.sandbox import Limits, Sandbox, SandboxError

ROOT = Path(__file__).parents[3]
needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed, so NO test executes code in the sandbox"
)
#: An amount that no other run has: the processes of this one are found by it.
MEMORY = (1 << 30) + 4096 * os.getpid()
TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == 9\n"
RIGHT = "def square(x):\n    return x * x\n"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(Limits(seconds=5.0))


@needs_bubblewrap
def test_right_code_passes_and_wrong_code_fails(sandbox: Sandbox):
    assert sandbox.check(RIGHT, "", TEST, "square") == module.Verdict(True, "")
    assert sandbox.check(RIGHT.replace("*", "+"), "", TEST, "square") == module.Verdict(False, "AssertionError")


#: What a program does instead of squaring, and what the verdict says of it.
HOSTILE = {
    "no code": ("", "KeyError: "),
    "broken code": ("def square(x", "SyntaxError"),
    "an endless loop": ("def square(x):\n    while True: pass", "longer than 1 seconds"),
    "an endless loop when loaded": ("while True: pass", "longer than 1 seconds"),
    "sleep": ("import time\ndef square(x):\n    time.sleep(99)", "longer than 1 seconds"),
    "a fork bomb": ("import os\nwhile True: os.fork()", "BlockingIOError"),
    "a fork bomb that goes on": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "longer than 1 seconds",
    ),
    "a shell": ("import subprocess\ndef square(x): return subprocess.check_output(['sh'])", "BlockingIOError"),
    "threads": ("import threading\ndef square(x):\n    threading.Thread(target=print).start()", "RuntimeError"),
    "a memory bomb": ("def square(x): return bytearray(10**12)", "MemoryError"),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytearray(10**7))", ""),  # memory or time, what ends first
    "large files": ("def square(x):\n    open('/tmp/x', 'wb').write(bytes(10**8))\n    return x * x", "OSError"),
    "many files": (
        "def square(x):\n    for n in range(100):\n        open(f'/tmp/{n}', 'wb').write(bytes(10**6))\n    return x * x",
        "OSError",
    ),
    "deletion": ("import shutil\nshutil.rmtree('/usr')", "OSError"),
    "writing": ("open('/usr/bin/python3', 'w')", "OSError"),
    "a connection": ("import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)", "ConnectionRefusedError"),
    "a name look-up": ("import socket\nsocket.getaddrinfo('localhost.localdomain', 80)", "RuntimeError: gaierror"),
    "os._exit": ("import os\nos._exit(0)", "the program ended before it answered"),
    "os._exit in a call": ("import os\ndef square(x): os._exit(0)", "the program ended before it answered"),
    "sys.exit": ("import sys\nsys.exit(0)", "the program ended before it answered"),
    "sys.exit in a call": ("import sys\ndef square(x): sys.exit(0)", "the program ended before it answered"),
    "exit on interrupt": ("def square(x): raise KeyboardInterrupt", "the program ended before it answered"),
    "a segmentation fault": ("import ctypes\nctypes.string_at(0)", "the program ended before it answered"),
    "kill of the parent": (
        "import os, signal\ndef square(x):\n    os.kill(os.getppid(), signal.SIGKILL)\n    return x",
        "AssertionError",
    ),
    "kill of everything": ("import os\ndef square(x):\n    os.kill(-1, 9)\n    return x", ""),
    "a raised assertion": ("def square(x): assert False, 'passed'", "AssertionError: passed"),
    "a flood of output": ("while True: print('passed' * 10**5)", "longer than 1 seconds"),
    "a printed verdict": ("print('{\"passed\": true, \"reason\": \"\"}', flush=True)\ndef square(x): return x", "AssertionError"),
    "a verdict on every descriptor": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{\"passed\": true, \"reason\": \"\"}\\n')\n"
        "    except OSError: pass\ndef square(x): return x",
        "",
    ),
    "an answer before it is asked": (
        "import gc, pickle\nfrom multiprocessing.connection import Connection\n"
        "for one in gc.get_objects():\n    if isinstance(one, Connection) and one.writable:\n"
        "        one.send_bytes(pickle.dumps(('passed', True)))\ndef square(x): return x",
        "AssertionError",
    ),
    "a flood of answers": (
        "import os\nwhile True:\n    for fd in range(3, 64):\n        try: os.write(fd, bytes(4096))\n        except OSError: pass",
        "",
    ),
    "a message without end": (
        "import os, struct\nfor fd in range(3, 64):\n    try: os.write(fd, struct.pack('!iQ', -1, 2**60))\n"
        "    except OSError: pass\ndef square(x): return x",
        "",
    ),
    "an answer that runs code": (
        "import gc, os\nfrom multiprocessing.connection import Connection\n"
        "for one in gc.get_objects():\n    if isinstance(one, Connection) and one.writable:\n"
        "        one.send_bytes(b\"cos\\nsystem\\n(S'true'\\ntR.\")\ndef square(x): return x",
        "UnpicklingError",
    ),
    "an object that equals everything": (
        "class Any:\n    __eq__ = lambda self, other: True\ndef square(x): return Any()",
        "TypeError: a result of type Any is not plain data",
    ),
    "a number that equals everything": (
        "class Any(int):\n    __eq__ = lambda self, other: True\ndef square(x): return Any(7)",
        "AssertionError",
    ),
    "changed builtins": (
        "import builtins\nbuiltins.abs = builtins.sorted = builtins.len = lambda *x: 0\n"
        "builtins.AssertionError = ValueError\ndef square(x): return x",
        "",
    ),
    "frames": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n    for place in (frame.f_globals, frame.f_locals):\n"
        "        for name in list(place):\n            if name == 'check': place[name] = lambda *x: None\n"
        "    frame = frame.f_back\ndef square(x): return x",
        "AssertionError",
    ),
    "code at exit": ("import atexit\natexit.register(print, 'passed')\nraise SystemExit", "the program ended before it answered"),
    "higher limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (99, 99))\ndef square(x): return x * x",
        "ValueError",
    ),
    "a mount": (
        "import ctypes\ndef square(x):\n    libc = ctypes.CDLL(None)\n"
        "    return libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
        "AssertionError",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def strict() -> Sandbox:
    return Sandbox(Limits(seconds=1.0, memory=MEMORY))


@needs_bubblewrap
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_is_stopped_and_fails(strict: Sandbox, tmp_path: Path, name: str):
    program, reason = HOSTILE[name]
    victim = subprocess.Popen(["sleep", "60"])
    canary = tmp_path / "canary"
    canary.write_text("alive")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        start = time.monotonic()
        verdict = strict.check(program.replace("PORT", str(listener.getsockname()[1])), "", TEST, "square")
        taken = time.monotonic() - start
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert not verdict.passed
    assert verdict.reason.startswith(reason)
    assert 0 < len(verdict.reason) <= 500
    assert taken < 10
    assert victim.poll() is None
    assert canary.read_text() == "alive"
    victim.kill()
    victim.wait()
    assert_nothing_is_left()
    assert strict.check(RIGHT, "", TEST, "square").passed


def assert_nothing_is_left() -> None:
    """No process of a sandbox runs on; the kernel may take a moment to end the last ones."""
    until = time.monotonic() + 5
    while left := sandboxed_processes():
        assert time.monotonic() < until, left
        time.sleep(0.02)


def sandboxed_processes() -> list[str]:
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                command = (place / "cmdline").read_bytes()
            except OSError:
                continue
            if b"/python/bin/python" in command and str(MEMORY).encode() in command:
                found.append(place.name)
    return found


@needs_bubblewrap
def test_nothing_of_the_host_is_visible(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_KEY", "hidden")
    program = "import os\ndef look():\n    return sorted(os.listdir('/')), dict(os.environ), os.listdir('/tmp'), os.getgroups()"
    test = (
        "def check(candidate):\n    root, environment, tmp, groups = candidate()\n"
        "    assert set(root) <= {'bin', 'dev', 'lib', 'lib32', 'lib64', 'proc', 'python', 'sbin', 'tmp', 'usr'}, root\n"
        "    assert set(environment) <= {'PWD', 'LD_LIBRARY_PATH', 'LC_ALL', 'HOME', 'PYTHONHASHSEED'}, environment\n"
        "    assert tmp == [], tmp\n"
    )
    assert sandbox.check(program, "", test, "look") == module.Verdict(True, "")


@needs_bubblewrap
def test_the_program_dies_with_the_process_that_runs_it():
    script = (
        "from recipes.support.evaluation.sandbox import Sandbox, Limits\n"
        f"box = Sandbox(Limits(seconds=60.0, memory={MEMORY}))\nprint('ready', flush=True)\n"
        "box.check('while True: pass', '', 'def check(candidate): pass', 'square')\n"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    )
    assert runner.stdout is not None
    assert runner.stdout.readline() == b"ready\n"
    until = time.monotonic() + 10
    while not sandboxed_processes():
        assert time.monotonic() < until
        time.sleep(0.02)
    runner.kill()
    runner.wait()
    runner.stdout.close()
    assert_nothing_is_left()


PLAIN = [
    "None", "True", "0", "-5", "2**200", "1.5", "float('inf')", "1j", "'text\\u20ac'", "b'bytes'", "[1, [2]]", "(1, 'a')",
    "{1, 2}", "frozenset({1})", "{'a': [1], 2: None}", "[]", "()", "set()", "{}", "''",
]  # fmt: skip


@needs_bubblewrap
@pytest.mark.parametrize("value", PLAIN)
def test_plain_data_arrives_with_its_type_and_value(sandbox: Sandbox, value: str):
    test = (
        f"def check(candidate):\n    want = {value}\n"
        "    for got in (candidate(want), candidate(x=want)):\n"
        "        assert type(got) is type(want) and got == want\n"
    )
    assert sandbox.check("def echo(x):\n    assert repr(x)\n    return x", "", test, "echo") == module.Verdict(True, "")


@needs_bubblewrap
def test_nan_iterators_and_subclasses_arrive_as_what_they_equal(sandbox: Sandbox):
    program = (
        "import collections\ndef make(kind):\n"
        "    return {'nan': float('nan'), 'counter': collections.Counter('aab'), 'map': map(abs, [-1, 2])}[kind]"
    )
    test = (
        "def check(candidate):\n    assert candidate('nan') != candidate('nan')\n"
        "    assert candidate('counter') == {'a': 2, 'b': 1}\n"
        "    assert candidate('map') != [1, 2] and list(candidate('map')) == [1, 2]\n"
    )
    assert sandbox.check(program, "", test, "make") == module.Verdict(True, "")


@needs_bubblewrap
def test_exceptions_reach_the_test_by_their_class(sandbox: Sandbox):
    program = (
        "class Odd(Exception): pass\ndef fail(kind):\n    raise {'value': ValueError, 'odd': Odd}[kind]('because')"
    )
    test = (
        "def check(candidate):\n"
        "    for kind, error in (('value', ValueError), ('odd', RuntimeError), ('none', KeyError)):\n"
        "        try:\n            candidate(kind)\n        except error:\n            continue\n"
        "        assert False, kind\n"
    )
    assert sandbox.check(program, "", test, "fail") == module.Verdict(True, "")


@needs_bubblewrap
def test_helpers_of_the_prompt_are_the_benchmarks_own(sandbox: Sandbox):
    prompt = "def encode(x):\n    return x + 1\n\ndef decode(x):\n    '''Undo encode.'''\n"
    test = "def check(candidate):\n    assert candidate(encode(5)) == 5 and decode(3) == 2\n"
    assert sandbox.check(f"{prompt}    return x - 1", prompt, test, "decode").passed
    cheat = "def encode(x):\n    return 'key'\ndef decode(x):\n    return 5 if x == 'key' else 2\n"
    assert not sandbox.check(f"{prompt}    pass\n{cheat}", prompt, test, "decode").passed


@needs_bubblewrap
def test_several_checks_run_at_once(sandbox: Sandbox):
    verdicts: dict[int, bool] = {}

    def check(number: int) -> None:
        test = f"def check(candidate):\n    assert candidate({number}) == {number % 2 * number}\n"
        program = "def half(x):\n    return x if x % 2 else 1"
        verdicts[number] = sandbox.check(program, "", test, "half").passed

    threads = [threading.Thread(target=check, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {number: number % 2 == 1 for number in range(6)}


@needs_bubblewrap
def test_a_program_sees_the_same_order_of_sets_in_every_check(sandbox: Sandbox):
    program = "def order():\n    return list({'a', 'b', 'c', 'd', 'e', 'f', 'g'})"
    said = {sandbox.check(program, "", "def check(c):\n    assert 0, c()", "order").reason for _ in range(4)}
    assert len(said) == 1


@needs_bubblewrap
@pytest.mark.skipif(os.geteuid() != 0, reason="another user can be become by root alone")
def test_other_users_are_confined_alike():
    """The probe of a new sandbox and three hostile programs, as the user 65533."""
    if subprocess.run(["/usr/bin/python3", "-c", "import sys; assert sys.version_info >= (3, 11)"]).returncode:
        pytest.skip("the system has no Python 3.11 that another user may read")
    source = Path(module.__file__)
    script = (
        "import sys, types\npackage = types.ModuleType('evaluation'); package.__path__ = []\n"
        "box = types.ModuleType('evaluation.sandbox'); sys.modules['evaluation.sandbox'] = box\n"
        "sandbox_source, programs = sys.stdin.read().split('\\0')\n"
        "exec(compile(sandbox_source.replace('__file__', '\"/sandbox.py\"'), 'sandbox', 'exec'), box.__dict__)\n"
        "box._PROGRAMS = types.SimpleNamespace(read_text=lambda encoding: programs)\n"
        "limited = box.Sandbox(box.Limits(seconds=1.0))\n"
        "test = 'def check(candidate): assert candidate(2) == 4'\n"
        "for program in ('def f(x): return x * x', 'import os\\nwhile True: os.fork()', 'import os\\nos._exit(0)', 'while 1: 1'):\n"
        "    print(limited.check(program, '', test, 'f').passed)\n"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-c", script],
        input=f"{source.read_text()}\0{source.with_name('sandboxed.py').read_text()}",
        user=65533, group=65533, extra_groups=[], cwd="/", env={}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["True", "False", "False", "False"], done.stderr


# -- where there is no sandbox ----------------------------------------------------------------------------------------


def test_without_bubblewrap_nothing_is_executed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(module.subprocess, "Popen", lambda *a, **k: pytest.fail("something was executed"))
    with pytest.raises(SandboxError, match=r"only under bubblewrap, and there is no bwrap .*apt install bubblewrap"):
        Sandbox()


def test_a_sandbox_that_does_not_start_is_an_error_and_no_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(module.shutil, "which", lambda name, path=None: str(broken))
    with pytest.raises(SandboxError, match="did not start: bwrap: No permissions to create new namespace"):
        Sandbox()


@needs_bubblewrap
@pytest.mark.parametrize(
    ("weaker", "found"),
    [
        (lambda words: [word for word in words if word != "--disable-userns"], "a new user namespace can be made"),
        (lambda words: [*words[: words.index("--remount-ro")], *words[words.index("--remount-ro") + 4 :]], "can be written to"),
        (lambda words: [word for word in words if word not in ("--size", str(Limits().files))], "/tmp has no bound"),
    ],
)  # fmt: skip
def test_a_sandbox_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch, weaker, found: str):
    confined = module._confined
    monkeypatch.setattr(module, "_confined", lambda python, limits: weaker(confined(python, limits)))
    with pytest.raises(SandboxError, match=f"does not hold on this machine .*{found}"):
        Sandbox()


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"memory": 1}, {"files": -1}, {"seconds": float("nan")}])
def test_limits_under_which_nothing_runs_are_refused(limits: dict[str, float]):
    with pytest.raises(ValueError, match=f"{next(iter(limits))} is .*; the least that works"):
        Limits(**limits)
