"""A table of text cells that is printed with rich and written as Markdown or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True)
class Table:
    """Rows of cells. The first column is text and stands left, the others are figures and stand right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {self.title!r} has {len(row)} cells for {len(self.columns)} columns: {row}")

    def markdown(self) -> str:
        """The table as a Markdown table, without its title."""
        lines = [_line(self.columns), _line([":--", *["--:"] * (len(self.columns) - 1)])]
        lines += [_line(row) for row in self.rows]
        if self.caption:
            lines += ["", self.caption]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """The table as comma-separated values."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([self.columns, *self.rows])
        return buffer.getvalue()

    def show(self) -> None:
        """Print the table to the terminal."""
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, caption=self.caption or None, title_style="bold")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=not index)
        for row in self.rows:
            table.add_row(*row)
        console = Console()
        (console if console.is_terminal else Console(width=120)).print(table)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.1f} %"


def grade(value: float | None) -> str:
    """A judge's grade from 1 to 10 with two decimals; a dash where there is none."""
    return "–" if value is None else f"{value:.2f}"


def percent_over_seeds(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation of shares, as percentages; the mean alone for a single value."""
    if not values:
        return "–"
    if len(values) == 1:
        return percent(values[0])
    return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f} %"


def span(rates: Sequence[float]) -> str:
    """How many learning rates there are, the lowest and the highest; a dash where there is none."""
    return f"{len(rates)}, {rate(min(rates))} to {rate(max(rates))}" if rates else "–"


def rate(value: float | None) -> str:
    """A learning rate; a dash where there is none."""
    return "–" if value is None else f"{value:.2g}"
