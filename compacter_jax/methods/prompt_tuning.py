"""Prompt tuning: learned embeddings before those of the input tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax import Array

from compacter_jax.methods.base import InsertedConfig, SiteCall, SitesOf
from compacter_jax.methods.fields import choose, require
from compacter_jax.nn.dense import Dtype
from compacter_jax.paths import ADAPTER
from compacter_jax.sites import Role


class SoftPrompt(nn.Module):
    """Learned embeddings that replace the first `prompt_length` embeddings.

    Attributes:
      config: length and initial values; `init_adapters` sets those from the vocabulary.
      dtype: dtype of the computation; None promotes as flax does.
      param_dtype: dtype of the parameter.

    References:
      arXiv:2104.08691, section 2.
    """

    config: PromptTuningConfig
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [batch, length, width] -> the same shape
        batch, _, width = x.shape
        half = self.config.prompt_init_range
        init = nn.initializers.uniform(2 * half)
        prompt = self.param(
            "prompt",
            lambda *args: init(*args) - half,
            (self.config.prompt_length, width),
            self.param_dtype,
        )
        x, prompt = promote_dtype(x, prompt, dtype=self.dtype)
        prompt = jnp.broadcast_to(prompt, (batch, *prompt.shape))
        return jnp.concatenate([prompt, x[:, prompt.shape[1] :]], axis=1)


PROMPT_INITS = ("random", "vocabulary")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(InsertedConfig):
    """Learned embeddings before those of the (encoder's) input tokens.

    Attributes:
      prompt_length: number of embeddings.
      prompt_init: `random` for uniform values, `vocabulary` for embeddings of the backbone's
        tokens.
      prompt_init_range: largest absolute value of `random`.
      prompt_token_ids: tokens for `vocabulary`, repeated if they are fewer than `prompt_length`.

    References:
      Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning, EMNLP 2021,
      arXiv:2104.08691.
    """

    kind: ClassVar[str] = "prompt_tuning"
    heading: ClassVar[str] = "for prompt-tuning-random and -vocabulary"
    roles: ClassVar[tuple[Role, ...]] = ("embedding",)
    adds_tokens: ClassVar[bool] = True

    sites: tuple[str, ...] = ("embedding",)
    prompt_length: int = 100
    prompt_init: str = "random"
    prompt_init_range: float = 0.5
    prompt_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.prompt_length >= 1, "prompt_length", self.prompt_length, "at least 1")
        require(self.prompt_init_range > 0, "prompt_init_range", self.prompt_init_range, "above 0")
        choose("prompt_init", self.prompt_init, PROMPT_INITS)
        for token in self.prompt_token_ids:
            require(token >= 0, "prompt_token_ids", token, "ids of tokens, from 0 on")

    def needs_token_ids(self) -> bool:
        """Returns True if prompts start from the vocabulary, and no tokens are named."""
        return self.prompt_init == "vocabulary" and not self.prompt_token_ids

    @property
    def extra_tokens(self) -> int:
        """Number of input tokens that the method reserves in front of a sequence."""
        return self.prompt_length

    @property
    def allows_unadapted_rows(self) -> bool:
        """False, because a row without a prompt would have placeholder tokens without a meaning."""
        return False

    def unmergeable(self, sites_of: SitesOf) -> str | None:
        """Returns why weights of the backbone cannot express the method."""
        del sites_of
        return "it adds tokens to attend to, not weights"

    def act(self, call: SiteCall, x: Any, context: Any) -> Any:
        """Replaces the first embeddings by the prompt."""
        del context
        return call.layer(SoftPrompt, x, self, inputs=(x,), plain=x)

    def initial_values(
        self, backbone: Any, given: Mapping[str, Any], new: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns prompts from the vocabulary, the embeddings of the given tokens in turn.

        Raises:
          ValueError: if no tokens are given, a token is not in the vocabulary, or the backbone does
            not say where its embeddings are.
        """
        if self.prompt_init != "vocabulary":
            return {}
        path = getattr(backbone, "word_embeddings", "")
        if path not in given:
            raise ValueError(
                f"prompt_init='vocabulary' needs {type(backbone).__name__} to have a class "
                "attribute word_embeddings, the path of its embeddings; or use "
                "prompt_init='random'"
            )
        table, scale = given[path], getattr(backbone, "embedding_scale", 1.0)
        ids = self.prompt_token_ids
        if not ids:
            raise ValueError(
                "prompt_init='vocabulary' needs prompt_token_ids, such as the most common tokens "
                "of the task or the tokens of its label names"
            )
        if max(ids) >= len(table):
            raise ValueError(
                f"prompt_token_ids contains {max(ids)}, but the vocabulary has {len(table)} tokens"
            )
        chosen = np.resize(ids, self.prompt_length)
        return {
            path: (jnp.asarray(table)[chosen] * scale).astype(leaf.dtype)
            for path, leaf in new.items()
            if path.endswith(f"{ADAPTER}/prompt")
        }
