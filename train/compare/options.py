"""The flags of compare."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from train.cli.method_flags import MethodFlags, MethodOptions
from train.cli.options import TrainingOptions, check


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
      methods: all, or presets joined by commas; a preset with other values of its fields is written
        lora:rank=1, compacter:phm_dim=8:sites=attention+feed_forward.
      train_size: train on random samples of this size, or of each of several sizes (100,500,1000);
        by default on all examples. Sizes above the number of examples of a task are skipped.
      seeds: number of runs per method, or one number per size (5,5,3).
      heads: alike trains the head, and the pooler of a head that has one, in every method, so that
        methods differ in the backbone alone; as_published trains what each preset does, which for
        the pooler is full alone.
      tune_learning_rates: number of learning rates to try for every method, task and size: its own
        and others a factor of 3 apart on both sides. That of the best validation score is taken
        for all seeds. 1 tries none; a number must be odd.
      tune_beyond: number of further learning rates to try, one by one, while the best rate is the
        smallest or the largest that was tried.
      tuning_seeds: number of seeds that try every learning rate; their mean score decides.
      reference: method that the others are compared with, by a paired bootstrap over seeds and test
        examples; by default full, or without it the first method.
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
    heads: Literal["alike", "as_published"] = "alike"
    tune_learning_rates: int = 1
    tune_beyond: int = 0
    tuning_seeds: int = 1
    reference: str | None = None
    at_once: int = 1
    processes: int = 1
    steps: str | None = None
    epochs: int = 2
    max_length: int = 64
    max_evaluations: int | None = 10
    keep_adapters: bool = False
    overwrite: bool = False
    method_options: MethodFlags = dataclasses.field(default_factory=MethodOptions)

    def check(self) -> None:
        """Raises ValueError for a number out of range."""
        super().check()
        count = self.tune_learning_rates
        wanted = {
            "at_once": (self.at_once >= 1, "at least 1"),
            "processes": (self.processes >= 1, "at least 1"),
            "tune_learning_rates": (count >= 1 and count % 2 == 1, "an odd number, 1 or 3 or 5"),
            "tune_beyond": (
                self.tune_beyond == 0 or (self.tune_beyond > 0 and count > 1),
                "at least 0, and 0 without --tune-learning-rates of at least 3",
            ),
            "tuning_seeds": (self.tuning_seeds >= 1, "at least 1"),
        }
        check(self, wanted)
