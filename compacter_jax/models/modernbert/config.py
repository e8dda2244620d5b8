"""The configuration of ModernBERT, and the published sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from compacter_jax.messages import quote
from compacter_jax.nn.activations import get_activation

GLOBAL, LOCAL = "full_attention", "sliding_attention"

RATES = ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout")
"""Fields that are rates of dropout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModernBertConfig:
    """The configuration of `ModernBert`; names and defaults are those of transformers 4.

    transformers 5 has `layer_types` in place of `global_attn_every_n_layers`, and `rope_parameters`
    in place of the two bases; `load_backbone` reads both.

    Attributes:
      layer_types: for each layer "full_attention" or "sliding_attention"; None for a global layer
        every `global_attn_every_n_layers` from the first on.
      local_attention: width of the window of local layers: a query attends to keys at a distance of
        at most half of it.
      local_rope_theta: base of the rotary positions of local layers; None for that of global ones.

    Raises:
      ValueError: if a value is out of range, an activation is unknown, or `num_attention_heads`
        does not divide `hidden_size` into even widths.
    """

    vocab_size: int = 50368
    hidden_size: int = 768
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    intermediate_size: int = 1152
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    initializer_cutoff_factor: float | None = 2.0
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    decoder_bias: bool = True
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    classifier_pooling: Literal["cls", "mean"] = "cls"
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    classifier_dropout: float = 0.0
    layer_types: tuple[str, ...] | None = None
    global_attn_every_n_layers: int = 3
    local_attention: int = 128
    global_rope_theta: float = 160_000.0
    local_rope_theta: float | None = 10_000.0
    pad_token_id: int | None = 50283
    tie_word_embeddings: bool = True

    def __post_init__(self):
        for name in (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
            *("intermediate_size", "max_position_embeddings", "global_attn_every_n_layers"),
            *("local_attention", "norm_eps", "global_rope_theta", "local_rope_theta"),
            "initializer_cutoff_factor",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} is not positive")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide "
                f"hidden_size={self.hidden_size} into heads of even width, which rotary positions "
                "need"
            )
        for name in RATES:
            rate = getattr(self, name)
            if not 0 <= rate < 1:
                raise ValueError(f"{name}={rate} is not a dropout rate; use 0 <= {name} < 1")
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range={self.initializer_range} is negative; use 0.02")
        if self.classifier_pooling not in ("cls", "mean"):
            raise ValueError(
                f"classifier_pooling={quote(self.classifier_pooling)} is unknown; use 'cls' or "
                "'mean'"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id} is not in the vocabulary; use None or "
                f"0 <= pad_token_id < vocab_size={self.vocab_size}"
            )
        self._check_layer_types()
        get_activation(self.hidden_activation)
        get_activation(self.classifier_activation)

    def _check_layer_types(self) -> None:
        types = self.layer_types
        if types is None:
            return
        if len(types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(types)} entries for num_hidden_layers="
                f"{self.num_hidden_layers}; give one for each layer"
            )
        for name in types:
            if name not in (GLOBAL, LOCAL):
                raise ValueError(f"layer_types has {quote(name, 60)}; use {GLOBAL!r} or {LOCAL!r}")

    # The names that `compacter_jax.models.encoder` reads.
    model_type = "modernbert"
    type_vocab_size = 0

    @property
    def max_positions(self) -> int:
        """Largest number of tokens."""
        return self.max_position_embeddings

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of attention of each layer, `GLOBAL` or `LOCAL`."""
        if self.layer_types is not None:
            return self.layer_types
        every = self.global_attn_every_n_layers
        return tuple(LOCAL if i % every else GLOBAL for i in range(self.num_hidden_layers))

    @property
    def last_std(self) -> float:
        """Deviation of the initial weights of the last layer of a sub-layer."""
        return self.initializer_range / math.sqrt(2 * self.num_hidden_layers)

    def rate_before(self, head: str | None) -> float:
        """Returns the rate of dropout before a linear head."""
        del head
        return self.classifier_dropout

    def rotary_base(self, kind: str) -> float:
        """Returns the base of the rotary positions of a kind of layers."""
        local = self.local_rope_theta
        return self.global_rope_theta if kind == GLOBAL or local is None else local

    def window(self, kind: str) -> int | None:
        """Returns the largest distance that layers of a kind attend over; None for no limit."""
        return None if kind == GLOBAL else self.local_attention // 2


PUBLISHED: Mapping[str, ModernBertConfig] = {
    "answerdotai/ModernBERT-base": ModernBertConfig(classifier_pooling="mean"),
    "answerdotai/ModernBERT-large": ModernBertConfig(
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        intermediate_size=2624,
        classifier_pooling="mean",
    ),
}
"""Hub id -> configuration of the published sizes, arXiv:2412.13663."""
