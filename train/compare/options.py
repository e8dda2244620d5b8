"""The flags of compare."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from train.cli.method_flags import MethodFlags, MethodOptions
from train.cli.options import TrainingOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions(TrainingOptions):
    """Train methods with several seeds and compare their results.

    Each run is a `fit` in its own process, at the learning rate of its method. The same command
    continues an interrupted comparison. New methods, sizes or seeds are trained in addition to the
    existing runs.

    Attributes:
      output_dir: folder for results.json, report.md, the figures and runs/.
      config: TOML file of flags, as for fit; the key method sets --methods.
      task: movie, product, tweet, editorial, several of them joined by commas, or a name for your
        files.
      methods: all, or presets joined by commas.
      train_size: train on random samples of this size, or of each of several sizes (100,500,1000);
        by default on all examples. Sizes above the number of examples of a task are skipped.
      seeds: number of runs per method, or one number per size (5,5,3).
      at_once: number of seeds of a method to train at once in one process. This helps on an
        accelerator that small batches leave idle; reported times are divided by the number of runs
        in the process.
      processes: number of processes to run in parallel, each on its share of the processors. On a
        CPU this increases throughput, although each run takes longer; not for an accelerator.
      steps: number of updates of each run, or one number per size; replaces epochs.
      epochs: number of passes over the training data, if steps are not given.
      max_length: maximum input length in tokens; longer inputs are truncated.
      max_evaluations: maximum number of evaluations per run, evenly spaced.
      keep_adapters: keep the adapters, which are otherwise removed after they are scored.
      overwrite: retrain finished runs that had different settings.
      method_options: changes to the presets that have the field, where not None.
    """

    output_dir: Path
    config: Path | None = None
    task: str = "movie"
    methods: str = "all"
    train_size: str | None = None
    seeds: str = "3"
    at_once: int = 1
    processes: int = 1
    steps: str | None = None
    epochs: int = 2
    max_length: int = 64
    max_evaluations: int | None = 10
    keep_adapters: bool = False
    overwrite: bool = False
    method_options: MethodFlags = dataclasses.field(default_factory=MethodOptions)
