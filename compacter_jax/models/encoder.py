"""The base of encoders: a call, the heads that all have, and the checks of the inputs."""

from __future__ import annotations

import abc
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from flax.linen import initializers
from jax import Array

from compacter_jax.models.pooling import POOLINGS, Pooling, check_tokens, mean_of_tokens
from compacter_jax.nn.attention import padding_bias
from compacter_jax.nn.dense import Dtype, LogitsBias, dense, tied_logits
from compacter_jax.nn.dropout import Dropout
from compacter_jax.nn.inputs import check_ids, check_inputs
from compacter_jax.nn.quantize import QuantizedArray
from compacter_jax.nn.remat import Remat

HEADS = (
    None,
    "sequence_classification",
    "token_classification",
    "masked_lm",
    "question_answering",
)


@flax.struct.dataclass
class EncoderOutput:
    """The result of an encoder without a head.

    Attributes:
      last_hidden_state: `[batch, length, hidden]`.
      pooler_output: `[batch, hidden]`, the first token's state after a dense layer and tanh; None
        in a family without a pooler.
    """

    last_hidden_state: Array
    pooler_output: Array | None


class Encoder(nn.Module, abc.ABC):
    """The base of the encoders, whose families add embeddings, layers and heads.

    Attributes:
      config: configuration of the family, with `model_type`, `vocab_size`, `type_vocab_size` (0 for
        none), `max_position_embeddings`, `max_positions` (the largest number of tokens),
        `initializer_range`, and `rate_before(head)`, the rate of dropout before a linear head.
      head: None (hidden states), "sequence_classification" (regression is `num_labels=1`),
        "token_classification", "masked_lm" or "question_answering".
      num_labels: width of the two classifiers; other heads ignore it.
      dtype: dtype of the computation; None promotes inputs and parameters as flax does. The softmax
        of the attention and the statistics of layer norms are computed in float32 at least.
      param_dtype: dtype of the parameters.
      remat: activations that the backward pass computes again; see the families.
      pooling: input of the classifier for sequence classification; see the families.

    Raises:
      ValueError: if `head` or `pooling` is unknown; if `num_labels` is not positive; or if
        `pooling` is not "first" for a head other than sequence classification.
    """

    config: Any
    head: str | None = None
    num_labels: int = 2
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    remat: Remat = "off"
    pooling: Pooling = "first"

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

    # --- what a family adds ---------------------------------------------------------------------

    @abc.abstractmethod
    def embed(
        self,
        input_ids: Array,
        token_type_ids: Array | None,
        position_ids: Array,
        deterministic: bool,
    ) -> tuple[Array, Array | QuantizedArray]:
        """Embeds tokens, `[batch, length] -> [batch, length, hidden]`.

        Returns:
          The first layer's input, and the word embeddings `[vocab, width]` as they are stored.
        """

    @abc.abstractmethod
    def encode(self, x: Array, inputs: Any, first_only: bool, deterministic: bool) -> Array:
        """Runs the layers; with `first_only`, the result has only the first token's state.

        Args:
          x: `[batch, length, hidden]`, the first layer's input.
          inputs: the result of `attention_inputs`.
          first_only: True if the head reads the first token alone.
          deterministic: True for no dropout.
        """

    @abc.abstractmethod
    def classify(self, x: Array, deterministic: bool) -> Array:
        """Computes `[batch, num_labels]` logits from the pooled state `[batch, hidden]`."""

    @abc.abstractmethod
    def predict_words(self, x: Array, table: Array | QuantizedArray) -> Array:
        """Computes logits, `[batch, length, hidden] -> [batch, length, vocab]`."""

    def pooled(self, x: Array) -> Array | None:
        """Returns the first state `[batch, hidden]` after the pooler; None without a pooler."""
        del x
        return None

    @property
    def takes_mean(self) -> bool:
        """True if the head reads the mean of the tokens."""
        return self.pooling == "mean"

    @nn.nowrap
    def attention_inputs(
        self, x: Array, attention_mask: Array | None, position_ids: Array | None
    ) -> Any:
        """Returns what the attention of the layers is told beside hidden states.

        Args:
          x: `[batch, length, hidden]`, the first layer's input.
          attention_mask: that of the call.
          position_ids: those of the call; None where they are not given.
        """
        del position_ids
        return padding_bias(attention_mask, x.dtype)

    @nn.nowrap
    def positions(self, input_ids: Array) -> Array:
        """Returns the positions of tokens whose positions are not given."""
        return jnp.arange(input_ids.shape[1])[None]

    # --- what all have --------------------------------------------------------------------------

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, Array]:
        """Returns arguments for `init`: `input_ids` and `attention_mask`, `[1, 1]` int32 each."""
        return jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32)

    @nn.nowrap
    def without_first(self, output: Array | EncoderOutput, count: int) -> Array | EncoderOutput:
        """Returns the result of a call without the positions of the first `count` tokens."""
        if isinstance(output, EncoderOutput):
            return EncoderOutput(output.last_hidden_state[:, count:], output.pooler_output)
        return output if self.head == "sequence_classification" else output[:, count:]

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        *,
        word_positions: Array | None = None,
        deterministic: bool = True,
    ) -> Array | EncoderOutput:
        """Returns the logits of the head, or hidden states without a head.

        Args:
          input_ids: `[batch, length]` integers.
          attention_mask: `[batch, length]` integers or booleans, zero at padding; None attends to
            all positions. A query that may attend to nothing, as in a row of padding alone, attends
            to all positions equally. Such a row is an error where the head reads the mean.
          token_type_ids: `[batch, length]` integers; None means 0 everywhere. DistilBERT and
            ModernBERT have none.
          position_ids: `[batch, length]` or `[1, length]` integers; None counts from 0, and in
            RoBERTa from the padding token's id + 1, past padding.
          word_positions: `[batch, k]` integers, the tokens of each row that "masked_lm" computes
            logits for, counted from 0; None for all. Other heads take None alone.
          deterministic: Python bool; False turns on dropout and needs `rngs={"dropout": key}`.

        Returns:
          For "sequence_classification" `[batch, num_labels]`, for "token_classification"
          `[batch, length, num_labels]`, for "masked_lm" `[batch, length, vocab]` or `[batch, k,
          vocab]`, for "question_answering" `[batch, length, 2]` (start, end), all in the dtype of
          the computation; without a head an `EncoderOutput`.

        Raises:
          ValueError: if the sequence is empty or longer than the positions, a shape does not fit
            `input_ids`, a mask is of a floating-point type, an id has no embedding, as negative
            ids have none, the model has no token types, positions of words are not within the
            sequence or the head has none, or the mean of a row of padding alone is wanted. If ids
            or the mask are traced, this row is NaN.
        """
        self._check_inputs(input_ids, attention_mask, token_type_ids, position_ids)
        self._check_word_positions(word_positions, input_ids.shape)
        positions = self.positions(input_ids) if position_ids is None else position_ids
        x, table = self.embed(input_ids, token_type_ids, positions, deterministic)
        # A classifier reads only the first token, unless it takes the mean of all.
        of_sequences = self.head == "sequence_classification"
        first_only = of_sequences and not self.takes_mean
        inputs = self.attention_inputs(x, attention_mask, position_ids)
        x = self.encode(x, inputs, first_only, deterministic)
        if self.head is None:
            return EncoderOutput(last_hidden_state=x, pooler_output=self.pooled(x[:, 0]))
        if self.head == "masked_lm":
            if word_positions is not None:
                x = jnp.take_along_axis(x, word_positions[:, :, None], axis=1)
            return self.predict_words(x, table)
        if of_sequences:
            x = mean_of_tokens(x, attention_mask) if self.takes_mean else x[:, 0]
            return self.classify(x, deterministic)
        if self.head == "question_answering":
            return self.linear_head(x, 2, "qa_outputs", deterministic)
        return self.linear_head(x, self.num_labels, "classifier", deterministic)

    def linear_head(self, x: Array, width: int, name: str, deterministic: bool) -> Array:
        """Computes logits by dropout and a linear layer, `[..., hidden] -> [..., width]`."""
        rate = self.config.rate_before(self.head)
        if rate is not None:
            x = Dropout(rate, name="dropout")(x, deterministic)
        return self.dense(width, name)(x)

    def word_logits(self, x: Array, table: Array | QuantizedArray, name: str) -> Array:
        """Projects transformed states to the vocabulary, `[..., width] -> [..., vocab]`.

        Args:
          x: the states.
          table: word embeddings, which are the kernel if the two are tied.
          name: name of the layer, which has the bias, and a kernel if it is not tied.
        """
        if not self.config.tie_word_embeddings:
            return self.dense(self.config.vocab_size, name)(x)
        logits = tied_logits(x, table, dtype=self.dtype)
        return LogitsBias(dtype=self.dtype, param_dtype=self.param_dtype, name=name)(logits)

    @nn.nowrap
    def part(self, module: type[nn.Module], name: str, **attributes: Any) -> Any:
        """Creates a part of the model with its configuration and dtypes."""
        values = {"dtype": self.dtype, "param_dtype": self.param_dtype, **attributes}
        return module(config=self.config, name=name, **values)

    @nn.nowrap
    def dense(self, features: int, name: str) -> nn.Dense:
        """Creates a linear layer at the top of the model."""
        return dense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializers.normal(self.config.initializer_range),
            name=name,
        )

    @nn.nowrap
    def _check_inputs(
        self,
        input_ids: Array,
        attention_mask: Array | None,
        token_type_ids: Array | None,
        position_ids: Array | None,
    ) -> None:
        config = self.config
        check_inputs(config.vocab_size, "input_ids", input_ids, "attention_mask", attention_mask)
        batch, length = input_ids.shape
        if length > config.max_positions:
            raise ValueError(
                f"input_ids is {length} tokens long, and the model has "
                f"max_position_embeddings={config.max_position_embeddings}"
                + _reserved(config)
                + f"; truncate to {config.max_positions} tokens"
            )
        if self.takes_mean:
            check_tokens(attention_mask)
        if position_ids is not None:
            if position_ids.shape not in ((batch, length), (1, length)):
                raise ValueError(
                    f"position_ids has shape {position_ids.shape}; it must be {(batch, length)} or "
                    f"{(1, length)}"
                )
            field = "max_position_embeddings"
            check_ids("position_ids", position_ids, config.max_position_embeddings, field)
        if token_type_ids is not None:
            _check_token_types(token_type_ids, input_ids.shape, config)

    @nn.nowrap
    def _check_word_positions(self, word_positions: Array | None, shape: tuple[int, ...]) -> None:
        if word_positions is None:
            return
        if self.head != "masked_lm":
            raise ValueError(
                f"word_positions is for head='masked_lm', not for head={self.head!r}; leave it out"
            )
        batch, length = shape
        if word_positions.ndim != 2 or word_positions.shape[0] != batch:
            raise ValueError(
                f"word_positions has shape {word_positions.shape}; it must be ({batch}, k)"
            )
        check_ids("word_positions", word_positions, length, "length of input_ids")


def _reserved(config: Any) -> str:
    """Returns what to say of positions that no token has."""
    unused = config.max_position_embeddings - config.max_positions
    return f", of which the first {unused} are of no token" if unused else ""


def _check_token_types(token_type_ids: Array, shape: tuple[int, ...], config: Any) -> None:
    """Raises ValueError for token types that the model does not have."""
    of_model = f"a model of model_type={config.model_type!r}"
    if not config.type_vocab_size:
        raise ValueError(
            f"token_type_ids was given, but {of_model} has no token types; leave token_type_ids out"
        )
    if token_type_ids.shape != shape:
        raise ValueError(
            f"token_type_ids has shape {token_type_ids.shape}; it must have the shape of "
            f"input_ids, {shape}"
        )
    try:
        check_ids("token_type_ids", token_type_ids, config.type_vocab_size, "type_vocab_size")
    except ValueError as error:
        if config.type_vocab_size > 1:
            raise
        raise ValueError(
            f"{error}; {of_model} with one token type does not tell sentences apart: leave "
            "token_type_ids out"
        ) from None
