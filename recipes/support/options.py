"""Command-line options made from the fields of a dataclass, so that every setting can be given and none is listed twice."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection, Mapping
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


def check_fields(
    config: Any,
    choices: Mapping[str, Collection[str]],
    least: Mapping[str, int] | None = None,
    may_be_zero: Collection[str] = (),
) -> None:
    """Refuse values that cannot work, naming the option and the way out.

    Args:
        config: a dataclass.
        choices: the allowed values of text fields.
        least: the smallest value of whole-number fields where that is not 1.
        may_be_zero: fields with decimals that may be 0; all others lie above it.

    Raises:
        ValueError: for the first field that does not fit.
    """
    for field in dataclasses.fields(config):
        value, problem = getattr(config, field.name), ""
        if field.name in choices and value not in choices[field.name]:
            problem = f"choose one of {', '.join(choices[field.name])}"
        elif (
            isinstance(value, int) and not isinstance(value, bool) and value < (low := (least or {}).get(field.name, 1))
        ):
            problem = f"give a whole number of at least {low}"
        elif isinstance(value, float) and field.name in may_be_zero and not value >= 0:
            problem = "give a number of at least 0"
        elif isinstance(value, float) and field.name not in may_be_zero and not value > 0:
            problem = "give a number above 0"
        if problem:
            raise ValueError(f"--{field.name.replace('_', '-')} is {value!r}: {problem}")
