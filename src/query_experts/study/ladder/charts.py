"""Draws the charts of a ladder as matplotlib figures. Each arm has one colour and one marker everywhere."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from query_experts.common import formatting as text
from query_experts.common.plots import ARM_COLOURS, FAINT, INK, LEGEND, MARKERS, new_figure, tidy
from query_experts.model.arms import in_order
from query_experts.study.ladder.fit import Fit
from query_experts.study.ladder.gaps import BASELINES, Cell, compared
from query_experts.study.ladder.law import Law
from query_experts.study.ladder.line import GapPoint, gap_points
from query_experts.study.ladder.results import LadderResult
from query_experts.study.report.charts import SEED_STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

LINE_POINTS = 30
ROOM = 1.8
NUDGE = 1.035  # ratio of the positions of neighbouring arms, so that intervals don't cover one another
Axis = Literal["compute", "tokens"]
AXIS_NAMES: dict[Axis, str] = {
    "compute": "6 N D, without embeddings and attention scores (FLOPs)",
    "tokens": "training tokens",
}


def law_figure(fit: Fit) -> Figure | None:
    """Draws mean losses against training FLOPs with the law; below it, how far each lies from dense's law."""
    shown = [(cell, own, own.mean) for cell in fit.cells for own in cell.arms.values() if own.mean is not None]
    if not shown:
        return None
    law = fit.law if isinstance(fit.law, Law) else None
    reference = law.arms[0] if law is not None else None
    figure = new_figure(6.4 if law else 3.8)
    panels = figure.subplots(2, 1, sharex=True, height_ratios=(1.2, 1)) if law else [figure.add_subplot()]
    for axes in panels:
        tidy(axes)
        _log_scale(axes)
    for cell, own, mean in shown:
        look = _look(own.arm, cell)
        panels[0].plot([own.flops], [mean], linestyle="none", **look)
        if law is not None and reference is not None:
            expected = law.best.loss(reference, own.size, own.train_tokens)
            panels[1].plot([own.flops], [mean - expected], linestyle="none", **look)
    panels[0].set_ylabel("validation loss")
    panels[-1].set_xlabel("FLOPs of training, as run")
    if law is not None:
        _draw_law(panels, fit, law)
        panels[1].axhline(0, color=INK, linewidth=1)
        panels[1].set_ylabel(f"minus {reference}'s law")
        panels[1].yaxis.set_major_formatter(_signed)
    _legend(figure, fit.arms)
    return figure


def _log_scale(axes: Axes) -> None:
    """A logarithmic x axis with labels such as 3e14, since the digits of an exponent would be too small to read."""
    from matplotlib.ticker import LogFormatter

    class ShortLogFormatter(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return re.sub(r"e\+0*", "e", super().__call__(x, pos))

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ShortLogFormatter())
    axes.xaxis.set_minor_formatter(ShortLogFormatter(labelOnlyBase=False))


def _look(arm: str, cell: Cell) -> dict[str, Any]:
    """Filled where all tokens were used."""
    colour = ARM_COLOURS[arm]
    return {"color": colour, "marker": MARKERS[arm], "markersize": 5, "markeredgecolor": colour, "zorder": 3,
            "markerfacecolor": colour if cell.budget == 1 else "none"}  # fmt: skip


def _signed(value: float, _: Any) -> str:
    return text.signed(value, 3) if value else "0"


def _draw_law(panels: Sequence[Axes], fit: Fit, law: Law) -> None:
    """Draws the first arm's law at each rung, over the tokens of its budgets, and the other arms' relative to it."""
    first = law.arms[0]
    for rung in fit.rungs:
        own = [cell.arms[first] for cell in fit.cells if cell.rung == rung and first in cell.arms]
        if not own:
            continue
        last, parameters = own[-1], own[-1].size
        tokens = np.geomspace(0.8 * own[0].train_tokens, 1.25 * last.train_tokens, LINE_POINTS)
        flops = tokens * last.flops / last.train_tokens
        look: dict[str, Any] = {"linewidth": 1.1}
        losses = [law.best.loss(first, parameters, each) for each in tokens]
        panels[0].plot(flops, losses, color=ARM_COLOURS[first], **look)
        for arm in law.arms[1:]:
            gaps = [law.best.gap(arm, first, parameters, each) for each in tokens]
            panels[1].plot(flops, gaps, color=ARM_COLOURS[arm], **look)


def _legend(figure: Figure, arms: Sequence[str], rungs: Sequence[str] = ()) -> None:
    """Names the arms, and the line styles of rungs where there are several."""
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color=ARM_COLOURS[arm], marker=MARKERS[arm], markersize=5, linewidth=1.4, label=arm)
        for arm in arms
    ]
    entries += _rung_entries(rungs)
    figure.legend(handles=entries, **LEGEND | {"ncols": min(5, len(entries))})


