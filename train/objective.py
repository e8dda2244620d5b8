"""How a task is put to a backbone: what is tokenised, what a step computes, how a split is scored.

`Classifier` is a head on an encoder, `TextToText` a task cast as text for an encoder-decoder,
`SpanCorruption` its pre-training. Whoever trains, evaluates or predicts knows `Objective` alone.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

import compacter_jax as cj
from compacter_jax.models.convert import read_config
from train import data, metrics, prompts, span_corruption, step, tasks, text
from train import learning_rates as rates
from train.options import FitOptions, TextToTextOptions
from train.predictions import Predicted

MODEL_TYPES = ("t5", "mt5")
# Part of a corpus without a validation file that is held out.
_HELD_OUT = 0.02
# Noise and choice of held-out text are the same for every seed, so that runs compare.
_FIXED_SEED = 0


_PREDICTS_NOTHING = (
    f"an adapter of {tasks.SPAN_CORRUPTION} predicts nothing; fit a task on the backbone it was "
    "trained with, or with --method full on the folder backbone/ beside it"
)


class Objective(abc.ABC):
    """See the module's docstring.

    Attributes:
      inputs: keys of a batch that are the model's positional arguments.
      learning_rates: preset -> default peak of the schedule.
      model: the adapted module.
      tokenizer: the backbone's.
    """

    inputs: ClassVar[tuple[str, ...]]
    learning_rates: ClassVar[Mapping[str, float]]
    model: Any
    tokenizer: Any

    @property
    @abc.abstractmethod
    def loss(self) -> step.LossFunction:
        """What a step minimises."""

    @property
    def apply(self) -> step.ApplyFunction:
        """What a step differentiates."""
        return step.apply_function(self.model, self.inputs)

    @abc.abstractmethod
    def outputs(self, params: step.Params, batch: step.Batch) -> Any:
        """What a split is scored by: a tree of `[batch, …]` arrays; see `step.OutputsFunction`."""

    @abc.abstractmethod
    def encode(self, rows: Any) -> data.Encoded:
        """Tokenises one split of a task, or columns of sentences without a target."""

    @abc.abstractmethod
    def scores(self, outputs: Any, encoded: data.Encoded) -> dict[str, float]:
        """Metrics of a split from its outputs, and its loss as `loss`.

        Raises:
          ValueError: if the examples have no targets.
        """

    @abc.abstractmethod
    def predictions(self, outputs: Any) -> Predicted:
        """What `predict_file` writes."""

    def check_predicts(self, *, logits: bool) -> None:  # noqa: B027 - most can do everything
        """ValueError if there are no predictions, or no `logits` of them if these are wanted."""

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-ready, for the metadata of a saved adapter, beside what all objectives have."""
        return {}

    def encode_all(self, splits: Mapping[str, Any]) -> dict[str, data.Examples]:
        """Tokenises the splits of a run, training and validation at least."""
        return {split: self.encode(rows) for split, rows in splits.items()}


@dataclasses.dataclass(frozen=True)
class Classifier(Objective):
    """Labels or scores from the head of an encoder.

    Attributes:
      model: takes ids, mask and token types; returns `[batch, num_labels]` logits.
      tokenizer: joins pairs as the encoder wants them.
      kind: "classification" or "regression".
      max_length: longest input in tokens.
    """

    inputs: ClassVar = ("input_ids", "attention_mask", "token_type_ids")
    learning_rates: ClassVar = rates.CLASSIFIER
    model: Any
    tokenizer: Any
    kind: Any
    max_length: int

    @property
    def loss(self) -> step.LossFunction:
        """Cross-entropy or squared error."""
        return step.loss_function(self.kind)

    def outputs(self, params: step.Params, batch: step.Batch) -> Array:
        """`[batch, num_labels]` float32 logits."""
        return step.logits_of(self.apply)(params, batch)

    def encode(self, rows: Any) -> data.Encoded:
        """Tokenises sentences or pairs."""
        return data.tokenize(rows, self.tokenizer, self.max_length)

    def scores(self, outputs: np.ndarray, encoded: data.Encoded) -> dict[str, float]:
        """The metrics of `compute_metrics`, and the mean loss."""
        targets = _targets(encoded)
        loss = jnp.mean(self.loss(jnp.asarray(outputs), jnp.asarray(targets)))
        return {**metrics.compute_metrics(self.kind, outputs, targets), "loss": float(loss)}

    def predictions(self, outputs: np.ndarray) -> np.ndarray:
        """The logits."""
        return outputs


