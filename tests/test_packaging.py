"""What is shipped: metadata that agree, and a wheel that works where torch is installed alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import tnadapt
from tests.pages import ROOT, as_script

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(extra: str) -> set[str]:
    """Names of the packages of an extra, those of the extras that it includes too."""
    found: set[str] = set()
    for text in EXTRAS[extra]:
        requirement = Requirement(text)
        if requirement.name == "tnadapt":
            found |= {name for inner in requirement.extras for name in requirements(inner)}
        else:
            found.add(normal(requirement.name))
    return found


def test_versions_agree():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None
    assert PROJECT["version"] == tnadapt.__version__ == cited[1]


def test_the_licence_is_the_one_that_is_named():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_oldest_torch_is_named_alike():
    (torch_requirement,) = map(Requirement, PROJECT["dependencies"])
    oldest = str(torch_requirement.specifier).removeprefix(">=")
    assert f"The oldest torch is {oldest}:" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| torch {oldest} and later" in (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    said = subprocess.run(["make", "-n", "oldest"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert f'"torch=={oldest}.*"' in said


def test_all_has_every_backend():
    assert requirements("all") == requirements("opt_einsum") | requirements("tensorly") | requirements("tensornetwork")


def test_every_requirement_is_pinned():
    """A set-up that follows the constraints has no package whose version is left to chance."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = {normal(line.partition("==")[0]) for line in lines}
    assert {name for extra in EXTRAS for name in requirements(extra)} | {"torch"} <= pinned
    assert len(pinned) == len(lines)


def test_pictures_ask_for_their_extra():
    script = """
import sys
sys.modules["matplotlib"] = None
import tnadapt.pictures
try:
    tnadapt.pictures.loss_curves({'run': [(1, 2.0), (2, 1.0)]})
except ImportError as error:
    print(error)
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "pictures need matplotlib: pip install 'tnadapt[pictures]'"


# -- the wheel -----------------------------------------------------------------------------------------------------------


def with_requirements(name: str, found: set[str] | None = None) -> set[str]:
    """`name` and everything that it needs here."""
    found = set() if found is None else found
    if name not in found:
        found.add(name)
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                with_requirements(normal(requirement.name), found)
    return found


def link_packages(names: set[str], folder: Path) -> None:
    """A folder with links to the installed files of some packages and of no other."""
    folder.mkdir()
    for name in names:
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = folder / top
            if not target.exists():
                target.symlink_to(Path(str(distribution.locate_file(top))).resolve())


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command that sees no package but those of its own environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from the source distribution, so that this one is known to be whole."""
    folder = tmp_path_factory.mktemp("dist")
    built = run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    assert built.returncode == 0, built.stderr
    [made] = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def bare_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment with the wheel, torch and what torch needs."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    link_packages(with_requirements("torch"), folder / "packages")
    [site] = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "torch_alone.pth").write_text(f"{folder / 'packages'}\n", encoding="utf-8")
    installed = run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    assert installed.returncode == 0, installed.stderr
    where = run(python, "-c", "import tnadapt; print(tnadapt.__file__)", cwd=folder)
    assert where.stdout.startswith(str(site)), where
    return python


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tnadapt").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_plain_loop_runs_with_torch_alone(bare_python: Path, tmp_path: Path):
    script = tmp_path / "loop.py"
    script.write_text(as_script(ROOT / "docs" / "guides" / "plain_loop.md"), encoding="utf-8")
    result = run(bare_python, script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "their cores are gone" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("page", "extra"), [("own_model", "safetensors")])
def test_guides_need_no_more_than_their_extra(
    bare_python: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, page: str, extra: str
):
    """The extra has everything that the page uses: safetensors, for one, needs numpy and does not say so."""
    guide = ROOT / "docs" / "guides" / f"{page}.md"
    assert f'pip install "tnadapt[{extra}]"' in guide.read_text(encoding="utf-8")
    packages = tmp_path_factory.mktemp("extra") / "packages"
    link_packages({name for package in requirements(extra) for name in with_requirements(package)}, packages)
    script = tmp_path / "page.py"
    script.write_text(f"import sys\nsys.path.append({str(packages)!r})\n{as_script(guide)}", encoding="utf-8")
    result = run(bare_python, script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "their cores are gone" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "package"),
    [
        ("import tnadapt; tnadapt.MPO(order=4, backend='opt_einsum')", "opt_einsum"),
        ("import tnadapt; tnadapt.MPO(order=4, backend='tensorly')", "tensorly"),
        ("import tnadapt; tnadapt.MPO(order=4, backend='tensornetwork')", "tensornetwork"),
        ("import tnadapt.integrations.transformers", "transformers"),
        ("import tnadapt.pictures; tnadapt.pictures.loss_curves({'run': [(1, 2.0)]})", "pictures"),
        (
            "import tnadapt, torch; model = torch.nn.Sequential(torch.nn.Linear(2, 2)); "
            "tnadapt.add_adapters(model, '0', rank=1); tnadapt.save_adapters(model, 'adapters')",
            "safetensors",
        ),
    ],
    ids=lambda value: value if " " not in value else "",
)
def test_a_missing_extra_is_one_sentence(bare_python: Path, tmp_path: Path, code: str, package: str):
    result = run(bare_python, "-c", code, cwd=tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"pip install 'tnadapt[{package}]'" in last


@pytest.mark.slow
def test_the_command_of_the_wheel(bare_python: Path, tmp_path: Path):
    command = bare_python.with_name("tnadapt")
    shown = run(command, "--help", cwd=tmp_path)
    assert all(name in shown.stdout for name in ("plan", "inspect", "report"))
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    refused = run(command, "plan", tmp_path, "--order", "4", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].endswith("pip install 'tnadapt[transformers]'")
    assert "Traceback" not in refused.stderr
