"""Everything that needs a GPU: the tests, then the benchmarks; each step in less than ten minutes.

    make gpu                                                # what has no result yet of this code on this device
    make gpu GPU_OPTIONS="--steps tests t5"                 # some steps
    make gpu GPU_OPTIONS="--within 580"                     # begin no step that would end later than that
    python benchmarks/gpu.py --device cpu --quick --results build/gpu      # anywhere: every step at its smallest size

A step is a command of its own. When it has ended well, its results are in `<results>/<device>/<step>.json`: what the command wrote, the
end of what it printed, and where they come from (commit and a hash of the code, device, driver, versions, command, time). A step that
has such a file, of this code and this device, is not run again, so that the same command goes on where it was cut off. Results in
benchmarks/results/gpu count too. What fails is run again the next time.

Taken is the Python that runs this script, if its torch sees a GPU; otherwise a virtual environment is made of the wheels that `make
gpu-wheels` has downloaded. Packages that this Python lacks, or has in an older version, come from the wheels, too, into build/gpu-site.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from provenance import read_json, write_json
from wheels import environment_with_torch, install, lacking

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
BUILD = ROOT / "build"
#: seconds after which a step is stopped
LIMIT = 580
#: end of what a step prints that is kept, in characters
KEPT = 20_000
#: folders and files whose content decides whether a result is of this code
CODE = ("tnadapt", "benchmarks", "recipes", "tests/on_cuda", "tests/engine/models.py", "tests/trust/test_pairwise.py")
#: modules that the steps import
NEEDED = (
    "torch",
    "numpy",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "matplotlib",
    "rich",
    "tqdm",
    "pytest",
    "xdist",
    "hypothesis",
)

WAYS = ["plain", "svd", "mpo", "mpo-r", "paper's way"]
T5 = ["benchmarks/step_overhead.py", "--case", "t5-gpu", "--case", "t5-gpu-short", "--within", "90"]


@dataclass(frozen=True)
class Step:
    """A command, without the Python in front of it.

    Attributes:
        command: its words; it takes `--output FOLDER`, `--device` and `--quick` if it is a benchmark.
        seconds: that it takes at most, roughly, on an H100: it is not begun where less is left.
        environment: variables that it needs.
    """

    command: Sequence[str]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def is_benchmark(self) -> bool:
        return self.command[0].startswith("benchmarks/")


STEPS = {
    "tests": Step(["-m", "pytest", "-rs", "-n", "8", "tests/on_cuda"], 120),
    "pairs": Step(["-m", "pytest", "-rs", "-n", "8", "tests/trust/test_pairwise.py"], 120),
    "t5": Step([*T5, "--variants", *WAYS, "--repeats", "51"], 240),
    "t5-others": Step([*T5, "--repeats", "21"], 240),
    "expansion": Step(["benchmarks/expansion.py"], 60),
    "profile": Step(
        ["benchmarks/profile_step.py", "--case", "t5-gpu-short", "--case", "t5-gpu", "--case", "llama31-gpu", "--repeats", "10"], 120
    ),
    "llama31": Step(
        ["benchmarks/step_overhead.py", "--case", "llama31-gpu", "--variants", *WAYS, "--warmup", "2", "--within", "200"], 280
    ),
    "llama2": Step(
        ["benchmarks/step_overhead.py", "--case", "llama2-gpu", "--variants", *WAYS, "--warmup", "2", "--within", "200"], 280
    ),
    "recipe-mpo-r": Step(["benchmarks/recipe.py", "training", "--method", "lora-over-mpo-r"], 300),
    "recipe-lora": Step(["benchmarks/recipe.py", "training", "--method", "lora"], 300),
    "answers": Step(["benchmarks/recipe.py", "answering", "--method", "lora-over-mpo-r"], 150),
    "scaling": Step(["benchmarks/scaling.py"], 120),
}  # fmt: skip


class NoGpu(SystemExit):
    """One sentence, and a status that is not 0."""


# -- where the steps run ----------------------------------------------------------------------------------------------

_LOOK = """
import json, os, sys, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0], "cpus": os.cpu_count(),
    "device": torch.cuda.get_device_name() if cuda else None,
    "capability": list(torch.cuda.get_device_capability()) if cuda else None,
    "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
}))
"""


def looked_at(python: str) -> dict[str, Any] | None:
    """What the torch of a Python sees; None where it has none."""
    done = subprocess.run([python, "-c", _LOOK], capture_output=True, text=True, check=False)
    return dict(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None


def python_with_gpu(wheels: Path, device: str) -> tuple[str, dict[str, Any]]:
    """The Python to run the steps with, and what its torch sees.

    Raises:
        NoGpu: there is none whose torch sees a GPU.
    """
    seen = looked_at(sys.executable)
    if seen is not None and (device == "cpu" or seen["device"]):
        return sys.executable, seen
    python = environment_with_torch(wheels, BUILD / "gpu-venv")
    other = looked_at(python) if python else None
    if python and other is not None and (device == "cpu" or other["device"]):
        return python, other
    found = [f"torch {each['torch']}" for each in (seen, other) if each is not None]
    raise NoGpu(
        f"There is no GPU here that torch sees ({' and '.join(found) or 'no torch is installed'}, {driver() or 'no NVIDIA driver'}): run this on a "
        "machine with one, `make gpu-wheels GPU_TORCH=torch` brings a torch along, and "
        "`python benchmarks/gpu.py --device cpu --quick` shows every step on the CPU."
    )


def driver() -> str | None:
    """The NVIDIA driver's version."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return f"driver {done.stdout.split()[0]}" if done.returncode == 0 and done.stdout.split() else None


