"""T5's pre-training task: text with spans cut out, and the spans to put back."""

from __future__ import annotations

import bisect
import functools
import io
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZED_AT_ONCE = 2**20  # characters, about
_BIG_FILE = 2**20  # bytes; reading less needs no progress bar


@dataclass(frozen=True)
class Segments:
    """Sequences of tokens of several lengths, one after the other.

    Attributes:
      tokens: `[tokens]` int32, without padding.
      offsets: `[segments + 1]` int64; segment `i` is `offsets[i]:offsets[i + 1]`.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        i = range(len(self))[index]
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


@dataclass(frozen=True)
class SpanCorruption:
    """Takes spans out of a segment of text and makes them the target.

    Of `n` tokens `round(noise_density * n)` are noise, in `round(noise / mean_span_length)` spans
    (of both at least one). Spans of text and of noise alternate, the first is text, the last is
    noise; all such divisions are equally likely. In the inputs the first span of noise is replaced
    by the first sentinel, the second by the second, and so on; the targets hold the same sentinels,
    each followed by its span. Both end with the end-of-sequence token. Figure 2 of the paper closes
    the targets with one more sentinel; the released code, with which the checkpoints were trained,
    does not, since a segment never ends in text, and so it is done here.

    Attributes:
      input_length: most tokens of the inputs, sentinels and the end of the sequence included.
      noise_density: part of the tokens to take out.
      mean_span_length: tokens per span of noise, on average.
      eos_token_id: the end of a sequence.
      sentinel_ids: what replaces the first span, the second, …; see `sentinel_ids`.

    Raises:
      ValueError: if a value is out of its range, or there are fewer sentinels than spans.

    References:
      Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text
      Transformer, JMLR 2020, arXiv:1910.10683, sections 3.1.4 and 3.3.4.
    """

    input_length: int
    noise_density: float = 0.15
    mean_span_length: float = 3.0
    _: KW_ONLY
    eos_token_id: int
    sentinel_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        wanted = {
            "input_length": (self.input_length >= 3, "at least 3: a token, a sentinel and the end"),
            # Above, hardly anything is left to go by, and segments grow without bound.
            "noise_density": (0 < self.noise_density <= 0.9, "above 0 and at most 0.9"),
            "mean_span_length": (1 <= self.mean_span_length < math.inf, "at least 1"),
            "eos_token_id": (self.eos_token_id >= 0, "at least 0"),
        }
        for name, (holds, want) in wanted.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} must be {want}")
        ids = (self.eos_token_id, *self.sentinel_ids)
        if len(set(ids)) < len(ids) or min(ids) < 0:
            raise ValueError(
                f"sentinel_ids={self.sentinel_ids} must be distinct, none of them negative or "
                f"eos_token_id={self.eos_token_id}"
            )
        self._check_sentinels()

    @functools.cached_property  # `corrupt` looks at it for every segment
    def segment_length(self) -> int:
        """Tokens of text that make inputs of `input_length`, or as near below as can be."""
        # Above this even the text that is left would not fit.
        limit = math.ceil(self.input_length / (1 - self.noise_density)) + 1
        return bisect.bisect_right(range(limit), self.input_length, key=self._num_inputs) - 1

    @property
    def target_length(self) -> int:
        """Tokens of the targets of a segment of `segment_length`; shorter ones have no more."""
        return sum(self._num_noise(self.segment_length)) + 1

    def corrupt(
        self, tokens: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of one segment.

        Args:
          tokens: `[n]` integers, `2 <= n <= segment_length`, no sentinels among them.
          generator: which noise to draw; segments of one length take as much from it.

        Returns:
          Inputs `[n - noise + spans + 1]` and targets `[noise + spans + 1]`, int32.

        Raises:
          ValueError: if there are too few or too many tokens.
        """
        if not 2 <= len(tokens) <= self.segment_length:
            raise ValueError(
                f"a segment of {len(tokens)} tokens cannot be corrupted with input_length="
                f"{self.input_length}; it wants 2 to {self.segment_length}"
            )
        noise, spans = self._num_noise(len(tokens))
        noise_lengths = _random_lengths(noise, spans, generator)
        text_lengths = _random_lengths(len(tokens) - noise, spans, generator)
        lengths = np.stack([text_lengths, noise_lengths], axis=1).ravel()
        is_noise = np.repeat(np.arange(2 * spans) % 2 == 1, lengths)
        starts = np.cumsum(lengths) - lengths
        inputs = self._replace_spans(tokens, is_noise, starts[1::2])
        targets = self._replace_spans(tokens, ~is_noise, starts[::2])
        return inputs, targets

    def _replace_spans(
        self, tokens: np.ndarray, dropped: np.ndarray, starts: np.ndarray
    ) -> np.ndarray:
        """`tokens` with a sentinel for every span of `dropped`, and the end of the sequence."""
        tokens = np.append(tokens, self.eos_token_id).astype(np.int32)
        kept = np.append(~dropped, True)
        tokens[starts] = self.sentinel_ids[: len(starts)]
        kept[starts] = True
        return tokens[kept]

    def _num_noise(self, length: int) -> tuple[int, int]:
        """Noise tokens and their spans in a segment of `length`; neither falls as it grows."""
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        spans = max(round(noise / self.mean_span_length), 1)
        return noise, min(spans, length - noise)

    def _num_inputs(self, length: int) -> int:
        if length < 2:
            return 0
        noise, spans = self._num_noise(length)
        return length - noise + spans + 1

    def _check_sentinels(self) -> None:
        have = len(self.sentinel_ids)
        length = self.segment_length
        if self._num_noise(length)[1] <= have:
            return
        fitting = bisect.bisect_right(range(2, length), have, key=lambda n: self._num_noise(n)[1])
        instead = (
            f"input_length={self._num_inputs(fitting + 1)} or less, or a longer mean_span_length"
            if fitting
            else "a tokenizer that has some"
        )
        raise ValueError(
            f"input_length={self.input_length} makes {self._num_noise(length)[1]} spans, but there "
            f"are {have} sentinels; use {instead}"
        )


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of `<extra_id_0>`, `<extra_id_1>`, …, in this order, as far as the vocabulary has them.

    mT5 spells them with a leading `▁`, which is accepted too.

    Raises:
      ValueError: if there is no `<extra_id_0>`.
    """
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    for i in itertools.count():
        name = f"<extra_id_{i}>"
        found = vocabulary.get(name, vocabulary.get(f"▁{name}"))
        if found is None:
            break
        ids.append(found)
    if not ids:
        raise ValueError(
            "the tokenizer has no sentinel token <extra_id_0>, which span corruption puts in place "
            "of text; use the tokenizer of a T5, or make one with `python -m train create-backbone`"
        )
    return tuple(ids)


def read_documents(
    path: str | Path,
    *,
    max_characters_per_document: int = 100_000,
    description: str | None = None,
) -> Iterator[str]:
    """Streams the documents of a text file; blank lines stand between them.

    Args:
      path: a UTF-8 file, with a byte order mark or without.
      max_characters_per_document: a longer document comes in parts, cut at an end of a line once
        it has so many characters, and within a line that alone has more.
      description: what the progress bar of a big file says; None is no bar.

    Yields:
      A document with its line breaks, never blank.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is a folder, empty, blank or not UTF-8, or if
        `max_characters_per_document` is below 1.
    """
    path = Path(path)
    check_text_file(path)
    if max_characters_per_document < 1:
        raise ValueError(
            f"max_characters_per_document={max_characters_per_document}; want 1 or more"
        )
    size, found = path.stat().st_size, False
    with path.open("rb") as raw, _bar(size, description) as bar:
        file = io.TextIOWrapper(raw, encoding="utf-8-sig")
        try:
            for document in _documents(file, max_characters_per_document):
                found = True
                yield document
                bar.update(raw.tell() - bar.n)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: is not UTF-8 (byte 0x{error.object[error.start]:02x}); "
                "convert it to UTF-8"
            ) from error
    if not found:
        raise ValueError(f"{path}: has no text, only white space")


def check_text_file(path: Path) -> None:
    """FileNotFoundError if there is no such file, ValueError if it is a folder or empty."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: is a directory, not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: is empty (0 bytes)")


