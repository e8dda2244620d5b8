"""The configuration of the encoder-decoders of the BART line, and the published sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from compacter_jax.messages import quote
from compacter_jax.nn.activations import ActivationFn, get_activation

HEADS = ("conditional_generation", None)

# The positions are learned, sinusoids of M2M-100 or sinusoids of Marian.
Positions = Literal["learned", "m2m_100", "marian"]

# The layers of the decoder have three sub-layers, or the one of `CompressedAttention`.
DecoderLayer = Literal["standard", "compressed"]

# `model_type` -> what its layers do, which config.json does not say.
_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "m2m_100": {
        "normalize_before": True,
        "positions": "m2m_100",
        "normalize_embedding": False,
        "last_norms": True,
        "logits_bias": False,
    },
    "mbart": {
        "normalize_before": True,
        "positions": "learned",
        "normalize_embedding": True,
        "last_norms": True,
        "logits_bias": True,
    },
    "bart": {
        "normalize_before": False,
        "positions": "learned",
        "normalize_embedding": True,
        "last_norms": False,
        "logits_bias": True,
    },
    "marian": {
        "normalize_before": False,
        "positions": "marian",
        "normalize_embedding": False,
        "last_norms": False,
        "logits_bias": True,
    },
}

MODEL_TYPES = tuple(_VARIANTS)
# Fields that follow from `model_type`; transformers ignores such names in an old config.json, too.
DERIVED = tuple(_VARIANTS["bart"])
RATES = ("dropout", "attention_dropout", "activation_dropout")
# Inner widths of the feed-forward networks.
WIDTHS = ("encoder_ffn_dim", "decoder_ffn_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """The configuration of `Seq2Seq`; names and defaults are those of transformers' M2M-100.

    Attributes:
      model_type: "m2m_100" (M2M-100, NLLB-200), "mbart" (mBART, mBART-50), "bart" or "marian"
        (OPUS-MT); it decides on the fields that are None.
      decoder_vocab_size: size of the decoder's vocabulary where encoder and decoder do not share
        their embeddings; None for `vocab_size`.
      max_position_embeddings: largest number of tokens; M2M-100 reads longer inputs, too.
      decoder_layer: "standard" layers of self-attention, cross-attention and feed-forward network,
        or "compressed" ones of one `CompressedAttention`, which transformers lacks.
      decoder_value_dim: width of the values of a compressed decoder; None for `decoder_ffn_dim`.
      encoder_layerdrop: rate of dropped layers in training, which is not supported: a model with
        another rate than 0 only computes without dropout.
      decoder_layerdrop: the same in the decoder.
      scale_embedding: True if embeddings of tokens are multiplied by `sqrt(d_model)`.
      share_encoder_decoder_embeddings: True if encoder and decoder have the same embeddings.
      tie_word_embeddings: True if the logits are products with the decoder's embeddings.
      forced_bos_token_id: first token after the start token in generation; None for any.
      forced_eos_token_id: last token of a generation that reaches its largest length.
      normalize_before: True if a sub-layer normalises its input, False if the sum with the
        residual is normalised.
      positions: "learned" embeddings, or sinusoids "m2m_100" or "marian".
      normalize_embedding: True for a norm of the embeddings, positions included.
      last_norms: True for a norm after each stack.
      logits_bias: True for a bias of the logits.

    Raises:
      ValueError: if a value is out of range, or `model_type` or the activation is unknown.
    """

    model_type: str = "m2m_100"
    vocab_size: int = 128112
    decoder_vocab_size: int | None = None
    max_position_embeddings: int = 1024
    d_model: int = 1024
    encoder_layers: int = 12
    encoder_attention_heads: int = 16
    encoder_ffn_dim: int = 4096
    decoder_layers: int = 12
    decoder_attention_heads: int = 16
    decoder_ffn_dim: int = 4096
    decoder_layer: DecoderLayer = "standard"
    decoder_value_dim: int | None = None
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    activation_function: str = "relu"
    init_std: float = 0.02
    scale_embedding: bool = True
    share_encoder_decoder_embeddings: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 1
    eos_token_id: int | None = 2
    decoder_start_token_id: int | None = 2
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    normalize_before: bool = None  # type: ignore[assignment]  # None: as `model_type` has it
    positions: Positions = None  # type: ignore[assignment]
    normalize_embedding: bool = None  # type: ignore[assignment]
    last_norms: bool = None  # type: ignore[assignment]
    logits_bias: bool = None  # type: ignore[assignment]

    def __post_init__(self):
        if self.model_type not in _VARIANTS:
            raise ValueError(
                f"unknown model_type={quote(self.model_type)}; use one of {', '.join(MODEL_TYPES)}"
            )
        for name, value in _VARIANTS[self.model_type].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check_sizes()
        self._check_decoder()
        self._check_rates()
        self._check_tokens()
        self.activation()

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, under the name that all backbones share."""
        return self.d_model

    @property
    def is_compressed(self) -> bool:
        """True if a layer of the decoder is one `CompressedAttention`."""
        return self.decoder_layer == "compressed"

    @property
    def value_features(self) -> int:
        """Width of the values of a compressed decoder, over all heads."""
        given = self.decoder_value_dim
        return self.decoder_ffn_dim if given is None else given

    @property
    def target_vocab_size(self) -> int:
        """Number of tokens that the decoder reads and writes."""
        if self.share_encoder_decoder_embeddings or self.decoder_vocab_size is None:
            return self.vocab_size
        return self.decoder_vocab_size

    @property
    def max_positions(self) -> int | None:
        """Largest number of tokens; None for the sinusoids of M2M-100, which do not end."""
        return None if self.positions == "m2m_100" else self.max_position_embeddings

    @property
    def never_generated(self) -> tuple[int, ...]:
        """Tokens that generation never chooses: of Marian the padding, its start token."""
        is_marian = self.model_type == "marian" and self.pad_token_id is not None
        return (self.pad_token_id,) if is_marian else ()  # type: ignore[return-value]

    def activation(self) -> ActivationFn:
        """Returns the activation of the feed-forward networks; raises ValueError if unknown."""
        return get_activation(self.activation_function)

    def _check_sizes(self) -> None:
        stacks = ("encoder", "decoder")
        kinds = ("layers", "attention_heads", "ffn_dim")
        names = [f"{stack}_{kind}" for stack in stacks for kind in kinds]
        for name in ("vocab_size", "max_position_embeddings", "d_model", *names):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; use 1 or more")
        if self.decoder_vocab_size is not None and self.decoder_vocab_size < 1:
            raise ValueError(f"decoder_vocab_size={self.decoder_vocab_size} is not positive")
        for stack in stacks:
            heads = getattr(self, f"{stack}_attention_heads")
            if self.d_model % heads:
                raise ValueError(
                    f"{stack}_attention_heads={heads} does not divide d_model={self.d_model}"
                )
        if self.positions not in ("learned", "m2m_100", "marian"):
            raise ValueError(
                f"unknown positions={quote(self.positions)}; use 'learned', 'm2m_100' or 'marian'"
            )
        if self.positions == "m2m_100" and self.d_model < 4:
            raise ValueError(
                f"d_model={self.d_model} is too small for the sinusoids of M2M-100; use 4 or more"
            )

    def _check_decoder(self) -> None:
        if self.decoder_layer not in ("standard", "compressed"):
            raise ValueError(
                f"unknown decoder_layer={quote(self.decoder_layer)}; use 'standard' or 'compressed'"
            )
        if not self.is_compressed:
            if self.decoder_value_dim is not None:
                raise ValueError(
                    f"decoder_value_dim={self.decoder_value_dim} is for "
                    "decoder_layer='compressed'; leave it out"
                )
            return
        name = "decoder_ffn_dim" if self.decoder_value_dim is None else "decoder_value_dim"
        if self.value_features < 1:
            raise ValueError(f"{name}={self.value_features} is not positive; use 1 or more")
        if self.value_features % self.decoder_attention_heads:
            raise ValueError(
                f"decoder_attention_heads={self.decoder_attention_heads} does not divide "
                f"{name}={self.value_features}, the width of a compressed decoder's values"
            )

    def _check_rates(self) -> None:
        for name in (*RATES, "encoder_layerdrop", "decoder_layerdrop"):
            rate = getattr(self, name)
            if not 0 <= rate < 1:
                raise ValueError(f"{name}={rate} is not a dropout rate; use 0 <= rate < 1")

    def _check_tokens(self) -> None:
        size = min(self.vocab_size, self.target_vocab_size)
        for name in (
            "pad_token_id",
            "eos_token_id",
            "decoder_start_token_id",
            "forced_bos_token_id",
            "forced_eos_token_id",
        ):
            token = getattr(self, name)
            if token is not None and not 0 <= token < size:
                raise ValueError(
                    f"{name}={token} is not in the vocabulary; use None or 0 <= {name} < {size}"
                )


