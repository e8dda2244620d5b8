"""The flags of evaluate and predict."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from train.cli.options import BackboneDtype, EvaluateBy, MixOptions, SplitProtocol
from train.cli.speech import AudioOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions(MixOptions, AudioOptions):
    """A saved adapter and its backbone.

    Attributes:
      adapter: folder that `fit` wrote, or its subfolder adapter/; of a translation, also a folder
        with an adapter for each direction or target; or a composition of such folders,
        such as 'average(0.7*runs/a/adapter,0.3*runs/b/adapter)', or one with stack, parallel,
        average_maps or mix.
      backbone: backbone that the adapter was trained with; by default the recorded one.
      dtype: dtype of matrix products; by default as in training.
      backbone_dtype: dtype in which frozen weights are stored; by default as in training.
      eval_batch_size: number of examples per batch.
      num_beams: number of beams for T5's generation; by default as in training.
    """

    adapter: Path
    backbone: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    backbone_dtype: BackboneDtype | None = None
    eval_batch_size: int = 64
    num_beams: int | None = None

    def check(self) -> None:
        """Raises ValueError for a number out of range, or a mix that is none."""
        self.check_mix()
        self.check_audio()
        for name in ("eval_batch_size", "num_beams"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(AdapterOptions):
    """Evaluate a saved adapter on a split of a task.

    Attributes:
      task: movie, product, tweet or editorial; a benchmark, such as mnli; or any other name for
        your own files.
      split: split to evaluate on; validation_mismatched exists for mnli only.
      parallel_files: table with a column of texts for each language, for an adapter that
        translates; or --test-file and the like with the columns of pairs.
      directions: directions to evaluate, as in en-de,de-en, or of speech languages, as in de,es; by
        default those of the adapters that the file has.
      transcribe: language that is spoken, to compare with the column source, as for fit.
      train_file: your own examples, with the same columns as for fit; for --split train.
      validation_file: your own examples for --split validation.
      test_file: your own examples for --split test.
      test_files: several files for --split test, each with a name, as in nn=FILE,fo=FILE; the
        metrics of all are in one JSON file, and in tables in the file of the same name with .md.
      data_dir: folder of a benchmark's data set, laid out like its repository on the hub; by
        default the hub is read.
      split_protocol: splits of benchmarks: official are the splits of the hub, paper those of the
        Compacter paper.
      label_names: names of the labels that the integers 0, 1, 2 stand for in your own files, in
        this order. By default integers are accepted if the adapter's labels are integers or those
        of a built-in task or benchmark, and refused otherwise.
      evaluate_by: prediction of T5's labels: scoring compares the likelihoods of the labels' texts,
        generation generates text; by default as in training.
      output: JSON file for the metrics; by default evaluation_TASK_SPLIT.json in the adapter's
        folder, or in the current folder for a composition.
    """

    task: str = "custom"
    split: Literal["train", "validation", "validation_mismatched", "test"] = "test"
    parallel_files: Path | None = None
    directions: str | None = None
    transcribe: str | None = None
    train_file: Path | None = None
    validation_file: Path | None = None
    test_file: Path | None = None
    test_files: str | None = None
    data_dir: Path | None = None
    split_protocol: SplitProtocol = "official"
    label_names: tuple[str, ...] | None = None
    evaluate_by: EvaluateBy | None = None
    output: Path | None = None

    @property
    def inputs(self) -> list[Path]:
        """Files of rows that are given.

        Raises:
          ValueError: as `files_of`.
        """
        alone = (self.train_file, self.validation_file, self.test_file, self.parallel_files)
        several = {} if self.test_files is None else files_of(self.test_files)
        return [*(path for path in alone if path is not None), *several.values()]

    def check(self) -> None:
        """Raises ValueError for a number out of range, or for flags that exclude each other."""
        super().check()
        if self.test_files is None:
            return
        files_of(self.test_files)
        if self.test_file is not None or self.split != "test":
            raise ValueError(
                "--test-files gives the files of --split test; leave --test-file and other splits "
                "out"
            )
        if self.output is not None and self.output.suffix == ".md":
            raise ValueError(
                f"--output {self.output} is a JSON file, beside which a report with .md is "
                "written; give it another name"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions(AdapterOptions):
    """Predict every row of a file with a saved adapter, or with the adapter that each row names.

    Attributes:
      adapter: folder that `fit` wrote, or its subfolder adapter/; a composition of folders, as for
        `evaluate`; or a folder of such folders. In the last case the column adapter of the input
        names the adapter of each row; the adapters have the same shapes, backbone and kind of task,
        but may differ in labels. Adapters of a translation are chosen by the languages of a row.
      input: .parquet, .jsonl, .csv or .tsv file with a column sentence, and sentence2 for pairs; or
        with the columns of the adapter's benchmark on the hub. For tags of words, a file with a
        column tokens, lists of text, or a .conll or .txt file with a word in each line. For
        embeddings, a column sentence, or sentence1 and sentence2 for the cosine of each pair. For a
        translation, the columns source, source_language and target_language; for speech audio (or
        pcm16) and target_language, or a folder of .wav and .flac files.
      target_languages: languages to write the recordings of a folder in, joined by commas; by
        default all those of the adapter.
      output: .parquet, .jsonl, .csv or .tsv file; it has the columns of the input, prediction and,
        for labels, label_id and probability. The prediction for words is a list of a tag for each,
        that of embeddings a list of numbers. Or a .npy file with the embeddings alone.
      logits: add a column logits.
    """

    input: Path
    output: Path
    target_languages: str | None = None
    logits: bool = False


def files_of(text: str) -> dict[str, Path]:
    """Returns name -> file from `nn=FILE,fo=FILE`.

    Raises:
      ValueError: if a part has no name or no file, or a name is given twice.
    """
    found: dict[str, Path] = {}
    for part in text.split(","):
        name, equals, path = (each.strip() for each in part.partition("="))
        if not (name and equals and path):
            raise ValueError(
                f"--test-files: {part!r:.100} must be NAME=FILE; join several by commas, as "
                "in nn=FILE,fo=FILE"
            )
        if name in found:
            raise ValueError(f"--test-files names {name!r:.100} twice; use other names")
        found[name] = Path(path)
    return found
