"""Draws `sites.png`: where methods act in BERT and T5, and what a Compacter layer is made of.

python docs/pictures/sites.py [OUTPUT.png]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle

import compacter_jax as cj
from train.figures import BLUE, GREY, ORANGE

PAPER, INK, LINE = "#ffffff", "#1a202c", GREY
FROZEN, FROZEN_EDGE = "#e2e8f0", "#a0aec0"
OWN, SHARED, NORM = BLUE, ORANGE, "#bee3f8"
TITLE = {"fontsize": 11.5, "weight": "bold"}
# Left and right edge of a column of boxes, and the height of one.
LEFT, RIGHT, HEIGHT = 3.3, 7.0, 0.62
MIDDLE = (LEFT + RIGHT) / 2


def main(output: Path) -> None:
    """Draws the figure and writes it."""
    look = {
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "mathtext.fontset": "cm",
        "text.color": INK,
    }
    with mpl.rc_context(look):
        figure, axes = plt.subplots(1, 3, figsize=(13.4, 5.85), facecolor=PAPER)
        for axis in axes:
            axis.set(xlim=(0, 10.1), ylim=(0.1, 13.3), aspect="equal")
            axis.axis("off")
        bert(axes[0])
        t5(axes[1])
        compacter(axes[2])
        figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=0.99, wspace=0.02)
        figure.savefig(output, dpi=130, facecolor=PAPER, metadata={"Software": None})
        plt.close(figure)


class Column:
    """A layer, drawn upwards: boxes, adapters and sums with the residual."""

    def __init__(self, axis: Any, sites: Any, title: str) -> None:
        self.axis, self.sites, self.y, self.residual = axis, sites, 0.75, 0.75
        axis.text(MIDDLE, 12.85, title, ha="center", **TITLE)
        axis.text(MIDDLE, 0.25, "hidden states", ha="center", color=LINE)
        self.read = self.y

    def box(self, text: str, *names: str, color: str = FROZEN, gap: float = 0.3) -> None:
        """A box, and beside it the names of the sites that it is."""
        self._arrow(gap)
        box(self.axis, LEFT, self.y, RIGHT - LEFT, HEIGHT, text, color)
        self._label(names, self.y + HEIGHT / 2, LINE)
        self.y += HEIGHT

    def projections(self, *pairs: tuple[str, str]) -> None:
        """Queries, keys and values, side by side."""
        self._arrow(0.3)
        width = (RIGHT - LEFT - 0.16 * (len(pairs) - 1)) / len(pairs)
        for i, (text, _) in enumerate(pairs):
            box(self.axis, LEFT + i * (width + 0.16), self.y, width, HEIGHT, text, FROZEN)
        self._label([name for _, name in pairs], self.y + HEIGHT / 2, LINE)
        self.y += HEIGHT

    def adapter(self, name: str) -> None:
        """The adapter of a site."""
        self._arrow(0.3)
        box(self.axis, LEFT, self.y, RIGHT - LEFT, HEIGHT, "adapter", OWN, PAPER)
        self._label([name], self.y + HEIGHT / 2, OWN, weight="bold")
        self.y += HEIGHT

    def add(self, parallel: str) -> None:
        """The sum with the residual, and the adapter that may lie beside what came last."""
        self._arrow(0.26)
        radius, beside = 0.2, LEFT - 0.5
        start, end = self.residual, self.y + radius
        xs, ys = (MIDDLE, beside, beside, MIDDLE - radius), (start, start, end, end)
        self.axis.plot(xs, ys, color=LINE, lw=1.1, zorder=1)
        plus(self.axis, MIDDLE, end, radius)
        # It reads what the sub-layer reads, and is added where the sub-layer's output is.
        x, half, above = 1.2, 1.15, end - 0.09
        xs, ys = (MIDDLE, x, x, MIDDLE - radius), (self.read, self.read, above, above)
        self.axis.plot(xs, ys, color=OWN, lw=1, ls=(0, (3, 2)), zorder=1.1)
        self._known(parallel)
        middle = (self.read + above) / 2
        box(self.axis, x - half, middle - 0.45, 2 * half, 0.9, "", PAPER, edge=OWN)
        self.axis.text(
            x,
            middle,
            parallel.replace("_", "_\n", 1),
            ha="center",
            va="center",
            color=OWN,
            fontsize=7.5,
            family="DejaVu Sans Mono",
            linespacing=1.15,
        )
        self.y += 2 * radius

    def begin(self) -> None:
        """The residual branches off here."""
        self.axis.plot((MIDDLE, MIDDLE), (self.y, self.y + 0.22), color=LINE, lw=1.1, zorder=1)
        self.y += 0.22
        self.residual, self.read = self.y, self.y + 0.09

    def norm(self) -> None:
        """A norm that comes before its sub-layer."""
        self.box("layer norm", color=NORM)
        self.axis.plot((MIDDLE, MIDDLE), (self.y, self.y + 0.14), color=LINE, lw=1.1, zorder=1)
        self.y += 0.14
        self.read = self.y

    def end(self) -> None:
        """An arrow out of the layer."""
        self._arrow(0.45)

    def _arrow(self, gap: float) -> None:
        arrow(self.axis, MIDDLE, self.y, gap)
        self.y += gap

    def _label(self, names: Any, y: float, color: str, **style: Any) -> None:
        for name in " ".join(names).split():
            self._known(name)
        self.axis.text(
            RIGHT + 0.15,
            y,
            "\n".join(names),
            va="center",
            color=color,
            fontsize=7.5,
            family="DejaVu Sans Mono",
            linespacing=1.1,
            **style,
        )

    def _known(self, name: str) -> None:
        if name not in self.sites:
            raise ValueError(f"{name!r} is no site; there are {', '.join(self.sites)}")


def bert(axis: Any) -> None:
    """A layer of BERT: norms come after the sums."""
    column = Column(axis, cj.Bert.sites, "a layer of BERT")
    column.begin()
    column.projections(("Q", "query"), ("K", "key"), ("V", "value"))
    column.box("attention", "encoder_key_value")
    column.box("dense", "output_projection")
    column.adapter("attention")
    column.add("parallel_attention")
    column.box("layer norm", color=NORM, gap=0.26)
    column.begin()
    column.box("dense, GELU", "intermediate")
    column.box("dense")
    column.adapter("feed_forward")
    column.add("parallel_feed_forward")
    column.box("layer norm", color=NORM, gap=0.26)
    column.end()


def t5(axis: Any) -> None:
    """A layer of T5's decoder: norms come first. The encoder's has no attention to the encoder."""
    column = Column(axis, cj.T5.sites, "a layer of T5's decoder")
    column.begin()
    column.norm()
    column.box("self-attention", "query key value", "output_projection", "decoder_key_value")
    column.adapter("attention")
    column.add("parallel_attention")
    first = column.y
    column.begin()
    column.norm()
    column.box("cross-attention", "query key value", "output_projection", "cross_key_value")
    column.adapter("cross_attention")
    column.add("parallel_cross_attention")
    axis.add_patch(
        Rectangle((0, first + 0.02), 10.1, column.y - first, fc="#f7fafc", ec="none", zorder=0)
    )
    axis.text(
        9.95, first + 0.15, "not in the encoder", ha="right", color=LINE, style="italic", fontsize=8
    )
    column.begin()
    column.norm()
    column.box("feed-forward", "intermediate")
    column.adapter("feed_forward")
    column.add("parallel_feed_forward")
    column.end()


def compacter(axis: Any) -> None:
    """A bottleneck adapter, and what one of its weights is made of."""
    axis.text(5, 12.85, "an adapter, and its weights in Compacter", ha="center", **TITLE)
    x, wide, narrow = 2.6, 1.5, 0.55
    ys = (7.2, 8.15, 8.45, 8.95, 9.25, 10.2)
    axis.plot((x, 0.7, 0.7, x - 0.2), (6.95, 6.95, 10.7, 10.7), color=LINE, lw=1.1, zorder=1)
    for below, above in ((6.65, ys[0]), (ys[1], ys[2]), (ys[3], ys[4]), (ys[5], 10.5)):
        arrow(axis, x, below, above - below)
    arrow(axis, x, 10.9, 0.4)
    plus(axis, x, 10.7, 0.2)
    for low, high, bottom, top, name in (
        (ys[0], ys[1], wide, narrow, "down"),
        (ys[4], ys[5], narrow, wide, "up"),
    ):
        corners = [(x - bottom, low), (x + bottom, low), (x + top, high), (x - top, high)]
        axis.add_patch(Polygon(corners, fc=OWN, ec=OWN, lw=1, zorder=2, joinstyle="round"))
        axis.text(x, (low + high) / 2, name, ha="center", va="center", color=PAPER, zorder=3)
    box(axis, x - narrow, ys[2], 2 * narrow, ys[3] - ys[2], "GELU", FROZEN)
    for y, text in ((6.65, "768 wide"), (8.3, "24"), (10.35, "768")):
        axis.text(x + 0.2, y, text, color=LINE, fontsize=7.5, va="center")
    lines = (
        "The backbone's weights are frozen.",
        "Trained are the adapters, and, in the",
        "paper's presets, the layer norms.",
        "",
        "Outlined in blue: where an adapter can",
        "lie beside a sub-layer instead.",
        "",
        "In grey: sites of LoRA, IA3, prefixes.",
    )
    axis.text(4.75, 9.0, "\n".join(lines), va="center", fontsize=8, linespacing=1.35)
    _weight(axis)


def _weight(axis: Any) -> None:
    """`W` as the sum of Kronecker products."""
    y = 4.1
    axis.add_patch(
        Rectangle((0.5, y - 1.5), 0.75, 3.0, fc=PAPER, ec=OWN, lw=1.2, ls=(0, (3, 2)), zorder=2)
    )
    sign(axis, 0.87, y, "$W$")
    sign(axis, 1.75, y, "$=$")
    sign(axis, 2.75, y, r"$\sum_{i=1}^{n}$")
    for shift in (0.24, 0.16, 0.08, 0.0):
        stack = (3.85 + shift, y - 0.55 + shift, 1.1, 1.1, SHARED)
        left = (6.25 + shift, y - 1.0 + shift, 0.22, 2.0, OWN)
        right = (7.3 + shift, y - 0.11 + shift, 1.0, 0.22, OWN)
        for at_x, at_y, width, height, color in (stack, left, right):
            axis.add_patch(
                Rectangle((at_x, at_y), width, height, fc=color, ec=PAPER, lw=0.8, zorder=2)
            )
    for step in (0.275, 0.55, 0.825):
        axis.plot((3.85, 4.95), (y - 0.55 + step,) * 2, color=PAPER, lw=0.5, zorder=3)
        axis.plot((3.85 + step,) * 2, (y - 0.55, y + 0.55), color=PAPER, lw=0.5, zorder=3)
    sign(axis, 4.4, y - 1.0, "$A_i$", color=SHARED)
    sign(axis, 5.75, y, r"$\otimes$")
    sign(axis, 6.42, y - 1.4, "$l_i$", color=OWN)
    sign(axis, 7.8, y - 0.6, "$r_i$", color=OWN)
    notes = (
        (1.75, SHARED, r"rule $A_1 \ldots A_n$: one for the whole model (64 numbers, $n = 4$)"),
        (1.15, OWN, "vectors $l_i$, $r_i$: each projection its own (792 numbers,"),
        (0.65, PAPER, "where a dense $W$ has 18,432), beside a bias"),
    )
    for at, color, text in notes:
        axis.add_patch(Rectangle((0.45, at - 0.14), 0.32, 0.28, fc=color, ec="none"))
        axis.text(0.95, at, text, va="center", fontsize=8)


def sign(axis: Any, x: float, y: float, text: str, color: str = INK) -> None:
    """A part of a formula."""
    axis.text(x, y, text, ha="center", va="center", fontsize=13, color=color, zorder=4)


def box(
    axis: Any,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    color: str,
    ink: str = INK,
    edge: str | None = None,
) -> None:
    """A rounded box with text in it."""
    frame = edge or (FROZEN_EDGE if color in (FROZEN, NORM) else color)
    axis.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.1",
            fc=color,
            ec=frame,
            lw=1,
            zorder=2,
        )
    )
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, zorder=3)


def arrow(axis: Any, x: float, y: float, length: float) -> None:
    """An arrow upwards."""
    style = {"arrowstyle": "-|>", "color": LINE, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", (x, y + length), (x, y), arrowprops={**style, "mutation_scale": 8}, zorder=1)


def plus(axis: Any, x: float, y: float, radius: float) -> None:
    """A sum."""
    axis.add_patch(Circle((x, y), radius, fc=PAPER, ec=LINE, lw=1.1, zorder=2))
    for dx, dy in ((radius * 0.6, 0), (0, radius * 0.6)):
        axis.plot((x - dx, x + dx), (y - dy, y + dy), color=INK, lw=1.1, zorder=3)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"))
