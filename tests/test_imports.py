"""An import never points upwards, and `import tnadapt` needs torch alone."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import tnadapt

PACKAGE = Path(tnadapt.__file__).parent

#: From the lowest layer up; modules of one line do not import each other, but packages may import within themselves.
LAYERS = [
    {"registry"},
    {"backends"},
    {"factorizations"},
    {"matrices"},
    {"adapter"},
    {"row_rescale", "tt_lora"},
    {"schedulers"},
    {"testing"},
    {"finders", "assignment", "counting"},
    {"engine"},
    {"state", "costs"},
    {"lora_over", "planning"},
    {"card"},
    {"integrations", "pictures"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(path: Path) -> str:
    """`tnadapt/engine/cores.py` -> `engine`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str, package: tuple[str, ...]) -> set[str]:
    """Parts of tnadapt that a source file of `package` imports, wherever in the file."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join([*base, *([node.module] if node.module else [])])
            modules |= {f"{start}.{alias.name}" for alias in node.names}
    inside = [name.split(".") for name in modules if name.split(".")[0] == "tnadapt"]
    return {name[1] if len(name) > 1 else "the package itself" for name in inside}


def test_every_part_has_its_layer():
    assert {part_of(path) for path in FILES} <= LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    mine = part_of(path)
    for other in imported(path.read_text(encoding="utf-8"), path.relative_to(PACKAGE.parent).parts[:-1]):
        assert other != "the package itself", f"{path.name} imports tnadapt itself; import the part that is meant"
        assert other == mine or (other in LEVEL and LEVEL[other] < LEVEL[mine]), (
            f"{mine} imports {other}, which is not below it"
        )


def test_what_the_test_sees():
    assert imported("from tnadapt.engine.cores import Cohort", ("tnadapt",)) == {"engine"}
    assert imported("def f():\n    import tnadapt.lora_over", ("tnadapt",)) == {"lora_over"}
    assert imported("from ..schedulers import Static\nfrom . import cohort", ("tnadapt", "engine")) == {
        "schedulers",
        "engine",
    }
    assert imported("from tnadapt import plan\nimport torch", ("tnadapt",)) == {"plan"}
    assert imported("import tnadapt", ("tnadapt",)) == {"the package itself"}


#: What only an extra brings, or what takes long to import.
OPTIONAL = [
    "transformers", "peft", "accelerate", "datasets", "trl", "safetensors", "bitsandbytes", "tensorly", "tensornetwork",
    "matplotlib", "rich", "scipy", "jaxtyping", "torch.distributed.tensor", "torch.distributed.checkpoint",
]  # fmt: skip


def test_names_are_imported_when_they_are_asked_for():
    """`import tnadapt` brings not even torch; a name or a module of the package then brings what it needs."""
    script = """
import sys
import tnadapt
assert set(tnadapt.__all__) <= set(dir(tnadapt))
print("torch" in sys.modules)
assert tnadapt.matrices.find_lora_matrices is tnadapt.find_lora_matrices
print("torch" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert result.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'LoraOvr'"):
        tnadapt.LoraOvr  # noqa: B018


def test_type_checkers_see_the_names_that_python_finds():
    """The imports under TYPE_CHECKING, the table of modules and `__all__` are one list."""
    source = ast.parse(Path(tnadapt.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in source.body if isinstance(node, ast.If)]
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed.keys() == set(tnadapt.__all__)
    for name, module in typed.items():
        assert getattr(tnadapt, name) is getattr(importlib.import_module(module), name), f"{name} is not {module}'s"


def test_the_package_needs_torch_alone():
    script = f"""
import sys
import torch
before = set(sys.modules)
import tnadapt
from tnadapt import *
print([name for name in {OPTIONAL!r} if name in sys.modules and name not in before])
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert result.stdout.strip().splitlines()[-1] == "[]"


def test_the_package_works_where_the_extras_are_missing():
    script = f"""
import sys
for name in {[name for name in OPTIONAL if not name.startswith("torch")]!r}:
    sys.modules[name] = None
import torch
from tnadapt import MPO, LoraOver, OverParamAdapter, TaylorRuntime, plan
model = OverParamAdapter.from_linear(torch.nn.Linear(12, 6), rank=4)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
print(plan(model, MPO(order=4)))
over = LoraOver(model, optimizer, MPO(order=4))
model(torch.randn(3, 12)).sum().backward()
optimizer.step()
print(over.fold())
try:
    MPO(order=4, backend="tensorly")
except ImportError as error:
    print(error)
try:
    import tnadapt.integrations.transformers
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
    assert "pip install 'tnadapt[tensorly]'" in result.stdout
    assert "pip install 'tnadapt[transformers]'" in result.stdout


def test_public_names():
    """Names that people write code against."""
    fixed = {"MPO", "SVD", "LoraOver", "OverParamAdapter", "Scheduler", "Static", "TaylorRuntime", "plan"}
    assert fixed <= set(tnadapt.__all__)
    assert all(hasattr(tnadapt, name) for name in tnadapt.__all__)
