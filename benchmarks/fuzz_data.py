"""Inputs of the fuzzer for the command line: data, predictions, settings, TOML."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import mutations
from benchmarks.fuzz_assets import Assets, Case, Random
from benchmarks.fuzz_models import edit_json
from compacter_jax.adapter_files import CONFIG_NAME
from train import tasks
from train.cli import config_files
from train.data import rows as data_rows
from train.fit.options import FitOptions
from train.inference import prediction_files
from train.inference.saved import settings_of

_TEXTS = (
    *("good film", "a", " ", "", "\t", "a\x00b", "\U0001f600\u200d\U0001f525", "\u202eRTL", 'a"b'),
    *('"', "'", "new\nline", "car\rriage", "comma, here", "tab\there", "a" * 99_999, "a" * 100_001),
    *("\ufeffbom", "NaN", "null", "None", "=cmd()", "1e5", "\u2028", "\x85", "\x1c", "\x7f"),
)
_LABELS = (
    *("negative", "positive", "0", "1", "2", "-1", "01", "1.0", " 1", "", "NaN", "true", "\u0661"),
    *("a" * 5000, "x,y", 'x"y', "x\ny", "1" * 5000, "-", "--1", "+1", "\u00b2"),
)
_COLUMNS = ("sentence2", "score", "target", "prediction", "adapter", "row", "", "a" * 9999, "x\ny")
_VALUES = (None, True, 0, -1, 1.5, 10**30, [], ["a"], {}, {"a": 1}, "\ud800", 2**63, 1e308)


def _table(r: Random, values: tuple[Any, ...] = ()) -> tuple[list[str], list[list[Any]]]:
    """Returns column names and rows, some of which have unusual content."""
    names = ["sentence", "label"]
    for _ in range(r.choice([0, 0, 1, 2])):
        names.insert(r.randrange(len(names) + 1), r.choice(_COLUMNS))
    if r.random() < 0.1:
        names.remove(r.choice(names))
    rows = []
    for i in range(r.choice([0, 1, 2, 5, 40, 1100])):
        row: list[Any] = []
        for name in names:
            value: Any = f"good film {i}"
            if name == "label":
                value = ("negative", "positive")[i % 2]
            if r.random() < 0.03:
                value = r.choice([*(_LABELS if name == "label" else _TEXTS), *values])
            row.append(value)
        rows.append(row)
    return names, rows


def _write_separated(r: Random, path: Path) -> str:
    names, rows = _table(r)
    text = io.StringIO()
    writer = csv.writer(text, delimiter="," if path.suffix == ".csv" else "\t", lineterminator="\n")
    writer.writerows([names, *rows])
    data, how = mutations.mutated_text(r, text.getvalue().encode())
    path.write_bytes(data)
    return f"{len(rows)} rows, {how}"


def _write_lines(r: Random, path: Path) -> str:
    names, rows = _table(r, _VALUES)
    lines = []
    for row in rows:
        line = json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=r.random() < 0.5)
        if r.random() < 0.01:
            line = r.choice(
                ["[]", "1", line[:-1], line * 2, "[" * 99_999, '{"a": NaN}', "9" * 5000]
            )
        lines.append(line)
    data, how = mutations.mutated_text(r, "\n".join(lines).encode(errors="surrogatepass"))
    path.write_bytes(data)
    return f"{len(rows)} rows, {how}"


def _write_parquet(r: Random, path: Path) -> str:
    count = r.choice([0, 1, 2, 40, 1100])
    kinds: dict[str, Callable[[], Any]] = {
        "text": lambda: pa.array([f"good film {i}" for i in range(count)], pa.string()),
        "labels": lambda: pa.array([("negative", "positive")[i % 2] for i in range(count)]),
        "odd": lambda: pa.array([r.choice([*_TEXTS, None]) for _ in range(count)], pa.string()),
        "whole": lambda: pa.array([i % 2 for i in range(count)], pa.int64()),
        "numbers": lambda: pa.array(np.full(count, r.choice([0.5, np.nan]))),
        "bytes": lambda: pa.array([b"\xff"] * count, pa.binary()),
        "lists": lambda: pa.array([["a"]] * count, pa.list_(pa.string())),
        "none": lambda: pa.nulls(count),
        "times": lambda: pa.array(range(count), pa.timestamp("s")),
        "categories": pa.array(["a", "b"] * count)[:count].dictionary_encode,
        "large": lambda: pa.array([2**64 - 1] * count, pa.uint64()),
    }
    chosen = [r.choice(["text"] * 6 + [*kinds]), r.choice(["labels"] * 6 + [*kinds])]
    sentences, labels = (kinds[kind]() for kind in chosen)
    pq.write_table(pa.table({"sentence": sentences, "label": labels}), path)
    data, how = path.read_bytes(), r.choice(["as it is", "as it is", "truncate", "flip", "foot"])
    if how == "truncate":
        data = data[: r.randrange(len(data))]
    elif how == "flip":
        data = mutations.flipped(r, data, r.choice([1, 4]))
    elif how == "foot":
        at = len(data) - r.randrange(1, min(300, len(data)))
        data = data[:at] + mutations.flipped(r, data[at:], 1)
    path.write_bytes(data)
    return f"{count} rows of {chosen}, {how}"


_WRITERS: Mapping[str, Callable[[Random, Path], str]] = {
    ".csv": _write_separated,
    ".tsv": _write_separated,
    ".jsonl": _write_lines,
    ".parquet": _write_parquet,
}


def data(suffix: str) -> Callable[[Assets, Random, Path], Case]:
    """Returns a maker of damaged files of training data."""

    def make(assets: Assets, r: Random, folder: Path) -> Case:
        path = folder / f"data{suffix}"
        done = _WRITERS[suffix](r, path)
        regression = r.random() < 0.1

        def read() -> Any:
            return tasks.load_task(
                "mine", train_file=path, validation_file=path, regression=regression
            )

        return Case(done, read, _wrong_labels)

    return make


def _wrong_labels(task: Any) -> str | None:
    if task.kind != "classification":
        return None
    known = range(len(task.label_names))
    labels = task.splits["train"]["label"]
    return None if all(label in known for label in labels) else "accepted wrong labels"


def predictions(assets: Assets, r: Random, folder: Path) -> Case:
    """Writes a damaged file whose rows are to be predicted."""
    path = folder / f"data{(suffix := r.choice(list(_WRITERS)))}"
    done = _WRITERS[suffix](r, path)
    target = folder / f"out{r.choice(list(_WRITERS))}"

    def read() -> int:
        return prediction_files.predict_file(
            path,
            target,
            lambda columns: np.tile([0.1, 0.9], (len(columns["sentence"]), 1)),
            label_names=("negative", "positive"),
        )

    def complaint(count: int) -> str | None:
        given, found = _sentences(path), _sentences(target)
        return None if given == found and len(given) == count else "wrote other rows"

    return Case(f"{path.name} to {target.name}: {done}", read, complaint)


def _sentences(path: Path) -> list[Any]:
    return [
        sentence
        for rows in data_rows.read_rows(path)
        for sentence in data_rows.column_values(rows, "sentence")
    ]


def settings(assets: Assets, r: Random, folder: Path) -> Case:
    """Writes an adapter whose settings of a task are damaged."""
    name, adapter = assets.copy(r, "ours", folder)
    done = edit_json(r, adapter / CONFIG_NAME)
    return Case(f"{name}: {done}", lambda: settings_of(adapter))


_TOML = {
    "backbone": '"DIR"',
    "epochs": "3",
    "learning_rate": "3e-3",
    "method": '"compacter++"',
    "output_dir": '"runs/x"',
    "reduction_factor": "16",
    "regression": "false",
    "sites": '["attention"]',
    "task": '"movie"',
    "train_file": '"t.csv"',
    "train_pooler": "true",
}
_TOML_KEYS = (*_TOML, "base", "tasks", "config", "resume", "seeds", "mesh", "zzz", '"a b"', '""')
_TOML_VALUES = (
    *("0", "-1", "1e999", "nan", "inf", "true", '""', '"a"', '"--overwrite"', '["--overwrite"]'),
    *("[]", "[[]]", "{}", "{a = 1}", "1979-05-27", "07:32:00", '"\\u0000"', "9" * 400, "9" * 5000),
    *("[1, 'a']", '"""x\ny"""', "[" * 2000 + "]" * 2000, "0x10", '["attention", "attention"]'),
    *(
        '"' + "a" * 100_000 + '"',
        '"c.toml"',
        '"/etc/passwd"',
        '"."',
        '"nothing.toml"',
        '["c.toml"]',
    ),
)
_TOML_TABLES = ("[tasks.movie]\nepochs = 5\n", "[tasks]\nmovie = 5\n", "[[tasks]]\nx=1\n")


def toml(assets: Assets, r: Random, folder: Path) -> Case:
    """Writes a damaged configuration of `fit`."""
    values, path = dict(_TOML), folder / "c.toml"
    done = []
    for _ in range(r.choice([1, 1, 2, 3])):
        key = r.choice(_TOML_KEYS)
        values[key] = r.choice(_TOML_VALUES)
        done.append(f"{key} = {values[key]:.40}")
    text = "".join(f"{key} = {value}\n" for key, value in values.items())
    text += r.choice(["", "", "", *_TOML_TABLES])
    data, how = mutations.mutated_text(r, text.encode())
    path.write_bytes(data)
    arguments = ["--config", str(path)]
    return Case(
        f"{'; '.join(done)}; {how}", lambda: config_files.expand_config(arguments, FitOptions)
    )
