"""Puts the table of benchmarks/results/compare-demo.json into the README, and its plots into docs/plots/."""

from __future__ import annotations

import json
from pathlib import Path

from query_experts.study import report_text as text
from query_experts.study.report import write_plots
from query_experts.study.report_rows import Comparison, Row, summary_rows

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "compare-demo.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- table: benchmarks/readme_table.py -->", "<!-- end of table -->"


def table(comparison: Comparison) -> str:
    """Markdown: losses and differences seed by seed, and the median speed at the longest prompt."""
    longest = comparison["prefill"]["lengths"][-1]
    head = [
        "arm", "active heads", "active parameters", "FLOPs a token", "KV bytes a token", "validation loss, by seed",
        "against `dense`", "against `static`", f"prefill of {text.length_name(longest)} tokens",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head), *(cells(row, longest) for row in summary_rows(comparison))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(row: Row, longest: int) -> list[str]:
    speed = row.prefill[longest]
    return [
        f"`{row.arm}`",
        row.active_heads,
        text.short(row.active_parameters),
        text.short(row.flops_per_token),
        text.whole(row.kv_bytes_per_token),
        " / ".join(text.fixed(loss, 3) for loss in row.losses.values()),
        *(difference(row, base) for base in ("dense", "static")),
        f"{text.times(speed.median)} ({speed.low:.2f} to {speed.high:.2f})" if speed else text.MISSING,
    ]


def difference(row: Row, base: str) -> str:
    paired = row.versus[base]
    return " / ".join(text.signed(d, 3) for d in paired.differences.values()) if paired else text.MISSING


def with_table(readme: str, comparison: Comparison) -> str:
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table(comparison)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    comparison = json.loads(RESULT.read_text(encoding="utf-8"))
    README.write_text(with_table(README.read_text(encoding="utf-8"), comparison), encoding="utf-8")
    write_plots(comparison, ROOT / "docs" / "plots")


if __name__ == "__main__":
    main()
