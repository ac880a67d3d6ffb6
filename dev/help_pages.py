"""Renders the help pages of `query-experts COMMAND --help`, which are files so that they are there at once.

python dev/help_pages.py    # after a change of a command's options; writes src/query_experts_command/help/*.txt
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from query_experts.cli import COMMANDS, run_command

PAGES = Path(__file__).resolve().parent.parent / "src" / "query_experts_command" / "help"


def page(command: str) -> str:
    """The page that the command's parser prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = run_command(command, ["--help"])
    assert status == 0, command
    return printed.getvalue()


def main() -> None:
    for command in COMMANDS:
        (PAGES / f"{command}.txt").write_text(page(command), encoding="utf-8")


if __name__ == "__main__":
    main()
