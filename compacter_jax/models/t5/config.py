"""The configuration of T5, and the published sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from compacter_jax.nn.activations import ActivationFn, get_activation

HEADS = ("conditional_generation", None, "encoder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """The configuration of `T5`; names and defaults are those of transformers.

    Attributes:
      feed_forward_proj: an activation ("relu" for T5 v1.0), or "gated-" and an activation
        ("gated-gelu" for v1.1, Flan-T5 and mT5, with tanh as in transformers; "gated-silu").
      tie_word_embeddings: True if the language-modelling head is the word embedding and its input
        is scaled by `d_model ** -0.5`, as in T5 v1.0. The other versions have their own head,
        without scaling.

    Raises:
      ValueError: if a value is out of range or `feed_forward_proj` is unknown.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = None  # type: ignore[assignment]  # None: num_layers
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | None = 1
    decoder_start_token_id: int | None = 0

    def __post_init__(self):
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        for name in (
            "vocab_size",
            "d_model",
            "d_kv",
            "d_ff",
            "num_layers",
            "num_decoder_layers",
            "num_heads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; use 1 or more")
        buckets, distance = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        )
        if buckets < 4 or buckets % 4:
            raise ValueError(
                f"relative_attention_num_buckets={buckets} must be a multiple of 4: half of them "
                "for each direction, and half of those for single distances; use 32"
            )
        if distance <= buckets // 2:
            raise ValueError(
                f"relative_attention_max_distance={distance} must be more than half of "
                f"relative_attention_num_buckets={buckets}; use 128"
            )
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(
                f"dropout_rate={self.dropout_rate} is not a dropout rate; use 0 <= rate < 1"
            )
        if self.layer_norm_epsilon <= 0:
            raise ValueError(
                f"layer_norm_epsilon={self.layer_norm_epsilon} is not positive; use 1e-6"
            )
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{name}={token} is not in the vocabulary; use None or 0 <= {name} < "
                    f"vocab_size={self.vocab_size}"
                )
        self.feed_forward_activation()

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
        """None, because relative positions do not limit the number of tokens."""

    @property
    def is_gated(self) -> bool:
        """True if the feed-forward network multiplies two projections, as in v1.1 and later."""
        return self.feed_forward_proj.startswith("gated-")

    def feed_forward_activation(self) -> ActivationFn:
        """Returns the activation of `feed_forward_proj`; raises ValueError for an unknown one."""
        name = self.feed_forward_proj.removeprefix("gated-")
        # The released v1.1 checkpoints say "gated-gelu" and were trained with the tanh form.
        if self.feed_forward_proj == "gated-gelu":
            name = "gelu_new"
        try:
            return get_activation(name)
        except ValueError as error:
            raise ValueError(
                f"feed_forward_proj={self.feed_forward_proj!r}: {error}; use 'relu', 'gated-gelu', "
                "'gated-silu' or another of them, with or without 'gated-'"
            ) from None


def _sizes(
    d_model: int, d_kv: int, d_ff: int, num_layers: int, num_heads: int, **more: Any
) -> T5Config:
    return T5Config(
        d_model=d_model,
        d_kv=d_kv,
        d_ff=d_ff,
        num_layers=num_layers,
        num_heads=num_heads,
        **more,
    )


def _published() -> dict[str, T5Config]:
    configs = {
        "t5-small": _sizes(512, 64, 2048, 6, 8),
        "t5-base": _sizes(768, 64, 3072, 12, 12),
        "t5-large": _sizes(1024, 64, 4096, 24, 16),
        "t5-3b": _sizes(1024, 128, 16384, 24, 32),
        "t5-11b": _sizes(1024, 128, 65536, 24, 128),
    }
    gated = {
        "small": _sizes(512, 64, 1024, 8, 6, feed_forward_proj="gated-gelu"),
        "base": _sizes(768, 64, 2048, 12, 12, feed_forward_proj="gated-gelu"),
        "large": _sizes(1024, 64, 2816, 24, 16, feed_forward_proj="gated-gelu"),
        "xl": _sizes(2048, 64, 5120, 24, 32, feed_forward_proj="gated-gelu"),
        "xxl": _sizes(4096, 64, 10240, 24, 64, feed_forward_proj="gated-gelu"),
    }
    for size, tied in gated.items():
        config = dataclasses.replace(tied, tie_word_embeddings=False)
        configs[f"google/t5-v1_1-{size}"] = config
        configs[f"google/t5-{size}-lm-adapt"] = config
        configs[f"google/flan-t5-{size}"] = config
        configs[f"google/mt5-{size}"] = dataclasses.replace(config, vocab_size=250112)
    return configs


PUBLISHED: Mapping[str, T5Config] = _published()
"""Hub id -> configuration of the published sizes of T5, T5 v1.1, Flan-T5 and mT5.

References:
  Raffel et al., Exploring the Limits of Transfer Learning, JMLR 2020, arXiv:1910.10683; Xue et al.,
  mT5, NAACL 2021, arXiv:2010.11934; Chung et al., Flan, 2022, arXiv:2210.11416; Lester et al., the
  "lm-adapt" checkpoints, EMNLP 2021, arXiv:2104.08691.
"""
