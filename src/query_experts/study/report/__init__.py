"""Reports a comparison: tables in the terminal, one self-contained page, and the plots of the README.

The page needs no network and no other file. The same comparison gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from query_experts.common.plots import save
from query_experts.study.report.charts import loss_figure, prefill_figure
from query_experts.study.report.findings import limits
from query_experts.study.report.page import page_of
from query_experts.study.report.rows import missing_parts, runs_by_arm
from query_experts.study.report.table import print_table
from query_experts.study.report.tables import findings_table, tables
from query_experts.study.report.template import write_page
from query_experts.study.results import Comparison

if TYPE_CHECKING:
    from rich.console import Console


def print_summary(comparison: Comparison, console: Console) -> None:
    """Prints the findings, the other tables, what is missing and what limits the findings; fits 80 columns."""
    from rich.text import Text

    found = findings_table(comparison)
    for table in [*([found] if found.body else []), *tables(comparison)]:
        print_table(table, console)
    for line in missing_parts(comparison):
        console.print(Text(f"Missing: {line}", style="yellow"))
    for line in limits(comparison):
        console.print(Text(f"Limit: {line}"))


def write_plots(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes loss.svg, loss.png, prefill.svg and prefill.png, each where there is something to draw."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"loss": loss_figure(runs_by_arm(comparison)), "prefill": prefill_figure(comparison)}
    return [path for name, figure in figures.items() if figure is not None for path in save(figure, folder, name)]


def write_report(comparison: Comparison, path: Path) -> None:
    """Writes the page, one HTML file that needs no other."""
    write_page("report.html.j2", page_of(comparison), path)
