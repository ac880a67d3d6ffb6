"""Draws the charts: loss, paired differences, prefill speed and load of each expert, as matplotlib figures.

Each arm has one colour and one marker everywhere; seeds differ in line style.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from query_experts.common import formatting as text
from query_experts.common.plots import ARM_COLOURS, DEAD, FAINT, INK, LEGEND, MARKERS, NARROW, WIDTH, new_figure, tidy
from query_experts.study.report.rows import BASELINES, Speedup, prefill_lengths, summary_rows
from query_experts.study.results import Comparison, Curve, RoutingLoad, RunResult
from query_experts.study.statistics import PairedDifference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEED_STYLES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
EXPERT_COLOURS = ("#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#44bb99", "#bbcc33", "#c4a7e7")
MAX_POINTS = 300
WIDE_LOAD = 16  # bars in a row, above which the load chart takes the whole width
ROW_HEIGHT = 1.62  # of the load chart, where the highest bar has height 1; includes the entropy and a gap

Points = Sequence[tuple[float, float]]  # tokens, loss


def loss_figure(by_arm: Mapping[str, Sequence[RunResult]]) -> Figure | None:
    """Draws training loss (smoothed) and validation loss by tokens, and below it validation over the second half."""
    runs = [run for group in by_arm.values() for run in group if run.train_curve or run.validation_curve]
    if not runs:
        return None
    last = max(tokens for run in runs for tokens, _ in [*run.train_curve, *run.validation_curve])
    validated = [run for run in runs if not run.diverged and len(_second_half(run, last)) > 1]
    figure = new_figure(6.4 if validated else 4.2)
    panels = figure.subplots(2, 1, height_ratios=(1.15, 1)) if validated else [figure.add_subplot()]
    for axes, title in zip(panels, ("training (lines), validation (points)", "validation, second half"), strict=False):
        _label_loss_panel(axes, title)
    seeds = sorted({run.seed for run in runs})
    styles = {seed: SEED_STYLES[i % len(SEED_STYLES)] for i, seed in enumerate(seeds)}
    for run in runs:
        look, style, marker = _look(run.arm), styles[run.seed], MARKERS[run.arm]
        _plot(panels[0], smooth(run.train_curve), linestyle=style, linewidth=1.1, **look)
        _plot(panels[0], run.validation_curve, linestyle="none", marker=marker, markersize=3.5, **look)
    for run in validated:
        look, style, marker = _look(run.arm), styles[run.seed], MARKERS[run.arm]
        _plot(panels[1], _second_half(run, last), linestyle=style, linewidth=1.3, marker=marker, markersize=5, **look)
    diverged = [run for run in runs if run.diverged]
    _fit(panels[0], [run for run in runs if not run.diverged] or diverged, last)
    _mark_divergence(panels[0], diverged)
    _loss_legend(figure, list(dict.fromkeys(run.arm for run in runs)), styles, bool(diverged))
    return figure


def _label_loss_panel(axes: Axes, title: str) -> None:
    tidy(axes)
    axes.set_title(title, fontsize=9.5, color=INK, loc="left")
    axes.set_ylabel("language-model loss")
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(lambda value, _: text.short(value) if value else "0")


def _look(arm: str) -> dict[str, Any]:
    return {"color": ARM_COLOURS[arm], "zorder": 4 if arm == "gqe" else 3}


def _plot(axes: Axes, points: Points, **look: Any) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), **{"markeredgewidth": 0, **look})


def _second_half(run: RunResult, last: float) -> Curve:
    return [(tokens, loss) for tokens, loss in run.validation_curve if tokens >= last / 2]


def smooth(points: Points) -> Points:
    """Means over windows of 3% of the points (at least 7, if there are many more), at the middles of the windows.

    All windows are equally wide, so a line ends half a window early and not in the noise of a single point. Keeps at
    most MAX_POINTS points.
    """
    sums = [0.0]
    for _, loss in points:
        sums.append(sums[-1] + loss)
    side = max(round(0.015 * len(points)), min(3, len(points) // 10))
    smoothed = [
        (points[middle][0], (sums[middle + side + 1] - sums[middle - side]) / (2 * side + 1))
        for middle in range(side, len(points) - side)
    ]
    step = max(1, math.ceil(len(smoothed) / MAX_POINTS))
    return smoothed[::-step][::-1]


def _fit(axes: Axes, runs: Sequence[RunResult], last: float) -> None:
    """Fits the axes to what follows the first tenth of the tokens: the steep start would flatten the rest."""
    lines = [line for run in runs for line in (smooth(run.train_curve), run.validation_curve)]
    shown = [loss for line in lines for tokens, loss in line if tokens >= 0.1 * last]
    if not shown:  # a run that diverged much later sets `last`
        return
    margin = 0.04 * (max(shown) - min(shown)) or 0.05
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xlim(0, 1.02 * last)


def _mark_divergence(axes: Axes, runs: Sequence[RunResult]) -> None:
    """Marks the end of each line with a cross, inside the axes."""
    top = axes.get_ylim()[1]
    for run in runs:
        ends = [(tokens, min(loss, top)) for tokens, loss in run.train_curve[-1:]]
        _plot(axes, ends, marker="x", markersize=7, markeredgewidth=1.8, clip_on=False, **_look(run.arm))


def _loss_legend(figure: Figure, arms: Sequence[str], styles: Mapping[int, Any], crosses: bool) -> None:
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color=ARM_COLOURS[arm], marker=MARKERS[arm], markersize=5, linewidth=1.6, label=arm)
        for arm in arms
    ]
    if len(styles) > 1:
        entries += [
            Line2D([], [], color=FAINT, linestyle=style, linewidth=1.3, label=f"seed {seed}")
            for seed, style in styles.items()
        ]
    if crosses:
        entries.append(Line2D([], [], color=FAINT, linestyle="none", marker="x", markersize=7, label="diverged"))
    figure.legend(handles=entries, handlelength=2.4, **LEGEND | {"ncols": 3})


def difference_figure(comparison: Comparison) -> Figure | None:
    """Draws each arm's paired loss difference from each baseline: a dot a seed, the mean, and its 95% interval."""
    rows = summary_rows(comparison)
    panels = [base for base in BASELINES if any(row.versus[base] for row in rows)]
    shown = [row for row in rows if any(row.versus[base] for base in panels)][::-1]
    if not panels:
        return None
    figure = new_figure(0.9 + 0.3 * len(shown))
    for position, base in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), position + 1, sharey=figure.axes[0] if position else None)
        tidy(axes, grid="x")
        axes.axvline(0, color=INK, linewidth=1)
        for y, row in enumerate(shown):
            _draw_difference(axes, y, row.arm, row.versus[base])
        axes.set_yticks(range(len(shown)), [row.arm for row in shown])
        axes.tick_params(axis="y", length=0, labelleft=position == 0)
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.margins(x=0.12)
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter(lambda value, _: text.signed(value, 3) if value else "0")
        axes.set_title(f"difference from {base}", fontsize=9.5, color=INK)
    title = "validation loss minus that of the baseline, nats a token, by seed: left is better"
    figure.supxlabel(title, fontsize=9, color=FAINT)
    return figure


