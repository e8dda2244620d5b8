"""The layers of DistilBERT, whose parameters have other names than those of BERT."""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn
from jax import Array

from compacter_jax.models.bert.layers import BertModule, BertSelfAttention
from compacter_jax.nn.activations import get_activation
from compacter_jax.nn.dropout import Dropout
from compacter_jax.nn.norms import Residual


class DistilBertAttention(BertSelfAttention):
    """Self-attention with its output projection."""

    projections: ClassVar[tuple[str, str, str]] = ("q_lin", "k_lin", "v_lin")

    @nn.compact
    def __call__(self, x: Array, states: Array, bias: Array | None, deterministic: bool) -> Array:
        """Attends from `x` `[batch, queries, hidden]` to `states` `[batch, keys, hidden]`."""
        y = self.attended(x, states, bias, deterministic)
        return self.dense(self.config.dim, "out_lin")(y)


class DistilBertFeedForward(BertModule):
    """The feed-forward network, before the residual."""

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        config = self.config
        x = get_activation(config.activation)(self.dense(config.hidden_dim, "lin1")(x))
        x = self.dense(config.dim, "lin2")(x)
        return Dropout(config.dropout, name="dropout")(x, deterministic)


class DistilBertLayer(BertModule):
    """One layer: attention and feed-forward network.

    Attributes:
      first_only: True to return only the first token's state, as in `BertLayer`.
    """

    first_only: bool = False

    @nn.compact
    def __call__(self, x: Array, bias: Array | None, deterministic: bool) -> Array:
        queries = x[:, :1] if self.first_only else x
        y = self.child(DistilBertAttention, "attention")(queries, x, bias, deterministic)
        x = Residual(name="attention_residual")(queries, y, self.layer_norm("sa_layer_norm"))
        y = self.child(DistilBertFeedForward, "ffn")(x, deterministic)
        return Residual(name="output_residual")(x, y, self.layer_norm("output_layer_norm"))
