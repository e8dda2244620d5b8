"""Text format of tasks, after the T5 paper: encoder inputs and decoder targets."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from train.data.tokens import columns_of, token_ids, tokenize_texts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from train.cli.options import EvaluateBy
    from train.tasks import Kind

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")


# Texts -> the same texts as a tokenizer writes them.
Write: TypeAlias = Callable[["Sequence[str] | np.ndarray"], list[str]]


class Said(str):
    """A text that a decoder wrote, which knows how its tokenizer writes other texts.

    A tokenizer does not reproduce every text: T5's has no `<`, and writes `½` as `12`. To compare a
    `Said` with a text, compare it with the result of `write` for that text.

    Attributes:
      write: texts -> the texts as the tokenizer writes them, as `written` does.
    """

    write: Write

    def __new__(cls, text: str, write: Write) -> Said:
        """Returns the text with its tokenizer's `write`."""
        made = super().__new__(cls, text)
        made.write = write
        return made


def as_said(predictions: Iterable[str], texts: Sequence[str] | np.ndarray) -> list[str]:
    """Returns `texts` as the tokenizer of the predictions writes them.

    The texts are unchanged if no decoder wrote the predictions, such as parts of a context.
    """
    write: Write = next((text.write for text in predictions if isinstance(text, Said)), list)
    return write(texts)


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    """Text format of a task, in both directions; for labels, a verbalizer.

    `movie sentence: a fine film` -> `positive`, for pairs `mrpc sentence1: … sentence2: …`; of the
    kind "text" `summarize: …` -> the column `target`. A column `text` follows the prefix unchanged.

    Attributes:
      kind: the kind of the task.
      prefix: the beginning of the input, by default the task's name.
      label_names: the label words; empty unless `kind` is "classification".
      score_step: the step to whose nearest multiple scores are rounded.
      score_mean: the mean score of the training split, in place of text that is no number.
      max_target_length: the maximum target length in tokens, the end-of-sequence token included.
      max_new_tokens: the maximum number of generated tokens.
      evaluate_by: how labels are predicted: by the likelihoods of their texts, or by generation.
      num_beams: the number of beams of generation.

    References:
      Raffel et al., Exploring the Limits of Transfer Learning, JMLR 2020, arXiv:1910.10683, section
      2.4 and appendix D.
    """

    kind: Kind
    prefix: str
    label_names: tuple[str, ...] = ()
    score_step: float = 0.2
    score_mean: float = 0.0
    max_target_length: int = 64
    max_new_tokens: int = 64
    evaluate_by: EvaluateBy = "scoring"
    num_beams: int = 1

    @property
    def generates(self) -> bool:
        """True if a split is evaluated by generating text."""
        return self.kind != "classification" or self.evaluate_by == "generation"

    def inputs(self, rows: Dataset | Mapping[str, Sequence[Any]]) -> list[str]:
        """Returns the encoder's texts: the prefix, and `text` or `sentence` and `sentence2`."""
        head = f"{self.prefix} " if self.prefix else ""
        if "text" in columns_of(rows):
            return [f"{head}{text}" for text in rows["text"][:]]
        first = rows["sentence"][:]
        if "sentence2" in columns_of(rows):
            pairs = zip(first, rows["sentence2"][:], strict=True)
            return [f"{head}sentence1: {a} sentence2: {b}" for a, b in pairs]
        if self.kind == "text":
            return [f"{self.prefix}: {a}" if self.prefix else a for a in first]
        return [f"{head}sentence: {a}" for a in first]

    def targets(self, rows: Dataset | Mapping[str, Sequence[Any]]) -> list[str] | None:
        """Returns the decoder's target texts; None if `rows` lacks the task's column."""
        column = {"classification": "label", "regression": "score"}.get(self.kind, "target")
        if column not in columns_of(rows):
            return None
        values = rows[column][:]
        if self.kind == "classification":
            return [self.label_names[label] for label in values]
        if self.kind == "regression":
            return [format_score(score, self.score_step) for score in values]
        return list(values)

    def read(self, texts: Sequence[str]) -> np.ndarray:
        """Converts generated text to predictions.

        Returns:
          `[texts]` int64 labels, -1 where the text is the name of no label; or float64 scores, NaN
          where it is no number; or the texts as objects. The names of labels are compared as the
          tokenizer of the texts writes them. Any white space counts as one space, and is ignored at
          the ends.
        """
        if self.kind == "classification":
            names = as_said(texts, self.label_names)
            index = {_plain(name): i for i, name in enumerate(names)}
            return np.array([index.get(_plain(text), -1) for text in texts], np.int64)
        if self.kind == "regression":
            return np.array([parse_score(text) for text in texts], np.float64)
        return np.array(plain(texts), object)


def to_json(fmt: TextFormat) -> dict[str, Any]:
    """Returns the fields of a text format except `kind` and `label_names`.

    Every adapter has these two anyway.
    """
    return {k: v for k, v in asdict(fmt).items() if k not in ("kind", "label_names")}


