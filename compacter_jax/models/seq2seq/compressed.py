"""The Compressed Attention Network: one sub-layer in place of a decoder layer's three."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax import Array

from compacter_jax.nn.activations import ActivationFn
from compacter_jax.nn.attention import (
    KeyValue,
    StackInputs,
    attention,
    cached_key_value,
    causal_bias,
    join_inputs,
    padding_bias,
    split_heads,
)
from compacter_jax.nn.dense import Dtype, dense
from compacter_jax.nn.dropout import Dropout


class CompressedAttention(nn.Module):
    """Attention to source and target at once, with the feed-forward network in its values.

    With the encoder's states `E` and the normalised input `y`, it computes
    `out_proj(act(softmax(q K^T / sqrt(d / num_heads) + M) V + r_proj(y)))`. The keys `K` and the
    values `V` are those of `E` (`encoder_k_proj`, `encoder_v_proj`), followed by those of `y`
    (`k_proj`, `v_proj`); `M` hides padding of the source and later tokens. Weights are initially
    Glorot-uniform, and biases zero.

    Attributes:
      num_heads: number of attention heads.
      value_features: width of the values and of the inner layer, over all heads.
      dropout: rate of dropout of what `r_proj` reads.
      attention_dropout: rate of dropout of the softmax.
      activation_dropout: rate of dropout of what `out_proj` reads.
      activation: function `act`, as in the feed-forward network of a standard layer.
      dtype: dtype of the computation; None promotes inputs and parameters as flax does. Scores and
        their softmax are computed in float32 at least.
      param_dtype: dtype of the parameters.

    References:
      Li, Lin, Xiao and Zhu, An Efficient Transformer Decoder with Compressed Sub-layers, AAAI 2021,
      arXiv:2101.00542.
    """

    num_heads: int
    value_features: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    activation: ActivationFn = jax.nn.relu
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def __call__(
        self,
        y: Array,
        encoder: Array,
        encoder_mask: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """Returns the update, which is to be added to the residual.

        A row whose source is all padding attends to its own target alone.

        Args:
          y: normalised input, `[batch, length, d]`.
          encoder: states of the encoder, `[batch, source length, d]`.
          encoder_mask: `[batch, source length]` integers or booleans, zero at padding; None attends
            to all states.
          deterministic: Python bool; False turns on dropout and needs `rngs={"dropout": key}`.

        Returns:
          `[batch, length, d]` in the dtype of the computation.

        Raises:
          ValueError: if `num_heads` does not divide `d` or `value_features`, or a shape does not
            fit.
        """
        self._check(y, encoder, encoder_mask)
        dtype = self.dtype or y.dtype
        causal = causal_bias(y.shape[1], None, None, None, dtype)
        inputs = StackInputs((causal, padding_bias(encoder_mask, dtype)), encoder)
        update, _ = self.update(y, join_inputs(inputs, None), None, deterministic)
        return update

    @nn.compact
    def update(
        self, y: Array, inputs: StackInputs, cached: KeyValue | None, deterministic: bool
    ) -> tuple[Array, KeyValue]:
        """Computes the update, and keys and values.

        Args:
          y: normalised input, `[batch, length, d]`.
          inputs: result of `join_inputs`: the bias, the encoder's states, and the position of the
            only query if there is a cache.
          cached: keys and values with room for the only query; None computes all.
          deterministic: True for no dropout.

        Returns:
          `[batch, length, d]`; and keys `[batch, num_heads, source + target, d / num_heads]` and
          values `[batch, num_heads, source + target, value_features / num_heads]`.
        """
        width, inner = y.shape[-1], self.value_features
        query = split_heads(self._dense(width, "q_proj")(y), self.num_heads)
        key, value = cached_key_value(
            lambda: self._key_value(y, None if cached else inputs.states),
            cached,
            inputs.query_index,
        )
        context = self.attend(query, key, value, (inputs.masks[0],), deterministic)
        read = Dropout(self.dropout, name="input_dropout")(y, deterministic)
        u = context.reshape(*y.shape[:-1], inner) + self._dense(inner, "r_proj")(read)
        u = Dropout(self.activation_dropout, name="inner_dropout")(
            self.activation(u), deterministic
        )
        return self._dense(width, "out_proj")(u), (key, value)

    def attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        biases: tuple[Array | None, ...],
        deterministic: bool,
    ) -> Array:
        """Computes attention as `compacter_jax.nn.attention.attention`, scaled, with dropout."""

        def dropout(x: Array) -> Array:
            return Dropout(self.attention_dropout, name="softmax_dropout")(x, deterministic)

        return attention(query, key, value, biases, scale=query.shape[-1] ** -0.5, dropout=dropout)

    def _key_value(self, y: Array, states: Array | None) -> KeyValue:
        """Returns keys and values of the states, if any, and of the input, along one axis."""
        sizes = {"k_proj": y.shape[-1], "v_proj": self.value_features}

        def project(name: str, size: int) -> Array:
            own = split_heads(self._dense(size, name)(y), self.num_heads)
            if states is None:
                return own
            of_source = self._dense(size, f"encoder_{name}")(states)
            return jnp.concatenate([split_heads(of_source, self.num_heads), own], 2)

        key, value = (project(name, size) for name, size in sizes.items())
        return key, value

    def _dense(self, features: int, name: str) -> nn.Dense:
        return dense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializers.glorot_uniform(),
            name=name,
        )

    @nn.nowrap
    def _check(self, y: Array, encoder: Array, mask: Array | None) -> None:
        """Raises ValueError if a shape does not fit."""
        if y.ndim != 3 or encoder.ndim != 3 or y.shape[::2] != encoder.shape[::2]:
            raise ValueError(
                f"y has shape {y.shape} and encoder {encoder.shape}; they must be [batch, length, "
                "d] and [batch, source length, d] with the same batch and d"
            )
        if mask is not None and mask.shape != encoder.shape[:2]:
            raise ValueError(
                f"encoder_mask has shape {mask.shape}; it must have the shape of encoder without "
                f"its last axis, {encoder.shape[:2]}"
            )
        for name, width in (("d", y.shape[-1]), ("value_features", self.value_features)):
            if self.num_heads < 1 or width < 1 or width % self.num_heads:
                raise ValueError(f"num_heads={self.num_heads} does not divide {name}={width}")
