"""Objective of tagging: a tag of every word."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from train.compute import step
from train.data import tokens
from train.data.rows import WORDS
from train.data.words import WordCounts, Words, of_rows
from train.objectives import learning_rates as objectives_learning_rates
from train.objectives.base import LabelLogits, Objective
from train.tasks import entities

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_TOKENIZED_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Tagger(Objective):
    """Tags of words, from the logits of each word's first token.

    Other tokens have no tag. Words beyond the maximum length, and words that the tokenizer drops,
    are neither trained on nor scored.

    Attributes:
      model: a module of an encoder's inputs that returns `[batch, length, num_labels]` logits.
      tokenizer: the tokenizer of the encoder, which knows the word of each token.
      max_length: the maximum input length in tokens.
      label_names: the tags, in the order of the logits; a bank may have further logits.
    """

    learning_rates: ClassVar = objectives_learning_rates.CLASSIFIER
    has_row_labels: ClassVar = False
    model: Any
    tokenizer: Any
    max_length: int
    label_names: tuple[str, ...]

    @property
    def label_logits(self) -> LabelLogits:
        """The logits of the tags of all tokens, `[batch, length, tags]`."""
        return LabelLogits(self._logits, self._outputs_of)

    @property
    def columns(self) -> Mapping[str, type]:
        """Column of lists of words."""
        return {"tokens": WORDS}

    @property
    def loss(self) -> step.LossFunction:
        """Mean cross-entropy over the words of a sentence."""
        return step.loss_function("tokens")

    def outputs(self, params: step.Params, batch: step.Batch) -> dict[str, Array]:
        """Computes the likeliest tags, and the losses of the words.

        Returns:
          `tags`: `[batch, max_length]` int32, the tag of each token; -1 where its logits are not
          finite, and behind the padding. `loss`: `[batch]` float32, the sum over the words whose
          tags are known.
        """
        return self._outputs_of(self._logits(params, batch), batch)

    def _logits(self, params: step.Params, batch: step.Batch) -> Array:
        """Computes the logits of the tags of all tokens, `[batch, length, tags]` float32."""
        return self.apply(params, batch, None)[..., : len(self.label_names)].astype(jnp.float32)

    def _outputs_of(self, logits: Array, batch: step.Batch) -> dict[str, Array]:
        """Returns `outputs` from the logits of a batch."""
        tags = jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), -1).astype(jnp.int32)
        more = self.max_length - tags.shape[1]
        return {
            "tags": jnp.pad(tags, ((0, 0), (0, more)), constant_values=-1),
            "loss": -step.token_log_likelihoods(logits, batch["labels"]).sum(-1),
        }

    def encode(self, rows: Any) -> tokens.Encoded:
        """Tokenises sentences that are divided into words.

        Raises:
          ValueError: as `encode`, or if there is no column `tokens`.
        """
        if "tokens" not in (found := tokens.columns_of(rows)):
            raise ValueError(
                "tags are predicted for the words of a column 'tokens', lists of text, but the "
                f"columns are {', '.join(found)}"
            )
        return encode(rows, self.tokenizer, self.max_length)

    def scores(self, outputs: dict[str, np.ndarray], encoded: tokens.Encoded) -> dict[str, float]:
        """Returns the metrics of `tag_metrics`, and the mean loss of a word."""
        predictions, targets = self._compared(outputs, encoded)
        values = entities.tag_metrics(predictions, targets, self.label_names)
        total = float(outputs["loss"].astype(np.float64).sum())
        return {**values, "loss": total / sum(map(len, targets))}

    def predictions(
        self, outputs: dict[str, np.ndarray], encoded: tokens.Encoded
    ) -> list[list[str | None]]:
        """Returns a tag for each word, None for words that are not read."""
        assert encoded.words is not None
        found: list[list[str | None]] = [[None] * length for length in encoded.words.lengths]
        for tags, (words, predicted, _) in zip(found, self._read(outputs, encoded), strict=True):
            for word, tag in zip(words, predicted, strict=True):
                tags[word] = self.label_names[tag]
        return found

    def predictions_and_targets(
        self, outputs: dict[str, np.ndarray], encoded: tokens.Encoded
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns `[rows]` tuples of tags, and those of the rows; words not read are left out."""
        predictions, targets = self._compared(outputs, encoded)
        return of_rows(predictions), of_rows(targets)

    def check_predicts(self, *, logits: bool) -> None:
        """Raises ValueError for `logits`, which are those of words."""
        if logits:
            raise ValueError(
                "--logits needs a task with one label for each row, and tags are those of words; "
                "leave it out"
            )

    def _compared(
        self, outputs: dict[str, np.ndarray], encoded: tokens.Encoded
    ) -> tuple[list[list[str]], list[list[str]]]:
        """Returns the predicted and the right tags of the words that are read."""
        if encoded.words is None or encoded.words.tags is None:
            raise ValueError("these sentences have no tags to compare with")
        both = [
            [[self.label_names[tag] for tag in tags] for tags in (predicted, targets)]
            for _, predicted, targets in self._read(outputs, encoded)
        ]
        return [predicted for predicted, _ in both], [targets for _, targets in both]

    def _read(
        self, outputs: dict[str, np.ndarray], encoded: tokens.Encoded
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Returns, for each row, the words that are read, their predicted and their right tags.

        Right tags are empty where they are unknown.

        Raises:
          ValueError: if the logits of a word are not finite.
        """
        assert encoded.words is not None
        words, found = encoded.words, []
        for row, tags in enumerate(outputs["tags"]):
            of_row = slice(*encoded.offsets[row : row + 2])
            places = np.flatnonzero(words.indices[of_row] >= 0)
            targets = places[:0] if words.tags is None else words.tags[of_row][places]
            found.append((words.indices[of_row][places], tags[places], targets))
        bad = sum(int((predicted < 0).sum()) for _, predicted, _ in found)
        if bad:
            raise ValueError(
                f"the logits of {bad} words are not finite; training has diverged (try a smaller "
                "learning rate), or the adapter or the backbone is damaged"
            )
        return found


def encode(
    rows: Dataset | Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tokens.Encoded:
    """Tokenises sentences that are divided into words.

    Args:
      rows: the columns `tokens`, lists of words, and, where they are known, `tags`, lists of
        integers.
      tokenizer: a fast tokenizer.
      max_length: the length to which a sentence is truncated, with the special tokens.

    Returns:
      An example for each sentence, with its words.

    Raises:
      ValueError: if `max_length` leaves no room for a token, or the tokenizer is a slow one.
    """
    tokens.check_fast(tokenizer)
    least = tokenizer.num_special_tokens_to_add() + 1
    if max_length < least:
        raise ValueError(f"max_length={max_length} leaves no room for a word; use {least} or more")
    sentences = rows["tokens"][:]
    tags = rows["tags"][:] if "tags" in tokens.columns_of(rows) else None
    ids, types, places, labels, counts, num_truncated = [], [], [], [], WordCounts(), 0
    for start in range(0, len(sentences), _TOKENIZED_AT_ONCE):
        encodings = tokenizer(
            sentences[start : start + _TOKENIZED_AT_ONCE],
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
        ).encodings
        for row, encoding in enumerate(encodings, start):
            ids.append(np.array(encoding.ids, np.int32))
            types.append(np.array(encoding.type_ids, np.int32))
            places.append(_first_tokens(encoding.word_ids))
            counts += _counted(encoding, len(sentences[row]))
            num_truncated += bool(encoding.overflowing)
            if tags is not None:
                known = np.append(np.array(tags[row], np.int32), tokens.IGNORED)
                labels.append(known[places[-1]])  # the index -1 is that of IGNORED
    none = np.zeros(0, np.int32)
    flat = np.concatenate([none, *ids])
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return tokens.Encoded(
        input_ids=flat,
        token_type_ids=np.concatenate([none, *types]),
        offsets=offsets,
        unknown=tokens.count_unknown(flat, offsets, tokenizer),
        targets=None,
        max_length=max_length,
        pad_token_id=tokenizer.pad_token_id,
        num_truncated=num_truncated,
        words=Words(
            lengths=np.array([len(words) for words in sentences], np.int64),
            indices=np.concatenate([none, *places]),
            tags=None if tags is None else np.concatenate([none, *labels]),
            counts=counts,
        ),
    )


def _first_tokens(word_ids: Sequence[int | None]) -> np.ndarray:
    """Returns `[tokens]` int32: the word whose first token a token is, -1 for other tokens."""
    words = np.array([-1 if word is None else word for word in word_ids], np.int32)
    return np.where(words != np.concatenate([[-1], words[:-1]]), words, -1).astype(np.int32)


def _counted(encoding: Any, length: int) -> WordCounts:
    """Returns the counts of a sentence of `length` words."""
    kept = set(encoding.word_ids) - {None}
    cut = {word for rest in encoding.overflowing for word in rest.word_ids} - {None} - kept
    return WordCounts(length, len(cut), length - len(kept) - len(cut))
