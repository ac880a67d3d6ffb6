"""Writes the page of a ladder, one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from query_experts.common import formatting as text
from query_experts.model.arms import ARMS
from query_experts.study.ladder import charts
from query_experts.study.ladder.fit import Fit
from query_experts.study.ladder.law import NoLaw
from query_experts.study.ladder.limits import limits
from query_experts.study.ladder.results import LadderResult
from query_experts.study.ladder.tables import cost_table, findings_table, further_tables, gap_table, runs_table, tables
from query_experts.study.report import template
from query_experts.study.report.page import Arm
from query_experts.study.report.svg import colour_variable, inline_svg
from query_experts.study.report.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Chart:
    """A chart as SVG with its caption."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class RungTables:
    """The gaps of a rung: at its largest budget, and at the others."""

    rung: str
    largest: Table
    others: list[Table]


@dataclass(frozen=True)
class Page:
    """Everything that the template shows."""

    ladder: str
    overview: str
    findings: Table
    missing: list[str]
    limits: list[str]
    runs: Table
    costs: Table
    arms: list[Arm]
    colours: dict[str, str]
    rungs: list[RungTables]
    further: list[Table]
    no_law: str | None
    fits: list[Table]
    sweeps: list[Table]
    charts: list[Chart]
    trained_on: list[str]


def write_page(
    results: Sequence[LadderResult],
    fit: Fit,
    path: Path,
    missing: Sequence[str] = (),
    sweeps: Sequence[Table] = (),
    ladder: str = "",
    text_lines: Sequence[str] = (),
) -> None:
    """Writes the page of a fit and of the results that it came from.

    Args:
        missing: What the ladder still has to run, a sentence each.
        sweeps: What the sweeps of settings say.
        ladder: The ladder's name.
        text_lines: What it was trained on, a line each.
    """
    template.write_page("ladder.html.j2", page_of(results, fit, missing, sweeps, ladder, text_lines), path)


def page_of(
    results: Sequence[LadderResult],
    fit: Fit,
    missing: Sequence[str] = (),
    sweeps: Sequence[Table] = (),
    ladder: str = "",
    text_lines: Sequence[str] = (),
) -> Page:
    return Page(
        ladder=ladder,
        overview=_overview(results, fit, sweeps),
        findings=findings_table(fit),
        missing=list(missing),
        limits=limits(fit),
        runs=runs_table(fit),
        costs=cost_table(fit),
        arms=[Arm(arm, ARMS[arm], colour_variable(arm)) for arm in fit.arms],
        colours={arm: colour_variable(arm) for arm in fit.arms},
        rungs=[_rung_tables(fit, rung) for rung in reversed(fit.rungs)],
        further=further_tables(fit),
        no_law=fit.law.why if isinstance(fit.law, NoLaw) else None,
        fits=tables(fit),
        sweeps=list(sweeps),
        charts=_charts(results, fit),
        trained_on=[*text_lines, *_trained_on(results)],
    )


def _overview(results: Sequence[LadderResult], fit: Fit, sweeps: Sequence[Table]) -> str:
    if not results:
        return "Its results are those of sweeps." if sweeps else "Nothing has run yet."
    seeds = {result.seed for result in results}
    trained = {result.key[:-1] for result in results}
    return (
        f"{text.plural(len(trained), 'run')} of {text.plural(len(fit.arms), 'arm')} on "
        f"{text.plural(len(fit.rungs), 'rung')}, with up to {text.plural(len(seeds), 'seed')}."
    )


def _rung_tables(fit: Fit, rung: str) -> RungTables:
    *others, largest = [gap_table(cell) for cell in fit.cells if cell.rung == rung]
    return RungTables(rung, largest, others[::-1])


def _charts(results: Sequence[LadderResult], fit: Fit) -> list[Chart]:
    drawn = [
        _chart(
            charts.law_figure(fit), "laws", "Loss against compute",
            "Mean over seeds; hollow where a part of the tokens was used. Lines, where there is a law: that of the "
            "first arm at each rung. Below: how far each mean, and the law of each other arm, lies from it.",
        ),
        _chart(
            charts.gap_figure(fit, "compute"), "gaps-compute", "Differences against compute",
            "Paired differences of validation loss with 95% intervals, at all tokens of each rung; below zero is "
            "better. The frame cuts the widest intervals off. Lines, from three rungs on: weighted least squares, with "
            "the interval of gqe's.",
        ),
        _chart(
            charts.gap_figure(fit, "tokens"), "gaps-tokens", "Differences against tokens",
            "The same, and those with a part of a rung's tokens (hollow), by training tokens. A line joins the points "
            "of a rung, each in a style of its own: the same size, trained for longer.",
        ),
        _chart(
            charts.cost_figure(fit), "costs", "Loss against active heads and time",
            "Mean validation loss at each rung's largest budget. Time: median over seeds, the process's own on one "
            "thread of a CPU; other work on a machine and different machines change it.",
        ),
        _chart(
            charts.routing_figure(results, fit.rungs), "routing", "Routing over training",
            "Entropy of the router (1 is undecided, 0 is certain) and the largest share of tokens that select one "
            "expert; means over seeds, layers and groups for the entropy.",
        ),
    ]  # fmt: skip
    return [chart for chart in drawn if chart is not None]


def _chart(figure: Figure | None, name: str, title: str, caption: str) -> Chart | None:
    if figure is None:
        return None
    return Chart(title, caption, inline_svg(figure, f"chart-{name}", title, f"{caption} The tables have the numbers."))


def _trained_on(results: Sequence[LadderResult]) -> list[str]:
    """Each machine with its instructions and versions, and the number of its results."""
    counts: dict[str, int] = {}
    for result in results:
        for line in dict.fromkeys(
            f"{piece.hardware} ({result.instructions}), torch {piece.torch}, transformers {piece.transformers}, "
            f"query-experts {piece.query_experts}, tag {result.tag or 'none'}, {piece.dtype}"
            for piece in result.pieces
        ):
            counts[line] = counts.get(line, 0) + 1
    return [f"{line}: {text.plural(count, 'result')}" for line, count in counts.items()]
