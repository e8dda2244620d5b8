"""T5 in Flax linen; parameters carry their Hugging Face names."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers
from jax import Array

from compacter_jax.nn.activations import ActivationFn, get_activation
from compacter_jax.nn.attention import attention, split_heads
from compacter_jax.nn.dense import Embed, check_ids, dense
from compacter_jax.nn.dropout import Dropout
from compacter_jax.nn.norms import RMSNorm
from compacter_jax.nn.remat import Remat, rematted
from compacter_jax.sites import Site

Dtype = Any
# (key, value), each [batch, heads, length, head size].
KeyValue = tuple[Array, Array]

HEADS = ("conditional_generation", None, "encoder")

_LAYER = r"(encoder|decoder)/block/(?P<layer>\d+)/layer/"
_ENCODER_LAYER = r"encoder/block/(?P<layer>\d+)/layer/"
_DECODER_LAYER = r"decoder/block/(?P<layer>\d+)/layer/"
_ATTENTION = _LAYER + "[01]/(SelfAttention|EncDecAttention)"


def _attend(host: str) -> Site:
    return Site(host=host, method="attend", role="attend", length_axis=2)


def _add(host: str) -> Site:
    return Site(host=host, method="add", role="join")


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """What `T5` needs to know of a checkpoint; names and defaults are those of transformers.

    Attributes:
      feed_forward_proj: an activation ("relu": T5 v1.0), or "gated-" and an activation
        ("gated-gelu": v1.1, Flan-T5 and mT5, by tanh as in transformers; "gated-silu").
      tie_word_embeddings: the language-modelling head is the word embedding, and its input is
        scaled by `d_model ** -0.5`: T5 v1.0. The others have a head of their own, not scaled.

    Raises:
      ValueError: if a value is out of range or `feed_forward_proj` is unknown.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = None  # type: ignore[assignment]  # None: num_layers
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | None = 1
    decoder_start_token_id: int | None = 0

    def __post_init__(self):
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        for name in (
            "vocab_size",
            "d_model",
            "d_kv",
            "d_ff",
            "num_layers",
            "num_decoder_layers",
            "num_heads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; use 1 or more")
        buckets, distance = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        )
        if buckets < 4 or buckets % 4:
            raise ValueError(
                f"relative_attention_num_buckets={buckets} must be a multiple of 4: half of them "
                "for each direction, and half of those for single distances; use 32"
            )
        if distance <= buckets // 2:
            raise ValueError(
                f"relative_attention_max_distance={distance} must be more than half of "
                f"relative_attention_num_buckets={buckets}; use 128"
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(
                f"dropout_rate={self.dropout_rate} is not a dropout rate; use 0 <= rate < 1"
            )
        if self.layer_norm_epsilon <= 0:
            raise ValueError(
                f"layer_norm_epsilon={self.layer_norm_epsilon} is not positive; use 1e-6"
            )
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{name}={token} is not in the vocabulary; use None or 0 <= {name} < "
                    f"vocab_size={self.vocab_size}"
                )
        self.feed_forward_activation()

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, under the name that all backbones share."""
        return self.d_model

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward network multiplies two projections, as from v1.1 on."""
        return self.feed_forward_proj.startswith("gated-")

    def feed_forward_activation(self) -> ActivationFn:
        """The activation that `feed_forward_proj` names; ValueError if it names none."""
        name = self.feed_forward_proj.removeprefix("gated-")
        # The released v1.1 checkpoints say "gated-gelu" and were trained with the tanh form.
        if self.feed_forward_proj == "gated-gelu":
            name = "gelu_new"
        try:
            return get_activation(name)
        except ValueError as error:
            raise ValueError(
                f"feed_forward_proj={self.feed_forward_proj!r}: {error}; use 'relu', 'gated-gelu', "
                "'gated-silu' or another of them, with or without 'gated-'"
            ) from None


def _sizes(
    d_model: int, d_kv: int, d_ff: int, num_layers: int, num_heads: int, **more: Any
) -> T5Config:
    return T5Config(
        d_model=d_model,
        d_kv=d_kv,
        d_ff=d_ff,
        num_layers=num_layers,
        num_heads=num_heads,
        **more,
    )


