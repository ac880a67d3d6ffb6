"""Reports a comparison: tables in the terminal, one self-contained page, and the plots of the README.

The page needs no network and no other file. The same comparison gives the same bytes.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from query_experts.common.errors import SettingError
from query_experts.common.files import write_text
from query_experts.common.plots import save
from query_experts.study.report.charts import loss_figure, prefill_figure
from query_experts.study.report.findings import limits
from query_experts.study.report.page import page_of
from query_experts.study.report.rows import missing_parts, runs_by_arm
from query_experts.study.report.tables import Table, findings_table, tables
from query_experts.study.results import Comparison

INTERVAL = re.compile(r"\[.*?\]")  # must not wrap in the terminal

if TYPE_CHECKING:
    from rich.console import Console


def print_summary(comparison: Comparison, console: Console) -> None:
    """Prints the findings, the other tables, what is missing and what limits the findings; fits 80 columns."""
    from rich.text import Text

    found = findings_table(comparison)
    for table in [*([found] if found.body else []), *tables(comparison)]:
        _print_table(table, console)
    for line in missing_parts(comparison):
        console.print(Text(f"Missing: {line}", style="yellow"))
    for line in limits(comparison):
        console.print(Text(f"Limit: {line}"))


def _print_table(table: Table, console: Console) -> None:
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


def write_plots(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes loss.svg, loss.png, prefill.svg and prefill.png, each where there is something to draw."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"loss": loss_figure(runs_by_arm(comparison)), "prefill": prefill_figure(comparison)}
    return [path for name, figure in figures.items() if figure is not None for path in save(figure, folder, name)]


def write_report(comparison: Comparison, path: Path) -> None:
    """Writes the page, one HTML file that needs no other."""
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise SettingError("the report needs jinja2: pip install query-experts[study]") from error
    source = resources.files("query_experts.study").joinpath("templates", "report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    write_text(path, environment.from_string(source).render(vars(page_of(comparison))))
