"""The layouts of AdapterHub's adapters in the families that it has, too."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from compacter_jax.messages import quote
from compacter_jax.models.bert.model import Bert
from compacter_jax.models.distilbert.model import DistilBert
from compacter_jax.models.seq2seq.model import Seq2Seq
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
      module_class: class of the modules; where a class has several layouts, `config.model_type` is
        one of `model_types`.
      model_types: names of the family in adapter_config.json; exports use the first.
      base: first part of the names of tensors in a model with a head.
      depths: module -> path of each stack of layers -> its number of layers. AdapterHub numbers the
        layers of the second stack after those of the first.
      hosts: stack -> location -> hosts below the path of a layer. `{wi}` is the first projection of
        the feed-forward network; of two, the one without activation.
      sites: location -> site.
      joins: pattern of a projection that ends a sub-layer -> the place where the sub-layer joins
        the residual; a bottleneck computes the same at both.
      renamed: last name in the path of a host, or location of prefixes -> AdapterHub's.
      embeddings: the host behind the embeddings where invertible adapters are; None if the family's
        are elsewhere.
      normalises_before: True if norms come before sub-layers, and none follows the sum with the
        residual.
      has_relative_positions: True if the self-attention that prefixes extend has biases of relative
        positions.
    """

    module_class: type[Any]
    model_types: tuple[str, ...]
    base: str
    depths: Callable[[Any], dict[str, int]]
    hosts: Mapping[str, Layer]
    sites: Mapping[str, str]
    joins: Mapping[str, str]
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    embeddings: str | None = None
    normalises_before: bool = False
    has_relative_positions: bool = False

    def join_of(self, host: str) -> str:
        """Returns where the sub-layer that ends with a host joins the residual, or the host."""
        for pattern, place in self.joins.items():
            if match := re.fullmatch(pattern, host):
                return match.expand(place)
        return host

    def check_invertible(self) -> None:
        """Raises ValueError if the family's invertible adapters are not supported."""
        if self.embeddings is None:
            raise ValueError(
                f"invertible adapters of AdapterHub are not supported for a {self.model_types[0]}, "
                "where they act elsewhere: in ELECTRA before the projection of the embeddings, in "
                "encoder-decoders on the decoder's embeddings, too"
            )

    def name_of(self, host: str) -> str:
        """Returns AdapterHub's name for a host."""
        *parents, last = host.split("/")
        return ".".join([*parents, self.renamed.get(last, last)])

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
    module_class=Bert,
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
    joins={r"(.+/output)/dense": r"\1"},
    embeddings="embeddings",
)

_ROBERTA, _XLM_ROBERTA = (
    dataclasses.replace(_BERT, model_types=(model_type,), base="roberta")
    for model_type in ("roberta", "xlm-roberta")
)
# There, AdapterHub's invertible adapters come before the projection of the embeddings.
_ELECTRA = dataclasses.replace(_BERT, model_types=("electra",), base="electra", embeddings=None)

_DISTILBERT = Layout(
    module_class=DistilBert,
    model_types=("distilbert",),
    base="distilbert",
    depths=lambda module: {"transformer/layer": module.config.n_layers},
    hosts={
        "transformer/layer": {
            "mh_adapter": ("attention_residual",),
            "output_adapter": ("output_residual",),
            **{matrix: (f"attention/{matrix}_lin",) for matrix in "qkv"},
            "intermediate_lora": ("ffn/lin1",),
            "output_lora": ("ffn/lin2",),
            "self_prefix": ("attention",),
        }
    },
    sites=_BERT.sites,
    joins={
        r"(.+)/attention/out_lin": r"\1/attention_residual",
        r"(.+)/ffn/lin2": r"\1/output_residual",
    },
    renamed={
        "attention_residual": "attention_adapters",
        "output_residual": "output_adapters",
        "self_prefix": "self",
    },
    embeddings="embeddings",
)

