"""The flags of compare."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from train.cli.method_flags import MethodFlags, MethodOptions
from train.cli.options import TrainingOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions(TrainingOptions):
    """Train methods with several seeds, and compare what they give.

    Each run is a `fit` in a process of its own, at its method's learning rate. What was interrupted
    goes on with the same command; methods, sizes and seeds that are added are trained beside those
    there are.

    Attributes:
      output_dir: where results.json, report.md, the figures and runs/ go.
      config: a TOML file of flags, as fit takes it; its method is --methods here.
      task: movie, product, tweet, editorial, several of them with commas, or a name for your files.
      methods: all, or presets with commas between them.
      train_size: train on random samples of this size, or of each of several (100,500,1000); by
        default on all there is. Sizes above a task's number of examples are left out.
      seeds: how many runs of each method, or for each size how many (5,5,3).
      at_once: how many seeds of a method to train at once, in one process: pays on an accelerator
        that small batches leave idle; the times of these runs are then shares of their process.
      processes: how many runs to train side by side, each on its share of the processors: on a CPU
        more is done in the same time, though each run takes longer; not for an accelerator.
      steps: updates of each run, or for each size how many, instead of epochs.
      epochs: passes over the training data, where steps are not given.
      max_length: longest input in tokens; what is longer is cut.
      max_evaluations: evaluate so many times in a run at most, evenly spread.
      keep_adapters: keep the adapters, which are otherwise removed once their scores are known.
      overwrite: train finished runs again whose settings were others.
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
