"""Objectives that write several languages, made for a run or from a saved adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compacter_jax.models.families import family_of
from compacter_jax.models.loading import read_config
from train.cli.speech import AudioOptions
from train.objectives.speech import Speech
from train.objectives.to_languages import ToLanguages
from train.objectives.translation import Translation
from train.speech.features import Extractor
from train.speech.spec_augment import SpecAugment
from train.tasks import Task, parallel
from train.tasks import speech as of_speech

if TYPE_CHECKING:
    from train.fit.options import FitOptions

_CLASSES: Mapping[str, type[ToLanguages]] = {parallel.KIND: Translation, of_speech.KIND: Speech}


def reads_speech(backbone: str | Path) -> bool:
    """Returns True if a checkpoint is one that reads features; raises as `load_backbone` does."""
    return family_of(read_config(backbone)).inputs[0] == "input_features"


def check_reads(task: Task, backbone: str) -> None:
    """Raises ValueError if a task is of speech and the backbone reads text, or the reverse."""
    of_features = reads_speech(backbone)
    if task.kind == of_speech.KIND and not of_features:
        raise ValueError(
            f"task {task.name!r} has recordings, but {backbone} reads text; give a backbone of "
            "model_type speech_to_text"
        )
    if of_features and task.kind != of_speech.KIND:
        raise ValueError(
            f"task {task.name!r} ({task.kind}) has texts to read, but {backbone} reads speech; "
            f"give files with the columns {of_speech.AUDIO} (or {of_speech.SAMPLES}), target and "
            f"{of_speech.LANGUAGE}"
        )


def for_run(task: Task, options: FitOptions, model: Any, tokenizer: Any) -> ToLanguages:
    """Builds the objective of a run that translates text or speech.

    Raises:
      ValueError: if special tokens are unsuitable; or as `with_audio`.
    """
    config = model.backbone.config
    check_special_tokens(tokenizer, config)
    members = parallel.members_of(task.directions, options.adapters)
    place = {
        direction: i for i, served in enumerate((members or {}).values()) for direction in served
    }
    made = _CLASSES[task.kind](
        model,
        tokenizer,
        config,
        options.max_length,
        directions=tuple(direction.name for direction in task.directions),
        members=None if members is None else tuple(place[each] for each in task.directions),
        is_open=members is None,
        max_target_length=options.max_target_length,
        num_beams=options.num_beams,
        generates=options.evaluate_by == "generation",
        temperature=options.temperature,
        seed=options.seed,
    )
    if not isinstance(made, Speech):
        return made
    made = dataclasses.replace(made, spec_augment=SpecAugment() if options.spec_augment else None)
    return with_audio(made, options.backbone, options)


def saved(
    settings: Mapping[str, Any],
    model: Any,
    tokenizer: Any,
    num_beams: int | None = None,
    evaluate_by: str | None = None,
) -> ToLanguages:
    """Builds the objective of saved adapters; `members` of the settings are those of a bank."""
    config, kind = model.backbone.config, settings["kind"]
    check_special_tokens(tokenizer, config)
    own = dict(settings[kind])
    for name in ("directions", "members"):
        own[name] = None if own.get(name) is None else tuple(own[name])
    if num_beams is not None:
        own["num_beams"] = num_beams
    generates = evaluate_by != "scoring"
    limit = settings["max_length"]
    return _CLASSES[kind](model, tokenizer, config, limit, **own, generates=generates)


def with_audio(objective: Any, backbone: str, options: AudioOptions) -> Any:
    """Returns an objective that reads recordings as the options say; any other unchanged.

    Args:
      objective: the objective.
      backbone: folder or hub id of the backbone, which has the settings of the features.
      options: the options of a command.

    Raises:
      ValueError: as `Extractor`; or for options of speech and an objective without.
    """
    if not isinstance(objective, Speech):
        for field in dataclasses.fields(AudioOptions):
            if getattr(options, field.name) is not None:
                raise ValueError(
                    f"--{field.name.replace('_', '-')} is for adapters that read speech; leave it "
                    "out"
                )
        return objective
    extractor = Extractor(backbone, objective.config.feature_size, options.feature_cache)
    given = {name: getattr(options, name) for name in ("max_seconds", "sampling_rate")}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(objective, extractor=extractor, **given)


def check_special_tokens(tokenizer: Any, config: Any) -> None:
    """Raises ValueError if the backbone lacks a special token, or ends texts with another."""
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        if getattr(config, name) is None:
            raise ValueError(f"config.json of the backbone has no {name}; add it")
    if tokenizer.eos_token_id != config.eos_token_id:
        raise ValueError(
            f"the tokenizer ends sequences with the token {tokenizer.eos_token_id}, but the "
            f"backbone with {config.eos_token_id}; use the backbone's own tokenizer"
        )
