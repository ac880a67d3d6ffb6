"""Owns the charts: loss, paired differences, prefill speed and load per expert, as matplotlib figures.

Figures are built without pyplot, so no global state and no display. Arms have one colour-blind-safe colour and one
marker everywhere; seeds differ in line style.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from query_experts.common import formatting as text
from query_experts.common.plots import ARM_COLOURS, DEAD, FAINT, INK, LEGEND, MARKERS, NARROW, WIDTH, new_figure, tidy
from query_experts.study.report.rows import BASELINES, Comparison, Run, Speedup, diverged, prefill_lengths, summary_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEED_STYLES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
EXPERT_COLOURS = ("#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#44bb99", "#bbcc33", "#c4a7e7")
CURVES = ("train_curve", "validation_curve")
POINTS_A_LINE = 300
WIDE_LOAD = 16  # bars in a row, above which the load chart takes the whole width
ROW = 1.62  # of the load chart: the tallest bar has height 1; entropy stands under it, then a gap


def loss_figure(by_arm: Mapping[str, Sequence[Run]]) -> Figure | None:
    """Training loss (smoothed) with validation points against tokens, and below it the second half, validation only."""
    runs = [(arm, run) for arm, group in by_arm.items() for run in group if _has_curve(run)]
    if not runs:
        return None
    seeds = sorted({run["seed"] for _, run in runs})
    styles = {seed: SEED_STYLES[i % len(SEED_STYLES)] for i, seed in enumerate(seeds)}
    last = max(tokens for _, run in runs for name in CURVES for tokens, _ in curve(run, name))
    validated = [(arm, run) for arm, run in runs if not diverged(run) and len(_late(run, last)) > 1]
    figure = new_figure(6.4 if validated else 4.2)
    panels = figure.subplots(2, 1, height_ratios=(1.15, 1)) if validated else [figure.add_subplot()]
    for axes, title in zip(panels, ("training (lines), validation (points)", "validation, second half"), strict=False):
        tidy(axes)
        axes.set_title(title, fontsize=9.5, color=INK, loc="left")
        axes.set_ylabel("language-model loss")
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(lambda value, _: text.short(value) if value else "0")
    for arm, run in runs:
        look = _look(arm)
        _plot(panels[0], smooth(curve(run, "train_curve")), linestyle=styles[run["seed"]], linewidth=1.1, **look)
        points = curve(run, "validation_curve")
        _plot(panels[0], points, linestyle="none", marker=MARKERS[arm], markersize=3.5, **look)
    for arm, run in validated:
        style, marker = styles[run["seed"]], MARKERS[arm]
        _plot(panels[1], _late(run, last), linestyle=style, linewidth=1.3, marker=marker, markersize=5, **_look(arm))
    gone = [run for _, run in runs if diverged(run)]
    _fit(panels[0], [run for _, run in runs if not diverged(run)] or gone, last)
    _cross_ends(panels[0], gone)
    _loss_legend(figure, list(dict.fromkeys(arm for arm, _ in runs)), styles, bool(gone))
    return figure


def _look(arm: str) -> dict[str, Any]:
    return {"color": ARM_COLOURS[arm], "zorder": 4 if arm == "gqe" else 3}


def _plot(axes: Axes, points: Sequence[tuple[float, float]], **look: Any) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), **{"markeredgewidth": 0, **look})


def curve(run: Run, name: str) -> list[tuple[float, float]]:
    """The points (tokens, loss) of one of a run's curves."""
    return [(float(tokens), float(loss)) for tokens, loss in run[name]]


def _has_curve(run: Run) -> bool:
    return any(curve(run, name) for name in CURVES)


def _late(run: Run, last: float) -> list[tuple[float, float]]:
    return [(tokens, loss) for tokens, loss in curve(run, "validation_curve") if tokens >= last / 2]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of windows of 3% of the points (7 at least, where there are many more), at the windows' middles.

    No window is narrower, so that a line ends half a window early rather than in the noise of a single point. At most
    POINTS_A_LINE points are left.
    """
    sums = [0.0]
    for _, loss in points:
        sums.append(sums[-1] + loss)
    side = max(round(0.015 * len(points)), min(3, len(points) // 10))
    smoothed = [
        (points[middle][0], (sums[middle + side + 1] - sums[middle - side]) / (2 * side + 1))
        for middle in range(side, len(points) - side)
    ]
    step = max(1, math.ceil(len(smoothed) / POINTS_A_LINE))
    return smoothed[::-step][::-1]


def _fit(axes: Axes, runs: Sequence[Run], last: float) -> None:
    """Leave out the steep start, which would flatten what is compared: fit the axes from a tenth of the tokens on."""
    lines = [line for run in runs for line in (smooth(curve(run, "train_curve")), curve(run, "validation_curve"))]
    shown = [loss for line in lines for tokens, loss in line if tokens >= 0.1 * last]
    margin = 0.04 * (max(shown) - min(shown)) or 0.05
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xlim(0, 1.02 * last)


def _cross_ends(axes: Axes, runs: Sequence[Run]) -> None:
    """A cross where the line of each of these runs ends, or under the upper edge where that is above it."""
    top = axes.get_ylim()[1]
    for run in runs:
        ends = [(tokens, min(loss, top)) for tokens, loss in curve(run, "train_curve")[-1:]]
        _plot(axes, ends, marker="x", markersize=7, markeredgewidth=1.8, clip_on=False, **_look(run["arm"]))


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
    figure.legend(
        handles=entries,
        loc="outside lower center",
        ncols=min(len(entries), 6),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=2.4,
    )


def difference_figure(comparison: Comparison) -> Figure | None:
    """Each arm's paired loss difference from dense and from static: a dot a seed, a bar for mean or 95% interval."""
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
    figure.supxlabel("validation loss, seed by seed: further left is better", fontsize=9, color=FAINT)
    return figure


