"""ModernBERT in Flax linen; parameters have their Hugging Face names, without `model.`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from compacter_jax.models.encoder import Encoder
from compacter_jax.models.modernbert.config import ModernBertConfig
from compacter_jax.models.modernbert.layers import (
    AttentionInputs,
    ModernBertEmbeddings,
    ModernBertLayers,
    ModernBertPredictionHead,
    initial,
)
from compacter_jax.models.names import MODERNBERT
from compacter_jax.nn.attention import window_bias
from compacter_jax.nn.dense import dense, tied_logits
from compacter_jax.nn.norms import LayerNorm
from compacter_jax.nn.quantize import QuantizedArray, rows_of
from compacter_jax.nn.rotary import Rotary, rotary_table
from compacter_jax.sites import Site

_LAYER = r"layers/(?P<layer>\d+)/"
_PROJECTION = _LAYER + "attn/Wqkv"


class ModernBert(Encoder):
    """ModernBERT with one of five heads, None included.

    The queries, keys and values of a layer have a kernel each, `attn/Wqkv/query/kernel` and so on,
    which checkpoints hold as the one matrix `attn.Wqkv.weight`. All tokens of a batch are computed,
    padding included. Windows of local layers count tokens, whatever their positions.

    Attributes:
      config: sizes, activations, dropout rates, and the layers whose attention is local.
      dtype: dtype of the computation; None promotes inputs and parameters as flax does. Rotary
        positions, the softmax of the attention and the statistics of layer norms are computed in
        float32 at least.
      param_dtype: dtype of the parameters.
      head: None (hidden states), "sequence_classification" (regression is `num_labels=1`),
        "token_classification", "masked_lm" or "question_answering".
      num_labels: width of the two classifiers; other heads ignore it.
      remat: activations that the backward pass computes again, to save memory: "off" for none;
        "full" for each layer from its input alone; "dots" for all but the products with weights.
      pooling: input of the head for sequence classification: "first" for what the configuration's
        `classifier_pooling` says, as in transformers; "mean" for the mean of the states of the
        unmasked tokens; "cls" for the first token's state. Unlike BERT, each passes through the
        head's dense layer. Prompts of prompt tuning count as tokens.

    Raises:
      ValueError: if `head` or `pooling` is unknown; if `num_labels` is not positive; or if
        `pooling` is not "first" for a head other than sequence classification.

    References:
      Warner et al., Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder for Fast,
      Memory Efficient, and Long Context Finetuning and Inference, arXiv:2412.13663.
    """

    config: ModernBertConfig

    sites: ClassVar[Mapping[str, str | Site]] = {
        "attention": _LAYER + "attn/Wo",
        "feed_forward": _LAYER + "mlp/Wo",
        "parallel_attention": Site(host=_LAYER + "attn", role="parallel"),
        "parallel_feed_forward": Site(host=_LAYER + "mlp", role="parallel"),
        "residual_attention": Site(host=_LAYER + "attn_residual", role="join"),
        "residual_feed_forward": Site(host=_LAYER + "mlp_residual", role="join"),
        "query": _PROJECTION + "/query",
        "key": _PROJECTION + "/key",
        "value": _PROJECTION + "/value",
        "query_key_value": _PROJECTION,
        "output_projection": _LAYER + "attn/Wo",
        "intermediate": _LAYER + "mlp/Wi",
        "encoder_key_value": Site(
            host=_LAYER + "attn", method="attend", role="attend", length_axis=2
        ),
        "embedding": Site(host="embeddings/tok_embeddings", role="embedding"),
        "encoder_embedding": Site(host="embeddings", role="embedded"),
        "vocabulary": Site(host="head", role="vocabulary"),
        "linear": _LAYER + "(attn/Wqkv/(query|key|value)|attn/Wo|mlp/Wi|mlp/Wo)",
        "norm": Site(host=_LAYER + "(attn|mlp)_norm", role="bias"),
    }
    """Site name -> `Site`, or its `host` as a string."""

    word_embeddings: ClassVar[str] = MODERNBERT.embeddings
    """Path of the vocabulary's embeddings, `[vocab, hidden]`."""

    @property
    def absent_sites(self) -> tuple[str, ...]:
        """Names of `sites` that a model with this head lacks."""
        return () if self.head == "masked_lm" else ("vocabulary",)

    @property
    def takes_mean(self) -> bool:
        """True if the head reads the mean of the tokens."""
        if self.head != "sequence_classification":
            return False
        chosen = self.config.classifier_pooling if self.pooling == "first" else self.pooling
        return chosen == "mean"

    def embed(
        self,
        input_ids: Array,
        token_type_ids: Array | None,
        position_ids: Array,
        deterministic: bool,
    ) -> tuple[Array, Array | QuantizedArray]:
        """Embeds tokens without types or positions; returns the table of words, too."""
        del token_type_ids, position_ids
        embeddings = self.part(ModernBertEmbeddings, "embeddings")
        return embeddings(input_ids, deterministic), embeddings.word_table()

    @nn.nowrap
    def attention_inputs(
        self, x: Array, attention_mask: Array | None, position_ids: Array | None
    ) -> dict[str, AttentionInputs]:
        """Returns the windows and rotary positions of each kind of layers."""
        config = self.config
        return {
            kind: AttentionInputs(
                window_bias(x.shape[1], attention_mask, config.window(kind), x.dtype),
                self._rotary(kind, x, position_ids),
            )
            for kind in dict.fromkeys(config.kinds)
        }

    def encode(
        self, x: Array, inputs: dict[str, AttentionInputs], first_only: bool, deterministic: bool
    ) -> Array:
        """Runs the layers and the final norm."""
        layers = self.part(ModernBertLayers, "layers", remat=self.remat, first_only=first_only)
        norm = LayerNorm(
            self.config.norm_eps,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            use_bias=self.config.norm_bias,
            name="final_norm",
        )
        return norm(layers(x, inputs, deterministic))

    def classify(self, x: Array, deterministic: bool) -> Array:
        """Computes the logits of a classifier of sequences."""
        return self.linear_head(x, self.num_labels, "classifier", deterministic)

    def linear_head(self, x: Array, width: int, name: str, deterministic: bool) -> Array:
        """Computes logits by the prediction head, dropout and a linear layer."""
        del name  # of all heads the same
        x = self.part(ModernBertPredictionHead, "head")(x)
        return super().linear_head(x, width, "classifier", deterministic)

    def predict_words(self, x: Array, table: Array | QuantizedArray) -> Array:
        """Computes the logits of the masked language model."""
        x = self.part(ModernBertPredictionHead, "head")(x)
        if self.config.tie_word_embeddings and not self.config.decoder_bias:
            return tied_logits(x, table, dtype=self.dtype)
        return self.word_logits(x, table, "decoder")

    @nn.nowrap
    def dense(self, features: int, name: str) -> nn.Dense:
        """Creates the classifier or the decoder."""
        config, decodes = self.config, name == "decoder"
        return dense(
            features,
            use_bias=config.decoder_bias if decodes else True,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initial(config, config.last_std if decodes else config.hidden_size**-0.5),
            name=name,
        )

    @nn.nowrap
    def _rotary(self, kind: str, x: Array, position_ids: Array | None) -> Rotary:
        """Returns the rotary positions of a kind of layers."""
        config, dtype = self.config, jnp.promote_types(x.dtype, jnp.float32)
        count = x.shape[1] if position_ids is None else config.max_position_embeddings
        cos, sin = rotary_table(count, config.head_size, config.rotary_base(kind), dtype)
        if position_ids is None:
            return jnp.asarray(cos)[None, None], jnp.asarray(sin)[None, None]
        return rows_of(cos, position_ids)[:, None], rows_of(sin, position_ids)[:, None]
