"""The layers of BERT and its relatives, from embeddings to heads."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax import Array

from compacter_jax.nn.activations import get_activation
from compacter_jax.nn.attention import attention, split_heads
from compacter_jax.nn.dense import Dtype, Embed, dense, tied_logits
from compacter_jax.nn.dropout import Dropout
from compacter_jax.nn.norms import LayerNorm
from compacter_jax.nn.quantize import QuantizedArray
from compacter_jax.nn.remat import Remat, rematted


class BertModule(nn.Module):
    """Configuration and dtypes of every submodule, and the constructors of its children.

    Attributes:
      config: a `BertConfig`, or a configuration with the same properties.
      dtype: dtype of the computation; None promotes as flax does.
      param_dtype: dtype of the parameters.
    """

    config: Any
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def dense(self, features: int, name: str) -> nn.Dense:
        return dense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializers.normal(self.config.initializer_range),
            name=name,
        )

    def embed(self, num_embeddings: int, name: str) -> Embed:
        return Embed(
            num_embeddings,
            self.config.embedding_width,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=initializers.normal(self.config.initializer_range),
            name=name,
        )

    def layer_norm(self, name: str = "LayerNorm") -> LayerNorm:
        return LayerNorm(
            self.config.layer_norm_eps,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def child(self, module: type[BertModule], name: str, **attributes: Any) -> Any:
        return module(self.config, self.dtype, self.param_dtype, name=name, **attributes)


class BertEmbeddings(BertModule):
    """The normalised sum of word, token type (if there are any) and position embeddings."""

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        token_type_ids: Array | None,
        position_ids: Array,
        deterministic: bool,
        project: nn.Dense | None = None,
    ) -> Array:
        """Embeds tokens, `[batch, length] -> [batch, length, hidden]`.

        Args:
          input_ids: the tokens.
          token_type_ids: their types; None for 0.
          position_ids: their positions.
          deterministic: True for no dropout.
          project: layer from the width of the embeddings to that of the hidden states. It runs
            here, so that this module's result is what the first layer reads.
        """
        config = self.config
        x = self.embed(config.vocab_size, "word_embeddings")(input_ids)
        if config.pad_token_id is not None:
            # As with PyTorch's padding_idx, the embedding of the padding token gets no gradient.
            x = _frozen_where(input_ids == config.pad_token_id, x)
        if config.type_vocab_size:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x += self.embed(config.type_vocab_size, "token_type_embeddings")(types)
        positions = self.embed(config.max_position_embeddings, "position_embeddings")(position_ids)
        x += _frozen_where(config.is_frozen_position(position_ids), positions)
        x = self.layer_norm()(x)
        x = Dropout(config.hidden_dropout_prob, name="dropout")(x, deterministic)
        return x if project is None else project(x)

    def word_table(self) -> Array | QuantizedArray:
        """Returns the word embeddings `[vocab, hidden]`, as they are stored."""
        return self.variables["params"]["word_embeddings"]["embedding"]


def _frozen_where(is_frozen: Array | bool, x: Array) -> Array:
    """Returns `x` `[batch, length, width]`, without a gradient where `[batch, length]` is True."""
    if isinstance(is_frozen, bool):
        return jax.lax.stop_gradient(x) if is_frozen else x
    return jnp.where(is_frozen[..., None], jax.lax.stop_gradient(x), x)


class BertSelfAttention(BertModule):
    """Multi-head self-attention of a sequence, before the output projection."""

    projections: ClassVar[tuple[str, str, str]] = ("query", "key", "value")

    @nn.compact
    def __call__(self, x: Array, states: Array, bias: Array | None, deterministic: bool) -> Array:
        """Attends from `x` `[batch, queries, hidden]` to `states` `[batch, keys, hidden]`."""
        return self.attended(x, states, bias, deterministic)

    def attended(self, x: Array, states: Array, bias: Array | None, deterministic: bool) -> Array:
        """Projects, attends and joins the heads, before any output projection."""
        config = self.config

        def project(name: str, source: Array) -> Array:
            return split_heads(
                self.dense(config.hidden_size, name)(source), config.num_attention_heads
            )

        query, key, value = (
            project(name, source)
            for name, source in zip(self.projections, (x, states, states), strict=True)
        )
        return self.attend(query, key, value, (bias,), deterministic).reshape(x.shape)

    def attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        biases: tuple[Array | None, ...],
        deterministic: bool,
    ) -> Array:
        """Computes attention as `compacter_jax.nn.attention.attention`, with dropout."""
        rate = self.config.attention_probs_dropout_prob
        dropout = Dropout(rate, name="dropout", deterministic=deterministic)
        scale = 1 / math.sqrt(query.shape[-1])
        return attention(query, key, value, biases, scale=scale, dropout=dropout)


class BertResidual(BertModule):
    """The end of a sub-layer: projection to the hidden size, dropout, residual, layer norm."""

    @nn.compact
    def __call__(self, x: Array, residual: Array, deterministic: bool) -> Array:
        x = self.dense(self.config.hidden_size, "dense")(x)
        x = Dropout(self.config.hidden_dropout_prob, name="dropout")(x, deterministic)
        return self.add(residual, x, self.layer_norm())

    def add(self, residual: Array, output: Array, layer_norm: LayerNorm) -> Array:
        """Adds the residual and normalises the sum."""
        return layer_norm(output + residual)


class BertAttention(BertModule):
    """Self-attention with its output projection and residual."""

    @nn.compact
    def __call__(self, x: Array, states: Array, bias: Array | None, deterministic: bool) -> Array:
        y = self.child(BertSelfAttention, "self")(x, states, bias, deterministic)
        return self.child(BertResidual, "output")(y, x, deterministic)


class BertIntermediate(BertModule):
    """The first layer of the feed-forward network, with its activation."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        activation = get_activation(self.config.hidden_act)
        return activation(self.dense(self.config.intermediate_size, "dense")(x))


