"""The look of all plots: colours and markers of the arms, figures that need no display, and how they are saved."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from query_experts.common.errors import SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID, DEAD = "#1b1f24", "#5f6873", "#d9dde2", "#b3261e"
ARM_COLOURS = {  # for colour-blind readers too
    "dense": INK, "static": "#d98c00", "half": "#7d8590", "frozen": "#46a5de", "gqe": "#0067b0", "hard": "#c66a9e",
    "weighted": "#008f6b", "gqe-m4": "#c84e00", "gqe-m8": "#8a3b12", "gqe-expert": "#7b4bb3",
    "dense-fused": "#5b6d00",
}  # fmt: skip
MARKERS = dict(zip(ARM_COLOURS, "os^vDPX*hpd", strict=True))
LEGEND: dict[str, Any] = {
    "loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 9, "labelcolor": INK,
}  # fmt: skip
WIDTH, NARROW = 5.8, 4.2  # inches


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, in inches. Raises SettingError, naming the extra to install, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise SettingError("charts need matplotlib: pip install query-experts[study]") from error
    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: Axes, grid: str | None = "both") -> None:
    """Draws a thin frame on two sides and a faint grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(FAINT)
    axes.tick_params(which="both", colors=FAINT, labelcolor=INK, labelsize=9)
    axes.xaxis.label.set(color=INK, fontsize=9.5)
    axes.yaxis.label.set(color=INK, fontsize=9.5)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=GRID, linewidth=0.7)  # type: ignore[arg-type]


def reproducible_svg(salt: str) -> AbstractContextManager[None]:
    """A context in which equal figures are saved as equal bytes, with text as text. salt: the base of their ids."""
    import matplotlib

    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"})


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes name.svg and name.png on a white background."""
    figure.set_facecolor("white")
    svg, png = folder / f"{name}.svg", folder / f"{name}.png"
    with reproducible_svg(name):
        figure.savefig(svg, metadata={"Date": None})
        figure.savefig(png, dpi=160, metadata={"Software": None})
    return [svg, png]
