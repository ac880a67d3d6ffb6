"""Shows a benchmark: a table for each suite, and a plot of measured and predicted speed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from query_experts.bench.results import LAYER, STOCK, BenchResult, PartsResult, Point, PointResult, Spread
from query_experts.bench.settings import BASELINE, FUSED_BASELINE, SUITES
from query_experts.common import formatting as text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

Lines = dict[str, list[PointResult]]  # by arm
NOTE = (
    f"{text.TIMES} dense: speed relative to stock Llama, the median of the repeats and their range; predicted: the "
    "same by costs.py, from bytes in decoding and from FLOPs elsewhere, and the share of it that was attained; peak: "
    "the most memory that the tensors of one call take."
)
FUSED_NOTE = (
    f"{text.TIMES} fused: speed relative to dense-fused, dense attention by the kernels that gqe runs, which only "
    "triton fuses."
)


def place_of(point: Point) -> str:
    """The length of a point, with the batch if it isn't 1; in decoding always with the batch and the cache."""
    length = text.length_name(point.length)
    batches = f"{point.batch}{text.TIMES}{length}"
    if point.suite == "decode":
        return f"{batches}, {point.cache}"
    return batches if point.batch > 1 else length


def print_tables(result: BenchResult, console: Console) -> None:
    """Prints how all arms ran, and a table for each suite: speed over dense and dense-fused, prediction, memory."""
    console.print(header(result), style="bold")
    console.print()
    for suite, about in SUITES.items():
        if points := result.speed_points(suite):
            _print(_speed_table(points), f"{suite}: {about}", console)
        elif suite == "parts" and (stages := result.parts_points()):
            _print(_parts_table(stages), f"{suite}: {about}", console)
    fused = any(FUSED_BASELINE in point.seconds for point in result.speed_points())
    console.print(" ".join([NOTE, *([FUSED_NOTE] if fused else [])]), style="italic dim")


def header(result: BenchResult) -> str:
    """What all arms have in common, and the kernels of each: "All arms: sdpa (flash), CUDA graphs, bfloat16, ..."."""
    settings = result.settings
    backend = settings.attn_implementation
    if settings.sdpa_backend is not None:
        backend += f" ({settings.sdpa_backend})"
    mode = " in ".join([*(["compiled"] if settings.compile else []), *(["CUDA graphs"] if settings.cuda_graph else [])])
    line = f"All arms: {backend}, {mode or 'eager calls'}, {settings.dtype}, on {result.environment.hardware}."
    if result.kernels is None:
        return line
    by_kind = {kind: [arm for arm, own in result.kernels.items() if own == kind] for kind in result.kernels.values()}
    named = {kind: ", ".join(arms) for kind, arms in by_kind.items()}
    chosen = "; ".join(f"{kind} for {arms}" for kind, arms in named.items() if kind != STOCK)
    line += f" Stock Llama: {named[STOCK]}."
    if chosen:
        line += f" Kernels: {'auto, which is ' if settings.kernels == 'auto' else ''}{chosen}."
    if "triton" in named and result.environment.device == "cpu":
        line += " Triton interprets its kernels on a CPU, so their times mean nothing."
    return line


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
    console.print()


def _speed_table(points: list[PointResult]) -> list[list[str]]:
    """Rows of text; the first is the heading."""
    fused = any(FUSED_BASELINE in point.seconds for point in points)
    over_fused = [f"{text.TIMES} fused"] if fused else []
    rows = [["tokens", "arm", "time", f"{text.TIMES} dense", *over_fused, "predicted", "peak"]]
    for point in points:
        for arm, seconds in point.seconds.items():
            place = place_of(point) if arm == BASELINE else ""
            peak = f"{text.short(point.peak_bytes[arm])}B"
            against = [_with_range(point.speedup_over_fused(arm))] if fused else []
            speed, predicted = _speed_cells(point, arm)
            rows.append([place, arm, text.duration(statistics.median(seconds)), speed, *against, predicted, peak])
    return rows


