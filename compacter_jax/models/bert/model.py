"""BERT in Flax linen; parameters have their Hugging Face names, without the prefix `bert.`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax import Array

from compacter_jax.models.bert.config import HEADS, BertConfig
from compacter_jax.models.pooling import POOLINGS, Pooling, check_tokens, mean_of_tokens
from compacter_jax.nn.activations import get_activation
from compacter_jax.nn.attention import attention, padding_bias, split_heads
from compacter_jax.nn.dense import Dtype, Embed, dense, tied_logits
from compacter_jax.nn.dropout import Dropout
from compacter_jax.nn.inputs import check_ids
from compacter_jax.nn.norms import LayerNorm
from compacter_jax.nn.quantize import QuantizedArray
from compacter_jax.nn.remat import Remat, rematted
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


class _BertModule(nn.Module):
    """Configuration and dtypes of every submodule, and the constructors of its children."""

    config: BertConfig
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def dense(self, features: int, name: str) -> nn.Dense:
        return dense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializers.normal(self.config.initializer_range),
            name=name,
        )

    def embed(self, num_embeddings: int, name: str) -> Embed:
        return Embed(
            num_embeddings,
            self.config.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=initializers.normal(self.config.initializer_range),
            name=name,
        )

    def layer_norm(self) -> LayerNorm:
        return LayerNorm(
            self.config.layer_norm_eps,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="LayerNorm",
        )

    def child(self, module: type[_BertModule], name: str, **attributes: Any) -> _BertModule:
        return module(self.config, self.dtype, self.param_dtype, name=name, **attributes)


class BertEmbeddings(_BertModule):
    """The normalised sum of word, token type and position embeddings."""

    @nn.compact
    def __call__(
        self, input_ids: Array, token_type_ids: Array, position_ids: Array, deterministic: bool
    ) -> Array:  # [batch, length] each -> [batch, length, hidden]
        config = self.config
        x = self.embed(config.vocab_size, "word_embeddings")(input_ids)
        if config.pad_token_id is not None:
            # As with PyTorch's padding_idx, the embedding of the padding token gets no gradient.
            x = jnp.where(
                (input_ids == config.pad_token_id)[..., None], jax.lax.stop_gradient(x), x
            )
        x += self.embed(config.type_vocab_size, "token_type_embeddings")(token_type_ids)
        x += self.embed(config.max_position_embeddings, "position_embeddings")(position_ids)
        x = self.layer_norm()(x)
        return Dropout(config.hidden_dropout_prob, name="dropout")(x, deterministic)

    def word_table(self) -> Array | QuantizedArray:
        """Returns the word embeddings `[vocab, hidden]`, as they are stored."""
        return self.variables["params"]["word_embeddings"]["embedding"]


class BertSelfAttention(_BertModule):
    """Multi-head self-attention of a sequence, before the output projection."""

    @nn.compact
    def __call__(self, x: Array, states: Array, bias: Array | None, deterministic: bool) -> Array:
        """Attends from `x` `[batch, queries, hidden]` to `states` `[batch, keys, hidden]`."""
        config = self.config

        def project(name: str, source: Array) -> Array:
            return split_heads(
                self.dense(config.hidden_size, name)(source), config.num_attention_heads
            )

        query, key, value = (
            project(name, source)
            for name, source in (("query", x), ("key", states), ("value", states))
        )
        return self.attend(query, key, value, (bias,), deterministic).reshape(x.shape)

    def attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        biases: tuple[Array | None, ...],
        deterministic: bool,
    ) -> Array:
        """Computes attention as `compacter_jax.nn.attention.attention`, with dropout."""
        rate = self.config.attention_probs_dropout_prob
        dropout = Dropout(rate, name="dropout", deterministic=deterministic)
        scale = 1 / math.sqrt(query.shape[-1])
        return attention(query, key, value, biases, scale=scale, dropout=dropout)


class BertResidual(_BertModule):
    """The end of a sub-layer: projection to the hidden size, dropout, residual, layer norm."""

    @nn.compact
    def __call__(self, x: Array, residual: Array, deterministic: bool) -> Array:
        x = self.dense(self.config.hidden_size, "dense")(x)
        x = Dropout(self.config.hidden_dropout_prob, name="dropout")(x, deterministic)
        return self.add(residual, x, self.layer_norm())

    def add(self, residual: Array, output: Array, layer_norm: LayerNorm) -> Array:
        """Adds the residual and normalises the sum."""
        return layer_norm(output + residual)


class BertAttention(_BertModule):
    """Self-attention with its output projection and residual."""

    @nn.compact
    def __call__(self, x: Array, states: Array, bias: Array | None, deterministic: bool) -> Array:
        y = self.child(BertSelfAttention, "self")(x, states, bias, deterministic)
        return self.child(BertResidual, "output")(y, x, deterministic)


class BertIntermediate(_BertModule):
    """The first layer of the feed-forward network, with its activation."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        activation = get_activation(self.config.hidden_act)
        return activation(self.dense(self.config.intermediate_size, "dense")(x))


