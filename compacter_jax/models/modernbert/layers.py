"""The layers of ModernBERT, from embeddings to heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax import Array

from compacter_jax.models import names
from compacter_jax.models.modernbert.config import ModernBertConfig
from compacter_jax.nn.activations import get_activation
from compacter_jax.nn.attention import attention, split_heads
from compacter_jax.nn.dense import Dtype, Embed, dense
from compacter_jax.nn.dropout import Dropout
from compacter_jax.nn.norms import LayerNorm, Residual
from compacter_jax.nn.quantize import QuantizedArray
from compacter_jax.nn.remat import Remat, rematted
from compacter_jax.nn.rotary import Rotary, rotated


class AttentionInputs(NamedTuple):
    """Everything that a layer's attention is told beside hidden states.

    Attributes:
      bias: added to the scores, `[batch or 1, 1, length or 1, length]`, or None.
      rotary: cosines and sines of the positions, `[batch or 1, 1, length, head size / 2]` each.
    """

    bias: Array | None
    rotary: Rotary

    def of_first(self) -> AttentionInputs:
        """Returns the inputs of the first token as the only query."""
        cos, sin = self.rotary
        bias = None if self.bias is None else self.bias[:, :, :1]
        return AttentionInputs(bias, (cos[..., :1, :], sin[..., :1, :]))


def initial(config: ModernBertConfig, std: float) -> Any:
    """Returns transformers' initialiser of weights: a normal one, cut off at a few deviations."""
    cutoff = config.initializer_cutoff_factor
    cutoff = 3.0 if cutoff is None else cutoff
    return initializers.truncated_normal(std, lower=-cutoff, upper=cutoff)


class ModernBertModule(nn.Module):
    """Configuration and dtypes of every submodule, and the constructors of its children."""

    config: ModernBertConfig
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def dense(
        self, features: int, name: str, *, use_bias: bool, std: float | None = None
    ) -> nn.Dense:
        """Returns a dense layer; `std` is the deviation of its initial weights."""
        std = self.config.initializer_range if std is None else std
        return dense(
            features,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initial(self.config, std),
            name=name,
        )

    def norm(self, name: str) -> LayerNorm:
        """Returns a layer norm, without a bias unless the configuration has one."""
        return LayerNorm(
            self.config.norm_eps,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            use_bias=self.config.norm_bias,
            name=name,
        )

    def child(self, module: type[ModernBertModule], name: str, **attributes: Any) -> Any:
        """Returns a submodule of the same configuration and dtypes."""
        return module(self.config, self.dtype, self.param_dtype, name=name, **attributes)


class ModernBertEmbeddings(ModernBertModule):
    """The normalised embeddings of tokens."""

    @nn.compact
    def __call__(self, input_ids: Array, deterministic: bool) -> Array:
        """Embeds `[batch, length]` tokens as `[batch, length, hidden]`."""
        config = self.config
        table = Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=initial(config, config.initializer_range),
            name="tok_embeddings",
        )
        x = table(input_ids)
        if config.pad_token_id is not None:
            # As with PyTorch's padding_idx, the embedding of the padding token gets no gradient.
            is_padding = (input_ids == config.pad_token_id)[..., None]
            x = jnp.where(is_padding, jax.lax.stop_gradient(x), x)
        x = self.norm("norm")(x)
        return Dropout(config.embedding_dropout, name="dropout")(x, deterministic)

    def word_table(self) -> Array | QuantizedArray:
        """Returns the embeddings of tokens `[vocab, hidden]`, as they are stored."""
        return self.variables["params"]["tok_embeddings"]["embedding"]


class FusedProjections(ModernBertModule):
    """The projections to queries, keys and values, which a checkpoint holds as one matrix.

    Each has its own kernel here, so that methods can act at one alone; the result has all three, so
    that they can act at all together.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[batch, length, hidden]` to `[batch, length, 3 * hidden]`."""
        width, use_bias = self.config.hidden_size, self.config.attention_bias
        parts = names.MODERNBERT.fused["Wqkv"]
        return jnp.concatenate(
            [self.dense(width, part, use_bias=use_bias)(x) for part in parts], axis=-1
        )


