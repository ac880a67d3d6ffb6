"""`query-experts plan`: plans a run, prints the plan, and writes the plot and plan.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from query_experts.common.files import require_writable, write_json
from query_experts.plan.numbers import make_plan
from query_experts.plan.report import print_plan, write_plot
from query_experts.plan.settings import PlanSettings

if TYPE_CHECKING:
    from rich.console import Console


def plan(settings: PlanSettings, console: Console) -> None:
    """Runs `query-experts plan`: prints tables, and writes the plot and plan.json.

    Raises:
        SettingError: A setting can't be used, or this process is one of several.
    """
    from rich.text import Text

    settings.check()
    folder = Path(settings.out)
    require_writable(folder)  # before memory is tracked
    made = make_plan(settings)
    file = folder / "plan.json"
    write_json(file, dataclasses.asdict(made))
    print_plan(settings, made, console)
    plots = write_plot(made, folder)
    console.print(Text(f"Numbers: {file}   Plot: {plots[-1]}"))
