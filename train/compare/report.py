"""Report of a comparison: tables, and scores by trained parameters and by training set size."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compacter_jax.files import replace_file
from train.report import number, table

# Candidate positions of a label: direction from its data point and distance in points, near first.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
_DISTANCES = (7, 14, 24, 36, 50, 66)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Runs of a method on one task with one training set size.

    Attributes:
      task: the task.
      size: the number of training examples.
      method: the preset.
      metric: the metric of the scores.
      scores: the scores on the test split, by seed.
      learning_rate: the learning rate of all runs.
      trained: the number of trained parameters.
      total: the number of all parameters.
      step_seconds: the median over the runs; None if no step was timed.
      peak_memory: the maximum over the runs in bytes.
      peak_device_memory: the maximum of a device with its own memory in bytes, or None.
      adapter_bytes: the size on disk.
    """

    task: str
    size: int
    method: str
    metric: str
    scores: tuple[float, ...]
    learning_rate: float
    trained: int
    total: int
    step_seconds: float | None
    peak_memory: int
    peak_device_memory: int | None
    adapter_bytes: int

    @property
    def mean(self) -> float:
        """Mean of the scores."""
        return statistics.mean(self.scores)

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the scores; 0 for a single score."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0

    @property
    def percent(self) -> float:
        """Trained parameters in percent of all parameters."""
        return 100 * self.trained / self.total


def summaries(records: Iterable[Mapping[str, Any]]) -> list[Summary]:
    """Returns a summary for each task, training set size and method, in order of appearance."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for record in records:
        key = record["task"], record["train_examples"], record["method"]
        groups.setdefault(key, []).append(record)
    return [_summary(runs) for runs in groups.values()]


def _summary(runs: Sequence[Mapping[str, Any]]) -> Summary:
    runs = sorted(runs, key=lambda run: run["seed"])
    first = runs[0]
    seconds = [run["step_seconds"] for run in runs if run["step_seconds"] is not None]
    devices = [run["peak_device_memory_bytes"] for run in runs if "peak_device_memory_bytes" in run]
    return Summary(
        task=first["task"],
        size=first["train_examples"],
        method=first["method"],
        metric=first["metric"],
        scores=tuple(run["test"][first["metric"]] for run in runs),
        learning_rate=first["learning_rate"],
        trained=first["trained_parameters"],
        total=first["total_parameters"],
        step_seconds=statistics.median(seconds) if seconds else None,
        peak_memory=max(run["peak_memory_bytes"] for run in runs),
        peak_device_memory=max(devices, default=None),
        adapter_bytes=max(run["adapter_bytes"] for run in runs),
    )


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Writes report.md, `comparison-TASK-SIZE.png` and, for several sizes, `sizes-TASK.png`."""
    found = summaries(results["runs"])
    settings = results["settings"]
    sections = ["# Comparison", _explanation(settings)]
    for task, of_task in _grouped(found, lambda s: s.task).items():
        by_size = _grouped(of_task, lambda s: s.size)
        if len(by_size) > 1:
            path = folder / f"sizes-{task}.png"
            _save(size_figure(of_task), path)
            sections += [f"## {task}", f"![score by training size]({path.name})"]
            sections.append(size_table(of_task))
        for size, of_size in sorted(by_size.items()):
            path = folder / f"comparison-{task}-{size}.png"
            _save(comparison_figure(of_size), path)
            sections += [f"## {task}, {size:,} training examples"]
            sections += [f"![score by trained parameters]({path.name})", method_table(of_size)]
    if results["failed"]:
        sections.append("## Failed")
        sections.append(table(["run", "reason"], [list(f.values()) for f in results["failed"]]))
    shown = {key: value for key, value in settings.items() if value is not None}
    sections.append("## Settings")
    sections.append(table(["setting", "value"], [[k, f"`{v}`"] for k, v in shown.items()]))
    with replace_file(folder / "report.md") as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _explanation(settings: Mapping[str, Any]) -> str:
    length = "steps" if settings["steps"] else "epochs"
    return (
        f"Backbone `{settings['backbone']}`; {length}: {settings[length]}; batch size: "
        f"{settings['batch_size']}. Each "
        "score is of the test split, with the adapter of the epoch that had the best validation "
        "score; mean and sample standard deviation over the seeds, whose number stands in "
        "parentheses. Parameters trained are in percent of all, adapter and head included. Step: "
        "median, without those that compiled. Memory: largest of the process."
        + (
            f" {settings['processes']} runs at a time, each with its share of the processors."
            if settings.get("processes", 1) > 1
            else ""
        )
    )


