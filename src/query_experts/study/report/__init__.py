"""Owns the report of a comparison: tables in the terminal, one self-contained page, and the plots of the README.

    comparison.json -> rows -> tables, verdict, charts -> terminal, report.html, loss.svg, prefill.svg

The page needs no network and no other file. It is rendered from `comparison` alone, so the same comparison gives the
same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from query_experts.common import formatting as text
from query_experts.common.errors import SettingError
from query_experts.common.files import write_text
from query_experts.common.plots import save
from query_experts.model.arms import ARMS
from query_experts.study.report.charts import (
    EXPERT_COLOURS,
    WIDE_LOAD,
    difference_figure,
    load_figure,
    loss_figure,
    prefill_figure,
)
from query_experts.study.report.machines import trained_on
from query_experts.study.report.rows import (
    Comparison,
    Row,
    Run,
    Speedup,
    completed_runs,
    missing_parts,
    runs_by_arm,
    seeds_of,
    summary_rows,
)
from query_experts.study.report.svg import colour_variable, inline_svg
from query_experts.study.report.tables import tables
from query_experts.study.report.verdict import verdict, verdict_by_topic
from query_experts.study.statistics import PairedDifference

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "PairedDifference", "Row", "Speedup", "missing_parts", "print_summary", "summary_rows", "verdict", "write_plots",
    "write_report",
]  # fmt: skip


def print_summary(comparison: Comparison, console: Console) -> None:
    """Print the tables, the verdict and what is missing; fits 80 columns, where seeds wrap below one another."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    for table in tables(comparison):
        drawn = RichTable(
            title=table.title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False
        )
        for position, heading in enumerate(table.head):
            drawn.add_column(heading, justify="left" if position == 0 else "right", no_wrap=position == 0)
        for cells in table.body:
            style = "bold" if cells[0] == "gqe" else None
            drawn.add_row(*(Text(cell) for cell in cells), style=style)
        console.print(drawn)
        console.print(Text(table.note, style="italic dim"))
        console.print()
    for line in missing_parts(comparison):
        console.print(Text(f"Missing: {line}", style="yellow"))
    for sentence in verdict(comparison):
        console.print(Text(f"- {sentence}"))


