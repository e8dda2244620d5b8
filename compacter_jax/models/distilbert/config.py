"""The configuration of DistilBERT, and the published sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jax import Array

from compacter_jax.models.bert.config import check_encoder_sizes, check_rates
from compacter_jax.nn.activations import get_activation

_SIZES = ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "max_position_embeddings")
RATES = ("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilBertConfig:
    """The configuration of `DistilBert`; names and defaults are those of transformers.

    Attributes:
      dim: width of the hidden states.
      hidden_dim: inner width of the feed-forward networks.
      pad_token_id: padding token, whose embedding gets no gradient; None for no such token.

    Raises:
      ValueError: if a value is out of range, `activation` is unknown or `n_heads` does not divide
        `dim`.
    """

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    initializer_range: float = 0.02
    qa_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self):
        check_encoder_sizes(self, _SIZES, "dim", "n_heads")
        check_rates(self, RATES)
        get_activation(self.activation)

    # The names that the layers of `compacter_jax.models.bert` read.
    model_type = "distilbert"
    type_vocab_size = 0
    layer_norm_eps = 1e-12
    first_position = 0

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.dim

    @property
    def embedding_width(self) -> int:
        """Width of the embeddings."""
        return self.dim

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return self.n_layers

    @property
    def num_attention_heads(self) -> int:
        """Number of heads of each attention."""
        return self.n_heads

    @property
    def hidden_dropout_prob(self) -> float:
        """Rate of dropout of embeddings and feed-forward networks."""
        return self.dropout

    @property
    def attention_probs_dropout_prob(self) -> float:
        """Rate of dropout of the attention's probabilities."""
        return self.attention_dropout

    @property
    def words_act(self) -> str:
        """Activation in the head for masked words."""
        return self.activation

    @property
    def max_positions(self) -> int:
        """Largest number of tokens."""
        return self.max_position_embeddings

    def is_frozen_position(self, position_ids: Array) -> bool:
        """Returns False, for the embeddings of all positions get a gradient."""
        del position_ids
        return False

    def rate_before(self, head: str | None) -> float | None:
        """Returns the rate of dropout before a linear head."""
        rates = {
            "sequence_classification": self.seq_classif_dropout,
            "question_answering": self.qa_dropout,
        }
        return rates.get(head or "", self.dropout)


PUBLISHED: Mapping[str, DistilBertConfig] = {
    "distilbert-base-uncased": DistilBertConfig(),
    "distilbert-base-cased": DistilBertConfig(vocab_size=28996),
    "distilbert-base-multilingual-cased": DistilBertConfig(vocab_size=119547),
}
"""Hub id -> configuration of the published sizes, arXiv:1910.01108."""
