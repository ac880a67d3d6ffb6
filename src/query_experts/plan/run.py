"""`query-experts plan`: plans a run, prints the plan, and writes the plot and plan.json."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from query_experts.common.errors import SettingError
from query_experts.common.files import no_empty_folders, write_json
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
    require_writable(folder)
    made = make_plan(settings)
    file = folder / "plan.json"
    write_json(file, dataclasses.asdict(made))
    print_plan(settings, made, console)
    plots = write_plot(made, folder)
    console.print(Text(f"Numbers: {file}   Plot: {plots[-1]}"))


def require_writable(folder: Path) -> None:
    """Raises SettingError for an `out` that nothing can be written to, before memory is tracked. Leaves no file."""
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"out is {folder}, which is a file; it must be a folder")
    try:
        with no_empty_folders(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise SettingError(
            f"out is {folder}, which can't be written to ({error.strerror}); it must be a folder that can be"
        ) from error