class ModernBertAttention(ModernBertModule):
    """Multi-head self-attention with rotary positions, and its output projection."""

    @nn.compact
    def __call__(
        self, x: Array, states: Array, inputs: AttentionInputs, deterministic: bool
    ) -> Array:
        """Attends from the first tokens to all.

        Args:
          x: `[batch, queries, hidden]`, the states of the first token or of all.
          states: `[batch, length, hidden]`, the states of all tokens.
          inputs: bias and positions of all tokens.
          deterministic: True for no dropout.

        Returns:
          `[batch, queries, hidden]`.
        """
        config = self.config
        fused = self.child(FusedProjections, "Wqkv")(states)
        query, key, value = (
            split_heads(part, config.num_attention_heads) for part in jnp.split(fused, 3, axis=-1)
        )
        key = rotated(key, inputs.rotary)
        if x.shape[1] != states.shape[1]:
            query, inputs = query[:, :, :1], inputs.of_first()
        query = rotated(query, inputs.rotary)
        y = self.attend(query, key, value, (inputs.bias,), deterministic).reshape(x.shape)
        y = self.dense(
            config.hidden_size, "Wo", use_bias=config.attention_bias, std=config.last_std
        )(y)
        return Dropout(config.attention_dropout, name="out_dropout")(y, deterministic)

    def attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        biases: tuple[Array | None, ...],
        deterministic: bool,
    ) -> Array:
        """Computes attention as `compacter_jax.nn.attention.attention`, with dropout."""
        rate = self.config.attention_dropout
        dropout = Dropout(rate, name="dropout", deterministic=deterministic)
        return attention(query, key, value, biases, scale=query.shape[-1] ** -0.5, dropout=dropout)


class ModernBertMLP(ModernBertModule):
    """The gated feed-forward network `Wo(act(input) * gate)`, `[input, gate] = Wi(x)`.

    References:
      Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202, equation 6.
    """

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        config = self.config
        both = self.dense(2 * config.intermediate_size, "Wi", use_bias=config.mlp_bias)(x)
        inner, gate = jnp.split(both, 2, axis=-1)
        y = get_activation(config.hidden_activation)(inner) * gate
        y = Dropout(config.mlp_dropout, name="dropout")(y, deterministic)
        return self.dense(config.hidden_size, "Wo", use_bias=config.mlp_bias, std=config.last_std)(
            y
        )


class ModernBertLayer(ModernBertModule):
    """Self-attention and feed-forward network, each after a norm and before the residual's sum.

    Attributes:
      has_attention_norm: True for a norm before the attention. The first layer has none, for the
        embeddings end in one.
      first_only: True to return the state of the first token alone, `[batch, 1, hidden]`; of the
        other tokens, the layer computes only what the attention reads.
    """

    has_attention_norm: bool = True
    first_only: bool = False

    @nn.compact
    def __call__(self, x: Array, inputs: AttentionInputs, deterministic: bool) -> Array:
        states = self.norm("attn_norm")(x) if self.has_attention_norm else x
        queries = states[:, :1] if self.first_only else states
        residual = x[:, :1] if self.first_only else x
        y = self.child(ModernBertAttention, "attn")(queries, states, inputs, deterministic)
        x = Residual(name="attn_residual")(residual, y)
        y = self.child(ModernBertMLP, "mlp")(self.norm("mlp_norm")(x), deterministic)
        return Residual(name="mlp_residual")(x, y)


class ModernBertLayers(ModernBertModule):
    """The level `layers` in the names of parameters: the layers "0", "1", ..."""

    remat: Remat = "off"
    first_only: bool = False

    @nn.compact
    def __call__(self, x: Array, inputs: dict[str, AttentionInputs], deterministic: bool) -> Array:
        """Runs all layers; `inputs` has those of each kind of layer."""
        # `deterministic` is argument 3 of ModernBertLayer.__call__, self counted.
        layer = rematted(ModernBertLayer, self.remat, static_argnums=(3,))
        last = self.config.num_hidden_layers - 1
        for i, kind in enumerate(self.config.kinds):
            run = self.child(
                layer,
                str(i),
                has_attention_norm=i > 0,
                first_only=self.first_only and i == last,
            )
            x = run(x, inputs[kind], deterministic)
        return x


class ModernBertPredictionHead(ModernBertModule):
    """A dense layer, activation and layer norm before the last layer of every head."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        x = self.dense(
            config.hidden_size, "dense", use_bias=config.classifier_bias, std=config.last_std
        )(x)
        return self.norm("norm")(get_activation(config.classifier_activation)(x))
