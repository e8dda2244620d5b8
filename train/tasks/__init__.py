"""Tasks: sentences and their targets, built in, of benchmarks, or from the user's own files."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from compacter_jax.messages import quote
from train.cli.options import SplitProtocol
from train.data.corpus import check_text_file
from train.tasks import entities, hub, labels, own_files, pairs
from train.tasks.benchmark import Benchmark, Kind
from train.tasks.benchmarks import BENCHMARKS, find
from train.tasks.own_files import SENTIMENT, SENTIMENT_LABELS

BUILT_IN = ("movie", "product", "tweet", "editorial")
SPAN_CORRUPTION, MASKED_LM = "span_corruption", "masked_lm"
ON_TEXT = (SPAN_CORRUPTION, MASKED_LM)  # pre-training, whose splits are text files
CUSTOM = "custom"  # name of the user's own files if there is no --task
SPLITS = ("train", "validation", "test")

_METRICS: dict[Kind, str] = {
    "classification": "accuracy",
    "regression": "pearson",
    "text": "exact_match",
    "span_corruption": "token_accuracy",
    "masked_lm": "token_accuracy",
    "translation": "token_accuracy",
    "speech": "token_accuracy",
}


@dataclass(frozen=True)
class Task:
    """Sentences, or pairs of them, with their targets.

    Attributes:
      name: the name of the built-in task or benchmark, or the user's name for the files.
      kind: the kind of prediction.
      label_names: one name per class or tag; empty unless the kind is classification or tagging.
      splits: split name -> dataset with columns `sentence`, optionally `sentence2`, and `label`
        (index into `label_names`), `score` (float64) or, for "text", `target`. For "tagging", lists
        of words in `tokens`, and of as many indices into `label_names` in `tags`. For "embedding",
        `sentence1`, `sentence2` and perhaps `negative` or `score`. For "span_corruption" and
        "masked_lm", the path of a text file. For "translation", `source`, `target` and their
        languages. For "speech", `audio` or `pcm16`, `target` and its language. For a benchmark, its
        own columns.
      benchmark: how the rows are put to a backbone; None for other tasks.
      notes: lines about the reading of the files, for the user.
      directions: the directions of a translation, of text or speech.
    """

    name: str
    kind: Kind
    label_names: tuple[str, ...]
    splits: dict[str, Any]
    benchmark: Benchmark | None = None
    notes: tuple[str, ...] = ()
    directions: tuple[Any, ...] = ()

    @property
    def num_labels(self) -> int:
        """Width of an encoder's head: one for regression, two for a candidate or a span."""
        return 2 if self.kind in ("choice", "span") else len(self.label_names) or 1

    @property
    def metric(self) -> str:
        """Metric that selects the best epoch; larger is better."""
        if self.kind == "tagging":
            return entities.metric(self.label_names)
        if self.kind == "embedding":
            rows = self.splits.get("validation", next(iter(self.splits.values())))
            return "spearman" if pairs.class_of(rows) == "scored pairs" else "mrr"
        return _METRICS[self.kind] if self.benchmark is None else self.benchmark.metric

    @property
    def prefix(self) -> str:
        """Default beginning of the input of an encoder-decoder."""
        return self.name if self.benchmark is None else self.benchmark.prefix

    def user_messages(self) -> list[str]:
        """Returns lines that the user should read before anything is computed.

        They say how the files were read, which labels there are, in which order and on how many
        rows or words of each split, and how many questions have no answer.
        """
        lines = list(self.notes)
        splits = ", ".join(self.splits)
        if self.label_names:
            of = "words" if self.kind == "tagging" else "rows"
            counts = [
                np.bincount(_labels_of(rows), minlength=len(self.label_names)).tolist()
                for rows in self.splits.values()
            ]
            lines.append(labels.told(self.label_names, counts, f"{self.name}, {of} of {splits}"))
        if self.benchmark is not None:
            rows_without = [self.benchmark.unanswered(rows) for rows in self.splits.values()]
            if any(rows_without):
                lines.append(f"questions without an answer ({splits}): {_listed(rows_without)}")
            lines += self.benchmark.user_messages()
        return lines


