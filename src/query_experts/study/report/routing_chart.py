"""Draws routing over training: the routers' entropy, the highest load and the number of dead experts, by tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from query_experts.common import formatting as text
from query_experts.common.plots import ARM_COLOURS, FAINT, LEGEND, new_figure, tidy
from query_experts.study.report.charts import MAX_POINTS, SEED_STYLES, smooth
from query_experts.study.results import RunResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {"entropy": "router entropy", "highest_load": "highest load", "dead": "dead experts"}


def routing_figure(by_arm: Mapping[str, Sequence[RunResult]]) -> Figure | None:
    """A line for each run that recorded its routing; None without one. Entropy and load are smoothed like losses."""
    runs = [run for group in by_arm.values() for run in group if run.routing_curve]
    if not runs:
        return None
    seeds = sorted({run.seed for run in runs})
    styles = {seed: SEED_STYLES[i % len(SEED_STYLES)] for i, seed in enumerate(seeds)}
    figure = new_figure(6.2)
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 0.6))
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        tidy(axes)
        axes.set_ylabel(title)
        for run in runs:
            points = [(point.tokens, getattr(point, name)) for point in run.routing_curve or []]
            drawn = points[:: -max(1, len(points) // MAX_POINTS)][::-1] if name == "dead" else smooth(points)
            axes.plot(*zip(*drawn, strict=True), color=ARM_COLOURS[run.arm], linestyle=styles[run.seed], linewidth=1.2)
    panels[-1].set_ylim(bottom=-0.2, top=max(1.2, panels[-1].get_ylim()[1]))
    panels[-1].yaxis.get_major_locator().set_params(integer=True)
    panels[-1].set_xlabel("training tokens")
    panels[-1].xaxis.set_major_formatter(lambda value, _: text.short(value) if value else "0")
    _legend(figure, list(dict.fromkeys(run.arm for run in runs)), styles)
    return figure


def _legend(figure: Figure, arms: Sequence[str], styles: Mapping[int, object]) -> None:
    from matplotlib.lines import Line2D

    entries = [Line2D([], [], color=ARM_COLOURS[arm], linewidth=1.6, label=arm) for arm in arms]
    if len(styles) > 1:
        entries += [
            Line2D([], [], color=FAINT, linestyle=style, linewidth=1.3, label=f"seed {seed}")
            for seed, style in styles.items()
        ]
    figure.legend(handles=entries, handlelength=2.4, **LEGEND)