def _draw_difference(axes: Axes, y: float, arm: str, difference: PairedDifference | None) -> None:
    if difference is None:
        return
    colour = ARM_COLOURS[arm]
    if difference.low is not None and difference.high is not None:
        axes.plot([difference.low, difference.high], [y, y], color=colour, linewidth=1.2)
    axes.plot([difference.mean], [y], marker="|", markersize=13, markeredgewidth=2.2, color=colour)
    seeds = list(difference.differences.values())
    axes.plot(seeds, [y] * len(seeds), linestyle="none", marker="o", markersize=4.5, color=colour)


def prefill_figure(comparison: Comparison) -> Figure | None:
    """Draws speed relative to dense by prompt length: medians with their range, and the limits by active heads."""
    rows = [row for row in summary_rows(comparison) if row.arm != "dense" and any(row.prefill.values())]
    if not rows:
        return None
    figure = new_figure(4.0)
    axes = figure.add_subplot()
    tidy(axes)
    axes.set_xscale("log", base=2)
    lengths = prefill_lengths(comparison)
    for position, row in enumerate(rows):
        nudge = 2 ** (0.05 * (position - (len(rows) - 1) / 2))
        _draw_speedups(axes, row.arm, {length * nudge: speed for length, speed in row.prefill.items() if speed})
    axes.axhline(1, color=INK, linewidth=1, zorder=1)
    _draw_limits(axes, comparison, [row.arm for row in rows])
    axes.set_xticks(lengths, [text.length_name(length) for length in lengths])
    axes.minorticks_off()
    axes.margins(x=0.1, y=0.1)
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel(f"prefill speed ({text.TIMES} dense)")
    figure.legend(**LEGEND)
    return figure


