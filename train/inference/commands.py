"""Commands `evaluate` and `predict` with a saved adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from compacter_jax.files import replace_file
from train import tasks
from train.cli import compositions as cli_compositions
from train.data import rows as data_rows
from train.data import tokens
from train.data.corpus import check_text_file
from train.data.words import WordCounts
from train.inference import compositions as inference_compositions
from train.inference import (
    embedding_arrays,
    mix_files,
    prediction_files,
    recordings,
    several_files,
)
from train.inference.adapter import LoadedAdapter, labels_of, load, translation_members
from train.inference.options import EvaluateOptions, PredictOptions, files_of
from train.objectives import Objective
from train.report import as_json, number
from train.speech.features import Channels
from train.tasks import multilingual
from train.tasks.benchmarks import find as find_benchmark
from train.tasks.labels import told


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Runs `evaluate`: prints the metrics of a split, or of several files, and writes them as JSON.

    For several files, a report with tables lies beside the JSON file.
    """
    options.check()
    for path in options.inputs:
        check_text_file(path)
    name = f"evaluation_{options.task}_{options.split}.json".replace("/", "_")
    output = options.output or _beside(options) / name
    written = {"--output": output}
    if options.test_files is not None:
        written["the report of --output"] = output.with_suffix(".md")
    mix_files.check_files(options, written, options.inputs)
    # Opened first: a file that cannot be written is found before anything is computed.
    with replace_file(output) as temporary:
        if options.test_files is None:
            result = _evaluated(options)
            for name, value in result["metrics"].items():
                print(f"{options.split} {name}: {number(value)}")
        else:
            result = _of_several(options, written["the report of --output"])
        temporary.write_text(as_json(result), encoding="utf-8")
    print(f"written to {output}")
    return result


def _loaded(options: EvaluateOptions) -> LoadedAdapter:
    """Loads the adapter of `evaluate`; raises ValueError if it cannot be evaluated on a task."""
    adapter = load(options, evaluate_by=options.evaluate_by)
    _check_task_named(options, adapter.settings.get("task"))
    names = labels_of(adapter)
    if isinstance(names, dict) and len({tuple(each) for each in names.values()}) > 1:
        raise ValueError(
            f"the adapters of {options.adapter} have different labels, but a task has one set of "
            "labels; evaluate each adapter by itself"
        )
    return adapter


def _evaluated(options: EvaluateOptions) -> dict[str, Any]:
    """Returns the result that `evaluate` writes for one split."""
    adapter = _loaded(options)
    with mix_files.weights_writer(options.write_weights, *adapter.mixed_at) as write:
        return _result(adapter, options, write)


def _of_several(options: EvaluateOptions, report: Path) -> dict[str, Any]:
    """Returns the results of several test files, and writes and prints their report."""
    adapter = _loaded(options)
    of_all = {"adapter": str(options.adapter), "task": options.task, "split": options.split}
    results: dict[str, Any] = {}
    with mix_files.weights_writer(options.write_weights, *adapter.mixed_at) as write:
        for name, path in files_of(options.test_files or "").items():
            print(f"{name}:")
            alone = dataclasses.replace(options, test_file=path, test_files=None)
            found = _result(adapter, alone, write, name)
            results[name] = {key: value for key, value in found.items() if key not in of_all}
    text = several_files.report(options.adapter, results)
    with replace_file(report) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {report}")
    return {**of_all, "files": results}


def _result(
    adapter: LoadedAdapter,
    options: EvaluateOptions,
    write: mix_files.WriteWeights,
    name: str | None = None,
) -> dict[str, Any]:
    """Returns the result of an adapter on one split, and writes the weights that it finds.

    Args:
      adapter: the adapter.
      options: the options of the command.
      write: the writer of weights.
      name: the name of the file, if there are several.
    """
    task = _task(adapter, options)
    _check_same_kind(options.adapter, adapter, task)
    encoded = adapter.objective.encode(task.splits[options.split])
    for line in [
        *task.user_messages(),
        *adapter.objective.user_messages(),
        *encoded.user_messages(options.split),
    ]:
        print(line)
    outputs, mixed = adapter.compute(encoded, options.eval_batch_size, options.split)
    result = {
        "adapter": str(options.adapter),
        "task": options.task,
        "split": options.split,
        "examples": len(encoded),
        "truncated": encoded.num_truncated,
        "metrics": adapter.objective.scores(outputs, encoded),
    }
    if encoded.target_texts is not None:
        result["truncated_targets"] = encoded.target_texts.num_truncated
    if encoded.words is not None:
        counts = encoded.word_counts
        result |= {"words": counts.words, "cut_words": counts.cut, "dropped_words": counts.dropped}
    if options.mix is not None:
        result["mix"] = options.mix
    if mixed is not None:
        write(mixed, name)
        given = ("mix_steps", "mix_learning_rate", "mix_sites", "mix_positions")
        result |= {each: getattr(options, each) for each in given}
        result |= mix_files.summary(mixed, *adapter.mixed_at)
    return result


