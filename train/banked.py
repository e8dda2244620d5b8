"""`predict` with many adapters: every row by the one that its column `adapter` names."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from tqdm import tqdm

import compacter_jax as cj
from train import data, inference, predictions
from train.files import read_chunks
from train.options import PredictOptions

COLUMN = "adapter"


def members_of(folder: Path) -> dict[str, Path]:
    """The adapters in a folder by name: `NAME/` itself, or `NAME/adapter/` as `fit` writes it."""
    # An adapter, or the folder of a single run, is no bank.
    alone = (folder, folder / "adapter")
    if not folder.is_dir() or any((path / "adapter_config.json").exists() for path in alone):
        return {}
    found = {}
    for path in sorted(folder.iterdir()):
        for candidate in (path, path / "adapter"):
            if (candidate / "adapter_config.json").exists():
                found[path.name] = candidate
                break
    return found


@dataclasses.dataclass(frozen=True)
class _Bank:
    """Adapters ready to compute.

    Attributes:
      index: name -> member.
      label_names: of each member.
      encode: columns -> examples.
      outputs: (batch, members of its rows) -> logits, as wide as the widest set of labels.
    """

    index: dict[str, int]
    label_names: list[list[str]]
    encode: Any
    outputs: Any


def predict(options: PredictOptions, members: Mapping[str, Path]) -> int:
    """Copies a file with predictions added, each by the adapter its row names; returns its rows.

    Args:
      options: of the command.
      members: name -> folder of an adapter.

    Raises:
      FileNotFoundError, ValueError: before anything is computed or written if the file has no
        column `adapter`, or names adapters that there are not; if adapters cannot be computed
        together; and as `train.inference.predict`.
    """
    predictions.check_files(options.input, options.output)
    counted = _counted(options.input, members)
    bank = _load(options, {name: members[name] for name in sorted(counted)})
    added = predictions.added_names(bank.label_names[0], options.logits)
    rows_done = 0
    with predictions.write_rows(options.output) as write, tqdm(desc="predict", unit="row") as bar:
        for rows in predictions.read_rows(options.input):
            names = predictions.column_names(rows)
            predictions.check_not_taken(options.input, names, added)
            read = predictions.columns_read(names, None)
            texts = {name: predictions.column_values(rows, name) for name in read}
            ids = np.array([bank.index[n] for n in predictions.column_values(rows, COLUMN)])
            logits = _logits(bank, texts, ids, options.eval_batch_size)
            write(predictions.add_columns(rows, _columns(bank, logits, ids, added)))
            rows_done += len(rows)
            bar.update(len(rows))
    for name, count in counted.items():
        print(f"{name}: {count:,} rows")
    print(f"{rows_done} rows written to {options.output}")
    return rows_done


def _counted(path: Path, members: Mapping[str, Path]) -> Counter[str]:
    """How many rows name each adapter; ValueError if a row names none, or one there is not."""
    counted: Counter[str] = Counter()
    first_row = 1
    for rows in read_chunks(path, 1024):
        predictions.require_column(path, predictions.column_names(rows), COLUMN)
        values = predictions.column_values(rows, COLUMN)
        for row, value in enumerate(values, first_row):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{path}, row {row}: {COLUMN} names no adapter; name one")
        counted.update(values)
        first_row += len(rows)
    if unknown := sorted(counted.keys() - members.keys()):
        raise ValueError(
            f"{path}: names adapters that there are not: {_listed(unknown)}; there are "
            f"{_listed(list(members))}"
        )
    return counted


def _listed(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _load(options: PredictOptions, members: Mapping[str, Path]) -> _Bank:
    options.check()
    settings = {name: inference.settings_of(folder) for name, folder in members.items()}
    first = next(iter(settings.values()))
    for name, each in settings.items():
        if each["kind"] not in ("classification", "regression") or "text_to_text" in each:
            raise ValueError(
                f"{members[name]} is no classifier on an encoder; predict with it by itself"
            )
        if "benchmark" in each:
            raise ValueError(
                f"{members[name]} reads the columns of {each['benchmark']['name']}; predict with "
                "it by itself"
            )
    inference.check_shared(settings)
    source = options.backbone or first["backbone"]
    backbone = cj.load_backbone(
        source, **inference.head_of(first), dtype=jnp.dtype(options.dtype or first["dtype"])
    )
    model, params = cj.stack_adapters(list(members.values()), backbone)
    params = inference.stored(params, model.method, options, first)
    tokenizer = inference.load_tokenizer(source, backbone, first["max_length"])

    @jax.jit
    def compute(params: Any, batch: Mapping[str, Any], ids: Any) -> Any:
        inputs = (batch[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
        logits: Any = model.apply({"params": params}, *inputs, adapter_ids=ids)
        return logits.astype(jnp.float32)

    return _Bank(
        {name: i for i, name in enumerate(members)},
        [each["label_names"] for each in settings.values()],
        lambda columns: data.tokenize(columns, tokenizer, first["max_length"]),
        lambda batch, ids: jax.device_get(compute(params, batch, ids)),
    )


def _logits(
    bank: _Bank, texts: Mapping[str, Sequence[str]], ids: np.ndarray, batch_size: int
) -> np.ndarray:
    """`[rows, widest]` float64."""

    def outputs(batch: Any) -> np.ndarray:
        # A filling row's index is -1: any member will do.
        return bank.outputs(batch, ids[batch["indices"]].astype(np.int32))

    encoded = bank.encode(texts)
    found = inference.split_outputs(outputs, encoded, batch_size, description=None)
    return np.asarray(found, np.float64)


def _columns(
    bank: _Bank, logits: np.ndarray, ids: np.ndarray, added: Sequence[str]
) -> dict[str, pa.Array]:
    """The columns to add: of each row from the logits of its adapter's labels."""
    parts: dict[str, list[pa.Array]] = {name: [] for name in added}
    order = []
    for member in np.unique(ids):
        rows, names = np.flatnonzero(ids == member), bank.label_names[member]
        own = logits[rows, : len(names) or 1]
        predictions.check_logits(own, len(rows), len(names) or 1)
        for name, values in predictions.added_columns(own, names, added).items():
            parts[name].append(values)
        order.append(rows)
    back = pa.array(np.argsort(np.concatenate(order)))
    return {name: pa.concat_arrays(arrays).take(back) for name, arrays in parts.items()}
