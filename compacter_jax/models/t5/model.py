"""T5 in Flax linen; parameters have their Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from flax.linen import initializers
from jax import Array

from compacter_jax.models import names
from compacter_jax.models.t5.config import HEADS, T5Config
from compacter_jax.models.t5.layers import T5Stack
from compacter_jax.nn.attention import DecoderCache, StackInputs, causal_bias, padding_bias
from compacter_jax.nn.dense import Dtype, Embed, dense
from compacter_jax.nn.inputs import check_ids, check_inputs, check_source
from compacter_jax.nn.remat import Remat
from compacter_jax.sites import Site

_LAYER = r"(encoder|decoder)/block/(?P<layer>\d+)/layer/"


_ENCODER_LAYER = r"encoder/block/(?P<layer>\d+)/layer/"


_DECODER_LAYER = r"decoder/block/(?P<layer>\d+)/layer/"


_ATTENTION = _LAYER + "[01]/(SelfAttention|EncDecAttention)"


def _attend(host: str) -> Site:
    return Site(host=host, method="attend", role="attend", length_axis=2)


def _add(host: str) -> Site:
    return Site(host=host, method="add", role="join")


@flax.struct.dataclass
class T5Output:
    """The result of `T5` without a head.

    Attributes:
      last_hidden_state: states of the decoder, `[batch, target length, d_model]`.
      encoder_last_hidden_state: states of the encoder, `[batch, length, d_model]`.
    """

    last_hidden_state: Array
    encoder_last_hidden_state: Array


class T5(nn.Module):
    """T5 v1.0 and v1.1, Flan-T5 and mT5: encoder and decoder, or the encoder alone.

    Attributes:
      config: sizes, activation and dropout rate.
      head: "conditional_generation" (logits over the vocabulary), None (hidden states of the
        decoder and the encoder) or "encoder" (no decoder).
      dtype: dtype of the computation; None promotes inputs and parameters as flax does. Attention
        scores, their softmax and the statistics of norms are computed in float32 at least. bfloat16
        has the range of float32. The published checkpoints exceed the range of float16, so with
        float16 `wo` and the residual stream are in float32, as in transformers.
      param_dtype: dtype of the parameters.
      remat: activations that the backward pass computes again, to save memory: "off" for none;
        "full" for each layer from its input alone; "dots" for all but the products with weights.

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
    """Site name -> `Site`, or its `host` as a string."""

    word_embeddings: ClassVar[str] = names.T5.embeddings
    """Path of the vocabulary's embeddings, `[vocab, d_model]`."""

    @property
    def absent_sites(self) -> tuple[str, ...]:
        """Names in `sites` that this model does not have."""
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
        """Returns the result of a call without the encoder's first `count` positions."""
        if isinstance(output, T5Output):
            states = output.encoder_last_hidden_state[:, count:]
            return T5Output(output.last_hidden_state, states)
        return output[:, count:] if self.head == "encoder" else output

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, ...]:
        """Returns arguments for `init`, `[1, 1]` each: ids and mask, and ids of the decoder."""
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
        """Returns the logits of the targets, or hidden states without a head.

        Args:
          input_ids: `[batch, length]` integers.
          attention_mask: `[batch, length]` integers or booleans, zero at padding; None attends to
            all positions.
          decoder_input_ids: `[batch, target length]` integers, the targets shifted right behind
            `decoder_start_token_id`; not for "encoder".
          decoder_attention_mask: mask of the targets, as `attention_mask`. It is seldom needed,
            because a token never attends to those after it.
          deterministic: Python bool; False turns on dropout and needs `rngs={"dropout": key}`.

        Returns:
          For "conditional_generation" `[batch, target length, vocab]` in the dtype of the
          computation; for None a `T5Output`; for "encoder" `[batch, length, d_model]`.

        Raises:
          ValueError: if a shape does not fit, a mask is of a floating-point type,
            `decoder_input_ids` are missing, or given to a T5 without decoder, or an id is not in
            the vocabulary. If ids are traced, a row with an invalid id is NaN.
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
        """Returns the encoder's states, `[batch, length, d_model]`; the arguments are a call's."""
        return self._run(input_ids, attention_mask, deterministic=deterministic)

    def decode(
        self,
        decoder_input_ids: Array,
        encoder_hidden_states: Array | None = None,
        attention_mask: Array | None = None,
        decoder_attention_mask: Array | None = None,
        *,
        cache: DecoderCache | None = None,
        index: Array | None = None,
        deterministic: bool = True,
    ) -> Any:
        """Runs the decoder alone: on all targets at once, or with a cache on one token at a time.

        Args:
          decoder_input_ids: `[batch, target length]`; with a cache `[batch, 1]`.
          encoder_hidden_states: result of `encode`; not needed with a cache.
          attention_mask: mask of the encoder's inputs.
          decoder_attention_mask: mask of the targets; not allowed with a cache.
          cache: result of `start_cache`, or of the call for the token before.
          index: position of the token with a cache, an int32 scalar. If it is traced and the cache
            has no room there, the result is NaN.
          deterministic: Python bool, as in a call.

        Returns:
          Logits (without a head, hidden states) `[batch, target length, …]`; with a cache, a pair
          of them and the cache with this token added.

        Raises:
          ValueError: as in a call; or if both or neither of cache and states are given, or the
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

    def start_cache(self, encoder_hidden_states: Array, max_length: int) -> DecoderCache:
        """Returns keys and values of the encoder's states, with room for those of decoded tokens.

        Args:
          encoder_hidden_states: `[batch, length, d_model]`, result of `encode`.
          max_length: largest number of tokens to decode, including the start token.

        Raises:
          ValueError: if there is no decoder, a shape does not fit, or `max_length` is not positive.
        """
        if max_length < 1:
            raise ValueError(f"max_length={max_length} is not positive; use 1 or more")
        ids = jnp.zeros((encoder_hidden_states.shape[0], 1), jnp.int32)
        # This is a whole pass for one token; the compiler keeps only the projections of the states.
        key_values = self._run(
            None, None, states=encoder_hidden_states, decoder_input_ids=ids, keys_and_values=True
        )

        def room(own: Array) -> Array:
            return jnp.zeros((*own.shape[:2], max_length, own.shape[3]), own.dtype)

        return DecoderCache(
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
        cache: DecoderCache | None = None,
        index: Array | None = None,
        keys_and_values: bool = False,
        deterministic: bool = True,
    ) -> Any:
        """Runs the encoder and the decoder, each if it has an input; creates all submodules."""
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
            check_inputs(
                config.vocab_size, "input_ids", input_ids, "attention_mask", attention_mask
            )
            encoder = T5Stack(config, remat=self.remat, name="encoder", **settings)
            padding = padding_bias(attention_mask, dtype)
            x = self.embed_inputs(input_ids, shared)
            states, _ = encoder(x, StackInputs((padding, None)), None, deterministic)
        if decoder_input_ids is None:
            return states
        if self.head == "encoder":
            raise ValueError(_NO_DECODER)
        check_inputs(
            config.vocab_size,
            "decoder_input_ids",
            decoder_input_ids,
            "decoder_attention_mask",
            decoder_attention_mask,
        )
        check_source(config.d_model, decoder_input_ids, states, attention_mask, cache)
        keep = keys_and_values or cache is not None
        decoder = T5Stack(
            config, is_decoder=True, remat=self.remat, keep=keep, name="decoder", **settings
        )
        masks = (
            causal_bias(decoder_input_ids.shape[1], decoder_attention_mask, cache, index, dtype),
            padding_bias(attention_mask, dtype),
        )
        inputs = StackInputs(masks, states, index)
        x, key_values = decoder(shared(decoder_input_ids), inputs, cache, deterministic)
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
        """Embeds the encoder's inputs, `[batch, length] -> [batch, length, d_model]`."""
        return shared(input_ids)

    def logits(self, x: Array, shared: Embed) -> Array:
        """Computes logits, `[batch, length, d_model] -> [batch, length, vocab]`."""
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
