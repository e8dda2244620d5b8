"""The base of encoder-decoders: a call, the two halves by themselves, and the decoder's cache."""

from __future__ import annotations

import abc
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jax import Array

from compacter_jax.nn.attention import (
    Cache,
    DecoderCache,
    StackInputs,
    causal_bias,
    padding_bias,
)
from compacter_jax.nn.dense import Dtype, Embed
from compacter_jax.nn.inputs import check_ids, check_inputs, check_source
from compacter_jax.nn.remat import Remat


@flax.struct.dataclass
class EncoderDecoderOutput:
    """The result of an encoder-decoder without a head.

    Attributes:
      last_hidden_state: states of the decoder, `[batch, target length, d_model]`.
      encoder_last_hidden_state: states of the encoder, `[batch, length, d_model]`.
    """

    last_hidden_state: Array
    encoder_last_hidden_state: Array


class EncoderDecoder(nn.Module, abc.ABC):
    """The base of the encoder-decoders, whose families add the layers.

    Attributes:
      config: configuration of the family, with `vocab_size`, `target_vocab_size`, `hidden_size` and
        `max_positions`, the largest number of tokens, None where there is none.
      head: "conditional_generation" (logits over the vocabulary), None (hidden states of the
        decoder and the encoder) or, in a family that has it, "encoder" (no decoder).
      dtype: dtype of the computation; None promotes inputs and parameters as flax does.
      param_dtype: dtype of the parameters.
      remat: activations that the backward pass computes again; see the families.
    """

    config: Any
    head: str | None = "conditional_generation"
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    remat: Remat = "off"

    # --- what a family adds ---------------------------------------------------------------------

    @abc.abstractmethod
    def tables(self) -> tuple[Embed | None, Embed]:
        """Creates the embeddings of tokens for the encoder and for the decoder, often the same.

        An encoder that does not read tokens has None.
        """

    @abc.abstractmethod
    def stack(
        self, name: str, x: Array, ids: Array, inputs: StackInputs, cache: Any, **settings: Any
    ) -> tuple[Array, Any]:
        """Runs the "encoder" or the "decoder".

        Args:
          name: name of the stack.
          x: embedded tokens, `[batch, length, d_model]`.
          ids: the tokens, `[batch, length]`.
          inputs: masks, and states of the encoder for the decoder.
          cache: cache of the decoder, or None.
          **settings: `deterministic`, and `keep`, True for keys and values in the result.

        Returns:
          States `[batch, length, d_model]`, and keys and values of each layer.
        """

    @abc.abstractmethod
    def logits(self, x: Array, table: Embed) -> Array:
        """Computes logits, `[batch, length, d_model] -> [batch, length, vocab]`."""

    def embed_tokens(self, ids: Array, table: Embed) -> Array:
        """Embeds tokens, `[batch, length] -> [batch, length, d_model]`."""
        return table(ids)

    @nn.nowrap
    def check_training(self) -> None:
        """Raises ValueError if the model cannot be trained with its configuration."""

    @nn.nowrap
    def cache_of(self, key_values: Any, source_length: int, max_length: int) -> Cache:
        """Returns a cache that has the encoder's states alone.

        Args:
          key_values: second result of `stack`, for these states and one token.
          source_length: length of the states.
          max_length: largest number of tokens.
        """
        del source_length
        return DecoderCache.with_room(key_values, max_length)

    # --- what a family with another source than tokens changes ----------------------------------

    @nn.nowrap
    def check_source_inputs(self, inputs: Array, mask: Array | None) -> None:
        """Raises ValueError if the encoder's inputs or their mask do not fit the model."""
        check_inputs(self.config.vocab_size, "input_ids", inputs, "attention_mask", mask)
        self._check_length("input_ids", inputs.shape[1])

    @nn.nowrap
    def default_mask(self, inputs: Array, pad: int | None) -> Array:
        """Returns the mask that generation gives inputs without one, zero at the token `pad`."""
        return jnp.ones_like(inputs) if pad is None else inputs != pad

    @nn.nowrap
    def mask_of_states(self, mask: Array | None) -> Array | None:
        """Returns the mask of the encoder's states, which is that of its inputs."""
        return mask

    def embed_source(
        self, inputs: Array, mask: Array | None, table: Embed | None
    ) -> tuple[Array, Array]:
        """Embeds the encoder's inputs.

        Args:
          inputs: tokens, `[batch, length]`.
          mask: mask of the inputs, or None.
          table: embeddings of the encoder.

        Returns:
          `[batch, length, d_model]`; and the tokens `[batch, length]` from which the encoder counts
          positions.
        """
        del mask
        assert table is not None
        return self.embed_inputs(inputs, table), inputs

    # --- what all have --------------------------------------------------------------------------

    def embed_inputs(self, input_ids: Array, table: Embed) -> Array:
        """Embeds the encoder's inputs, `[batch, length] -> [batch, length, d_model]`."""
        return self.embed_tokens(input_ids, table)

    @nn.nowrap
    def without_first(self, output: Any, count: int) -> Any:
        """Returns the result of a call without the encoder's first `count` positions."""
        if isinstance(output, EncoderDecoderOutput):
            states = output.encoder_last_hidden_state[:, count:]
            return EncoderDecoderOutput(output.last_hidden_state, states)
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
    ) -> Array | EncoderDecoderOutput:
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
          computation; for None an `EncoderDecoderOutput`; for "encoder" `[batch, length, d_model]`.

        Raises:
          ValueError: if a shape does not fit, a mask is of a floating-point type,
            `decoder_input_ids` are missing, or given to a model without decoder, or an id is not in
            the vocabulary. If ids are traced, a row with an invalid id is NaN.
        """
        if self.head == "encoder":
            if decoder_input_ids is not None:
                raise ValueError(_NO_DECODER)
            return self.encode(input_ids, attention_mask, deterministic=deterministic)
        self.check_has_targets(decoder_input_ids)
        return self._run(
            input_ids,
            attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            deterministic=deterministic,
        )

    @nn.nowrap
    def check_has_targets(self, decoder_input_ids: Array | None) -> None:
        """Raises ValueError if a call lacks the decoder's inputs."""
        if decoder_input_ids is None:
            raise ValueError(
                "decoder_input_ids are missing; give the targets, shifted right behind "
                "decoder_start_token_id, or call the method `encode` for the encoder's states"
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
        cache: Cache | None = None,
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
            check_ids("index", index, cache.room, "max_length of start_cache")
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

    def start_cache(self, encoder_hidden_states: Array, max_length: int) -> Cache:
        """Returns keys and values of the encoder's states, with room for those of decoded tokens.

        Args:
          encoder_hidden_states: `[batch, length, d_model]`, result of `encode`.
          max_length: largest number of tokens to decode, including the start token.

        Raises:
          ValueError: if there is no decoder, a shape does not fit, or `max_length` is not positive.
        """
        if max_length < 1:
            raise ValueError(f"max_length={max_length} is not positive; use 1 or more")
        self._check_length("a cache", max_length)
        ids = jnp.zeros((encoder_hidden_states.shape[0], 1), jnp.int32)
        # This is a whole pass for one token; the compiler keeps only the projections of the states.
        key_values = self._run(
            None, None, states=encoder_hidden_states, decoder_input_ids=ids, keys_and_values=True
        )
        return self.cache_of(key_values, encoder_hidden_states.shape[1], max_length)

    @nn.compact
    def _run(
        self,
        input_ids: Array | None,
        attention_mask: Array | None,
        *,
        states: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        cache: Cache | None = None,
        index: Array | None = None,
        keys_and_values: bool = False,
        deterministic: bool = True,
    ) -> Any:
        """Runs the encoder and the decoder, each if it has an input; creates all submodules."""
        config, encoding, decoding = self.config, *self.tables()
        dtype = self.dtype or self.param_dtype
        if not deterministic:
            self.check_training()
        mask = self.mask_of_states(attention_mask)
        if input_ids is not None:
            self.check_source_inputs(input_ids, attention_mask)
            x, ids = self.embed_source(input_ids, attention_mask, encoding)
            inputs = StackInputs((padding_bias(mask, dtype), None))
            states, _ = self.stack(
                "encoder", x, ids, inputs, None, deterministic=deterministic, keep=False
            )
        if decoder_input_ids is None:
            return states
        if self.head == "encoder":
            raise ValueError(_NO_DECODER)
        check_inputs(
            config.target_vocab_size,
            "decoder_input_ids",
            decoder_input_ids,
            "decoder_attention_mask",
            decoder_attention_mask,
        )
        self._check_length("decoder_input_ids", decoder_input_ids.shape[1])
        check_source(config.hidden_size, decoder_input_ids, states, attention_mask, mask, cache)
        masks = (
            causal_bias(decoder_input_ids.shape[1], decoder_attention_mask, cache, index, dtype),
            padding_bias(mask, dtype),
        )
        x, key_values = self.stack(
            "decoder",
            self.embed_tokens(decoder_input_ids, decoding),
            decoder_input_ids,
            StackInputs(masks, states, index),
            cache,
            deterministic=deterministic,
            keep=keys_and_values or cache is not None,
        )
        if keys_and_values:
            return key_values
        if self.head is None:
            y = x if states is None or input_ids is None else EncoderDecoderOutput(x, states)
        else:
            y = self.logits(x, decoding)
        if cache is None:
            return y
        return y, cache.after_step(key_values)

    @nn.nowrap
    def _check_length(self, name: str, length: int) -> None:
        most = self.config.max_positions
        if most is not None and length > most:
            raise ValueError(
                f"{name} is {length} tokens long, and the model has max_position_embeddings={most};"
                " truncate to that"
            )


_NO_DECODER = (
    "this model has head='encoder', which has no decoder; load a checkpoint with a decoder, with "
    "head='conditional_generation'"
)
