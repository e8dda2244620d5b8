"""The flags of fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from train.cli.compositions import ChoosesMethod
from train.cli.method_flags import MethodFlags, MethodName, MethodOptions, is_composition
from train.cli.options import HostOptions, TrainingOptions, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions(ChoosesMethod, HostOptions, TrainingOptions):
    """Fine-tune a backbone on a task and save the adapter of the best epoch.

    Several tasks with commas are trained together, a batch of one after a batch of another; each
    then has a folder of its own in output_dir.

    Attributes:
      output_dir: where adapter/, metrics.json, curves.png, report.md and checkpoints/ go.
      config: a TOML file of flags (`learning_rate = 3e-3`); flags on the command line win. It may
        name a base, and hold tables [tasks.NAME] for single tasks.
      train_size: train on a random sample of this size.
      seed: of initial values, order of the data and dropout.
      seeds: several seeds with commas: as many runs at once, each in a folder of its own in
        output_dir, which says what each gives and mean and spread of all.
      learning_rates: several learning rates with commas; with seeds, all pairs.
      train_sizes: several training sizes with commas, likewise.
      mixture: how often each of several tasks comes: temperature=1 in proportion to its examples,
        temperature=10 almost equally, limit=65536 as if none had more.
      adapters: of several tasks, one that they share, or one for each; heads are never shared.
      max_steps: stop after so many updates, within an epoch or not.
      checkpoint_steps: save the training state every so many steps as well as at every evaluation;
        0 does not.
      keep_checkpoints: how many of the last to keep, beside the best.
      mesh: data=2,model=4 to divide a backbone too large for one device over those of a host: two
        rows, each with a part of every batch, of four devices that divide its products.
      resume: go on where an interrupted run in output_dir stopped.
      overwrite: replace the run in output_dir.
      log: csv, or tensorboard as well: losses, learning rate, norm of the gradient and speed of
        every step, and every evaluation.
      profile: write a trace of some steps, for Perfetto or TensorBoard.
      peak_flops: floating-point operations per second that one device can do, to say what part of
        them is used; by default those of its kind, where known.
      prompt_words: for prompts that start as embeddings of the vocabulary, the words whose tokens
        they are; by default the commonest tokens of the training texts.
      train_members: which members of a composition to train, by name, with commas between them; by
        default the presets in it.
      method_options: changes to the preset, where not None; of a composition, to the presets that
        have the field.
    """

    output_dir: Path
    method: MethodName = "compacter++"
    train_members: str | None = None
    config: Path | None = None
    train_size: int | None = None
    seed: int = 0
    seeds: str | None = None
    learning_rates: str | None = None
    train_sizes: str | None = None
    mixture: str = "temperature=1"
    adapters: Literal["shared", "per_task"] = "shared"
    max_steps: int | None = None
    checkpoint_steps: int = 500
    keep_checkpoints: int = 2
    mesh: str | None = None
    resume: bool = False
    overwrite: bool = False
    log: Literal["csv", "tensorboard"] = "csv"
    profile: bool = False
    peak_flops: float | None = None
    prompt_words: str | None = None
    method_options: MethodFlags = dataclasses.field(default_factory=MethodOptions)

    def check(self) -> None:
        """ValueError for a number that cannot work, or flags that do not go together."""
        super().check()
        self.check_hosts()
        wanted = {
            "train_size": (self.train_size is None or self.train_size >= 1, "at least 1"),
            "seed": (0 <= self.seed < 2**31, "from 0 to 2**31 - 1"),
            "max_steps": (self.max_steps is None or self.max_steps >= 1, "at least 1"),
            "checkpoint_steps": (self.checkpoint_steps >= 0, "at least 0"),
            "keep_checkpoints": (self.keep_checkpoints >= 1, "at least 1"),
            "peak_flops": (
                self.peak_flops is None or 0 < self.peak_flops < float("inf"),
                "above 0",
            ),
        }
        check(self, wanted)
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite contradict each other; give one")
        self.check_members()
        if is_composition(self.method) and "," in self.task and self.adapters == "shared":
            raise ValueError("tasks cannot share a composition; give --adapters per_task")

    @property
    def is_grid(self) -> bool:
        """Whether there are several runs to be trained at once."""
        lists = (self.seeds, self.learning_rates, self.train_sizes)
        return any(values is not None for values in lists)

    def peak_learning_rate(self, defaults: Mapping[str, float]) -> float:
        """The learning rate given, or of `defaults` the method's.

        Raises:
          ValueError: for a composition whose presets do not have one between them.
        """
        if self.learning_rate is not None or self.composition is None:
            return self.learning_rate or defaults[self.method]
        names = self.composition.presets()
        rates = {defaults[name] for name in names}
        if len(rates) != 1:
            told = ", ".join(f"{name} {defaults[name]:g}" for name in names) or "none of a preset"
            raise ValueError(
                f"a composition of saved adapters, or of presets with different learning rates, is "
                f"trained at one rate ({told}); give --learning-rate"
            )
        return rates.pop()
