"""Objectives of an encoder-decoder: their base class, and tasks that are formatted as text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

import compacter_jax as cj
from train.compute import step
from train.data import batching
from train.data import tokens as data_tokens
from train.objectives import learning_rates as objectives_learning_rates
from train.objectives.base import Objective, Predicted, targets_of
from train.tasks import metrics, text_format
from train.tasks.benchmark import Benchmark

# Maximum number of labels in a message.
_MOST_SHOWN = 10


class Seq2Seq(Objective):
    """Base of the objectives of an encoder-decoder, whose loss is over the tokens of the target.

    Attributes:
      config: the configuration of the backbone's module, which has the special tokens.
    """

    learning_rates: ClassVar = objectives_learning_rates.TEXT_TO_TEXT
    config: Any

    @property
    def generates(self) -> bool:
        """True if the outputs are generated text."""
        return False

    @property
    def loss(self) -> step.LossFunction:
        """Cross-entropy of the target tokens."""
        return step.loss_function("tokens")

    def encoded(
        self,
        inputs: data_tokens.Texts,
        target_texts: data_tokens.Texts | None,
        targets: np.ndarray | None = None,
    ) -> data_tokens.Encoded:
        """Combines inputs and targets, both of token ids, into examples."""
        return data_tokens.Encoded(
            input_ids=inputs.ids,
            token_type_ids=None,
            offsets=inputs.offsets,
            targets=targets,
            max_length=inputs.max_length,
            pad_token_id=self.config.pad_token_id,
            num_truncated=inputs.num_truncated,
            unknown=inputs.unknown,
            target_texts=target_texts,
            decoder_start_token_id=self.config.decoder_start_token_id,
            is_generated=self.generates,
        )

    def teacher_forced(self, params: step.Params, batch: step.Batch) -> dict[str, Array]:
        """Computes each row's mean `loss` of target tokens, and how many are `correct` by
        argmax.
        """
        logits, labels = self.apply(params, batch, None), batch["labels"]
        correct = jnp.sum((logits.argmax(-1) == labels) & (labels != data_tokens.IGNORED), -1)
        return {"loss": self.loss(logits, labels), "correct": correct}


@dataclasses.dataclass(frozen=True)
class TextToText(Seq2Seq):
    """A task formatted as text; labels are scored by the likelihood of their words, or generated.

    Attributes:
      model: an encoder-decoder with logits.
      tokenizer: the tokenizer of the backbone.
      config: the configuration of the module.
      format: the conversion of rows to text, and of text to predictions.
      max_length: the maximum input length in tokens, the end-of-sequence token included.
      benchmark: the benchmark whose rows are read, if any.
    """

    model: Any
    tokenizer: Any
    config: Any
    format: text_format.TextFormat
    max_length: int
    benchmark: Benchmark | None = None

    @property
    def generates(self) -> bool:
        """True unless labels are scored."""
        return self.format.generates

    @functools.cached_property
    def label_ids(self) -> np.ndarray:
        """Token ids of the label words, `[labels, length]` int32, followed by `IGNORED`."""
        fmt = self.format
        tokens = text_format.label_tokens(fmt.label_names, self.tokenizer, fmt.max_target_length)
        ids = np.full((len(tokens), max(map(len, tokens))), data_tokens.IGNORED, np.int32)
        for row, label in zip(ids, tokens, strict=True):
            row[: len(label)] = label
        return ids

    def outputs(self, params: step.Params, batch: step.Batch) -> dict[str, Array]:
        """Computes `scores` `[batch, labels]`, or `ids` `[batch, 1 + max_new_tokens]`, `loss`."""
        if not self.generates:
            return {"scores": self._label_scores(params, batch)}
        ids = cj.generate(
            self.model,
            params,
            batch["input_ids"],
            batch["attention_mask"],
            max_new_tokens=self.format.max_new_tokens,
            num_beams=self.format.num_beams,
            eos_token_id=self.config.eos_token_id,
            pad_token_id=self.config.pad_token_id,
            decoder_start_token_id=self.config.decoder_start_token_id,
            adapter_ids=batch.get("adapter_ids"),
        )
        forced = self.teacher_forced(params, batch) if "decoder_input_ids" in batch else {}
        return {"ids": ids, **forced}

    def encode(self, rows: Any) -> data_tokens.Encoded:
        """Formats rows as text and tokenises it."""
        fmt, columns = self.format, rows
        if self.benchmark is not None:
            rows = self.benchmark.named(rows)
            columns = self.benchmark.for_decoder(rows)
        targets = fmt.targets(columns)
        if targets is not None and fmt.kind == "regression":
            text_format.check_scores(targets, self.tokenizer)
        encoded = self.encoded(
            data_tokens.tokenize_texts(
                fmt.inputs(columns), self.tokenizer, self.max_length, what="input"
            ),
            None
            if targets is None
            else data_tokens.tokenize_texts(
                targets,
                self.tokenizer,
                fmt.max_target_length,
                what="target",
                may_be_empty=self.benchmark is not None,
            ),
            data_tokens.targets_of(columns),
        )
        return dataclasses.replace(encoded, rows=rows, groups=data_tokens.groups_of(columns))

    def scores(
        self, outputs: dict[str, np.ndarray], encoded: data_tokens.Encoded
    ) -> dict[str, float]:
        """Returns the metrics of the kind and of the benchmark, and the mean target token loss."""
        fmt, targets = self.format, targets_of(encoded)
        if not fmt.generates:
            scores = outputs["scores"]
            likelihoods = scores[np.arange(len(targets)), targets].astype(np.float64)
            values = metrics.compute_metrics("classification", scores, targets)
            values = self.with_benchmark(values, scores.argmax(-1), encoded)
            return {**values, "loss": float(-likelihoods.sum() / num_tokens(encoded).sum())}
        predictions = fmt.read(text_format.decode(outputs["ids"], self.tokenizer))
        if fmt.kind == "classification":
            values = metrics.label_metrics(predictions, targets, len(fmt.label_names))
        elif fmt.kind == "regression":
            values = metrics.score_metrics(predictions, targets, fmt.score_mean)
        else:
            values = metrics.text_metrics(predictions, targets)
        if encoded.groups is not None:
            # A row with several right answers has several examples with the same input.
            predictions = predictions[np.unique(encoded.groups, return_index=True)[1]]
        values = self.with_benchmark(values, predictions, encoded)
        return {**values, "loss": mean_token_loss(outputs, encoded)}

    def predictions(
        self, outputs: dict[str, np.ndarray], encoded: data_tokens.Encoded
    ) -> Predicted:
        """Returns label scores as logits; or scores, None if the text is no number; or texts."""
        if not self.generates:
            return outputs["scores"]
        read = self.format.read(text_format.decode(outputs["ids"], self.tokenizer))
        if self.format.kind == "regression":
            return [None if np.isnan(score) else float(score) for score in read]
        return list(map(str, read))

    def predictions_and_targets(
        self, outputs: dict[str, np.ndarray], encoded: data_tokens.Encoded
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns labels, scores or texts, and those of the rows."""
        if encoded.groups is not None:
            return None
        targets = targets_of(encoded)
        if not self.generates:
            return outputs["scores"].argmax(-1), targets
        read = self.format.read(text_format.decode(outputs["ids"], self.tokenizer))
        if self.format.kind == "regression":
            read = np.where(np.isnan(read), self.format.score_mean, read)
        if self.format.kind == "text":
            targets = np.array(text_format.as_said(read, targets), object)
        return read, targets

    def user_messages(self) -> list[str]:
        """Returns a line about labels with characters that the tokenizer has no token for."""
        names, unknown = self.format.label_names, self.tokenizer.unk_token_id
        if not names or unknown is None:
            return []
        said = zip(names, self.label_ids, text_format.written(names, self.tokenizer), strict=True)
        found = [
            f"{name!r:.100} (written {as_text!r:.100})"
            for name, ids, as_text in said
            if unknown in ids
        ]
        if not found:
            return []
        more = ", …" if len(found) > _MOST_SHOWN else ""
        return [
            f"{len(found)} of {len(names)} labels have characters that the tokenizer has no token "
            f"for: {', '.join(found[:_MOST_SHOWN])}{more}"
        ]

    def check_predicts(self, *, logits: bool) -> None:
        """Raises ValueError for `logits` of generated text, which has no label logits."""
        if logits and self.generates:
            raise ValueError(
                f"--logits needs a task with labels, but predictions of kind {self.format.kind} "
                "are generated text; leave it out"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the text format, without the fields that every adapter has."""
        return {**super().settings, "text_to_text": text_format.to_json(self.format)}

    def _label_scores(self, params: step.Params, batch: step.Batch) -> Array:
        """Computes the log-likelihood of each label's text, all in one call of the decoder."""
        labels, rows = jnp.asarray(self.label_ids), batch["input_ids"].shape[0]
        mask = batch["attention_mask"]
        states = self.model.apply(
            {"params": params}, batch["input_ids"], mask, method="encode", **step.routing(batch)
        )
        inputs = batching.shift_right(
            self.label_ids, self.config.pad_token_id, self.config.decoder_start_token_id
        )
        logits = self.model.apply(
            {"params": params},
            jnp.tile(inputs, (rows, 1)),
            jnp.repeat(states, len(labels), axis=0),
            jnp.repeat(mask, len(labels), axis=0),
            method="decode",
            **step.routing(batch, len(labels)),
        )
        likelihoods = step.token_log_likelihoods(logits, jnp.tile(labels, (rows, 1)))
        return likelihoods.sum(-1).reshape(rows, len(labels))


def num_tokens(encoded: data_tokens.Encoded) -> np.ndarray:
    """Returns the number of tokens of each target that are labels, `[examples]`."""
    texts = encoded.target_texts
    assert texts is not None
    return np.diff(texts.offsets) - texts.given


def mean_token_loss(outputs: Mapping[str, np.ndarray], encoded: data_tokens.Encoded) -> float:
    """Returns the mean loss over the tokens of all targets."""
    return float(np.average(outputs["loss"].astype(np.float64), weights=num_tokens(encoded)))
