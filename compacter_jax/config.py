"""A fine-tuning method as a frozen dataclass: what to train, and where it goes."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

WEIGHT_INITS = ("glorot-uniform", "glorot-normal", "normal")
RULE_INITS = ("normal", "uniform")
# Name of an adapter's parameters under its host: `…/adapter/…`.
ADAPTER = "adapter"


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it (lists become tuples, ints floats); ValueError otherwise."""
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ValueError(f"{name}={value!r} must be a list")
        element = typing.get_args(hint)[0]
        return tuple(_typed(name, item, element) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if (
        isinstance(hint, type)
        and not isinstance(hint, types.GenericAlias)
        and type(value) is not hint
    ):
        raise ValueError(f"{name}={value!r} must be of type {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")
    return value


def _require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r} must be {wanted}")


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name}={value!r}; use one of {', '.join(choices)}")


def _near(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _either(values: list[int]) -> str:
    """`1, 2 or 4`."""
    head = ", ".join(map(str, values[:-1]))
    return f"{head} or {values[-1]}" if head else str(values[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What every method says about the parameters of the backbone.

    Attributes:
      train_layer_norms: train the backbone's layer norms too. The paper does for every method
        (arXiv:2106.04647, section 5.1), AdapterHub does not.
      train_head: train the task's head. A pre-trained language-modelling head stays frozen.
      train_pooler: train the pooler of an encoder that has one.
    """

    kind: ClassVar[str] = ""

    train_layer_norms: bool = False
    train_head: bool = True
    train_pooler: bool = False

    def replace(self, **overrides: Any) -> Self:
        """A copy with `overrides`; a field this method does not have is a ValueError."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in known:
                raise ValueError(
                    f"method {self.kind!r} has no field {name!r}{_near(name, known)}; "
                    f"its fields are {', '.join(known)}"
                )
        return dataclasses.replace(self, **overrides)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(
                self, field.name, _typed(field.name, getattr(self, field.name), hints[field.name])
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFineTuningConfig(MethodConfig):
    """Every parameter of the backbone and its head is trained; nothing is inserted."""

    kind: ClassVar[str] = "full"

    train_layer_norms: bool = True
    train_pooler: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckConfig(MethodConfig):
    """A serial bottleneck adapter, `x + scaling * up(act(down(x)))`, with dense projections.

    Attributes:
      sites: where adapters go, names from the backbone's table of sites.
      leave_out: indices of layers that get no adapter.
      reduction_factor: the bottleneck is `width // reduction_factor` wide.
      non_linearity: name of the activation, `compacter_jax.activations` lists them.
      w_init: distribution of the projections' initial weights; one of `WEIGHT_INITS`. The Glorot
        kinds have gain sqrt(2), as the authors of Compacter use.
      w_init_range: standard deviation of `w_init="normal"`.
      scaling: factor on the adapter's output.
      dropout: rate on the adapter's output, before the skip connection.
      layer_norm_before, layer_norm_after: a layer norm of the adapter's own on its input, on its
        output before the skip connection.

    References:
      Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019, arXiv:1902.00751.
    """

    kind: ClassVar[str] = "bottleneck"
    linear: ClassVar[str] = "dense"

    sites: tuple[str, ...] = ("attention", "feed_forward")
    leave_out: tuple[int, ...] = ()
    reduction_factor: int = 32
    non_linearity: str = "gelu_new"
    w_init: str = "normal"
    w_init_range: float = 1e-2
    scaling: float = 1.0
    dropout: float = 0.0
    layer_norm_before: bool = False
    layer_norm_after: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sites:
            raise ValueError("sites is empty; name at least one, 'feed_forward' for example")
        for site in self.sites:
            if self.sites.count(site) > 1:
                raise ValueError(f"sites names {site!r} twice; name each site once")
        _require(
            self.reduction_factor >= 1, "reduction_factor", self.reduction_factor, "at least 1"
        )
        _require(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "in [0, 1)")
        _require(self.w_init_range > 0, "w_init_range", self.w_init_range, "above 0")
        _choose("w_init", self.w_init, WEIGHT_INITS)
        for index in self.leave_out:
            _require(index >= 0, "leave_out", index, "layer indices from 0 on")

    def bottleneck_width(self, width: int) -> int:
        """Width of the bottleneck beside a hidden state of `width`; ValueError if it would be 0."""
        bottleneck = width // self.reduction_factor
        if bottleneck < 1:
            raise ValueError(
                f"reduction_factor={self.reduction_factor} leaves no bottleneck beside a width of "
                f"{width}; use at most {width}"
            )
        return bottleneck


@dataclasses.dataclass(frozen=True, kw_only=True)
class PHMBottleneckConfig(BottleneckConfig):
    """A bottleneck adapter whose projections are sums of Kronecker products.

    `W = sum_i rule[i] (x) blocks[i]`: with `shared_phm_rule` and `factorized_phm_W` this is
    Compacter, with neither the PHM-Adapter. Names are those of the reference implementation.

    Attributes:
      phm_dim: `n`, the number of Kronecker products; divides the width and the bottleneck.
      phm_rank: rank of the blocks where `factorized_phm_W`.
      factorized_phm_W: blocks are products `left @ right` of rank `phm_rank`.
      shared_phm_rule: one rule for the whole model; otherwise each projection has its own.
      factorized_phm_rule: the rule itself is a product of rank one, `[n, n, 1] @ [n, 1, n]`.
      shared_W_phm: one set of blocks for all adapters (down and up), owned by the model.
      learn_phm: train the rule; otherwise it stays at its initial value.
      phm_c_init: distribution of the rule's initial values; one of `RULE_INITS`
        (`uniform` is on [-1, 1]).
      phm_init_range: standard deviation of the rule, and of the blocks where `w_init="normal"`.

    References:
      Karimi Mahabadi et al., Compacter, NeurIPS 2021, arXiv:2106.04647, section 3.
    """

    kind: ClassVar[str] = "phm_bottleneck"
    linear: ClassVar[str] = "phm"

    w_init: str = "glorot-uniform"
    phm_dim: int = 4
    phm_rank: int = 1
    factorized_phm_W: bool = True
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False
    shared_W_phm: bool = False
    learn_phm: bool = True
    phm_c_init: str = "normal"
    phm_init_range: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.phm_dim >= 1, "phm_dim", self.phm_dim, "at least 1")
        _require(self.phm_rank >= 1, "phm_rank", self.phm_rank, "at least 1")
        _require(self.phm_init_range > 0, "phm_init_range", self.phm_init_range, "above 0")
        _choose("phm_c_init", self.phm_c_init, RULE_INITS)

    def bottleneck_width(self, width: int) -> int:
        """As for the dense bottleneck; ValueError unless `phm_dim` divides both widths."""
        bottleneck = super().bottleneck_width(width)
        if width % self.phm_dim or bottleneck % self.phm_dim:
            fits = [n for n in range(1, bottleneck + 1) if not (width % n or bottleneck % n)]
            raise ValueError(
                f"phm_dim={self.phm_dim} does not divide both the width {width} and the "
                f"bottleneck width {bottleneck} ({width} // {self.reduction_factor}); "
                f"use {_either(fits)}"
            )
        return bottleneck


METHODS: dict[str, type[MethodConfig]] = {
    cls.kind: cls for cls in (FullFineTuningConfig, BottleneckConfig, PHMBottleneckConfig)
}

_PRESETS: dict[str, MethodConfig] = {
    "full": FullFineTuningConfig(),
    "houlsby": BottleneckConfig(train_layer_norms=True),
    "phm": PHMBottleneckConfig(
        phm_dim=12,
        factorized_phm_W=False,
        shared_phm_rule=False,
        phm_init_range=1e-2,
        train_layer_norms=True,
    ),
    "compacter": PHMBottleneckConfig(train_layer_norms=True),
    "compacter++": PHMBottleneckConfig(sites=("feed_forward",), train_layer_norms=True),
}


def dense_twin(method: PHMBottleneckConfig) -> BottleneckConfig:
    """The dense bottleneck that computes what `method` does once its weights are built."""
    fields = {field.name for field in dataclasses.fields(BottleneckConfig)}
    return BottleneckConfig(**{name: getattr(method, name) for name in fields})


def presets() -> tuple[str, ...]:
    """The names `preset` knows."""
    return tuple(_PRESETS)


def preset(name: str, **overrides: Any) -> MethodConfig:
    """A method of the paper's comparison by name, with any of its fields replaced.

    All presets train the backbone's layer norms and the head, as the paper does. Learning rates
    are those of the released configurations for T5-base: 3e-3, for `houlsby` and `full` 3e-4.

    * `full`: full fine-tuning.
    * `houlsby`: dense bottlenecks of `width // 32` after attention and feed-forward.
    * `phm`: PHM-Adapter, `phm_dim=12`, own rule per projection, full blocks, both sites. The
      released code draws an own rule with standard deviation 0.01, whatever its flags say.
    * `compacter`: `phm_dim=4`, one shared rule, rank-one blocks, both sites.
    * `compacter++`: Compacter after feed-forward only.

    Args:
      name: one of `presets()`.
      **overrides: fields of that preset's dataclass.

    Raises:
      ValueError: unknown name or field, or a value that cannot work; it says which would.

    References:
      arXiv:2106.04647, section 4 and table 1.
    """
    if name not in _PRESETS:
        raise ValueError(
            f"unknown method preset {name!r}{_near(name, list(_PRESETS))}; "
            f"known are {', '.join(_PRESETS)}"
        )
    return _PRESETS[name].replace(**overrides)


def to_dict(method: MethodConfig) -> dict[str, Any]:
    """The method as JSON-ready values, with its `kind`."""
    values = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(method).items()
    }
    return {"kind": method.kind, **values}


def from_dict(values: Mapping[str, Any]) -> MethodConfig:
    """Inverse of `to_dict`; ValueError for an unknown kind, field or value."""
    if not isinstance(values, Mapping):
        raise ValueError(f"a method must be a mapping of its fields, not {values!r}")
    fields = dict(values)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in METHODS:
        raise ValueError(f"unknown kind of method {kind!r}; known are {', '.join(METHODS)}")
    return METHODS[kind]().replace(**fields)
