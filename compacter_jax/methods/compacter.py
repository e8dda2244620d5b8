"""Compacter and the PHM-Adapter: bottlenecks whose projections are sums of Kronecker products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from jax import Array

from compacter_jax import phm
from compacter_jax.methods.base import MethodConfig, SitesOf
from compacter_jax.methods.bottleneck import FACTOR_INITS, BottleneckConfig
from compacter_jax.methods.fields import choose, either, require
from compacter_jax.methods.phm_linear import PHMLinear, blocks_params, rule_params
from compacter_jax.nn.dense import Dtype, ParamFunction
from compacter_jax.paths import ADAPTER
from compacter_jax.patterns import Pattern, compiled

RULE_INITS = ("normal", "uniform", "glorot")
# Fields on which a shared rule or shared blocks depend, their initial values included.
_SHARED_BY = (
    *("phm_dim", "phm_rank", "factorized_phm_W", "shared_phm_rule", "factorized_phm_rule"),
    *("shared_W_phm", "learn_phm", "phm_c_init", "phm_init_range", "reduction_factor"),
    *("w_init", "w_init_up"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PHMBottleneckConfig(BottleneckConfig):
    """A bottleneck adapter whose projections are sums of Kronecker products.

    The weight is `W = sum_i rule[i] (x) blocks[i]`. With both `shared_phm_rule` and
    `factorized_phm_W` this is Compacter; with neither it is the PHM-Adapter. The names are those of
    the reference implementation.

    Attributes:
      phm_dim: `n`, the number of Kronecker products; it divides the width and the bottleneck.
      phm_rank: rank of the blocks with `factorized_phm_W`.
      factorized_phm_W: True if the blocks are products `left @ right` of rank `phm_rank`.
      shared_phm_rule: True for one rule in the whole model, False for one in each projection.
      factorized_phm_rule: True if the rule itself is a product of rank one, `[n, n, 1] @ [n, 1,
        n]`.
      shared_W_phm: True for one set of blocks for all adapters (down and up), owned by the model.
      learn_phm: True to train the rule; False to keep its initial value.
      phm_c_init: distribution of the rule's initial values; one of `RULE_INITS`. `uniform` is on
        [-1, 1]; `glorot` is normal, with the standard deviation that gives the projections' weights
        Glorot's size at first.
      phm_init_range: standard deviation of the rule, and of the blocks if `w_init="normal"`.

    References:
      Karimi Mahabadi et al., Compacter, NeurIPS 2021, arXiv:2106.04647, section 3.
    """

    kind: ClassVar[str] = "phm_bottleneck"
    heading: ClassVar[str] = "for Compacter and PHM-Adapter"
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
        require(self.phm_dim >= 1, "phm_dim", self.phm_dim, "at least 1")
        require(self.phm_rank >= 1, "phm_rank", self.phm_rank, "at least 1")
        require(self.phm_init_range > 0, "phm_init_range", self.phm_init_range, "above 0")
        choose("phm_c_init", self.phm_c_init, RULE_INITS)

    def _weight_inits(self) -> tuple[str, ...]:
        return FACTOR_INITS

    def bottleneck_width(self, width: int) -> int:
        """Returns the width of the bottleneck for hidden states of `width`.

        Raises:
          ValueError: if it would be 0, or if `phm_dim` does not divide both widths.
        """
        bottleneck = super().bottleneck_width(width)
        if width % self.phm_dim or bottleneck % self.phm_dim:
            fits = [n for n in range(1, bottleneck + 1) if not (width % n or bottleneck % n)]
            raise ValueError(
                f"phm_dim={self.phm_dim} does not divide both the width {width} and the "
                f"bottleneck width {bottleneck} ({width} // {self.reduction_factor}); "
                f"use {either(fits)}"
            )
        return bottleneck

    @property
    def rule(self) -> str:
        """Owner of the rule of Kronecker products, "shared" or "own"."""
        return "shared" if self.shared_phm_rule else "own"

    @property
    def sharing(self) -> Any:
        """Values of the fields that a shared rule or shared blocks depend on, None without them."""
        if not (self.shared_phm_rule or self.shared_W_phm):
            return None
        return tuple(getattr(self, name) for name in _SHARED_BY)

    def trained_inserted_groups(self) -> set[str]:
        """Returns the group of adapters and, if it is learned, that of the rule."""
        return {*self.own_groups, "rule"} if self.learn_phm else set(self.own_groups)

    def projection(
        self, features: int, name: str, *, per_row: bool, **dtypes: Any
    ) -> Callable[[Array, Array | None, phm.Blocks | None], Array]:
        """Creates the projection `down` or `up` within the call of a `Bottleneck`."""

        def project(x: Array, rule: Array | None, blocks: phm.Blocks | None) -> Array:
            layer = PHMLinear(
                features,
                phm_dim=self.phm_dim,
                phm_rank=self._rank,
                factorized_phm_rule=self.factorized_phm_rule,
                per_row=per_row,
                rule_init=self._rule_init(x.shape[-1], features),
                blocks_init=self._blocks_init,
                last_init=self.last_init(name),
                name=name,
                **dtypes,
            )
            return layer(x, rule, blocks)

        return project

    @property
    def _rank(self) -> int | None:
        return self.phm_rank if self.factorized_phm_W else None

    def _rule_init(self, in_features: int, features: int) -> phm.Initializer:
        if self.phm_c_init != "glorot":
            return phm.rule_init(self.phm_c_init, self.phm_init_range)
        deviation = self._glorot_deviation(in_features, features)
        # Entries of a rule that is a product of factors are products of theirs.
        return phm.rule_init("normal", deviation ** (0.5 if self.factorized_phm_rule else 1.0))

    def _glorot_deviation(self, in_features: int, features: int) -> float:
        return phm.glorot_deviation(
            in_features, features, self.phm_dim, self._rank, self.w_init, self.phm_init_range
        )

    def slow_start(self, width: int | None, reach: float) -> str | None:
        """Returns why a run is too short for a rule that starts near zero, None if it is not."""
        if self.phm_c_init != "normal" or not self.learn_phm or width is None:
            return None
        glorot = self._glorot_deviation(width, self.bottleneck_width(width))
        size = (self.phm_init_range + reach) ** (2 if self.factorized_phm_rule else 1)
        if size >= glorot / 10:
            return None
        return (
            f"the learning rates of all steps sum to {reach:.2g}, so a rule that starts at "
            f"{self.phm_init_range:g} cannot reach a tenth of Glorot's size, {glorot:.2g}, and "
            "the adapters hardly learn; use preset compacter++-short, whose rule starts at that "
            "size (phm_c_init='glorot', w_init_up='zeros')"
        )

    @property
    def _blocks_init(self) -> phm.Initializer:
        return phm.blocks_init(self.w_init, self.phm_init_range)

    def shared(
        self, param: ParamFunction, width: int | None, sites: list[str], dtype: Dtype
    ) -> dict[str, Any]:
        """Creates the rule and the blocks that all adapters of a model share.

        Args:
          param: `param` method of the model; the names are `phm_rule…`, `phm_down_…` and
            `phm_up_…`.
          width: width of the hidden states, required for shared blocks and for a shared rule of
            Glorot's size.
          sites: names of the sites where the method acts.
          dtype: dtype of the parameters.

        Raises:
          ValueError: if blocks are shared, or a rule of Glorot's size, and `width` is None.
        """
        del sites
        shared: dict[str, Any] = {}
        if self.shared_phm_rule:
            is_factorized = self.factorized_phm_rule
            init = self._shared_rule_init(width)
            shared["rule"] = rule_params(param, self.phm_dim, init, dtype, factorized=is_factorized)
        if self.shared_W_phm:
            shared |= self._shared_blocks(param, width, dtype)
        return shared

    def _shared_rule_init(self, width: int | None) -> phm.Initializer:
        if self.phm_c_init != "glorot":
            return self._rule_init(0, 0)
        width = _known("phm_c_init='glorot'", width, "give phm_c_init='normal' and phm_init_range")
        return self._rule_init(width, self.bottleneck_width(width))

    def _shared_blocks(
        self, param: ParamFunction, width: int | None, dtype: Dtype
    ) -> dict[str, phm.Blocks]:
        width = _known("shared_W_phm", width, "share only the rule")
        bottleneck = self.bottleneck_width(width)
        return {
            f"{name}_blocks": blocks_params(
                param,
                in_features,
                features,
                self.phm_dim,
                self._rank,
                self._blocks_init,
                dtype=dtype,
                prefix=f"phm_{name}_",
                last_init=self.last_init(name),
            )
            for name, in_features, features in (
                ("down", width, bottleneck),
                ("up", bottleneck, width),
            )
        }

    def precomputed(
        self, params: Mapping[str, Any], sites_of: SitesOf
    ) -> tuple[MethodConfig, Mapping[str, Any]]:
        """Returns dense bottlenecks, whose kernels are the built Kronecker sums."""
        hosts = (site.host for site in sites_of(self).values())
        return self.dense_equivalent(), build_weights(params, hosts)

    def dense_params(self, own: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the dense bottleneck that equals one of the method's.

        Args:
          own: parameters of a `Bottleneck`.
          shared: those of `rule`, `down_blocks` and `up_blocks` that other bottlenecks share.
        """
        top = {"phm_rule": shared["rule"]} if "rule" in shared else {}
        for name in ("down", "up"):
            blocks = shared.get(f"{name}_blocks", ())
            if isinstance(blocks, tuple):
                factors = zip(("left", "right"), blocks, strict=False)
                top |= {f"phm_{name}_{factor}": value for factor, value in factors}
            else:
                top[f"phm_{name}_blocks"] = blocks
        return _dense_adapter(own, top)


