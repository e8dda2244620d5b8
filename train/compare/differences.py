"""The differences between methods and a reference, with their intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from train.compare.bootstrap import difference
from train.compare.plan import Point
from train.compare.single_run import Run, scored


def differences(
    runs_of: Mapping[Point, Sequence[Run]], reference: str | None
) -> list[dict[str, Any]]:
    """Compares every method with the reference on its task and training set size.

    Args:
      runs_of: point -> its runs, at the learning rate that was chosen.
      reference: the preset to compare with; None for full, or without it the first method.

    Returns:
      JSON-ready rows with the fields of `train.compare.bootstrap.Difference`, `verdict` among them.
      Points without a finished run are missing.
    """
    groups: dict[Any, dict[str, Sequence[Run]]] = {}
    for point, runs in runs_of.items():
        if any(run.finished() for run in runs):
            where = point.options.task, point.size
            groups.setdefault(where, {})[point.method] = runs
    return [
        {"task": task, "train_size": size, **row}
        for (task, size), methods in groups.items()
        for row in _of_group(methods, reference)
    ]


def _of_group(methods: Mapping[str, Sequence[Run]], reference: str | None) -> list[dict[str, Any]]:
    """Returns the rows of one task and size."""
    wanted = reference or "full"
    if wanted not in methods:
        if reference is not None:  # none of its runs is finished
            return []
        wanted = next(iter(methods))
    first = next(run for run in methods[wanted] if run.finished())
    metric, labels = first.record()["metric"], first.result().get("label_names", [])
    each = {method: scored(runs, metric) for method, runs in methods.items()}
    rows = []
    for method, of_method in each.items():
        found = difference(of_method, each[wanted], metric, labels)
        if method == wanted or found is None or not found.known:
            continue
        told = dataclasses.asdict(found) | {"verdict": found.verdict}
        rows.append({"method": method, "reference": wanted, "metric": metric, **told})
    return rows
