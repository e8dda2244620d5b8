"""The flags of evaluate and predict."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from train.cli.options import BackboneDtype, EvaluateBy, SplitProtocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """A saved adapter and its backbone.

    Attributes:
      adapter: folder that `fit` wrote, or adapter/ in it; or a composition of such folders, such
        as 'average(0.7*runs/a/adapter,0.3*runs/b/adapter)', with stack, parallel and average_maps
        likewise.
      backbone: the backbone it was trained with; by default where it was then.
      dtype: what matrix products compute in; by default as in training.
      backbone_dtype: how what was not trained is stored; by default as in training.
      eval_batch_size: examples per batch.
      num_beams: of T5's generation; by default as in training.
    """

    adapter: Path
    backbone: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    backbone_dtype: BackboneDtype | None = None
    eval_batch_size: int = 64
    num_beams: int | None = None

    def check(self) -> None:
        """ValueError for a number that cannot work."""
        for name in ("eval_batch_size", "num_beams"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(AdapterOptions):
    """Evaluate a saved adapter on a split of a task.

    Attributes:
      task: movie, product, tweet or editorial; a benchmark, such as mnli; or any other name for
        your own files.
      split: which split; validation_mismatched is of mnli alone.
      train_file: your own examples, with the columns that fit wants; for --split train.
      validation_file: the same, for --split validation.
      test_file: the same, for --split test.
      data_dir: folder of a benchmark's data set, laid out as its repository on the hub; by default
        it is read from the hub.
      split_protocol: of benchmarks: official are the hub's splits, paper those of the Compacter
        paper.
      label_names: which of the adapter's labels integers 0, 1, 2 in your own files stand for, in
        this order. Without it they are read where the adapter's labels are integers, or those of a
        built-in task or a benchmark, and refused where they are other names.
      evaluate_by: how T5's labels are predicted: by the likelihood of each label's text, or by
        generating text; by default as in training.
      output: JSON file for the metrics; by default evaluation_TASK_SPLIT.json in the adapter's
        folder; of a composition of several, in the current one.
    """

    task: str = "custom"
    split: Literal["train", "validation", "validation_mismatched", "test"] = "test"
    train_file: Path | None = None
    validation_file: Path | None = None
    test_file: Path | None = None
    data_dir: Path | None = None
    split_protocol: SplitProtocol = "official"
    label_names: tuple[str, ...] | None = None
    evaluate_by: EvaluateBy | None = None
    output: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions(AdapterOptions):
    """Predict every row of a file with a saved adapter, or each row with the one that it names.

    Attributes:
      adapter: folder that `fit` wrote, or adapter/ in it; or a folder of such folders, and then the
        input has a column adapter with the name of one in every row: adapters of one shape on one
        backbone, for tasks of one kind, whatever their labels; or a composition of folders, as
        `evaluate` takes it.
      input: .parquet, .jsonl, .csv or .tsv with a column sentence, for pairs also sentence2; or
        with the columns that the adapter's benchmark has on the hub.
      output: file of one of these formats: the input's columns, prediction, and for labels
        label_id and probability.
      logits: add the column logits too.
    """

    input: Path
    output: Path
    logits: bool = False
