"""DistilBERT in Flax linen; parameters have their Hugging Face names, without `distilbert.`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import jax
from jax import Array

from compacter_jax.models import names
from compacter_jax.models.bert.layers import BertEmbeddings, BertEncoder
from compacter_jax.models.distilbert.config import DistilBertConfig
from compacter_jax.models.distilbert.layers import DistilBertLayer
from compacter_jax.models.encoder import Encoder
from compacter_jax.nn.activations import get_activation
from compacter_jax.nn.norms import LayerNorm
from compacter_jax.nn.quantize import QuantizedArray
from compacter_jax.sites import Site

_LAYER = r"transformer/layer/(?P<layer>\d+)/"
_ATTENTION = Site(host=_LAYER + "attention_residual", role="join")
_FEED_FORWARD = Site(host=_LAYER + "output_residual", role="join")


class DistilBert(Encoder):
    """DistilBERT with one of five heads, None included; it has no token types and no pooler.

    Attributes:
      config: sizes, activation and dropout rates.
      head: None (hidden states), "sequence_classification" (regression is `num_labels=1`),
        "token_classification", "masked_lm" or "question_answering".
      num_labels: width of the two classifiers; other heads ignore it.
      dtype: dtype of the computation; None promotes inputs and parameters as flax does. The softmax
        of the attention and the statistics of layer norms are computed in float32 at least.
      param_dtype: dtype of the parameters.
      remat: activations that the backward pass computes again, to save memory: "off" for none;
        "full" for each layer from its input alone; "dots" for all but the products with weights.
      pooling: input of the classifier for sequence classification: "first" or "cls" for the first
        token's state, as in transformers; "mean" for the mean of the states of the unmasked tokens.

    Raises:
      ValueError: if `head` or `pooling` is unknown; if `num_labels` is not positive; or if
        `pooling` is not "first" for a head other than sequence classification.

    References:
      Sanh et al., DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter,
      arXiv:1910.01108.
    """

    config: DistilBertConfig

    sites: ClassVar[Mapping[str, str | Site]] = {
        "attention": _LAYER + "attention/out_lin",
        "feed_forward": _LAYER + "ffn/lin2",
        "parallel_attention": _ATTENTION,
        "parallel_feed_forward": _FEED_FORWARD,
        "residual_attention": _ATTENTION,
        "residual_feed_forward": _FEED_FORWARD,
        "query": _LAYER + "attention/q_lin",
        "key": _LAYER + "attention/k_lin",
        "value": _LAYER + "attention/v_lin",
        "output_projection": _LAYER + "attention/out_lin",
        "intermediate": _LAYER + "ffn/lin1",
        "encoder_key_value": Site(
            host=_LAYER + "attention", method="attend", role="attend", length_axis=2
        ),
        "embedding": Site(host="embeddings/word_embeddings", role="embedding"),
        "encoder_embedding": Site(host="embeddings", role="embedded"),
        "vocabulary": Site(host="vocab_layer_norm", role="vocabulary"),
    }
    """Site name -> `Site`, or its `host` as a string."""

    word_embeddings: ClassVar[str] = names.DISTILBERT.embeddings
    """Path of the vocabulary's embeddings, `[vocab, dim]`."""

    @property
    def absent_sites(self) -> tuple[str, ...]:
        """Names of `sites` that a model with this head lacks."""
        return () if self.head == "masked_lm" else ("vocabulary",)

    def embed(
        self,
        input_ids: Array,
        token_type_ids: Array | None,
        position_ids: Array,
        deterministic: bool,
    ) -> tuple[Array, Array | QuantizedArray]:
        """Embeds tokens; returns the table of words, too."""
        embeddings = self.part(BertEmbeddings, "embeddings")
        x = embeddings(input_ids, token_type_ids, position_ids, deterministic)
        return x, embeddings.word_table()

    def encode(self, x: Array, bias: Array | None, first_only: bool, deterministic: bool) -> Array:
        """Runs the layers."""
        settings = {"remat": self.remat, "first_only": first_only, "layer": DistilBertLayer}
        return self.part(BertEncoder, "transformer", **settings)(x, bias, deterministic)

    def classify(self, x: Array, deterministic: bool) -> Array:
        """Computes the logits of a classifier of sequences."""
        x = jax.nn.relu(self.dense(self.config.dim, "pre_classifier")(x))
        return self.linear_head(x, self.num_labels, "classifier", deterministic)

    def predict_words(self, x: Array, table: Array | QuantizedArray) -> Array:
        """Computes the logits of the masked language model."""
        config = self.config
        x = get_activation(config.words_act)(self.dense(config.dim, "vocab_transform")(x))
        norm = LayerNorm(
            config.layer_norm_eps,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="vocab_layer_norm",
        )
        return self.word_logits(norm(x), table, "vocab_projector")
