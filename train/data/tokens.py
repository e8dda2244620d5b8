"""Tokenised examples: token ids and their offsets, and the checks of a tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compacter_jax.files import is_there, read_json
from compacter_jax.messages import quote, reason_of, shorten
from train.data.routes import Routes
from train.data.unknown import NONE_UNKNOWN, Unknown, count_unknown
from train.data.words import WordCounts, Words

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from train.speech.features import Frames


_TOKENIZED_AT_ONCE = 1024


# Label at positions of a batch without a target token.
IGNORED = -100


@dataclass(frozen=True)
class Texts:
    """Token ids of texts, one after the other.

    Attributes:
      ids: `[tokens]` int32, without padding.
      offsets: `[texts + 1]` int64; text `i` is `offsets[i]:offsets[i + 1]`.
      max_length: the length to which the texts were truncated.
      num_truncated: the number of truncated texts.
      unknown: the counts of unknown tokens.
      given: the number of tokens at the beginning of each text that a decoder is given, such as the
        language; they are its inputs, but not among its labels.
    """

    ids: np.ndarray
    offsets: np.ndarray
    max_length: int
    num_truncated: int = 0
    unknown: Unknown = NONE_UNKNOWN
    given: int = 0


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, one after the other.

    Attributes:
      input_ids: `[tokens]` int32, without padding; none if the inputs are `frames`.
      token_type_ids: `[tokens]` int32, 1 in the second sentence of a pair; None for backbones
        without token types.
      offsets: `[examples + 1]` int64; example `i` is `offsets[i]:offsets[i + 1]`; of frames, the
        differences are the lengths.
      targets: `[examples]` int32 labels, float32 scores or texts; `[examples, 2]` int32 first and
        last tokens; `[examples, texts]` int32 numbers of equal texts, from 1 on; or None.
      max_length: the length to which the examples were truncated.
      pad_token_id: the padding token.
      num_truncated: the number of truncated examples.
      target_texts: the targets of a decoder; None for a backbone without one, or where unknown.
      decoder_start_token_id: the first input token of a decoder.
      rows: the rows that were encoded, if scores and predictions need more than `targets`.
      groups: `[examples]` int64, the row of each example, in ascending order; None if every row is
        one example.
      spans: `[tokens, 2]` int32, the first character of each token of the second sentence and the
        character after its last; -1 elsewhere.
      unknown: the counts of unknown tokens in the inputs.
      words: the words of the examples, for tasks that predict tags of words.
      texts_of_example: the number of texts of every example, each with an offset of its own, for
        tasks of embeddings; None if an example is one input of the backbone.
      routes: the members of a bank and the languages of the examples, for translation.
      frames: the features of the examples, for speech.
      is_generated: True if the outputs are generated text. Outside of training all targets are then
        padded to one length: a program of generation takes long to compile, and would be compiled
        for each length of the targets, which it does not read.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray | None
    offsets: np.ndarray
    targets: np.ndarray | None
    max_length: int
    pad_token_id: int
    num_truncated: int
    target_texts: Texts | None = None
    decoder_start_token_id: int = 0
    rows: Any = None
    groups: np.ndarray | None = None
    spans: np.ndarray | None = None
    unknown: Unknown = NONE_UNKNOWN
    words: Words | None = None
    texts_of_example: int | None = None
    routes: Routes | None = None
    frames: Frames | None = None
    is_generated: bool = False

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // (self.texts_of_example or 1)

    @property
    def word_counts(self) -> WordCounts:
        """Counts of words that are not read; 0 for tasks without tags of words."""
        return WordCounts() if self.words is None else self.words.counts

    def of_epoch(self, epoch: int) -> Encoded:
        """Returns the examples of an epoch, which are the same in every epoch."""
        return self

    def user_messages(self, split: str) -> list[str]:
        """Returns lines about truncated examples and unknown tokens; empty if there are none."""
        lines = self.unknown.user_messages(f"{split} inputs")
        if self.frames is not None:
            lines += [f"{split}: {line}" for line in self.frames.channels.user_messages()]
        if self.target_texts is not None:
            lines += self.target_texts.unknown.user_messages(f"{split} targets")
        if self.num_truncated:
            what = "examples" if self.texts_of_example is None else "texts"
            lines.append(
                f"{self.num_truncated} of {len(self.offsets) - 1} {split} {what} are cut to "
                f"max_length={self.max_length} tokens"
            )
        lines += self.word_counts.user_messages(f"{split} sentences", self.max_length)
        texts = self.target_texts
        if texts is not None and texts.num_truncated:
            lines.append(
                f"{texts.num_truncated} of {len(self)} {split} targets are cut to "
                f"max_target_length={texts.max_length} tokens"
            )
        return lines


def check_max_length(max_length: int, positions: int | None) -> None:
    """Raises ValueError if inputs are too short for a word, or exceed the backbone's positions."""
    if max_length < 3:
        raise ValueError(f"max_length={max_length} leaves no room for a word; use 3 or more")
    if positions is not None and max_length > positions:
        raise ValueError(
            f"max_length={max_length} exceeds the backbone's {positions} positions; use "
            f"{positions} or less"
        )


