"""BERT, RoBERTa and ELECTRA in Flax linen.

Parameters have their Hugging Face names, without the prefix `bert.`, `roberta.` or `electra.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from compacter_jax.models.bert.config import BertConfig
from compacter_jax.models.bert.layers import (
    BertClassifier,
    BertEmbeddings,
    BertEncoder,
    BertMaskedLM,
    BertPooler,
    ElectraWords,
    RobertaWords,
)
from compacter_jax.models.encoder import Encoder
from compacter_jax.models.names import BERT
from compacter_jax.nn.quantize import QuantizedArray
from compacter_jax.sites import Site

_LAYER = r"encoder/layer/(?P<layer>\d+)/"


class Bert(Encoder):
    """BERT, RoBERTa, XLM-R, CamemBERT or ELECTRA with one of five heads, None included.

    The pooler is present without a head, as in transformers, and in BERT for sequence
    classification with the pooling "first". The others have a classifier with a hidden layer
    instead, and an ELECTRA has no pooler.

    Attributes:
      config: sizes, activation, dropout rates, and the `model_type`.
      head: None (hidden states), "sequence_classification" (regression is `num_labels=1`),
        "token_classification", "masked_lm" or "question_answering".
      num_labels: width of the two classifiers; other heads ignore it.
      dtype: dtype of the computation; None promotes inputs and parameters as flax does. The softmax
        of the attention and the statistics of layer norms are computed in float32 at least.
      param_dtype: dtype of the parameters.
      remat: activations that the backward pass computes again, to save memory: "off" for none;
        "full" for each layer from its input alone; "dots" for all but the products with weights.
      pooling: input of the classifier for sequence classification, before dropout: "first" for the
        first token's state through the pooler, a dense layer and tanh, as in transformers; "mean"
        for the mean of the states of the unmasked tokens; "cls" for the first token's state. The
        last two are sentence-transformers' and have no pooler. Classifiers with a hidden layer read
        the first token in "first" and "cls". Prompts of prompt tuning count as tokens.

    Raises:
      ValueError: if `head` or `pooling` is unknown; if `num_labels` is not positive; or if
        `pooling` is not "first" for a head other than sequence classification.

    References:
      Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers for Language
      Understanding, NAACL 2019, arXiv:1810.04805; Liu et al., RoBERTa, arXiv:1907.11692; Conneau
      et al., Unsupervised Cross-lingual Representation Learning at Scale, ACL 2020,
      arXiv:1911.02116.
    """

    config: BertConfig

    sites: ClassVar[Mapping[str, str | Site]] = {
        "attention": _LAYER + "attention/output/dense",
        "feed_forward": _LAYER + "output/dense",
        "parallel_attention": Site(host=_LAYER + "attention/output", method="add", role="join"),
        "parallel_feed_forward": Site(host=_LAYER + "output", method="add", role="join"),
        "residual_attention": Site(host=_LAYER + "attention/output", method="add", role="join"),
        "residual_feed_forward": Site(host=_LAYER + "output", method="add", role="join"),
        "query": _LAYER + "attention/self/query",
        "key": _LAYER + "attention/self/key",
        "value": _LAYER + "attention/self/value",
        "output_projection": _LAYER + "attention/output/dense",
        "intermediate": _LAYER + "intermediate/dense",
        "encoder_key_value": Site(
            host=_LAYER + "attention/self", method="attend", role="attend", length_axis=2
        ),
        "embedding": Site(host="embeddings/word_embeddings", role="embedding"),
        "encoder_embedding": Site(host="embeddings", role="embedded"),
        "vocabulary": Site(host="cls/predictions/transform|lm_head/layer_norm", role="vocabulary"),
    }
    """Site name -> `Site`, or its `host` as a string."""

    word_embeddings: ClassVar[str] = BERT.embeddings
    """Path of the vocabulary's embeddings, `[vocab, hidden]`."""

    @property
    def has_pooler(self) -> bool:
        """True if the model has the pooler."""
        variant = self.config.variant
        classifies = self.head == "sequence_classification" and variant.classifier_act is None
        return variant.has_pooler and (
            self.head is None or (classifies and self.pooling == "first")
        )

    @property
    def absent_sites(self) -> tuple[str, ...]:
        """Names of `sites` that a model with this head lacks."""
        # ELECTRA's logits come from states as wide as the embeddings before their projection.
        projects = self.config.variant.words == "generator_predictions"
        return () if self.head == "masked_lm" and not projects else ("vocabulary",)

    @nn.nowrap
    def positions(self, input_ids: Array) -> Array:
        """Returns positions from 0 on, or those of RoBERTa, which padding does not count in."""
        if not self.config.variant.counts_from_padding:
            return super().positions(input_ids)
        present = input_ids != self.config.pad_token_id
        return jnp.cumsum(present, axis=1) * present + (self.config.first_position - 1)

    def embed(
        self,
        input_ids: Array,
        token_type_ids: Array | None,
        position_ids: Array,
        deterministic: bool,
    ) -> tuple[Array, Array | QuantizedArray]:
        """Embeds tokens; returns the table of words, too."""
        config, project = self.config, None
        if config.embedding_width != config.hidden_size:
            project = self.dense(config.hidden_size, "embeddings_project")
        embeddings = self.part(BertEmbeddings, "embeddings")
        x = embeddings(input_ids, token_type_ids, position_ids, deterministic, project)
        return x, embeddings.word_table()

    def encode(self, x: Array, bias: Array | None, first_only: bool, deterministic: bool) -> Array:
        """Runs the layers."""
        encoder = self.part(BertEncoder, "encoder", remat=self.remat, first_only=first_only)
        return encoder(x, bias, deterministic)

    def pooled(self, x: Array) -> Array | None:
        """Applies the pooler, if there is one."""
        return self.part(BertPooler, "pooler")(x) if self.has_pooler else None

    def classify(self, x: Array, deterministic: bool) -> Array:
        """Computes the logits of a classifier of sequences."""
        if self.config.variant.classifier_act is not None:
            head = self.part(BertClassifier, "classifier", num_labels=self.num_labels)
            return head(x, deterministic)
        pooled = self.pooled(x)
        states = x if pooled is None else pooled
        return self.linear_head(states, self.num_labels, "classifier", deterministic)

    def predict_words(self, x: Array, table: Array | QuantizedArray) -> Array:
        """Computes the logits of the masked language model."""
        name = self.config.variant.words
        if name == "generator_predictions":
            return self.word_logits(self.part(ElectraWords, name)(x), table, "generator_lm_head")
        words = {"cls": BertMaskedLM, "lm_head": RobertaWords}[name]
        return self.part(words, name)(x, table)