def _known(field: str, width: int | None, other: str) -> int:
    """Returns the width of the hidden states; raises ValueError if it is not known."""
    if width is None:
        raise ValueError(
            f"{field} needs the width of the backbone's hidden states: give the module a "
            f"`config` with `hidden_size`, or {other}"
        )
    return width


def build_weights(params: Mapping[str, Any], hosts: Iterable[str]) -> dict[str, Any]:
    """Returns the parameters of the dense bottlenecks that equal PHM bottlenecks.

    Args:
      params: nested parameters of a model with PHM bottlenecks, each under `…/adapter`, and their
        shared parameters at the top.
      hosts: regular expressions of the paths of their hosts.

    Returns:
      The parameters with `kernel` `[in, out]` in place of each projection's rule and blocks, and
      without the shared ones at the top.

    References:
      arXiv:2106.04647, equation 3.
    """
    patterns = [compiled(host) for host in hosts]
    own = {name: leaf for name, leaf in params.items() if not name.startswith("phm_")}
    return _with_dense_adapters(own, params, patterns, ())


def _with_dense_adapters(
    node: Mapping[str, Any],
    top: Mapping[str, Any],
    patterns: Sequence[Pattern],
    path: tuple[str, ...],
) -> dict[str, Any]:
    built: dict[str, Any] = {}
    for name, child in node.items():
        if name == ADAPTER and any(pattern.fullmatch("/".join(path)) for pattern in patterns):
            built[name] = _dense_adapter(child, top)
        elif name != ADAPTER and isinstance(child, Mapping):
            built[name] = _with_dense_adapters(child, top, patterns, (*path, name))
        else:
            built[name] = child
    return built


def _dense_adapter(adapter: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one adapter's parameters with built kernels; `top` has the shared parameters."""
    built = dict(adapter)
    for name in ("down", "up"):
        own, prefix = adapter[name], f"phm_{name}_"
        shared = {key.removeprefix(prefix): top[key] for key in top if key.startswith(prefix)}
        rule = _stored((own, top), "phm_rule", "phm_rule_left", "phm_rule_right")
        blocks = _stored((own, shared), "blocks", "left", "right")
        built[name] = {"kernel": phm.kronecker_sum(rule, blocks), "bias": own["bias"]}
    return built


def _stored(places: Sequence[Mapping[str, Any]], whole: str, left: str, right: str) -> Array:
    """Returns the parameter `whole` or the product of its factors, of the first place with it."""
    for params in places:
        if whole in params:
            return params[whole]
        if left in params:
            return params[left] @ params[right]
    raise ValueError(f"the parameters of an adapter contain neither {whole} nor {left}")
