"""Data: JSON lines in folders and files, and data sets of the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from support.config import EMBEDDED
from support.evaluation.prompts import Example
from support.evaluation.records import read_records
from support.recipe import Record


def local_file(place: str, split: str, suffix: str = ".jsonl") -> Path | None:
    """The file of a split in a folder, or ``place`` itself if it is a file; None where there is none.

    A file has no splits: it is what the option that names it asks for.
    """
    path = Path(place).expanduser()
    file = path if path.is_file() else path / f"{split}{suffix}"
    return file if file.is_file() else None


def load_hub(option: str, place: str, *arguments: Any, **settings: Any) -> Any:
    """``datasets.load_dataset``, with one line, which names the ``option`` that asks for it, where it cannot be had."""
    from datasets import load_dataset

    from support.loading import reaching

    with reaching(option, place):
        return load_dataset(place, *arguments, **settings)


def hold_out(
    train: Sequence[Record], size: int, identity: Callable[[Record], str]
) -> tuple[list[Record], list[Record]]:
    """Training records without those of the last ``size``, and these; records of one ``identity`` stay together."""
    evaluation = list(train[-size:])
    held = {identity(record) for record in evaluation}
    return [record for record in train if identity(record) not in held], evaluation


def read_rows(option: str, place: str, split: str, columns: Mapping[str, type]) -> Sequence[Record]:
    """The rows of a file, of ``<split>.jsonl`` in a folder, or of a split of a hub data set.

    Args:
        option: the option that names ``place``.
        place: where the rows are.
        split: which of them.
        columns: names and types that every row of a file must have.

    Raises:
        ValueError: there are none, or a row lacks a column.
    """
    if file := local_file(place, split):
        return read_records(file, columns)
    if Path(place).expanduser().is_dir():
        raise ValueError(f"--{option} is {place}, which has no {split}.jsonl with {', '.join(columns)}")
    rows: Sequence[Record] = load_hub(option, place, split=split)
    return rows


def training_examples(
    config: Any,
    generated: Callable[[str, int], Sequence[Record]],
    columns: Mapping[str, type],
    example: Callable[[Record], Example | None],
    otherwise: str,
) -> list[Record]:
    """Examples with ``prompt`` and ``answer`` of what ``--data`` means.

    Args:
        config: the options.
        generated: gives that many embedded rows of a split.
        columns: what every row of a file has.
        example: makes an example of a row, or None where the row is not to be learned.
        otherwise: what is wrong with the data where no row is to be learned.

    Raises:
        ValueError: there is no example.
    """
    embedded = config.data == EMBEDDED
    rows = generated("train", config.train_size) if embedded else read_rows("data", config.data, "train", columns)
    examples = [made._asdict() for made in map(example, rows) if made]
    if not examples:
        raise ValueError(f"--data is {config.data}, where {otherwise}")
    return examples


def evaluation_file(config: Any, split: str, what: str, format: str) -> Path | None:
    """The file of what is evaluated on, which ``--test-data`` or else ``--data`` means; None where it is on the hub.

    Args:
        config: the options.
        split: what the file in a folder is called by.
        what: problems, questions.
        format: what the file of the benchmark is called.

    Raises:
        ValueError: there is no such file, and the hub is not asked for a split that the benchmark does not have.
    """
    place = config.test_data or config.data
    file = local_file(place, split)
    if file or (config.eval_split == "test" and config.test_data is not None and not Path(place).expanduser().is_dir()):
        return file
    raise ValueError(
        f"there are no {config.eval_split} {what} in {place}; give {format} as --test-data, or a folder with {split}.jsonl "
        "in its format"
    )