class Seq2Seq(Objective):
    """What all objectives of an encoder-decoder share: the loss is that of the target's tokens.

    Attributes:
      config: of the backbone's module; the special tokens are its.
    """

    inputs: ClassVar = ("input_ids", "attention_mask", "decoder_input_ids")
    learning_rates: ClassVar = rates.TEXT_TO_TEXT
    config: Any

    @property
    def loss(self) -> step.LossFunction:
        """Cross-entropy of the target's tokens."""
        return step.loss_function("tokens")

    def encoded(
        self,
        inputs: data.Texts,
        target_texts: data.Texts | None,
        targets: np.ndarray | None = None,
    ) -> data.Encoded:
        """Inputs and targets that are token ids already."""
        return data.Encoded(
            input_ids=inputs.ids,
            token_type_ids=None,
            offsets=inputs.offsets,
            targets=targets,
            max_length=inputs.max_length,
            pad_token_id=self.config.pad_token_id,
            num_truncated=inputs.num_truncated,
            target_texts=target_texts,
            decoder_start_token_id=self.config.decoder_start_token_id,
        )

    def teacher_forced(self, params: step.Params, batch: step.Batch) -> dict[str, Array]:
        """Per row: `loss`, the mean over target tokens, and `correct`, how many come first."""
        logits, labels = self.apply(params, batch, None), batch["labels"]
        correct = jnp.sum((logits.argmax(-1) == labels) & (labels != data.IGNORED), -1)
        return {"loss": self.loss(logits, labels), "correct": correct}


