"""Writes Markdown tables, between a page's markers `<!-- table: SCRIPT NAME -->` and `<!-- end of table -->`."""

from __future__ import annotations

import re
from collections.abc import Callable

MARKED = re.compile(r"(<!-- table: (\S+) ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def markdown(rows: list[list[str]]) -> str:
    """The first row is the head."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def with_tables(page: str, script: str, table: Callable[[str], str]) -> str:
    """Returns the page with a script's tables made anew, each by its name; tables of other scripts stay as they are.

    A page may hold tables of several scripts. script: as its markers name it, such as `benchmarks/serve_tables.py`.
    """

    def made(found: re.Match[str]) -> str:
        return f"{found[1]}{table(found[3])}\n{found[4]}" if found[2] == script else found[0]

    return MARKED.sub(made, page)