def _draw_difference(axes: Axes, y: float, arm: str, difference: Any) -> None:
    if difference is None:
        return
    colour = ARM_COLOURS[arm]
    if difference.low is not None:
        axes.plot([difference.low, difference.high], [y, y], color=colour, linewidth=1.8, alpha=0.55)
    axes.plot([difference.mean], [y], marker="|", markersize=13, markeredgewidth=2.2, color=colour)
    seeds = list(difference.differences.values())
    axes.plot(seeds, [y] * len(seeds), linestyle="none", marker="o", markersize=4.5, color=colour, alpha=0.8)


def prefill_figure(comparison: Comparison) -> Figure | None:
    """Speed over dense against prompt length: medians with their range, beside the limits set by active heads."""
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
    limits: dict[float, list[str]] = {}
    for arm, limit in ((comparison.get("prefill") or {}).get("limit") or {}).items():
        if arm in {row.arm for row in rows}:
            limits.setdefault(round(limit, 3), []).append(arm)
    for limit, arms in limits.items():
        colour = ARM_COLOURS[arms[0]] if len(arms) == 1 else FAINT
        axes.axhline(limit, color=colour, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
        axes.annotate(f"limit {text.times(limit)} ({', '.join(arms)})", (0.11, limit), (0, 3), fontsize=8.5,
                      xycoords=("axes fraction", "data"), textcoords="offset points", color=colour)  # fmt: skip
    axes.set_xticks(lengths, [text.length_name(length) for length in lengths])
    axes.minorticks_off()
    axes.margins(x=0.1, y=0.1)
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel(f"prefill speed ({text.TIMES} dense)")
    figure.legend(**LEGEND)
    return figure


def _draw_speedups(axes: Axes, arm: str, speedups: Mapping[float, Speedup]) -> None:
    medians = [speed.median for speed in speedups.values()]
    below = [speed.median - speed.low for speed in speedups.values()]
    above = [speed.high - speed.median for speed in speedups.values()]
    axes.errorbar(list(speedups), medians, yerr=[below, above], color=ARM_COLOURS[arm], marker=MARKERS[arm],
                  markersize=5, capsize=2.5, linewidth=1.6, elinewidth=1, label=arm,
                  zorder=4 if arm == "gqe" else 3)  # fmt: skip


def load_figure(routing: Mapping[str, Any]) -> Figure:
    """Bars of the tokens that woke each expert: a row a layer, a cell a group, beside the line of even load."""
    load = routing["load"]
    layers, groups, experts = len(load), len(load[0]), len(load[0][0])
    active = max(1, round(sum(load[0][0])))
    tallest = max(active / experts, *(value for layer in load for group in layer for value in group))
    figure = new_figure(0.5 + 0.5 * layers, WIDTH if groups * experts > WIDE_LOAD else NARROW)
    axes = figure.add_subplot()
    tidy(axes, grid=None)
    pitch, floors = experts + 1, [ROW * (layers - 1 - layer) for layer in range(layers)]
    for expert in range(experts):
        bars = [
            (group * pitch + expert, floors[layer], load[layer][group][expert] / tallest)
            for layer in range(layers)
            for group in range(groups)
        ]
        _draw_bars(axes, bars, EXPERT_COLOURS[expert % len(EXPERT_COLOURS)])
    for layer, floor in enumerate(floors):
        for group in range(groups):
            left, even = group * pitch - 0.5, floor + active / experts / tallest
            axes.plot([left, left + experts], [floor, floor], color=FAINT, linewidth=0.6)
            axes.plot([left, left + experts], [even, even], color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
            _annotate_cell(axes, routing, layer, group, (group * pitch, floor))
    middles = [group * pitch + (experts - 1) / 2 for group in range(groups)]
    axes.set_yticks([floor + 0.5 for floor in floors], [f"layer {i}" for i in range(layers)])
    axes.set_xticks(middles, [f"group {i}" for i in range(groups)])
    axes.tick_params(length=0, labelsize=9 if groups <= 6 else 7)
    axes.xaxis.tick_top()
    axes.set_xlim(-0.9, groups * pitch - 0.9)
    axes.set_ylim(-0.5, ROW * (layers - 1) + 1.05)
    axes.spines[:].set_visible(False)
    return figure


def _draw_bars(axes: Axes, bars: Sequence[tuple[float, float, float]], colour: str) -> None:
    """All bars (x, floor, height) of one colour as a single path, which keeps the page small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    boxes = [[(x - 0.42, y), (x - 0.42, y + h), (x + 0.42, y + h), (x + 0.42, y), (x - 0.42, y)] for x, y, h in bars]
    paths = [Path(box, closed=True) for box in boxes]
    axes.add_patch(PathPatch(Path.make_compound_path(*paths), facecolor=colour, linewidth=0))


def _annotate_cell(axes: Axes, routing: Mapping[str, Any], layer: int, group: int, corner: tuple[float, float]) -> None:
    """Crosses for dead experts and, where there is room, the router's entropy under the cell."""
    load, entropy, (x, floor) = routing["load"], routing["entropy"], corner
    values = load[layer][group]
    for expert, value in enumerate(values):
        if value < routing["dead_below"]:
            axes.plot([x + expert], [floor + 0.16], marker="x", markersize=4.5, markeredgewidth=1.4, color=DEAD)
    if len(load[layer]) <= 8:
        middle = x + (len(values) - 1) / 2
        axes.text(middle, floor - 0.08, text.fixed(entropy[layer][group], 2), ha="center", va="top", fontsize=7,
                  color=FAINT)  # fmt: skip