class BertLayer(_BertModule):
    """One layer: attention and feed-forward network.

    Attributes:
      first_only: True to return only the first token's state, `[batch, 1, hidden]`; of the other
        tokens, the layer computes only keys and values.
    """

    first_only: bool = False

    @nn.compact
    def __call__(self, x: Array, bias: Array | None, deterministic: bool) -> Array:
        queries = x[:, :1] if self.first_only else x
        x = self.child(BertAttention, "attention")(queries, x, bias, deterministic)
        y = self.child(BertIntermediate, "intermediate")(x)
        return self.child(BertResidual, "output")(y, x, deterministic)


class BertLayers(_BertModule):
    """The layers in sequence, named "0", "1", ..."""

    remat: Remat = "off"
    first_only: bool = False

    @nn.compact
    def __call__(self, x: Array, bias: Array | None, deterministic: bool) -> Array:
        # `deterministic` is argument 3 of BertLayer.__call__, self counted.
        layer = rematted(BertLayer, self.remat, static_argnums=(3,))
        last = self.config.num_hidden_layers - 1
        for i in range(last + 1):
            first_only = self.first_only and i == last
            x = self.child(layer, str(i), first_only=first_only)(x, bias, deterministic)
        return x


class BertEncoder(_BertModule):
    """The level `encoder` in the names of parameters."""

    remat: Remat = "off"
    first_only: bool = False

    @nn.compact
    def __call__(self, x: Array, bias: Array | None, deterministic: bool) -> Array:
        layers = self.child(BertLayers, "layer", remat=self.remat, first_only=self.first_only)
        return layers(x, bias, deterministic)


class BertPooler(_BertModule):
    """The pooler: a dense layer and tanh on the first token's state."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [batch, length, hidden] -> [batch, hidden]
        return jnp.tanh(self.dense(self.config.hidden_size, "dense")(x[:, 0]))


class BertTransform(_BertModule):
    """A dense layer, activation and layer norm before the projection to the vocabulary."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.dense(self.config.hidden_size, "dense")(x)
        return self.layer_norm()(get_activation(self.config.hidden_act)(x))


class BertPredictions(_BertModule):
    """The masked language model's logits over the vocabulary."""

    @nn.compact
    def __call__(self, x: Array, word_table: Array | QuantizedArray) -> Array:
        vocab_size = self.config.vocab_size
        x = self.child(BertTransform, "transform")(x)
        # The bias belongs to `predictions`, not to `decoder`, as in its Hugging Face name.
        bias = self.param("bias", initializers.zeros, (vocab_size,), self.param_dtype)
        if self.config.tie_word_embeddings:
            x, bias = nn.dtypes.promote_dtype(x, bias, dtype=self.dtype)
            return tied_logits(x, word_table, dtype=self.dtype) + bias
        decoder = dense(
            vocab_size,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializers.normal(self.config.initializer_range),
            name="decoder",
        )
        x, bias = nn.dtypes.promote_dtype(decoder(x), bias, dtype=self.dtype)
        return x + bias


class BertMaskedLM(_BertModule):
    """The level `cls` in the names of parameters."""

    @nn.compact
    def __call__(self, x: Array, word_table: Array | QuantizedArray) -> Array:
        return self.child(BertPredictions, "predictions")(x, word_table)


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
    }
    """Site name -> `Site`, or its `host` as a string."""

    word_embeddings: ClassVar[str] = "embeddings/word_embeddings/embedding"
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
