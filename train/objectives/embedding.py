"""Objective of sentence embeddings: pairs with scores, pairs that belong together, triplets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from compacter_jax import embeddings as losses
from compacter_jax.messages import listing
from compacter_jax.models.pooling import Pooling
from compacter_jax.models.sentences import SentenceEmbedding
from train.cli.options import EmbeddingLoss, EmbeddingOptions
from train.compute import step
from train.data import tokens
from train.objectives import learning_rates as objectives_learning_rates
from train.objectives.base import Objective
from train.tasks import pairs, similarity

if TYPE_CHECKING:
    from train.fit.options import FitOptions
    from train.tasks import Task


# Number of rows of a split whose similarities to all texts are in memory at once.
_ROWS_AT_ONCE = 512


@dataclasses.dataclass(frozen=True)
class EmbeddingSettings:
    """How texts are embedded and trained, as an adapter keeps it.

    Attributes:
      pooling: the pooling of the hidden states, "mean" or "cls".
      normalize: True if embeddings have norm 1.
      lower_case: True if texts are put in lower case.
      loss: the loss.
      scale: the factor of the cosines in the loss of multiple negatives.
      margin: the margin of the triplet loss.
      dimensions: the Matryoshka dimensions; empty for the whole embeddings alone.
    """

    pooling: Pooling
    normalize: bool
    lower_case: bool
    loss: EmbeddingLoss
    scale: float
    margin: float
    dimensions: tuple[int, ...] = ()

    @property
    def embedding(self) -> SentenceEmbedding:
        """The function from hidden states to embeddings."""
        return SentenceEmbedding(self.pooling, self.normalize, self.lower_case)


@dataclasses.dataclass(frozen=True)
class Embedder(Objective):
    """Embeddings of texts from the hidden states of an encoder without a head.

    Attributes:
      model: a module of an encoder's inputs that returns an object with `last_hidden_state`.
      tokenizer: the tokenizer of the encoder.
      max_length: the maximum length of a text in tokens.
      settings_of_embedding: how texts are embedded and trained.
    """

    learning_rates: ClassVar = objectives_learning_rates.CLASSIFIER
    has_row_labels: ClassVar = False
    model: Any
    tokenizer: Any
    max_length: int
    settings_of_embedding: EmbeddingSettings

    @property
    def columns(self) -> Mapping[str, type]:
        """Columns of pairs, for their cosine."""
        return {pairs.FIRST: str, pairs.SECOND: str}

    @property
    def apply(self) -> step.ApplyFunction:
        """Function of the parameters that returns `[batch, texts, width]` embeddings."""
        of_texts = step.apply_function(self.model, self.inputs)
        embedding = self.settings_of_embedding.embedding

        def embed(params: step.Params, batch: step.Batch, dropout_key: Array | None) -> Array:
            rows, texts, length = batch["input_ids"].shape
            flat = {name: batch[name].reshape(-1, length) for name in self.inputs}
            flat |= step.routing(batch, copies=texts)
            output: Any = of_texts(params, flat, dropout_key)
            embedded = embedding(output.last_hidden_state, flat["attention_mask"])
            return embedded.reshape(rows, texts, -1)

        return embed

    @property
    def loss(self) -> step.LossFunction:
        """The loss of the settings, summed over the Matryoshka dimensions."""
        settings = self.settings_of_embedding
        if settings.loss == "multiple-negatives":

            def ranked(embedded: Array, ids: Array, *, axis_name: str | None) -> Array:
                return self._summed(
                    lambda x: in_batch_loss(x, ids, settings.scale, axis_name), embedded
                )

            return step.BatchLoss(ranked)
        return lambda embedded, labels: self._summed(
            lambda x: self._loss_of_rows(x, labels), embedded
        )

    def _loss_of_rows(self, embedded: Array, labels: Array) -> Array:
        """Returns `[rows]` losses that depend on one row each."""
        if self.settings_of_embedding.loss == "cosine":
            return losses.cosine_similarity_loss(embedded[:, 0], embedded[:, 1], labels)
        margin = self.settings_of_embedding.margin
        return losses.triplet_loss(*(embedded[:, i] for i in range(3)), margin=margin)

    def _summed(self, loss: Any, embedded: Array) -> Array:
        """Returns the loss of the whole embeddings, or the sum over the Matryoshka dimensions."""
        dimensions = self.settings_of_embedding.dimensions
        return losses.matryoshka_loss(loss, embedded, dimensions) if dimensions else loss(embedded)

    def outputs(self, params: step.Params, batch: step.Batch) -> Array:
        """Computes `[batch, texts, width]` float32 embeddings."""
        return step.logits_of(self.apply)(params, batch)

    def encode(self, rows: Any) -> tokens.Encoded:
        """Tokenises the texts of each row by themselves.

        Raises:
          ValueError: as `train.data.tokens.tokenize`.
        """
        columns = _text_columns(tokens.columns_of(rows))
        texts = list(zip(*(rows[name][:] for name in columns), strict=True))
        flat = [text for row in texts for text in row]
        if self.settings_of_embedding.lower_case:
            flat = [text.lower() for text in flat]
        encoded = tokens.tokenize({"sentence": flat}, self.tokenizer, self.max_length)
        targets = tokens.targets_of(rows)
        if targets is None and len(columns) > 1:
            targets = _numbers_of(texts)
        return dataclasses.replace(
            encoded, targets=targets, rows=texts, texts_of_example=len(columns)
        )

    def scores(self, outputs: np.ndarray, encoded: tokens.Encoded) -> dict[str, float]:
        """Returns the metrics of the rows, the same of the Matryoshka dimensions, and the loss.

        Rows with scores have the metrics of `train.tasks.similarity.score_metrics`, others those of
        `retrieval_metrics`. The metrics of the first 64 numbers, say, are `64/spearman` and so on.
        The loss is that of training where rows have what it needs; otherwise that of the cosine for
        rows with scores, and of multiple negatives for others. For multiple negatives all rows of
        the split are one batch.
        """
        if encoded.targets is None:
            raise ValueError("these texts have no second text to compare with")
        _check_finite(outputs)
        values = self._metrics(outputs, encoded)
        width = outputs.shape[-1]
        for dimension in self.settings_of_embedding.dimensions:
            if dimension < width:
                found = self._metrics(outputs[..., :dimension], encoded)
                values |= {f"{dimension}/{name}": value for name, value in found.items()}
        return {**values, "loss": self._mean_loss(outputs, encoded)}

    def predictions(self, outputs: np.ndarray, encoded: tokens.Encoded) -> Any:
        """Returns the embedding of each row's text as a list; for pairs, their cosine."""
        _check_finite(outputs)
        if encoded.texts_of_example == 1:
            return outputs[:, 0].tolist()
        return similarity.cosines(outputs[:, 0], outputs[:, 1]).tolist()

    def predictions_and_targets(
        self, outputs: Any, encoded: tokens.Encoded
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns cosines and scores; None for rows without scores."""
        if not _has_scores(encoded):
            return None
        return similarity.cosines(outputs[:, 0], outputs[:, 1]), np.asarray(encoded.targets)

    def user_messages(self) -> list[str]:
        """Returns a line about the embeddings and the loss that trains them."""
        settings = self.settings_of_embedding
        pooled = {"mean": "the mean of the tokens", "cls": "the first token"}[settings.pooling]
        detail = {
            "multiple-negatives": f" (scale {settings.scale:g})",
            "triplet": f" (margin {settings.margin:g})",
        }
        widths = ", ".join(map(str, settings.dimensions))
        return [
            f"an embedding is {pooled}{', of norm 1' * settings.normalize}; trained by the loss "
            f"{settings.loss}{detail.get(settings.loss, '')}"
            + (f" of the first {widths} dimensions" if widths else "")
        ]

    def check_predicts(self, *, logits: bool) -> None:
        """Raises ValueError for `logits`: an embedding has none."""
        if logits:
            raise ValueError(
                "--logits needs a task with labels or scores of rows, and an embedding has none; "
                "leave it out"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Metadata of a saved adapter."""
        settings = dataclasses.asdict(self.settings_of_embedding)
        return {"embedding": {**settings, "dimensions": list(settings["dimensions"])}}

    def _metrics(self, outputs: np.ndarray, encoded: tokens.Encoded) -> dict[str, float]:
        if _has_scores(encoded):
            targets: Any = encoded.targets
            return similarity.score_metrics(outputs[:, 0], outputs[:, 1], targets)
        return similarity.retrieval_metrics(outputs, encoded.rows)

    def _mean_loss(self, outputs: np.ndarray, encoded: tokens.Encoded) -> float:
        """Returns the loss as `scores` describes it."""
        settings = self.settings_of_embedding
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            embedded, targets = jnp.asarray(outputs), jnp.asarray(encoded.targets)
            if _has_scores(encoded):
                of_rows = dataclasses.replace(settings, loss="cosine")
            elif settings.loss == "triplet" and outputs.shape[1] == 3:
                of_rows = settings
            else:
                whole = self._summed(lambda x: _of_split(x, targets, settings.scale), embedded)
                return float(jnp.mean(whole))
            alone = dataclasses.replace(self, settings_of_embedding=of_rows)
            return float(jnp.mean(alone.loss(embedded, targets)))


def _of_split(embedded: Array, ids: Array, scale: float) -> Array:
    """Returns the losses of multiple negatives of all rows of a split as one batch."""
    parts = [slice(start, start + _ROWS_AT_ONCE) for start in range(0, len(ids), _ROWS_AT_ONCE)]
    return jnp.concatenate(
        [
            loss_among(embedded[part, 0], ids[part], embedded[:, 1:], ids, part.start, scale)
            for part in parts
        ]
    )


def in_batch_loss(embedded: Array, ids: Array, scale: float, axis_name: str | None = None) -> Array:
    """Computes the loss of multiple negatives with all other rows of a batch, on all devices.

    Args:
      embedded: `[rows, texts, width]`: anchor, positive and perhaps negative.
      ids: `[rows, texts]` integers: equal texts have equal numbers, 0 is a filling row.
      scale: the factor of the cosines.
      axis_name: the name of the pmap axis whose devices have the other rows; None if there are no
        others.

    Returns:
      `[rows]` losses; of a filling row a finite number without meaning.
    """
    all_ids, candidates = ids, embedded[:, 1:]
    first: Any = 0
    if axis_name is not None:
        all_ids, candidates = (
            jax.lax.all_gather(x, axis_name, tiled=True) for x in (all_ids, candidates)
        )
        first = len(ids) * jax.lax.axis_index(axis_name)
    return loss_among(embedded[:, 0], ids, candidates, all_ids, first, scale)


def loss_among(
    anchors: Array, ids: Array, candidates: Array, all_ids: Array, first: Any, scale: float
) -> Array:
    """Computes the loss of multiple negatives of some rows among the texts of all rows.

    A text that equals the row's positive, or that is the positive of the same anchor in another
    row, is not a negative, nor is a text of a filling row.

    Args:
      anchors: `[rows, width]`.
      ids: `[rows, texts]` integers, as for `in_batch_loss`.
      candidates: `[all rows, texts - 1, width]`: positives and perhaps negatives.
      all_ids: `[all rows, texts]`.
      first: the place of the first of the rows among all rows.
      scale: the factor of the cosines.
    """
    rows, number = len(anchors), candidates.shape[1]
    texts = all_ids[:, 1:].reshape(-1)
    of_same_anchor = all_ids[None, :, :1] == ids[:, None, :1]
    is_right = (of_same_anchor & (jnp.arange(number) == 0)).reshape(rows, -1)
    is_right |= texts == ids[:, 1:2]
    return losses.multiple_negatives_ranking_loss(
        anchors,
        candidates.reshape(-1, candidates.shape[-1]),
        scale=scale,
        positives=(first + jnp.arange(rows)) * number,
        mask=(texts != 0) & ~is_right,
    )


def check_rows(task: Task, loss: EmbeddingLoss | None, *, batch_size: int, parts: int) -> None:
    """Checks that a loss can be trained on the rows of a task.

    Args:
      task: the task, of kind "embedding".
      loss: the loss; None for that of the rows.
      batch_size: number of rows of a batch.
      parts: number of parts in which a device computes its rows.

    Raises:
      ValueError: if the rows lack what the loss needs, or have scores that it does not read; or if
        a row has no negative.
    """
    rows = task.splits["train"]
    found, loss = pairs.class_of(rows), loss or loss_for(rows)
    lacks = {
        "cosine": found != "scored pairs" and "needs a column score",
        "triplet": found != "triplets" and "needs the columns anchor, positive and negative",
        "multiple-negatives": found == "scored pairs"
        and "takes every pair as one that belongs together, and does not read the column score",
    }[loss]
    if lacks:
        others = {"scored pairs": "cosine", "pairs": "multiple-negatives"}
        raise ValueError(
            f"--embedding-loss {loss} {lacks}, but the training rows are {found}; give "
            f"--embedding-loss {others.get(found, 'multiple-negatives or triplet')}, or another "
            "file"
        )
    if loss != "multiple-negatives":
        return
    if parts > 1:
        raise ValueError(
            f"accumulation_steps={parts} divides a batch, and with --embedding-loss "
            "multiple-negatives the rows of a part alone would be negatives; use a smaller "
            "--batch-size, which takes as little memory"
        )
    if found == "pairs" and min(batch_size, len(rows)) == 1:
        raise ValueError(
            f"batches of {batch_size} of {len(rows)} training rows leave each pair alone in its "
            "batch, where no other pair is a negative; give at least 2 rows, a --batch-size of at "
            "least 2, or a column negative"
        )


def loss_for(rows: Any) -> EmbeddingLoss:
    """Returns the default loss for rows: cosine for scores, otherwise multiple negatives."""
    return "cosine" if pairs.class_of(rows) == "scored pairs" else "multiple-negatives"


def _check_finite(outputs: np.ndarray) -> None:
    """Raises ValueError if numbers of an embedding are not finite."""
    bad = int(np.count_nonzero(~np.isfinite(outputs).all(-1)))
    if bad:
        raise ValueError(
            f"the embeddings of {bad} texts are not finite; training has diverged (try a smaller "
            "learning rate), or the adapter or the backbone is damaged"
        )


def _has_scores(encoded: tokens.Encoded) -> bool:
    return encoded.targets is not None and encoded.targets.ndim == 1


def _text_columns(found: Sequence[str]) -> list[str]:
    """Returns the columns of texts: those of pairs, or `sentence` and perhaps `sentence2`."""
    for names in (pairs.TEXTS, ("sentence", "sentence2")):
        if columns := [name for name in names if name in found and names[0] in found]:
            return columns
    raise ValueError(f"there is no column 'sentence' to embed; the columns are {listing(found)}")


def _numbers_of(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Returns `[rows, texts]` int32 numbers from 1 on, equal for equal texts."""
    known: dict[str, int] = {}
    numbers = [[known.setdefault(text, 1 + len(known)) for text in row] for row in texts]
    return np.array(numbers, np.int32)


def check_embedding(task: Task, options: FitOptions) -> None:
    """Raises ValueError if the options of embeddings do not fit the task."""
    if task.kind == "embedding":
        check_rows(
            task,
            options.embedding_loss,
            batch_size=min(options.batch_size, options.train_size or options.batch_size),
            parts=options.accumulation_steps,
        )
        return
    for field in dataclasses.fields(EmbeddingOptions):
        if getattr(options, field.name) != field.default:
            raise ValueError(
                f"--{field.name.replace('_', '-')} is for sentence embeddings, from files with the "
                f"columns anchor and positive or sentence1 and sentence2, but task {task.name!r} "
                f"has kind {task.kind}"
            )
