"""Settings of saved adapters, checked before they are used."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import compacter_jax as cj
from compacter_jax.adapter_files import CONFIG_NAME, weights_name
from compacter_jax.files import check_fields
from compacter_jax.messages import listing, quote
from compacter_jax.models.pooling import DEFAULT, Pooling
from train import tasks
from train.cli.options import BackboneDtype, EmbeddingLoss, EvaluateBy
from train.tasks import text_format
from train.tasks.benchmark import Kind
from train.tasks.labels import check_names

_FIELDS: Mapping[str, Any] = {
    "backbone": str,
    "backbone_dtype": BackboneDtype,
    "benchmark": dict[str, Any],
    "dtype": Literal["float32", "bfloat16"],
    "embedding": dict[str, Any],
    "head": str | None,
    "kind": Kind,
    "label_names": list[str],
    "max_length": int,
    "num_labels": int | None,
    "pooling": Pooling | None,
    "masked_lm": dict[str, Any],
    "span_corruption": dict[str, Any],
    "speech": dict[str, Any],
    "task": str | None,
    "text_to_text": dict[str, Any],
    "translation": dict[str, Any],
}
_REQUIRED = ("backbone", "max_length", "kind", "label_names", "dtype")
_TEXT_FORMAT = {
    name: hint
    for name, hint in typing.get_type_hints(
        text_format.TextFormat, localns={"Kind": Kind, "EvaluateBy": EvaluateBy}
    ).items()
    if name not in ("kind", "label_names")
}
_EMBEDDING = {
    "pooling": Pooling,
    "normalize": bool,
    "lower_case": bool,
    "loss": EmbeddingLoss,
    "scale": float,
    "margin": float,
    "dimensions": list[int],
}
_MASKING = {"noise_density": float}
_NOISE = {"noise_density": float, "mean_span_length": float}
_TRANSLATION = {
    "directions": list[str],
    "is_open": bool,
    "max_target_length": int,
    "num_beams": int,
}
_SPEECH = {**_TRANSLATION, "max_seconds": float, "sampling_rate": int | None}
# Head of the backbone -> kinds of tasks that it supports.
_KINDS: Mapping[str | None, tuple[Kind, ...]] = {
    "sequence_classification": ("classification", "regression", "choice"),
    "question_answering": ("span",),
    "token_classification": ("tagging",),
    "masked_lm": ("masked_lm",),
    None: ("embedding",),
    "conditional_generation": tuple(
        set(typing.get_args(Kind)) - {"tagging", "embedding", "masked_lm"}
    ),
}
_WITH_LABELS = ("classification", "tagging")
# `fit` writes smaller numbers; larger ones would take memory before anything is generated.
_MOST_TOKENS, _MOST_BEAMS = 2**16, 2**10


def settings_of(folder: Path) -> dict[str, Any]:
    """Reads from `adapter_config.json` what an adapter predicts, and from which inputs.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it has too little to predict with, a field of another type, or contradictory
        fields; the message names the file and the field.
    """
    settings = cj.read_adapter_config(folder)
    if missing := [name for name in _REQUIRED if name not in settings]:
        raise ValueError(
            f"the adapter in {folder} was not saved for prediction by `python -m train fit` or "
            f"`convert`: its adapter_config.json has no {sorted(missing)}"
        )
    where = str(folder / CONFIG_NAME)
    check_fields(where, settings, _FIELDS)
    check_head(folder, settings)
    if settings["max_length"] < 3:
        raise ValueError(f"{where}: max_length={settings['max_length']} must be at least 3")
    _check_kind(where, settings)
    _check_labels(where, settings)
    return {**settings, "pooling": head_of(settings).get("pooling")}


def head_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments to load the backbone of a saved adapter with, from its settings."""
    head, labels = settings["head"], settings["num_labels"]
    if head == "sequence_classification":
        return {"head": head, "num_labels": labels, "pooling": settings.get("pooling") or DEFAULT}
    # Saved for every head of an encoder, although only classifiers take a number of labels.
    return {"head": head, "num_labels": labels if head == "token_classification" else None}


def check_head(folder: Path, settings: Mapping[str, Any]) -> None:
    """Checks the width of the head, which is created before the weights are read.

    Raises:
      ValueError: for a width that exceeds what a file of weights of this size can hold.
    """
    fields = {name: _FIELDS[name] for name in ("head", "num_labels")}
    check_fields(str(folder / CONFIG_NAME), settings, fields)
    num_labels = settings["num_labels"]
    weights = folder / weights_name(folder / CONFIG_NAME, settings)
    # An adapter includes its head; no weight takes fewer than two bytes.
    most = weights.stat().st_size // 2 if weights.is_file() else 2**16
    if num_labels is not None and not 1 <= num_labels <= most:
        raise ValueError(
            f"{folder / CONFIG_NAME}: num_labels={quote(num_labels, 40)} does not match the head "
            f"in {weights.name}"
        )