def _labels_of(rows: Any) -> list[int]:
    """Returns the labels of rows, or the tags of all their words."""
    if "tags" not in rows.column_names:
        return list(rows["label"][:])
    return list(itertools.chain.from_iterable(rows["tags"][:]))


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


def load_task(
    name: str | None = None,
    *,
    regression: bool = False,
    text: bool = False,
    tagging: bool = False,
    embedding: bool = False,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    data_dir: Path | None = None,
    split_protocol: SplitProtocol = "official",
    splits: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    stated_names: Sequence[str] | None = None,
    are_numbered: bool = False,
    max_characters: int = 100_000,
) -> Task:
    """Reads a built-in task, a benchmark, or the user's files, which may replace built-in splits.

    A file has a column `sentence`, for pairs also `sentence2`, and `label` (integers or text),
    `score` (numbers) or `target` (text). The target column is the first of these that the files
    have, unless `regression`, `text` or `label_names` determines it. Files of words have the
    columns `tokens` and `tags` instead, lists of text, or are .conll or .txt files. Files for
    embeddings have `anchor`, `positive` and perhaps `negative`, or `sentence1`, `sentence2` and
    perhaps `score`. The label names
    are `stated_names`, those of the training file's `datasets.ClassLabel`, or its labels, sorted.
    Labels that look like missing values are refused unless they are stated. If no label name is an
    integer, integer labels are positions in a stated order: that of `stated_names`, of a
    `ClassLabel` of the file or of the training file, or of a built-in task or a benchmark. Without
    a stated order they are refused. The files of `ON_TEXT` are plain text, and are not read
    here.

    Args:
      name: one of `BUILT_IN`, of `BENCHMARKS`, a translation such as wmt16-ro-en,
        `ON_TEXT`, or any other name for the user's files (`CUSTOM` if None).
      regression: predict `score` instead of `label`.
      text: predict `target` instead of `label`.
      tagging: predict `tags`, without a look at the columns of the files.
      embedding: read pairs of texts for embeddings, without a look at the columns of the files.
      train_file: a .parquet, .jsonl, .csv or .tsv file; or for words a .conll or .txt file.
      validation_file: a file of one of these formats.
      test_file: a file of one of these formats.
      data_dir: the folder of a benchmark's data set; by default it is read from the hub.
      split_protocol: the splits of a benchmark, as `train.tasks.hub.load` explains.
      splits: the splits to return; by default all.
      label_names: the classes of a saved adapter; they take precedence over the training file's.
      stated_names: the names that integers from 0 on stand for in files; without `label_names` also
        the classes, in their order.
      are_numbered: whether `label_names` are those of a built-in task or a benchmark, whose order
        is that of their numbers.
      max_characters: the maximum length of a sentence.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: for any other invalid input; the message names the file and the row.
    """
    given = (train_file, validation_file, test_file)
    benchmark = find(name or "")
    if benchmark is not None:
        if any(given):
            raise ValueError(
                f"{name} is the name of a benchmark; use another --task name for your own files"
            )
        if (regression or text) and benchmark.kind != ("regression" if regression else "text"):
            raise ValueError(
                f"{name} is a task of kind {benchmark.kind}, not "
                f"{'regression' if regression else 'text'}; choose another task"
            )
        if stated_names:
            raise ValueError(f"the labels of {name} already have names; leave --label-names out")
        read = _pairs_of if embedding else _of_benchmark
        return read(benchmark, data_dir, split_protocol, splits, label_names)
    if data_dir is not None and any(given):
        raise ValueError(
            "--data-dir works only with benchmarks such as mnli, not with your own files"
        )
    files = _files(name, given)
    wanted = tuple(files) if splits is None else tuple(splits)
    for split in wanted:
        if split not in files:
            raise ValueError(
                f"there is no file for the split {split!r}; use one of {', '.join(files)}"
            )
    if name in ON_TEXT:
        if regression or text:
            raise ValueError(f"{name} takes its targets from the text itself, not from a column")
        if stated_names:
            raise ValueError(f"{name} has no labels; leave --label-names out")
        for split in wanted:
            check_text_file(files[split])
        kind: Kind = "masked_lm" if name == MASKED_LM else "span_corruption"
        return Task(kind, kind, (), {split: files[split] for split in wanted})
    built_in = SENTIMENT_LABELS if name in BUILT_IN else ()
    labels.check_stated(stated_names or (), label_names or ())
    names = tuple(label_names or stated_names or built_in)
    wanted_column = {"score": regression, "target": text, "tags": tagging}
    wanted_column[own_files.EMBEDDING] = embedding
    target = next((column for column, is_wanted in wanted_column.items() if is_wanted), None)
    order = tuple(stated_names or (names if are_numbered else built_in))
    found = own_files.load(files, wanted, target, names, order, max_characters)
    if stated_names and not found.label_names:
        raise ValueError(
            f"--label-names needs a task with labels, but {name or CUSTOM} has kind {found.kind}; "
            "leave it out"
        )
    return Task(name or CUSTOM, found.kind, found.label_names, found.splits, notes=found.notes)


