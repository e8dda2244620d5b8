"""Speech translators and recognisers in Flax linen; parameters have their Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from compacter_jax.models import names
from compacter_jax.models.encoder_decoder import EncoderDecoderOutput
from compacter_jax.models.seq2seq.config import Seq2SeqConfig
from compacter_jax.models.seq2seq.sites import STANDARD
from compacter_jax.models.seq2seq.transformer import Transformer
from compacter_jax.models.speech_to_text.config import SpeechToTextConfig
from compacter_jax.models.speech_to_text.convolutions import Convolutions, prefix_mask, shortened
from compacter_jax.nn.dense import Embed
from compacter_jax.nn.inputs import check_features
from compacter_jax.sites import Site


class SpeechToText(Transformer):
    """Speech translators and recognisers, such as the fairseq S2T models of LibriSpeech and MuST-C.

    Convolutions over time shorten the features of speech; encoder and decoder are those of M2M-100.
    Parameters have their Hugging Face names without the prefix `model.`, but for those of the
    convolutions, `encoder_conv/…`, and for the embeddings of tokens, `decoder_embed_tokens`.

    Attributes:
      config: sizes, dropout rates, and the convolutions.
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
      Wang et al., fairseq S2T: Fast Speech-to-Text Modeling with fairseq, AACL 2020,
      arXiv:2010.05171.
    """

    config: SpeechToTextConfig

    sites: ClassVar[Mapping[str, str | Site]] = {
        name: site for name, site in STANDARD.items() if name != "embedding"
    }
    """Site name -> `Site`, or its `host` as a string."""

    absent_sites: ClassVar[Mapping[str, str]] = {
        "embedding": "the encoder of a speech model reads features, to which no prompt of tokens "
        "can be added; use prefix tuning, or an adapter"
    }
    """Sites of other encoder-decoders -> the reason why there are none here."""

    word_embeddings: ClassVar[str] = names.SPEECH_TO_TEXT.embeddings
    """Path of the vocabulary's embeddings, `[vocab, d_model]`, those of the decoder."""

    @property
    def layers(self) -> Seq2SeqConfig:
        """Configuration of the layers, those of an M2M-100."""
        return self.config.transformer

    def __call__(  # type: ignore[override]  # the first argument is named after what it is
        self,
        input_features: Array,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array | EncoderDecoderOutput:
        """Returns the logits of the targets, or hidden states without a head.

        Args:
          input_features: `[batch, frames, config.feature_size]` floating-point numbers, such as
            log-mel energies.
          attention_mask: `[batch, frames]` integers or booleans, ones and then zeros at padding,
            which has to be on the right; None for no padding. Only the number of ones in a row
            counts; a row of padding alone attends to all of its states evenly.
          decoder_input_ids: `[batch, target length]` integers, the targets shifted right behind
            `decoder_start_token_id`.
          decoder_attention_mask: mask of the targets, as in `Seq2Seq`.
          deterministic: Python bool; False turns on dropout and needs `rngs={"dropout": key}`.

        Returns:
          For "conditional_generation" `[batch, target length, vocab]` in the dtype of the
          computation; for None an `EncoderDecoderOutput`, whose encoder has
          `floor((frames - 1) / 2) + 1` states after each convolution.

        Raises:
          ValueError: if a shape does not fit, a mask is of a floating-point type or has zeros
            before ones, features are integers, `decoder_input_ids` are missing, or an id is not in
            the vocabulary. If ids are traced, a row with an invalid id is NaN.
        """
        self.check_has_targets(decoder_input_ids)
        return self._run(  # type: ignore[no-any-return]
            input_features,
            attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            deterministic=deterministic,
        )

    def encode(  # type: ignore[override]
        self,
        input_features: Array,
        attention_mask: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """Returns the encoder's states, `[batch, length, d_model]`; the arguments are a call's."""
        return self._run(  # type: ignore[no-any-return]
            input_features, attention_mask, deterministic=deterministic
        )

    def tables(self) -> tuple[None, Embed]:
        """Creates the decoder's embeddings of tokens."""
        return None, self.table(self.config.vocab_size, "decoder_embed_tokens")

    @nn.nowrap
    def dummy_inputs(self) -> tuple[Array, ...]:
        """Returns arguments for `init`: one frame and its mask, and one token of the decoder."""
        ids = jnp.zeros((1, 1), jnp.int32)
        return jnp.zeros((1, 1, self.config.feature_size)), jnp.ones((1, 1), jnp.int32), ids

    @nn.nowrap
    def check_source_inputs(self, inputs: Array, mask: Array | None) -> None:
        """Raises ValueError if features or their mask do not fit the model."""
        check_features(self.config.feature_size, inputs, mask)

    @nn.nowrap
    def default_mask(self, inputs: Array, pad: int | None) -> Array:
        """Returns the mask of features without padding."""
        del pad
        return jnp.ones(inputs.shape[:2], jnp.int32)

    @nn.nowrap
    def mask_of_states(self, mask: Array | None) -> Array | None:
        """Returns the mask of the encoder's states, fewer than the frames."""
        if mask is None or mask.ndim != 2:  # of another shape, it is refused later
            return mask
        convolutions = len(self.config.conv_kernel_sizes)
        counts = shortened(jnp.asarray(mask != 0).sum(-1), convolutions)
        return prefix_mask(counts, shortened(mask.shape[1], convolutions))

    def embed_source(
        self, inputs: Array, mask: Array | None, table: Embed | None
    ) -> tuple[Array, Array]:
        """Computes the convolutions, scaled.

        Returns:
          `[batch, length, d_model]`; and integers `[batch, length]` that differ from `pad_token_id`
          where a state has a position.
        """
        del table
        config, counts = self.config, None
        if mask is not None and config.mask_between_convolutions:
            counts = jnp.asarray(mask != 0).sum(-1)
        convolutions = Convolutions(config, self.dtype, self.param_dtype, name="encoder_conv")
        x = convolutions(inputs, counts)
        present = self.mask_of_states(mask)
        if present is None:
            present = jnp.ones(x.shape[:2], jnp.int32)
        pad = config.pad_token_id
        if config.mask_between_convolutions:
            ids = jnp.where(present == 1, -1, -1 if pad is None else pad)
        else:
            ids = 1 - present  # what PyTorch's model compares with `pad_token_id`
        return x * self.embedding_scale if config.scale_embedding else x, ids
