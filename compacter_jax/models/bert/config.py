"""The configuration of BERT, RoBERTa and ELECTRA, and the published sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jax import Array

from compacter_jax.messages import quote
from compacter_jax.nn.activations import get_activation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """The facts about the models of a `model_type` that config.json does not have.

    Attributes:
      architecture: first part of the names of transformers' classes.
      base: first part of the names of tensors in a model with a head.
      counts_from_padding: True if positions count the tokens that are not padding, from the id of
        the padding token + 1; padding has the position of that id.
      has_pooler: True if there is a pooler without a head.
      classifier_act: activation of a hidden layer in the classifier of sequences; None if the
        classifier is a linear layer after the pooler.
      words: name of the head for masked words.
    """

    architecture: str
    base: str
    counts_from_padding: bool = False
    has_pooler: bool = True
    classifier_act: str | None = None
    words: str = "cls"


_BERT = Variant(architecture="Bert", base="bert")
_ROBERTA = Variant(
    architecture="Roberta",
    base="roberta",
    counts_from_padding=True,
    classifier_act="tanh",
    words="lm_head",
)
VARIANTS: Mapping[str, Variant] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": dataclasses.replace(_ROBERTA, architecture="XLMRoberta"),
    "camembert": dataclasses.replace(_ROBERTA, architecture="Camembert"),
    "electra": Variant(
        architecture="Electra",
        base="electra",
        has_pooler=False,
        classifier_act="gelu",
        words="generator_predictions",
    ),
}
"""`model_type` -> the facts about its models."""


def check_encoder_sizes(config: Any, sizes: Iterable[str], width: str, heads: str) -> None:
    """Checks the sizes, the padding token and the initial values of an encoder's configuration.

    Args:
      config: the configuration.
      sizes: names of the fields that must be positive.
      width: name of the field that is the width of the hidden states.
      heads: name of the field that is the number of heads, which must divide the width.

    Raises:
      ValueError: if a value is out of range.
    """
    for name in sizes:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} is not positive; use 1 or more")
    size, count = getattr(config, width), getattr(config, heads)
    if size % count:
        divisors = [h for h in range(1, min(size, 128) + 1) if size % h == 0]
        raise ValueError(
            f"{heads}={count} does not divide {width}={size}; use one of "
            f"{', '.join(map(str, divisors))}"
        )
    if config.initializer_range < 0:
        raise ValueError(f"initializer_range={config.initializer_range} is negative; use 0.02")
    pad = config.pad_token_id
    if pad is not None and not 0 <= pad < config.vocab_size:
        raise ValueError(
            f"pad_token_id={pad} is not in the vocabulary; use None or "
            f"0 <= pad_token_id < vocab_size={config.vocab_size}"
        )


def check_rates(config: Any, names: Iterable[str]) -> None:
    """Raises ValueError if a field is neither None nor a rate of dropout."""
    for name in names:
        rate = getattr(config, name)
        if rate is not None and not 0 <= rate < 1:
            raise ValueError(f"{name}={rate} is not a dropout rate; use 0 <= {name} < 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The configuration of `Bert`; names are those of transformers, defaults those of its BERT.

    Attributes:
      model_type: "bert", "roberta", "xlm-roberta", "camembert" or "electra".
      embedding_size: width of the embeddings of an ELECTRA, which a linear layer projects to
        `hidden_size` where the two differ; None, as in all other models, for `hidden_size`.
      max_position_embeddings: rows of the positions' embeddings. A RoBERTa reads `pad_token_id + 1`
        tokens less, 512 of 514.
      classifier_dropout: rate before classifiers; None for `hidden_dropout_prob`.
      pad_token_id: padding token, whose embedding gets no gradient; None for no such token.

    Raises:
      ValueError: if a value is out of range, `model_type` or `hidden_act` is unknown,
        `num_attention_heads` does not divide `hidden_size`, a RoBERTa has no padding token or no
        position for a token, or another model than an ELECTRA has an `embedding_size`.
    """

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    embedding_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self):
        if self.model_type not in VARIANTS:
            raise ValueError(
                f"unknown model_type={quote(self.model_type)}; use one of {', '.join(VARIANTS)}"
            )
        check_encoder_sizes(self, _SIZES, "hidden_size", "num_attention_heads")
        check_rates(self, RATES)
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps={self.layer_norm_eps} is not positive; use 1e-12")
        get_activation(self.hidden_act)
        self._check_embedding_size()
        if self.variant.counts_from_padding:
            self._check_positions()

    def _check_embedding_size(self) -> None:
        size = self.embedding_size
        if size is not None and self.model_type != "electra":
            raise ValueError(
                f"embedding_size={size} was given, but embeddings of model_type="
                f"{self.model_type!r} are as wide as hidden_size; leave it out"
            )
        if size is not None and size < 1:
            raise ValueError(f"embedding_size={size} is not positive; use 1 or more")

    def _check_positions(self) -> None:
        if self.pad_token_id is None:
            raise ValueError(
                f"pad_token_id=None: a model of model_type={self.model_type!r} counts positions "
                "from this token; use 1"
            )
        if self.max_positions < 1:
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings} leaves no position after "
                f"those up to pad_token_id={self.pad_token_id}; use {self.first_position + 1} or "
                "more"
            )

    @property
    def variant(self) -> Variant:
        """The facts about the models of this `model_type`."""
        return VARIANTS[self.model_type]

    @property
    def first_position(self) -> int:
        """Position of the first token."""
        pad = self.pad_token_id
        return 0 if pad is None or not self.variant.counts_from_padding else pad + 1

    @property
    def max_positions(self) -> int:
        """Largest number of tokens."""
        return self.max_position_embeddings - self.first_position

    @property
    def embedding_width(self) -> int:
        """Width of the embeddings."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    def is_frozen_position(self, position_ids: Array) -> Array | bool:
        """Returns True where the embedding of a position gets no gradient, as that of padding."""
        return position_ids == self.pad_token_id if self.variant.counts_from_padding else False

    @property
    def words_act(self) -> str:
        """Activation in the head for masked words, which is a gelu in all models but BERT."""
        return self.hidden_act if self.variant.words == "cls" else "gelu"

    def rate_before(self, head: str | None) -> float | None:
        """Returns the rate of dropout before a linear head; None for none."""
        if head == "question_answering":
            return None
        own = self.classifier_dropout
        return self.hidden_dropout_prob if own is None else own


_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


_SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
_SMALL_OF_LARGE = _SMALL | {"num_hidden_layers": 24}


def _roberta(model_type: str, vocab_size: int, **sizes: Any) -> BertConfig:
    return BertConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        **sizes,
    )


def _electra(embedding_size: int, **sizes: Any) -> BertConfig:
    return BertConfig(model_type="electra", embedding_size=embedding_size, **sizes)


PUBLISHED: Mapping[str, Mapping[str, BertConfig]] = {
    "bert": {
        "bert-base-uncased": BertConfig(),
        "bert-base-cased": BertConfig(vocab_size=28996),
        "bert-large-uncased": BertConfig(**_LARGE),
        "bert-large-cased": BertConfig(vocab_size=28996, **_LARGE),
    },
    "roberta": {
        "roberta-base": _roberta("roberta", 50265),
        "roberta-large": _roberta("roberta", 50265, **_LARGE),
        "distilroberta-base": _roberta("roberta", 50265, num_hidden_layers=6),
    },
    "xlm-roberta": {
        "xlm-roberta-base": _roberta("xlm-roberta", 250002),
        "xlm-roberta-large": _roberta("xlm-roberta", 250002, **_LARGE),
    },
    "camembert": {"camembert-base": _roberta("camembert", 32005)},
    "electra": {
        "google/electra-small-discriminator": _electra(128, **_SMALL),
        "google/electra-small-generator": _electra(128, **_SMALL),
        "google/electra-base-discriminator": _electra(768),
        "google/electra-base-generator": _electra(768, **_SMALL),
        "google/electra-large-discriminator": _electra(1024, **_LARGE),
        "google/electra-large-generator": _electra(1024, **_SMALL_OF_LARGE),
    },
}
"""`model_type` -> hub id -> configuration of the published sizes.

References:
  Devlin et al., arXiv:1810.04805; Liu et al., RoBERTa, arXiv:1907.11692; Conneau et al., XLM-R,
  arXiv:1911.02116; Martin et al., CamemBERT, arXiv:1911.03894; Clark et al., ELECTRA,
  arXiv:2003.10555.
"""
