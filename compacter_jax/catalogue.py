"""The catalogue: presets by name, kinds of methods and compositions, and methods as JSON."""

from __future__ import annotations

import dataclasses
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
from compacter_jax.methods.ia3 import IA3Config
from compacter_jax.methods.intrinsic import IntrinsicConfig
from compacter_jax.methods.lora import LoRAConfig
from compacter_jax.methods.prefix_tuning import PrefixTuningConfig
from compacter_jax.methods.prompt_tuning import PromptTuningConfig

METHODS: dict[str, type[MethodConfig]] = {
    cls.kind: cls
    for cls in (
        FullFineTuningConfig,
        BottleneckConfig,
        PHMBottleneckConfig,
        LowRankBottleneckConfig,
        LoRAConfig,
        IA3Config,
        PrefixTuningConfig,
        PromptTuningConfig,
        BitFitConfig,
        IntrinsicConfig,
        CombinedConfig,
    )
}


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


_PRESETS: dict[str, MethodConfig] = {
    "full": FullFineTuningConfig(),
    "houlsby": BottleneckConfig(train_layer_norms=True),
    "pfeiffer-attention": BottleneckConfig(sites=("attention",), train_layer_norms=True),
    "pfeiffer-feed-forward": BottleneckConfig(
        sites=("residual_feed_forward",),
        reduction_factor=16,
        non_linearity="relu",
        w_init_range=2e-2,
        original_ln_before=True,
    ),
    "adapterdrop": BottleneckConfig(leave_out=(0, 1, 2, 3, 4), train_layer_norms=True),
    "low-rank": LowRankBottleneckConfig(train_layer_norms=True),
    "phm": PHMBottleneckConfig(
        phm_dim=12,
        factorized_phm_W=False,
        shared_phm_rule=False,
        phm_init_range=1e-2,
        train_layer_norms=True,
    ),
    "compacter": PHMBottleneckConfig(train_layer_norms=True),
    "compacter++": PHMBottleneckConfig(sites=("feed_forward",), train_layer_norms=True),
    "bitfit": BitFitConfig(),
    "prompt-tuning-random": PromptTuningConfig(),
    "prompt-tuning-vocabulary": PromptTuningConfig(prompt_init="vocabulary"),
    "intrinsic-said": IntrinsicConfig(),
    "intrinsic": IntrinsicConfig(structure_aware=False),
    "lora": LoRAConfig(),
    "ia3": IA3Config(),
    "prefix-tuning": PrefixTuningConfig(),
    "parallel": _PARALLEL,
    "scaled-parallel": _PARALLEL.replace(scaling=4.0),
    "mam": CombinedConfig(
        parts=(PrefixTuningConfig(bottleneck_size=800), _PARALLEL.replace(scaling=4.0))
    ),
}


def presets() -> tuple[str, ...]:
    """Returns the names that `preset` accepts."""
    return tuple(_PRESETS)


def preset(name: str, **overrides: Any) -> MethodConfig:
    """Returns a preset method by name, with any of its fields replaced.

    The presets of the Compacter paper (arXiv:2106.04647) follow its released configurations for
    T5-base: bottlenecks of `width // 32`, tanh GELU, the learning rate given below, and trained
    layer norms of the backbone where these train them. The other presets follow the papers and
    libraries named below. All presets train the head.

    | preset | method | learning rate | source |
    |---|---|---|---|
    | `full` | every parameter | 3e-4 | arXiv:2106.04647 |
    | `houlsby` | dense bottlenecks after attention and feed-forward | 3e-4 | arXiv:2106.04647 |
    | `pfeiffer-attention` | dense bottlenecks after self-attention alone, the paper's Pfeiffer |
      3e-4 | arXiv:2106.04647 |
    | `pfeiffer-feed-forward` | AdapterHub's `seq_bn`: after feed-forward, on the normalised sum
      with the residual; ReLU, `width // 16`, layer norms frozen | 1e-4 | arXiv:2005.00052 |
    | `adapterdrop` | `houlsby` without the first five layers of encoder and decoder | 3e-4 |
      arXiv:2106.04647, arXiv:2010.11918 |
    | `low-rank` | projections of rank 1, both sites | 3e-3 | arXiv:2106.04647 |
    | `phm` | PHM-Adapter: `phm_dim=12`, one rule per projection (standard deviation 0.01, whatever
      the released flags say), full blocks, both sites | 3e-3 | arXiv:2106.04647 |
    | `compacter` | `phm_dim=4`, one shared rule, rank-one blocks, both sites | 3e-3 |
      arXiv:2106.04647 |
    | `compacter++` | Compacter after feed-forward alone | 3e-3 | arXiv:2106.04647 |
    | `bitfit` | biases; in T5 new ones at all linear layers, at norms within layers and at the
      logits | 3e-4 | arXiv:2106.04647, arXiv:2106.10199 |
    | `prompt-tuning-random` | 100 embeddings before the input, uniform on [-0.5, 0.5] | 3e-2 |
      arXiv:2106.04647, arXiv:2104.08691 |
    | `prompt-tuning-vocabulary` | 100 embeddings before the input, from the embeddings of
      `prompt_token_ids` | 3e-1 | arXiv:2106.04647, arXiv:2104.08691 |
    | `intrinsic-said` | all weights within 20,000 dimensions, a scale for each layer | 3e-2 |
      arXiv:2106.04647, arXiv:2012.13255 |
    | `intrinsic` | all weights within 20,000 dimensions, without scales | 3e-2 |
      arXiv:2012.13255; the rate is that of arXiv:2106.04647 for `intrinsic-said` |
    | `lora` | rank 8 on queries and values, `lora_alpha` 8 | 5e-4 | arXiv:2106.09685, table 9
      (RoBERTa) |
    | `ia3` | factors on keys, values and inner feed-forward activations | 3e-3 |
      arXiv:2205.05638 |
    | `prefix-tuning` | 30 keys and values before each attention's, through a bottleneck of 512 |
      2e-4 | AdapterHub's `prefix_tuning`, arXiv:2101.00190; the rate was chosen here |
    | `parallel` | a bottleneck of `width // 2` beside feed-forward, ReLU, `up` zero at first |
      1e-4 | arXiv:2110.04366 |
    | `scaled-parallel` | `parallel`, its output times 4 | 1e-4 | arXiv:2110.04366 |
    | `mam` | `scaled-parallel` with 30 prefixes, through a bottleneck of 800 | 1e-4 |
      AdapterHub's `mam`; arXiv:2110.04366 |

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
    if name not in _PRESETS:
        raise ValueError(
            f"unknown method preset {quote(name, 100)}{did_you_mean(name, list(_PRESETS))}; "
            f"known are {', '.join(_PRESETS)}"
        )
    return _PRESETS[name].replace(**overrides)


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
        raise ValueError(f"unknown kind of method {quote(kind)}; known are {', '.join(classes)}")
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
