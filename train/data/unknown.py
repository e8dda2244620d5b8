"""Counts of tokens that stand for text that a tokenizer does not know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The fraction of unknown tokens from which on the user is told.
_TOLD_OF_UNKNOWN = 0.01


@dataclass(frozen=True)
class Unknown:
    """Counts of tokens that stand for text that the tokenizer has no token for.

    Attributes:
      tokens: the number of unknown tokens.
      all_tokens: the number of all tokens, special tokens left out.
      texts: the number of texts with unknown tokens.
    """

    tokens: int = 0
    all_tokens: int = 0
    texts: int = 0

    def __add__(self, other: Unknown) -> Unknown:
        return Unknown(
            self.tokens + other.tokens,
            self.all_tokens + other.all_tokens,
            self.texts + other.texts,
        )

    def user_messages(self, what: str) -> list[str]:
        """Returns a line about the unknown tokens of the texts `what`, if they are at least 1 %."""
        if not self.tokens or self.tokens < _TOLD_OF_UNKNOWN * self.all_tokens:
            return []
        part = 100 * self.tokens / self.all_tokens
        return [
            f"{self.tokens:,} of {self.all_tokens:,} tokens of the {what} ({part:.1f} %), in "
            f"{self.texts:,} of them, are unknown to the tokenizer"
        ]


NONE_UNKNOWN = Unknown()


def count_unknown(
    ids: np.ndarray, offsets: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> Unknown:
    """Counts the tokens that stand for text that the tokenizer has no token for.

    Args:
      ids: `[tokens]` of the texts, one after the other.
      offsets: `[texts + 1]`; text `i` is `offsets[i]:offsets[i + 1]`.
      tokenizer: the tokenizer whose `unk_token_id` is counted; nothing is counted if this id is
        also that of another special token.
    """
    unknown = tokenizer.unk_token_id
    ends = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id}
    if unknown is None or unknown in ends:
        return Unknown()
    special = np.array([i for i in tokenizer.all_special_ids if i != unknown], ids.dtype)
    places = np.flatnonzero(ids == unknown)
    return Unknown(
        len(places),
        int(np.count_nonzero(~np.isin(ids, special))),
        len(np.unique(np.searchsorted(offsets, places, side="right"))),
    )
