"""A saved adapter at work: the commands `evaluate` and `predict`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import compacter_jax as cj
from compacter_jax.catalogue import from_dict
from compacter_jax.compositions.base import parallel_names
from compacter_jax.files import replace_file
from compacter_jax.messages import quote
from compacter_jax.models.loading import module_from_config, read_config
from train import compiled, compositions, data, hosts, predictions, shapes, step, tasks
from train.objective import Objective, from_settings
from train.options import AdapterOptions, EvaluateOptions, PredictOptions
from train.report import number
from train.saved import settings_of
from train.tasks.benchmarks import find as find_benchmark
from train.tasks.labels import told

# batch -> tree of [batch, …] arrays
OutputsFunction = Callable[[step.Batch], Any]


def split_outputs(
    outputs: OutputsFunction,
    encoded: data.Encoded,
    batch_size: int,
    *,
    description: str | None,
    before_batch: Callable[[], object] | None = None,
) -> Any:
    """Outputs of every example, in the order of the data.

    Args:
      outputs: batch -> tree of `[rows, …]` arrays; of several hosts each has its part of the rows.
      encoded: the examples.
      batch_size: rows of a batch, over all hosts.
      description: of the progress bar; None shows none.
      before_batch: called before every batch.

    Returns:
      A tree of `[examples, …]` arrays.
    """
    rows: Any = None
    with tqdm(
        total=len(encoded),
        desc=description,
        # Short beside training: of use to who watches, noise in a log file.
        disable=True if description is None or not hosts.is_first() else None,
        leave=False,
        unit="ex",
    ) as bar:
        part = hosts.index(), hosts.number()
        for batch in data.batches(encoded, batch_size, shuffle=False, part=part):
            if before_batch is not None:
                before_batch()
            if hosts.is_first():
                compiled.announce()
            indices, y = hosts.gather((batch["indices"], outputs(batch)))
            if rows is None:
                rows = jax.tree.map(lambda x: np.zeros((len(encoded), *x.shape[1:]), x.dtype), y)
            real = indices >= 0
            for whole, new in zip(jax.tree.leaves(rows), jax.tree.leaves(y), strict=True):
                whole[indices[real]] = new[real]
            bar.update(int(real.sum()))
    if rows is None:
        raise ValueError("no examples to compute outputs of")
    return rows


@dataclasses.dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on its backbone, ready to compute.

    Attributes:
      settings: of `adapter_config.json`.
      objective: with the limits of training.
      outputs: batch -> what the objective scores or predicts by, on the host.
    """

    settings: dict[str, Any]
    objective: Objective
    outputs: OutputsFunction


def load(options: AdapterOptions, **changes: Any) -> LoadedAdapter:
    """Loads an adapter, and the backbone it names unless another folder is given.

    Args:
      options: which.
      **changes: as `train.objective.from_settings` takes them.

    Raises:
      FileNotFoundError, ValueError: as `compacter_jax.load_adapter`, or if `fit` did not write it.
    """
    options.check()
    expression = compositions.of_saved(options.adapter)
    if expression is None:
        settings = settings_of(compositions.folder_of(options.adapter))
    else:
        settings = joined_settings(expression)
    name = options.backbone or settings["backbone"]
    backbone = load_backbone(
        options, settings, None if expression is None else compositions.of_all(expression)
    )
    if expression is None:
        model, params = cj.load_adapter(compositions.folder_of(options.adapter), backbone)
    else:
        model, params = compositions.load(expression, backbone, name)
    params = stored(params, model.method, options, settings)
    if model.method.moves_backbone:
        # It would be moved again for every batch.
        model, params = model.precomputed(params)
    tokenizer = load_tokenizer(name, backbone, settings["max_length"])
    objective = from_settings(settings, model, tokenizer, num_beams=options.num_beams, **changes)
    jitted = jax.jit(objective.outputs)
    return LoadedAdapter(settings, objective, lambda batch: jax.device_get(jitted(params, batch)))


def load_backbone(
    options: AdapterOptions, settings: Mapping[str, Any], method: cj.MethodConfig | None = None
) -> cj.Backbone:
    """Loads the backbone of a saved adapter, having checked that the method fits it.

    Args:
      options: may name another folder, or dtype.
      settings: of `settings_of`.
      method: to be used; by default that of the settings.

    Raises:
      ValueError, OSError: as `train.shapes.check_fit` and `compacter_jax.load_backbone`.
    """
    name, head = options.backbone or settings["backbone"], head_of(settings)
    if settings["sites"] is None:
        config = read_config(name)
        method = method or from_dict(settings["method"])
        shapes.check_fit(module_from_config(config, **head), method, config, settings["max_length"])
    return cj.load_backbone(name, **head, dtype=jnp.dtype(options.dtype or settings["dtype"]))


