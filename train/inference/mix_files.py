"""Weights of a mix, written for each row: a table, a figure of their means, and a summary."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from train import figures
from train.cli.options import MixOptions
from train.data.rows import check_apart, check_suffix
from train.data.writing import write_rows
from train.inference.mixing import Found

# Weights of consecutive rows -> None; a name where there are several files.
WriteWeights: TypeAlias = Callable[[Found, str | None], None]
# Suffix of the figure beside a file of weights.
FIGURE = ".png"
_COLOURS = (
    *(figures.BLUE, figures.ORANGE, figures.GREEN, figures.PURPLE),
    *(figures.TEAL, figures.PINK, figures.BROWN, figures.GREY),
)


def check_files(options: MixOptions, outputs: Mapping[str, Path], inputs: Sequence[Path]) -> None:
    """Checks the names of the files of a command, those of weights included.

    Args:
      options: the options with the file of weights.
      outputs: what the other files that are written are, in words -> the files.
      inputs: the files that are read.

    Raises:
      ValueError: as `train.data.rows.check_apart`, or if the suffix of the file of weights is that
        of no table.
    """
    written = dict(outputs)
    if (path := options.write_weights) is not None:
        check_suffix(path)
        written["--write-weights"] = path
        written["the figure of --write-weights"] = path.with_suffix(FIGURE)
    check_apart(written, inputs)


@contextlib.contextmanager
def weights_writer(
    path: Path | None, members: Sequence[str], sites: Sequence[str]
) -> Iterator[WriteWeights]:
    """Opens a file for the weights of rows, and draws their means beside it in the end.

    The file has a line for each row and site: `file` where there are several, `row` from 1 on,
    `site`, `weight_NAME` of each member, `entropy_before` and `entropy_after`.

    Args:
      path: the file, as for `write_rows`; None writes nothing.
      members: the names of the members.
      sites: the names of the sites.

    Yields:
      A function that writes the weights of the next rows of a file.
    """
    if path is None:
        yield lambda found, name: None
        return
    rows_of: dict[str | None, int] = {}
    total = np.zeros((len(sites), len(members)))

    def write_weights(found: Found, name: str | None) -> None:
        first = rows_of.get(name, 0) + 1
        rows_of[name] = first - 1 + len(found.weights)
        total[:] += found.weights.sum(0)
        write(_table(found, name, first, members, sites))

    with write_rows(path) as write:
        yield write_weights
    draw(total / max(sum(rows_of.values()), 1), members, sites, path.with_suffix(FIGURE))


def _table(
    found: Found, name: str | None, first: int, members: Sequence[str], sites: Sequence[str]
) -> pa.Table:
    rows, count = len(found.weights), len(sites)
    columns: dict[str, Any] = {} if name is None else {"file": [name] * (rows * count)}
    columns |= {
        "row": np.repeat(np.arange(first, first + rows), count),
        "site": list(sites) * rows,
    }
    flat = found.weights.reshape(rows * count, len(members)).astype(np.float32)
    columns |= {f"weight_{member}": flat[:, at] for at, member in enumerate(members)}
    for column, step in (("entropy_before", 0), ("entropy_after", -1)):
        columns[column] = np.repeat(found.entropies[:, step].astype(np.float32), count)
    return pa.table(columns)


def draw(means: np.ndarray, members: Sequence[str], sites: Sequence[str], path: Path) -> None:
    """Draws the mean weights `[sites, members]` as bars, one for each site, as a PNG file."""
    drawn, axes = figures.new_figure((7, 1.2 + 0.35 * len(sites)))
    left = np.zeros(len(sites))
    for at in range(len(members)):
        colour = _COLOURS[at % len(_COLOURS)]
        axes.barh(np.arange(len(sites)), means[:, at], left=left, label=str(at), color=colour)
        left += means[:, at]
    axes.set(yticks=np.arange(len(sites)), yticklabels=sites, xlabel="mean weight", xlim=(0, 1))
    axes.invert_yaxis()
    axes.grid(visible=False)
    legend = drawn.legend(loc="outside upper center", ncols=min(len(members), 6))
    # Names as they are: as labels, `_a` would be left out, and `$` would begin a formula.
    for text, member in zip(legend.get_texts(), members, strict=True):
        text.set(text=member, parse_math=False)
    figures.save(drawn, path)


def summary(found: Found, members: Sequence[str], sites: Sequence[str]) -> dict[str, Any]:
    """Returns the mean entropies and weights of rows, for the results of `evaluate`."""
    means = found.weights.mean(0, dtype=np.float64)
    return {
        "entropy_before": float(found.entropies[:, 0].mean(dtype=np.float64)),
        "entropy_after": float(found.entropies[:, -1].mean(dtype=np.float64)),
        "mean_weights": {
            site: dict(zip(members, map(float, means[at]), strict=True))
            for at, site in enumerate(sites)
        },
    }
