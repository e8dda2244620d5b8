"""The flags of fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from compacter_jax.methods.base import MethodConfig
from compacter_jax.methods.trained_sites import with_trained_sites
from train.cli.compositions import ChoosesMethod
from train.cli.method_flags import MethodFlags, MethodName, MethodOptions, is_composition
from train.cli.options import HostOptions, TrainingOptions, check
from train.cli.speech import SpeechOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOptions(ChoosesMethod, HostOptions, SpeechOptions, TrainingOptions):
    """Fine-tune a backbone on a task and save the adapter of the best epoch.

    Several tasks joined by commas are trained together: every batch is of one task. Each task then
    has its own folder in output_dir.

    Attributes:
      output_dir: folder for adapter/, metrics.json, curves.png, report.md and checkpoints/.
      config: TOML file of flags (`learning_rate = 3e-3`); flags on the command line take
        precedence. It may name a base file, and have tables [tasks.NAME] for single tasks.
      train_size: train on a random sample of this many examples.
      seed: seed of the initial values, the data order and dropout.
      seeds: several seeds joined by commas, trained at once. Each run has its own folder in
        output_dir; report.md there has every result, the means and the standard deviations.
      learning_rates: several learning rates joined by commas; combined with every seed.
      train_sizes: several training set sizes joined by commas; combined with every seed and rate.
      mixture: sampling rate of each of several tasks: temperature=1 is proportional to the number
        of examples, temperature=10 is almost uniform, limit=65536 caps the number that counts.
      adapters: with several tasks, one shared adapter or one adapter per task; heads are never
        shared. In a translation one shared adapter, or one per direction or per target language.
      parallel_files: tables with a column of texts for each language, null where there is none:
        those of train, validation and test, in this order. Without the second, a part of the first
        is held out. Files with the columns source, target, source_language and target_language are
        given by train_file and the like.
      directions: directions of a translation joined by commas, as in en-de,de-en, or languages that
        speech is written in, as in de,es; or all that the training file has.
      temperature: how often directions of different size are drawn: 1 is proportional to the number
        of sentences, 5 is more uniform; the exponent is its inverse.
      trained_sites: linear layers of the backbone that are trained whole beside the adapters, and
        saved with them, by the names of sites: query and value for example, or cross_attention for
        its four layers.
      add_to: folder of a translation with an adapter for each direction, or for each target
        language. The new adapters are written beside them, and the others stay untouched.
      max_steps: stop after this many updates, even within an epoch.
      checkpoint_steps: save the training state every N steps, in addition to every evaluation; 0
        saves at evaluations only.
      keep_checkpoints: number of latest checkpoints to keep, in addition to the best.
      mesh: device mesh of a host, such as data=2,model=4, to shard a backbone that is too large for
        one device. Each of the 2 rows of 4 devices computes its part of a batch.
      resume: continue an interrupted run in output_dir.
      overwrite: replace the run in output_dir.
      log: csv, or tensorboard in addition; records loss, learning rate, gradient norm and speed of
        every step, and every evaluation.
      profile: write a trace of a few steps, for Perfetto or TensorBoard.
      peak_flops: peak floating-point operations per second of one device, used to report
        utilisation; by default the known peak of the device kind.
      prompt_words: for prompts initialised from the vocabulary, the words whose tokens they start
        as; by default the most common tokens of the training texts.
      train_members: names of the members of a composition to train, joined by commas; by default
        its presets.
      method_options: changes to the preset, where not None; for a composition, to the presets that
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
    adapters: Literal["shared", "per_task", "per_direction", "per_target"] = "shared"
    parallel_files: tuple[Path, ...] | None = None
    directions: str | None = None
    temperature: float = 1.0
    trained_sites: tuple[str, ...] = ()
    add_to: Path | None = None
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
        """Raises ValueError for a number out of range, or for flags that exclude each other."""
        super().check()
        self.check_hosts()
        self.check_audio()
        wanted = {
            "train_size": (self.train_size is None or self.train_size >= 1, "at least 1"),
            "seed": (0 <= self.seed < 2**31, "from 0 to 2**31 - 1"),
            "max_steps": (self.max_steps is None or self.max_steps >= 1, "at least 1"),
            "checkpoint_steps": (self.checkpoint_steps >= 0, "at least 0"),
            "keep_checkpoints": (self.keep_checkpoints >= 1, "at least 1"),
            "temperature": (1 <= self.temperature < float("inf"), "at least 1"),
            "peak_flops": (
                self.peak_flops is None or 0 < self.peak_flops < float("inf"),
                "above 0",
            ),
        }
        check(self, wanted)
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite contradict each other; give one")
        if self.add_to is not None and not self.has_members:
            raise ValueError("--add-to needs --adapters per_direction or per_target")
        self.check_members()
        if is_composition(self.method) and "," in self.task and self.adapters == "shared":
            raise ValueError("tasks cannot share a composition; give --adapters per_task")

    def method_config(self) -> MethodConfig:
        """Returns the method, with the weights that are trained beside it."""
        method = super().method_config()
        return with_trained_sites(method, self.trained_sites) if self.trained_sites else method

    def task_names(self) -> list[str]:
        """Returns the names of the tasks.

        Raises:
          ValueError: if a name is empty or given twice, or if files are given for several tasks.
        """
        names = [name.strip() for name in self.task.split(",")]
        if not all(names) or len(set(names)) < len(names):
            raise ValueError(
                f"--task {self.task!r} must be different names with commas between them"
            )
        files = (self.train_file, self.validation_file, self.test_file, self.directions)
        if len(names) > 1 and any(files):
            raise ValueError("files are those of one task; leave --train-file and the like out")
        return names

    def computation(self) -> dict[str, Any]:
        """Returns how the backbone computes, as arguments of `compacter_jax.load_backbone`."""
        return {
            "dropout_rate": self.backbone_dropout,
            "dtype": jnp.dtype(self.dtype),
            "remat": self.remat,
        }

    @property
    def has_members(self) -> bool:
        """True if each direction, or each target language, has an adapter of its own."""
        return self.adapters in ("per_direction", "per_target")

    @property
    def is_grid(self) -> bool:
        """True if the options describe several runs to train at once."""
        lists = (self.seeds, self.learning_rates, self.train_sizes)
        return any(values is not None for values in lists)

    def peak_learning_rate(self, defaults: Mapping[str, float]) -> float:
        """Returns the learning rate that is given, or the default of the method.

        Args:
          defaults: preset -> learning rate.

        Raises:
          ValueError: for a composition whose presets do not all have the same default.
        """
        if self.learning_rate is not None or self.composition is None:
            return self.learning_rate or defaults[self.method]
        names = self.composition.presets()
        rates = {defaults[name] for name in names}
        if len(rates) != 1:
            told = (
                ", ".join(f"{name} {defaults[name]:g}" for name in names) or "no member is a preset"
            )
            raise ValueError(
                "a composition of saved adapters, or of presets with different learning rates, "
                f"has no default learning rate ({told}); give --learning-rate"
            )
        return rates.pop()
