"""Puts figures into the page as SVG.

A chart in the page has a title and a description for screen readers, ids of its own, no address of another file, and
colours that follow the page's light or dark scheme.
"""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING

from query_experts.common.plots import ARM_COLOURS, DEAD, FAINT, GRID, INK, reproducible_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAGE_COLOURS = {INK: "ink", FAINT: "faint", GRID: "grid", DEAD: "dead"}
_PAGE_COLOURS |= {colour: f"arm-{arm}" for arm, colour in ARM_COLOURS.items() if colour not in _PAGE_COLOURS}


def colour_variable(arm: str) -> str:
    """The CSS variable that holds the arm's colour."""
    return _PAGE_COLOURS[ARM_COLOURS[arm]]


def inline_svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an <svg> element.

    Args:
        name: Of letters, digits and hyphens; unique in the page.
        title: For screen readers.
        description: For screen readers.
    """
    svg = _svg_text(figure, name)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg).replace("xlink:href", "href")
    svg = re.sub(r"font: ([^'\";]*?)(\d[\d.]*px) [^;\"]*", r"font: \1\2 system-ui, sans-serif", svg)
    for colour, variable in _PAGE_COLOURS.items():
        svg = svg.replace(f": {colour}", f": var(--{variable}, {colour})")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    start = (
        f'<svg {box.group()} role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-desc">{html.escape(description)}</desc>'
    )
    return start + svg[svg.index(">") + 1 :].strip()


def _svg_text(figure: Figure, salt: str) -> str:
    target = io.StringIO()
    with reproducible_svg(salt):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    return target.getvalue()
