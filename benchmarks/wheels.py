"""Packages for a machine without a network: download them where there is one, and install there what is lacking.

    python benchmarks/wheels.py download build/wheels --python 3.12 --constraints constraints.txt accelerate peft …
    python benchmarks/wheels.py download build/wheels --torch torch …   # with torch and the CUDA libraries that it brings: gigabytes

`download` takes wheels for x86-64 Linux. Without `--torch` those of torch and of what it brings are left out, for a machine that has
a torch of its own. Only the standard library is used, since nothing else may be there yet.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

#: newest first; pip takes wheels of exactly these names
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]
#: torch, and what it brings: libraries of CUDA and the compiler of its kernels
TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")


def normalized(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(wheel: Path) -> str:
    """The distribution that a wheel holds."""
    return normalized(wheel.name.partition("-")[0])


# -- where there is a network -----------------------------------------------------------------------------------------


def stand_in(folder: Path, constraints: Path | None) -> Path:
    """A wheel of nothing that calls itself torch, newer than the torch of the constraints and still what they ask for: pip then looks
    for no other torch, nor for what that needs."""
    pins = constraints.read_text(encoding="utf-8") if constraints else ""
    pinned = re.search(r"^torch==([\d.]+)", pins, re.MULTILINE)
    version = f"{pinned[1] if pinned else '99.0'}+stand.in"
    wheel = folder / f"torch-{version}-py3-none-any.whl"
    about = f"torch-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return wheel


def resolved(requirements: Sequence[str], python: str, constraints: Path | None, torch: bool) -> list[str]:
    """`name==version` of the requirements and of all that they need, on x86-64 Linux; without `torch` neither torch nor what it
    brings."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
        command += ["--ignore-installed", "--target", folder, "--report", str(report), *target(python)]
        command += [] if torch else ["--find-links", str(stand_in(Path(folder), constraints).parent)]
        subprocess.run([*command, *(["-c", str(constraints)] if constraints else []), *requirements], check=True)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    pins = [(normalized(each["metadata"]["name"]), each["metadata"]["version"]) for each in found]
    return [f"{name}=={version}" for name, version in pins if torch or name != "torch"]


def target(python: str) -> list[str]:
    """pip's options for the machine that the wheels are for."""
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    return ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]


def download(
    folder: Path, requirements: Sequence[str], python: str, constraints: Path | None, torch: bool
) -> list[str]:
    """Download wheels to `folder`; returns `name==version` of each."""
    chosen = resolved(requirements, python, constraints, torch)
    folder.mkdir(parents=True, exist_ok=True)
    # one version of each
    names = {pin.partition("==")[0] for pin in chosen}
    for wheel in folder.glob("*.whl"):
        if name_of(wheel) in names:
            wheel.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, *target(python), "--dest", str(folder), *chosen], check=True)
    return chosen


# -- where there is none ----------------------------------------------------------------------------------------------


_DISTRIBUTIONS = """
import importlib.metadata, json
print(json.dumps([(each.metadata["Name"], each.version) for each in importlib.metadata.distributions()]))
"""


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a release, to be compared."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release.group().split("."))) if release else ()


def lacking(python: str, wheels: Iterable[Path], site: Path) -> list[Path]:
    """The wheels whose distributions `python` has not, or older ones, also with those in `site`; never torch, of which only the
    machine knows which fits its driver."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([python, "-c", _DISTRIBUTIONS], capture_output=True, text=True, check=True, env=environment)
    # of several versions the first is imported
    present = {normalized(name): numbers(version) for name, version in reversed(json.loads(done.stdout)) if name}
    return [
        wheel
        for wheel in wheels
        if not TORCH.fullmatch(name_of(wheel)) and present.get(name_of(wheel), ()) < numbers(wheel.name.split("-")[1])
    ]


def install(python: str, wheels: Sequence[Path], folder: Path) -> None:
    """Install wheels to `folder`, for PYTHONPATH: the Python itself, which may be the system's, is left alone."""
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*command, "--upgrade", "--target", str(folder), *map(str, wheels)], check=True)


def environment_with_torch(wheels: Path, folder: Path) -> str | None:
    """The Python of a virtual environment in `folder` with all of `wheels`; None where torch is not among them."""
    files = sorted(wheels.glob("*.whl"))
    if "torch" not in map(name_of, files):
        return None
    python = str(folder / "bin" / "python")
    if not os.path.exists(python):
        venv.create(folder, with_pip=True)
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*command, *map(str, files)], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("download", help="wheels of packages and of all that they need")
    one.add_argument("folder", type=Path)
    one.add_argument("packages", nargs="+")
    one.add_argument("--python", default="3.12", help="version of the Python that they are for")
    one.add_argument("--constraints", type=Path)
    one.add_argument("--torch", action="store_true", help="torch too, with the CUDA libraries that it brings")
    arguments = parser.parse_args()
    chosen = download(arguments.folder, arguments.packages, arguments.python, arguments.constraints, arguments.torch)
    size = sum(wheel.stat().st_size for wheel in arguments.folder.glob("*.whl"))
    print(f"{', '.join(chosen)}\n{arguments.folder}: {size / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main()