def method_table(found: Sequence[Summary]) -> str:
    """Returns a Markdown table of the methods of one task and size."""
    header = ["method", "trained", "of all", "learning rate", found[0].metric, "step", "memory"]
    on_device = all(s.peak_device_memory is not None for s in found)
    header += ["device memory"] if on_device else []
    rows = [
        [
            f"`{s.method}`",
            f"{s.trained:,}",
            f"{s.percent:.3f} %",
            f"{s.learning_rate:g}",
            score(s),
            "-" if s.step_seconds is None else f"{1000 * s.step_seconds:,.0f} ms",
            _megabytes(s.peak_memory),
            *([_megabytes(s.peak_device_memory or 0)] if on_device else []),
            _kilobytes(s.adapter_bytes),
        ]
        for s in found
    ]
    return table([*header, "on disk"], rows)


def size_table(found: Sequence[Summary]) -> str:
    """Returns a Markdown table of the scores of one task, by method and training set size."""
    cells = {(s.method, s.size): score(s) for s in found}
    sizes = sorted({s.size for s in found})
    rows = [
        [f"`{method}`", *(cells.get((method, size), "-") for size in sizes)]
        for method in dict.fromkeys(s.method for s in found)
    ]
    return table([found[0].metric, *(f"{size:,}" for size in sizes)], rows)


def score(summary: Summary) -> str:
    """Formats mean, standard deviation and number of seeds."""
    spread = f" ± {number(summary.deviation)}" if len(summary.scores) > 1 else ""
    return f"{number(summary.mean)}{spread} ({len(summary.scores)})"


def comparison_figure(found: Sequence[Summary]) -> Any:
    """Plots score against trained parameters: a labelled point with error bars for each method."""
    figure, axes = _figure((9, 6))
    for s in found:
        colour = "C3" if s.method.startswith("compacter") else "C0"
        axes.errorbar(
            s.percent,
            s.mean,
            yerr=s.deviation,
            fmt="o",
            color=colour,
            ecolor=(colour, 0.4),
            capsize=3,
            label=s.method,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g} %")
    axes.margins(x=0.12, y=0.12)
    first = found[0]
    axes.set(
        xlabel="trained parameters, of all (log)",
        ylabel=f"test {first.metric}",
        title=f"{first.task}, {first.size:,} training examples",
    )
    axes.grid(alpha=0.3, which="both")
    place_labels(axes, {s.method: (s.percent, s.mean) for s in found})
    return figure


def size_figure(found: Sequence[Summary]) -> Any:
    """Plots score against training set size: a line of means with error bars for each method."""
    figure, axes = _figure((8, 5))
    methods = _grouped(found, lambda s: s.method)
    for i, (method, of_method) in enumerate(methods.items()):
        in_order = sorted(of_method, key=lambda s: s.size)
        # Shifted sideways, so that no error bar hides another.
        shift = 1.03 ** (i - (len(methods) - 1) / 2)
        axes.errorbar(
            [shift * s.size for s in in_order],
            [s.mean for s in in_order],
            yerr=[s.deviation for s in in_order],
            fmt="os^Dv<>P"[i % 8] + "-",
            capsize=3,
            label=method,
        )
    sizes = sorted({s.size for s in found})
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
    axes.set_xticks([], minor=True)
    first = found[0]
    axes.set(xlabel="training examples", ylabel=f"test {first.metric}", title=first.task)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


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


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib  # noqa: PLC0415 - slow to import, and needed only here

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    return plt.subplots(figsize=size, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt  # noqa: PLC0415

    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def _grouped(found: Iterable[Summary], key: Any) -> dict[Any, list[Summary]]:
    groups: dict[Any, list[Summary]] = {}
    for summary in found:
        groups.setdefault(key(summary), []).append(summary)
    return groups


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _kilobytes(size: int) -> str:
    return f"{size / 1e3:,.0f} kB"
