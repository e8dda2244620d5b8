"""The Transformer of the BART line, without what its encoder reads."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax import Array

from compacter_jax.models.encoder_decoder import EncoderDecoder
from compacter_jax.models.seq2seq.config import HEADS, WIDTHS, Seq2SeqConfig
from compacter_jax.models.seq2seq.layers import Seq2SeqStack
from compacter_jax.nn.attention import Cache, JoinedCache, StackInputs
from compacter_jax.nn.dense import Embed, LogitsBias, dense


class Transformer(EncoderDecoder):
    """The layers of the BART line, whatever the encoder reads.

    Attributes:
      config: configuration of the family.
      head: "conditional_generation" or None.
      dtype: dtype of the computation, see `Seq2Seq`.
      param_dtype: dtype of the parameters.
      remat: activations that the backward pass computes again, see `Seq2Seq`.

    Raises:
      ValueError: if `head` is unknown.
    """

    feed_forward_layers: ClassVar[tuple[str, str]] = ("fc1", "fc2")
    """Names of the two linear layers at the site `parallel_feed_forward`."""

    @property
    @abc.abstractmethod
    def layers(self) -> Seq2SeqConfig:
        """Configuration of the layers."""

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"unknown head {self.head!r}; use one of {HEADS}")
        super().__post_init__()

    @property
    def embedding_scale(self) -> float:
        """Factor of what the encoder and the decoder read, before positions are added."""
        return self.layers.d_model**0.5 if self.layers.scale_embedding else 1.0

    @nn.nowrap
    def widened(self, units: int) -> Self:
        """Returns the module with `units` more inner units in every feed-forward network.

        Raises:
          ValueError: for a compressed decoder.
        """
        if self.layers.is_compressed:
            raise ValueError(
                "the inner units of a compressed decoder are values of its attention, too, so "
                "bottlenecks beside it cannot become part of it; keep the adapter"
            )
        widths = {name: getattr(self.layers, name) + units for name in WIDTHS}
        return self.clone(config=dataclasses.replace(self.config, **widths))

    @nn.nowrap
    def check_training(self) -> None:
        """Raises ValueError if layers would be dropped."""
        for name in ("encoder_layerdrop", "decoder_layerdrop"):
            if rate := getattr(self.layers, name):
                raise ValueError(
                    f"{name}={rate}: training with LayerDrop is not supported; set {name} to 0 in "
                    "config.json, or in the module's config"
                )

    def table(self, size: int, name: str) -> Embed:
        """Creates embeddings of `size` tokens, zero at the padding token."""
        normal, pad = initializers.normal(self.layers.init_std), self.layers.pad_token_id

        def init(*args: Any) -> Array:
            values = normal(*args)
            return values if pad is None else values.at[pad].set(0)

        return Embed(
            size,
            self.layers.d_model,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=init,
            name=name,
        )

    def embed_tokens(self, ids: Array, table: Embed) -> Array:
        """Embeds tokens, scaled, `[batch, length] -> [batch, length, d_model]`."""
        x, pad = table(ids), self.layers.pad_token_id
        if pad is not None:
            # As with PyTorch's padding_idx, the embedding of the padding token gets no gradient.
            x = jnp.where((ids == pad)[..., None], jax.lax.stop_gradient(x), x)
        return x * self.embedding_scale if self.layers.scale_embedding else x

    def stack(
        self, name: str, x: Array, ids: Array, inputs: StackInputs, cache: Any, **settings: Any
    ) -> tuple[Array, Any]:
        """Runs the "encoder" or the "decoder"."""
        stack = Seq2SeqStack(
            self.layers,
            self.dtype,
            self.param_dtype,
            is_decoder=name == "decoder",
            remat=self.remat,
            keep=settings["keep"],
            name=name,
        )
        return stack(x, ids, inputs, cache, settings["deterministic"])

    @nn.nowrap
    def cache_of(self, key_values: Any, source_length: int, max_length: int) -> Cache:
        """Returns a cache that has the encoder's states alone."""
        if self.layers.is_compressed:
            return JoinedCache.with_room(key_values, source_length, max_length)
        return super().cache_of(key_values, source_length, max_length)

    def logits(self, x: Array, table: Embed) -> Array:
        """Computes logits, `[batch, length, d_model] -> [batch, length, vocab]`."""
        config, settings = self.layers, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if config.tie_word_embeddings:
            y = table.attend(x)
        else:
            init = initializers.normal(config.init_std)
            head = dense(
                config.target_vocab_size,
                use_bias=False,
                kernel_init=init,
                name="lm_head",
                **settings,
            )
            y = head(x)
        return LogitsBias(name="final_logits_bias", **settings)(y) if config.logits_bias else y
