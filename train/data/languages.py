"""Tokens by which an encoder-decoder knows the languages of a translation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from compacter_jax.messages import listing
from train.data.tokens import Texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class LanguageTokens:
    """Tokens of languages, and their places.

    Attributes:
      ids: language -> token.
      are_forced: False for the target's token before the source (`<de>`, of `create-backbone`, and
        `>>deu<<` of multilingual OPUS-MT); True for the source's token before the source and the
        target's as the first of the target, which a decoder is forced to write (`__de__` of
        M2M-100, `<lang:de>` of fairseq S2T, `deu_Latn` of NLLB-200, `de_DE` of mBART-50).

    References:
      Johnson et al., Google's Multilingual Neural Machine Translation System, TACL 2017,
      arXiv:1611.04558; Fan et al., Beyond English-Centric Multilingual Machine Translation, JMLR
      2021, arXiv:2010.11125, section 2.1.
    """

    ids: dict[str, int]
    are_forced: bool

    def before_source(self, sources: Sequence[str], targets: Sequence[str]) -> np.ndarray:
        """Returns the token before each source, `[texts]` int32."""
        return self._of(sources if self.are_forced else targets)

    def before_target(self, targets: Sequence[str]) -> np.ndarray | None:
        """Returns the token before each target, `[texts]` int32; None if there is none."""
        return self._of(targets) if self.are_forced else None

    def _of(self, languages: Sequence[str]) -> np.ndarray:
        return np.array([self.ids[language] for language in languages], np.int32)


def language_tokens(languages: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> LanguageTokens:
    """Finds the tokens of languages among the special tokens of a tokenizer.

    Raises:
      ValueError: if a language has no token, or tokens of another form than other languages; or if
        the tokenizer is one of mBART's first models, whose languages follow the source.
    """
    languages = list(languages)
    kind = type(tokenizer).__name__.removesuffix("Fast")
    if kind == "MBartTokenizer":
        raise ValueError(
            f"the tokenizer of the backbone is a {kind}: mBART's first models read the language "
            "behind the source, which is not supported here; use mBART-50, M2M-100 or NLLB-200"
        )
    # Those of OPUS-MT are no special tokens.
    of_opus = {each for each in tokenizer.get_vocab() if each.startswith(">>")}
    known = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), *of_opus}
    forms = {"<{}>": False, "__{}__": True, "<lang:{}>": True, "{}": True, ">>{}<<": False}
    for form, are_forced in forms.items():
        names = {language: form.format(language) for language in languages}
        if names and set(names.values()) <= known:
            ids = tokenizer.convert_tokens_to_ids(list(names.values()))
            return LanguageTokens(dict(zip(names, ids, strict=True)), are_forced)

    def has_token(language: str) -> bool:
        return any(form.format(language) in known for form in forms)

    lacking = [each for each in languages if not has_token(each)] or languages
    raise ValueError(
        f"the tokenizer of the backbone has no token for the language {lacking[0]!r:.100}: "
        f"neither {' nor '.join(form.format(lacking[0])[:100] for form in forms)} is one of its "
        f"special tokens {listing(sorted(known))}; name the languages as they do, or make a "
        "backbone with `create-backbone --languages`"
    )


def with_first(texts: Texts, first: np.ndarray) -> Texts:
    """Returns texts with one more token at the beginning of each.

    Args:
      texts: the texts.
      first: `[texts]` int32, the tokens.
    """
    return dataclasses.replace(
        texts,
        ids=np.insert(texts.ids, texts.offsets[:-1], first),
        offsets=texts.offsets + np.arange(len(texts.offsets)),
        max_length=texts.max_length + 1,
    )
