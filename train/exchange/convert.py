"""Command `convert`: adapters of other libraries to this package's format, and the reverse."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from compacter_jax.exchange import adapterhub, peft
from compacter_jax.files import read_json
from train import report, tasks
from train.cli import compositions
from train.exchange.options import ConvertOptions
from train.folders import new_folder
from train.inference import saved
from train.objectives import check_length
from train.tasks import labels, text_format

OURS = "compacter_jax"


_IMPORTS: dict[str, Callable[..., Any]] = {
    "adapterhub": adapterhub.import_adapterhub,
    "peft": peft.import_peft,
}


_EXPORTS: dict[str, Callable[..., Any]] = {
    "adapterhub": adapterhub.export_adapterhub,
    "peft": peft.export_peft,
}


# PEFT's task type -> the head that it needs, if it is not the default of the backbone.
_PEFT_HEADS = {
    "SEQ_CLS": "sequence_classification",
    "TOKEN_CLS": "token_classification",
    "QUESTION_ANS": "question_answering",
}


def convert(options: ConvertOptions) -> None:
    """Runs the command `convert`.

    Raises:
      FileNotFoundError, ValueError: as the library's readers and writers, or if a flag is missing
        for a fact that the folder lacks; nothing is written then.
    """
    source, folder = options.source
    if source not in (OURS, *_IMPORTS):
        raise ValueError(
            f"--from {source} {folder} names no format; use --from {OURS}, "
            f"{' or '.join(_IMPORTS)}, and the folder after it"
        )
    if source == options.to_format:
        raise ValueError(
            f"--from {source} and --to-format {source} are the same; choose another --to-format"
        )
    check_new(options.to)
    if source == OURS:
        folder = compositions.folder_of(folder)
        backbone, model, params = load_ours(folder, options.backbone)
    else:
        _check_not_ours(source, folder)
        backbone = _load_backbone(options)
        model, params = _IMPORTS[source](folder, backbone)
        _note_new_head(backbone, params, folder)
    if options.to_format != OURS:
        with new_folder(options.to) as temporary:
            _EXPORTS[options.to_format](temporary, model, params)
            names = cj.read_adapter_config(folder).get("label_names") or ()
            _name_labels(temporary, names)
    else:
        metadata = _metadata(options, backbone, model)
        names = metadata.get("label_names", ())
        with new_folder(options.to) as temporary:
            cj.save_adapter(temporary, model, params, metadata=metadata)
    if names:
        print(labels.told(names, (), "in the order of the head's outputs"))
    print(f"{model.method.kind} adapter written to {options.to}")


def load_ours(folder: Path, name: str | None) -> tuple[cj.Backbone, cj.Adapted, Any]:
    """Loads an adapter of this package with the backbone `name`, by default the recorded one."""
    settings = cj.read_adapter_config(folder)
    name = name or settings.get("backbone")
    if name is None:
        raise ValueError(f"{folder} does not name its backbone; give --backbone")
    backbone = cj.load_backbone(name, **saved.head_of(settings))
    return backbone, *cj.load_adapter(folder, backbone)


def check_new(path: Path, flag: str = "--to") -> None:
    """Raises ValueError if there is something at a path that a flag gives, to be written."""
    # A dangling link counts as existing.
    if (path.exists() or path.is_symlink()) and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} already exists; choose another {flag}")


def _check_not_ours(source: str, folder: Path) -> None:
    """Raises ValueError for an adapter of this package, whose settings file has the same name."""
    try:
        cj.read_adapter_config(compositions.folder_of(folder))
    except (ValueError, OSError):
        return
    raise ValueError(
        f"--from {source} {folder} holds an adapter of this package; use --from {OURS} {folder}"
    )


def _load_backbone(options: ConvertOptions) -> cj.Backbone:
    """Loads the backbone with the head that the other library's folder needs."""
    source, folder = options.source
    if options.backbone is None:
        raise ValueError(
            f"--from {source} needs --backbone, the backbone that the adapter was trained with"
        )
    head: dict[str, Any] = {}
    if source == "adapterhub":
        head = adapterhub.read_adapterhub_head(folder)
    else:
        task = read_json(folder / peft.CONFIG_NAME).get("task_type")
        task = task if isinstance(task, str) else None  # any other type is refused by the reader
        if task in _PEFT_HEADS:
            head = {"head": _PEFT_HEADS[task]}
        if task in ("SEQ_CLS", "TOKEN_CLS"):
            head["num_labels"] = 1 if options.regression else len(_label_names(options)) or None
    if head.get("head") == "sequence_classification":
        head["pooling"] = "first"  # which alone the other libraries have
    return cj.load_backbone(options.backbone, dtype=jnp.dtype(options.dtype), **head)


def _note_new_head(backbone: cj.Backbone, params: Any, folder: Path) -> None:
    """Prints a line if the head consists of random numbers."""
    before, after = (flatten_dict(tree, sep="/") for tree in (backbone.params, params))
    if any(np.array_equal(before[path], after[path]) for path in backbone.new_parameters):
        print(
            f"neither {folder} nor the backbone has {', '.join(backbone.new_parameters)}; these "
            "parameters are random, so predictions are meaningless"
        )


