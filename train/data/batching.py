"""Batches: examples of similar length, shuffled, padded and divided over devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np

from train.data.tokens import IGNORED, Encoded

Batch: TypeAlias = dict[str, np.ndarray]


# Number of batches in a window within which shuffled examples are sorted by length: large enough
# for batches of one bucket, small enough to preserve most of the shuffle.
_WINDOW_BATCHES = 32
# Smallest padded length of inputs of tokens, of frames of speech, and of targets. Frames are many
# for one text; coarser buckets keep the number of compiled shapes small.
TOKENS, FRAMES, TARGETS = 16, 64, 4
# Share of the examples from which on a pair of lengths of inputs and targets has batches of its own
# in training: compiling for it takes longer than a rare pair's padding costs.
_RARE = 0.03


class Examples(Protocol):
    """Examples of a split, which may be generated anew for every epoch."""

    def __len__(self) -> int: ...

    def of_epoch(self, epoch: int) -> Encoded:
        """Returns the examples of an epoch, a function of `epoch` alone with a constant number."""

    def user_messages(self, split: str) -> list[str]:
        """Returns lines about the examples for the user."""


def bucket_lengths(max_length: int, multiple: int = TOKENS) -> tuple[int, ...]:
    """Returns the lengths that inputs are padded to; they are few, so that XLA compiles few shapes.

    They are `multiple` times 1, 2, 3, 4, 6, 8, 12, …, so that less than half of a long input is
    padding. The last is `max_length` itself.

    Raises:
      ValueError: if `max_length` or `multiple` is below 1.
    """
    if max_length < 1 or multiple < 1:
        raise ValueError(f"max_length={max_length} and multiple={multiple} must be at least 1")
    lengths, power = [multiple], 2
    while lengths[-1] < max_length:
        lengths += [power * multiple, power * multiple * 3 // 2]
        power *= 2
    return (*(length for length in lengths if length < max_length), max_length)


def num_batches(num_examples: int, batch_size: int) -> int:
    """Returns the number of batches of a shuffled epoch, `ceil(num_examples / batch_size)`."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    return -(-num_examples // batch_size)


def batches(
    encoded: Encoded,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int | None = None,
    epoch: int = 0,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Yields every example once, in batches of inputs of similar length.

    The shuffled order depends on `seed` and `epoch` alone. Without shuffling, inputs are ordered by
    bucket, and within a bucket as in the data; every input is padded to its own bucket. The same
    holds for targets that are texts, which have finer buckets; but if `encoded.is_generated`, they
    are all padded to the bucket of the longest. With shuffling, examples of a rare pair of input
    and target buckets are padded to a larger pair, so that fewer shapes are compiled.

    Args:
      encoded: the examples.
      batch_size: the number of rows of every batch; the last is filled with rows of weight 0.
      shuffle: whether to shuffle, for training.
      seed: the seed of the shuffle.
      epoch: the epoch, which enters the shuffle.
      start: the number of batches to skip at the beginning, to resume.
      part: `(i, n)` for the i-th of n equal parts of every batch, `batch_size / n` rows padded as
        the whole batch is. Each of several hosts that train together takes one part.

    Yields:
      `input_ids`, `attention_mask` and, where there are any, `token_type_ids`: `[batch_size,
      length]` int32, where `length` is a bucket; of speech, `input_features` in place of the first,
      `[batch_size, length, width]` float32. `labels`: `[batch_size]` int32 or float32, or
      `[batch_size, 2]` int32, 0 where unknown. `weights`: `[batch_size]` float32, 1, or 0 in a
      filling row. `indices`: `[batch_size]` int32, the position in `encoded`, or -1 in a filling
      row. A filling row attends to one token, so that its softmax is finite. With target texts,
      `labels` are their tokens, `[batch_size, target_length]` int32, `IGNORED` where there is none
      and where it is given; `decoder_input_ids`, of the same shape, are the tokens shifted to the
      right behind the start token; and the weight of a row is the number of its labels, so that the
      weighted mean of the rows' mean losses is the mean over the batch's labels. With routes,
      `adapter_ids` and `first_tokens`: `[batch_size]` int32, as far as they are known. With words,
      `labels` are the tags of the words at their first tokens, `[batch_size, length]` int32,
      `IGNORED` elsewhere, and the weight of a row is the number of these tags, at least 1. If an
      example has several texts, the inputs are `[batch_size, texts, length]`, and `labels` are the
      scores or `[batch_size, texts]` int32, the numbers of equal texts, 0 in a filling row.

    Raises:
      ValueError: if `shuffle` has no `seed`, or `start`, `batch_size` or `part` is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    index, parts = part
    if not 0 <= index < parts or batch_size % parts:
        raise ValueError(
            f"part={part} is not a part of a batch of {batch_size} that is divided by {parts}"
        )
    padded = _padded_lengths(encoded)
    if shuffle and encoded.target_texts is not None:
        padded = _without_rare(padded)
    elif encoded.is_generated:
        padded[:, 1] = padded[:, 1].max(initial=0)
    # One number for each pair of lengths, which preserves the order of the pairs.
    buckets = padded[:, 0] * (1 + padded[:, 1].max(initial=0)) + padded[:, 1]
    if shuffle:
        if seed is None or seed < 0 or epoch < 0:
            raise ValueError(f"seed={seed} and epoch={epoch} must be at least 0 for shuffling")
        rows = _shuffled(buckets, batch_size, np.random.default_rng([seed, epoch]))
    else:
        # Buckets are not mixed: the outputs of a row must not depend on its neighbours.
        positions = [np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)]
        rows = [row for of_bucket in positions for row in _sliced(of_bucket, batch_size)]
    if not 0 <= start <= len(rows):
        raise ValueError(f"start={start} is not within the {len(rows)} batches of an epoch")
    size, pairs = batch_size // parts, np.unique(padded, axis=0)
    return (
        _batch(encoded, row[index * size : (index + 1) * size], size, *_least(pairs, padded[row]))
        for row in rows[start:]
    )


