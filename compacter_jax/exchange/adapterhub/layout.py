"""The layout of AdapterHub's adapters in BERT and T5."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from compacter_jax.models.bert.model import Bert
from compacter_jax.models.t5.model import T5

# The release whose behaviour this library reproduces; exported folders name it.
VERSION = "adapters.1.3.0"

# Location -> hosts of one layer.
Layer = Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of AdapterHub's adapters in a family of backbones.

    A location is a place of adapters in AdapterHub's configurations: the field that puts adapters
    there, a letter of `attn_matrices`, or the name of an attention's prefixes.

    Attributes:
      model_types: names of the family in adapter_config.json; exports use the first.
      base: first part of the names of tensors in a model with a head.
      depths: module -> path of each stack of layers -> its number of layers. AdapterHub numbers the
        layers of the second stack after those of the first.
      hosts: stack -> location -> hosts below the path of a layer. `{wi}` is the first projection of
        the feed-forward network; of two, the one without activation.
      sites: location -> site.
    """

    model_types: tuple[str, ...]
    base: str
    depths: Callable[[Any], dict[str, int]]
    hosts: Mapping[str, Layer]
    sites: Mapping[str, str]

    def layers(self, module: Any) -> list[Layer]:
        """Returns the layers in the order of AdapterHub's numbers."""
        wi = "wi_1" if getattr(module.config, "is_gated", False) else "wi"
        return [
            {
                location: tuple(f"{stack}/{i}/{host.format(wi=wi)}" for host in hosts)
                for location, hosts in self.hosts[stack].items()
            }
            for stack, depth in self.depths(module).items()
            for i in range(depth)
        ]


def _t5_depths(module: T5) -> dict[str, int]:
    depths = {"encoder/block": module.config.num_layers}
    if module.head != "encoder":
        depths["decoder/block"] = module.config.num_decoder_layers
    return depths


_SITES = {
    "mh_adapter": "residual_attention",
    "output_adapter": "residual_feed_forward",
    "q": "query",
    "k": "key",
    "v": "value",
    "intermediate_lora": "intermediate",
    "output_lora": "feed_forward",
}

_BERT = Layout(
    model_types=("bert",),
    base="bert",
    depths=lambda module: {"encoder/layer": module.config.num_hidden_layers},
    hosts={
        "encoder/layer": {
            "mh_adapter": ("attention/output",),
            "output_adapter": ("output",),
            "q": ("attention/self/query",),
            "k": ("attention/self/key",),
            "v": ("attention/self/value",),
            "intermediate_lora": ("intermediate/dense",),
            "output_lora": ("output/dense",),
            "self_prefix": ("attention/self",),
        }
    },
    sites=_SITES | {"self_prefix": "encoder_key_value"},
)

_T5 = Layout(
    model_types=("t5", "mt5"),
    base="transformer",
    depths=_t5_depths,
    hosts={
        "encoder/block": {
            "mh_adapter": ("layer/0",),
            "output_adapter": ("layer/1",),
            "q": ("layer/0/SelfAttention/q",),
            "k": ("layer/0/SelfAttention/k",),
            "v": ("layer/0/SelfAttention/v",),
            "intermediate_lora": ("layer/1/DenseReluDense/{wi}",),
            "output_lora": ("layer/1/DenseReluDense/wo",),
            "encoder_prefix": ("layer/0/SelfAttention",),
        },
        "decoder/block": {
            "mh_adapter": ("layer/0",),
            "cross_adapter": ("layer/1",),
            "output_adapter": ("layer/2",),
            "q": ("layer/0/SelfAttention/q", "layer/1/EncDecAttention/q"),
            "k": ("layer/0/SelfAttention/k", "layer/1/EncDecAttention/k"),
            "v": ("layer/0/SelfAttention/v", "layer/1/EncDecAttention/v"),
            "intermediate_lora": ("layer/2/DenseReluDense/{wi}",),
            "output_lora": ("layer/2/DenseReluDense/wo",),
            "self_prefix": ("layer/0/SelfAttention",),
            "cross_prefix": ("layer/1/EncDecAttention",),
        },
    },
    sites=_SITES
    | {
        "cross_adapter": "residual_cross_attention",
        "encoder_prefix": "encoder_key_value",
        "self_prefix": "decoder_key_value",
        "cross_prefix": "cross_key_value",
    },
)

_LAYOUTS = {Bert: _BERT, T5: _T5}


def layout_of(module: Any) -> Layout:
    """Returns the layout of a backbone's family; raises ValueError if it is unknown."""
    for cls, layout in _LAYOUTS.items():
        if isinstance(module, cls):
            return layout
    raise ValueError(
        f"adapters of AdapterHub are not supported for a {type(module).__name__}; use "
        f"{' or '.join(cls.__name__ for cls in _LAYOUTS)}"
    )


def has_relative_positions(layout: Layout) -> bool:
    """Returns True if the self-attention that prefixes extend has biases of relative positions."""
    return layout is _T5


def check_prefixed_layers(
    layout: Layout, layers: list[Layer], locations: Collection[str], leave_out: Collection[int]
) -> None:
    """Raises ValueError if `adapters` would lose the biases of relative positions.

    The first layer of a stack has the biases and passes them on. A layer gets zeros instead if it
    has prefixes and the one before does not, or the reverse.
    """
    if not has_relative_positions(layout):
        return
    for location in {"encoder_prefix", "self_prefix"} & set(locations):
        having = {number for number, layer in enumerate(layers) if location in layer}
        if having & set(leave_out) not in (set(), having):
            raise ValueError(
                f"prefix tuning in only some layers of a T5 stack ({location}, "
                f"leave_out={sorted(leave_out)}) is not supported: {VERSION} loses the relative "
                "position biases there"
            )