def _metadata(options: ConvertOptions, backbone: cj.Backbone, model: cj.Adapted) -> dict[str, Any]:
    """Returns the metadata that `evaluate` and `predict` need, if there is something to predict."""
    metadata: dict[str, Any] = {"backbone": backbone.name, "dtype": options.dtype}
    head = getattr(model.backbone, "head", None)
    if head not in ("sequence_classification", "token_classification", "conditional_generation"):
        print(f"`evaluate` and `predict` cannot use this adapter, since it has head={head!r}")
        return metadata
    if head == "sequence_classification" and _is_multilabel(options, backbone):
        print(
            "the head predicts each label independently (multilabel classification), so "
            "`evaluate` and `predict`, which choose one label, cannot use this adapter"
        )
        return metadata
    writes = head == "conditional_generation"
    names = _label_names(options) or _names_of_folder(options) or _names_of(backbone.config)
    if head == "token_classification":
        kind = "tagging"
        _check_names(names, model.backbone.num_labels)
    elif options.regression or (not writes and model.backbone.num_labels == 1):
        kind, names = "regression", ()
    elif writes and not names:
        kind = "text"
    else:
        kind = "classification"
        _check_names(names, None if writes else model.backbone.num_labels)
    if not writes:
        check_length(backbone.config, model.method, options.max_length)
    metadata |= {"task": options.task or "custom", "kind": kind, "label_names": list(names)}
    metadata["max_length"] = options.max_length
    if writes:
        metadata["text_to_text"] = text_format.to_json(_text_format(options, kind, names))
    return metadata


def _text_format(
    options: ConvertOptions, kind: Any, names: Sequence[str]
) -> text_format.TextFormat:
    prefix = options.prefix if options.prefix is not None else options.task
    if prefix is None:
        raise ValueError(
            "the text that the adapter's inputs begin with is unknown; give --task, or --prefix "
            "(which may be '')"
        )
    return text_format.TextFormat(
        kind=kind,
        prefix=prefix,
        label_names=tuple(names),
        score_step=options.score_step,
        max_target_length=options.max_target_length,
        max_new_tokens=options.max_target_length,
        evaluate_by=options.evaluate_by,
        num_beams=options.num_beams,
    )


def _label_names(options: ConvertOptions) -> tuple[str, ...]:
    """Returns the label names that the flags determine."""
    if options.label_names or options.regression:
        return options.label_names
    return tasks.SENTIMENT_LABELS if options.task in tasks.BUILT_IN else ()


def _names_of_folder(options: ConvertOptions) -> tuple[str, ...]:
    """Returns the label names that AdapterHub stores with a head."""
    settings = _head_of_folder(options)
    # For models with flexible heads the names are one level deeper.
    found = settings.get("label2id") or _flexible(settings).get("label2id") or {}
    ids = list(found.values()) if isinstance(found, dict) else [found]
    if not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError(
            f"label2id={found!r} in {options.source[1] / adapterhub.HEAD_CONFIG_NAME} must map "
            "names to the numbers 0, 1, …, each once; give --label-names"
        )
    return _meaningful(sorted(found, key=lambda name: found[name]))


def _head_of_folder(options: ConvertOptions) -> dict[str, Any]:
    """Returns AdapterHub's settings of a head; empty if there is none."""
    library, folder = options.source
    path = folder / adapterhub.HEAD_CONFIG_NAME
    return read_json(path) if library == "adapterhub" and path.is_file() else {}


def _flexible(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns AdapterHub's settings of a flexible head; empty for other heads."""
    config = settings.get("config")
    return config if isinstance(config, dict) else {}


def _is_multilabel(options: ConvertOptions, backbone: cj.Backbone) -> bool:
    """Returns True if the head predicts several labels at once."""
    if head := _flexible(_head_of_folder(options)):
        return head.get("head_type") == "multilabel_classification"
    return getattr(backbone.config, "problem_type", None) == "multi_label_classification"


def _names_of(config: Any) -> tuple[str, ...]:
    """Returns the label names of a backbone that was fine-tuned before."""
    found = config.id2label or {}
    return _meaningful([found[i] for i in sorted(found)])


def _meaningful(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names, unless they are the placeholders of transformers."""
    return () if all(name.startswith("LABEL_") for name in names) else tuple(names)


def _name_labels(folder: Path, names: Sequence[str]) -> None:
    """Writes the names into AdapterHub's settings of the head, if the folder has a head."""
    path = folder / adapterhub.HEAD_CONFIG_NAME
    if not path.is_file() or not names:
        return
    settings = json.loads(path.read_text("utf-8"))
    for place in (settings, settings.get("config") or {}):
        if "label2id" in place:
            place["label2id"] = {name: i for i, name in enumerate(names)}
    report.write_json(path, settings)


def _check_names(names: Sequence[str], num_labels: int | None) -> None:
    if not names:
        raise ValueError(
            f"the names of the {num_labels} labels are unknown; give --label-names, or --task for "
            "those of a built-in task, or --regression"
        )
    labels.check_names(names, "--label-names")
    if num_labels is not None and len(names) != num_labels:
        raise ValueError(
            f"--label-names gives {len(names)} names, {', '.join(names)}, but the head has "
            f"{num_labels} labels; give one name for each label"
        )
