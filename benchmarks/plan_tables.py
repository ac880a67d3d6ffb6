"""Fills the tables of docs/planning.md from a plan of the paper's run.

python benchmarks/plan_tables.py           # from benchmarks/results/plan-paper.json
python benchmarks/plan_tables.py --plan    # plans it anew first, and draws docs/plots/plan.*
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from page_tables import markdown, with_tables
from query_experts.bench.json_reader import read_result
from query_experts.common.files import write_json
from query_experts.common.settings import presets, read_recipe
from query_experts.plan.numbers import Plan, make_plan
from query_experts.plan.report import arm_rows, speed_rows, write_plot
from query_experts.plan.settings import PlanSettings

ROOT = Path(__file__).resolve().parent.parent
PRESET = "paper-250m"
RESULT = ROOT / "benchmarks" / "results" / "plan-paper.json"
PAGE = ROOT / "docs" / "planning.md"
SCRIPT = "benchmarks/plan_tables.py"  # in the markers of its tables
PRICE = 2.5  # in the page's command


def settings() -> PlanSettings:
    """Those of the page's command."""
    known = {f.name for f in dataclasses.fields(PlanSettings)} - PlanSettings.not_of_recipes
    recipe = read_recipe(presets("recipes")[PRESET])
    return PlanSettings(**{name: value for name, value in recipe.items() if name in known}, price=PRICE)


def read_plan() -> Plan:
    return read_result(RESULT, Plan, "a plan")


def table(name: str) -> str:
    rows = arm_rows(settings(), read_plan()) if name == "arms" else speed_rows(read_plan())
    return markdown([[cell.strip() for cell in row] for row in rows])


def filled(page: str) -> str:
    """The page with every table made anew."""
    return with_tables(page, SCRIPT, table)


def main() -> None:
    if "--plan" in sys.argv[1:]:
        plan = make_plan(settings())
        write_json(RESULT, dataclasses.asdict(plan))
        write_plot(plan, ROOT / "docs" / "plots")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
