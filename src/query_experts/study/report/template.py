"""Fills a page's template, which shares its style and its tables with the other pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from query_experts.common.errors import SettingError
from query_experts.common.files import write_text


def write_page(template: str, page: Any, path: Path) -> None:
    """Writes a page, one HTML file that needs no other.

    Args:
        template: Its file in study/templates.
        page: A dataclass with everything that the template shows.

    Raises:
        SettingError: jinja2 isn't installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise SettingError("the report needs jinja2: pip install query-experts[study]") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("query_experts.study"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(path, environment.get_template(template).render(vars(page)))