def _rung_entries(rungs: Sequence[str]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    if len(rungs) < 2:
        return []
    return [Line2D([], [], color=FAINT, linestyle=_style(rungs, rung), linewidth=1.3, label=rung) for rung in rungs]


def gap_figure(fit: Fit, axis: Axis) -> Figure | None:
    """Draws each arm's difference from each baseline with its interval, against compute or tokens.

    Against compute, those at all tokens of a rung, and the fitted lines with their intervals. Against tokens, all,
    those of a rung joined.
    """
    bases = [base for base in BASELINES if any(_points(fit, arm, base, axis) for arm in fit.arms)]
    if not bases:
        return None
    figure = new_figure(0.8 + 2.2 * len(bases))
    panels = figure.subplots(len(bases), 1, sharex=True, squeeze=False)[:, 0]
    for axes, base in zip(panels, bases, strict=True):
        tidy(axes)
        _log_scale(axes)
        axes.axhline(0, color=INK, linewidth=1)
        axes.set_title(f"difference from {base}", fontsize=9.5, color=INK, loc="left")
        axes.yaxis.set_major_formatter(_signed)
        arms = [arm for arm, other in compared(fit.arms) if other == base]
        for position, arm in enumerate(arms):
            nudge = NUDGE ** (position - (len(arms) - 1) / 2)
            _draw_gaps(axes, arm, _points(fit, arm, base, axis), axis, nudge)
            if axis == "compute":
                _draw_line(axes, fit, arm, base)
            else:
                _join_rungs(axes, arm, _points(fit, arm, base, axis), nudge, fit.rungs)
        _frame(axes, [point for arm in arms for point in _points(fit, arm, base, axis)])
    if axis == "compute":
        shown = [point for arm in fit.arms for base in bases for point in _points(fit, arm, base, axis)]
        _name_rungs(panels[-1], {point.rung: point.compute for point in shown})
    panels[-1].set_xlabel(AXIS_NAMES[axis])
    arms = [arm for arm in fit.arms if any(_points(fit, arm, base, axis) for base in bases)]
    _legend(figure, arms, fit.rungs if axis == "tokens" else ())
    return figure


def _name_rungs(axes: Axes, compute: Mapping[str, float]) -> None:
    """Has a tick at each rung alone, with its name, and room around the outer ones."""
    axes.minorticks_off()
    axes.set_xticks([*compute.values()], [f"{rung}\n{flops:.1e}".replace("e+", "e") for rung, flops in compute.items()])
    axes.set_xlim(min(compute.values()) / ROOM, max(compute.values()) * ROOM)


def _points(fit: Fit, arm: str, base: str, axis: Axis) -> list[GapPoint]:
    points = gap_points(fit.cells, arm, base) if (arm, base) in compared(fit.arms) else []
    return [point for point in points if axis == "tokens" or point.budget == 1]


def _draw_gaps(axes: Axes, arm: str, points: Sequence[GapPoint], axis: Axis, nudge: float) -> None:
    for point in points:
        difference, colour = point.gap.difference, ARM_COLOURS[arm]
        if difference is None:
            continue
        x = nudge * (point.compute if axis == "compute" else point.tokens)
        if difference.low is not None and difference.high is not None:
            axes.plot([x, x], [difference.low, difference.high], color=colour, linewidth=1)
        axes.plot([x], [difference.mean], marker=MARKERS[arm], markersize=5, color=colour, linestyle="none",
                  markerfacecolor=colour if point.budget == 1 else "none")  # fmt: skip


def _join_rungs(axes: Axes, arm: str, points: Sequence[GapPoint], nudge: float, rungs: Sequence[str]) -> None:
    for rung in dict.fromkeys(point.rung for point in points):
        own = [(nudge * point.tokens, point.gap.difference.mean)
               for point in points if point.rung == rung and point.gap.difference]  # fmt: skip
        axes.plot(*zip(*own, strict=True), color=ARM_COLOURS[arm], linewidth=0.8, linestyle=_style(rungs, rung))


def _frame(axes: Axes, points: Sequence[GapPoint]) -> None:
    """Fits the frame to the means and to intervals up to twice as wide as most: wide ones would flatten the rest."""
    means = [(point.gap.difference.mean, _half_width(point)) for point in points if point.gap.difference]
    widest = 2 * statistics.median(half for _, half in means)
    ends = [0.0, *(mean + side * min(half, widest) for mean, half in means for side in (-1, 1))]
    margin = 0.06 * (max(ends) - min(ends)) or 0.01
    axes.set_ylim(min(ends) - margin, max(ends) + margin)


def _half_width(point: GapPoint) -> float:
    difference = point.gap.difference
    return 0.0 if difference is None or difference.high is None else difference.high - difference.mean


def _draw_line(axes: Axes, fit: Fit, arm: str, base: str) -> None:
    line = fit.line(arm, base)
    if line is None:
        return
    found = [point.compute for point in line.points]
    compute = np.geomspace(min(found), max(found), LINE_POINTS)
    at = [line.at(each) for each in compute]
    axes.plot(compute, [each.value for each in at], color=ARM_COLOURS[arm], linewidth=1.3)
    if arm == "gqe":
        low, high = ([end for each in at if (end := getattr(each, name)) is not None] for name in ("low", "high"))
        axes.fill_between(compute, low, high, color=ARM_COLOURS[arm], alpha=0.14, linewidth=0)


def cost_figure(fit: Fit) -> Figure | None:
    """Draws mean loss against active heads and against training time, at each rung's largest budget."""
    last = {cell.rung: cell for cell in fit.cells if any(own.losses for own in cell.arms.values())}
    if not last:
        return None
    figure = new_figure(0.9 + 1.75 * len(last))
    panels = figure.subplots(len(last), 2, squeeze=False, sharey="row")
    for row, cell in zip(panels, last.values(), strict=True):
        for axes in row:
            tidy(axes)
            axes.margins(0.15)
            axes.locator_params(nbins=4)
        row[0].set_title(f"{cell.rung}, {cell.budget:.0%} of its tokens", fontsize=9.5, color=INK, loc="left")
        for own in cell.arms.values():
            if own.mean is not None and own.train_seconds is not None:
                row[0].plot([own.active_heads], [own.mean], linestyle="none", **_look(own.arm, cell))
                row[1].plot([own.train_seconds / 60], [own.mean], linestyle="none", **_look(own.arm, cell))
    panels[-1][0].set_xlabel("active heads in a layer")
    panels[-1][1].set_xlabel("minutes of training")
    figure.supylabel("validation loss", fontsize=9.5, color=INK)
    _legend(figure, fit.arms)
    return figure


def routing_figure(results: Sequence[LadderResult], rungs: Sequence[str]) -> Figure | None:
    """Draws router entropy and highest load over training: means over seeds, at each rung's largest budget."""
    routed = _longest_routed(results)
    if not routed:
        return None
    figure = new_figure(5.6)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, name in zip(panels, ("router entropy", "highest load"), strict=True):
        tidy(axes)
        axes.set_ylabel(name)
    shown = [rung for rung in rungs if any(rung == key[0] for key in routed)]
    for (rung, arm), runs in routed.items():
        look = {"color": ARM_COLOURS[arm], "linewidth": 1.3, "linestyle": _style(shown, rung)}
        for axes, values in zip(panels, _mean_curves(runs), strict=True):
            axes.plot(np.linspace(0, 1, LINE_POINTS), values, **look)
    panels[1].set_xlabel("share of the run's tokens")
    _routing_legend(figure, in_order(arm for _, arm in routed), shown)
    return figure


def _style(rungs: Sequence[str], rung: str) -> Any:
    return SEED_STYLES[rungs.index(rung) % len(SEED_STYLES)]


def _longest_routed(results: Sequence[LadderResult]) -> dict[tuple[str, str], list[LadderResult]]:
    """The runs of each rung and arm that recorded their routing, at the largest budget that has one."""
    found: dict[tuple[str, str], list[LadderResult]] = {}
    for result in sorted(results, key=lambda result: -result.budget):
        if result.routing_curve and not result.diverged:
            own = found.setdefault((result.rung, result.arm), [])
            if not own or own[0].budget == result.budget:
                own.append(result)
    return found


def _mean_curves(runs: Sequence[LadderResult]) -> list[list[float]]:
    """Entropy and highest load over the share of a run's tokens, means over runs; NaN before the first record."""
    share = np.linspace(0, 1, LINE_POINTS)
    curves = []
    for name in ("entropy", "highest_load"):
        each = [
            np.interp(
                share,
                [point.tokens / run.train_tokens for point in run.routing_curve],
                [getattr(point, name) for point in run.routing_curve],
                left=np.nan,
            )
            for run in runs
        ]
        curves.append([statistics.fmean(values) for values in zip(*each, strict=True)])
    return curves


def _routing_legend(figure: Figure, arms: Sequence[str], rungs: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    entries = [Line2D([], [], color=ARM_COLOURS[arm], linewidth=1.6, label=arm) for arm in arms]
    entries += _rung_entries(rungs)
    figure.legend(handles=entries, **LEGEND | {"ncols": min(5, len(entries))})
