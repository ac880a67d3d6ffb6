"""Tables in Markdown, and where a page has them: between `<!-- table: NAME -->` and `<!-- end of table -->`."""

from __future__ import annotations

import re
from collections.abc import Callable

MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def markdown(rows: list[list[str]]) -> str:
    """The first row is the head."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def with_tables(page: str, table: Callable[[str], str]) -> str:
    """The page with each marked table made anew, by its name."""
    return MARKED.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", page)
