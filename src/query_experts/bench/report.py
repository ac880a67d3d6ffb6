"""Owns how a benchmark is shown: a table for each suite, and one plot of measured beside predicted speed."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from query_experts.bench.settings import SUITES
from query_experts.common import formatting as text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

LAYER = "layer"


def speedup(point: dict[str, Any], arm: str) -> tuple[float, float, float]:
    """Median, lowest and highest ratio of dense's seconds to the arm's, timing by timing."""
    ratios = [dense / ours for dense, ours in zip(point["seconds"]["dense"], point["seconds"][arm], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def where(point: dict[str, Any]) -> str:
    """The point's place in its suite: its length and, in decoding, how many sequences of it, and the cache."""
    place = text.length_name(point["length"])
    return f"{point['batch']} {text.TIMES} {place}, {point['cache']}" if point["suite"] == "decode" else place


def print_tables(result: dict[str, Any], console: Console) -> None:
    """A table for each suite: speed against dense, what costs.py predicts, the share of it attained, peak memory."""
    for suite, about in SUITES.items():
        points = [point for point in result["points"] if point["suite"] == suite]
        if points:
            _print(_parts_table(points) if suite == "parts" else _speed_table(points), f"{suite}: {about}", console)
            console.print()
    console.print(
        "speed: against dense, the median of repeats and their range; predicted: by costs.py, from bytes in decoding "
        "and FLOPs elsewhere; share: speed over predicted; peak: bytes of tensors that a call holds at most.",
        style="italic dim",
    )


def _print(rows: list[list[str]], title: str, console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        collapse_padding=True,
    )
    for position, heading in enumerate(rows[0]):
        table.add_column(heading, justify="left" if position == 0 else "right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def _speed_table(points: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of text; the first is the heading."""
    rows = [["tokens", "arm", "time", "speed", "predicted", "share", "peak"]]
    for point in points:
        for arm, seconds in point["seconds"].items():
            peak = point["peak_bytes"][arm]
            row = [where(point) if arm == "dense" else "", arm, text.duration(statistics.median(seconds))]
            if arm == "dense":
                row += [text.MISSING] * 3
            else:
                median, low, high = speedup(point, arm)
                predicted = point["predicted"][arm]
                row += [f"{text.times(median)}\n{low:.2f} to {high:.2f}", text.times(predicted)]
                row += [f"{median / predicted:.0%}"]
            rows.append([*row, f"{text.short(peak)}B"])
    return rows


def _parts_table(points: list[dict[str, Any]]) -> list[list[str]]:
    """Median time of each stage and its share of the whole layer, a column for each length."""
    rows = [["stage", *(f"{text.length_name(point['length'])} tokens" for point in points)]]
    for stage in points[0]["seconds"]:
        cells = []
        for point in points:
            median = statistics.median(point["seconds"][stage])
            whole = statistics.median(point["seconds"][LAYER])
            cells.append(f"{text.duration(median)}\n{median / whole:.1%}")
        rows.append([stage, *cells])
    return rows


def write_plot(result: dict[str, Any], folder: Path, name: str = "bench") -> list[Path]:
    """Speed against dense by length: measured with its spread, and predicted dashed; one panel a suite."""
    from query_experts.common.plots import new_figure, save

    lines: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for point in result["points"]:
        if point["suite"] != "parts":
            title = point["suite"]
            if title == "decode":
                title = f"decode, {point['cache']} cache, batch {point['batch']}"
            for arm in point["seconds"]:
                if arm != "dense":
                    lines.setdefault(title, {}).setdefault(arm, []).append(point)
    if not lines:
        return []
    columns = min(3, len(lines))
    rows = -(-len(lines) // columns)
    figure = new_figure(2.6 * rows + 0.5, 3.4 * columns)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes in panels[len(lines) :]:
        axes.set_axis_off()
    for number, (axes, (title, arms)) in enumerate(zip(panels, lines.items(), strict=False)):
        axes.set_title(title, fontsize=9.5, loc="left")
        axes.axhline(1, color="#9aa4b0", linewidth=0.8)
        axes.set_xscale("log", base=2)
        for arm, points in arms.items():
            lengths = [point["length"] for point in points]
            _draw(axes, arm, lengths, points)
        axes.set_xticks(lengths, [text.length_name(length) for length in lengths], fontsize=8)
        axes.minorticks_off()
        axes.tick_params(labelsize=8)
        axes.set_xlabel("cached tokens" if title.startswith("decode") else "tokens", fontsize=8.5)
        if number % columns == 0:
            axes.set_ylabel("speed (\N{MULTIPLICATION SIGN} dense); dashed: predicted", fontsize=8.5)
    handles, labels = panels[0].get_legend_handles_labels()
    if len(lines) < len(panels):  # in the first empty cell
        panels[len(lines)].legend(handles, labels, loc="center", frameon=False, fontsize=9)
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return save(figure, folder, name)


def _draw(axes: Axes, arm: str, lengths: list[int], points: list[dict[str, Any]]) -> None:
    from query_experts.common.plots import ARM_COLOURS, MARKERS

    look: dict[str, Any] = {"color": ARM_COLOURS[arm]}
    speeds = [speedup(point, arm) for point in points]
    middle = [median for median, _, _ in speeds]
    spread = [[median - low for median, low, _ in speeds], [high - median for median, _, high in speeds]]
    axes.errorbar(
        lengths, middle, yerr=spread, marker=MARKERS[arm], markersize=4, capsize=2, linewidth=1.4, label=arm, **look
    )
    axes.plot(lengths, [point["predicted"][arm] for point in points], linestyle="dashed", linewidth=0.9, **look)
