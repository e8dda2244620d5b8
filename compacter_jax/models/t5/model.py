"""T5 in Flax linen; parameters have their Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from flax.linen import initializers
from jax import Array

from compacter_jax.models import names
from compacter_jax.models.encoder_decoder import EncoderDecoder
from compacter_jax.models.t5.config import HEADS, T5Config
from compacter_jax.models.t5.layers import T5Stack
from compacter_jax.nn.attention import StackInputs
from compacter_jax.nn.dense import Embed, dense
from compacter_jax.sites import Site

_LAYER = r"(encoder|decoder)/block/(?P<layer>\d+)/layer/"


_ENCODER_LAYER = r"encoder/block/(?P<layer>\d+)/layer/"


_DECODER_LAYER = r"decoder/block/(?P<layer>\d+)/layer/"


_ATTENTION = _LAYER + "[01]/(SelfAttention|EncDecAttention)"


def _attend(host: str) -> Site:
    return Site(host=host, method="attend", role="attend", length_axis=2)


def _add(host: str) -> Site:
    return Site(host=host, method="add", role="join")


class T5(EncoderDecoder):
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
        "cross_query": _LAYER + "1/EncDecAttention/q",
        "cross_key": _LAYER + "1/EncDecAttention/k",
        "cross_value": _LAYER + "1/EncDecAttention/v",
        "decoder_linear": _DECODER_LAYER + r"\d/\w+/(q|k|v|o|wi|wi_0|wi_1|wo)",
        "intermediate": _LAYER + "[12]/DenseReluDense/(wi|wi_0|wi_1)",
        "encoder_key_value": _attend(_ENCODER_LAYER + "0/SelfAttention"),
        "decoder_key_value": _attend(_DECODER_LAYER + "0/SelfAttention"),
        "cross_key_value": _attend(_DECODER_LAYER + "1/EncDecAttention"),
        "embedding": Site(host="", method="embed_inputs", role="embedding"),
        "encoder_embedding": Site(host="encoder", method="embedded", role="embedded"),
        "decoder_embedding": Site(host="decoder", method="embedded", role="embedded"),
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

    def tables(self) -> tuple[Embed, Embed]:
        """Creates the embeddings of tokens, which encoder and decoder share."""
        shared = Embed(
            self.config.vocab_size,
            self.config.d_model,
            embedding_init=initializers.normal(self.config.initializer_factor),
            name="shared",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        return shared, shared

    def stack(
        self, name: str, x: Array, ids: Array, inputs: StackInputs, cache: Any, **settings: Any
    ) -> tuple[Array, Any]:
        """Runs the "encoder" or the "decoder"; positions are relative, so `ids` are not read."""
        del ids
        stack = T5Stack(
            self.config,
            self.dtype,
            self.param_dtype,
            is_decoder=name == "decoder",
            remat=self.remat,
            keep=settings["keep"],
            name=name,
        )
        return stack(x, inputs, cache, settings["deterministic"])

    def logits(self, x: Array, table: Embed) -> Array:
        """Computes logits, `[batch, length, d_model] -> [batch, length, vocab]`."""
        config = self.config
        if config.tie_word_embeddings:
            return table.attend(x * config.d_model**-0.5)
        return dense(
            config.vocab_size,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializers.normal(config.initializer_factor),
            name="lm_head",
        )(x)
