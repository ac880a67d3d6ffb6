"""Writes the table of benchmarks/results/compare-demo.json into docs/comparing.md, and its plots into docs/plots/."""

from __future__ import annotations

from pathlib import Path

from page_tables import markdown, with_tables
from query_experts.common import formatting as text
from query_experts.study.report import write_plots
from query_experts.study.report.rows import BASELINES, Row, by_seed, prefill_lengths, seeds_of, summary_rows
from query_experts.study.results import Comparison, parse_comparison

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "compare-demo.json"
PAGE = ROOT / "docs" / "comparing.md"
SCRIPT = "benchmarks/demo_table.py"  # in the marker of its table


def table(comparison: Comparison) -> str:
    """Losses and differences by seed, and the median speed at the longest prompt."""
    longest = prefill_lengths(comparison)[-1]
    head = [
        "arm", "active heads", "active parameters", "FLOPs a token", "KV bytes a token", "validation loss, by seed",
        "against `dense`", "against `static`", f"prefill of {text.length_name(longest)} tokens",
    ]  # fmt: skip
    rows = {row.arm: row for row in summary_rows(comparison)}
    return markdown([head, *(cells(rows, arm, longest, seeds_of(comparison)) for arm in rows)])


def cells(rows: dict[str, Row], arm: str, longest: int, asked: list[int]) -> list[str]:
    row, speed = rows[arm], rows[arm].prefill[longest]
    return [
        f"`{arm}`",
        row.active_heads,
        text.short(row.active_parameters),
        text.short(row.flops_per_token),
        text.whole(row.kv_bytes_per_token),
        " / ".join(by_seed(row.losses, row.diverged, asked, lambda loss: text.fixed(loss, 3))),
        *(difference(row, rows.get(base), asked) for base in BASELINES),
        f"{text.times(speed.median)} ({speed.low:.2f} to {speed.high:.2f})" if speed else text.MISSING,
    ]


def difference(row: Row, base: Row | None, asked: list[int]) -> str:
    paired = row.versus[base.arm] if base else None
    if base is None or paired is None:
        return text.MISSING
    diverged = [*row.diverged, *base.diverged]
    return " / ".join(by_seed(paired.differences, diverged, asked, lambda value: text.signed(value, 3)))


def demo() -> Comparison:
    return parse_comparison(RESULT.read_text(encoding="utf-8"))


def filled(page: str) -> str:
    """The page with the table made anew."""
    return with_tables(page, SCRIPT, lambda _: table(demo()))


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    write_plots(demo(), ROOT / "docs" / "plots")


if __name__ == "__main__":
    main()
