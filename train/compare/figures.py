"""Figures of a comparison: scores by trained parameters, and by training set size."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.compare.summaries import Summary, grouped
from train.figures import colour_of, marker_of, new_figure

# Candidate positions of a label: direction from its data point and distance in points, near first.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
_DISTANCES = (7, 14, 24, 36, 50, 66)
# Line styles of methods of one colour and marker, which are variants of one preset.
_LINES: Any = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 4)))


def comparison_figure(found: Sequence[Summary], backbone: str) -> Any:
    """Plots score against trained parameters.

    Each method has a labelled mean with an error bar, and a small point for every run.

    Args:
      found: the methods on one task with one training set size.
      backbone: folder or id of the backbone, for the title.
    """
    figure, axes = new_figure((9, 6))
    for s in found:
        colour, marker = colour_of(s.method), marker_of(s.method)
        runs = [s.percent] * len(s.scores)
        axes.plot(runs, s.scores, ".", color=colour, alpha=0.45, markersize=5)
        axes.errorbar(
            s.percent,
            s.mean,
            yerr=s.deviation,
            fmt=marker,
            color=colour,
            ecolor=(colour, 0.5),
            capsize=3,
        )
    axes.set_xscale("log")
    shares = [s.percent for s in found]
    axes.xaxis.set_major_formatter("{x:g} %")
    # Within one power of ten there may be no major tick.
    axes.xaxis.set_minor_formatter("{x:g} %" if max(shares) < 10 * min(shares) else "")
    axes.margins(x=0.12, y=0.12)
    first = found[0]
    axes.set(
        xlabel="trained parameters, of all (log)",
        ylabel=f"test {first.metric}",
        title=f"{first.task}, {first.size:,} training examples, {_told(found, backbone)}",
    )
    place_labels(axes, {s.method: (s.percent, s.mean) for s in found})
    return figure


def size_figure(found: Sequence[Summary], backbone: str) -> Any:
    """Plots score against training set size.

    Each method has a line of means with error bars, and a small point for every run.

    Args:
      found: the methods on one task with several training set sizes.
      backbone: folder or id of the backbone, for the title.
    """
    methods = grouped(found, lambda s: s.method)
    sizes = sorted({s.size for s in found})
    # The legend is beside the axes.
    figure, axes = new_figure((8 + 0.08 * max(map(len, methods)), max(5, 1 + 0.22 * len(methods))))
    looks: Counter[tuple[str, str]] = Counter()
    nearest = min((b / a for a, b in itertools.pairwise(sizes)), default=2.0)
    step = min(1.03, nearest ** (0.4 / len(methods)))
    for i, (method, of_method) in enumerate(methods.items()):
        in_order = sorted(of_method, key=lambda s: s.size)
        # Shifted sideways, so that no error bar hides another.
        shift = step ** (i - (len(methods) - 1) / 2)
        look = colour_of(method), marker_of(method)
        line = _LINES[looks[look] % len(_LINES)]
        looks[look] += 1
        places, colour = [shift * s.size for s in in_order], colour_of(method)
        for place, s in zip(places, in_order, strict=True):
            axes.plot([place] * len(s.scores), s.scores, ".", color=colour, alpha=0.45)
        axes.errorbar(
            places,
            [s.mean for s in in_order],
            yerr=[s.deviation for s in in_order],
            marker=marker_of(method),
            linestyle=line,
            color=colour,
            capsize=3,
            label=method,
        )
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
    axes.set_xticks([], minor=True)
    first = found[0]
    axes.set(
        xlabel="training examples (log)",
        ylabel=f"test {first.metric}",
        title=f"{first.task}, {_told(found, backbone)}",
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _told(found: Sequence[Summary], backbone: str) -> str:
    """Returns the model, the number of seeds and the meaning of the bars, for a title."""
    numbers = sorted({len(s.scores) for s in found})
    seeds = "1 seed" if numbers == [1] else f"{'-'.join(map(str, numbers))} seeds"
    bars = "" if numbers == [1] else "; bars: mean ± standard deviation"
    return f"{Path(backbone).absolute().name}\n{seeds}{bars}; small points: runs"


def place_labels(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes each name beside its point, where it overlaps other points and names least."""
    from matplotlib.text import Text  # noqa: PLC0415
    from matplotlib.transforms import Bbox  # noqa: PLC0415

    figure = axes.figure
    figure.draw_without_rendering()  # fixes the layout, and thus the positions of the points
    renderer, pixels = figure.canvas.get_renderer(), figure.dpi / 72
    places = dict(zip(points, axes.transData.transform(list(points.values())), strict=True))
    markers = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places.values()]
    offsets = [
        (distance * right, distance * up)
        for distance, (right, up) in itertools.product(_DISTANCES, _DIRECTIONS)
    ]
    boxes: dict[str, Any] = {}
    labels: dict[str, Any] = {}

    def box_at(size: Any, place: Any, offset: tuple[float, float]) -> Any:
        """Returns the box of a text of `size` whose nearest edge or corner is at the offset."""
        left, bottom = (
            z + pixels * d - (0 if d > 0 else extent if d < 0 else extent / 2)
            for z, d, extent in zip(place, offset, (size.width, size.height), strict=True)
        )
        return Bbox.from_bounds(left, bottom, size.width, size.height)

    def covered(box: Any, others: Sequence[Any]) -> float:
        outside = _area(box) - _area(Bbox.intersection(box, axes.bbox))
        return outside + sum(_area(Bbox.intersection(box, other)) for other in others)

    # Two passes, since the first labels are placed before the positions of the others are known.
    for name in 2 * sorted(points, key=lambda name: points[name]):
        if name not in labels:
            labels[name] = axes.annotate(
                name,
                points[name],
                (0, 0),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=9,
                arrowprops={"arrowstyle": "-", "color": "grey", "lw": 0.5},
            )
            labels[name].set_in_layout(False)
        size = Text.get_window_extent(labels[name], renderer)
        others = [*markers, *(boxes[other] for other in boxes if other != name)]
        tried = [box_at(size, places[name], offset) for offset in offsets]
        boxes[name] = min(tried, key=lambda box: covered(box, others))  # the first of the best
        centre = (boxes[name].p0 + boxes[name].p1) / 2
        labels[name].set_position((centre - places[name]) / pixels)


def _area(box: Any) -> float:
    return 0.0 if box is None else box.width * box.height
