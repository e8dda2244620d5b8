"""The configuration of speech translators and recognisers, and the published sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from compacter_jax.messages import quote
from compacter_jax.models.seq2seq.config import Seq2SeqConfig

HEADS = ("conditional_generation", None)

# Fields with the same meaning in `Seq2SeqConfig`, which describes the layers.
_OF_LAYERS = (
    "vocab_size",
    "d_model",
    *(f"{stack}_{name}" for stack in ("encoder", "decoder") for name in ("layers", "ffn_dim")),
    *(f"{stack}_attention_heads" for stack in ("encoder", "decoder")),
    *("encoder_layerdrop", "decoder_layerdrop"),
    *("dropout", "attention_dropout", "activation_dropout", "activation_function", "init_std"),
    *("scale_embedding", "tie_word_embeddings", "pad_token_id", "eos_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeechToTextConfig:
    """The configuration of `SpeechToText`; names and defaults are those of transformers.

    Attributes:
      model_type: "speech_to_text".
      encoder_layerdrop: rate of dropped layers in training, which is not supported: a model with
        another rate than 0 only computes without dropout.
      decoder_layerdrop: the same in the decoder.
      scale_embedding: True if the results of the convolutions, and the decoder's embeddings of
        tokens, are multiplied by `sqrt(d_model)`.
      tie_word_embeddings: True if the logits are products with the decoder's embeddings.
      forced_bos_token_id: first token after the start token in generation, often the language; None
        for any.
      forced_eos_token_id: last token of a generation that reaches its largest length.
      conv_kernel_sizes: width of each convolution over time, odd numbers; each convolution has
        stride 2 and as much padding as keeps `floor((length - 1) / 2) + 1` frames.
      conv_channels: channels of every convolution but the last, before the gated linear unit,
        which halves them; the last one has `2 * d_model`.
      input_feat_per_channel: number of features of a frame, such as 80 log-mel energies.
      input_channels: number of channels, whose features stand side by side in a frame.
      mask_between_convolutions: True if the input of every convolution is zero at padding, so that
        no row depends on the padding beside it. False follows PyTorch's model, where the last frame
        of a padded row has read results at padding; and where frames have no positions if
        `pad_token_id` is 0, and padding has positions if it is above 1.

    Raises:
      ValueError: if a value is out of range, or `model_type` or the activation is unknown.

    References:
      Wang et al., fairseq S2T, AACL 2020, arXiv:2010.05171.
    """

    model_type: str = "speech_to_text"
    vocab_size: int = 10000
    d_model: int = 256
    encoder_layers: int = 12
    encoder_attention_heads: int = 4
    encoder_ffn_dim: int = 2048
    decoder_layers: int = 6
    decoder_attention_heads: int = 4
    decoder_ffn_dim: int = 2048
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    activation_function: str = "relu"
    init_std: float = 0.02
    scale_embedding: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 1
    eos_token_id: int | None = 2
    decoder_start_token_id: int | None = 2
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    conv_kernel_sizes: tuple[int, ...] = (5, 5)
    conv_channels: int = 1024
    input_feat_per_channel: int = 80
    input_channels: int = 1
    mask_between_convolutions: bool = False

    def __post_init__(self):
        if self.model_type != "speech_to_text":
            raise ValueError(
                f"unknown model_type={quote(self.model_type)}; it must be 'speech_to_text'"
            )
        self._check_front()
        self.transformer  # noqa: B018 - checks the other fields

    @functools.cached_property
    def transformer(self) -> Seq2SeqConfig:
        """The configuration of the encoder's and the decoder's layers, those of an M2M-100."""
        fields = {name: getattr(self, name) for name in _OF_LAYERS}
        return Seq2SeqConfig(model_type="m2m_100", **fields)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, under the name that all backbones share."""
        return self.d_model

    @property
    def target_vocab_size(self) -> int:
        """Number of tokens that the decoder reads and writes."""
        return self.vocab_size

    @property
    def max_positions(self) -> None:
        """None, because the sinusoids of both stacks do not end."""
        return None

    @property
    def feature_size(self) -> int:
        """Number of features of a frame, over all channels."""
        return self.input_feat_per_channel * self.input_channels

    def _check_front(self) -> None:
        names = ("d_model", "conv_channels", "input_feat_per_channel", "input_channels")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; use 1 or more")
        sizes = self.conv_kernel_sizes
        if not sizes or any(size < 1 or size % 2 == 0 for size in sizes):
            raise ValueError(
                f"conv_kernel_sizes={list(sizes)} must be odd numbers, at least one: an even "
                "kernel gives another length than that of the mask; use [5, 5]"
            )
        if self.conv_channels % 2:
            raise ValueError(
                f"conv_channels={self.conv_channels} is odd, and a gated linear unit halves it; "
                "use an even number"
            )


def _size(d_model: int, heads: int, inner: int, **more: Any) -> SpeechToTextConfig:
    stacks: dict[str, Any] = {
        f"{stack}_{name}": value
        for stack in ("encoder", "decoder")
        for name, value in (("attention_heads", heads), ("ffn_dim", inner))
    }
    return SpeechToTextConfig(d_model=d_model, **stacks, **more)


_MEDIUM = {"dropout": 0.15, "attention_dropout": 0.15, "activation_dropout": 0.15}
_MUST_C = {"tie_word_embeddings": False}

PUBLISHED: Mapping[str, SpeechToTextConfig] = {
    "facebook/s2t-small-librispeech-asr": _size(256, 4, 2048),
    "facebook/s2t-medium-librispeech-asr": _size(512, 8, 2048, **_MEDIUM),
    "facebook/s2t-large-librispeech-asr": _size(1024, 16, 4096),
    "facebook/s2t-small-mustc-en-de-st": _size(256, 4, 2048, vocab_size=8000, **_MUST_C),
    "facebook/s2t-medium-mustc-multilingual-st": _size(512, 8, 2048, **_MEDIUM, **_MUST_C),
}
"""Hub id -> configuration.

References:
  Wang et al., fairseq S2T: Fast Speech-to-Text Modeling with fairseq, AACL 2020, arXiv:2010.05171.
"""