def _draw_limits(axes: Axes, comparison: Comparison, arms: Sequence[str]) -> None:
    """Draws a dashed line for each limit, labelled with the arms that share it."""
    by_limit: dict[float, list[str]] = {}
    for arm, limit in (comparison.prefill.limit if comparison.prefill is not None else {}).items():
        if arm in arms:
            by_limit.setdefault(round(limit, 3), []).append(arm)
    for limit, sharing in by_limit.items():
        colour = ARM_COLOURS[sharing[0]] if len(sharing) == 1 else FAINT
        axes.axhline(limit, color=colour, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
        axes.annotate(f"limit {text.times(limit)} ({', '.join(sharing)})", (0.11, limit), (0, 3), fontsize=8.5,
                      xycoords=("axes fraction", "data"), textcoords="offset points", color=colour)  # fmt: skip


def _draw_speedups(axes: Axes, arm: str, speedups: Mapping[float, Speedup]) -> None:
    medians = [speed.median for speed in speedups.values()]
    below = [speed.median - speed.low for speed in speedups.values()]
    above = [speed.high - speed.median for speed in speedups.values()]
    axes.errorbar(list(speedups), medians, yerr=[below, above], color=ARM_COLOURS[arm], marker=MARKERS[arm],
                  markersize=5, capsize=2.5, linewidth=1.6, elinewidth=1, label=arm,
                  zorder=4 if arm == "gqe" else 3)  # fmt: skip


def load_figure(routing: RoutingLoad) -> Figure:
    """Draws the load of each expert as a bar: a row a layer, a cell a group, with a line at even load."""
    layers, groups, experts = len(routing.load), len(routing.load[0]), routing.experts_per_group
    top_k = max(1, round(sum(routing.load[0][0])))
    even_load = top_k / experts
    highest = max(even_load, routing.highest_load)
    figure = new_figure(0.5 + 0.5 * layers, WIDTH if groups * experts > WIDE_LOAD else NARROW)
    axes = figure.add_subplot()
    tidy(axes, grid=None)
    pitch, floors = experts + 1, [ROW_HEIGHT * (layers - 1 - layer) for layer in range(layers)]
    for expert in range(experts):
        bars = [
            (group * pitch + expert, floors[layer], routing.load[layer][group][expert] / highest)
            for layer in range(layers)
            for group in range(groups)
        ]
        _draw_bars(axes, bars, EXPERT_COLOURS[expert % len(EXPERT_COLOURS)])
    for layer, floor in enumerate(floors):
        for group in range(groups):
            _draw_cell(axes, group * pitch - 0.5, floor, experts, even_load / highest)
            _annotate_cell(axes, routing, layer, group, (group * pitch, floor))
    middles = [group * pitch + (experts - 1) / 2 for group in range(groups)]
    axes.set_yticks([floor + 0.5 for floor in floors], [f"layer {i}" for i in range(layers)])
    axes.set_xticks(middles, [f"group {i}" if groups <= 6 else str(i) for i in range(groups)])
    if groups > 6:
        axes.set_xlabel("group")
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlim(-0.9, groups * pitch - 0.9)
    axes.set_ylim(-0.5, ROW_HEIGHT * (layers - 1) + 1.05)
    axes.spines[:].set_visible(False)
    return figure


def _draw_cell(axes: Axes, left: float, floor: float, width: int, even: float) -> None:
    """Draws the line under the bars of a cell, and the dashed line at even load."""
    axes.plot([left, left + width], [floor, floor], color=FAINT, linewidth=0.6)
    axes.plot([left, left + width], [floor + even] * 2, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))


def _draw_bars(axes: Axes, bars: Sequence[tuple[float, float, float]], colour: str) -> None:
    """Draws all bars (x, floor, height) of one colour as a single path, which keeps the page small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    boxes = [[(x - 0.42, y), (x - 0.42, y + h), (x + 0.42, y + h), (x + 0.42, y), (x - 0.42, y)] for x, y, h in bars]
    paths = [Path(box, closed=True) for box in boxes]
    axes.add_patch(PathPatch(Path.make_compound_path(*paths), facecolor=colour, linewidth=0))


def _annotate_cell(axes: Axes, routing: RoutingLoad, layer: int, group: int, corner: tuple[float, float]) -> None:
    """Draws crosses for dead experts and, where there is room, the router's entropy under the cell."""
    x, floor = corner
    loads = routing.load[layer][group]
    for expert, value in enumerate(loads):
        if value < routing.dead_below:
            axes.plot([x + expert], [floor + 0.16], marker="x", markersize=4.5, markeredgewidth=1.4, color=DEAD)
    if len(routing.load[layer]) <= 8:
        entropy = text.fixed(routing.entropy[layer][group], 2)
        middle = x + (len(loads) - 1) / 2
        axes.text(middle, floor - 0.08, entropy, ha="center", va="top", fontsize=9, color=FAINT)