class BertLayer(BertModule):
    """One layer: attention and feed-forward network.

    Attributes:
      first_only: True to return only the first token's state, `[batch, 1, hidden]`; of the other
        tokens, the layer computes only keys and values.
    """

    first_only: bool = False

    @nn.compact
    def __call__(self, x: Array, bias: Array | None, deterministic: bool) -> Array:
        queries = x[:, :1] if self.first_only else x
        x = self.child(BertAttention, "attention")(queries, x, bias, deterministic)
        y = self.child(BertIntermediate, "intermediate")(x)
        return self.child(BertResidual, "output")(y, x, deterministic)


class BertLayers(BertModule):
    """The layers in sequence, named "0", "1", ..."""

    remat: Remat = "off"
    first_only: bool = False
    layer: type[BertModule] = BertLayer

    @nn.compact
    def __call__(self, x: Array, bias: Array | None, deterministic: bool) -> Array:
        # `deterministic` is argument 3 of the layer's __call__, self counted.
        layer = rematted(self.layer, self.remat, static_argnums=(3,))
        last = self.config.num_hidden_layers - 1
        for i in range(last + 1):
            first_only = self.first_only and i == last
            x = self.child(layer, str(i), first_only=first_only)(x, bias, deterministic)
        return x


class BertEncoder(BertModule):
    """The level `encoder` in the names of parameters."""

    remat: Remat = "off"
    first_only: bool = False
    layer: type[BertModule] = BertLayer

    @nn.compact
    def __call__(self, x: Array, bias: Array | None, deterministic: bool) -> Array:
        settings = {"remat": self.remat, "first_only": self.first_only, "layer": self.layer}
        return self.child(BertLayers, "layer", **settings)(x, bias, deterministic)


class BertPooler(BertModule):
    """The pooler: a dense layer and tanh on the first token's state."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [batch, hidden] -> [batch, hidden]
        return jnp.tanh(self.dense(self.config.hidden_size, "dense")(x))


class BertClassifier(BertModule):
    """A classifier of sequences with a hidden layer, as RoBERTa has it in place of the pooler."""

    num_labels: int = 2

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:  # [batch, hidden] -> logits
        config = self.config
        rate = config.rate_before("sequence_classification")
        x = Dropout(rate, name="dropout")(x, deterministic)
        activation = get_activation(config.variant.classifier_act)
        x = activation(self.dense(config.hidden_size, "dense")(x))
        x = Dropout(rate, name="hidden_dropout")(x, deterministic)
        return self.dense(self.num_labels, "out_proj")(x)


class _Words(BertModule):
    """A head for masked words, whose logits have their own bias."""

    def to_vocabulary(self, x: Array, word_table: Array | QuantizedArray) -> Array:
        """Projects transformed states to the vocabulary, `[..., hidden] -> [..., vocab]`."""
        vocab_size = self.config.vocab_size
        # The bias belongs to this module, not to `decoder`, as in its Hugging Face name.
        bias = self.param("bias", initializers.zeros, (vocab_size,), self.param_dtype)
        if self.config.tie_word_embeddings:
            x, bias = nn.dtypes.promote_dtype(x, bias, dtype=self.dtype)
            return tied_logits(x, word_table, dtype=self.dtype) + bias
        decoder = dense(
            vocab_size,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializers.normal(self.config.initializer_range),
            name="decoder",
        )
        x, bias = nn.dtypes.promote_dtype(decoder(x), bias, dtype=self.dtype)
        return x + bias


class RobertaWords(_Words):
    """The head `lm_head` for masked words."""

    @nn.compact
    def __call__(self, x: Array, word_table: Array | QuantizedArray) -> Array:
        x = get_activation(self.config.words_act)(self.dense(self.config.hidden_size, "dense")(x))
        return self.to_vocabulary(self.layer_norm("layer_norm")(x), word_table)


class ElectraWords(BertModule):
    """The transform of an ELECTRA's head for masked words, to the width of the embeddings."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., hidden] -> [..., embedding]
        x = get_activation(self.config.words_act)(
            self.dense(self.config.embedding_width, "dense")(x)
        )
        return self.layer_norm()(x)


class BertTransform(BertModule):
    """A dense layer, activation and layer norm before the projection to the vocabulary."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.dense(self.config.hidden_size, "dense")(x)
        return self.layer_norm()(get_activation(self.config.words_act)(x))


class BertPredictions(_Words):
    """The masked language model's logits over the vocabulary."""

    @nn.compact
    def __call__(self, x: Array, word_table: Array | QuantizedArray) -> Array:
        return self.to_vocabulary(self.child(BertTransform, "transform")(x), word_table)


class BertMaskedLM(BertModule):
    """The level `cls` in the names of parameters."""

    @nn.compact
    def __call__(self, x: Array, word_table: Array | QuantizedArray) -> Array:
        return self.child(BertPredictions, "predictions")(x, word_table)