_WITH_DECODER = _SITES | {
    "cross_adapter": "residual_cross_attention",
    "encoder_prefix": "encoder_key_value",
    "self_prefix": "decoder_key_value",
    "cross_prefix": "cross_key_value",
}

_T5 = Layout(
    module_class=T5,
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
    sites=_WITH_DECODER,
    joins={r"(.+/layer/\d)/\w+/w?o": r"\1"},
    normalises_before=True,
    has_relative_positions=True,
)

_BART = Layout(
    module_class=Seq2Seq,
    model_types=("bart",),
    base="model",
    depths=lambda module: {
        "encoder/layers": module.config.encoder_layers,
        "decoder/layers": module.config.decoder_layers,
    },
    hosts={
        "encoder/layers": {
            "mh_adapter": ("self_attn_residual",),
            "output_adapter": ("feed_forward_residual",),
            **{matrix: (f"self_attn/{matrix}_proj",) for matrix in "qkv"},
            "intermediate_lora": ("fc1",),
            "output_lora": ("fc2",),
            "encoder_prefix": ("self_attn",),
        },
        "decoder/layers": {
            "mh_adapter": ("self_attn_residual",),
            "cross_adapter": ("encoder_attn_residual",),
            "output_adapter": ("feed_forward_residual",),
            **{m: (f"self_attn/{m}_proj", f"encoder_attn/{m}_proj") for m in "qkv"},
            "intermediate_lora": ("fc1",),
            "output_lora": ("fc2",),
            "self_prefix": ("self_attn",),
            "cross_prefix": ("encoder_attn",),
        },
    },
    sites=_WITH_DECODER,
    joins={
        r"(.+/(self|encoder)_attn)/out_proj": r"\1_residual",
        r"(.+)/fc2": r"\1/feed_forward_residual",
    },
    renamed={
        "self_attn_residual": "attention_adapters",
        "encoder_attn_residual": "cross_attention_adapters",
        "feed_forward_residual": "output_adapters",
    },
)

_MBART = dataclasses.replace(_BART, model_types=("mbart",), normalises_before=True)

_LAYOUTS = (_BERT, _ROBERTA, _XLM_ROBERTA, _ELECTRA, _DISTILBERT, _T5, _BART, _MBART)


def layout_of(module: Any) -> Layout:
    """Returns the layout of a backbone's family; raises ValueError if it is unknown."""
    config = getattr(module, "config", None)
    own_type = getattr(config, "model_type", None)
    if getattr(config, "is_compressed", False):
        raise ValueError(
            "adapters of AdapterHub are not supported for a compressed decoder, which transformers "
            "lacks"
        )
    for layout in _LAYOUTS:
        if isinstance(module, layout.module_class) and own_type in (None, *layout.model_types):
            return layout
    which = type(module).__name__
    if own_type and any(isinstance(module, layout.module_class) for layout in _LAYOUTS):
        which += f" of model_type={quote(own_type)}"
    known = dict.fromkeys(name for layout in _LAYOUTS for name in layout.model_types)
    raise ValueError(
        f"adapters of AdapterHub are not supported for a {which}; use a model of the types "
        f"{', '.join(known)}"
    )


def check_prefixed_layers(
    layout: Layout, layers: list[Layer], locations: Collection[str], leave_out: Collection[int]
) -> None:
    """Raises ValueError if `adapters` would lose the biases of relative positions.

    The first layer of a stack has the biases and passes them on. A layer gets zeros instead if it
    has prefixes and the one before does not, or the reverse.
    """
    if not layout.has_relative_positions:
        return
    for location in {"encoder_prefix", "self_prefix"} & set(locations):
        having = {number for number, layer in enumerate(layers) if location in layer}
        if having & set(leave_out) not in (set(), having):
            raise ValueError(
                f"prefix tuning in only some layers of a T5 stack ({location}, "
                f"leave_out={sorted(leave_out)}) is not supported: {VERSION} loses the relative "
                "position biases there"
            )