def sources(options: Any) -> dict[str, Any]:
    """Returns the arguments of `load_task` that locate the rows, from a command's options."""
    names = ("train_file", "validation_file", "test_file", "data_dir", "split_protocol")
    return {
        **{name: getattr(options, name) for name in names},
        "stated_names": options.label_names,
    }


def subsample(dataset: datasets.Dataset, size: int, seed: int) -> datasets.Dataset:
    """Draws `size` rows without replacement, in their original order.

    The draw depends on `seed` alone, and a smaller sample is a subset of a larger one with the same
    seed.

    Raises:
      ValueError: if `size` is below 1 or above the number of rows.
    """
    if not 1 <= size <= len(dataset):
        raise ValueError(f"cannot draw {size} of {len(dataset)} examples; use 1 to {len(dataset)}")
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:size]
    return dataset.select(np.sort(chosen))


def _of_benchmark(
    benchmark: Benchmark,
    data_dir: Path | None,
    split_protocol: SplitProtocol,
    splits: Sequence[str] | None,
    label_names: Sequence[str] | None,
) -> Task:
    rows, names = hub.load(benchmark, data_dir, split_protocol, splits)
    if label_names is not None and tuple(label_names) != names:
        raise ValueError(
            f"the labels of {benchmark.name} are {', '.join(names)}, but those of the adapter are "
            f"{', '.join(label_names)}"
        )
    return Task(benchmark.name, benchmark.kind, names, rows, benchmark)


def _pairs_of(
    benchmark: Benchmark,
    data_dir: Path | None,
    split_protocol: SplitProtocol,
    splits: Sequence[str] | None,
    label_names: Sequence[str] | None,
) -> Task:
    """Returns the scored pairs of a benchmark, with scores from 0 to 1, as a task of embeddings."""
    if benchmark.highest_score is None:
        raise ValueError(
            f"{benchmark.name} has no pairs with scores of their similarity, as embeddings need; "
            "use stsb, or files of your own"
        )
    del label_names  # scores have none
    rows, _ = hub.load(benchmark, data_dir, split_protocol, splits)
    columns, highest = list(benchmark.columns), benchmark.highest_score
    scaled = {
        split: pairs.scaled(f"{benchmark.name}, {split}", of_split, columns, highest)
        for split, of_split in rows.items()
    }
    return Task(benchmark.name, "embedding", (), scaled)


def _files(name: str | None, given: Sequence[str | Path | None]) -> dict[str, Path]:
    """Returns split -> file; the user's files replace those of the built-in task."""
    files = {}
    if name in BUILT_IN:
        files = {split: SENTIMENT / str(name) / f"{split}.parquet" for split in SPLITS}
    files |= {split: Path(path) for split, path in zip(SPLITS, given, strict=True) if path}
    if files:
        return files
    if name in ON_TEXT:
        raise ValueError(f"{name} needs a text file; give --train-file")
    known = f"use {', '.join((*BUILT_IN, *BENCHMARKS))}, a translation such as wmt16-ro-en, or "
    if name in (None, CUSTOM):
        raise ValueError(
            f"no examples were given; for --task {known}your own with --train-file, "
            "--validation-file or --test-file"
        )
    close = difflib.get_close_matches(str(name), [*BUILT_IN, *BENCHMARKS, *ON_TEXT], n=1)
    near = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(
        f"unknown task {quote(name, 60)}{near}; {known}give files of your own, also of words with "
        "tags (NER, part of speech)"
    )
