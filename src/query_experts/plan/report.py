"""Shows a plan: a table of the arms, a table of predicted speed, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from query_experts.common import formatting as text
from query_experts.plan.gpus import USABLE
from query_experts.plan.lengths import KINDS, LENGTHS, WORTHWHILE
from query_experts.plan.memory import PARTS
from query_experts.plan.numbers import GIB, ArmPlan, Plan
from query_experts.plan.settings import PlanSettings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

PART_COLOURS = dict(zip(PARTS, ("#0067b0", "#c66a9e", "#7d8590", "#d98c00", "#008f6b"), strict=True))


def print_plan(settings: PlanSettings, plan: Plan, console: Console) -> None:
    console.print(header(settings, plan), style="bold")
    console.print()
    _print(arm_rows(settings, plan), console)
    if plan.speeds:
        _print(speed_rows(plan), console)
    console.print(notes(settings, plan), style="italic dim")


def header(settings: PlanSettings, plan: Plan) -> str:
    """The GPUs, the layout and the run in a sentence each."""
    gpu = settings.machine
    copies = settings.gpus // settings.shards
    layout = f"the model sharded over {settings.shards}" if settings.shards > 1 else "a whole model on each"
    if copies > 1 and settings.shards > 1:
        layout += f", in {copies} copies"
    return (
        f"{settings.gpus} {text.TIMES} {settings.gpu}, {gpu.memory:g} GiB and {gpu.tflops:g} TFLOP/s each; {layout}. "
        f"{text.plural(settings.steps, 'step')} of {text.plural(plan.sequences_per_step, 'sequence')} of "
        f"{settings.seq_len:,} tokens: {text.short(plan.tokens)} tokens."
    )


def arm_rows(settings: PlanSettings, plan: Plan) -> list[list[str]]:
    """Rows of text, a column for each arm; the first is the heading."""
    arms = plan.arms
    basis = "measured" if plan.measured else "assumed"
    cells = {
        "": [arm.arm for arm in arms],
        "parameters": [text.short(arm.parameters) for arm in arms],
        "active parameters": [text.short(arm.active_parameters) for arm in arms],
        "FLOPs a token, forward and backward": [text.short(arm.flops_per_token) for arm in arms],
        "FLOPs of the run": [f"{arm.run_flops:.3g}" for arm in arms],
        f"GiB of one GPU, micro-batch of {settings.batch_size}": [""] * len(arms),
        **{f"  {part}": [gib(arm.memory[part]) for arm in arms] for part in PARTS},
        "  total": [gib(arm.total) for arm in arms],
        "  total with checkpointing": [gib(arm.memory_checkpointed) for arm in arms],
        f"fits into {plan.room / GIB:.1f} GiB": [fits(arm, plan.room) for arm in arms],
        "largest micro-batch that fits": [largest(arm.largest_batch) for arm in arms],
        "  with checkpointing": [largest(arm.largest_batch_checkpointed) for arm in arms],
        f"tokens/s of one GPU, {basis}": [text.whole(arm.tokens_per_s) for arm in arms],
        f"  MFU{'' if plan.measured else ', assumed'}": [share(arm.mfu) for arm in arms],
        f"hours on {text.plural(settings.gpus, 'GPU')}": [three_digits(arm.hours) for arm in arms],
        "dollars": [three_digits(arm.cost) for arm in arms],
    }
    return [[name, *row] for name, row in cells.items()]


def gib(value: float) -> str:
    return f"{value / GIB:.3g}"


def share(value: float | None) -> str:
    return text.MISSING if value is None else f"{value:.1%}"


def three_digits(value: float | None) -> str:
    """1,234, 12.3, 0.0123."""
    if value is None:
        return text.MISSING
    return text.whole(value) if value >= 100 else f"{value:.3g}"


def largest(batch: int) -> str:
    return f"{batch:,}" if batch else "none fits"


def fits(arm: ArmPlan, room: float) -> str:
    if arm.total <= room:
        return "yes"
    return "with checkpointing" if arm.memory_checkpointed <= room else "no"


def speed_rows(plan: Plan) -> list[list[str]]:
    """Predicted speed of each arm over dense, and the length from which it is worthwhile."""
    shown = [2048, 8192, 32768, 131072]
    rows = [[f"predicted {text.TIMES} dense", "", *map(text.length_name, shown), f"{WORTHWHILE:g}{text.TIMES} from"]]
    for kind in KINDS:
        for speed in (speed for speed in plan.speeds if speed.kind == kind):
            cells = [text.times(speed.by_length[LENGTHS.index(length)]) for length in shown]
            start = "never" if speed.pays_from is None else text.length_name(speed.pays_from)
            rows.append([kind, speed.arm, *cells, start])
    return rows


def notes(settings: PlanSettings, plan: Plan) -> str:
    """What is assumed and what is predicted."""
    lines = [
        f"Memory is tracked on fake tensors at micro-batches of {settings.batch_size} and {2 * settings.batch_size} "
        "sequences, and linear in between and beyond. Its parts are those of the moment that needs most; gradients of "
        f"a micro-batch come later. {USABLE:.0%} of a GPU's memory counts as usable, which is assumed.",
    ]
    if settings.dtype == "float32" and not plan.measured:
        lines.append("No speed is assumed for float32, which dtype is; --tokens_per_s gives it.")
    elif not plan.measured:
        lines.append(
            f"The time assumes an MFU of {settings.mfu:.0%} for every arm; it is not a measurement. --tokens_per_s "
            "takes those of a short run."
        )
    if plan.speeds:
        lines.append(
            "Predicted speeds are those of whole models at a length in tokens; they count FLOPs, and in decoding, with "
            "batch 1, bytes. Short calls are slower, where launching kernels takes the time."
        )
    return " ".join(lines)


def _print(rows: list[list[str]], console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for position, heading in enumerate(rows[0]):
        table.add_column(heading, justify="left" if position == 0 else "right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def write_plot(plan: Plan, folder: Path) -> list[Path]:
    """Draws the memory of one GPU by part, and the predicted speed over dense by length. Returns an SVG and a PNG."""
    from query_experts.common.plots import new_figure, save

    kinds = list(KINDS) if plan.speeds else []
    figure = new_figure(5.6 if kinds else 2.9, 7.4 if kinds else 3.9)
    memory, *others = figure.subplots(2, 2).flatten() if kinds else [figure.subplots()]
    draw_memory(memory, plan)
    top = max((max(speed.by_length) for speed in plan.speeds), default=1.0)
    for axes, kind in zip(others, kinds, strict=True):
        draw_speed(axes, plan, kind)
        axes.set_ylim(0.95, top + 0.05)
    return save(figure, folder, "plan")


def draw_memory(axes: Axes, plan: Plan) -> None:
    """A bar for each arm, in parts; a mark at the total with checkpointing, and a line at what is usable."""
    from query_experts.common.plots import INK, tidy

    places = range(len(plan.arms))
    below = [0.0] * len(plan.arms)
    for part in PARTS:
        heights = [arm.memory[part] / GIB for arm in plan.arms]
        axes.bar(places, heights, 0.6, bottom=below, color=PART_COLOURS[part], label=part)
        below = [base + height for base, height in zip(below, heights, strict=True)]
    checkpointed = [arm.memory_checkpointed / GIB for arm in plan.arms]
    axes.plot(places, checkpointed, linestyle="none", marker="_", markersize=26, color=INK, label="with checkpointing")
    axes.axhline(plan.room / GIB, color=INK, linewidth=0.8, linestyle="dashed", label="usable")
    axes.set_ylim(0, 1.6 * max(plan.room / GIB, *below))
    axes.set_xticks(places, [arm.arm for arm in plan.arms])
    axes.set_ylabel("GiB of one GPU")
    axes.set_title("memory", fontsize=9.5, loc="left")
    tidy(axes, grid="y")
    axes.legend(fontsize=7.5, frameon=False, ncols=2, loc="upper left", markerscale=0.5)


def draw_speed(axes: Axes, plan: Plan, kind: str) -> None:
    from query_experts.common.plots import ARM_COLOURS, MARKERS, tidy

    axes.axhline(1, color="#9aa4b0", linewidth=0.8)
    axes.set_xscale("log", base=2)
    for speed in (speed for speed in plan.speeds if speed.kind == kind):
        colour = ARM_COLOURS[speed.arm]
        axes.plot(
            LENGTHS, speed.by_length, "--", marker=MARKERS[speed.arm], markersize=4, label=speed.arm, color=colour
        )
    shown = LENGTHS[::3]
    axes.set_xticks(shown, [text.length_name(length) for length in shown])
    axes.minorticks_off()
    axes.set_xlabel("cached tokens" if kind == "decoding" else "tokens")
    axes.set_ylabel(f"predicted speed ({text.TIMES} dense)")
    axes.set_title(kind, fontsize=9.5, loc="left")
    tidy(axes)
    axes.legend(fontsize=8, frameon=False)