def _check_kind(where: str, settings: Mapping[str, Any]) -> None:
    """Raises ValueError if the head does not support the kind, or the kind's fields are wrong."""
    kind, head = settings["kind"], settings["head"]
    if kind not in _KINDS.get(head, ()):
        raise ValueError(f"{where}: kind={kind!r} cannot be combined with head={quote(head)}")
    wanted = None
    if kind == "masked_lm":
        wanted = kind
        _check_inner(where, settings, wanted, _MASKING, required=tuple(_MASKING))
    elif kind == "span_corruption":
        wanted = "span_corruption"
        _check_inner(where, settings, wanted, _NOISE, required=tuple(_NOISE))
    elif kind == "embedding":
        wanted = kind
        _check_inner(where, settings, wanted, _EMBEDDING, required=tuple(_EMBEDDING))
    elif kind == "translation":
        wanted = "translation"
        _check_inner(where, settings, wanted, _TRANSLATION, required=tuple(_TRANSLATION))
        _check_text_format(f"{where}: {wanted}", settings[wanted])
    elif kind == "speech":
        wanted = "speech"
        _check_inner(where, settings, wanted, _SPEECH, required=tuple(_SPEECH))
        _check_text_format(f"{where}: {wanted}", settings[wanted])
    elif head == "conditional_generation":
        wanted = "text_to_text"
        _check_inner(where, settings, wanted, _TEXT_FORMAT, required=("prefix",))
        _check_text_format(f"{where}: {wanted}", settings[wanted])
    inner = {"embedding", "masked_lm", "span_corruption", "speech", "text_to_text", "translation"}
    for name in inner - {wanted}:
        if name in settings:
            raise ValueError(
                f"{where}: {name} cannot be combined with kind={kind!r} and head={head!r}"
            )
    if "benchmark" in settings:
        fields = {"name": str, "may_be_none": bool}
        _check_inner(where, settings, "benchmark", fields, required=("name",))
    elif kind in ("choice", "span"):
        raise ValueError(f"{where}: kind={kind!r} needs the field benchmark, which is missing")


def _check_inner(
    where: str, settings: Mapping[str, Any], name: str, fields: Mapping[str, Any], required: Any
) -> None:
    """Raises ValueError if an object has a missing, unknown or mistyped field."""
    inner, where = settings.get(name, {}), f"{where}: {name}"
    if missing := [field for field in required if field not in inner]:
        raise ValueError(f"{where} has no {listing(missing)}")
    if unknown := sorted(inner.keys() - fields.keys()):
        raise ValueError(f"{where} has the unknown fields {listing(unknown)}")
    check_fields(where, inner, fields)


def _check_text_format(where: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError for a number out of range."""
    limits = {
        "max_target_length": (2, _MOST_TOKENS),
        "max_new_tokens": (1, _MOST_TOKENS),
        "num_beams": (1, _MOST_BEAMS),
        "max_seconds": (0.035, 3_600),
    }
    for name, (least, most) in limits.items():
        if not least <= values.get(name, least) <= most:
            raise ValueError(
                f"{where}: {name}={quote(values[name], 40)} must be from {least} to {most:,}"
            )
    if not values.get("score_step", 1.0) > 0:
        raise ValueError(f"{where}: score_step={values['score_step']} must be above 0")


def _check_labels(where: str, settings: Mapping[str, Any]) -> None:
    """Raises ValueError if the number of label names does not match the kind of task."""
    kind, names, num_labels = (settings[name] for name in ("kind", "label_names", "num_labels"))
    if bool(names) != (kind in _WITH_LABELS):
        raise ValueError(
            f"{where}: label_names={quote(names)} must be "
            f"{'names' if kind in _WITH_LABELS else 'empty'} for kind={kind!r}"
        )
    check_names(names, f"{where}: label_names")
    if settings["head"] not in ("sequence_classification", "token_classification"):
        return
    outputs = tasks.Task("", kind, tuple(names), {}).num_labels
    if num_labels != outputs:
        raise ValueError(
            f"{where}: num_labels={num_labels} must be {outputs} for kind={kind!r} and "
            f"label_names={quote(names)}"
        )
