"""A table of text, which the terminal and a page both show."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

INTERVAL = re.compile(r"\[.*?\]")  # must not wrap in the terminal


@dataclass(frozen=True)
class Table:
    """A table of text. A cell may hold several lines; the first cell of a row names what the row is about.

    Args:
        left: Positions of the columns that are aligned left.
    """

    title: str
    note: str
    head: list[str]
    body: list[list[str]]
    left: tuple[int, ...] = (0,)


def print_table(table: Table, console: Console) -> None:
    """Prints a table and its note; the row of gqe is bold."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        title=table.title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    for position, heading in enumerate(table.head):
        intervals = [match for cells in table.body for match in INTERVAL.findall(cells[position])]
        drawn.add_column(
            heading,
            justify="left" if position in table.left else "right",
            no_wrap=position == 0,
            min_width=max(map(len, intervals), default=None),
        )
    for cells in table.body:
        drawn.add_row(*(Text(cell) for cell in cells), style="bold" if cells[0] == "gqe" else None)
    console.print(drawn)
    console.print(Text(table.note, style="italic dim"))
    console.print()
