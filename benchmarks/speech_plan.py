"""Operations and minutes of the runs of `benchmarks.speech`, before any of them begins."""

from __future__ import annotations

import argparse
import functools
import json
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.translation_flops import GENERATION, REACHED, measured_rate, operations_of
from train.data import batching

if TYPE_CHECKING:
    from benchmarks.speech import Run

INPUTS = ("input_features", "attention_mask", "decoder_input_ids")
_BINS, _LONGEST = 80, 3000


def epochs_of(options: argparse.Namespace, run: Run) -> int:
    """Returns the number of epochs that a run's steps need."""
    # The recogniser reads every utterance once.
    rows = options.train_utterances * max(1, len(run.languages))
    return -(-run.steps // batching.num_batches(rows, options.batch_size))


def predict(
    options: argparse.Namespace, runs: Sequence[Run], created: Path, files: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """Returns for each condition the operations of a step, of its runs, and predicted minutes.

    Args:
      options: the options of the command line.
      runs: the runs.
      created: the folder of the random backbone.
      files: split -> file of its rows.
    """
    rate = options.flops_per_second or measured_rate()
    frames, target = mean_lengths(files["train"], created)
    tests = len(files.keys() - {"train", "validation"})
    found: dict[str, dict[str, Any]] = {}
    # Runs that differ only in their seed or in their language have the same operations.
    of_one = functools.cache(
        lambda method, members: _operations(
            created, options.batch_size, (frames, target), method, members
        )
    )
    for run in runs:
        members = len(run.languages) if run.adapters == "per_target" else 0
        one_step, forward = of_one(run.method, members)
        rows = options.test_utterances * max(1, len(run.languages))
        evaluations = min(options.max_evaluations, epochs_of(options, run))
        # Evaluations in training, one more of the best epoch, and generation for the tests.
        passes = evaluations + 1 + tests * GENERATION
        work = run.steps * one_step + rows * forward / options.batch_size * passes
        row = found.setdefault(
            run.condition,
            {"condition": run.condition, "runs": 0, "flops_per_step": one_step, "flops": 0.0},
        )
        row["runs"] += 1
        row["flops"] += work
    for row in found.values():
        row |= {"padded_frames": frames, "padded_target": target, "rate": rate}
        row["minutes"] = row["flops"] / (REACHED * rate) / 60
    return list(found.values())


def mean_lengths(train: Path, created: Path) -> tuple[int, int]:
    """Returns the mean numbers of padded frames and of padded tokens of up to 800 rows."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

    tokenizer = AutoTokenizer.from_pretrained(created, trust_remote_code=False)
    lines = train.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:: max(1, len(lines) // 800)]]
    frames = []
    for row in rows:
        with wave.open(str(train.parent / row["audio"])) as file:
            frames.append(100 * file.getnframes() // file.getframerate())
    texts = [row["target"] for row in rows]
    tokens = [2 + len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return tuple(  # type: ignore[return-value]
        round(float(buckets[np.searchsorted(buckets, np.array(lengths))].mean()))
        for lengths, buckets in (
            (frames, np.array(batching.bucket_lengths(_LONGEST, batching.FRAMES))),
            (tokens, np.array(batching.bucket_lengths(1000, batching.TARGETS))),
        )
    )


def _operations(
    created: Path, batch_size: int, lengths: tuple[int, int], flags: tuple[str, ...], members: int
) -> tuple[int, int]:
    """Returns the operations of one step and of one forward pass of a batch.

    Args:
      created: the folder of the backbone.
      batch_size: the number of rows.
      lengths: the numbers of frames and of target tokens.
      flags: the method and its flags.
      members: the number of members of a bank; 0 without one.
    """
    frames, target = lengths
    of_target = jax.ShapeDtypeStruct((batch_size, target), jnp.int32)
    batch: dict[str, Any] = dict.fromkeys(("decoder_input_ids", "labels"), of_target)
    batch["input_features"] = jax.ShapeDtypeStruct((batch_size, frames, _BINS), jnp.float32)
    batch["attention_mask"] = jax.ShapeDtypeStruct((batch_size, frames), jnp.int32)
    return operations_of(created, batch, INPUTS, flags, members)
