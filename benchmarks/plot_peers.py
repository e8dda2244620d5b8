"""Figure of the ratios to other packages: `python -m benchmarks.plot_peers RESULTS.json`.

The figure is written beside the file, with the suffix .png.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.figures import GREY, colour_of, marker_of, new_figure, save

_WORKS = {"step": "training step", "forward": "forward pass", "generate": "generation"}


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Plots ratios of seconds and of memory: a panel for each work, a group for each backbone.

    A point is a method beside its peer; filled in float32, hollow in other dtypes. Bars are
    quartiles over the rounds.

    Args:
      report: what `benchmarks.peers --json` writes.
      path: PNG file to write.
    """
    rows = [row for case in report["cases"] for row in _rows(case)]
    works = [work for work in _WORKS if any(row["work"] == work for row in rows)]
    figure, panels = new_figure(
        (8.5, 5.4),
        rows=2,
        columns=len(works),
        sharey="row",
        squeeze=False,
        width_ratios=[0.5 + len({row["size"] for row in rows if row["work"] == w}) for w in works],
    )
    for work, (above, below) in zip(works, panels.T, strict=True):
        of_work = [row for row in rows if row["work"] == work]
        for axes, name in ((above, "seconds"), (below, "memory")):
            _panel(axes, of_work, name)
        above.set_title(_WORKS[work])
    panels[0, 0].set_ylabel("seconds, of the peer's")
    panels[1, 0].set_ylabel("peak memory, of the peer's")
    handles = dict(zip(*panels[0, 0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=9)
    settings = report["settings"]
    figure.suptitle(
        f"This package beside its peer, below 1 is better; {settings['repeats']} rounds, "
        "median and quartiles",
        fontsize=10,
    )
    save(figure, path)


def _rows(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    size, method, work = case["case"].split("/")
    return [
        {
            "size": size,
            "method": method,
            "work": work,
            "peer": peer,
            "dtype": case["dtype"],
            **ratio,
        }
        for peer, ratio in case["ratios"].items()
    ]


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Plots one quantity of one work."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    axes.axhline(1, color=GREY, linewidth=1)
    for at, size in enumerate(sizes):
        of_size = [row for row in rows if row["size"] == size and row.get(name) is not None]
        for i, row in enumerate(of_size):
            place = at + 0.14 * (i - (len(of_size) - 1) / 2)
            colour = colour_of(row["method"])
            value, bars = row[name], None
            if name == "seconds":
                value = row[name]["median"]
                ends = row[name]["first_quartile"], row[name]["third_quartile"]
                bars = [[value - ends[0]], [ends[1] - value]]
            axes.errorbar(
                place,
                value,
                yerr=bars,
                fmt=marker_of(row["method"]),
                color=colour,
                markerfacecolor=colour if row["dtype"] == "float32" else "none",
                markersize=5,
                label=f"{row['method']} ({row['peer']})",
            )
    axes.set_xticks(range(len(sizes)), sizes, rotation=20)
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.set_ylim(0, max(1.06, axes.get_ylim()[1]))
    axes.grid(axis="x", visible=False)


if __name__ == "__main__":
    results = Path(sys.argv[1])
    plot(json.loads(results.read_text(encoding="utf-8")), results.with_suffix(".png"))
    print(results.with_suffix(".png"))
