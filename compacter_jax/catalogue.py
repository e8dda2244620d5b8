"""The catalogue: presets by name, kinds of methods and compositions, and methods as JSON."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

from compacter_jax.compositions.average import Average, AverageMaps
from compacter_jax.compositions.bank import Bank
from compacter_jax.compositions.base import Composition
from compacter_jax.compositions.parallel import Parallel
from compacter_jax.compositions.stack import Stack
from compacter_jax.messages import quote
from compacter_jax.methods.base import FullFineTuningConfig, MethodConfig, did_you_mean
from compacter_jax.methods.bitfit import BitFitConfig
from compacter_jax.methods.bottleneck import BottleneckConfig, LowRankBottleneckConfig
from compacter_jax.methods.combined import CombinedConfig
from compacter_jax.methods.compacter import PHMBottleneckConfig
from compacter_jax.methods.head_only import HeadOnlyConfig
from compacter_jax.methods.ia3 import IA3Config
from compacter_jax.methods.intrinsic import IntrinsicConfig
from compacter_jax.methods.invertible import InvertibleConfig
from compacter_jax.methods.lora import LoRAConfig
from compacter_jax.methods.prefix_tuning import PrefixTuningConfig
from compacter_jax.methods.prompt_tuning import PromptTuningConfig
from compacter_jax.methods.trained_sites import TrainedSitesConfig

COMPOSITIONS: dict[str, type[Composition]] = {
    cls.kind: cls for cls in (Bank, Stack, Parallel, Average, AverageMaps)
}


_PARALLEL = BottleneckConfig(
    sites=("parallel_feed_forward",),
    parallel=True,
    reduction_factor=2,
    non_linearity="relu",
    w_init="lora",
)


_EMBEDDINGS: dict[str, Any] = {
    "sites": ("encoder_embedding", "decoder_embedding"),
    "reduction_factor": 2,
    "non_linearity": "relu",
    "layer_norm_before": True,
}
_BESIDE: dict[str, Any] = {
    "sites": ("parallel_attention", "parallel_feed_forward"),
    "reduction_factor": 2,
    "non_linearity": "relu",
    "parallel": True,
}
_ST: dict[str, Any] = {
    "sites": ("feed_forward",),
    "reduction_factor": 2,
    "non_linearity": "relu",
    "layer_norm_before": True,
}
_ZERO_UP: dict[str, Any] = {"w_init": "glorot-uniform", "w_init_up": "zeros"}


@dataclasses.dataclass(frozen=True)
class Preset:
    """A row of the table of presets.

    Attributes:
      name: of the preset.
      method: what it stands for.
      learning_rate: published with it, of T5 where there is one for T5.
      summary: one line on what it inserts or trains.
      source: of the method, its values and the learning rate.
    """

    name: str
    method: MethodConfig
    learning_rate: float
    summary: str
    source: str

    def as_row(self) -> str:
        """Returns the row in Markdown."""
        rate = f"{self.learning_rate:.0e}".replace("e-0", "e-")
        return f"| `{self.name}` | {self.summary} | {rate} | {self.source} |"


_COMPACTER = "arXiv:2106.04647"


_ROWS = (
    Preset("full", FullFineTuningConfig(), 3e-4, "every parameter", _COMPACTER),
    Preset(
        "head-only",
        HeadOnlyConfig(),
        3e-3,
        "nothing of the backbone: the baseline of a classifier on its frozen features",
        "the rate was chosen here",
    ),
    Preset(
        "houlsby",
        BottleneckConfig(train_layer_norms=True),
        3e-4,
        "dense bottlenecks after attention and feed-forward",
        _COMPACTER,
    ),
    Preset(
        "pfeiffer-attention",
        BottleneckConfig(sites=("attention",), train_layer_norms=True),
        3e-4,
        "dense bottlenecks after self-attention alone, the paper's Pfeiffer",
        _COMPACTER,
    ),
    Preset(
        "pfeiffer-feed-forward",
        BottleneckConfig(
            sites=("residual_feed_forward",),
            reduction_factor=16,
            non_linearity="relu",
            w_init_range=2e-2,
            original_ln_before=True,
        ),
        1e-4,
        "AdapterHub's `seq_bn`: after feed-forward, on the normalised sum with the residual; "
        "ReLU, `width // 16`, layer norms frozen",
        "arXiv:2005.00052",
    ),
    Preset(
        "adapterdrop",
        BottleneckConfig(leave_out=(0, 1, 2, 3, 4), train_layer_norms=True),
        3e-4,
        "`houlsby` without the first five layers of encoder and decoder",
        f"{_COMPACTER}, arXiv:2010.11918",
    ),
    Preset(
        "low-rank",
        LowRankBottleneckConfig(train_layer_norms=True),
        3e-3,
        "projections of rank 1, both sites",
        _COMPACTER,
    ),
    Preset(
        "phm",
        PHMBottleneckConfig(
            phm_dim=12,
            factorized_phm_W=False,
            shared_phm_rule=False,
            phm_init_range=1e-2,
            train_layer_norms=True,
        ),
        3e-3,
        "PHM-Adapter: `phm_dim=12`, one rule per projection (standard deviation 0.01, whatever "
        "the released flags say), full blocks, both sites",
        _COMPACTER,
    ),
    Preset(
        "compacter",
        PHMBottleneckConfig(train_layer_norms=True),
        3e-3,
        "`phm_dim=4`, one shared rule, rank-one blocks, both sites",
        _COMPACTER,
    ),
    Preset(
        "compacter++",
        PHMBottleneckConfig(sites=("feed_forward",), train_layer_norms=True),
        3e-3,
        "Compacter after feed-forward alone",
        _COMPACTER,
    ),
    Preset(
        "compacter++-short",
        PHMBottleneckConfig(
            sites=("feed_forward",), phm_c_init="glorot", w_init_up="zeros", train_layer_norms=True
        ),
        3e-3,
        "`compacter++` for short runs: the rule at Glorot's size, `up` zero at first",
        f"initial values chosen here; {_COMPACTER}",
    ),
    Preset(
        "bitfit",
        BitFitConfig(),
        3e-4,
        "biases; in T5 new ones at all linear layers, at norms within layers and at the logits",
        f"{_COMPACTER}, arXiv:2106.10199",
    ),
    Preset(
        "prompt-tuning-random",
        PromptTuningConfig(),
        3e-2,
        "100 embeddings before the input, uniform on [-0.5, 0.5]",
        f"{_COMPACTER}, arXiv:2104.08691",
    ),
    Preset(
        "prompt-tuning-vocabulary",
        PromptTuningConfig(prompt_init="vocabulary"),
        3e-1,
        "100 embeddings before the input, from the embeddings of `prompt_token_ids`",
        f"{_COMPACTER}, arXiv:2104.08691",
    ),
    Preset(
        "intrinsic-said",
        IntrinsicConfig(),
        3e-2,
        "all weights within 20,000 dimensions, a scale for each layer",
        f"{_COMPACTER}, arXiv:2012.13255",
    ),
    Preset(
        "intrinsic",
        IntrinsicConfig(structure_aware=False),
        3e-2,
        "all weights within 20,000 dimensions, without scales",
        f"arXiv:2012.13255; the rate is that of {_COMPACTER} for `intrinsic-said`",
    ),
    Preset(
        "lora",
        LoRAConfig(),
        5e-4,
        "rank 8 on queries and values, `lora_alpha` 8",
        "arXiv:2106.09685, table 9 (RoBERTa)",
    ),
    Preset(
        "ia3",
        IA3Config(),
        3e-3,
        "factors on keys, values and inner feed-forward activations",
        "arXiv:2205.05638",
    ),
    Preset(
        "prefix-tuning",
        PrefixTuningConfig(),
        2e-4,
        "30 keys and values before each attention's, through a bottleneck of 512",
        "AdapterHub's `prefix_tuning`, arXiv:2101.00190; the rate was chosen here",
    ),
    Preset(
        "parallel",
        _PARALLEL,
        1e-4,
        "a bottleneck of `width // 2` beside feed-forward, ReLU, `up` zero at first",
        "arXiv:2110.04366",
    ),
    Preset(
        "scaled-parallel",
        _PARALLEL.replace(scaling=4.0),
        1e-4,
        "`parallel`, its output times 4",
        "arXiv:2110.04366",
    ),
    Preset(
        "mam",
        CombinedConfig(
            parts=(PrefixTuningConfig(bottleneck_size=800), _PARALLEL.replace(scaling=4.0))
        ),
        1e-4,
        "`scaled-parallel` with 30 prefixes, through a bottleneck of 800",
        "AdapterHub's `mam`; arXiv:2110.04366",
    ),
    Preset(
        "ciat",
        CombinedConfig(
            parts=(
                BottleneckConfig(**_EMBEDDINGS, **_ZERO_UP),
                BottleneckConfig(**_BESIDE, **_ZERO_UP),
            )
        ),
        1e-3,
        "bottlenecks of `width // 2` behind the embeddings, beside self-attention and beside "
        "feed-forward, ReLU, `up` zero at first",
        "arXiv:2104.08154; the rate is the better of two tried, 1e-3 and 3e-3",
    ),
    Preset(
        "compacter-ciat",
        CombinedConfig(parts=(PHMBottleneckConfig(**_EMBEDDINGS), PHMBottleneckConfig(**_BESIDE))),
        3e-3,
        "`ciat` with Compacter's projections, their start and one shared rule",
        f"arXiv:2104.08154, {_COMPACTER}; the rate is that of `compacter`",
    ),
    Preset(
        "serial-ciat",
        BottleneckConfig(
            sites=("residual_feed_forward",),
            reduction_factor=2,
            non_linearity="relu",
            layer_norm_before=True,
            original_ln_before=True,
            original_ln_after=False,
            residual_before_ln=False,
            **_ZERO_UP,
        ),
        1e-3,
        "a bottleneck of `width // 2` with a norm of its own on each layer's output, ReLU, `up` "
        "zero at first",
        "arXiv:1909.08478; the rate is that of `ciat`",
    ),
    Preset(
        "mad-x",
        CombinedConfig(
            parts=(
                BottleneckConfig(
                    sites=("residual_feed_forward",),
                    reduction_factor=2,
                    non_linearity="gelu",
                    w_init_range=0.02,
                    original_ln_before=True,
                ),
                InvertibleConfig(),
            )
        ),
        1e-4,
        "a bottleneck of `width // 2` after feed-forward, GELU, and an invertible adapter behind "
        "the embeddings of the encoder",
        "arXiv:2005.00052",
    ),
    Preset(
        "st",
        BottleneckConfig(**_ST),
        2e-3,
        "a bottleneck of `width // 2` with a norm of its own after feed-forward, before the "
        "residual is added, ReLU, for speech translation",
        "arXiv:2106.01463",
    ),
    Preset(
        "compacter-st",
        PHMBottleneckConfig(**_ST),
        3e-3,
        "`st` with Compacter's projections, their start and one shared rule",
        f"arXiv:2106.01463, {_COMPACTER}; the rate is that of `compacter`",
    ),
)
PRESETS: dict[str, Preset] = {row.name: row for row in _ROWS}


# Every kind of method has a preset, or is a part of one, or of `with_trained_sites`.
METHODS: dict[str, type[MethodConfig]] = {
    method.kind: type(method) for row in _ROWS for method in (row.method, *row.method.inserted())
} | {TrainedSitesConfig.kind: TrainedSitesConfig}


def table_of_presets() -> list[str]:
    """Returns the lines of the table of presets, in Markdown."""
    head = ["| preset | method | learning rate | source |", "|---|---|---|---|"]
    return [*head, *(row.as_row() for row in _ROWS)]


def _wrapped_table() -> str:
    """Returns the table of presets as docstrings have it, where a row may take several lines."""
    lines = [
        line
        for row in table_of_presets()
        for line in textwrap.wrap(row, 92, subsequent_indent="  ", break_on_hyphens=False)
    ]
    return "\n".join(f"    {line}" for line in lines)


def presets() -> tuple[str, ...]:
    """Returns the names that `preset` accepts."""
    return tuple(PRESETS)


def preset(name: str, **overrides: Any) -> MethodConfig:
    """Returns a preset method by name, with any of its fields replaced.

    The presets of the Compacter paper (arXiv:2106.04647) follow its released configurations for
    T5-base: bottlenecks of `width // 32`, tanh GELU, the learning rate given below, and trained
    layer norms of the backbone where these train them. The other presets follow the papers and
    libraries named below. All presets train the head.

    TABLE

    Args:
      name: one of `presets()`.
      **overrides: values for fields of the preset's dataclass.

    Raises:
      ValueError: for an unknown name or field, or an invalid value; the message lists valid ones.

    Example:
      >>> preset("compacter++", reduction_factor=16).bottleneck_width(768)
      48
      >>> preset("lora", rank=4, sites=("query", "key")).scaling
      2.0
    """
    if name not in PRESETS:
        raise ValueError(
            f"unknown method preset {quote(name, 100)}{did_you_mean(name, list(PRESETS))}; use "
            f"one of {', '.join(PRESETS)}"
        )
    return PRESETS[name].method.replace(**overrides)


# There is no docstring under `python -OO`.
preset.__doc__ = (preset.__doc__ or "").replace("    TABLE", _wrapped_table())


def to_dict(method: MethodConfig) -> dict[str, Any]:
    """Returns the method as JSON-ready values, with its `kind`."""
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return {"kind": method.kind, **{name: _to_json(value) for name, value in values.items()}}


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return to_dict(value) if isinstance(value, MethodConfig) else value


def from_dict(values: Mapping[str, Any]) -> MethodConfig:
    """Returns the method of a `to_dict` mapping; raises ValueError for unknown kinds or fields."""
    if not isinstance(values, Mapping):
        raise ValueError(f"a method must be a mapping of its fields, not {quote(values)}")
    fields = dict(values)
    kind = fields.pop("kind", None)
    classes = METHODS | COMPOSITIONS
    if not isinstance(kind, str) or kind not in classes:
        raise ValueError(f"unknown kind of method {quote(kind)}; use one of {', '.join(classes)}")
    cls = classes[kind]
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            raise ValueError(
                f"method {kind!r} has no field {quote(name, 100)}{did_you_mean(name, known)}; "
                f"its fields are {', '.join(known)}"
            )
    for name in ("parts", "members"):
        if isinstance(fields.get(name), list):
            fields[name] = tuple(from_dict(part) for part in fields[name])
    return cls(**fields)