def _published() -> dict[str, T5Config]:
    configs = {
        "t5-small": _sizes(512, 64, 2048, 6, 8),
        "t5-base": _sizes(768, 64, 3072, 12, 12),
        "t5-large": _sizes(1024, 64, 4096, 24, 16),
        "t5-3b": _sizes(1024, 128, 16384, 24, 32),
        "t5-11b": _sizes(1024, 128, 65536, 24, 128),
    }
    gated = {
        "small": _sizes(512, 64, 1024, 8, 6, feed_forward_proj="gated-gelu"),
        "base": _sizes(768, 64, 2048, 12, 12, feed_forward_proj="gated-gelu"),
        "large": _sizes(1024, 64, 2816, 24, 16, feed_forward_proj="gated-gelu"),
        "xl": _sizes(2048, 64, 5120, 24, 32, feed_forward_proj="gated-gelu"),
        "xxl": _sizes(4096, 64, 10240, 24, 64, feed_forward_proj="gated-gelu"),
    }
    for size, tied in gated.items():
        config = dataclasses.replace(tied, tie_word_embeddings=False)
        configs[f"google/t5-v1_1-{size}"] = config
        configs[f"google/t5-{size}-lm-adapt"] = config
        configs[f"google/flan-t5-{size}"] = config
        configs[f"google/mt5-{size}"] = dataclasses.replace(config, vocab_size=250112)
    return configs


PUBLISHED: Mapping[str, T5Config] = _published()
"""Hub id -> configuration of the published sizes of T5, T5 v1.1, Flan-T5 and mT5.

References:
  Raffel et al., Exploring the Limits of Transfer Learning, JMLR 2020, arXiv:1910.10683; Xue et al.,
  mT5, NAACL 2021, arXiv:2010.11934; Chung et al., Flan, 2022, arXiv:2210.11416; Lester et al., the
  "lm-adapt" checkpoints, EMNLP 2021, arXiv:2104.08691.
"""


@flax.struct.dataclass
class T5Output:
    """What `T5` without a head returns.

    Attributes:
      last_hidden_state: `[batch, target length, d_model]` of the decoder.
      encoder_last_hidden_state: `[batch, length, d_model]`.
    """

    last_hidden_state: Array
    encoder_last_hidden_state: Array


class T5Cache(NamedTuple):
    """Keys and values of the decoder's attention, a pair per layer.

    Attributes:
      self_attention: of the tokens so far, `[batch, heads, max_length, d_kv]`, zero beyond.
      cross_attention: of the encoder's states, `[batch, heads, length, d_kv]`.
    """

    self_attention: tuple[KeyValue, ...]
    cross_attention: tuple[KeyValue, ...]


class _T5Module(nn.Module):
    """What every part below is told, and the hosts built from it."""

    config: T5Config
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def dense(
        self, features: int, name: str, stddev: float, dtype: Dtype | None = None
    ) -> nn.Dense:
        return dense(
            features,
            use_bias=False,
            dtype=dtype or self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializers.normal(self.config.initializer_factor * stddev),
            name=name,
        )

    def embed(self, num_embeddings: int, features: int, name: str, stddev: float) -> Embed:
        return Embed(
            num_embeddings,
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=initializers.normal(self.config.initializer_factor * stddev),
            name=name,
        )

    def norm(self, name: str = "layer_norm") -> RMSNorm:
        return RMSNorm(
            self.config.layer_norm_epsilon,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            scale_init=initializers.constant(self.config.initializer_factor),
            name=name,
        )

    def dropout(self, x: Array, deterministic: bool, name: str = "dropout") -> Array:
        return Dropout(self.config.dropout_rate, name=name)(x, deterministic)

    def add(self, residual: Array, output: Array) -> Array:
        """The end of a sub-layer."""
        return _wide(residual) + _wide(output)

    def part(self, module: type[_T5Module], name: str, **attributes: Any) -> Any:
        return module(self.config, self.dtype, self.param_dtype, name=name, **attributes)


def _wide(x: Array) -> Array:
    """`x` in float32 if it is of float16, whose range the sub-layers of T5 exceed.

    That is the residual stream and, with transformers, what `wo` reads and returns. bfloat16 has
    the range of float32.
    """
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