def completed(python: str, wheels: Path) -> dict[str, str]:
    """The environment of the steps, in which what this Python lacks comes from the wheels.

    Raises:
        SystemExit: something is missing there too.
    """
    site = BUILD / "gpu-site"
    missing = lacking(python, sorted(wheels.glob("*.whl")), site) if wheels.is_dir() else []
    if missing:
        install(python, missing, site)
    paths = [str(ROOT), *([str(site)] if site.is_dir() else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    script = f"import importlib.util as u; print(*[n for n in {NEEDED!r} if u.find_spec(n) is None])"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True, env=environment)
    if absent := done.stdout.split():
        raise SystemExit(
            f"{python} lacks {', '.join(absent)}, and {wheels} has no wheels of these: `make gpu-wheels` downloads them where there is "
            "a network, or say GPU_WHEELS=FOLDER"
        )
    return environment


# -- where a result comes from ----------------------------------------------------------------------------------------


def code_hash(root: Path = ROOT) -> str:
    """Of all that decides a result; results themselves and documentation do not. It is known without git, too."""
    content = hashlib.sha256()
    for name in CODE:
        place = root / name
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if (
                file.suffix in (".py", ".json", ".jsonl")
                and "results" not in file.parts
                and "__pycache__" not in file.parts
            ):
                content.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return content.hexdigest()[:16]


def commit() -> str | None:
    """What the variable COMMIT says, for a folder that came without its git or with another's; otherwise what git says."""
    if given := os.environ.get("COMMIT"):
        return given
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def folder_of(device: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def known(places: Sequence[Path], name: str, code: str, command: Sequence[str]) -> Path | None:
    """The file of a result of this step, code and command."""
    for place in places:
        file = place / f"{name}.json"
        if file.exists():
            result = read_json(file)
            if result["code"] == code and result["command"] == list(command):
                return file
    return None


# -- steps ------------------------------------------------------------------------------------------------------------


def words(step: Step, device: str, quick: bool) -> list[str]:
    """The command of a step on a device."""
    if not step.is_benchmark:
        return list(step.command)
    return [*step.command, "--device", device, *(["--quick"] if quick else [])]


def run(command: Sequence[str], environment: dict[str, str], limit: float) -> tuple[int | None, str]:
    """Run a command and show what it prints; returns its status (None: stopped at the limit) and the end of what it printed."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)  # with all that it has started

    timer = threading.Timer(limit, stop)
    timer.start()
    kept = ""
    try:
        assert process.stdout is not None
        for line in io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline="\n"):
            shown = line.rstrip("\r\n").rpartition("\r")[2]  # of a progress bar what it showed last
            print(shown, flush=True)
            kept = f"{kept}{shown}\n"[-KEPT:]
        status = process.wait()
    except BaseException:
        stop()
        process.wait()
        raise
    finally:
        timer.cancel()
    return None if late.is_set() else status, kept


def run_step(
    name: str, step: Step, command: list[str], python: str, environment: dict[str, str], limit: float
) -> dict[str, Any] | None:
    """What a step's command wrote and printed; None where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        output = ["--output", folder] if step.is_benchmark else []
        started = time.perf_counter()
        status, text = run([python, *command, *output], {**environment, **step.environment}, limit)
        seconds = time.perf_counter() - started
        if status != 0:
            reason = f"stopped after {limit:.0f} s" if status is None else f"ended with {status}"
            print(f"{name}: {reason}; the same command tries it again", flush=True)
            return None
        results = {file.name: file.read_text(encoding="utf-8") for file in sorted(Path(folder).rglob("*.json"))}
    told = {name: json.loads(without_places(content, folder)) for name, content in results.items()}
    return {"seconds": seconds, "results": told, "output": without_places(text, folder)}


def without_places(text: str, folder: str) -> str:
    """A text without where this machine keeps its files: those of the repository and of packages keep their names, and the folder of
    results is FOLDER."""
    text = text.replace(folder, "FOLDER").replace(f"{ROOT}{os.sep}", "")
    return re.sub(r"[^\s\"':,]*[/\\]site-packages[/\\]", "", text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder for results; those in benchmarks/results/gpu count too"
    )
    parser.add_argument(
        "--wheels", type=Path, default=BUILD / "gpu-wheels", help="folder that `make gpu-wheels` has filled"
    )
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds for all steps together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="benchmarks at their smallest size, to see that they run")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    python, seen = python_with_gpu(options.wheels, options.device)
    environment = {**completed(python, options.wheels), "TNADAPT_TEST_DEVICE": options.device}
    device = seen["device"] if options.device == "cuda" else "CPU"
    code, folder = code_hash(), folder_of(device)
    print(
        f"{device}, torch {seen['torch']}, {driver() or 'no NVIDIA driver'}; code {code}, commit {commit()}", flush=True
    )
    failed, waiting = [], []
    for name in options.steps:
        step = STEPS[name]
        command = words(step, options.device, options.quick)
        if file := known([options.results / folder, RESULTS / folder], name, code, command):
            print(f"{name}: done, {file}", flush=True)
            continue
        left = options.within - (time.perf_counter() - begun)
        if left < (0 if options.quick else step.seconds):
            waiting.append(name)
            continue
        print(f"\n{name}: {' '.join(command)}", flush=True)
        made = run_step(name, step, command, python, environment, min(LIMIT, left))
        if made is None:
            failed.append(name)
            continue
        provenance = {"commit": commit(), **seen, "driver": driver(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        file = options.results / folder / f"{name}.json"
        write_json(file, {"step": name, "code": code, "command": command, **made, "provenance": provenance})
        print(f"{name}: {made['seconds']:.0f} s, {file}", flush=True)
    for what, names in (("failed", failed), ("no time left for", waiting)):
        if names:
            print(f"{what}: {', '.join(names)}", flush=True)
    return 1 if failed or waiting else 0


if __name__ == "__main__":
    # who stops this script stops the step that it runs, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
