"""ModernBERT in Flax linen; parameters have their Hugging Face names, without `model.`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jax import Array

from compacter_jax.models.encoder import HEADS
from compacter_jax.models.modernbert.layers import (
    AttentionInputs,
    ModernBertEmbeddings,
    ModernBertLayers,
    ModernBertModule,
    ModernBertPredictionHead,
)
from compacter_jax.models.names import MODERNBERT
from compacter_jax.models.pooling import POOLINGS, Pooling, check_tokens, mean_of_tokens
from compacter_jax.nn.attention import window_bias
from compacter_jax.nn.dense import LogitsBias, tied_logits
from compacter_jax.nn.dropout import Dropout
from compacter_jax.nn.inputs import check_ids, check_inputs
from compacter_jax.nn.quantize import rows_of
from compacter_jax.nn.remat import Remat
from compacter_jax.nn.rotary import Rotary, rotary_table
from compacter_jax.sites import Site

_LAYER = r"layers/(?P<layer>\d+)/"
_PROJECTION = _LAYER + "attn/Wqkv"


@flax.struct.dataclass
class ModernBertOutput:
    """The result of `ModernBert` without a head.

    Attributes:
      last_hidden_state: `[batch, length, hidden]`.
    """

    last_hidden_state: Array


class ModernBert(ModernBertModule):
    """ModernBERT with one of five heads, None included.

    The queries, keys and values of a layer have a kernel each, `attn/Wqkv/query/kernel` and so on,
    which checkpoints hold as the one matrix `attn.Wqkv.weight`. All tokens of a batch are computed,
    padding included.

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

    head: str | None = None
    num_labels: int = 2
    remat: Remat = "off"
    pooling: Pooling = "first"

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

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, Array]:
        """Returns arguments for `init`: `input_ids` and `attention_mask`, `[1, 1]` int32 each."""
        return jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32)

    @nn.nowrap
    def without_first(
        self, output: Array | ModernBertOutput, count: int
    ) -> Array | ModernBertOutput:
        """Returns the result of a call without the positions of the first `count` tokens."""
        if isinstance(output, ModernBertOutput):
            return ModernBertOutput(output.last_hidden_state[:, count:])
        return output if self.head == "sequence_classification" else output[:, count:]

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: None = None,
        position_ids: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array | ModernBertOutput:
        """Returns the logits of the head, or hidden states without a head.

        Args:
          input_ids: `[batch, length]` integers.
          attention_mask: `[batch, length]` integers or booleans, zero at padding; None attends to
            all positions. A query that may attend to nothing attends to all positions equally. A
            row of padding alone is an error where the head reads the mean.
          token_type_ids: None, for the model has no token types.
          position_ids: `[batch, length]` or `[1, length]` integers; None counts from 0. Windows
            count tokens, whatever their positions.
          deterministic: Python bool; False turns on dropout and needs `rngs={"dropout": key}`.

        Returns:
          For "sequence_classification" `[batch, num_labels]`, for "token_classification"
          `[batch, length, num_labels]`, for "masked_lm" `[batch, length, vocab]`, for
          "question_answering" `[batch, length, 2]` (start, end), all in the dtype of the
          computation; without a head a `ModernBertOutput`.

        Raises:
          ValueError: if token types are given; if the sequence is longer than
            `max_position_embeddings`, a shape does not fit `input_ids`, a mask is of a
            floating-point type, an id has no embedding or position, as negative ids have none, or
            the mean of a row of padding alone is wanted. If ids or the mask are traced, this row is
            NaN.
        """
        config = self.config
        self._check_inputs(input_ids, attention_mask, token_type_ids, position_ids)
        embeddings = self.child(ModernBertEmbeddings, "embeddings")
        x = embeddings(input_ids, deterministic)
        # A classifier reads only the first token, unless it takes the mean of all.
        first_only = self.head == "sequence_classification" and not self.takes_mean
        layers = self.child(ModernBertLayers, "layers", remat=self.remat, first_only=first_only)
        inputs = {
            kind: AttentionInputs(
                window_bias(x.shape[1], attention_mask, config.window(kind), x.dtype),
                self._rotary(kind, x, position_ids),
            )
            for kind in dict.fromkeys(config.kinds)
        }
        x = layers(x, inputs, deterministic)
        x = self.norm("final_norm")(x)
        if self.head is None:
            return ModernBertOutput(last_hidden_state=x)
        if self.head == "sequence_classification":
            x = mean_of_tokens(x, attention_mask) if self.takes_mean else x[:, 0]
        x = self.child(ModernBertPredictionHead, "head")(x)
        if self.head == "masked_lm":
            return self._vocabulary_logits(x, embeddings)
        x = Dropout(config.classifier_dropout, name="dropout")(x, deterministic)
        width = 2 if self.head == "question_answering" else self.num_labels
        std = config.hidden_size**-0.5
        return self.dense(width, "classifier", use_bias=True, std=std)(x)

    def _vocabulary_logits(self, x: Array, embeddings: ModernBertEmbeddings) -> Array:
        config, name = self.config, "decoder"
        if not config.tie_word_embeddings:
            use_bias = config.decoder_bias
            return self.dense(config.vocab_size, name, use_bias=use_bias, std=self.last_std)(x)
        x = tied_logits(x, embeddings.word_table(), dtype=self.dtype)
        if not config.decoder_bias:
            return x
        return LogitsBias(dtype=self.dtype, param_dtype=self.param_dtype, name=name)(x)

    @nn.nowrap
    def _rotary(self, kind: str, x: Array, position_ids: Array | None) -> Rotary:
        """Returns the rotary positions of a kind of layers."""
        config, dtype = self.config, jnp.promote_types(x.dtype, jnp.float32)
        count = x.shape[1] if position_ids is None else config.max_position_embeddings
        cos, sin = rotary_table(count, config.head_size, config.rotary_base(kind), dtype)
        if position_ids is None:
            return jnp.asarray(cos)[None, None], jnp.asarray(sin)[None, None]
        return rows_of(cos, position_ids)[:, None], rows_of(sin, position_ids)[:, None]

    @nn.nowrap
    def _check_inputs(self, input_ids, attention_mask, token_type_ids, position_ids):
        if token_type_ids is not None:
            raise ValueError("a ModernBERT has no token types; leave token_type_ids out")
        vocab_size, positions = self.config.vocab_size, self.config.max_position_embeddings
        check_inputs(vocab_size, "input_ids", input_ids, "attention_mask", attention_mask)
        batch, length = input_ids.shape
        if length > positions:
            raise ValueError(
                f"input_ids is {length} tokens long, and the model has "
                f"max_position_embeddings={positions}; truncate to that"
            )
        if position_ids is not None:
            if position_ids.shape not in ((batch, length), (1, length)):
                raise ValueError(
                    f"position_ids has shape {position_ids.shape}; it must be {(batch, length)} or "
                    f"{(1, length)}"
                )
            check_ids("position_ids", position_ids, positions, "max_position_embeddings")
        if self.takes_mean:
            check_tokens(attention_mask)