# What saved adapters must share to be computed together.
SHARED = ("backbone", "head", "kind", "max_length", "dtype", "backbone_dtype")


def check_shared(settings: Mapping[str, Mapping[str, Any]], keys: Sequence[str] = SHARED) -> None:
    """ValueError if adapters, name -> settings, cannot be computed together."""
    first_name, first = next(iter(settings.items()))
    for name, each in settings.items():
        for key in keys:
            if each.get(key) != first.get(key):
                raise ValueError(
                    f"adapters that are computed together must share their {key}: {first_name} has "
                    f"{quote(first.get(key), 100)}, {name} has {quote(each.get(key), 100)}"
                )


def joined_settings(expression: compositions.Node) -> dict[str, Any]:
    """What to predict with a composition of saved adapters by, as `settings_of` one.

    Raises:
      ValueError: if those whose heads are used differ in more than labels, or in these where they
        are not beside each other.
    """
    folders = compositions.with_heads(expression)
    settings = {name: settings_of(folder) for name, folder in folders.items()}
    check_shared(settings, (*SHARED, "text_to_text", "benchmark"))
    joined = dict(next(iter(settings.values())))
    parallel = parallel_names(compositions.of_all(expression))
    labels = {}
    for group in parallel or ("",):
        of_group = {
            name: each
            for name, each in settings.items()
            if not group or f"{name}/".startswith(f"{group}/")
        }
        check_shared(of_group, ("label_names",))
        labels[group] = next(iter(of_group.values()))["label_names"]
    if parallel:
        joined["parallel_label_names"] = labels
    counts = [each["num_labels"] for each in settings.values() if each["num_labels"] is not None]
    return joined | {"num_labels": max(counts, default=None)}


def labels_of(adapter: LoadedAdapter) -> list[str] | dict[str, list[str]]:
    """Names of the labels; of adapters beside each other, name -> those of one."""
    names = parallel_names(adapter.objective.model.method)
    own: list[str] = adapter.settings["label_names"]
    if not names:
        return own
    each: dict[str, list[str]] = adapter.settings.get("parallel_label_names", {})
    return {name: each.get(name, own) for name in names}


def stored(
    params: Any, method: cj.MethodConfig, options: AdapterOptions, settings: Mapping[str, Any]
) -> Any:
    """The parameters, what was not trained in the dtype that is asked for, or that of training."""
    dtype = options.backbone_dtype or settings.get("backbone_dtype", "float32")
    if dtype == "float32":
        return params
    trained, frozen = cj.partition(params, cj.label_params(params, method))
    return cj.merge(trained, cj.cast_frozen(frozen, dtype))


def head_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What to load the backbone of a saved adapter with, by its `adapter_config.json`."""
    head, num_labels = settings["head"], settings["num_labels"]
    # Written for every head of an encoder; one of answers in a text takes no such number.
    return {"head": head, "num_labels": None if head == "question_answering" else num_labels}


def load_tokenizer(name: str, backbone: cj.Backbone, max_length: int) -> Any:
    """The tokenizer beside a backbone; ValueError as `train.data.load_tokenizer`."""
    return data.load_tokenizer(
        name,
        vocab_size=backbone.config.vocab_size,
        # Positions of T5 are relative.
        max_position_embeddings=getattr(backbone.config, "max_position_embeddings", None),
        max_length=max_length,
    )


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """The command `evaluate`: metrics of a split, printed and written as JSON."""
    name = f"evaluation_{options.task}_{options.split}.json".replace("/", "_")
    output = options.output or _beside(options) / name
    # Opened first: a file that cannot be written is found before anything is computed.
    with replace_file(output) as temporary:
        result = _evaluated(options)
        temporary.write_text(_as_json(result), encoding="utf-8")
    for name, value in result["metrics"].items():
        print(f"{options.split} {name}: {number(value)}")
    print(f"written to {output}")
    return result


def _evaluated(options: EvaluateOptions) -> dict[str, Any]:
    """What `evaluate` writes."""
    adapter = load(options, evaluate_by=options.evaluate_by)
    _check_task_named(options, adapter.settings.get("task"))
    kind = adapter.settings["kind"]
    names = labels_of(adapter)
    if isinstance(names, dict) and len({tuple(each) for each in names.values()}) > 1:
        raise ValueError(
            f"the adapters of {options.adapter} have different labels, and a task has one set of "
            "them; evaluate each by itself"
        )
    task = tasks.load_task(
        options.task,
        regression=kind == "regression",
        text=kind == "text",
        **tasks.sources(options),
        splits=(options.split,),
        label_names=adapter.settings["label_names"] or None,
        are_numbered=_has_fixed_labels(adapter.settings.get("task")),
    )
    _check_same_kind(options.adapter, adapter, task)
    encoded = adapter.objective.encode(task.splits[options.split])
    for line in [*task.notices(), *adapter.objective.notices(), *encoded.notices(options.split)]:
        print(line)
    outputs = split_outputs(
        adapter.outputs, encoded, options.eval_batch_size, description=options.split
    )
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
    return result


def _beside(options: EvaluateOptions) -> Path:
    """Where results go by default: to the adapter; of a composition, to the folder we are in."""
    if compositions.of_saved(options.adapter):
        return Path()
    return compositions.folder_of(options.adapter)


def _has_fixed_labels(task: str | None) -> bool:
    """Whether a task is a built-in one or a benchmark, whose labels are numbered once for all."""
    return task in tasks.BUILT_IN or find_benchmark(task or "") is not None


def _check_task_named(options: EvaluateOptions, trained_on: str | None) -> None:
    """ValueError if no task and no files are given where the adapter's own task could be."""
    files = (options.train_file, options.validation_file, options.test_file)
    if options.task == tasks.CUSTOM and _has_fixed_labels(trained_on) and not any(files):
        raise ValueError(
            f"no --task was given; the adapter in {options.adapter} was trained on {trained_on}: "
            f"give --task {trained_on}, another of the same labels, or files of your own"
        )


