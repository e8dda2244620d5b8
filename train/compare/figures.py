"""Figures of a comparison: scores by trained parameters, and by training set size."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.compare.summaries import Summary, grouped
from train.figures import colour_of, marker_of, new_figure

# Candidate positions of a label: direction from its data point and distance in points, near first.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
_DISTANCES = (7, 14, 24, 36, 50, 66)
# Line styles of methods of one colour and marker, which are variants of one preset, and how their
# markers are filled.
_LINES: Any = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 4)))
_FILLS: Any = ("full", "none", "left", "right", "top", "bottom")
# The least distance between two methods, as a part of the range of trained parameters.
_APART = 0.014


def comparison_figure(
    found: Sequence[Summary],
    backbone: str,
    head: str = "",
    differences: Sequence[Mapping[str, Any]] = (),
) -> Any:
    """Plots score against trained parameters.

    Each method has a labelled mean with a bar, and a small point for every run. The bar is the
    95 % interval of the difference to the reference, drawn from the mean of the reference, at which
    there is a line: where the bar crosses the line, the two are on par. Without differences it is
    the standard deviation. Methods of almost as many parameters are drawn side by side.

    Args:
      found: the methods on one task with one training set size.
      backbone: folder or id of the backbone, for the title.
      head: what the methods train as a head, for the title.
      differences: rows of `train.compare.differences` of that task and size.
    """
    figure, axes = new_figure((9, 6))
    means = {s.method: s.mean for s in found}
    compared = {row["method"]: row for row in differences if row["reference"] in means}
    fills = _numbered([(colour_of(s.method), marker_of(s.method)) for s in found])
    points, lines = {}, []
    for s, place, number in zip(found, _side_by_side(found), fills, strict=True):
        colour, fill = colour_of(s.method), _FILLS[number % len(_FILLS)]
        low, high = s.mean - s.deviation, s.mean + s.deviation
        if compared:
            row = compared.get(s.method)
            of_reference = means[row["reference"]] if row else s.mean
            low, high = (of_reference + (row[end] if row else 0.0) for end in ("low", "high"))
        axes.plot([place] * len(s.scores), s.scores, ".", color=colour, alpha=0.45, markersize=5)
        axes.errorbar(
            place,
            s.mean,
            # A percentile interval need not have the mean inside.
            yerr=[[max(s.mean - low, 0.0)], [max(high - s.mean, 0.0)]],
            fmt=marker_of(s.method),
            color=colour,
            ecolor=(colour, 0.5),
            capsize=3,
            fillstyle="full" if fill == "none" else fill,
            markerfacecolor="white" if fill == "none" else colour,
            markerfacecoloralt="white",
        )
        points[s.method] = place, s.mean
        lines.append(((place, low), (place, high)))
    for reference in {row["reference"] for row in compared.values()}:
        axes.axhline(means[reference], color=colour_of(reference), lw=1, ls="--", zorder=1)
        lines.append(((1e-9, means[reference]), (1e9, means[reference])))
    axes.set_xscale("log")
    shares = [s.percent for s in found]
    axes.xaxis.set_major_formatter("{x:g} %")
    # Within one power of ten there may be no major tick.
    axes.xaxis.set_minor_formatter("{x:g} %" if max(shares) < 10 * min(shares) else "")
    axes.margins(x=0.12, y=0.12)
    first = found[0]
    moved = any(not 0.95 < points[s.method][0] / s.percent < 1.05 for s in found)
    where = f"{first.task}, {first.size:,} training examples"
    told = _told(found, backbone, head, next(iter(compared.values()), None))
    axes.set(
        xlabel=f"trained parameters, of all (log{'; neighbours are moved apart' if moved else ''})",
        ylabel=f"test {first.metric}",
        title=f"{where}, {told}",
    )
    place_labels(axes, points, lines)
    return figure


def _numbered(looks: Sequence[Any]) -> list[int]:
    """Returns for each look how many before it are the same."""
    seen: Counter[Any] = Counter()
    numbers = []
    for look in looks:
        numbers.append(seen[look])
        seen[look] += 1
    return numbers


def _side_by_side(found: Sequence[Summary]) -> list[float]:
    """Returns the shares of trained parameters in percent, those close together moved apart.

    The places are in the order of the shares, at least a certain distance apart on a logarithmic
    axis, and as near to the shares as that allows (the sum of squares is least).
    """
    from scipy.optimize import isotonic_regression  # noqa: PLC0415 - slow to import

    exact = [math.log10(s.percent) for s in found]
    gap = _APART * max(max(exact) - min(exact), 1.0)
    order = sorted(range(len(found)), key=lambda i: (exact[i], found[i].mean))
    # Less the gaps, the places must not decrease.
    gaps = gap * np.arange(len(order))
    moved = 10 ** (isotonic_regression(np.array(exact)[order] - gaps).x + gaps)
    places = dict(zip(order, moved.tolist(), strict=True))
    return [places[i] for i in range(len(found))]


def size_figure(found: Sequence[Summary], backbone: str, head: str = "") -> Any:
    """Plots score against training set size.

    Each method has a line of means with error bars, and a small point for every run.

    Args:
      found: the methods on one task with several training set sizes.
      backbone: folder or id of the backbone, for the title.
      head: what the methods train as a head, for the title.
    """
    methods = grouped(found, lambda s: s.method)
    sizes = sorted({s.size for s in found})
    # The legend is beside the axes.
    figure, axes = new_figure((8 + 0.08 * max(map(len, methods)), max(5, 1 + 0.22 * len(methods))))
    lines = _numbered([(colour_of(method), marker_of(method)) for method in methods])
    nearest = min((b / a for a, b in itertools.pairwise(sizes)), default=2.0)
    step = min(1.03, nearest ** (0.4 / len(methods)))
    for i, (method, of_method) in enumerate(methods.items()):
        in_order = sorted(of_method, key=lambda s: s.size)
        # Shifted sideways, so that no error bar hides another.
        shift = step ** (i - (len(methods) - 1) / 2)
        places, colour = [shift * s.size for s in in_order], colour_of(method)
        for place, s in zip(places, in_order, strict=True):
            axes.plot([place] * len(s.scores), s.scores, ".", color=colour, alpha=0.45)
        axes.errorbar(
            places,
            [s.mean for s in in_order],
            yerr=[s.deviation for s in in_order],
            marker=marker_of(method),
            linestyle=_LINES[lines[i] % len(_LINES)],
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
        title=f"{first.task}, {_told(found, backbone, head)}",
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def head_of(settings: Mapping[str, Any]) -> str:
    """Returns what the methods of a comparison trained as a head, for `head` of a figure."""
    return {
        "alike": "the same head for all",
        "as_published": "heads as published",
        # Before there was a choice.
        None: "through the pooler, which full alone trains",
    }[settings.get("heads")]


def _told(
    found: Sequence[Summary],
    backbone: str,
    head: str,
    difference: Mapping[str, Any] | None = None,
) -> str:
    """Returns model, head, number of seeds and the meaning of the bars, for a title."""
    numbers = sorted({len(s.scores) for s in found})
    seeds = "1 seed" if numbers == [1] else f"{'-'.join(map(str, numbers))} seeds"
    bars = "" if numbers == [1] else "; bars: mean ± standard deviation"
    if difference is not None:
        bars = f"; bars: 95 % interval of the difference to {difference['reference']}, dashed"
    model = ", ".join(filter(None, [Path(backbone).absolute().name, head]))
    return f"{model}\n{seeds}{bars}; small points: runs"


def place_labels(
    axes: Any,
    points: Mapping[str, tuple[float, float]],
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]] = (),
) -> None:
    """Writes each name beside its point, where it overlaps points, lines and other names least.

    Args:
      axes: the axes, whose limits are final.
      points: name -> its point.
      lines: ends of horizontal and vertical lines, the left or lower one first.
    """
    from matplotlib.text import Text  # noqa: PLC0415
    from matplotlib.transforms import Bbox  # noqa: PLC0415

    figure = axes.figure
    figure.draw_without_rendering()  # fixes the layout, and thus the positions of the points
    renderer, pixels = figure.canvas.get_renderer(), figure.dpi / 72
    places = dict(zip(points, axes.transData.transform(list(points.values())), strict=True))
    markers = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places.values()]
    thin = [Bbox(axes.transData.transform(ends)).padded(2) for ends in lines]
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
        over, across = (
            sum(_area(Bbox.intersection(box, other)) for other in each) for each in (others, thin)
        )
        return outside + over + 0.1 * across  # a name stays legible across a line

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
