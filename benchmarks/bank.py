"""Many on one backbone: several runs trained at once against one after another.

    python -m benchmarks.bank --backbone DIR --json bank.json

Batches are those that `fit` trains on, in its order, so that what padding costs is counted: runs
trained at once pad to the longest of them. A round is a step of every run, done both ways; who
begins changes. The ratio is of neighbours in time, above 1 where at once is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.contest import write
from benchmarks.turns import processor, seconds_of, spread
from train import data, grid, loop, stopping
from train.job import Job, prepare
from train.options import FitOptions


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, and writes JSON where asked to."""
    options = _parser().parse_args(arguments)
    report = {
        "settings": {name: str(value) for name, value in vars(options).items()},
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "runs_at_once": [at_once(options, batch) for batch in options.batch_sizes],
    }
    for row in report["runs_at_once"]:
        print(_text(row, options.runs), flush=True)
    write(options.json, report)


def at_once(options: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """Examples per second of the runs, both ways, and the ratio.

    Args:
      options: of the command line.
      batch_size: of every run.
    """
    jobs = _jobs(options, batch_size)
    batches = list(itertools.islice(zip(*map(_batches, jobs), strict=True), options.rounds))
    alone, joint = _trainers(jobs), grid.Joint(_trainers(jobs))

    def one_after_another(given: Sequence[data.Batch]) -> None:
        metrics = None
        for trainer, batch in zip(alone, given, strict=True):
            training = trainer.learners[0]
            training.state, metrics = training.compute.step(training.state, training.frozen, batch)
        jax.block_until_ready(metrics)

    def together(given: Sequence[data.Batch]) -> None:
        jax.block_until_ready(joint.step(given))

    ways: dict[str, Callable[[Sequence[data.Batch]], None]] = {
        "one_after_another": one_after_another,
        "at_once": together,
    }
    for given, way in itertools.product(batches, ways.values()):  # compiles every shape
        way(given)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number, given in enumerate(batches):
        for name in sorted(ways, reverse=bool(number % 2)):
            seconds[name].append(seconds_of(functools.partial(ways[name], given)))
    examples = options.runs * batch_size
    rates = {name: examples / np.array(values) for name, values in seconds.items()}
    tokens = [[batch["input_ids"].size for batch in given] for given in batches]
    padded = [len(given) * max(row) for given, row in zip(batches, tokens, strict=True)]
    return {
        "batch_size": batch_size,
        "examples_per_second": {name: spread(values) for name, values in rates.items()},
        "ratio": spread(rates["at_once"] / rates["one_after_another"]),
        "padded_tokens": sum(padded) / sum(map(sum, tokens)),
    }


def _jobs(options: argparse.Namespace, batch_size: int) -> list[Job]:
    given = FitOptions(
        backbone=options.backbone,
        task=options.task,
        method=options.method,
        batch_size=batch_size,
        output_dir=Path("never-written"),
    )
    jobs: list[Job] = []
    for seed in range(options.runs):
        each = dataclasses.replace(given, seed=seed)
        jobs.append(prepare(each, like=jobs[0] if jobs else None, num_devices=1))
    return jobs


def _trainers(jobs: Sequence[Job]) -> list[loop.Trainer]:
    trainers: list[loop.Trainer] = []
    for job in jobs:
        like = trainers[0] if trainers else None
        trainers.append(
            loop.Trainer(job, stopping.Stopping(), name=f"{job.options.seed}", like=like)
        )
    return trainers


def _batches(job: Job) -> Iterator[data.Batch]:
    """Of the first epoch, as `fit` draws them."""
    options = job.options
    examples = job.lanes[0].encoded["train"].of_epoch(0)
    return data.batches(examples, options.batch_size, shuffle=True, seed=options.seed)


def _text(row: dict[str, Any], runs: int) -> str:
    alone, at_once = (
        row["examples_per_second"][name]["median"] for name in ("one_after_another", "at_once")
    )
    ratio = row["ratio"]
    return (
        f"{runs} runs of batch {row['batch_size']}: {alone:.1f} examples/s one after another, "
        f"{at_once:.1f} at once; ratio {ratio['median']:.2f} "
        f"({ratio['first_quartile']:.2f} to {ratio['third_quartile']:.2f}), with "
        f"{row['padded_tokens']:.2f} times the tokens"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bank",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--task", default="movie")
    parser.add_argument("--method", default="compacter++")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=15, help="steps that are timed")
    parser.add_argument("--json", metavar="FILE")
    return parser


if __name__ == "__main__":
    main()
