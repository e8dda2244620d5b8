"""Section `many`: rows routed over many adapters, and several runs trained at once."""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import bank
from benchmarks.accelerator import folders
from benchmarks.accelerator.programs import METHOD
from benchmarks.accelerator.scale import Scale
from benchmarks.accelerator.section import Checks


def checks(scale: Scale) -> Checks:
    """Returns the checks of this section."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        f"{scale.members:,} members": functools.partial(_with_folder, scale, bank.bank)
    }
    for batch in scale.run_batches:
        measured = functools.partial(bank.at_once, batch_size=batch)
        name = f"{scale.runs} runs at once, batch size {batch}"
        found[name] = functools.partial(_with_folder, scale, measured)
    return found


def _with_folder(
    scale: Scale, measure: Callable[[argparse.Namespace], dict[str, Any]]
) -> dict[str, Any]:
    """Measures with a random backbone, and the options that `benchmarks.bank` would have."""
    with tempfile.TemporaryDirectory() as folder:
        options = argparse.Namespace(
            backbone=str(folders.classifier(Path(folder), scale.bank)),
            task="movie",
            method=METHOD,
            members=scale.members,
            rows=scale.bank.rows,
            length=scale.bank.length,
            max_length=16 if scale.is_toy else 64,
            runs=scale.runs,
            rounds=scale.run_rounds,
        )
        return measure(options)