class T5Attention(_T5Module):
    """Multi-head attention without scaling, with or without relative position biases.

    Attributes:
      bidirectional: whether keys after the query have buckets of their own.
      has_position_bias: owns the embedding of relative positions (the first layer of a stack).
    """

    bidirectional: bool = True
    has_position_bias: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        states: Array | None,
        mask: Array | None,
        position_bias: Array | None,
        cached: KeyValue | None,
        index: Array | None,
        deterministic: bool,
    ) -> tuple[Array, Array | None, KeyValue]:
        """Attends to `states`, or to `x` itself where they are None.

        Args:
          x: `[batch, queries, d_model]`.
          states: `[batch, keys, d_model]` of the encoder, for cross-attention.
          mask: added to the scores, broadcast to `[batch, heads, queries, keys]`.
          position_bias: `[1, heads, queries, keys]` of the first layer, or None.
          cached: keys and values. With `index` they are those of self-attention, to which the ones
            of `x` are added at that position; without, those of the encoder's states.
          index: position of the only query.
          deterministic: no dropout.

        Returns:
          `[batch, queries, d_model]`, the position bias, keys and values.
        """
        config = self.config
        inner = config.num_heads * config.d_kv

        def project(name: str, source: Array, stddev: float) -> Array:
            return split_heads(self.dense(inner, name, stddev)(source), config.num_heads)

        query = project("q", x, (config.d_model * config.d_kv) ** -0.5)
        if cached is not None and index is None:
            key, value = cached
        else:
            source = x if states is None else states
            key = project("k", source, config.d_model**-0.5)
            value = project("v", source, config.d_model**-0.5)
            if cached is not None and index is not None:
                key, value = (
                    jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=2)
                    for old, new in zip(cached, (key, value), strict=True)
                )
        if position_bias is None and self.has_position_bias:
            position_bias = self.relative_bias(query.shape[2], key.shape[2], index)
        y = self.attend(query, key, value, (position_bias, mask), deterministic)
        y = self.dense(config.d_model, "o", inner**-0.5)(y.reshape(*x.shape[:-1], inner))
        return y, position_bias, (key, value)

    def attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        biases: tuple[Array | None, ...],
        deterministic: bool,
    ) -> Array:
        """Attention itself, as `models.layers.attention` but for the dropout."""

        def dropout(x: Array) -> Array:
            return self.dropout(x, deterministic)

        return attention(query, key, value, biases, dropout=dropout)

    def relative_bias(self, queries: int, keys: int, index: Array | None) -> Array:
        """`[1, heads, queries, keys]` in the dtype of the parameters; `index` of the one query."""
        config = self.config
        first = 0 if index is None else index
        relative = jnp.arange(keys)[None, :] - (jnp.arange(queries) + first)[:, None]
        buckets = relative_position_bucket(
            relative,
            bidirectional=self.bidirectional,
            num_buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
        )
        # Not in `dtype`: it is added to scores in float32.
        table = nn.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            param_dtype=self.param_dtype,
            embedding_init=initializers.normal(config.initializer_factor * config.d_model**-0.5),
            name="relative_attention_bias",
        )
        return jnp.moveaxis(table(buckets), -1, 0)[None]


class T5LayerSelfAttention(_T5Module):
    """Norm, self-attention, dropout, residual."""

    bidirectional: bool = True
    has_position_bias: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array | None,
        position_bias: Array | None,
        cached: KeyValue | None,
        index: Array | None,
        deterministic: bool,
    ) -> tuple[Array, Array | None, KeyValue]:
        attention = self.part(
            T5Attention,
            "SelfAttention",
            bidirectional=self.bidirectional,
            has_position_bias=self.has_position_bias,
        )
        y, position_bias, key_value = attention(
            self.norm()(x), None, mask, position_bias, cached, index, deterministic
        )
        return self.add(x, self.dropout(y, deterministic)), position_bias, key_value


