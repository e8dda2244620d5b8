"""Cases of this package and its peers: sizes, methods, inputs, and the description of one task.

Both sides import this module, so it imports neither JAX nor PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("full", "houlsby", "compacter", "compacter++", "lora")
WORKS = ("step", "forward", "generate")
GENERATED = 32  # in tokens
WEIGHT_DECAY = 0.01
# The method's own rate does not matter here: losses only have to change and stay finite.
LEARNING_RATES = {"full": 1e-4}
LEARNING_RATE = 1e-3
ADAPTER = "adapter"


@dataclasses.dataclass(frozen=True)
class Size:
    """A backbone, and the batch that it is measured with.

    Attributes:
      name: the name of the size.
      family: "bert", "roberta" or "modernbert", with a classifier of two labels, or "t5", with its
        vocabulary as labels.
      config: the differences from the defaults of the family's configuration.
      rows: the number of rows of the batch.
      length: the length of the inputs in tokens.
      target_length: the length of the targets in tokens, for a T5.
    """

    name: str
    family: str
    config: Mapping[str, Any]
    rows: int
    length: int
    target_length: int = 0


_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
_ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}
_MODERNBERT = {"classifier_pooling": "mean"}  # as the published checkpoints have it
_MODERNBERT_SMALL = {
    **_MODERNBERT,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "intermediate_size": 576,
}
_T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
SIZES = {
    size.name: size
    for size in (
        Size("minilm", "bert", _MINILM, rows=32, length=64),
        Size("bert-base", "bert", {}, rows=8, length=128),
        Size("roberta-base", "roberta", _ROBERTA, rows=8, length=128),
        Size("modernbert-small", "modernbert", _MODERNBERT_SMALL, rows=16, length=128),
        Size("modernbert-base", "modernbert", _MODERNBERT, rows=8, length=128),
        Size("t5-small", "t5", {}, rows=8, length=128, target_length=8),
        Size("t5-base", "t5", _T5_BASE, rows=8, length=128, target_length=8),
    )
}
GENERATING = ("t5-small",)
# Methods that the peers have for a family, where they do not have all.
METHODS_OF = {"modernbert": ("full", "lora")}


@dataclasses.dataclass(frozen=True)
class Task:
    """One task for either side.

    Attributes:
      size: the size of the backbone and the batch.
      method: one of `METHODS`.
      work: one of `WORKS`.
      folder: the folder with the backbone, as transformers saves it.
      adapter: the folder with the adapter; None for "full".
      dtype: the dtype of the computation, "float32" or "bfloat16".
      shortest: the length of the shortest row as a fraction of the longest; 1.0 leaves no padding.
      compiled: whether PyTorch uses `torch.compile`.
      generated: the number of generated tokens.
    """

    size: Size
    method: str
    work: str
    folder: str
    adapter: str | None
    dtype: str = "float32"
    shortest: float = 1.0
    compiled: bool = False
    generated: int = GENERATED

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Task:
        """Returns the task; inverse of `dataclasses.asdict`."""
        return cls(**{**values, "size": Size(**values["size"])})

    @property
    def learning_rate(self) -> float:
        """Learning rate of AdamW."""
        return LEARNING_RATES.get(self.method, LEARNING_RATE)


def choose(
    patterns: Sequence[str], methods: Sequence[str] = METHODS, works: Sequence[str] = WORKS
) -> list[tuple[Size, str, str]]:
    """Returns size, method and work of the cases that a pattern matches; without patterns, of all.

    Args:
      patterns: names of cases, `SIZE/METHOD/WORK`; `*` matches any text.
      methods: the available methods.
      works: the available works.

    Raises:
      ValueError: for a pattern that matches nothing.
    """
    cases = {
        f"{size.name}/{method}/{work}": (size, method, work)
        for size in SIZES.values()
        for work in works
        if work != "generate" or size.name in GENERATING
        for method in methods
        if method in METHODS_OF.get(size.family, methods)
    }
    for pattern in patterns:
        if not fnmatch.filter(cases, pattern):
            raise ValueError(
                f"no case is called {pattern!r}; cases are SIZE/METHOD/WORK with sizes "
                f"{', '.join(SIZES)}; methods {', '.join(methods)}; works {', '.join(works)} "
                f"(generate of {', '.join(GENERATING)} alone); * stands for anything"
            )
    return [
        case
        for name, case in cases.items()
        if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]


def command(program: str, documentation: str | None) -> argparse.ArgumentParser:
    """Returns a parser of the options that both benchmarks share."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--case", action="append", default=[], metavar="NAME", help="or a pattern; repeatable"
    )
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are timed")
    parser.add_argument("--rows", type=int, help="of every batch, in place of the size's own")
    parser.add_argument("--json", metavar="FILE")
    return parser


def write(file: str | None, report: Mapping[str, Any]) -> None:
    """Writes a report as JSON, if a file is given."""
    if file is not None:
        Path(file).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def batch_of(size: Size, vocabulary: int, shortest: float = 1.0) -> dict[str, np.ndarray]:
    """Returns random inputs and labels, a function of the arguments alone.

    Args:
      size: the size of the batch.
      vocabulary: the number of tokens; the first two, padding and end, are not drawn.
      shortest: the fraction of `Task.shortest`; the lengths are evenly spaced between it and the
        longest.

    Returns:
      int32 `[rows, length]` ids, mask and token types; labels `[rows]`, or `[rows, target_length]`
      with the decoder's inputs; float32 `[rows]` weights of one.
    """
    rng = np.random.default_rng(0)
    shape = (size.rows, size.length)
    lengths = np.linspace(shortest, 1.0, size.rows) * size.length
    mask = (np.arange(size.length) < np.ceil(lengths)[:, None]).astype(np.int32)
    ids = rng.integers(2, vocabulary, shape, np.int32)
    padding = size.config.get("pad_token_id", 0)
    batch = {"input_ids": np.where(mask, ids, padding).astype(np.int32), "attention_mask": mask}
    batch["weights"] = np.ones(size.rows, np.float32)
    if not size.target_length:
        if size.family == "bert":
            batch["token_type_ids"] = np.zeros(shape, np.int32)
        batch["labels"] = rng.integers(0, 2, size.rows, np.int32)
        return batch
    labels = rng.integers(2, vocabulary, (size.rows, size.target_length), np.int32)
    batch["labels"] = labels
    batch["decoder_input_ids"] = np.pad(labels[:, :-1], ((0, 0), (1, 0)))
    return batch


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean cross-entropy in float64 of `[…, classes]` logits and `[…]` labels."""
    logits = logits.astype(np.float64)
    largest = logits.max(-1, keepdims=True)
    total = largest[..., 0] + np.log(np.exp(logits - largest).sum(-1))
    chosen = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return float(np.mean(total - chosen))
