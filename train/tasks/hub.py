"""Benchmarks read from the hub, or from a folder with the same layout, and divided into splits."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from compacter_jax.messages import reason_of
from train.cli.options import SplitProtocol
from train.tasks.benchmark import Benchmark

# The paper's protocol: the size from which on a training set is large, and the number of examples
# that a large one gives for validation.
_LARGE, _HELD_OUT = 10_000, 1000
_SEED = 42

Read = Callable[[str], "datasets.Dataset | None"]


def load(
    benchmark: Benchmark,
    data_dir: Path | None,
    protocol: SplitProtocol,
    splits: Sequence[str] | None,
) -> tuple[dict[str, datasets.Dataset], tuple[str, ...]]:
    """Returns the splits of a benchmark, and the names of its labels, which may be none.

    "official": the hub's `train` and `validation`, and `test` if its labels are published. For MNLI
    `validation` is the matched one, and there is `validation_mismatched`.

    "paper": the protocol of the Compacter paper, which had no published test labels (section 4 and
    the authors' code). With fewer than 10,000 training examples, the hub's validation is halved
    into `validation` and `test`. Otherwise 1,000 training examples become `validation`, and the
    hub's validation is `test`. For MNLI `validation` is the mismatched one and `test` the matched
    one. MultiRC's examples are counted and divided by question, so that no question is in two
    splits; with 5,100 training questions it is a small data set, as in the authors' code. The seed
    is theirs, 42, but the generator is NumPy's, so that the drawn rows differ. Their code does not
    cover SQuAD and translation, to which the same rule is applied.

    Args:
      benchmark: the benchmark.
      data_dir: a folder with the layout of the hub's repository; None reads the hub.
      protocol: the protocol of the splits.
      splits: the names of the splits to return; by default all.

    Raises:
      ValueError: if the data cannot be read, lacks a column or labels, or a split does not exist.
    """
    read = _from_hub(benchmark) if data_dir is None else _from_folder(benchmark, data_dir)
    makers = _official(benchmark, read) if protocol == "official" else _paper(benchmark, read)
    made = {}
    for split in makers if splits is None else splits:
        rows = makers[split]() if split in makers else None
        if rows is not None and not _is_hidden(benchmark, rows):
            made[split] = rows
        elif splits is not None or split in ("train", "validation"):
            raise ValueError(
                f"{benchmark.name} has no split {split!r} whose answers are published; "
                f"--split-protocol {protocol} has {', '.join(s for s in makers if s != split)}"
            )
    if not made:
        raise ValueError(
            f"no split of {benchmark.name} was selected; use one of {', '.join(makers)}"
        )
    names = _label_names(benchmark, next(iter(made.values())))
    for split, rows in made.items():
        _check_labels(benchmark, split, rows, names)
        try:
            benchmark.check(rows)
        except ValueError as error:
            raise ValueError(f"{benchmark.name}, {split}, {error}") from error
    return made, names


def _official(benchmark: Benchmark, read: Read) -> dict[str, Callable[[], Any]]:
    """Returns split -> function that reads it, by the hub's own splits."""
    first, *others = benchmark.validation
    hub = {"train": "train", "validation": first, **{name: name for name in others}, "test": "test"}
    return {split: functools.partial(read, name) for split, name in hub.items()}


def _paper(benchmark: Benchmark, read: Read) -> dict[str, Callable[[], Any]]:
    """Returns split -> function that reads and divides it, by the paper's protocol."""
    if len(benchmark.validation) > 1:
        test, validation = benchmark.validation
        hub = {"train": "train", "validation": validation, "test": test}
        return {split: functools.partial(read, name) for split, name in hub.items()}
    train, (validation,) = read("train"), benchmark.validation
    if train is None:
        raise ValueError(
            f"{benchmark.name} has no training split, which --split-protocol paper reads"
        )
    groups = _groups(benchmark, train)
    if groups.max() + 1 < _LARGE:
        whole = read(validation)
        if whole is None:
            return {"train": lambda: train, "validation": lambda: None}
        half, rest = _divided(benchmark, whole, lambda number: number // 2)
        return {"train": lambda: train, "validation": lambda: half, "test": lambda: rest}
    held_out, rest = _divided(benchmark, train, lambda number: _HELD_OUT)
    return {"train": lambda: rest, "validation": lambda: held_out, "test": lambda: read(validation)}


def _divided(
    benchmark: Benchmark, rows: datasets.Dataset, size: Callable[[int], int]
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Returns the rows of `size(number)` random questions, and the other rows."""
    groups = _groups(benchmark, rows)
    number = int(groups.max()) + 1
    if not 0 < size(number) < number:
        raise ValueError(
            f"{benchmark.name} has {number} rows or questions, too few for --split-protocol paper "
            f"to take {size(number) or 1} of them and leave some; use --split-protocol official"
        )
    order = np.random.default_rng(_SEED).permutation(number)
    taken = np.isin(groups, order[: size(number)])
    return rows.select(np.flatnonzero(taken)), rows.select(np.flatnonzero(~taken))


def _groups(benchmark: Benchmark, rows: datasets.Dataset) -> np.ndarray:
    """Returns `[rows]`: the number of the question to which each row belongs."""
    questions = benchmark.questions(rows)
    if questions is None:
        return np.arange(len(rows))
    numbers = {question: i for i, question in enumerate(dict.fromkeys(questions))}
    return np.array([numbers[question] for question in questions])


def _from_hub(benchmark: Benchmark) -> Read:
    """Returns a function that reads a split from the hub, or from its cache."""
    try:
        found = datasets.load_dataset(
            benchmark.repository, benchmark.configuration, trust_remote_code=False
        )
    except Exception as error:  # many types: errors of the network, the hub and the files
        reason = reason_of(error)
        raise ValueError(
            f"cannot load {benchmark.repository} ({benchmark.configuration}) from the hub: "
            f"{reason}; without a network give --data-dir, {_layout(benchmark)}"
        ) from error
    where = f"{benchmark.repository} ({benchmark.configuration})"

    def read(split: str) -> datasets.Dataset | None:
        return _ready(benchmark, found[split], f"{where}, {split}") if split in found else None

    return read


def _from_folder(benchmark: Benchmark, data_dir: Path) -> Read:
    """Returns a function that reads a split from parquet files, in memory and without a cache."""
    folder = data_dir / benchmark.configuration
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise ValueError(
            f"{folder} holds no parquet files; --data-dir must be {_layout(benchmark)}"
        )

    def read(split: str) -> datasets.Dataset | None:
        # The hub has used train-00000-of-00001, super_glue-train and train/0000 over the years.
        pattern = re.compile(rf"(^|[/-]){re.escape(split)}([/.-]|$)")
        chosen = [path for path in files if pattern.search(str(path.relative_to(folder)))]
        if not chosen:
            return None
        try:
            table = pa.concat_tables([pq.read_table(path) for path in chosen])
        except (pa.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{chosen[0]} is not a readable parquet file: {reason}") from error
        return _ready(benchmark, datasets.Dataset(table), str(chosen[0]))

    return read


def _layout(benchmark: Benchmark) -> str:
    """Returns a description of the required folder."""
    names = ", ".join(f"{name}-*.parquet" for name in ("train", *benchmark.validation))
    return (
        f"a folder laid out as https://huggingface.co/datasets/{benchmark.repository}: "
        f"{benchmark.configuration}/ with {names}"
    )


def _ready(benchmark: Benchmark, rows: datasets.Dataset, where: str) -> datasets.Dataset:
    """Returns the used columns with checked types; a numeric target is renamed to `score`."""
    wanted = dict.fromkeys([*benchmark.columns, benchmark.wanted])
    for name in wanted:
        if name not in rows.column_names:
            raise ValueError(
                f"{where} has no column {name!r}; {benchmark.name} needs {', '.join(wanted)}, but "
                f"the columns are {', '.join(rows.column_names)}"
            )
    if not len(rows):
        raise ValueError(f"{where} has no rows")
    _check_present(benchmark, rows, where)
    for name, kind in benchmark.columns.items():
        value = rows[0][name]
        if not isinstance(value, kind):
            raise ValueError(
                f"{where}: column {name!r} holds {type(value).__name__}, not {kind.__name__}"
            )
    feature = rows.features[benchmark.wanted]
    stored = rows.features.arrow_schema.field(benchmark.wanted).type
    if benchmark.kind == "classification" and not isinstance(feature, datasets.ClassLabel):
        raise ValueError(
            f"{where}: column 'label' has the type {stored}, but must be a ClassLabel, which "
            "stores the names of the labels; copy the files of the hub, or write yours with "
            "`datasets`"
        )
    if benchmark.kind == "regression" and not pa.types.is_floating(stored):
        raise ValueError(f"{where}: column 'label' has the type {stored}, not float32")
    rows = rows.select_columns(list(wanted))
    usable = benchmark.usable(rows)
    if usable is not None and not all(usable):
        print(
            f"{where}: {usable.count(False)} of {len(rows)} rows have an empty text and are left "
            "out"
        )
        rows = rows.select(np.flatnonzero(usable))
        if not len(rows):
            raise ValueError(f"{where} has no rows with a text on both sides")
    return rows.rename_column("label", "score") if benchmark.kind == "regression" else rows


def _check_present(benchmark: Benchmark, rows: datasets.Dataset, where: str) -> None:
    """Raises ValueError for a null input; a null label or answer marks a hidden split."""
    for name in benchmark.columns:
        column = rows.data.column(name)
        if column.null_count:
            row = 1 + column.is_null().to_pylist().index(True)
            raise ValueError(f"{where}, row {row}: {name} is missing (null); remove or fill it")


def _is_hidden(benchmark: Benchmark, rows: datasets.Dataset) -> bool:
    """Returns True if the targets of a split are not published, as for most test splits."""
    if benchmark.kind in ("classification", "regression"):
        (values,) = benchmark.targets(rows).values()
        return all(value is None or value == -1 for value in values)
    return benchmark.wanted == "answers" and benchmark.unanswered(rows) == len(rows)


def _label_names(benchmark: Benchmark, rows: datasets.Dataset) -> tuple[str, ...]:
    return tuple(rows.features["label"].names) if benchmark.kind == "classification" else ()


def _check_labels(
    benchmark: Benchmark, split: str, rows: datasets.Dataset, names: Sequence[str]
) -> None:
    """Raises ValueError if a split has other labels than the first, or if some are missing."""
    if benchmark.kind == "regression":
        for row, score in enumerate(rows["score"][:], 1):
            if score is None or not math.isfinite(score) or score == -1:  # as in hidden splits
                raise ValueError(f"{benchmark.name}, {split}, row {row}: the score is missing")
    if benchmark.kind != "classification":
        return
    if (own := _label_names(benchmark, rows)) != names:
        raise ValueError(
            f"{benchmark.name}: the labels of {split} are {', '.join(own)}, but those of the "
            f"other splits are {', '.join(names)}"
        )
    for row, label in enumerate(rows["label"][:], 1):
        if label is None or not 0 <= label < len(names):
            raise ValueError(f"{benchmark.name}, {split}, row {row}: the label is missing")