def read_segments(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    segment_length: int,
    *,
    max_characters_per_document: int = 100_000,
) -> Segments:
    """Tokenises a text file and cuts it into segments.

    As in the released code of T5, documents follow each other with nothing between them, and a
    segment goes on from one to the next. Words that spell a sentinel or another special token
    (not the unknown token) are left out, since they would be taken for one.

    Args:
      path: a UTF-8 file, as `read_documents` takes it.
      tokenizer: a fast tokenizer with sentinels.
      segment_length: tokens of a segment; see `SpanCorruption.segment_length`.
      max_characters_per_document: as of `read_documents`; bounds what is held of the text.

    Returns:
      Segments of `segment_length` tokens, the last maybe shorter, but of 2 at least.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if `read_documents` or `sentinel_ids` raises it, `segment_length` is below 2, or
        the file has fewer than 2 tokens.
    """
    if segment_length < 2:
        raise ValueError(f"segment_length={segment_length}; want 2 or more")
    reserved = np.array(
        [*(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}), *sentinel_ids(tokenizer)]
    )
    documents = read_documents(
        path,
        max_characters_per_document=max_characters_per_document,
        description=f"tokenising {Path(path).name}",
    )
    parts = []
    for texts in _batches(documents):
        encodings = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # these lengths are not a model's inputs
        )
        flat = np.fromiter(itertools.chain.from_iterable(encodings["input_ids"]), np.int32)
        parts.append(flat[~np.isin(flat, reserved)])
    tokens = np.concatenate(parts)
    if len(tokens) < 2:
        raise ValueError(f"{path}: has {len(tokens)} tokens; span corruption needs 2 or more")
    cuts = np.arange(0, len(tokens) - 1, segment_length)  # a last token alone makes no segment
    end = min(cuts[-1] + segment_length, len(tokens))
    return Segments(tokens[:end], np.append(cuts, end).astype(np.int64))