class T5LayerCrossAttention(_T5Module):
    """Norm, attention to the encoder's states, dropout, residual."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        states: Array | None,
        mask: Array | None,
        cached: KeyValue | None,
        deterministic: bool,
    ) -> tuple[Array, KeyValue]:
        attention = self.part(T5Attention, "EncDecAttention")
        y, _, key_value = attention(self.norm()(x), states, mask, None, cached, None, deterministic)
        return self.add(x, self.dropout(y, deterministic)), key_value


class T5FeedForward(_T5Module):
    """`wo(dropout(act(wi(x))))`, or gated `wo(dropout(act(wi_0(x)) * wi_1(x)))`."""

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        config = self.config
        activation = config.feed_forward_activation()
        wi = lambda name: self.dense(config.d_ff, name, config.d_model**-0.5)  # noqa: E731
        y = (
            _wide(activation(wi("wi_0")(x))) * _wide(wi("wi_1")(x))
            if config.is_gated
            else _wide(activation(wi("wi")(x)))
        )
        dtype = jnp.float32 if x.dtype == jnp.float16 else None
        wo = self.dense(config.d_model, "wo", config.d_ff**-0.5, dtype)
        return wo(self.dropout(y, deterministic))


class T5LayerFeedForward(_T5Module):
    """Norm, feed-forward network, dropout, residual."""

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        y = self.part(T5FeedForward, "DenseReluDense")(self.norm()(x), deterministic)
        return self.add(x, self.dropout(y, deterministic))


class _StackModule(_T5Module):
    """A part of the encoder or the decoder."""

    is_decoder: bool = False
    has_position_bias: bool = False


class T5Sublayers(_StackModule):
    """The level `layer` of the parameter names: the sub-layers "0", "1" and, decoding, "2"."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        states: Array | None,
        masks: tuple[Array | None, Array | None],
        position_bias: Array | None,
        cached: tuple[KeyValue | None, KeyValue | None],
        index: Array | None,
        deterministic: bool,
    ) -> tuple[Array, Array | None, tuple[KeyValue, KeyValue | None]]:
        attention = self.part(
            T5LayerSelfAttention,
            "0",
            bidirectional=not self.is_decoder,
            has_position_bias=self.has_position_bias,
        )
        x, position_bias, own = attention(
            x, masks[0], position_bias, cached[0], index, deterministic
        )
        crossed = None
        if self.is_decoder:
            x, crossed = self.part(T5LayerCrossAttention, "1")(
                x, states, masks[1], cached[1], deterministic
            )
        x = self.part(T5LayerFeedForward, "2" if self.is_decoder else "1")(x, deterministic)
        return x, position_bias, (own, crossed)


class T5Block(_StackModule):
    """One layer of a stack.

    Attributes:
      keep: return keys and values too. Otherwise they would be kept for the backward pass of a
        layer that is recomputed in it.
    """

    keep: bool = False

    @nn.compact
    def __call__(self, x, states, masks, position_bias, cached, index, deterministic):
        sublayers = self.part(
            T5Sublayers,
            "layer",
            is_decoder=self.is_decoder,
            has_position_bias=self.has_position_bias,
        )
        x, position_bias, key_value = sublayers(
            x, states, masks, position_bias, cached, index, deterministic
        )
        return x, position_bias, key_value if self.keep else None


class T5Blocks(_StackModule):
    """The level `block` of the parameter names: the layers "0", "1", ..."""

    remat: Remat = "off"
    keep: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        states: Array | None,
        masks: tuple[Array | None, Array | None],
        cache: T5Cache | None,
        index: Array | None,
        deterministic: bool,
    ) -> tuple[Array, list[Any]]:
        config = self.config
        num_layers = config.num_decoder_layers if self.is_decoder else config.num_layers
        # `deterministic` is argument 7 of T5Block.__call__, self counted.
        block = rematted(T5Block, self.remat, static_argnums=(7,))
        position_bias, key_values = None, []
        for i in range(num_layers):
            layer = self.part(
                block,
                str(i),
                is_decoder=self.is_decoder,
                has_position_bias=i == 0,
                keep=self.keep,
            )
            cached: Any = (None, None)
            if cache is not None:
                cached = (cache.self_attention[i], cache.cross_attention[i])
            x, position_bias, key_value = layer(
                x, states, masks, position_bias, cached, index, deterministic
            )
            key_values.append(key_value)
        return x, key_values


