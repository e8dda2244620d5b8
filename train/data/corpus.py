"""Text files for pre-training, read and tokenised."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from tqdm import tqdm

from train.data.tokens import sentinel_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TOKENIZED_AT_ONCE = 2**20  # characters, about


_BIG_FILE = 2**20  # bytes; reading less needs no progress bar


@dataclass(frozen=True)
class Segments:
    """Sequences of tokens of different lengths, one after the other.

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


def read_documents(
    path: str | Path,
    *,
    max_characters_per_document: int = 100_000,
    description: str | None = None,
) -> Iterator[str]:
    """Streams the documents of a text file, which are separated by blank lines.

    Args:
      path: a UTF-8 file, with or without a byte order mark.
      max_characters_per_document: the length from which on a document is split into several; the
        split is at the end of a line, or within a line that alone is longer.
      description: the label of the progress bar for a big file; None shows no bar.

    Yields:
      A document with its line breaks, never blank.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is a folder, empty, blank or not UTF-8, or if `max_characters_per_document`
        is below 1.
    """
    path = Path(path)
    check_text_file(path)
    if max_characters_per_document < 1:
        raise ValueError(
            f"max_characters_per_document={max_characters_per_document} must be at least 1"
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
                f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert it to UTF-8"
            ) from error
    if not found:
        raise ValueError(f"{path} has no text, only white space")


def check_text_file(path: Path) -> None:
    """Checks that a file exists and has content.

    Raises:
      FileNotFoundError: if there is no file.
      ValueError: if it is a folder or empty.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        raise ValueError(f"{path} is a directory, not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes)")


def read_segments(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    segment_length: int,
    *,
    with_sentinels: bool = True,
    max_characters_per_document: int = 100_000,
) -> Segments:
    """Tokenises a text file and divides it into segments.

    Documents follow each other without a separator, and a segment may span several documents, as in
    the released code of T5. Text that spells a sentinel or another special token (except the
    unknown token) is left out, since the model would read it as that token.

    Args:
      path: a UTF-8 file, as for `read_documents`.
      tokenizer: a fast tokenizer.
      segment_length: the number of tokens of a segment; see `SpanCorruption.segment_length`.
      with_sentinels: whether the tokenizer has sentinels.
      max_characters_per_document: as for `read_documents`; bounds the text in memory.

    Returns:
      Segments of `segment_length` tokens; the last may be shorter, with at least 2 tokens.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if `read_documents` or `sentinel_ids` raises it, `segment_length` is below 2, or
        the file has fewer than 2 tokens.
    """
    if segment_length < 2:
        raise ValueError(f"segment_length={segment_length} must be at least 2")
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    reserved = np.array([*special, *(sentinel_ids(tokenizer) if with_sentinels else ())])
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
        raise ValueError(f"{path} has {len(tokens)} tokens; pre-training needs 2 or more")
    cuts = np.arange(0, len(tokens) - 1, segment_length)  # a last token alone makes no segment
    end = min(cuts[-1] + segment_length, len(tokens))
    return Segments(tokens[:end], np.append(cuts, end).astype(np.int64))


def joined(arrays: tuple[np.ndarray, ...]) -> Segments:
    """Returns segments one after the other."""
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    return Segments(np.concatenate([np.zeros(0, np.int32), *arrays]), offsets)


def _bar(size: int, description: str | None) -> tqdm:
    return tqdm(
        total=size,
        desc=description,
        unit="B",
        unit_scale=True,
        disable=description is None or size < _BIG_FILE,
        # A terminal shows a moving bar; a log file needs a line only now and then.
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
        if length >= TOKENIZED_AT_ONCE:
            yield texts
            texts, length = [], 0
    if texts:
        yield texts