def shift_right(labels: np.ndarray, pad_token_id: int, start_token_id: int) -> np.ndarray:
    """Returns decoder inputs for teacher forcing: the labels shifted right behind the start token.

    Args:
      labels: `[rows, length]` int32, `IGNORED` where there is no token.
      pad_token_id: the token in place of `IGNORED`.
      start_token_id: the first token of every row.
    """
    inputs = np.roll(np.where(labels == IGNORED, pad_token_id, labels), 1, axis=1)
    inputs[:, 0] = start_token_id
    return inputs


def shard(batch: Mapping[str, np.ndarray], num_devices: int) -> Batch:
    """Splits the leading axis: `[B, …]` -> `[num_devices, B / num_devices, …]`.

    Raises:
      ValueError: if `num_devices` does not divide the batch.
    """
    size = len(next(iter(batch.values())))
    if size % num_devices:
        above = -(-size // num_devices) * num_devices
        works = " or ".join(str(n) for n in (above - num_devices, above) if n)
        raise ValueError(f"{num_devices} devices cannot share a batch of {size}; use {works}")
    return {
        name: array.reshape(num_devices, size // num_devices, *array.shape[1:])
        for name, array in batch.items()
    }


def _sliced(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def _shuffled(
    buckets: np.ndarray, batch_size: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """Returns the positions of each batch.

    Windows are whole batches, so that only the last batch can be short.
    """
    windows = _sliced(generator.permutation(len(buckets)), batch_size * _WINDOW_BATCHES)
    order = [window[np.argsort(buckets[window], kind="stable")] for window in windows]
    rows = _sliced(np.concatenate(order), batch_size) if order else []
    return [rows[i] for i in generator.permutation(len(rows))]


def _padded_lengths(encoded: Encoded) -> np.ndarray:
    """Returns `[examples, 2]`: the buckets of each input and target, 0 without a target."""
    padded = np.zeros((len(encoded), 2), np.int64)
    texts = encoded.target_texts
    columns = [(encoded.offsets, encoded.max_length, TOKENS if encoded.frames is None else FRAMES)]
    if texts is not None:
        columns.append((texts.offsets, texts.max_length, TARGETS))
    for column, (offsets, max_length, multiple) in enumerate(columns):
        lengths = np.array(bucket_lengths(max_length, multiple))
        # The texts of an example are padded to one length.
        longest = np.diff(offsets).reshape(-1, encoded.texts_of_example or 1).max(1)
        padded[:, column] = lengths[np.searchsorted(lengths, longest)]
    return padded


def _without_rare(padded: np.ndarray) -> np.ndarray:
    """Returns `[examples, 2]` lengths of which no pair is rare, except for the largest one.

    Examples of a rare pair join the smallest pair that is as long in both.

    Args:
      padded: `[examples, 2]`, the buckets of each input and target.
    """
    pairs, which, counts = np.unique(padded, axis=0, return_inverse=True, return_counts=True)
    # The largest of both is as long as any pair.
    pairs = np.concatenate([pairs, padded.max(0, keepdims=True, initial=0)])
    counts, joined = np.append(counts, 0), np.arange(len(pairs))
    ascending = np.argsort(pairs.prod(1), kind="stable")
    for place, pair in enumerate(ascending[:-1]):
        if counts[pair] < _RARE * len(padded):
            larger = ascending[place + 1 :]
            joined[pair] = larger[(pairs[larger] >= pairs[pair]).all(1)][0]
            counts[joined[pair]] += counts[pair]
    # A pair that others joined may have joined another in turn.
    for pair in ascending[::-1]:
        joined[pair] = joined[joined[pair]]
    return pairs[joined[which.reshape(-1)]]


def _least(pairs: np.ndarray, padded: np.ndarray) -> np.ndarray:
    """Returns the lengths that a batch is padded to, one of the `pairs` if one is long enough.

    Args:
      pairs: `[pairs, 2]`, the lengths that examples are padded to.
      padded: `[rows, 2]`, those of the rows of the batch.
    """
    longest = padded.max(0)
    enough = pairs[(pairs >= longest).all(1)]
    return enough[enough.prod(1).argmin()] if len(enough) else longest


def _batch(
    encoded: Encoded, positions: np.ndarray, batch_size: int, length: int, target_length: int
) -> Batch:
    def column(values: np.ndarray, dtype: Any, fill: int) -> np.ndarray:
        filled = np.full((batch_size, *np.shape(values)[1:]), fill, dtype)
        filled[: len(positions)] = values
        return filled

    shape = (batch_size, length)
    batch: Batch = {
        **_inputs(encoded, positions, shape),
        "indices": column(positions, np.int32, fill=-1),
    }
    if encoded.routes is not None:
        for name, values in encoded.routes.columns().items():
            # A filling row has no weight, so that its member is arbitrary.
            batch[name] = column(values[positions], np.int32, fill=0)
    texts, targets = encoded.target_texts, encoded.targets
    if encoded.words is not None:
        tags = encoded.words.tags
        none = np.full(shape, IGNORED, np.int32)
        labels = none if tags is None else _pad(tags, encoded.offsets, positions, shape, IGNORED)
        # A sentence whose words are all dropped still counts as one: a batch of weight 0 has no
        # mean.
        weights = np.maximum((labels != IGNORED).sum(1), 1)
        batch["labels"] = labels
        batch["weights"] = np.where(batch["indices"] >= 0, weights, 0).astype(np.float32)
        return batch
    if texts is not None:
        labels = _pad(texts.ids, texts.offsets, positions, (batch_size, target_length), IGNORED)
        batch["decoder_input_ids"] = shift_right(
            labels, encoded.pad_token_id, encoded.decoder_start_token_id
        )
        labels[:, : texts.given] = IGNORED
        batch["labels"] = labels
        batch["weights"] = (labels != IGNORED).sum(1).astype(np.float32)
        return batch
    batch["labels"] = np.zeros(batch_size, np.int32)
    if targets is not None:
        batch["labels"] = column(targets[positions], targets.dtype, fill=0)
    batch["weights"] = column(np.ones(len(positions)), np.float32, fill=0)
    return batch


def _inputs(encoded: Encoded, positions: np.ndarray, shape: tuple[int, int]) -> Batch:
    """Returns the arrays that the backbone reads, filled to `shape`, `[rows, length]`.

    If examples have several texts, the arrays are `[rows, texts, length]`; features are
    `[rows, length, width]`.
    """
    number = encoded.texts_of_example or 1
    rows, (batch_size, length) = positions, shape
    if number > 1:
        rows = (positions[:, None] * number + np.arange(number)).ravel()
    filled = (batch_size * number, length)
    real_lengths = np.ones(batch_size * number, np.int64)
    real_lengths[: len(rows)] = np.diff(encoded.offsets)[rows]
    mask = (np.arange(length) < real_lengths[:, None]).astype(np.int32)
    if encoded.frames is not None:
        features = encoded.frames.padded(positions, shape)
        return {"input_features": features, "attention_mask": mask}
    inputs = {
        "input_ids": _pad(encoded.input_ids, encoded.offsets, rows, filled, encoded.pad_token_id),
        "attention_mask": mask,
    }
    if encoded.token_type_ids is not None:
        inputs["token_type_ids"] = _pad(encoded.token_type_ids, encoded.offsets, rows, filled, 0)
    if encoded.texts_of_example is None:
        return inputs
    return {name: array.reshape(batch_size, number, length) for name, array in inputs.items()}


def _pad(
    flat: np.ndarray,
    offsets: np.ndarray,
    positions: np.ndarray,
    shape: tuple[int, int],
    fill: int,
) -> np.ndarray:
    """Returns the given rows of `flat`, which `offsets` divide, filled at the right and below."""
    rows = np.full(shape, fill, np.int32)
    for row, position in enumerate(positions):
        tokens = flat[offsets[position] : offsets[position + 1]]
        rows[row, : len(tokens)] = tokens
    return rows
