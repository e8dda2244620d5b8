"""The configuration of BERT, and the published sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from compacter_jax.nn.activations import get_activation

HEADS = (
    None,
    "sequence_classification",
    "token_classification",
    "masked_lm",
    "question_answering",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The configuration of `Bert`; names and defaults are those of transformers.

    Raises:
      ValueError: if a value is out of range, `hidden_act` is unknown or `num_attention_heads` does
        not divide `hidden_size`.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None  # None: hidden_dropout_prob
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; use 1 or more")
        if self.hidden_size % self.num_attention_heads:
            few = range(1, min(self.hidden_size, 128) + 1)
            divisors = [h for h in few if self.hidden_size % h == 0]
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide "
                f"hidden_size={self.hidden_size}; use one of {', '.join(map(str, divisors))}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise ValueError(f"{name}={rate} is not a dropout rate; use 0 <= {name} < 1")
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps={self.layer_norm_eps} is not positive; use 1e-12")
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range={self.initializer_range} is negative; use 0.02")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id} is not in the vocabulary; use None or "
                f"0 <= pad_token_id < vocab_size={self.vocab_size}"
            )
        get_activation(self.hidden_act)


PUBLISHED: Mapping[str, BertConfig] = {
    "bert-base-uncased": BertConfig(),
    "bert-base-cased": BertConfig(vocab_size=28996),
    "bert-large-uncased": BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "bert-large-cased": BertConfig(
        vocab_size=28996,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
    ),
}
"""Hub id -> configuration of the published sizes, arXiv:1810.04805."""