def _check_same_kind(folder: Path, adapter: LoadedAdapter, task: tasks.Task) -> None:
    """ValueError if an adapter cannot read the rows of a task, or predicts something else."""
    kind, own = adapter.settings["kind"], adapter.objective.benchmark
    if kind != task.kind:
        raise ValueError(f"the adapter in {folder} is of kind {kind}, not {task.kind}")
    if task.benchmark is not None and task.benchmark != own:
        raise ValueError(
            f"the adapter in {folder} was trained on {adapter.settings['task']}, and cannot read "
            f"the columns of {task.name}"
        )


def predict(options: PredictOptions) -> int:
    """The command `predict`: a file with predictions added, streamed; returns its rows."""
    predictions.check_files(options.input, options.output)
    adapter = load(options, evaluate_by="scoring")
    objective = adapter.objective
    objective.check_predicts(logits=options.logits)

    labels: Any = labels_of(adapter)

    def predict_chunk(columns: dict[str, list[Any]]) -> Any:
        encoded = objective.encode(columns)
        unknown.append(encoded.unknown)
        outputs = split_outputs(adapter.outputs, encoded, options.eval_batch_size, description=None)
        predicted = objective.predictions(outputs, encoded)
        truncated.append(encoded.num_truncated)
        if isinstance(predicted, Mapping):
            # Logits are as wide as the widest set of labels.
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
    unknown: list[data.Unknown] = []
    counts = LabelCounts(labels)
    with tqdm(desc="predict", unit="row") as bar:
        rows = predictions.predict_file(
            options.input,
            options.output,
            predict_chunk,
            label_names=labels,
            columns=objective.benchmark.columns if objective.benchmark is not None else {},
            write_logits=options.logits,
            progress=bar.update,
        )
    told_of_inputs = sum(unknown, data.Unknown()).notices("inputs")
    for line in [*counts.lines(), *objective.notices(), *told_of_inputs]:
        print(line)
    limit = adapter.settings["max_length"]
    say_predicted(options.output, rows, sum(truncated), limit, sum(invalid))
    return rows


class LabelCounts:
    """How many rows of a file are predicted to have each label.

    Args:
      names: of the labels; of several models, name -> those of one.
    """

    def __init__(self, names: Sequence[str] | Mapping[str, Sequence[str]]):
        self._names = names if isinstance(names, Mapping) else {"": names}
        self._counts = {name: np.zeros(len(each), int) for name, each in self._names.items()}

    def count(self, name: str, label_ids: Any) -> None:
        """Counts the rows of a chunk by the label that a model gives them."""
        self._counts[name] += np.bincount(label_ids, minlength=len(self._counts[name]))

    def count_logits(self, predicted: Mapping[str, Any]) -> None:
        """Counts a chunk: name -> `[rows, labels]` logits, or what is no label and not counted."""
        for name, logits in predicted.items():
            if len(self._counts[name]):
                self.count(name, np.argmax(logits, -1))

    def lines(self) -> list[str]:
        """Returns a line for each model that predicts labels: these, and on how many rows."""
        return [
            told(self._names[name], [counts.tolist()], f"{name}, rows predicted".removeprefix(", "))
            for name, counts in self._counts.items()
            if len(counts)
        ]


def say_predicted(output: Path, rows: int, truncated: int, limit: int, invalid: int) -> None:
    """Prints what became of the rows of a file: how many were cut, or have no prediction."""
    if truncated:
        print(f"{truncated} of {rows} rows were cut to {limit} tokens")
    if invalid:
        print(f"{invalid} of {rows} rows have no prediction: the text was no number")
    print(f"{rows} rows written to {output}")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it."""
    with replace_file(path) as temporary:
        temporary.write_text(_as_json(value), encoding="utf-8")


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