def load_tokenizer(
    path_or_hub_id: str | Path,
    *,
    vocab_size: int,
    max_position_embeddings: int | None,
    max_length: int,
    may_be_slow: bool = False,
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer and checks that it fits the backbone.

    Args:
      path_or_hub_id: the folder of a tokenizer, or its name on the Hugging Face hub.
      vocab_size: the number of rows of the backbone's token embedding; it may exceed the
        tokenizer's.
      max_position_embeddings: the longest input of the backbone; None if positions are relative.
      max_length: the maximum input length that is wanted.
      may_be_slow: whether a tokenizer in Python will do, as those of M2M-100, OPUS-MT and fairseq's
        speech models are; it has neither the places of tokens in a text nor of its words.

    Raises:
      ValueError: if there is no such tokenizer; if it is not a fast one but has to be, has no
        padding token or has more tokens than `vocab_size`; or if `max_length` is below 3 or above
        `max_position_embeddings`.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

    check_max_length(max_length, max_position_embeddings)
    source = str(path_or_hub_id)
    folder = Path(source)
    if folder.is_absolute() and not is_there(folder):
        raise ValueError(f"the folder {shorten(source, 300)} does not exist")
    wanted = "give a folder with tokenizer.json or vocab.txt, or a name on the hub"
    is_folder = is_there(folder) and folder.is_dir()
    if is_folder and not any(map(_is_of_tokenizer, folder.iterdir())):
        raise ValueError(
            f"cannot load a tokenizer from {quote(source)}: it has no tokenizer files ({wanted})"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the types differ between versions and file formats
        _check_no_own_code(source, refused="trust_remote_code" in str(error))
        reason = reason_of(error)
        raise ValueError(
            f"cannot load a tokenizer from {quote(source, 120)}: {reason} ({wanted}; the hub must "
            "be reachable, or the files cached)"
        ) from error
    # transformers 5 substitutes another class for one that it may not run.
    _check_no_own_code(source, refused=False)
    vocabulary = tokenizer.get_vocab()
    # transformers 5 returns this if there are no files.
    if len(vocabulary) <= len(tokenizer.all_special_tokens):
        raise ValueError(
            f"the tokenizer of {source!r} has an empty vocabulary; it needs tokenizer.json or "
            "vocab.txt"
        )
    if not may_be_slow:
        check_fast(tokenizer, source)
    size = max(len(tokenizer), 1 + max(vocabulary.values()))
    if size > vocab_size:
        raise ValueError(
            f"the tokenizer of {source!r} does not fit the backbone: it has {size} tokens, but "
            f"the backbone's embedding has {vocab_size}; use the backbone's own tokenizer"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {source!r} has no padding token; set its pad_token")
    return tokenizer


def check_fast(tokenizer: PreTrainedTokenizerBase, source: str | None = None) -> None:
    """Raises ValueError unless a tokenizer is a fast one, which knows the places of its tokens."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {source or tokenizer.name_or_path!r} is a slow tokenizer, which is "
            "for encoder-decoders that write text; save it as tokenizer.json"
        )


def _check_no_own_code(source: str, *, refused: bool) -> None:
    """Checks that a tokenizer needs no code from its own repository.

    Args:
      source: the folder, or the id on the hub, whose cached copy is checked.
      refused: whether transformers refused to run the code; if not, code is needed where the class
        of the tokenizer is unknown.

    Raises:
      ValueError: if it needs code; the message names the code.
    """
    import transformers  # noqa: PLC0415 - slow to import
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415

    name = "tokenizer_config.json"
    try:
        is_folder = Path(source).is_dir()
        path = Path(source, name) if is_folder else try_to_load_from_cache(source, name)
        settings = read_json(path) if isinstance(path, Path | str) else {}
    except (ValueError, OSError):
        return
    places = settings.get("auto_map")
    found = places.get("AutoTokenizer") if isinstance(places, dict) else places
    classes = found if isinstance(found, list) else [found]
    code = next((each for each in classes if isinstance(each, str)), None)
    kind = settings.get("tokenizer_class")
    unknown = isinstance(kind, str) and not hasattr(transformers, kind)
    if code is not None and (refused or unknown):
        raise ValueError(
            f"cannot load a tokenizer from {source!r}: it needs to run its own code, "
            f"{quote(code, 100)} in {name}, but code of a backbone is never run; save its "
            "tokenizer as tokenizer.json on a machine where you trust it"
        ) from None


def _is_of_tokenizer(path: Path) -> bool:
    return path.name.startswith(("tokenizer", "vocab")) or path.suffix == ".model"


def tokenize(
    dataset: Dataset | Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Encoded:
    """Tokenises every example once; pairs are joined by the tokenizer.

    Args:
      dataset: columns `sentence`, optionally `sentence2`, and `label`, `score` or neither of them.
      tokenizer: a fast tokenizer.
      max_length: the length to which inputs are truncated; of a pair, the longer sentence first.

    Raises:
      ValueError: if `max_length` leaves less than one token for each sentence, or the tokenizer is
        a slow one.
    """
    check_fast(tokenizer)
    sentences = dataset["sentence"][:]
    pairs = dataset["sentence2"][:] if "sentence2" in columns_of(dataset) else None
    per_input = 1 if pairs is None else 2
    least = tokenizer.num_special_tokens_to_add(pair=per_input == 2) + per_input
    if max_length < least:
        raise ValueError(f"max_length={max_length} leaves no room for a word; use {least} or more")
    input_ids, token_type_ids, lengths, num_truncated = [], [], [0], 0
    for start in range(0, len(sentences), _TOKENIZED_AT_ONCE):
        chunk = slice(start, start + _TOKENIZED_AT_ONCE)
        encodings = tokenizer(
            sentences[chunk],
            None if pairs is None else pairs[chunk],
            truncation=True,
            max_length=max_length,
            return_token_type_ids=True,
        )
        input_ids += [np.array(ids, np.int32) for ids in encodings["input_ids"]]
        token_type_ids += [np.array(ids, np.int32) for ids in encodings["token_type_ids"]]
        lengths += [len(ids) for ids in encodings["input_ids"]]
        num_truncated += sum(bool(e.overflowing) for e in encodings.encodings)
    flat, offsets = _flat(input_ids), np.cumsum(lengths, dtype=np.int64)
    return Encoded(
        input_ids=flat,
        token_type_ids=_flat(token_type_ids),
        offsets=offsets,
        unknown=count_unknown(flat, offsets, tokenizer),
        targets=targets_of(dataset),
        max_length=max_length,
        pad_token_id=tokenizer.pad_token_id,
        num_truncated=num_truncated,
    )


def _flat(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Returns token ids one after the other, `[tokens]` int32; there may be no arrays."""
    return np.concatenate([np.zeros(0, np.int32), *arrays])


def columns_of(dataset: Dataset | Mapping[str, Sequence[Any]]) -> Sequence[str]:
    """Returns the names of the columns."""
    return list(dataset) if isinstance(dataset, Mapping) else dataset.column_names


def targets_of(dataset: Dataset | Mapping[str, Sequence[Any]]) -> np.ndarray | None:
    """Returns the targets: int32 labels, float32 scores or texts; None if they are unknown."""
    for column, dtype in (("label", np.int32), ("score", np.float32), ("target", object)):
        if column in columns_of(dataset):
            return np.array(dataset[column][:], dtype)
    return None


def groups_of(columns: Dataset | Mapping[str, Sequence[Any]]) -> np.ndarray | None:
    """Returns the data row of each example, `[examples]` int64; None without a column `row`."""
    return np.array(columns["row"][:], np.int64) if "row" in columns_of(columns) else None


def token_ids(
    texts: Sequence[str] | np.ndarray, tokenizer: PreTrainedTokenizerBase, *, are_written: bool
) -> list[list[int]]:
    """Returns the token ids of each text, without special tokens and not truncated.

    Args:
      texts: the texts.
      tokenizer: the tokenizer, fast or slow.
      are_written: whether a decoder writes the texts; the tokenizers of OPUS-MT divide these
        otherwise than the texts to read.
    """
    # Others take a text as a target only after they were told its language.
    of_target = are_written and hasattr(tokenizer, "spm_target")
    given: dict[str, Any] = {"text_target" if of_target else "text": list(texts)}
    # Not verbose: a text longer than the model's positions is cut afterwards.
    found: list[list[int]] = tokenizer(**given, add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return found


def tokenize_texts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    what: str,
    may_be_empty: bool = False,
) -> Texts:
    """Tokenises texts as T5 reads and writes them, with the end-of-sequence token last.

    Args:
      texts: the texts; longer ones are truncated before the end-of-sequence token.
      tokenizer: a tokenizer with an end-of-sequence token.
      max_length: the maximum length in tokens, the end-of-sequence token included.
      what: "input", "source", "target" or "label"; a decoder writes the last two.
      may_be_empty: whether "" is allowed; its only token is then the end-of-sequence token.

    Raises:
      ValueError: if another text has no tokens, or `max_length` leaves no room for a token.
    """
    if max_length < 2:
        raise ValueError(
            f"a maximum {what} length of {max_length} tokens leaves no room for a word; use 2 or "
            "more"
        )
    end = np.array([tokenizer.eos_token_id], np.int32)
    ids, lengths, num_truncated = [], [0], 0
    for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
        chunk = texts[start : start + _TOKENIZED_AT_ONCE]
        found = token_ids(chunk, tokenizer, are_written=what in ("target", "label"))
        for row, tokens in enumerate(found, start + 1):
            if not tokens and not (may_be_empty and texts[row - 1] == ""):
                raise ValueError(
                    f"row {row}: the tokenizer returns no tokens for the {what} "
                    f"{texts[row - 1]!r:.80}"
                )
            kept = np.array(tokens[: max_length - 1], np.int32)
            ids += [kept, end]
            lengths.append(len(kept) + 1)
            num_truncated += len(tokens) > len(kept)
    flat, offsets = _flat(ids), np.cumsum(lengths, dtype=np.int64)
    return Texts(
        ids=flat,
        offsets=offsets,
        max_length=max_length,
        num_truncated=num_truncated,
        unknown=count_unknown(flat, offsets, tokenizer),
    )


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the ids of `<extra_id_0>`, `<extra_id_1>`, … as far as the vocabulary has them.

    mT5 spells them with a leading `▁`, which is accepted, too.

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
            "the tokenizer has no sentinel token <extra_id_0>, which span corruption substitutes "
            "for spans of text; use the tokenizer of a T5, or make one with `python -m train "
            "create-backbone`"
        )
    return tuple(ids)
