"""Backbones with a tokenizer, and data, for runs of `fit` on a machine that has neither."""

from __future__ import annotations

import collections
import csv
import dataclasses
import json
from pathlib import Path

from benchmarks import jax_worker
from benchmarks.contest import Size
from train import tasks

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_DEFAULT_VOCABULARY = 30522  # of `BertConfig`
# Sentences of the task `movie` that runs train on, and validate and test on.
_ROWS = {"train": 40, "validation": 10, "test": 10}


def classifier(path: Path, size: Size) -> None:
    """Writes a BERT with random weights, and a tokenizer of the words of `movie`.

    Args:
      path: the folder to write.
      size: the size of the BERT.
    """
    jax_worker.write_backbone(dataclasses.asdict(size), str(path))
    room = size.config.get("vocab_size", _DEFAULT_VOCABULARY) - len(_SPECIAL)
    words = collections.Counter(
        word for text, _ in _sentences("train") for word in text.lower().split()
    )
    vocabulary = [*_SPECIAL, *(word for word, _ in words.most_common(room))]
    (path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def task_flags(folder: Path, backbone: Path) -> list[str]:
    """Writes files of a small task; returns the flags of `fit` that train on them."""
    flags = ["--backbone", str(backbone), "--task", "own", "--max-length", "16"]
    for name, path in task_files(folder).items():
        flags += [f"--{name.replace('_', '-')}", path]
    return flags


def task_files(folder: Path) -> dict[str, str]:
    """Writes files of a small task; returns option of `fit` -> path."""
    files = {}
    for split, rows in _ROWS.items():
        path = folder / f"{split}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence", "label"])
            writer.writerows(_sentences(split)[:rows])
        files[f"{split}_file"] = str(path)
    return files


def _sentences(split: str) -> list[tuple[str, str]]:
    """Returns the sentences of a split of `movie`, and their labels."""
    task = tasks.load_task("movie")
    return [(row["sentence"], str(row["label"])) for row in task.splits[split]]
