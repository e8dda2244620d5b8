"""Section `many`: rows routed over many adapters, and several runs trained at once."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import bank, jax_worker
from benchmarks.accelerator.programs import METHOD
from benchmarks.accelerator.scale import Scale
from benchmarks.accelerator.section import Checks


def checks(scale: Scale) -> Checks:
    """Returns the checks of this section."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        f"{scale.members:,} members": functools.partial(measured, scale, None)
    }
    for batch in scale.run_batches:
        name = f"{scale.runs} runs at once, batch size {batch}"
        found[name] = functools.partial(measured, scale, batch)
    return found


def measured(scale: Scale, batch_size: int | None) -> dict[str, Any]:
    """Measures runs at once, or without a batch size a bank, as `benchmarks.bank` does."""
    with tempfile.TemporaryDirectory() as folder:
        backbone, files = Path(folder) / "backbone", None
        if batch_size is None:
            jax_worker.write_backbone(dataclasses.asdict(scale.bank), str(backbone))
        else:
            from benchmarks.accelerator import folders  # noqa: PLC0415 - needs packages of `train`

            folders.classifier(backbone, scale.bank)
            if scale.is_toy:  # to tokenize the whole task would take seconds
                files = folders.task_files(Path(folder))
        options = argparse.Namespace(
            backbone=str(backbone),
            task="movie" if files is None else "own",
            method=METHOD,
            members=scale.members,
            rows=scale.bank.rows,
            length=scale.bank.length,
            max_length=16 if scale.is_toy else 64,
            runs=scale.runs,
            rounds=scale.run_rounds,
        )
        if batch_size is None:
            return bank.bank(options)
        return bank.at_once(options, batch_size, files)
