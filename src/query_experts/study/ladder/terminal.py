"""Prints a fit in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from query_experts.study.ladder.fit import Fit
from query_experts.study.ladder.law import NoLaw
from query_experts.study.ladder.limits import limits
from query_experts.study.ladder.tables import cost_table, findings_table, further_tables, gap_table, runs_table, tables
from query_experts.study.report.table import print_table

if TYPE_CHECKING:
    from rich.console import Console


def print_fit(fit: Fit, console: Console) -> None:
    """Prints the tables of a fit, why there is no law, and what limits it; fits 80 columns."""
    from rich.text import Text

    if not fit.cells:
        console.print(Text("No run has finished, so there is nothing to fit."))
        return
    by_cell = [*map(gap_table, fit.cells), *further_tables(fit)]
    for table in [findings_table(fit), runs_table(fit), *by_cell, *tables(fit), cost_table(fit)]:
        if table.body:
            print_table(table, console)
    if isinstance(fit.law, NoLaw):
        console.print(Text(f"No law: {fit.law.why}", style="yellow"))
    for line in limits(fit):
        console.print(Text(f"Limit: {line}"))
