"""Objectives: how a task is put to a backbone, trained and scored.

`Classifier`, `MultipleChoice`, `ExtractiveQA` and `Tagger` use a head on an encoder; `Embedder`
uses none. `TextToText` formats a task as text for an encoder-decoder, `Translation` is for pairs of
languages, `Speech` for recordings, and `SpanCorruption` is the pre-training of one; `MaskedWords`
is that of an encoder. Training, evaluation and prediction only use the base class `Objective`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compacter_jax.compositions.base import parallel_names
from compacter_jax.embeddings import check_dimensions
from compacter_jax.models.families import (
    family_of,
    family_of_module,
    max_tokens_of,
    pooling_attributes,
)
from compacter_jax.models.loading import pooling_of, read_config, read_sentence_embedding
from compacter_jax.models.pooling import DEFAULT as FIRST
from compacter_jax.models.pooling import Pooling
from train import tasks
from train.cli.options import TextToTextOptions
from train.data import tokens
from train.objectives import noise as objectives_noise
from train.objectives import translators
from train.objectives.base import Objective
from train.objectives.classification import Classifier, MultipleChoice, ParallelClassifier
from train.objectives.embedding import (
    Embedder,
    EmbeddingSettings,
    check_embedding,
    loss_for,
)
from train.objectives.masked_words import MaskedWords
from train.objectives.span_corruption import SpanCorruption
from train.objectives.span_extraction import ExtractiveQA
from train.objectives.tagging import Tagger
from train.objectives.text_to_text import TextToText
from train.tasks import multilingual, text_format
from train.tasks.benchmark import Benchmark, Choice, Kind
from train.tasks.benchmarks import find

if TYPE_CHECKING:
    from train.fit.options import FitOptions

__all__ = [
    "Objective",
    "check_length",
    "check_options",
    "for_task",
    "from_settings",
    "head_arguments",
    "with_classifier",
]


def head_arguments(
    backbone: str | Path,
    num_labels: int,
    kind: Kind = "classification",
    pooling: Pooling | None = None,
) -> dict[str, Any]:
    """Returns the arguments to load a checkpoint with: T5's own head, or a new one for the task.

    Args:
      backbone: folder or id of the checkpoint.
      num_labels: number of labels of the task.
      kind: kind of the task.
      pooling: pooling of a classifier; None takes that of the checkpoint.
    """
    if is_text_to_text(backbone):
        return {"head": "auto", "pooling": pooling}
    if kind == "span":
        return {"head": "question_answering", "pooling": pooling}
    if kind == "embedding":
        return {"head": None}
    if kind == "masked_lm":
        return {"head": "masked_lm", "pooling": pooling}
    if kind == "tagging":
        return {"head": "token_classification", "num_labels": num_labels, "pooling": pooling}
    pooling = pooling or pooling_of(backbone)
    return {"head": "sequence_classification", "num_labels": num_labels, "pooling": pooling}


def with_classifier(module: Any, num_labels: int, pooling: Pooling | None = None) -> Any:
    """Returns an encoder with a classifier of sequences, without weights.

    Args:
      module: the encoder, with any head.
      num_labels: number of labels of the task.
      pooling: pooling of the classifier; None is "first".

    Raises:
      ValueError: for another pooling than "first", if classifiers of the family do not pool.
    """
    head, family = "sequence_classification", family_of_module(module)
    pools = pooling_attributes(family, head, pooling or FIRST, type(module).__name__)
    return module.clone(head=head, num_labels=num_labels, **pools)


def is_text_to_text(backbone: str | Path) -> bool:
    """Returns True if a checkpoint is one that writes text; raises as `load_backbone` does."""
    return family_of(read_config(backbone)).writes_text


def for_task(task: tasks.Task, options: FitOptions, model: Any, tokenizer: Any) -> Objective:
    """Returns the objective of a run, chosen by its task and by whether the backbone has a decoder.

    Raises:
      ValueError: if an encoder-decoder cannot write text or cannot be trained, or if the labels or
        the special tokens are unsuitable.
    """
    module = model.backbone
    family = family_of_module(module)
    writes_text = family.writes_text
    if writes_text and parallel_names(model.method):
        raise ValueError(
            "parallel adapters need an encoder such as BERT; on a "
            f"{type(module).__name__}, use each adapter by itself"
        )
    if task.kind == "embedding":
        return _embedder(model, tokenizer, options.max_length, _embedding_settings(task, options))
    if task.kind == tasks.MASKED_LM:
        return MaskedWords(
            model, tokenizer, options.max_length, options.noise_density, options.seed
        )
    if not writes_text:
        made = _of_encoder(
            model, tokenizer, task.kind, options.max_length, task.benchmark, task.label_names
        )
        if task.benchmark is not None and task.benchmark.unanswered(task.splits["train"]):
            made = _with_none(made)
        return made
    if module.head != "conditional_generation":
        wanted = next(name for name, head in family.architectures.items() if head is not None)
        raise ValueError(
            f"{options.backbone} is a {type(module).__name__} with head={module.head!r}, which "
            f"cannot write text; fine-tuning needs the decoder and the head of a {wanted}"
        )
    module.check_training()
    if task.kind in multilingual.KINDS:
        return translators.for_run(task, options, model, tokenizer)
    if task.kind == "span_corruption":
        noise = {name: getattr(options, name) for name in ("noise_density", "mean_span_length")}
        made = _span_corruption(model, tokenizer, module.config, options.max_length, noise)
        return dataclasses.replace(made, seed=options.seed)
    fmt = text_format.TextFormat(
        kind=_text_kind(task.kind),
        label_names=task.label_names,
        prefix=task.prefix if options.prefix is None else options.prefix,
        score_step=options.score_step,
        max_target_length=options.max_target_length,
        max_new_tokens=options.max_target_length,
        evaluate_by=options.evaluate_by,
        num_beams=options.num_beams,
    )
    if task.kind == "regression":
        scores = task.splits["train"]["score"][:]
        fmt = dataclasses.replace(fmt, score_mean=float(np.mean(scores)))
    cast = _text_to_text(model, tokenizer, module.config, fmt, options.max_length, task.benchmark)
    text_format.check_written(task.label_names, tokenizer)
    return cast


def from_settings(
    settings: Mapping[str, Any], model: Any, tokenizer: Any, **changes: Any
) -> Objective:
    """Returns the objective that `fit` saved with an adapter.

    Args:
      settings: the content of `adapter_config.json`.
      model: the adapted module.
      tokenizer: the tokenizer of the backbone.
      **changes: fields of `TextFormat` to change, where not None and the objective has a format.
    """
    config, kind, max_length = model.backbone.config, settings["kind"], settings["max_length"]
    if kind == "span_corruption":
        return _span_corruption(model, tokenizer, config, max_length, settings[kind])
    if kind == tasks.MASKED_LM:
        return MaskedWords(model, tokenizer, max_length, **settings[kind])
    if kind == "embedding":
        found = EmbeddingSettings(**settings[kind])
        return _embedder(model, tokenizer, max_length, found)
    if kind in multilingual.KINDS:
        return translators.saved(settings, model, tokenizer, **changes)
    benchmark = _benchmark_of(settings)
    if "text_to_text" not in settings:
        names = settings["label_names"]
        made = _of_encoder(model, tokenizer, kind, max_length, benchmark, names)
        return _with_none(made) if settings.get("benchmark", {}).get("may_be_none") else made
    names = settings["label_names"]
    fmt = text_format.from_json(settings["text_to_text"], _text_kind(kind), names)
    given = {name: value for name, value in changes.items() if value is not None}
    fmt = dataclasses.replace(fmt, **given)
    if fmt.kind == "classification" and fmt.generates:
        text_format.check_written(fmt.label_names, tokenizer)
    return _text_to_text(model, tokenizer, config, fmt, max_length, benchmark)


def check_options(task: tasks.Task, options: FitOptions) -> None:
    """Refuses combinations of task and options before anything slow happens.

    Raises:
      ValueError: if a split is missing; if the task needs a decoder, or an option for one is given,
        and the backbone has none; or if the task has no examples to sample from.
    """
    needed = ("train",) if task.kind in tasks.ON_TEXT else ("train", "validation")
    for split in needed:
        if split not in task.splits:
            raise ValueError(f"fit needs a {split} split; give --{split}-file")
    if task.kind in tasks.ON_TEXT and options.train_size is not None:
        raise ValueError(
            f"--train-size limits the examples of a task, but {task.name} has none; give a "
            "shorter text, or --max-steps"
        )
    if options.prompt_words is not None and not options.method_config().needs_token_ids():
        raise ValueError(
            "--prompt-words replaces --prompt-token-ids, and only works with prompts that start "
            "from the vocabulary, as in prompt-tuning-vocabulary; leave it out"
        )
    if is_text_to_text(options.backbone):
        of_encoders = {
            "tagging": "tags of words",
            "embedding": "pairs of texts for embeddings",
            tasks.MASKED_LM: "masked words",
        }
        if task.kind in of_encoders:
            raise ValueError(
                f"task {task.name!r} has {of_encoders[task.kind]}, which needs an encoder such as "
                f"BERT, but {options.backbone} is an encoder-decoder"
            )
    check_embedding(task, options)
    translators.check_reads(task, options.backbone)
    if is_text_to_text(options.backbone):
        return
    check_length(read_config(options.backbone), options.method_config(), options.max_length)
    if task.kind in ("text", "span_corruption", *multilingual.KINDS):
        raise ValueError(
            f"task {task.name!r} ({task.kind}) needs an encoder-decoder such as T5, but "
            f"{options.backbone} is not one"
        )
    for field in dataclasses.fields(TextToTextOptions):
        if task.kind == tasks.MASKED_LM and field.name == "noise_density":
            continue
        if getattr(options, field.name) != field.default:
            raise ValueError(
                f"--{field.name.replace('_', '-')} needs an encoder-decoder such as T5, but "
                f"{options.backbone} is not one"
            )


def check_length(config: Any, method: Any, max_length: int) -> None:
    """Raises ValueError if inputs with a method's prompt exceed an encoder's absolute positions."""
    prompt_length = sum(part.extra_tokens for part in method.inserted())
    positions = max_tokens_of(config)
    if positions is not None and prompt_length and max_length + prompt_length > positions:
        room = positions - prompt_length
        fix = (
            f"use a max_length of {room} or less, or a shorter prompt"
            if room >= 3
            else (f"use a prompt_length of {max(positions - max_length, 1)} or less")
        )
        raise ValueError(
            f"max_length={max_length} and prompt_length={prompt_length} together exceed the "
            f"backbone's {positions} positions; {fix}"
        )


def _benchmark_of(settings: Mapping[str, Any]) -> Benchmark | None:
    """Returns the benchmark that an adapter was trained on; None for other tasks.

    Raises:
      ValueError: if this version does not know the benchmark.
    """
    if "benchmark" not in settings:
        return None
    name = settings["benchmark"]["name"]
    if (benchmark := find(name)) is None:
        raise ValueError(
            f"the adapter was trained on {name!r}, which this version of the package does not have"
        )
    return benchmark


def _of_encoder(
    model: Any,
    tokenizer: Any,
    kind: Kind,
    max_length: int,
    benchmark: Benchmark | None,
    label_names: Sequence[str],
) -> Objective:
    """Returns the objective of an encoder for a task.

    Raises:
      ValueError: if the method is a `Parallel` and the task has no labels or scores for it.
    """
    if names := parallel_names(model.method):
        if kind not in ("classification", "regression") or isinstance(benchmark, Choice):
            raise ValueError(
                f"parallel adapters need a task with a label or a score of each row, and a {kind} "
                "task has none; use each adapter by itself"
            )
        return ParallelClassifier(model, tokenizer, kind, max_length, benchmark, names)
    if benchmark is not None and kind == "span":
        return ExtractiveQA(model, tokenizer, max_length, benchmark)
    if kind == "tagging":
        return Tagger(model, tokenizer, max_length, tuple(label_names))
    if isinstance(benchmark, Choice):
        return MultipleChoice(model, tokenizer, "classification", max_length, benchmark)
    return Classifier(model, tokenizer, kind, max_length, benchmark)


def _embedding_settings(task: tasks.Task, options: FitOptions) -> EmbeddingSettings:
    """Returns how a run embeds texts: as the checkpoint says, trained by the options' loss.

    Raises:
      ValueError: as `compacter_jax.read_sentence_embedding`.
    """
    embedding = read_sentence_embedding(options.backbone, options.pooling)
    return EmbeddingSettings(
        pooling=embedding.pooling,
        normalize=embedding.normalize,
        lower_case=embedding.lower_case,
        loss=options.embedding_loss or loss_for(task.splits["train"]),
        scale=options.similarity_scale,
        margin=options.triplet_margin,
        dimensions=options.matryoshka_dimensions,
    )


def _embedder(model: Any, tokenizer: Any, max_length: int, settings: EmbeddingSettings) -> Embedder:
    """Returns the objective of embeddings.

    Raises:
      ValueError: if the method is a `Parallel`, or a Matryoshka dimension exceeds the width.
    """
    if parallel_names(model.method):
        raise ValueError(
            "parallel adapters need a task with a label or a score of each row, and an embedding "
            "has none; use each adapter by itself"
        )
    check_dimensions(settings.dimensions, model.backbone.config.hidden_size)
    return Embedder(model, tokenizer, max_length, settings)


def _with_none(objective: Objective) -> Objective:
    """Returns the objective with answers that may be empty, if it looks for answers in a text."""
    if isinstance(objective, ExtractiveQA):
        return dataclasses.replace(objective, may_be_none=True)
    return objective


def _text_kind(kind: Kind) -> Kind:
    """Returns the kind of a task for a decoder, which writes candidates and spans as text."""
    return "text" if kind in ("choice", "span") else kind


def _text_to_text(
    model: Any,
    tokenizer: Any,
    config: Any,
    fmt: text_format.TextFormat,
    max_length: int,
    benchmark: Benchmark | None,
) -> TextToText:
    """Builds the objective; for labels, the longest label limits the generated text."""
    translators.check_special_tokens(tokenizer, config)
    made = TextToText(model, tokenizer, config, fmt, max_length, benchmark)
    if fmt.kind == "classification":
        fmt = dataclasses.replace(fmt, max_new_tokens=made.label_ids.shape[1])
    return dataclasses.replace(made, format=fmt)


def _span_corruption(
    model: Any, tokenizer: Any, config: Any, max_length: int, noise: Mapping[str, float]
) -> SpanCorruption:
    translators.check_special_tokens(tokenizer, config)
    corruption = objectives_noise.SpanCorruption(
        max_length,
        **noise,
        eos_token_id=config.eos_token_id,
        sentinel_ids=tokens.sentinel_ids(tokenizer),
    )
    return SpanCorruption(model, tokenizer, config, corruption)
