"""Collects what the page of a comparison shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from query_experts.common import formatting as text
from query_experts.model.arms import ARMS
from query_experts.study.report.charts import (
    EXPERT_COLOURS,
    WIDE_LOAD,
    difference_figure,
    load_figure,
    loss_figure,
    prefill_figure,
)
from query_experts.study.report.findings import limits
from query_experts.study.report.machines import trained_on
from query_experts.study.report.routing_chart import routing_figure
from query_experts.study.report.rows import completed_runs, missing_parts, runs_by_arm, seeds_of, summary_rows
from query_experts.study.report.svg import colour_variable, inline_svg
from query_experts.study.report.table import Table
from query_experts.study.report.tables import findings_table, tables
from query_experts.study.results import Comparison, RoutingLoad, RunResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Facts = list[tuple[str, str]]  # name, value


@dataclass(frozen=True)
class Overview:
    """What is compared. The sizes are those of gqe; None where the settings aren't recorded."""

    arms: str
    seeds: str
    tokens: str | None
    heads: int | None
    groups: int | None
    top_k: int | None


@dataclass(frozen=True)
class Arm:
    name: str
    description: str
    colour: str


@dataclass(frozen=True)
class LoadChart:
    """The load chart of one run, and the routing that it shows."""

    arm: str
    colour: str
    seed: int
    svg: str
    wide: bool
    routing: RoutingLoad


@dataclass(frozen=True)
class PassageView:
    """The passage of one run; `count` is the number of experts in a group."""

    arm: str
    seed: int
    count: int
    tokens: list[str]
    experts: list[list[list[int]]]


@dataclass(frozen=True)
class Charts:
    """Charts as SVG; None where there is nothing to draw."""

    loss: str | None
    differences: str | None
    prefill: str | None
    routing: str | None


@dataclass(frozen=True)
class Page:
    """Everything that the template shows."""

    overview: Overview
    findings: Table
    limits: list[str]
    missing: list[str]
    tables: list[Table]
    arms: list[Arm]
    colours: dict[str, str]
    charts: Charts
    has_interval: bool
    loads: list[LoadChart]
    passages: list[PassageView]
    passages_json: list[dict[str, Any]]
    expert_colours: Sequence[str]
    facts: dict[str, Facts]
    trained_on: list[str]


def page_of(comparison: Comparison) -> Page:
    by_arm, rows = runs_by_arm(comparison), summary_rows(comparison)
    passages = _passages(by_arm)
    return Page(
        overview=_overview(comparison),
        findings=findings_table(comparison),
        limits=limits(comparison),
        missing=missing_parts(comparison),
        tables=tables(comparison),
        arms=[Arm(arm, ARMS[arm], colour_variable(arm)) for arm in by_arm],
        colours={arm: colour_variable(arm) for arm in by_arm},
        charts=_charts(comparison),
        has_interval=any(pair.low is not None for row in rows for pair in row.versus.values() if pair),
        loads=[chart for arm, runs in by_arm.items() if (chart := _load_chart(arm, runs))],
        passages=passages,
        passages_json=[dataclasses.asdict(passage) for passage in passages],
        expert_colours=EXPERT_COLOURS,
        facts={
            "Settings": _facts(comparison.settings),
            "Data": _facts(comparison.data),
            "Environment": _facts(comparison.environment),
        },
        trained_on=trained_on(comparison),
    )


def _overview(comparison: Comparison) -> Overview:
    settings = comparison.settings
    tokens = max((run.train_tokens for run in completed_runs(comparison)), default=0)
    return Overview(
        arms=text.plural(len(runs_by_arm(comparison)), "arm"),
        seeds=text.plural(len(seeds_of(comparison)), "seed"),
        tokens=text.short(tokens) if tokens else None,
        heads=settings.num_attention_heads if settings is not None else None,
        groups=settings.num_key_value_heads if settings is not None else None,
        top_k=settings.active_query_experts if settings is not None else None,
    )


def _charts(comparison: Comparison) -> Charts:
    return Charts(
        loss=_inline(
            loss_figure(runs_by_arm(comparison)),
            "loss",
            "Language-model loss by training tokens",
            "A line for each arm and seed: smoothed training loss, with validation loss as points.",
        ),
        differences=_inline(
            difference_figure(comparison),
            "differences",
            "Validation loss of each arm minus that of the baseline with the same seed",
            "A dot for each seed, a tick at the mean and, from three seeds on, the 95% interval. Table Quality has "
            "the numbers.",
        ),
        prefill=_inline(
            prefill_figure(comparison),
            "prefill",
            "Prefill speed relative to dense, by prompt length",
            "Medians with the range of repeats; dashed lines are limits by active heads. The table has the numbers.",
        ),
        routing=_inline(
            routing_figure(runs_by_arm(comparison)),
            "routing",
            "Routing over training, by training tokens",
            "A line for each arm and seed: mean entropy of the routers, the largest share of tokens that select one "
            "expert, and the number of dead experts.",
        ),
    )


def _inline(figure: Figure | None, name: str, title: str, description: str) -> str | None:
    return inline_svg(figure, f"chart-{name}", title, description) if figure is not None else None


def _load_chart(arm: str, runs: list[RunResult]) -> LoadChart | None:
    """The load chart of an arm's first routed run."""
    run = next((run for run in runs if run.routing is not None), None)
    if run is None or run.routing is None:
        return None
    experts = run.routing.experts_per_group
    title = f"Load of each expert in {arm}, seed {run.seed}"
    about = f"A row for each layer, a cell for each group, {experts} bars a cell. The numbers follow below the chart."
    return LoadChart(
        arm=arm,
        colour=colour_variable(arm),
        seed=run.seed,
        svg=inline_svg(load_figure(run.routing), f"load-{arm}", title, about),
        wide=len(run.routing.load[0]) * experts > WIDE_LOAD,
        routing=run.routing,
    )


def _passages(by_arm: Mapping[str, list[RunResult]]) -> list[PassageView]:
    """One passage for each routed arm that has one, gqe first."""
    found = []
    for arm in sorted(by_arm, key=lambda name: name != "gqe"):
        for run in by_arm[arm]:
            if run.passage is not None and run.routing is not None:
                count = run.routing.experts_per_group
                found.append(PassageView(arm, run.seed, count, run.passage.tokens, run.passage.experts))
                break
    return found


def _facts(values: Any) -> Facts:
    """The fields of a dataclass as text; none without one."""
    fields = dataclasses.asdict(values) if values is not None else {}
    return [(name.replace("_", " "), _fact(value)) for name, value in fields.items()]


def _fact(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: text.MISSING}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_fact(item) for item in value) or text.MISSING
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_fact(item)}" for name, item in value.items()) or text.MISSING
    return str(value)
