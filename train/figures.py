"""The look of all figures: colours, axes, and how a figure is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compacter_jax.catalogue import PRESETS
from compacter_jax.files import replace_file

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"
GREEN, PURPLE, TEAL, PINK, BROWN = "#2f855a", "#805ad5", "#2c7a7b", "#b83280", "#975a16"

# What a curve is of.
TRAIN, VALIDATION, TEST, REFERENCE = BLUE, ORANGE, GREEN, GREY

# Kind of method -> colour; presets of one kind differ in the marker.
_OF_KIND = {
    "phm_bottleneck": BLUE,
    "full": ORANGE,
    "head_only": GREY,
    "bottleneck": GREEN,
    "low_rank_bottleneck": GREEN,
    "lora": PURPLE,
    "bitfit": TEAL,
    "ia3": BROWN,
}
_OF_OTHERS = PINK
_MARKERS = "os^Dv<>P"

LOOK: Any = {
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
}


def new_figure(
    size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Any, Any]:
    """Returns a figure and its axes, in the look of all figures.

    The figure belongs to the caller alone. `matplotlib.pyplot` keeps each of its own figures until
    it is closed, and with it whatever an error or a test left open.

    Args:
      size: width and height in inches.
      rows: number of rows of axes.
      columns: number of columns of axes.
      **options: further arguments of `matplotlib.figure.Figure.subplots`.
    """
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and needed only here
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(LOOK):
        figure = FigureCanvasAgg(Figure(figsize=size)).figure
        return figure, figure.subplots(rows, columns, **options)


def save(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG file under a temporary name, and renames it."""
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def colour_of(method: str) -> str:
    """Returns the colour of a preset, or a variant `PRESET:…` of it, the same in every figure."""
    name = method.partition(":")[0]
    kind = PRESETS[name].method.kind if name in PRESETS else ""
    return _OF_KIND.get(kind, _OF_OTHERS)


def marker_of(method: str) -> str:
    """Returns the marker of a preset, which no other preset of its colour has among the first 8."""
    name = method.partition(":")[0]
    alike = [each for each in PRESETS if colour_of(each) == colour_of(name)]
    return _MARKERS[alike.index(name) % len(_MARKERS)] if name in alike else _MARKERS[0]