def _task(adapter: LoadedAdapter, options: EvaluateOptions) -> tasks.Task:
    """Reads the split that an adapter is evaluated on."""
    kind = adapter.settings["kind"]
    if kind in multilingual.KINDS:
        return multilingual.load_split(options, kind, adapter.settings[kind]["directions"])
    if options.parallel_files is not None or options.directions is not None:
        raise ValueError(
            f"--parallel-files and --directions are for adapters that translate, but the one in "
            f"{options.adapter} is for tasks of kind {kind}"
        )
    # Plain text has no columns that would say what the adapter does with it.
    on_text = kind in tasks.ON_TEXT and options.task == tasks.CUSTOM
    return tasks.load_task(
        kind if on_text else options.task,
        regression=kind == "regression",
        text=kind == "text",
        tagging=kind == "tagging",
        embedding=kind == "embedding",
        **tasks.sources(options),
        splits=(options.split,),
        label_names=adapter.settings["label_names"] or None,
        are_numbered=_has_fixed_labels(adapter.settings.get("task")),
    )


def _beside(options: EvaluateOptions) -> Path:
    """Returns the default folder of results: the adapter's; for a composition, the current one."""
    if inference_compositions.of_saved(options.adapter):
        return Path()
    if translation_members(options.adapter):
        return options.adapter
    return cli_compositions.folder_of(options.adapter)


def _has_fixed_labels(task: str | None) -> bool:
    """Returns True for a built-in task or a benchmark, whose labels have fixed numbers."""
    return task in tasks.BUILT_IN or find_benchmark(task or "") is not None


def _check_task_named(options: EvaluateOptions, trained_on: str | None) -> None:
    """Raises ValueError without task and files if the adapter's own task could be given."""
    files = (options.train_file, options.validation_file, options.test_file, options.test_files)
    if options.task == tasks.CUSTOM and _has_fixed_labels(trained_on) and not any(files):
        raise ValueError(
            f"no --task was given; the adapter in {options.adapter} was trained on {trained_on}; "
            f"give --task {trained_on}, another task with the same labels, or your own files"
        )


def _check_same_kind(folder: Path, adapter: LoadedAdapter, task: tasks.Task) -> None:
    """Raises ValueError if an adapter cannot read the rows of a task, or predicts another kind."""
    kind, own = adapter.settings["kind"], adapter.objective.benchmark
    if kind != task.kind:
        raise ValueError(
            f"the adapter in {folder} is for tasks of kind {kind}, but {task.name} has kind "
            f"{task.kind}"
        )
    if task.benchmark is not None and task.benchmark != own:
        raise ValueError(
            f"the adapter in {folder} was trained on {adapter.settings['task']}, and cannot read "
            f"the columns of {task.name}"
        )


def predict(options: PredictOptions) -> int:
    """Runs `predict`: streams a file and adds predictions to it; returns the number of rows.

    For an output .npy it writes the embeddings alone.
    """
    suffixes = (*data_rows.SUFFIXES, embedding_arrays.SUFFIX)
    if options.input.is_dir():
        recordings.check(options)
    else:
        data_rows.check_files(options.input, options.output, suffixes)
    mix_files.check_files(options, {"--output": options.output}, [options.input])
    adapter = load(options, evaluate_by="scoring")
    adapter.objective.check_predicts(logits=options.logits)
    as_array = options.output.suffix.lower() == embedding_arrays.SUFFIX
    if as_array and adapter.settings["kind"] != "embedding":
        raise ValueError(
            f"{options.output} is an array of embeddings, but the adapter in {options.adapter} is "
            f"for tasks of kind {adapter.settings['kind']}; use {', '.join(data_rows.SUFFIXES)}"
        )

    with recordings.as_file(options, adapter) as (source, folder):
        return _predict(options, adapter, source, adapter.objective.of_file(source, folder))