class T5Stack(_StackModule):
    """The encoder or the decoder, from embedded tokens to normalised states."""

    remat: Remat = "off"
    keep: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        states: Array | None,
        masks: tuple[Array | None, Array | None],
        cache: T5Cache | None,
        index: Array | None,
        deterministic: bool,
    ) -> tuple[Array, list[Any]]:
        blocks = self.part(
            T5Blocks, "block", is_decoder=self.is_decoder, remat=self.remat, keep=self.keep
        )
        x = self.dropout(x, deterministic, "dropout_in")
        x, key_values = blocks(x, states, masks, cache, index, deterministic)
        x = self.norm("final_layer_norm")(x)
        return self.dropout(x, deterministic, "dropout_out"), key_values


class T5(nn.Module):
    """T5 v1.0 and v1.1, Flan-T5 and mT5: encoder and decoder, or the encoder alone.

    Attributes:
      config: sizes, activation and dropout rate.
      head: "conditional_generation" (logits over the vocabulary), None (hidden states of the
        decoder and the encoder) or "encoder" (no decoder).
      dtype: of the computation; None promotes inputs and parameters as flax does. Attention scores,
        their softmax and the statistics of norms are computed in float32 at least. With bfloat16
        nothing overflows that does not in float32; for float16, whose range the published
        checkpoints exceed, `wo` and the residual stream are in float32, as in transformers.
      param_dtype: of the parameters.
      remat: what the backward pass computes again, to save memory: "off"; "full", each layer from
        its input alone; or "dots", all but the products with weights.

    Raises:
      ValueError: if `head` is unknown.

    References:
      Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text
      Transformer, JMLR 2020, arXiv:1910.10683; Shazeer, GLU Variants Improve Transformer,
      arXiv:2002.05202 (the gated feed-forward of v1.1).
    """

    config: T5Config
    head: str | None = "conditional_generation"
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    remat: Remat = "off"

    sites: ClassVar[Mapping[str, str | Site]] = {
        "attention": _LAYER + "0/SelfAttention/o",
        "cross_attention": _LAYER + "1/EncDecAttention/o",
        "feed_forward": _LAYER + "[12]/DenseReluDense/wo",
        "parallel_attention": Site(host=_LAYER + "0/SelfAttention", role="parallel"),
        "parallel_cross_attention": Site(host=_LAYER + "1/EncDecAttention", role="parallel"),
        "parallel_feed_forward": Site(host=_LAYER + "[12]/DenseReluDense", role="parallel"),
        "residual_attention": _add(_LAYER + "0"),
        "residual_cross_attention": _add(_DECODER_LAYER + "1"),
        "residual_feed_forward": _add(
            r"(encoder/block/(?=\d+/layer/1)|decoder/block/(?=\d+/layer/2))(?P<layer>\d+)/layer/[12]"
        ),
        "query": _ATTENTION + "/q",
        "key": _ATTENTION + "/k",
        "value": _ATTENTION + "/v",
        "output_projection": _ATTENTION + "/o",
        "intermediate": _LAYER + "[12]/DenseReluDense/(wi|wi_0|wi_1)",
        "encoder_key_value": _attend(_ENCODER_LAYER + "0/SelfAttention"),
        "decoder_key_value": _attend(_DECODER_LAYER + "0/SelfAttention"),
        "cross_key_value": _attend(_DECODER_LAYER + "1/EncDecAttention"),
        "embedding": Site(host="", method="embed_inputs", role="embedding"),
        "linear": _LAYER + r"\d/\w+/(q|k|v|o|wi|wi_0|wi_1|wo)",
        "norm": Site(host=_LAYER + r"\d/layer_norm", role="bias"),
        "logits": Site(host="", method="logits", role="bias"),
    }
    """Site name -> where it is; a string is the `host` of a `Site`."""

    word_embeddings: ClassVar[str] = "shared/embedding"
    """Path of the vocabulary's embeddings, `[vocab, d_model]`."""

    @property
    def absent_sites(self) -> tuple[str, ...]:
        """Names in `sites` of what this model does not have."""
        if self.head == "conditional_generation":
            return ()
        if self.head is None:
            return ("logits",)
        return (*(name for name in self.sites if re.match("(.*_)?cross_|decoder_", name)), "logits")

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"unknown head {self.head!r}; use one of {HEADS}")
        super().__post_init__()

    @nn.nowrap
    def without_first(self, output: Any, count: int) -> Any:
        """What a call returned, without the positions of the encoder's first `count` tokens."""
        if isinstance(output, T5Output):
            states = output.encoder_last_hidden_state[:, count:]
            return T5Output(output.last_hidden_state, states)
        return output[:, count:] if self.head == "encoder" else output

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, ...]:
        """Arguments for `init`: ids and mask of the encoder, ids of the decoder, `[1, 1]` each."""
        ids, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32)
        return (ids, mask) if self.head == "encoder" else (ids, mask, ids)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array | T5Output:
        """Logits of the targets, or hidden states without a head.

        Args:
          input_ids: `[batch, length]` integers.
          attention_mask: `[batch, length]` integers or booleans, zero at padding; None attends to
            everything.
          decoder_input_ids: `[batch, target length]` integers, the targets shifted right behind
            `decoder_start_token_id`; not for "encoder".
          decoder_attention_mask: as `attention_mask`, of the targets. Seldom needed: a token never
            attends to those after it.
          deterministic: a Python bool; False drops out and needs `rngs={"dropout": key}`.

        Returns:
          For "conditional_generation" `[batch, target length, vocab]` in the dtype of the
          computation; for None a `T5Output`; for "encoder" `[batch, length, d_model]`.

        Raises:
          ValueError: if a shape does not fit, a mask is of a floating-point type,
            `decoder_input_ids` are missing, or given to an encoder without decoder, or an id is not
            in the vocabulary. Where ids are traced, the row that has such an id is NaN.
        """
        if self.head == "encoder":
            if decoder_input_ids is not None:
                raise ValueError(_NO_DECODER)
            return self.encode(input_ids, attention_mask, deterministic=deterministic)
        if decoder_input_ids is None:
            raise ValueError(
                "decoder_input_ids are missing; give the targets, shifted right behind "
                "decoder_start_token_id, or call the method `encode` for the encoder's states"
            )
        return self._run(
            input_ids,
            attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            deterministic=deterministic,
        )

    def encode(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """The encoder's states, `[batch, length, d_model]`; arguments as for a call."""
        return self._run(input_ids, attention_mask, deterministic=deterministic)

    def decode(
        self,
        decoder_input_ids: Array,
        encoder_hidden_states: Array | None = None,
        attention_mask: Array | None = None,
        decoder_attention_mask: Array | None = None,
        *,
        cache: T5Cache | None = None,
        index: Array | None = None,
        deterministic: bool = True,
    ) -> Any:
        """The decoder alone: all targets at once, or one token after the other with a cache.

        Args:
          decoder_input_ids: `[batch, target length]`; with a cache `[batch, 1]`.
          encoder_hidden_states: of `encode`; with a cache they are not needed.
          attention_mask: of the encoder's inputs.
          decoder_attention_mask: of the targets; not with a cache.
          cache: of `start_cache` or of the call for the token before.
          index: with a cache, position of the token, an int32 scalar; where it is traced and the
            cache has no room there, the result is NaN.
          deterministic: as for a call.

        Returns:
          Logits (without a head, hidden states) `[batch, target length, …]`; with a cache, a pair
          of them and the cache with this token in it.

        Raises:
          ValueError: as for a call, or if both or neither of cache and states are given, or the
            cache has no room for the token.
        """
        if (cache is None) == (encoder_hidden_states is None) or (cache is None) != (index is None):
            raise ValueError(
                "decode takes encoder_hidden_states, or a cache with the index of the token"
            )
        if cache is not None and (
            decoder_input_ids.shape[1:] != (1,) or decoder_attention_mask is not None
        ):
            raise ValueError(
                f"decoder_input_ids has shape {decoder_input_ids.shape}; with a cache, decode "
                "takes one token per row, [batch, 1], and no decoder_attention_mask"
            )
        if cache is not None:
            room = cache.self_attention[0][0].shape[2]
            check_ids("index", index, room, "max_length of start_cache")
        return self._run(
            None,
            attention_mask,
            states=encoder_hidden_states,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            cache=cache,
            index=index,
            deterministic=deterministic,
        )

    def start_cache(self, encoder_hidden_states: Array, max_length: int) -> T5Cache:
        """Keys and values of the encoder's states, and room for those of `max_length` tokens.

        Args:
          encoder_hidden_states: `[batch, length, d_model]` of `encode`.
          max_length: most tokens to decode, the start token counted.

        Raises:
          ValueError: if there is no decoder, a shape does not fit, or `max_length` is not positive.
        """
        if max_length < 1:
            raise ValueError(f"max_length={max_length} is not positive; use 1 or more")
        ids = jnp.zeros((encoder_hidden_states.shape[0], 1), jnp.int32)
        # A whole pass for one token, of which a compiler keeps the projections of the states.
        key_values = self._run(
            None, None, states=encoder_hidden_states, decoder_input_ids=ids, keys_and_values=True
        )

        def room(own: Array) -> Array:
            return jnp.zeros((*own.shape[:2], max_length, own.shape[3]), own.dtype)

        return T5Cache(
            tuple((room(key), room(value)) for (key, value), _ in key_values),
            tuple(crossed for _, crossed in key_values),
        )

    @nn.compact
    def _run(
        self,
        input_ids: Array | None,
        attention_mask: Array | None,
        *,
        states: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        cache: T5Cache | None = None,
        index: Array | None = None,
        keys_and_values: bool = False,
        deterministic: bool = True,
    ) -> Any:
        """Encoder and decoder, each where it has an input; everything is made here."""
        config = self.config
        settings = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shared = Embed(
            config.vocab_size,
            config.d_model,
            embedding_init=initializers.normal(config.initializer_factor),
            name="shared",
            **settings,
        )
        dtype = self.dtype or self.param_dtype
        if input_ids is not None:
            _check_ids(config.vocab_size, "input_ids", input_ids, "attention_mask", attention_mask)
            encoder = T5Stack(config, remat=self.remat, name="encoder", **settings)
            padding = _padding_bias(attention_mask, dtype)
            x = self.embed_inputs(input_ids, shared)
            states, _ = encoder(x, None, (padding, None), None, None, deterministic)
        if decoder_input_ids is None:
            return states
        if self.head == "encoder":
            raise ValueError(_NO_DECODER)
        _check_ids(
            config.vocab_size,
            "decoder_input_ids",
            decoder_input_ids,
            "decoder_attention_mask",
            decoder_attention_mask,
        )
        _check_source(config.d_model, decoder_input_ids, states, attention_mask, cache)
        keep = keys_and_values or cache is not None
        decoder = T5Stack(
            config, is_decoder=True, remat=self.remat, keep=keep, name="decoder", **settings
        )
        masks = (
            _causal_bias(decoder_input_ids.shape[1], decoder_attention_mask, cache, index, dtype),
            _padding_bias(attention_mask, dtype),
        )
        x, key_values = decoder(
            shared(decoder_input_ids), states, masks, cache, index, deterministic
        )
        if keys_and_values:
            return key_values
        if self.head is None:
            y = x if states is None or input_ids is None else T5Output(x, states)
        else:
            y = self.logits(x, shared)
        if cache is None:
            return y
        return y, cache._replace(self_attention=tuple(own for own, _ in key_values))

    def embed_inputs(self, input_ids: Array, shared: Embed) -> Array:
        """`[batch, length] -> [batch, length, d_model]` of the encoder's inputs."""
        return shared(input_ids)

    def logits(self, x: Array, shared: Embed) -> Array:
        """`[batch, length, d_model] -> [batch, length, vocab]`."""
        config = self.config
        if config.tie_word_embeddings:
            return shared.attend(x * config.d_model**-0.5)
        return dense(
            config.vocab_size,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializers.normal(config.initializer_factor),
            name="lm_head",
        )(x)


_NO_DECODER = (
    "this T5 has head='encoder', which has no decoder; load a checkpoint with a decoder, with "
    "head='conditional_generation'"
)


def relative_position_bucket(
    relative_position: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
    """The bucket of each relative position: exact when near, logarithmic up to `max_distance`.

    Args:
      relative_position: integers, position of the key minus that of the query.
      bidirectional: half of the buckets are for keys after the query; otherwise those count as 0.
      num_buckets: how many there are.
      max_distance: from here on everything is in the last bucket.

    Returns:
      int32 of the same shape, from 0 to `num_buckets - 1`.

    References:
      arXiv:1910.10683, section 2.1.
    """
    if bidirectional:
        num_buckets //= 2
        bucket = (relative_position > 0).astype(jnp.int32) * num_buckets
        distance = jnp.abs(relative_position)
    else:
        bucket = jnp.zeros_like(relative_position, dtype=jnp.int32)
        distance = jnp.maximum(-relative_position, 0)
    table = _distance_buckets(num_buckets, max_distance)
    return bucket + jnp.asarray(table)[jnp.minimum(distance, max_distance)]


def _distance_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """`[max_distance + 1]` int32. On the host: another logarithm may round to another bucket."""
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(math.log(max_distance / exact))
    far = exact + (steps * np.float32(num_buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, num_buckets - 1)).astype(np.int32)


def _check_ids(vocab_size: int, name: str, ids: Array, mask_name: str, mask: Array | None) -> None:
    if ids.ndim != 2:
        raise ValueError(f"{name} has shape {ids.shape}; it must be [batch, length]")
    if not ids.shape[1]:
        raise ValueError(f"{name} has shape {ids.shape}, no tokens; give at least one per row")
    check_ids(name, ids, vocab_size, "vocab_size")
    _check_mask(mask_name, mask, name, ids.shape)


def _check_source(
    width: int, ids: Array, states: Array | None, mask: Array | None, cache: T5Cache | None
) -> None:
    """What the decoder's `ids` attend to, in `states` or in the cache."""
    if states is not None:
        if states.ndim != 3 or states.shape[2] != width:
            raise ValueError(
                f"encoder_hidden_states has shape {states.shape}; it must be [batch, length, "
                f"d_model={width}]"
            )
        rows, length, _ = states.shape
    elif cache is not None:
        rows, _, length, _ = cache.cross_attention[0][0].shape
    if ids.shape[0] != rows:
        raise ValueError(
            f"decoder_input_ids has {ids.shape[0]} rows, the encoder's states have {rows}; give as "
            "many of both"
        )
    _check_mask("attention_mask", mask, "the encoder's states", (rows, length))


def _check_mask(name: str, mask: Array | None, of: str, shape: tuple[int, ...]) -> None:
    if mask is None:
        return
    if mask.shape != shape:
        raise ValueError(f"{name} has shape {mask.shape}; it must be that of {of}, {shape}")
    if jnp.issubdtype(mask.dtype, jnp.floating):
        # It might be an additive mask, 0 to attend and -inf to leave out: the very opposite.
        raise ValueError(
            f"{name} is {mask.dtype}; it must be integers or booleans, 1 at tokens and 0 at padding"
        )


def _bias(allowed: Array, dtype: Dtype) -> Array:
    """0 where allowed, elsewhere the least finite number: not -inf, which makes rows of NaN."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    return jnp.where(allowed, 0, jnp.finfo(dtype).min).astype(dtype)


def _padding_bias(mask: Array | None, dtype: Dtype) -> Array | None:
    """`[batch, length]` mask -> `[batch, 1, 1, length]`, added to the scores."""
    return None if mask is None else _bias(mask[:, None, None, :] != 0, dtype)


def _causal_bias(
    length: int, mask: Array | None, cache: T5Cache | None, index: Array | None, dtype: Dtype
) -> Array:
    """`[1 or batch, 1, length, keys]`: no token after the query, and no padding."""
    if cache is not None and index is not None:
        keys = cache.self_attention[0][0].shape[2]
        bias = _bias(jnp.arange(keys)[None, None, None, :] <= index, dtype)
        return jnp.where((index >= 0) & (index < keys), bias, jnp.nan)
    positions = jnp.arange(length)
    allowed = positions[None, :] <= positions[:, None]
    if mask is not None:
        allowed = allowed & (mask[:, None, None, :] != 0)
    return _bias(allowed if mask is not None else allowed[None, None], dtype)
