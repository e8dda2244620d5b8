"""Figures of a recorded comparison: `python -m benchmarks.plot_comparison RESULTS.json`.

The file is the `results.json` of `compare`. With one task and training set size, the figure is
written beside the file, with the suffix .png. Otherwise each task has a figure of its scores by
training set size, `NAME_TASK.png`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from train.compare.figures import comparison_figure, head_of, size_figure
from train.compare.summaries import grouped, summaries
from train.figures import save


def plot(path: Path) -> list[Path]:
    """Writes the figures of a results.json, and returns their paths."""
    results = json.loads(path.read_text(encoding="utf-8"))
    found, settings = summaries(results["runs"]), results["settings"]
    backbone, head = settings["backbone"], head_of(settings)
    if len(grouped(found, lambda s: (s.task, s.size))) == 1:
        drawn = comparison_figure(found, backbone, head, results.get("differences", ()))
        save(drawn, path.with_suffix(".png"))
        return [path.with_suffix(".png")]
    written = []
    for task, of_task in grouped(found, lambda s: s.task).items():
        written.append(path.with_name(f"{path.stem}_{task}.png"))
        save(size_figure(of_task, backbone, head), written[-1])
    return written


if __name__ == "__main__":
    print(*plot(Path(sys.argv[1])))
