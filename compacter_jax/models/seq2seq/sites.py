"""The sites of the encoder-decoders of the BART line, for both kinds of decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compacter_jax.sites import Site

_LAYER = r"(encoder|decoder)/layers/(?P<layer>\d+)/"
_ENCODER_LAYER = r"encoder/layers/(?P<layer>\d+)/"
_DECODER_LAYER = r"decoder/layers/(?P<layer>\d+)/"
_ATTENTION = _LAYER + "(self_attn|encoder_attn)"


def _attend(host: str) -> Site:
    return Site(host=host, method="attend", role="attend", length_axis=2)


def _join(host: str) -> Site:
    return Site(host=host, role="join")


STANDARD: Mapping[str, str | Site] = {
    "attention": _LAYER + "self_attn/out_proj",
    "cross_attention": _DECODER_LAYER + "encoder_attn/out_proj",
    "feed_forward": _LAYER + "fc2",
    "parallel_attention": Site(host=_LAYER + "self_attn", role="parallel"),
    "parallel_cross_attention": Site(host=_DECODER_LAYER + "encoder_attn", role="parallel"),
    "parallel_feed_forward": Site(
        host=_LAYER.removesuffix("/"), method="feed_forward", role="parallel"
    ),
    "residual_attention": _join(_LAYER + "self_attn_residual"),
    "residual_cross_attention": _join(_DECODER_LAYER + "encoder_attn_residual"),
    "residual_feed_forward": _join(_LAYER + "feed_forward_residual"),
    "query": _ATTENTION + "/q_proj",
    "key": _ATTENTION + "/k_proj",
    "value": _ATTENTION + "/v_proj",
    "output_projection": _ATTENTION + "/out_proj",
    "cross_query": _DECODER_LAYER + "encoder_attn/q_proj",
    "cross_key": _DECODER_LAYER + "encoder_attn/k_proj",
    "cross_value": _DECODER_LAYER + "encoder_attn/v_proj",
    "decoder_linear": _DECODER_LAYER + "((self|encoder)_attn/(encoder_)?(q|k|v|r|out)_proj|fc[12])",
    "intermediate": _LAYER + "fc1",
    "encoder_key_value": _attend(_ENCODER_LAYER + "self_attn"),
    "decoder_key_value": _attend(_DECODER_LAYER + "self_attn"),
    "cross_key_value": _attend(_DECODER_LAYER + "encoder_attn"),
    "embedding": Site(host="", method="embed_inputs", role="embedding"),
    "encoder_embedding": Site(host="encoder", method="embedded", role="embedded"),
    "decoder_embedding": Site(host="decoder", method="embedded", role="embedded"),
}
"""Site name -> `Site`, or its `host` as a string, where decoder layers have three sub-layers."""

# A layer of a compressed decoder is one attention, `encoder_attn`, whose output projection is that
# of the feed-forward network, and whose keys and values are those of source and target.
COMPRESSED: Mapping[str, str | Site] = {
    **{name: site for name, site in STANDARD.items() if "cross_" not in name},
    "attention": _ENCODER_LAYER + "self_attn/out_proj",
    "feed_forward": _LAYER + "(fc2|encoder_attn/out_proj)",
    "parallel_attention": Site(host=_ENCODER_LAYER + "self_attn", role="parallel"),
    "residual_attention": _join(_ENCODER_LAYER + "self_attn_residual"),
    "key": _ATTENTION + "/(encoder_)?k_proj",
    "value": _ATTENTION + "/(encoder_)?v_proj",
    "intermediate": _LAYER + "(fc1|encoder_attn/r_proj)",
    "decoder_key_value": _attend(_DECODER_LAYER + "encoder_attn"),
}
"""The same for a compressed decoder."""

_ABSENT = (
    "a layer of a compressed decoder has no cross-attention of its own: one attention reads source "
    "and target and ends in the feed-forward network; use the sites of feed_forward, or "
    "decoder_key_value for prefixes"
)
NOT_COMPRESSED: Mapping[str, str] = {name: _ABSENT for name in STANDARD if "cross_" in name}
"""Sites that a compressed decoder lacks -> the reason."""


class SitesOfDecoder:
    """The table of sites of a module's decoder; of the class, that of the standard decoder."""

    def __get__(self, module: Any, owner: type) -> Mapping[str, str | Site]:
        is_compressed = module is not None and module.config.decoder_layer == "compressed"
        return COMPRESSED if is_compressed else STANDARD