@dataclasses.dataclass(frozen=True)
class TextToText(Seq2Seq):
    """A task cast as text; labels by the likelihood of their words unless by generation.

    Attributes:
      model: an encoder-decoder with logits.
      tokenizer: the backbone's.
      config: of its module.
      casting: how rows become text and text predictions.
      max_length: longest input in tokens, the end-of-sequence token included.
    """

    model: Any
    tokenizer: Any
    config: Any
    casting: text.Casting
    max_length: int

    @functools.cached_property
    def label_ids(self) -> np.ndarray:
        """`[labels, length]` int32 token ids of the label words, `IGNORED` behind their end."""
        casting = self.casting
        tokens = text.label_tokens(casting.label_names, self.tokenizer, casting.max_target_length)
        ids = np.full((len(tokens), max(map(len, tokens))), data.IGNORED, np.int32)
        for row, label in zip(ids, tokens, strict=True):
            row[: len(label)] = label
        return ids

    def outputs(self, params: step.Params, batch: step.Batch) -> dict[str, Array]:
        """`scores` `[batch, labels]`, or `ids` `[batch, 1 + max_new_tokens]` and `loss`."""
        if not self.casting.generates:
            return {"scores": self._label_scores(params, batch)}
        ids = cj.generate(
            self.model,
            params,
            batch["input_ids"],
            batch["attention_mask"],
            max_new_tokens=self.casting.max_new_tokens,
            num_beams=self.casting.num_beams,
            eos_token_id=self.config.eos_token_id,
            pad_token_id=self.config.pad_token_id,
            decoder_start_token_id=self.config.decoder_start_token_id,
        )
        forced = self.teacher_forced(params, batch) if "decoder_input_ids" in batch else {}
        return {"ids": ids, **forced}

    def encode(self, rows: Any) -> data.Encoded:
        """Casts rows as text and tokenises it."""
        casting, targets = self.casting, self.casting.targets(rows)
        return self.encoded(
            data.tokenize_texts(
                casting.inputs(rows), self.tokenizer, self.max_length, what="input"
            ),
            None
            if targets is None
            else data.tokenize_texts(
                targets, self.tokenizer, casting.max_target_length, what="target"
            ),
            data.targets_of(rows),
        )

    def scores(self, outputs: dict[str, np.ndarray], encoded: data.Encoded) -> dict[str, float]:
        """Metrics of the kind of task, and the mean loss of a target token."""
        casting, targets = self.casting, _targets(encoded)
        if not casting.generates:
            scores = outputs["scores"]
            likelihoods = scores[np.arange(len(targets)), targets].astype(np.float64)
            values = metrics.compute_metrics("classification", scores, targets)
            return {**values, "loss": float(-likelihoods.sum() / _num_tokens(encoded).sum())}
        predictions = casting.read(text.decode(outputs["ids"], self.tokenizer))
        if casting.kind == "classification":
            values = metrics.label_metrics(predictions, targets, len(casting.label_names))
        elif casting.kind == "regression":
            values = metrics.score_metrics(predictions, targets, casting.score_mean)
        else:
            values = metrics.text_metrics(predictions, targets)
        return {**values, "loss": _mean_token_loss(outputs, encoded)}

    def predictions(self, outputs: dict[str, np.ndarray]) -> Predicted:
        """Label scores as logits; or scores, None where the text is no number; or texts."""
        if not self.casting.generates:
            return outputs["scores"]
        read = self.casting.read(text.decode(outputs["ids"], self.tokenizer))
        if self.casting.kind == "regression":
            return [None if np.isnan(score) else float(score) for score in read]
        return list(read)

    def check_predicts(self, *, logits: bool) -> None:
        """Text that is generated has no logits of labels."""
        if logits and self.casting.generates:
            raise ValueError(
                f"--logits: predictions of kind {self.casting.kind} are generated text, which has "
                "none; leave it out"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The casting, but for what every adapter has."""
        return {"text_to_text": text.to_json(self.casting)}

    def _label_scores(self, params: step.Params, batch: step.Batch) -> Array:
        """Log-likelihood of each label's text, all labels in one call of the decoder."""
        labels, rows = jnp.asarray(self.label_ids), batch["input_ids"].shape[0]
        mask = batch["attention_mask"]
        states = self.model.apply({"params": params}, batch["input_ids"], mask, method="encode")
        inputs = data.shifted(
            self.label_ids, self.config.pad_token_id, self.config.decoder_start_token_id
        )
        logits = self.model.apply(
            {"params": params},
            jnp.tile(inputs, (rows, 1)),
            jnp.repeat(states, len(labels), axis=0),
            jnp.repeat(mask, len(labels), axis=0),
            method="decode",
        )
        likelihoods = step.token_log_likelihoods(logits, jnp.tile(labels, (rows, 1)))
        return likelihoods.sum(-1).reshape(rows, len(labels))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Segments of text that are corrupted anew in every epoch; `data.Examples`.

    Attributes:
      objective: whose noise.
      segments: the text.
      seed: of the noise.
    """

    objective: SpanCorruption
    segments: span_corruption.Segments
    seed: int

    def __len__(self) -> int:
        return len(self.segments)

    def of_epoch(self, epoch: int) -> data.Encoded:
        """The segments with the noise of an epoch."""
        corruption = self.objective.corruption
        inputs, targets = span_corruption.corrupted(
            self.segments, corruption, seed=self.seed, epoch=epoch
        )
        return self.objective.encoded(
            data.Texts(inputs.tokens, inputs.offsets, corruption.input_length),
            data.Texts(targets.tokens, targets.offsets, corruption.target_length),
        )

    def notices(self, split: str) -> list[str]:
        """How much text there is."""
        return [f"{split}: {len(self.segments.tokens):,} tokens in {len(self):,} segments"]


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Seq2Seq):
    """T5's pre-training; the splits are paths of text files.

    Attributes:
      model: an encoder-decoder with logits.
      tokenizer: the backbone's, with sentinels.
      config: of its module.
      corruption: what noise.
      seed: of the noise in training.
    """

    model: Any
    tokenizer: Any
    config: Any
    corruption: span_corruption.SpanCorruption
    seed: int = 0

    def outputs(self, params: step.Params, batch: step.Batch) -> dict[str, Array]:
        """`loss` and `correct` of each row."""
        return self.teacher_forced(params, batch)

    def encode(self, rows: Path) -> data.Encoded:
        """The text with one fixed noise."""
        return self._fixed(self._read(rows))

    def encode_all(self, splits: Mapping[str, Path]) -> dict[str, data.Examples]:
        """Training text with noise by epoch; without a validation file a part is held out."""
        encoded: dict[str, data.Examples] = {
            split: self.encode(path) for split, path in splits.items() if split != "train"
        }
        segments = self._read(splits["train"])
        if "validation" not in splits:
            held_out, segments = _held_out(segments, splits["train"])
            encoded["validation"] = self._fixed(held_out)
        return {"train": Corpus(self, segments, self.seed), **encoded}

    def scores(self, outputs: dict[str, np.ndarray], encoded: data.Encoded) -> dict[str, float]:
        """`token_accuracy` and `loss` under teacher forcing."""
        accuracy = outputs["correct"].sum() / _num_tokens(encoded).sum()
        return {"token_accuracy": float(accuracy), "loss": _mean_token_loss(outputs, encoded)}

    def predictions(self, outputs: Any) -> Predicted:
        """ValueError: there is nothing to predict."""
        raise ValueError(_PREDICTS_NOTHING)

    def check_predicts(self, *, logits: bool) -> None:
        """ValueError: there is nothing to predict."""
        raise ValueError(_PREDICTS_NOTHING)

    @property
    def settings(self) -> dict[str, Any]:
        """The noise."""
        noise = self.corruption
        names = ("noise_density", "mean_span_length")
        return {tasks.SPAN_CORRUPTION: {name: getattr(noise, name) for name in names}}

    def _read(self, path: Path) -> span_corruption.Segments:
        return span_corruption.read_segments(path, self.tokenizer, self.corruption.segment_length)

    def _fixed(self, segments: span_corruption.Segments) -> data.Encoded:
        return Corpus(self, segments, _FIXED_SEED).of_epoch(0)


def head_arguments(backbone: str | Path, num_labels: int) -> dict[str, Any]:
    """What to load a checkpoint with: T5's own head, or a new classifier."""
    if is_text_to_text(backbone):
        return {"head": "auto"}
    return {"head": "sequence_classification", "num_labels": num_labels}


def is_text_to_text(backbone: str | Path) -> bool:
    """Whether a checkpoint is of the T5 family; errors as of `load_backbone`."""
    return read_config(backbone).model_type in MODEL_TYPES


def for_task(task: tasks.Task, options: FitOptions, model: Any, tokenizer: Any) -> Objective:
    """The objective of a run, by its task and whether the backbone has a decoder.

    Raises:
      ValueError: if a T5 cannot write text, or the labels or the special tokens do not suit.
    """
    module = model.backbone
    if not isinstance(module, cj.T5):
        return Classifier(model, tokenizer, task.kind, options.max_length)
    if module.head != "conditional_generation":
        raise ValueError(
            f"{options.backbone} is a T5 with head={module.head!r}, which cannot write text; "
            "fine-tuning needs the decoder and the head of a T5ForConditionalGeneration"
        )
    if task.kind == "span_corruption":
        noise = {name: getattr(options, name) for name in ("noise_density", "mean_span_length")}
        made = _span_corruption(model, tokenizer, module.config, options.max_length, noise)
        return dataclasses.replace(made, seed=options.seed)
    casting = text.Casting(
        kind=task.kind,
        label_names=task.label_names,
        prefix=task.name if options.prefix is None else options.prefix,
        score_step=options.score_step,
        max_target_length=options.max_target_length,
        max_new_tokens=options.max_target_length,
        evaluate_by=options.evaluate_by,
        num_beams=options.num_beams,
    )
    if task.kind == "regression":
        scores = task.splits["train"]["score"][:]
        casting = dataclasses.replace(casting, score_mean=float(np.mean(scores)))
    return _text_to_text(model, tokenizer, module.config, casting, options.max_length)


def from_settings(
    settings: Mapping[str, Any], model: Any, tokenizer: Any, **changes: Any
) -> Objective:
    """The objective that `fit` saved an adapter with.

    Args:
      settings: of `adapter_config.json`.
      model: the adapted module.
      tokenizer: the backbone's.
      **changes: fields of `text.Casting` to change, where not None and the objective has one.
    """
    config, kind, max_length = model.backbone.config, settings["kind"], settings["max_length"]
    if kind == "span_corruption":
        return _span_corruption(model, tokenizer, config, max_length, settings[kind])
    if "text_to_text" not in settings:
        return Classifier(model, tokenizer, kind, max_length)
    casting = text.from_json(settings["text_to_text"], kind, settings["label_names"])
    given = {name: value for name, value in changes.items() if value is not None}
    casting = dataclasses.replace(casting, **given)
    return _text_to_text(model, tokenizer, config, casting, max_length)


def check_options(task: tasks.Task, options: FitOptions) -> None:
    """Refuses what does not go together, before anything slow.

    Raises:
      ValueError: if a split is missing; the task needs a decoder, or an option for one is given,
        and there is none; or the task has no examples to sample.
    """
    needed = ("train",) if task.kind == "span_corruption" else ("train", "validation")
    for split in needed:
        if split not in task.splits:
            raise ValueError(f"fit needs a {split} split; give --{split}-file")
    if task.kind == "span_corruption" and options.train_size is not None:
        raise ValueError(
            f"--train-size is for tasks with examples, not for {task.name}; give a shorter text, "
            "or --max-steps"
        )
    if options.prompt_words is not None and not prompts.needs_tokens(options.method_config()):
        raise ValueError(
            "--prompt-words are for prompts that start from the vocabulary, such as those of "
            "prompt-tuning-vocabulary, and take the place of --prompt-token-ids; leave them out"
        )
    if is_text_to_text(options.backbone):
        return
    check_length(read_config(options.backbone), options.method_config(), options.max_length)
    if task.kind in ("text", "span_corruption"):
        raise ValueError(
            f"task {task.name!r} ({task.kind}) needs an encoder-decoder such as T5, and "
            f"{options.backbone} is none"
        )
    for field in dataclasses.fields(TextToTextOptions):
        if getattr(options, field.name) != field.default:
            raise ValueError(
                f"--{field.name.replace('_', '-')} is for encoder-decoders such as T5, and "
                f"{options.backbone} is none"
            )


def check_length(config: Any, method: Any, max_length: int) -> None:
    """ValueError if inputs with a method's prompt do not fit an encoder's absolute positions."""
    prompt_length = getattr(method, "prompt_length", 0)
    positions = config.max_position_embeddings
    if prompt_length and max_length + prompt_length > positions:
        raise ValueError(
            f"max_length={max_length} and prompt_length={prompt_length} together exceed the "
            f"backbone's {positions} positions; use a max_length of "
            f"{positions - prompt_length} or less, or a shorter prompt"
        )


def _text_to_text(
    model: Any, tokenizer: Any, config: Any, casting: text.Casting, max_length: int
) -> TextToText:
    """With the longest label as the limit of what is generated, where labels are."""
    _check_special_tokens(tokenizer, config)
    made = TextToText(model, tokenizer, config, casting, max_length)
    if casting.kind == "classification":
        casting = dataclasses.replace(casting, max_new_tokens=made.label_ids.shape[1])
    return dataclasses.replace(made, casting=casting)


def _span_corruption(
    model: Any, tokenizer: Any, config: Any, max_length: int, noise: Mapping[str, float]
) -> SpanCorruption:
    _check_special_tokens(tokenizer, config)
    corruption = span_corruption.SpanCorruption(
        max_length,
        **noise,
        eos_token_id=config.eos_token_id,
        sentinel_ids=span_corruption.sentinel_ids(tokenizer),
    )
    return SpanCorruption(model, tokenizer, config, corruption)


def _check_special_tokens(tokenizer: Any, config: Any) -> None:
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        if getattr(config, name) is None:
            raise ValueError(f"config.json of the backbone has no {name}; add it")
    if tokenizer.eos_token_id != config.eos_token_id:
        raise ValueError(
            f"the tokenizer ends sequences with the token {tokenizer.eos_token_id}, the backbone "
            f"with {config.eos_token_id}; use the backbone's own tokenizer"
        )


def _targets(encoded: data.Encoded) -> np.ndarray:
    if encoded.targets is None:
        raise ValueError("these examples have no label, score or target to compare with")
    return encoded.targets


def _num_tokens(encoded: data.Encoded) -> np.ndarray:
    """`[examples]`: tokens of each target."""
    assert encoded.target_texts is not None
    return np.diff(encoded.target_texts.offsets)


def _mean_token_loss(outputs: Mapping[str, np.ndarray], encoded: data.Encoded) -> float:
    return float(np.average(outputs["loss"].astype(np.float64), weights=_num_tokens(encoded)))


def _held_out(
    segments: span_corruption.Segments, path: Path
) -> tuple[span_corruption.Segments, span_corruption.Segments]:
    """Splits segments into a small part for validation, said to the user, and the rest."""
    if len(segments) < 2:
        raise ValueError(
            f"{path}: one segment alone leaves none for validation; give more text or "
            "--validation-file"
        )
    order = np.random.default_rng(_FIXED_SEED).permutation(len(segments))
    size = max(1, round(_HELD_OUT * len(segments)))
    print(f"{size} of {len(segments)} segments are held out for validation")
    return _taken(segments, order[:size]), _taken(segments, order[size:])


def _taken(segments: span_corruption.Segments, indices: np.ndarray) -> span_corruption.Segments:
    """Some of the segments, in the order of the text."""
    chosen = [segments[int(i)] for i in np.sort(indices)]
    return span_corruption.Segments(
        np.concatenate(chosen), np.cumsum([0, *map(len, chosen)], dtype=np.int64)
    )
