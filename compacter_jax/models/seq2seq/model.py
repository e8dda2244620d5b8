"""The encoder-decoders of the BART line in Flax linen; parameters have their Hugging Face names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax import Array

from compacter_jax.models import names
from compacter_jax.models.encoder_decoder import EncoderDecoder
from compacter_jax.models.seq2seq.config import HEADS, WIDTHS, Seq2SeqConfig
from compacter_jax.models.seq2seq.layers import Seq2SeqStack
from compacter_jax.nn.attention import StackInputs
from compacter_jax.nn.dense import Embed, LogitsBias, dense
from compacter_jax.sites import Site

_LAYER = r"(encoder|decoder)/layers/(?P<layer>\d+)/"
_ENCODER_LAYER = r"encoder/layers/(?P<layer>\d+)/"
_DECODER_LAYER = r"decoder/layers/(?P<layer>\d+)/"
_ATTENTION = _LAYER + "(self_attn|encoder_attn)"


def _attend(host: str) -> Site:
    return Site(host=host, method="attend", role="attend", length_axis=2)


def _join(host: str) -> Site:
    return Site(host=host, role="join")


class Seq2Seq(EncoderDecoder):
    """M2M-100, NLLB-200, mBART, mBART-50, BART and Marian (OPUS-MT).

    Parameters have their Hugging Face names without the prefix `model.`. Where encoder and decoder
    do not share their embeddings, those of the encoder are `shared`, and those of the decoder
    `decoder_embed_tokens`.

    Attributes:
      config: sizes, dropout rates, and the `model_type`.
      head: "conditional_generation" (logits over the vocabulary) or None (hidden states of the
        decoder and the encoder).
      dtype: dtype of the computation; None promotes inputs and parameters as flax does. Attention
        scores, their softmax and the statistics of norms are computed in float32 at least.
      param_dtype: dtype of the parameters.
      remat: activations that the backward pass computes again, to save memory: "off" for none;
        "full" for each layer from its input alone; "dots" for all but the products with weights.

    Raises:
      ValueError: if `head` is unknown.

    References:
      Lewis et al., BART: Denoising Sequence-to-Sequence Pre-training for Natural Language
      Generation, Translation, and Comprehension, ACL 2020, arXiv:1910.13461; Liu et al., mBART,
      arXiv:2001.08210; Fan et al., M2M-100, arXiv:2010.11125; Junczys-Dowmunt et al., Marian,
      ACL 2018, arXiv:1804.00344.
    """

    config: Seq2SeqConfig

    sites: ClassVar[Mapping[str, str | Site]] = {
        "attention": _LAYER + "self_attn/out_proj",
        "cross_attention": _DECODER_LAYER + "encoder_attn/out_proj",
        "feed_forward": _LAYER + "fc2",
        "parallel_attention": Site(host=_LAYER + "self_attn", role="parallel"),
        "parallel_cross_attention": Site(host=_DECODER_LAYER + "encoder_attn", role="parallel"),
        "parallel_feed_forward": Site(
            host=_LAYER.removesuffix("/"), method="feed_forward", role="parallel"
        ),
        "residual_attention": _join(_LAYER + "self_attn_residual"),
        "residual_cross_attention": _join(_DECODER_LAYER + "encoder_attn_residual"),
        "residual_feed_forward": _join(_LAYER + "feed_forward_residual"),
        "query": _ATTENTION + "/q_proj",
        "key": _ATTENTION + "/k_proj",
        "value": _ATTENTION + "/v_proj",
        "output_projection": _ATTENTION + "/out_proj",
        "intermediate": _LAYER + "fc1",
        "encoder_key_value": _attend(_ENCODER_LAYER + "self_attn"),
        "decoder_key_value": _attend(_DECODER_LAYER + "self_attn"),
        "cross_key_value": _attend(_DECODER_LAYER + "encoder_attn"),
        "embedding": Site(host="", method="embed_inputs", role="embedding"),
        "encoder_embedding": Site(host="encoder", method="embedded", role="embedded"),
        "decoder_embedding": Site(host="decoder", method="embedded", role="embedded"),
    }
    """Site name -> `Site`, or its `host` as a string."""

    word_embeddings: ClassVar[str] = names.SEQ2SEQ.embeddings
    """Path of the vocabulary's embeddings, `[vocab, d_model]`."""

    feed_forward_layers: ClassVar[tuple[str, str]] = ("fc1", "fc2")
    """Names of the two linear layers at the site `parallel_feed_forward`."""

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"unknown head {self.head!r}; use one of {HEADS}")
        super().__post_init__()

    @property
    def embedding_scale(self) -> float:
        """Factor of the embeddings where the encoder and the decoder read tokens."""
        return self.config.d_model**0.5 if self.config.scale_embedding else 1.0

    @nn.nowrap
    def widened(self, units: int) -> Seq2Seq:
        """Returns the module with `units` more inner units in every feed-forward network."""
        config = self.config
        widths = {name: getattr(config, name) + units for name in WIDTHS}
        return self.clone(config=dataclasses.replace(config, **widths))

    @nn.nowrap
    def check_training(self) -> None:
        """Raises ValueError if layers would be dropped."""
        for name in ("encoder_layerdrop", "decoder_layerdrop"):
            if rate := getattr(self.config, name):
                raise ValueError(
                    f"{name}={rate}: training with LayerDrop is not supported; set {name} to 0 in "
                    "config.json, or in the module's config"
                )

    def tables(self) -> tuple[Embed, Embed]:
        """Creates the embeddings of tokens, shared by encoder and decoder or not."""
        config = self.config
        shared = self._table(config.vocab_size, "shared")
        if config.share_encoder_decoder_embeddings:
            return shared, shared
        return shared, self._table(config.target_vocab_size, "decoder_embed_tokens")

    def _table(self, size: int, name: str) -> Embed:
        normal, pad = initializers.normal(self.config.init_std), self.config.pad_token_id

        def init(*args: Any) -> Array:
            values = normal(*args)
            return values if pad is None else values.at[pad].set(0)

        return Embed(
            size,
            self.config.d_model,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=init,
            name=name,
        )

    def embed_tokens(self, ids: Array, table: Embed) -> Array:
        """Embeds tokens, scaled, `[batch, length] -> [batch, length, d_model]`."""
        x, pad = table(ids), self.config.pad_token_id
        if pad is not None:
            # As with PyTorch's padding_idx, the embedding of the padding token gets no gradient.
            x = jnp.where((ids == pad)[..., None], jax.lax.stop_gradient(x), x)
        return x * self.embedding_scale if self.config.scale_embedding else x

    def stack(
        self, name: str, x: Array, ids: Array, inputs: StackInputs, cache: Any, **settings: Any
    ) -> tuple[Array, Any]:
        """Runs the "encoder" or the "decoder"."""
        stack = Seq2SeqStack(
            self.config,
            self.dtype,
            self.param_dtype,
            is_decoder=name == "decoder",
            remat=self.remat,
            keep=settings["keep"],
            name=name,
        )
        return stack(x, ids, inputs, cache, settings["deterministic"])

    def logits(self, x: Array, table: Embed) -> Array:
        """Computes logits, `[batch, length, d_model] -> [batch, length, vocab]`."""
        config, settings = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
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