def _sizes(d_model: int, layers: int, heads: int, inner: int, **more: Any) -> Seq2SeqConfig:
    stacks: dict[str, Any] = {
        f"{stack}_{name}": value
        for stack in ("encoder", "decoder")
        for name, value in (("layers", layers), ("attention_heads", heads), ("ffn_dim", inner))
    }
    return Seq2SeqConfig(d_model=d_model, **stacks, **more)


_NLLB = {"vocab_size": 256206}
_BART: Mapping[str, Any] = {
    "model_type": "bart",
    "vocab_size": 50265,
    "activation_function": "gelu",
    "attention_dropout": 0.1,
    "scale_embedding": False,
    "forced_eos_token_id": 2,
}
_MBART: Mapping[str, Any] = {
    "model_type": "mbart",
    "activation_function": "gelu",
    "attention_dropout": 0.0,
    "forced_eos_token_id": 2,
}
_MARIAN: Mapping[str, Any] = {
    "model_type": "marian",
    "vocab_size": 58101,
    "max_position_embeddings": 512,
    "activation_function": "swish",
    "attention_dropout": 0.0,
    "pad_token_id": 58100,
    "eos_token_id": 0,
    "decoder_start_token_id": 58100,
    "forced_eos_token_id": 0,
}

PUBLISHED: Mapping[str, Mapping[str, Seq2SeqConfig]] = {
    "m2m_100": {
        "facebook/m2m100_418M": _sizes(1024, 12, 16, 4096),
        "facebook/m2m100_1.2B": _sizes(1024, 24, 16, 8192),
        "facebook/nllb-200-distilled-600M": _sizes(1024, 12, 16, 4096, **_NLLB),
        "facebook/nllb-200-distilled-1.3B": _sizes(1024, 24, 16, 8192, **_NLLB),
        "facebook/nllb-200-1.3B": _sizes(1024, 24, 16, 8192, **_NLLB),
        "facebook/nllb-200-3.3B": _sizes(2048, 24, 16, 8192, **_NLLB),
    },
    "mbart": {
        "facebook/mbart-large-50": _sizes(1024, 12, 16, 4096, vocab_size=250054, **_MBART),
    },
    "bart": {
        "facebook/bart-base": _sizes(768, 6, 12, 3072, **_BART),
        "facebook/bart-large": _sizes(1024, 12, 16, 4096, **_BART),
    },
    "marian": {"Helsinki-NLP/opus-mt-en-de": _sizes(512, 6, 8, 2048, **_MARIAN)},
}
"""`model_type` -> hub id -> configuration; LayerDrop, which training here lacks, is 0 in all.

References:
  Fan et al., M2M-100, JMLR 2021, arXiv:2010.11125; NLLB Team, arXiv:2207.04672; Liu et al., mBART,
  TACL 2020, arXiv:2001.08210; Tang et al., mBART-50, arXiv:2008.00401; Lewis et al., BART, ACL
  2020, arXiv:1910.13461; Tiedemann and Thottingal, OPUS-MT, EAMT 2020.
"""