def from_json(values: Mapping[str, Any], kind: Kind, label_names: Sequence[str]) -> TextFormat:
    """Returns the text format; inverse of `to_json`."""
    return TextFormat(kind=kind, label_names=tuple(label_names), **values)


def format_score(score: float, step: float) -> str:
    """Returns the multiple of `step` nearest to `score`, in decimal: 2.57 and 0.2 give "2.6".

    Both are read as the decimal numbers they are written as, so that 0.3 lies exactly between 0.2
    and 0.4. Of two equally near multiples, the even one is taken. All multiples of a step have as
    many decimals as the step.

    Args:
      score: a finite number; a score that float32 represents exactly is read as the decimal of that
        float32.
      step: a number above 0.
    """
    with np.errstate(over="ignore"):
        short = np.float32(score)
    written = Decimal(str(short) if float(short) == score else repr(float(score)))
    unit = Decimal(repr(float(step))).normalize()
    # Adding 0 turns Decimal's negative zero into a plain zero.
    return f"{(written / unit).to_integral_value() * unit + 0:f}"


def parse_score(text: str) -> float:
    """Returns `text` as a number; NaN if it is no decimal number."""
    return float(text) if _NUMBER.fullmatch(text.strip()) else math.nan


def label_tokens(
    names: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_target_length: int
) -> list[np.ndarray]:
    """Returns the token ids of each label word, end-of-sequence token included, as decoder targets.

    Raises:
      ValueError: if a label is longer than `max_target_length`, or two labels cannot be
        distinguished: they differ only in white space, have the same tokens, or the tokens of one
        begin those of the other.
    """
    encoded = tokenize_texts(names, tokenizer, max_target_length, what="label")
    if encoded.num_truncated:
        longest = max(names, key=len)
        raise ValueError(
            f"{encoded.num_truncated} labels are longer than max_target_length={max_target_length} "
            f"tokens, such as {longest[:80]!r}; give a larger --max-target-length or shorter labels"
        )
    tokens = np.split(encoded.ids, encoded.offsets[1:-1])
    for i, j in itertools.permutations(range(len(names)), 2):
        if _plain(names[i]) == _plain(names[j]):
            raise ValueError(
                f"the labels {names[i]!r} and {names[j]!r} differ only in white space; rename one"
            )
        if np.array_equal(tokens[i], tokens[j][: len(tokens[i])]):
            raise ValueError(
                f"the tokenizer cannot tell the labels {names[i]!r} and {names[j]!r} apart: their "
                f"tokens are {tokens[i].tolist()} and {tokens[j].tolist()}; rename one"
            )
    return tokens


def check_written(names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that labels are distinct and not empty after the tokenizer has written them.

    Raises:
      ValueError: if not; the message names two labels that become equal, or one that becomes empty.
    """
    found: dict[str, str] = {}
    for name, text in zip(names, map(_plain, written(names, tokenizer)), strict=True):
        if not text:
            raise ValueError(
                f"the tokenizer has no token for anything in the label {name!r:.200}, so no "
                "decoder can generate it; rename it"
            )
        if text in found:
            raise ValueError(
                f"the tokenizer writes both labels {found[text]!r:.100} and {name!r:.100} as "
                f"{text!r:.100}; rename one"
            )
        found[text] = name


def check_scores(targets: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that scores written as text are unchanged after the tokenizer has written them.

    Raises:
      ValueError: if one is changed; the message names it.
    """
    different = sorted(set(targets))
    for score, text in zip(different, written(different, tokenizer), strict=True):
        if parse_score(text) != parse_score(score):
            raise ValueError(
                f"the tokenizer writes the score {score!r:.100} as {text!r:.100}, so no decoder "
                "can generate it; use a backbone whose tokenizer has digits, decimal point and "
                "minus sign"
            )


def written(texts: Sequence[str] | np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns `decode(tokenize(text))` for each text, as a decoder would write it.

    Characters without a token are left out, others may be written differently, and text after an
    end-of-sequence token is dropped.
    """
    if not len(texts):
        return []
    end = tokenizer.eos_token_id
    ids = token_ids(texts, tokenizer, are_written=True)
    said = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in ids]
    return _decoded(said, tokenizer)


def decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[Said]:
    """Returns generated token ids `[rows, length]`, start token first, as text.

    Special tokens are skipped, and so are negative ids, which `generate` writes where logits are
    NaN.
    """
    write = functools.partial(written, tokenizer=tokenizer)
    said = _decoded([row[row >= 0] for row in ids[:, 1:]], tokenizer)
    return [Said(text, write) for text in said]


def plain(texts: Sequence[str]) -> list[str]:
    """Returns texts with single spaces for white space, and none at the ends."""
    return [
        Said(_plain(text), text.write) if isinstance(text, Said) else _plain(text) for text in texts
    ]


def _decoded(ids: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _plain(text: str) -> str:
    """Returns `text` with single spaces for white space, and none at the ends."""
    return " ".join(text.split())
