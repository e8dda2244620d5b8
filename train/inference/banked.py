"""Command `predict` with many adapters: the column `adapter` names the adapter of each row."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from tqdm import tqdm

import compacter_jax as cj
from compacter_jax.messages import listing
from train.compute import outputs as compute_outputs
from train.data import rows as data_rows
from train.data import tokens, writing
from train.data.files import Rows, read_chunks
from train.data.words import WordCounts
from train.inference import adapter, commands, mixing, prediction_files, saved
from train.inference.options import PredictOptions
from train.objectives import Objective, base, from_settings

COLUMN = "adapter"


@dataclasses.dataclass(frozen=True)
class _Group:
    """Adapters that share how rows become examples and outputs become predictions.

    Attributes:
      members: their positions in the bank.
      objective: the objective of all of them.
      outputs: batch with `adapter_ids` -> the outputs of the objective, on the host.
      reader: the reader of the objective's columns.
    """

    members: list[int]
    objective: Objective
    outputs: compute_outputs.OutputsFunction
    reader: data_rows.ColumnReader


@dataclasses.dataclass(frozen=True)
class _Bank:
    """Adapters ready to compute.

    Attributes:
      index: name -> position.
      label_names: the names of the labels that each member predicts for rows.
      groups: the groups of members with the same objective; every member is in one.
      max_length: the maximum input length in tokens.
    """

    index: dict[str, int]
    label_names: list[list[str]]
    groups: list[_Group]
    max_length: int


def predict(options: PredictOptions, members: Mapping[str, Path]) -> int:
    """Copies a file with predictions added, each by the adapter its row names; returns its rows.

    Args:
      options: the options of the command.
      members: name -> folder of an adapter.

    Raises:
      FileNotFoundError, ValueError: before anything is computed or written, if the file has no
        column `adapter` or names unknown adapters; if the adapters cannot be computed together; and
        as `train.inference.commands.predict`.
    """
    data_rows.check_files(options.input, options.output)
    counted = _counted(options.input, members)
    bank = _load(options, {name: members[name] for name in sorted(counted)})
    added = prediction_files.added_names(bank.label_names[0], options.logits)
    rows_done, cut, invalid = 0, 0, 0
    unknown, words = tokens.Unknown(), WordCounts()
    names = list(bank.index)
    labels = commands.LabelCounts(dict(zip(names, bank.label_names, strict=True)))
    with writing.write_rows(options.output) as write, tqdm(desc="predict", unit="row") as bar:
        for rows in read_chunks(options.input, 1024):
            prediction_files.check_not_taken(options.input, data_rows.column_names(rows), added)
            ids = np.array([bank.index[n] for n in data_rows.column_values(rows, COLUMN)])
            parts = []
            for group in bank.groups:
                positions = np.flatnonzero(np.isin(ids, group.members))
                if len(positions):
                    encoded = _encoded(group, rows, positions, rows_done)
                    predicted = _predicted(group, encoded, ids[positions], options.eval_batch_size)
                    parts += _columns(bank, predicted, positions, ids[positions], added)
                    cut += encoded.num_truncated
                    unknown += encoded.unknown
                    words += encoded.word_counts
            write(writing.add_columns(rows, _in_order(parts)))
            for positions, columns in parts:
                if "label_id" in columns:
                    labels.count(names[ids[positions[0]]], columns["label_id"].to_numpy())
            invalid += sum(columns["prediction"].null_count for _, columns in parts)
            rows_done += len(rows)
            bar.update(len(rows))
    for name, count in counted.items():
        print(f"{name}: {count:,} rows")
    told_of_words = words.user_messages("inputs", bank.max_length)
    for line in [*labels.lines(), *unknown.user_messages("inputs"), *told_of_words]:
        print(line)
    commands.say_predicted(options.output, rows_done, cut, bank.max_length, invalid)
    return rows_done


def _counted(path: Path, members: Mapping[str, Path]) -> Counter[str]:
    """Counts the rows of each adapter; raises ValueError for a missing or unknown name."""
    counted: Counter[str] = Counter()
    first_row = 1
    for rows in read_chunks(path, 1024):
        data_rows.require_column(path, data_rows.column_names(rows), COLUMN)
        values = data_rows.column_values(rows, COLUMN)
        for row, value in enumerate(values, first_row):
            if value is None or value == "":
                raise ValueError(f"{path}, row {row}: {COLUMN} names no adapter; name one")
            if not isinstance(value, str):
                raise ValueError(f"{path}, row {row}: {COLUMN} is {value!r:.40}, not text")
        counted.update(values)
        first_row += len(rows)
    if not counted:
        raise ValueError(f"{path} has no rows")
    if unknown := sorted(counted.keys() - members.keys()):
        raise ValueError(
            f"{path} names adapters that do not exist: {listing(unknown)}; use {listing(members)}"
        )
    return counted


def _load(options: PredictOptions, members: Mapping[str, Path]) -> _Bank:
    options.check()
    mixing.names_of(None, options)
    settings = {name: saved.settings_of(folder) for name, folder in members.items()}
    first = next(iter(settings.values()))
    adapter.check_shared(settings)
    source = options.backbone or first["backbone"]
    backbone = adapter.load_backbone(options, first)
    model, params = cj.stack_adapters(list(members.values()), backbone)
    params = adapter.stored(params, model.method, options, first)
    tokenizer = adapter.load_tokenizer(source, backbone, first["max_length"])
    groups: dict[str, list[int]] = {}
    for place, each in enumerate(settings.values()):
        groups.setdefault(_way_of_computing(each), []).append(place)
    numbered = list(settings.values())
    made = [
        _group(options, places, numbered[places[0]], model, params, tokenizer)
        for places in groups.values()
    ]
    of_rows = all(group.objective.has_row_labels for group in made)
    return _Bank(
        {name: place for place, name in enumerate(members)},
        [each["label_names"] if of_rows else [] for each in numbered],
        made,
        first["max_length"],
    )


def _way_of_computing(settings: Mapping[str, Any]) -> str:
    """Returns a key of the settings that the adapters of a group share.

    On a T5 they include the labels, which are text there, and for tags of words the tags.
    """
    names = ["benchmark", "embedding", "text_to_text"]
    if "text_to_text" in settings or settings["kind"] == "tagging":
        names.append("label_names")
    return json.dumps([settings.get(name) for name in names], sort_keys=True)


def _group(
    options: PredictOptions,
    members: list[int],
    settings: Mapping[str, Any],
    model: cj.Adapted,
    params: Any,
    tokenizer: Any,
) -> _Group:
    objective = from_settings(
        settings, model, tokenizer, num_beams=options.num_beams, evaluate_by="scoring"
    )
    objective.check_predicts(logits=options.logits)
    compiled = jax.jit(objective.outputs)
    return _Group(
        members,
        objective,
        lambda batch: jax.device_get(compiled(params, batch)),
        data_rows.ColumnReader(options.input, objective.columns),
    )


def _encoded(group: _Group, rows: Rows, positions: np.ndarray, before: int) -> tokens.Encoded:
    """Encodes the rows at some positions of a chunk that follows `before` other rows."""
    own = rows.take(positions) if isinstance(rows, pa.Table) else [rows[i] for i in positions]
    names = data_rows.column_names(own)
    # The column may be there for the pairs of another adapter.
    if "sentence2" in names and not any(data_rows.column_values(own, "sentence2")):
        names.remove("sentence2")
    return group.objective.encode(group.reader.read(own, names, (before + 1 + positions).tolist()))


def _predicted(
    group: _Group, encoded: tokens.Encoded, ids: np.ndarray, batch_size: int
) -> base.Predicted:
    """Returns the predictions of rows, each by its member; a row may have several examples."""
    of_example = (ids if encoded.groups is None else ids[encoded.groups]).astype(np.int32)

    def outputs(batch: Any) -> Any:
        # The index of a filling row is -1, which selects an arbitrary member.
        return group.outputs({**batch, "adapter_ids": of_example[batch["indices"]]})

    found = compute_outputs.split_outputs(outputs, encoded, batch_size, description=None)
    predicted: Any = group.objective.predictions(found, encoded)
    return predicted


def _columns(
    bank: _Bank,
    predicted: base.Predicted,
    positions: np.ndarray,
    ids: np.ndarray,
    added: Sequence[str],
) -> list[tuple[np.ndarray, dict[str, pa.Array]]]:
    """Returns, for each member, the positions of its rows and the columns to add to them."""
    parts = []
    for member in np.unique(ids):
        rows, names = np.flatnonzero(ids == member), bank.label_names[member]
        own: Any
        if isinstance(predicted, list):
            own = [predicted[i] for i in rows]
        else:
            # Cut to the labels of the member; the bank's heads have the width of the widest.
            own = np.asarray(predicted, np.float64)[rows, : len(names) or 1]
            prediction_files.check_logits(own, len(rows), len(names) or 1)
        parts.append((positions[rows], prediction_files.added_columns(own, names, added)))
    return parts


def _in_order(parts: Sequence[tuple[np.ndarray, dict[str, pa.Array]]]) -> dict[str, pa.Array]:
    """Returns the columns of all rows, in the order of the file."""
    back = pa.array(np.argsort(np.concatenate([positions for positions, _ in parts])))
    return {
        name: pa.concat_arrays([columns[name] for _, columns in parts]).take(back)
        for name in parts[0][1]
    }