def _speed_cells(point: PointResult, arm: str) -> tuple[str, str]:
    """Speed over dense; as it was predicted, with the share attained."""
    if arm == BASELINE:
        return text.MISSING, text.MISSING
    speed, predicted = point.speedup(arm), point.predicted[arm]
    return _with_range(speed), f"{text.times(predicted)}\n{speed.median / predicted:.0%}"


def _with_range(speed: Spread | None) -> str:
    if speed is None:
        return text.MISSING
    return f"{text.times(speed.median)}\n{speed.low:.2f}{text.DASH}{speed.high:.2f}"


def _parts_table(points: list[PartsResult]) -> list[list[str]]:
    """Median time of each stage and its share of the whole layer, a column for each length."""
    rows = [["stage", *(f"{text.length_name(point.length)} tokens" for point in points)]]
    for stage in points[0].seconds:
        cells = []
        for point in points:
            median, whole = (statistics.median(point.seconds[name]) for name in (stage, LAYER))
            cells.append(f"{text.duration(median)}\n{median / whole:.1%}")
        rows.append([stage, *cells])
    return rows


def write_plot(points: Sequence[PointResult], folder: Path, name: str = "bench") -> list[Path]:
    """Draws speed relative to dense by length, a panel for each suite; predicted speed is dashed.

    Speed relative to dense-fused, where it was timed, is dotted.

    Returns:
        The files: an SVG and a PNG; none without points.
    """
    from query_experts.common.plots import new_figure, save

    panels = _panels(points)
    if not panels:
        return []
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(2.6 * rows + 0.5, 3.4 * columns)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for number, (axes, (title, lines)) in enumerate(zip(grid, panels.items(), strict=False)):
        _draw_panel(axes, title, lines)
        if number % columns == 0:
            axes.set_ylabel(f"speed ({text.TIMES} dense); dashed: predicted", fontsize=8.5)
    handles, labels = grid[0].get_legend_handles_labels()
    if len(panels) < len(grid):  # in the first empty cell
        grid[len(panels)].legend(handles, labels, loc="center", frameon=False, fontsize=9)
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return save(figure, folder, name)


def _panels(points: Sequence[PointResult]) -> dict[str, Lines]:
    """The lines of each panel by its title."""
    panels: dict[str, Lines] = {}
    for point in points:
        title = point.suite
        if title == "decode":
            title = f"decode, {point.cache} cache, batch {point.batch}"
        for arm in point.seconds:
            if arm != BASELINE:
                panels.setdefault(title, {}).setdefault(arm, []).append(point)
    return panels


def _draw_panel(axes: Axes, title: str, lines: Lines) -> None:
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.axhline(1, color="#9aa4b0", linewidth=0.8)
    axes.set_xscale("log", base=2)
    lengths: list[int] = []
    for arm, points in lines.items():
        lengths = [point.length for point in points]
        _draw_line(axes, arm, lengths, points)
    axes.set_xticks(lengths, [text.length_name(length) for length in lengths], fontsize=8)
    axes.minorticks_off()
    axes.tick_params(labelsize=8)
    axes.set_xlabel("cached tokens" if title.startswith("decode") else "tokens", fontsize=8.5)


def _draw_line(axes: Axes, arm: str, lengths: list[int], points: list[PointResult]) -> None:
    from query_experts.common.plots import ARM_COLOURS, MARKERS

    speeds = [point.speedup(arm) for point in points]
    medians = [speed.median for speed in speeds]
    spread = [[speed.median - speed.low for speed in speeds], [speed.high - speed.median for speed in speeds]]
    colour = ARM_COLOURS[arm]
    axes.errorbar(
        lengths, medians, yerr=spread, marker=MARKERS[arm], markersize=4, capsize=2, linewidth=1.4, label=arm,
        color=colour,
    )  # fmt: skip
    axes.plot(lengths, [point.predicted[arm] for point in points], linestyle="dashed", linewidth=0.9, color=colour)
    over_fused = [speed.median for point in points if (speed := point.speedup_over_fused(arm)) is not None]
    if len(over_fused) == len(points):
        axes.plot(
            lengths, over_fused, linestyle="dotted", linewidth=1.4, marker=MARKERS[arm], markersize=4,
            fillstyle="none", label=f"{arm} over {FUSED_BASELINE}", color=colour,
        )  # fmt: skip
