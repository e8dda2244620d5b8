"""Operations and minutes of the runs of `benchmarks.translation`, before any of them begins."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import compacter_jax as cj
from benchmarks import translation_data
from benchmarks.turns import seconds_of
from compacter_jax.compositions.bank import Bank
from compacter_jax.models.loading import module_from_config, read_config
from train.__main__ import _parsed
from train.compute import flops, step
from train.compute.program import gradient_program, traced
from train.data import batching
from train.tasks import parallel

if TYPE_CHECKING:
    from benchmarks.translation import Run

INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")
# A step reaches this part of the rate of large products: softmax, norms and the optimizer read and
# write memory beside them.
REACHED = 0.5
# Generation multiplies one token of a row after another, so that weights are read for each.
GENERATION = 4.0


def epochs_of(options: argparse.Namespace, run: Run) -> int:
    """Returns the number of epochs that a run's steps need."""
    counts = translation_data.counts(options.train, tuple(options.languages))
    rows = sum(counts[name] for name in run.directions)
    return -(-run.steps // batching.num_batches(rows, options.batch_size))


def predict(
    options: argparse.Namespace, runs: Sequence[Run], created: Path
) -> list[dict[str, Any]]:
    """Returns for each condition the operations of a step, of its runs, and predicted minutes.

    Args:
      options: the options of the command line.
      runs: the runs.
      created: the folder of the random backbone, which has the tokenizer.
    """
    rate = options.flops_per_second or measured_rate()
    length = _mean_length(options, created)
    rows_validated = translation_data.counts(options.validation, tuple(options.languages))
    found: dict[str, dict[str, Any]] = {}
    # Runs that differ only in their seed or in their direction have the same operations.
    of_one = functools.cache(functools.partial(_operations, created, options.batch_size, length))
    for run in runs:
        members = len(run.directions) if run.adapters == "per_direction" else 0
        one_step, forward = of_one(run.method, members)
        validated = sum(rows_validated[name] for name in run.directions)
        evaluations = min(options.max_evaluations, epochs_of(options, run))
        per_row = forward / options.batch_size
        work = run.steps * one_step + validated * per_row * (evaluations + 1 + GENERATION)
        row = found.setdefault(
            run.condition,
            {"condition": run.condition, "runs": 0, "flops_per_step": one_step, "flops": 0},
        )
        row["runs"] += 1
        row["flops"] += work
    for row in found.values():
        row |= {"padded_length": length, "rate": rate}
        row["minutes"] = row["flops"] / (REACHED * rate) / 60
    return list(found.values())


def measured_rate() -> float:
    """Measures the FLOP/s of large products in float32 on this device."""
    x = jnp.ones((1024, 1024), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = min(seconds_of(lambda: product(x).block_until_ready()) for _ in range(10))
    return 2 * 1024**3 / best


def _mean_length(options: argparse.Namespace, created: Path) -> int:
    """Returns the mean length of padded sentences, of up to 500 of each language."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

    tokenizer = AutoTokenizer.from_pretrained(created, trust_remote_code=False)
    table = parallel.read_table(options.train)
    texts = [
        text
        for language in options.languages
        for text in [x for x in table[language] if isinstance(x, str)][:500]
    ]
    lengths = np.array([len(ids) + 1 for ids in tokenizer(texts)["input_ids"]])
    buckets = np.array(batching.bucket_lengths(options.max_length))
    cut = np.minimum(lengths, options.max_length)
    return round(float(buckets[np.searchsorted(buckets, cut)].mean()))


def _operations(
    created: Path, batch_size: int, length: int, flags: tuple[str, ...], members: int
) -> tuple[int, int]:
    """Returns the operations of one step and of one forward pass of a batch.

    Args:
      created: the folder of the backbone.
      batch_size: the number of rows.
      length: the length of inputs and targets in tokens.
      flags: the method and its flags.
      members: the number of members of a bank; 0 without one.
    """
    shape = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    batch: dict[str, Any] = dict.fromkeys((*INPUTS, "labels"), shape)
    return operations_of(created, batch, INPUTS, flags, members)


def operations_of(
    created: Path,
    batch: dict[str, Any],
    inputs: tuple[str, ...],
    flags: Sequence[str],
    members: int,
) -> tuple[int, int]:
    """Returns the operations of one step and of one forward pass of a batch.

    Args:
      created: the folder of the backbone.
      batch: the shapes of the inputs and the labels, `[rows, …]`.
      inputs: the names of the inputs, in the order of the model's arguments.
      flags: the method and its flags.
      members: the number of members of a bank; 0 without one.
    """
    module = module_from_config(read_config(created), head="conditional_generation")
    required = ["--backbone", str(created), "--output-dir", "unused"]
    method = _parsed("fit", ["--method", *flags, *required]).method_config()
    model = cj.Adapted(module, Bank(method, size=members) if members else method)
    params = jax.eval_shape(model.init, jax.random.key(0), *module.dummy_inputs())["params"]
    rows = batch["labels"].shape[:1]
    batch = {**batch, "weights": jax.ShapeDtypeStruct(rows, jnp.float32)}
    if members:
        batch["adapter_ids"] = jax.ShapeDtypeStruct(rows, jnp.int32)
    halves = cj.partition(params, cj.label_params(params, model.method))
    apply, loss = step.apply_function(model, inputs), step.loss_function("tokens")
    both = flops.of_step(gradient_program(apply, loss, *halves, batch))
    forward = traced(lambda params, batch: apply(params, batch, None), params, batch)
    return both, flops.of_step(forward)