def _predict(
    options: PredictOptions, adapter: LoadedAdapter, source: Path, objective: Objective
) -> int:
    """Runs `predict` on a file of inputs.

    Args:
      options: the options of the command.
      adapter: the adapter.
      source: the file.
      objective: the objective of the adapter, for this file.
    """
    labels: Any = labels_of(adapter)

    def predict_chunk(columns: dict[str, list[Any]]) -> Any:
        encoded = objective.encode(columns)
        unknown.append(encoded.unknown)
        words.append(encoded.word_counts)
        if encoded.frames is not None:
            channels.append(encoded.frames.channels)
        outputs, mixed = adapter.compute(encoded, options.eval_batch_size)
        if mixed is not None:
            write_weights(mixed, None)
            entropies.append(mixed.entropies[:, [0, -1]])
        predicted = objective.predictions(outputs, encoded)
        truncated.append(encoded.num_truncated)
        if isinstance(predicted, Mapping):
            # Logits have the width of the largest set of labels.
            predicted = {
                name: np.asarray(each)[:, : len(labels[name]) or 1]
                for name, each in predicted.items()
            }
            counts.count_logits(predicted)
            return predicted
        counts.count_logits({"": predicted})
        invalid.append(sum(value is None for value in predicted))
        return predicted

    truncated: list[int] = []
    invalid: list[int] = []
    unknown: list[tokens.Unknown] = []
    words: list[WordCounts] = []
    channels: list[Channels] = []
    entropies: list[np.ndarray] = []
    counts = LabelCounts(labels)
    weights = mix_files.weights_writer(options.write_weights, *adapter.mixed_at)
    with weights as write_weights, tqdm(desc="predict", unit="row") as bar:
        write: Any = prediction_files.predict_file
        how: dict[str, Any] = {
            "label_names": labels,
            "columns": objective.columns,
            "write_logits": options.logits,
        }
        if options.output.suffix.lower() == embedding_arrays.SUFFIX:
            write, how = embedding_arrays.write_array, {}
        rows = write(source, options.output, predict_chunk, progress=bar.update, **how)
    limit = adapter.settings["max_length"]
    told_of_inputs = sum(unknown, tokens.Unknown()).user_messages("inputs")
    told_of_inputs += sum(words, WordCounts()).user_messages("inputs", limit)
    told_of_inputs += sum(channels, Channels()).user_messages()
    for line in [*counts.lines(), *objective.user_messages(), *told_of_inputs]:
        print(line)
    if entropies:
        before, after = np.concatenate(entropies).mean(0)
        print(f"mean entropy {before:.4f} before and {after:.4f} after {options.mix_steps} steps")
    say_predicted(options.output, rows, sum(truncated), limit, sum(invalid))
    return rows


class LabelCounts:
    """Counts of the rows of a file that are predicted to have each label.

    Args:
      names: the names of the labels; with several models, name of a model -> names of its labels.
    """

    def __init__(self, names: Sequence[str] | Mapping[str, Sequence[str]]):
        self._names = names if isinstance(names, Mapping) else {"": names}
        self._counts = {name: np.zeros(len(each), int) for name, each in self._names.items()}

    def count(self, name: str, label_ids: Any) -> None:
        """Counts the rows of a chunk by the label that a model predicts."""
        self._counts[name] += np.bincount(label_ids, minlength=len(self._counts[name]))

    def count_logits(self, predicted: Mapping[str, Any]) -> None:
        """Counts a chunk by name -> `[rows, labels]` logits; other predictions are not counted."""
        for name, logits in predicted.items():
            if len(self._counts[name]):
                self.count(name, np.argmax(logits, -1))

    def lines(self) -> list[str]:
        """Returns a line for each model that predicts labels, with the labels and their counts."""
        return [
            told(self._names[name], [counts.tolist()], f"{name}, rows predicted".removeprefix(", "))
            for name, counts in self._counts.items()
            if len(counts)
        ]


def say_predicted(output: Path, rows: int, truncated: int, limit: int, invalid: int) -> None:
    """Prints how many rows of a file were written, were truncated, or have no prediction."""
    if truncated:
        print(f"{truncated} of {rows} rows were cut to {limit} tokens")
    if invalid:
        print(
            f"{invalid} of {rows} rows have no prediction, since the generated text is not a number"
        )
    print(f"{rows} rows written to {output}")
