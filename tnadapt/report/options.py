"""Command-line options made from the fields of a dataclass, so that every setting can be given and none is listed twice."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection
from typing import Any


def add_options(parser: argparse.ArgumentParser, config: type, leave_out: Collection[str] = ()) -> None:
    """Add an option ``--some-field`` for every field of the dataclass ``config`` but those in ``leave_out``.

    A field is a bool, int, float or str, or one of them or None. Without the option its value is None, "not given".
    """
    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "bool": _boolean}
    for field in dataclasses.fields(config):
        if field.name not in leave_out:
            kind = str(field.type).split(" ")[0]
            default = "" if field.default is None else f" (default {field.default})"
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kinds[kind], metavar=kind, help=f"{default}")


def given_options(options: argparse.Namespace, config: type, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """Those fields of ``config`` that stood on the command line."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in leave_out]
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"