def write_plots(comparison: Comparison, folder: Path) -> list[Path]:
    """Write loss.svg, loss.png, prefill.svg and prefill.png, each where there is something to draw."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"loss": loss_figure(runs_by_arm(comparison)), "prefill": prefill_figure(comparison)}
    return [path for name, figure in figures.items() if figure is not None for path in save(figure, folder, name)]


def write_report(comparison: Comparison, path: Path) -> Path:
    """Write the page, one HTML file that needs nothing else, and return its path."""
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise SettingError("the report needs jinja2: pip install query-experts[study]") from error
    source = resources.files("query_experts.study").joinpath("templates", "report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(source).render(_page(comparison))
    path = Path(path)
    write_text(path, page)
    return path


def _page(comparison: Comparison) -> dict[str, Any]:
    """Everything that the template shows."""
    by_arm, rows = runs_by_arm(comparison), summary_rows(comparison)
    return {
        "intro": _intro(comparison),
        "verdict": verdict_by_topic(comparison),
        "missing": missing_parts(comparison),
        "tables": tables(comparison),
        "arms": [{"name": arm, "what": ARMS[arm], "colour": colour_variable(arm)} for arm in by_arm],
        "colours": {arm: colour_variable(arm) for arm in by_arm},
        "charts": _charts(comparison),
        "loads": [entry for arm, runs in by_arm.items() if (entry := _load(arm, runs))],
        "passages": _passages(by_arm),
        "expert_colours": EXPERT_COLOURS,
        "has_interval": any(pair.low is not None for row in rows for pair in row.versus.values() if pair),
        "settings": _flat(comparison.get("settings")),
        "data": _flat(comparison.get("data")),
        "environment": _flat(comparison.get("environment")),
        "trained_on": trained_on(comparison),
    }


def _intro(comparison: Comparison) -> str:
    """What was compared, in numbers."""
    settings = comparison.get("settings") or {}
    arms, seeds = len(runs_by_arm(comparison)), len(seeds_of(comparison))
    line = f"This page sets {text.plural(arms, 'arm')} side by side over {text.plural(seeds, 'seed')}"
    tokens = max((run["train_tokens"] for run in completed_runs(comparison)), default=None)
    if tokens:
        line += f", trained on the same {text.short(tokens)} tokens in the same order"
    heads, groups = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    active = settings.get("active_query_experts")
    if heads and groups and active:
        line += (
            f". In gqe, {heads} query heads stand in {groups} groups of {heads // groups}; each token wakes "
            f"{active} in every group"
        )
    return line + "."


def _charts(comparison: Comparison) -> dict[str, str | None]:
    drawings = {
        "loss": (
            loss_figure(runs_by_arm(comparison)),
            "Language-model loss against training tokens",
            "A line for each arm and seed: smoothed training loss, with validation loss as points.",
        ),
        "differences": (
            difference_figure(comparison),
            "Validation loss of each arm, less that of the baseline with the same seed",
            "A dot for each seed, a tick at the mean and, from three seeds on, the 95% interval. Table Quality has "
            "the numbers.",
        ),
        "prefill": (
            prefill_figure(comparison),
            "Prefill speed against dense, by prompt length",
            "Medians with the range of repeats; dashed lines are limits by active heads. The table has the numbers.",
        ),
    }
    return {
        name: inline_svg(figure, f"chart-{name}", title, description) if figure is not None else None
        for name, (figure, title, description) in drawings.items()
    }


def _load(arm: str, runs: list[Run]) -> dict[str, Any] | None:
    """The load chart of an arm's first routed run, and a line about each of its seeds."""
    routed = [run for run in runs if run["routing"]]
    if not routed:
        return None
    routing = routed[0]["routing"]
    experts = len(routing["load"][0][0])
    title = f"Load of each expert in {arm}, seed {routed[0]['seed']}"
    about = f"A row for each layer, a cell for each group, {experts} bars a cell. The numbers follow below the chart."
    return {
        "arm": arm,
        "colour": colour_variable(arm),
        "seed": routed[0]["seed"],
        "svg": inline_svg(load_figure(routing), f"load-{arm}", title, about),
        "experts": experts,
        "tallest": max(value for layer in routing["load"] for group in layer for value in group),
        "wide": len(routing["load"][0]) * experts > WIDE_LOAD,
        "seeds": [_routing_line(run) for run in routed],
        "load": routing["load"],
        "entropy": routing["entropy"],
    }


def _routing_line(run: Run) -> str:
    """Seed, share of experts that are dead, and mean entropy, as a sentence."""
    routing = run["routing"]
    total = sum(len(group) for layer in routing["load"] for group in layer)
    values = [value for layer in routing["entropy"] for value in layer]
    entropy = sum(values) / len(values)
    return f"seed {run['seed']}: {routing['dead']} of {total} experts dead, mean router entropy {entropy:.2f}"


def _passages(by_arm: Mapping[str, list[Run]]) -> list[dict[str, Any]]:
    """One passage for each routed arm that has one, gqe first."""
    found = []
    for arm in sorted(by_arm, key=lambda name: name != "gqe"):
        run = next((run for run in by_arm[arm] if run["passage"]), None)
        if run is not None:
            count = len(run["routing"]["load"][0][0])
            found.append({"arm": arm, "seed": run["seed"], "count": count, **run["passage"]})
    return found


def _flat(values: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Settings as (name, text) pairs."""
    return [(name.replace("_", " "), _value(value)) for name, value in (values or {}).items()]


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: text.MISSING}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value) or text.MISSING
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_value(item)}" for name, item in value.items()) or text.MISSING
    return str(value)