def corrupted(
    segments: Segments, corruption: SpanCorruption, *, seed: int, epoch: int
) -> tuple[Segments, Segments]:
    """Inputs and targets of every segment, with the noise of one epoch.

    The noise of a segment depends on `seed`, `epoch` and the segment's index alone.

    Args:
      segments: text, as `read_segments` returns it.
      corruption: how to corrupt; its `segment_length` is that of the segments or more.
      seed: of the noise.
      epoch: each draws its own noise.

    Returns:
      `(inputs, targets)`, of as many segments, in the same order.

    Raises:
      ValueError: if `seed` or `epoch` is negative, or a segment does not suit `corruption`.
    """
    if seed < 0 or epoch < 0:
        raise ValueError(f"span corruption wants seed and epoch of 0 or more, got {seed}, {epoch}")
    pairs = [
        corruption.corrupt(segments[i], np.random.default_rng([seed, epoch, i]))
        for i in range(len(segments))
    ]
    inputs, targets = zip(*pairs, strict=True) if pairs else ((), ())
    return _joined(inputs), _joined(targets)


def _random_lengths(total: int, parts: int, generator: np.random.Generator) -> np.ndarray:
    """`[parts]` positive integers that add up to `total`, every way to do so equally likely."""
    bounds = np.zeros(parts + 1, np.int64)
    bounds[1:-1] = np.sort(generator.permutation(total - 1)[: parts - 1]) + 1
    bounds[-1] = total
    return bounds[1:] - bounds[:-1]


def _joined(arrays: tuple[np.ndarray, ...]) -> Segments:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    return Segments(np.concatenate([np.zeros(0, np.int32), *arrays]), offsets)


def _bar(size: int, description: str | None) -> tqdm:
    return tqdm(
        total=size,
        desc=description,
        unit="B",
        unit_scale=True,
        disable=description is None or size < _BIG_FILE,
        # A log file wants a line now and then, a person a bar that moves.
        mininterval=0.2 if sys.stderr.isatty() else 20,
    )


def _documents(file: TextIO, most: int) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    while line := file.readline(most):  # bounded, since a file may be one line
        blank = not line.strip()
        if not blank:
            lines.append(line)
            length += len(line)
        if lines and (blank or length >= most):
            yield "".join(lines)
            lines, length = [], 0
    if lines:
        yield "".join(lines)


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    texts: list[str] = []
    length = 0
    for document in documents:
        texts.append(document)
        length += len(document)
        if length >= _TOKENIZED_AT_ONCE:
            yield texts
            texts, length = [], 0
    if texts:
        yield texts
