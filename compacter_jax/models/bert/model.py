"""BERT in Flax linen; parameters have their Hugging Face names, without the prefix `bert.`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from flax.linen import initializers
from jax import Array

from compacter_jax.models.bert.config import HEADS, BertConfig
from compacter_jax.models.bert.layers import BertEmbeddings, BertEncoder, BertMaskedLM, BertPooler
from compacter_jax.models.names import BERT
from compacter_jax.models.pooling import POOLINGS, Pooling, check_tokens, mean_of_tokens
from compacter_jax.nn.attention import padding_bias
from compacter_jax.nn.dense import Dtype, dense
from compacter_jax.nn.dropout import Dropout
from compacter_jax.nn.inputs import check_ids
from compacter_jax.nn.remat import Remat
from compacter_jax.sites import Site

_LAYER = r"encoder/layer/(?P<layer>\d+)/"


@flax.struct.dataclass
class BertOutput:
    """The result of `Bert` without a head.

    Attributes:
      last_hidden_state: `[batch, length, hidden]`.
      pooler_output: `[batch, hidden]`, the first token's state after a dense layer and tanh.
    """

    last_hidden_state: Array
    pooler_output: Array


class Bert(nn.Module):
    """BERT with one of five heads, None included.

    The pooler is present without a head, as in transformers, and for sequence classification with
    the pooling "first".

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
      pooling: input of the classifier for sequence classification, before dropout: "first" for the
        first token's state through the pooler, a dense layer and tanh, as in transformers; "mean"
        for the mean of the states of the unmasked tokens; "cls" for the first token's state. The
        last two are sentence-transformers' and have no pooler. Prompts of prompt tuning count as
        tokens.

    Raises:
      ValueError: if `head` or `pooling` is unknown; if `num_labels` is not positive; or if
        `pooling` is not "first" for a head other than sequence classification.

    References:
      Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers for Language
      Understanding, NAACL 2019, arXiv:1810.04805.
    """

    config: BertConfig
    head: str | None = None
    num_labels: int = 2
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    remat: Remat = "off"
    pooling: Pooling = "first"

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
        "vocabulary": Site(host="cls/predictions/transform", role="vocabulary"),
    }
    """Site name -> `Site`, or its `host` as a string."""

    word_embeddings: ClassVar[str] = BERT.embeddings
    """Path of the vocabulary's embeddings, `[vocab, hidden]`."""

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"unknown head {self.head!r}; use one of {HEADS}")
        if self.num_labels < 1:
            raise ValueError(f"num_labels={self.num_labels} is not positive; use 1 or more")
        if self.pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {self.pooling!r}; use one of {POOLINGS}")
        if self.pooling != "first" and self.head != "sequence_classification":
            raise ValueError(
                f"pooling={self.pooling!r} is for head='sequence_classification', not for "
                f"head={self.head!r}; leave it out"
            )
        super().__post_init__()

    @property
    def has_pooler(self) -> bool:
        return self.head is None or (
            self.head == "sequence_classification" and self.pooling == "first"
        )

    @property
    def absent_sites(self) -> tuple[str, ...]:
        """Names of `sites` that a model with this head lacks."""
        return () if self.head == "masked_lm" else ("vocabulary",)

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, Array]:
        """Returns arguments for `init`: `input_ids` and `attention_mask`, `[1, 1]` int32 each."""
        return jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32)

    @nn.nowrap
    def without_first(self, output: Array | BertOutput, count: int) -> Array | BertOutput:
        """Returns the result of a call without the positions of the first `count` tokens."""
        if isinstance(output, BertOutput):
            return BertOutput(output.last_hidden_state[:, count:], output.pooler_output)
        return output if self.head == "sequence_classification" else output[:, count:]

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array | BertOutput:
        """Returns the logits of the head, or hidden states without a head.

        Args:
          input_ids: `[batch, length]` integers.
          attention_mask: `[batch, length]` integers or booleans, zero at padding; None attends to
            all positions. A row of padding alone attends to all its positions equally, and is an
            error with `pooling="mean"`.
          token_type_ids: `[batch, length]` integers; None means 0 everywhere.
          position_ids: `[batch, length]` or `[1, length]` integers; None counts from 0.
          deterministic: Python bool; False turns on dropout and needs `rngs={"dropout": key}`.

        Returns:
          For "sequence_classification" `[batch, num_labels]`, for "token_classification"
          `[batch, length, num_labels]`, for "masked_lm" `[batch, length, vocab]`, for
          "question_answering" `[batch, length, 2]` (start, end), all in the dtype of the
          computation; without a head a `BertOutput`.

        Raises:
          ValueError: if the sequence is longer than `max_position_embeddings`, a shape does not fit
            `input_ids`, a mask is of a floating-point type, an id has no embedding, as negative
            ids have none, or `pooling="mean"` meets a row of padding alone. If ids or the mask are
            traced, this row is NaN.
        """
        config = self.config
        batch_and_length = self._check_inputs(
            input_ids, attention_mask, token_type_ids, position_ids
        )
        if token_type_ids is None:
            token_type_ids = jnp.zeros(batch_and_length, jnp.int32)
        if position_ids is None:
            position_ids = jnp.arange(batch_and_length[1])[None]

        args = (config, self.dtype, self.param_dtype)
        embeddings = BertEmbeddings(*args, name="embeddings")
        x = embeddings(input_ids, token_type_ids, position_ids, deterministic)
        # A classifier reads only the first token, unless it takes the mean of all.
        first_only = self.head == "sequence_classification" and self.pooling != "mean"
        encoder = BertEncoder(*args, remat=self.remat, first_only=first_only, name="encoder")
        x = encoder(x, padding_bias(attention_mask, x.dtype), deterministic)

        if self.head == "masked_lm":
            return BertMaskedLM(*args, name="cls")(x, embeddings.word_table())
        if self.has_pooler:
            pooled = BertPooler(*args, name="pooler")(x)
            if self.head is None:
                return BertOutput(last_hidden_state=x, pooler_output=pooled)
            x = pooled
        elif self.head == "sequence_classification":
            x = mean_of_tokens(x, attention_mask) if self.pooling == "mean" else x[:, 0]
        if self.head == "question_answering":
            name, width = "qa_outputs", 2
        else:
            name, width = "classifier", self.num_labels
            rate = config.classifier_dropout
            rate = config.hidden_dropout_prob if rate is None else rate
            x = Dropout(rate, name="dropout")(x, deterministic)
        return dense(
            width,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializers.normal(config.initializer_range),
            name=name,
        )(x)

    @nn.nowrap
    def _check_inputs(self, input_ids, attention_mask, token_type_ids, position_ids):
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {input_ids.shape}; it must be [batch, length]")
        batch, length = input_ids.shape
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids is {length} tokens long, and the model has "
                f"max_position_embeddings={self.config.max_position_embeddings}; truncate to that"
            )
        for name, array in (
            ("attention_mask", attention_mask),
            ("token_type_ids", token_type_ids),
        ):
            if array is not None and array.shape != (batch, length):
                raise ValueError(
                    f"{name} has shape {array.shape}; it must be that of input_ids, "
                    f"{(batch, length)}"
                )
        if position_ids is not None and position_ids.shape not in ((batch, length), (1, length)):
            raise ValueError(
                f"position_ids has shape {position_ids.shape}; it must be {(batch, length)} or "
                f"{(1, length)}"
            )
        if attention_mask is not None and jnp.issubdtype(attention_mask.dtype, jnp.floating):
            # A floating-point mask might be an additive one, with 0 to attend and -inf to ignore:
            # the opposite.
            raise ValueError(
                f"attention_mask is {attention_mask.dtype}; it must be integers or booleans, "
                "1 at tokens and 0 at padding"
            )
        if self.pooling == "mean":
            check_tokens(attention_mask)
        for name, ids, field in (
            ("input_ids", input_ids, "vocab_size"),
            ("token_type_ids", token_type_ids, "type_vocab_size"),
            ("position_ids", position_ids, "max_position_embeddings"),
        ):
            if ids is not None:
                check_ids(name, ids, getattr(self.config, field), field)
        return batch, length
