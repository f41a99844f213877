"""The table in docs/factorizations/backends.md is true: every function that it names is called, and no other of its library."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tnadapt.backends import BACKENDS, Backend, get_backend

TABLE = Path(__file__).parents[2] / "docs" / "factorizations" / "backends.md"


def read_table() -> dict[tuple[str, str], str]:
    """(operation, backend) -> cell."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {
        (row[0].strip("`"), backend): cell for row in rows for backend, cell in zip(header[1:], row[1:], strict=True)
    }


CELLS = read_table()


def function_of(cell: str) -> str | None:
    found = re.fullmatch(r"`([\w.]+)`", cell)
    return found.group(1) if found else None


TENSOR = torch.randn(2, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.ones(2, *shape, dtype=torch.float64) for shape in shapes]


CHAIN = tensors((1, 4, 3), (3, 5, 2), (2, 6, 1))
FACTORS, CORE = tensors((4, 3), (5, 2), (6, 4)), tensors((3, 2, 4))[0]
COMPONENTS = tensors((4, 3), (5, 3), (6, 3))
GRAD = torch.ones(2, 120, dtype=torch.float64)

OPERATIONS: dict[str, Callable[[Backend], Any]] = {
    "contract": lambda b: b.contract("nabc,ncde->nabde", CHAIN[0], CHAIN[1]),
    "svd": lambda b: b.svd(TENSOR.reshape(2, 20, 6), 3),
    "chain_decompose": lambda b: b.chain_decompose(TENSOR, [4, 6]),
    "chain_contract": lambda b: b.chain_contract(CHAIN),
    "chain_kernel": lambda b: b.chain_kernel(CHAIN).pull_back(GRAD),
    "tucker_decompose": lambda b: b.tucker_decompose(TENSOR, [2, 3, 4]),
    "tucker_contract": lambda b: b.tucker_contract(FACTORS, CORE),
    "tucker_kernel": lambda b: b.tucker_kernel(FACTORS, CORE).pull_back(GRAD),
    "cp_decompose": lambda b: b.cp_decompose(TENSOR, 3),
    "cp_contract": lambda b: b.cp_contract(COMPONENTS),
    "cp_kernel": lambda b: b.cp_kernel(COMPONENTS).pull_back(GRAD),
}


def watch(monkeypatch: pytest.MonkeyPatch, name: str, calls: list[str]) -> None:
    module_name, _, function_name = name.rpartition(".")
    module = importlib.import_module(module_name)
    original = getattr(module, function_name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function_name, spy)


def test_the_table_covers_everything() -> None:
    assert {backend for _, backend in CELLS} == set(BACKENDS)
    assert {operation for operation, _ in CELLS} == set(OPERATIONS)
    public = {name for name in vars(Backend) if not name.startswith("_")}
    assert public == set(OPERATIONS)
    for cell in CELLS.values():
        assert function_of(cell) or re.fullmatch(r"(torch|autograd) \(\d\)", cell), cell


@pytest.mark.parametrize(
    ("operation", "backend"), CELLS, ids=[f"{operation}-{backend}" for operation, backend in CELLS]
)
def test_cell(monkeypatch: pytest.MonkeyPatch, operation: str, backend: str) -> None:
    cell = CELLS[operation, backend]
    own = {name for (_, column), other in CELLS.items() if column == backend and (name := function_of(other))}
    calls: list[str] = []
    instance = get_backend(backend)
    if backend == "opt_einsum":
        # a path that an earlier test asked for is not looked for again
        importlib.import_module("tnadapt.backends.opt_einsum_backend")._expression.cache_clear()
    for name in own:
        watch(monkeypatch, name, calls)
    gradients: list[str] = []
    watch(monkeypatch, "torch.autograd.grad", gradients)
    OPERATIONS[operation](instance)
    function = function_of(cell)
    if function is not None:
        assert function in calls
        if backend != "torch":
            assert set(calls) == {function}
        assert not gradients
    elif cell.startswith("autograd"):
        assert gradients
    elif (operation, backend) == ("cp_decompose", "tensornetwork"):
        # reason 4: alternating least squares is torch's, its start is not
        assert set(calls) == {"tensornetwork.split_node_full_svd"}
    else:
        assert not calls
