"""The flags of every subcommand, as dataclasses that tyro draws the command line from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from train.cli.compositions import Node

EvaluateBy: TypeAlias = Literal["scoring", "generation"]


SplitProtocol: TypeAlias = Literal["official", "paper"]


BackboneDtype: TypeAlias = Literal["float32", "bfloat16", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """Which backbone, and how it computes.

    Attributes:
      backbone: folder of a Hugging Face checkpoint, or its id on the hub.
      dtype: what matrix products compute in; what is trained stays float32.
      backbone_dtype: what weights that are not trained are stored in; int8 is for kernels and the
        vocabulary, with a scale for each of their channels.
    """

    backbone: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    backbone_dtype: BackboneDtype = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What to learn.

    Attributes:
      task: movie, product, tweet or editorial; a benchmark: cola, sst2, mrpc, qqp, stsb, mnli,
        qnli, rte, wnli, boolq, cb, copa, multirc, record, wic, wsc, squad, or a translation such as
        wmt16-ro-en; any other name for your own files; or span_corruption, the pre-training of T5,
        whose files are plain text.
      train_file: your own examples: .parquet, .jsonl, .csv or .tsv with the columns sentence, maybe
        sentence2, and label, score or target; a target is text, which T5 learns to write.
      validation_file: the same; the best epoch is chosen on it. span_corruption holds out a part of
        the text where there is none.
      test_file: the same; scored once, at the end.
      data_dir: folder of a benchmark's data set, laid out as its repository on the hub (for mnli
        mnli/train-*.parquet ...); by default it is read from the hub.
      split_protocol: of benchmarks: official takes the hub's splits, and a test split where its
        labels are published; paper halves the validation split of small data sets into validation
        and test, and holds out 1,000 training examples of large ones, with seed 42.
      regression: predict the column score instead of label.
      label_names: the labels of your own files, in the order of the adapter's outputs; integers 0,
        1, 2 in them stand for the first, second, third. By default the labels of train_file,
        sorted.
      max_length: longest input in tokens; what is longer is cut, and counted.
    """

    task: str = "custom"
    train_file: Path | None = None
    validation_file: Path | None = None
    test_file: Path | None = None
    data_dir: Path | None = None
    split_protocol: SplitProtocol = "official"
    regression: bool = False
    label_names: tuple[str, ...] | None = None
    max_length: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextToTextOptions:
    """How a task is cast as text; for T5 alone.

    Attributes:
      prefix: what inputs begin with, in place of the task's name: "PREFIX sentence: ...", for pairs
        "PREFIX sentence1: ... sentence2: ...", for your own targets "PREFIX: ...".
      max_target_length: longest target in tokens; what is longer is cut, and counted.
      score_step: regression rounds scores to multiples of it, and learns these as text.
      evaluate_by: how labels are predicted: by the likelihood of each label's text, or by
        generating text, which may be no label; scores and texts are always generated.
      num_beams: of generation; 1 is greedy.
      noise_density: of span_corruption, the part of the tokens that is taken out.
      mean_span_length: of span_corruption, tokens taken out at one place, on average.
    """

    prefix: str | None = None
    max_target_length: int = 64
    score_step: float = 0.2
    evaluate_by: EvaluateBy = "scoring"
    num_beams: int = 1
    noise_density: float = 0.15
    mean_span_length: float = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(TextToTextOptions, TaskOptions, BackboneOptions):
    """How to train, whatever the method.

    Attributes:
      epochs: passes over the training data.
      max_evaluations: evaluate after so many of the epochs at most, evenly spread, instead of after
        each; the adapter is that of the best of them.
      batch_size: examples per update, over all devices.
      accumulation_steps: parts to divide a device's share of a batch into, to save memory.
      eval_batch_size: examples per batch of evaluation.
      learning_rate: peak of the schedule; by default the method's own, which
        `train/objectives/learning_rates.py` lists.
      warmup_fraction: part of all steps in which the learning rate rises from 0.
      weight_decay: of AdamW, on every trained parameter.
      clip_norm: largest norm of the gradient of the trained parameters; 0 does not clip.
      backbone_dropout: rate in the backbone, in place of its configuration's.
      remat: what the backward pass computes again, to save memory: full, each layer from its input;
        dots, all but the products with weights.
    """

    epochs: int = 10
    max_evaluations: int | None = None
    batch_size: int = 32
    accumulation_steps: int = 1
    eval_batch_size: int = 64
    learning_rate: float | None = None
    warmup_fraction: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    backbone_dropout: float | None = None
    remat: Literal["off", "full", "dots"] = "off"

    @property
    def composition(self) -> Node | None:
        """The composition that a command is told; None for commands that take none."""
        return None

    def check(self) -> None:
        """ValueError for a number that cannot work."""
        wanted = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "max_evaluations": (
                self.max_evaluations is None or self.max_evaluations >= 1,
                "at least 1",
            ),
            "max_target_length": (self.max_target_length >= 2, "at least 2"),
            "score_step": (0 < self.score_step < float("inf"), "above 0"),
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "accumulation_steps": (self.accumulation_steps >= 1, "at least 1"),
            "eval_batch_size": (self.eval_batch_size >= 1, "at least 1"),
            "learning_rate": (
                self.learning_rate is None or 0 < self.learning_rate < float("inf"),
                "above 0",
            ),
            "warmup_fraction": (0 <= self.warmup_fraction < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < float("inf"), "at least 0"),
            "clip_norm": (0 <= self.clip_norm < float("inf"), "at least 0"),
            "backbone_dropout": (
                self.backbone_dropout is None or 0 <= self.backbone_dropout < 1,
                "in [0, 1)",
            ),
        }
        check(self, wanted)


def check(options: Any, wanted: Mapping[str, tuple[bool, str]]) -> None:
    """ValueError for the first field whose condition does not hold."""
    for name, (holds, want) in wanted.items():
        if not holds:
            raise ValueError(f"{name}={getattr(options, name)} must be {want}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostOptions:
    """Several processes, on one host or on many, that train one model together.

    Attributes:
      distributed: let JAX find the other processes: on a slice of TPUs, under SLURM or Open MPI.
      coordinator_address: host:port of the first process, where JAX cannot find it; then every
        process is started with its own process_id.
      num_processes: how many there are.
      process_id: of this one, from 0 on.
    """

    distributed: bool = False
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def check_hosts(self) -> None:
        """ValueError for flags that do not go together."""
        given = {
            "--coordinator-address": self.coordinator_address,
            "--num-processes": self.num_processes,
            "--process-id": self.process_id,
        }
        missing = [flag for flag, value in given.items() if value is None]
        if missing and len(missing) < len(given) and not self.distributed:
            raise ValueError(
                f"{', '.join(missing)} must be given, too, for several processes to find each "
                "other; or --distributed alone, where JAX can find them"
            )
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"num_processes={self.num_processes} must be at least 1")
        last = (self.num_processes or float("inf")) - 1
        if self.process_id is not None and not 0 <= self.process_id <= last:
            raise ValueError(f"process_id={self.process_id} must be from 0 to {last}")
