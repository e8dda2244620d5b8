"""Many adapters on one backbone: a forward pass for rows of many, and several runs at once.

    python -m benchmarks.bank --backbone DIR --json bank.json

The first part compares a forward pass whose rows belong to random members of a bank with a pass
with a single adapter. The ratio is between runs next to each other in time, and below 1 where the
bank is faster. It also reports the bytes of the bank, predicted and actual.

The second part compares runs of `fit` that are trained at once with runs one after another. Batches
are those of `fit`, in its order, so that the cost of padding is included: runs trained at once pad
to the longest of them. A round is a step of every run in both ways, which take turns to begin. The
ratio is between rounds next to each other in time, and above 1 where training at once is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from benchmarks.contest import write
from benchmarks.jax_worker import quick_key, random_members
from benchmarks.turns import alternate, processor, seconds_of, spread

if TYPE_CHECKING:
    from train.data import batching
    from train.fit.job import Job
    from train.fit.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the measurements, prints them, and writes JSON if requested."""
    options = _parser().parse_args(arguments)
    report: dict[str, Any] = {
        "settings": {name: str(value) for name, value in vars(options).items()},
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "bank": bank(options),
        "runs_at_once": [],
    }
    print(_bank_text(report["bank"]), flush=True)
    for batch in options.batch_sizes:
        report["runs_at_once"].append(at_once(options, batch))
        print(_text(report["runs_at_once"][-1], options.runs), flush=True)
    write(options.json, report)


def bank(options: argparse.Namespace) -> dict[str, Any]:
    """Measures a forward pass with one adapter, and one routed over the members of a bank.

    Args:
      options: the options of the command line.

    Returns:
      Seconds and bytes of both, JSON-ready.
    """
    backbone = cj.load_backbone(options.backbone, head="sequence_classification", num_labels=2)
    method = cj.preset(options.method)
    one = cj.Adapted(backbone.module, method)
    params = cj.init_adapters(one, backbone, quick_key(0))
    many, banked = cj.stack_adapters([(one, params)], backbone, capacity=options.members)
    banked = random_members(banked, backbone.params)
    of_backbone = flatten_dict(backbone.params)
    stored = [leaf for path, leaf in flatten_dict(banked).items() if path not in of_backbone]
    generator = np.random.default_rng(0)
    rows, length = options.rows, options.length
    ids = generator.integers(5, backbone.module.config.vocab_size, (rows, length))
    mask = np.ones((rows, length), np.int32)
    single = jax.jit(lambda params: one.apply({"params": params}, ids, mask))
    routed = jax.jit(
        lambda params, members: many.apply({"params": params}, ids, mask, adapter_ids=members)
    )
    runs = {
        "one_adapter": lambda: single(params).block_until_ready(),
        "bank": lambda: routed(
            banked, generator.integers(0, options.members, rows)
        ).block_until_ready(),
    }
    for run in runs.values():
        run()
    timed = {name: functools.partial(seconds_of, run) for name, run in runs.items()}
    seconds = alternate(timed, options.rounds)
    trained, _ = cj.partition(params, cj.label_params(params, method))
    of_one = sum(leaf.nbytes for leaf in jax.tree.leaves(trained))
    return {
        "members": options.members,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio": spread(np.divide(seconds["bank"], seconds["one_adapter"])),
        # One byte per position says whether it is taken.
        "bytes_predicted": options.members * (of_one + 1),
        "bytes": sum(leaf.nbytes for leaf in stored),
    }


def _bank_text(result: dict[str, Any]) -> str:
    one, many = (1000 * result["seconds"][name]["median"] for name in ("one_adapter", "bank"))
    ratio = result["ratio"]
    return (
        f"forward, one adapter {one:.0f} ms, rows routed over {result['members']:,} {many:.0f} ms; "
        f"ratio {ratio['median']:.3f} ({ratio['first_quartile']:.3f} to "
        f"{ratio['third_quartile']:.3f}); bank of {result['bytes']:,} bytes, predicted "
        f"{result['bytes_predicted']:,}"
    )


def at_once(
    options: argparse.Namespace, batch_size: int, files: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Measures the examples per second of the runs in both ways, and their ratio.

    Args:
      options: the options of the command line.
      batch_size: the batch size of every run.
      files: option of `fit` -> file of the examples, in place of those of the task.
    """
    from train.fit import grid  # noqa: PLC0415 - the first part needs none of its packages

    jobs = _jobs(options, batch_size, files or {})
    batches = list(itertools.islice(zip(*map(_batches, jobs), strict=True), options.rounds))
    alone, stacked = _trainers(jobs), grid.StackedRuns(_trainers(jobs))

    def one_after_another(given: Sequence[batching.Batch]) -> None:
        metrics = None
        for trainer, batch in zip(alone, given, strict=True):
            training = trainer.learners[0]
            numbers = trainer.numbers(training)
            training.state, metrics = training.compute.step(
                training.state, training.frozen, batch, numbers
            )
        jax.block_until_ready(metrics)

    def together(given: Sequence[batching.Batch]) -> None:
        jax.block_until_ready(stacked.step(given))

    ways: dict[str, Callable[[Sequence[batching.Batch]], None]] = {
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


def _jobs(options: argparse.Namespace, batch_size: int, files: Mapping[str, str]) -> list[Job]:
    from train.fit.job import prepare  # noqa: PLC0415
    from train.fit.options import FitOptions  # noqa: PLC0415

    given = FitOptions(
        backbone=options.backbone,
        task=options.task,
        method=options.method,
        batch_size=batch_size,
        max_length=options.max_length,
        output_dir=Path("never-written"),
        **files,
    )
    jobs: list[Job] = []
    for seed in range(options.runs):
        each = dataclasses.replace(given, seed=seed)
        jobs.append(prepare(each, like=jobs[0] if jobs else None, num_devices=1))
    return jobs


def _trainers(jobs: Sequence[Job]) -> list[Trainer]:
    from train.fit import stopping, trainer  # noqa: PLC0415

    trainers: list[Trainer] = []
    for job in jobs:
        like = trainers[0] if trainers else None
        trainers.append(
            trainer.Trainer(job, stopping.Stopping(), name=f"{job.options.seed}", like=like)
        )
    return trainers


def _batches(job: Job) -> Iterator[batching.Batch]:
    """Yields the batches of the first epoch, as `fit` draws them."""
    from train.data import batching  # noqa: PLC0415

    options = job.options
    examples = job.task_runs[0].encoded["train"].of_epoch(0)
    return batching.batches(examples, options.batch_size, shuffle=True, seed=options.seed)


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
    parser.add_argument("--members", type=int, default=1000, help="of the bank")
    parser.add_argument("--rows", type=int, default=32, help="of the forward pass")
    parser.add_argument("--length", type=int, default=64, help="of its rows, in tokens")
    parser.add_argument("--max-length", type=int, default=64, help="of the texts of the runs")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=15, help="steps that are timed")
    parser.add_argument("--json", metavar="FILE")
    return parser


if __name__ == "__main__":
    main()
