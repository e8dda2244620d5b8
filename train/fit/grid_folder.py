"""The folder of a grid, which holds a folder for each of its runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from compacter_jax.files import read_json
from compacter_jax.messages import listing
from train import report
from train.fit.run_record import FORMAT_VERSION, GRID_NAME, RUN_NAME, entries

OF_GRID = ("metrics.json", "report.md", GRID_NAME)


def check_grid_folder(folder: Path, runs: Iterable[str]) -> None:
    """Checks the folder of several runs without writing anything; each run checks its own folder.

    Args:
      folder: the folder of the grid.
      runs: the names of the runs.

    Raises:
      ValueError: if the folder holds a single run, or is not empty and holds no runs.
    """
    if (folder / RUN_NAME).exists():
        raise ValueError(
            f"{folder} holds a single run, whose results would be replaced by those of several "
            "runs; choose another --output-dir"
        )
    there = entries(folder)
    if holds_grid(folder) or not there:
        return
    runs = set(runs)
    known = [name for name in there if (folder / name / RUN_NAME).is_file() or name in runs]
    # A grid of a version that recorded no grids may have no results yet.
    if known and not set(OF_GRID) & set(there):
        return
    raise ValueError(
        f"{folder} is not empty and holds no runs of fit ({listing(there, 3)}); its files are "
        "never touched, not even with --overwrite or --resume; choose another --output-dir"
    )


def open_grid(folder: Path) -> None:
    """Records that a folder holds several runs, so that its results may be replaced."""
    report.write_json(folder / GRID_NAME, {"format_version": FORMAT_VERSION})


def holds_grid(folder: Path) -> bool:
    """Returns True if the metrics.json and report.md of a folder belong to several runs.

    Raises:
      ValueError, OSError: if the file that records this is damaged or cannot be read.
    """
    if (folder / GRID_NAME).is_file():
        read_json(folder / GRID_NAME, {"format_version": int}, required=["format_version"])
        return True
    results = folder / "metrics.json"
    if not results.is_file():
        return False
    try:
        found = read_json(results)
    except ValueError:
        return False
    return {"runs", "summary", "failed"} <= found.keys()


def remove_grid(folder: Path) -> None:
    """Removes the results of several runs, but not the runs themselves."""
    if holds_grid(folder):
        for name in OF_GRID:
            (folder / name).unlink(missing_ok=True)
