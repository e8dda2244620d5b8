"""`Adapted`: an `nn.intercept_methods` hook that runs a layer at each site of a backbone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.activations import get_activation
from compacter_jax.adapters import Bottleneck, Dtype, build_weights, shared_params
from compacter_jax.config import (
    ADAPTER,
    BottleneckConfig,
    MethodConfig,
    PHMBottleneckConfig,
    dense_twin,
)


class HasParams(Protocol):
    """Anything with a tree of parameters: `Backbone`, or a model of another library."""

    @property
    def params(self) -> Any: ...


class Adapted(nn.Module):
    """`backbone` with a layer of `method` after every module whose path is one of its sites.

    The parameters are the backbone's under their own names, each adapter under its host as
    `…/adapter/…`, and what adapters share at the top. It is called as the backbone is, and
    returns what the backbone returns. `deterministic=False`, where the backbone takes it, turns
    on the adapters' dropout too.

    Enter it inside the traced function: a function jitted before, outside, ignores the hook.

    Attributes:
      backbone: a linen module.
      method: what to insert.
      sites: site name -> regular expression that fully matches `/`-joined paths of host modules,
        with a group `layer`. By default the backbone's own table, its class attribute `sites`.
      param_dtype: of the adapters' parameters; they compute in their host's dtype.

    Raises:
      ValueError: when constructed, for an unknown site or activation; when called, if a site or a
        layer to leave out was never met, or a host does not return an array.
    """

    backbone: nn.Module
    method: MethodConfig
    sites: Mapping[str, str] | None = None
    param_dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.method, BottleneckConfig):
            get_activation(self.method.non_linearity)
            table = self._table()
            for site in self.method.sites:
                if site not in table:
                    raise ValueError(
                        f"unknown site {site!r}; {type(self.backbone).__name__} has "
                        f"{', '.join(table)}"
                    )
                if "layer" not in re.compile(table[site]).groupindex:
                    raise ValueError(
                        f"the pattern {table[site]!r} of site {site!r} has no group that is the "
                        r"layer's index; write it as (?P<layer>\d+)"
                    )

    def setup(self) -> None:
        nn.share_scope(self, self.backbone)
        self.shared = {}
        if isinstance(self.method, PHMBottleneckConfig):
            config = getattr(self.backbone, "config", None)
            width = getattr(config, "hidden_size", None)
            self.shared = shared_params(self.param, self.method, width, self.param_dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the backbone with its own arguments, adapters inserted."""
        return self._call("__call__", args, kwargs)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """The method `encode` of a backbone that has one, adapters inserted."""
        return self._call("encode", args, kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The method `decode` of a backbone that has one, adapters inserted."""
        return self._call("decode", args, kwargs)

    def start_cache(self, *args: Any, **kwargs: Any) -> Any:
        """The method `start_cache` of a backbone that decodes, adapters inserted."""
        return self._call("start_cache", args, kwargs)

    @nn.nowrap
    def built(self, params: Any) -> tuple[Adapted, Any]:
        """An equal model with the Kronecker sums of its adapters computed once.

        For inference, where parameters do not change: a decoder would otherwise compute them, or
        go through their factors, at every token.

        Args:
          params: of this model.

        Returns:
          The model with dense bottlenecks, and its parameters; both as given if there is nothing
          to build. Outputs are equal to rounding.
        """
        if not isinstance(self.method, PHMBottleneckConfig):
            return self, params
        return self.clone(method=dense_twin(self.method)), build_weights(params)

    def _call(self, name: str, args: Any, kwargs: Any) -> Any:
        call = getattr(self.backbone, name)
        if not isinstance(self.method, BottleneckConfig):
            return call(*args, **kwargs)
        hook = _Hook(
            self.method,
            {site: re.compile(self._table()[site]) for site in self.method.sites},
            depth=len(self.path),
            # Arrays, not modules: closing over a module breaks under remat.
            call={**self.shared, "deterministic": _deterministic(call, args, kwargs)},
            param_dtype=self.param_dtype,
        )
        with nn.intercept_methods(hook):
            y = call(*args, **kwargs)
        if name == "__call__":  # another method runs a part of the backbone
            hook.check()
        return y

    def _table(self) -> Mapping[str, str]:
        table = self.sites if self.sites is not None else getattr(self.backbone, "sites", None)
        if table is None:
            raise ValueError(
                f"{type(self.backbone).__name__} has no table of sites; pass "
                "sites={name: regular expression of host paths}"
            )
        if not isinstance(table, Mapping):
            raise ValueError(
                f"sites={table!r} must be a mapping, {{name: regular expression of host paths}}"
            )
        return table


def _deterministic(call: Any, args: Any, kwargs: Any) -> bool:
    """What the backbone is told, by position or by name; True if it takes no such thing."""
    bound = inspect.signature(call).bind(*args, **kwargs)
    bound.apply_defaults()
    value = kwargs.get("deterministic", bound.arguments.get("deterministic"))
    return True if value is None else value


class _Hook:
    """The interceptor: runs the host, then the adapter inside the host's scope."""

    def __init__(
        self,
        method: BottleneckConfig,
        patterns: dict[str, re.Pattern[str]],
        *,
        depth: int,
        call: dict[str, Any],
        param_dtype: Dtype,
    ):
        self.method, self.patterns, self.depth, self.call = method, patterns, depth, call
        self.param_dtype = param_dtype
        self.met: dict[str, set[int]] = {site: set() for site in patterns}
        self.pushed: dict[Any, nn.Module] = {}
        self.running: set[int] = set()

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        host = context.module
        path = "/".join(host.path[self.depth :])
        # A class that calls super().__call__ comes twice: the outer call is the host's.
        nested = id(host) in self.running
        if nested or context.method_name != "__call__" or not self._wants(path):
            return next_fun(*args, **kwargs)
        self.running.add(id(host))
        try:
            # Host first: its rng counters and names stay as they were.
            y = next_fun(*args, **kwargs)
        finally:
            self.running.remove(id(host))
        if not isinstance(y, jax.Array):
            raise ValueError(
                f"the host {path} returns {type(y).__name__}, not an array; choose as site the "
                "module that returns the hidden states alone"
            )
        return self._layer(context, path, y.dtype)(y, **self.call)

    def _wants(self, path: str) -> bool:
        """Whether `path` is a host; notes the layer, left out or not."""
        for site, pattern in self.patterns.items():
            if match := pattern.fullmatch(path):
                layer = int(match["layer"])
                self.met[site].add(layer)
                return layer not in self.method.leave_out
        return False

    def _layer(self, context: Any, path: str, dtype: Dtype) -> nn.Module:
        host = context.module
        # A second call of the same host shares its adapter's parameters.
        if host.scope in self.pushed:
            return self.pushed[host.scope]
        if host.scope.name_reserved(ADAPTER):
            raise ValueError(
                f"the host {path} has something of its own named {ADAPTER!r}; choose another "
                "module as site"
            )
        settings = {"dtype": dtype, "param_dtype": self.param_dtype}
        if hasattr(context.orig_method, "compact"):
            return Bottleneck(self.method, name=ADAPTER, **settings)
        # A setup-style host allows no submodules in its call, so the scope is made by hand.
        scope = host.scope.push(ADAPTER)
        self.pushed[host.scope] = Bottleneck(self.method, parent=scope, **settings)
        return self.pushed[host.scope]

    def check(self) -> None:
        """ValueError if a site met no module or a layer to leave out does not exist."""
        for site, layers in self.met.items():
            if not layers:
                raise ValueError(
                    f"site {site!r} matched no module: no path matches "
                    f"{self.patterns[site].pattern!r} in full (and under nn.jit, what was "
                    "traced before runs without adapters: take nn.jit out of the backbone)"
                )
            absent = sorted(set(self.method.leave_out) - layers)
            if absent:
                raise ValueError(
                    f"leave_out has {absent}, but site {site!r} has layers {min(layers)} to "
                    f"{max(layers)}"
                )
            if layers <= set(self.method.leave_out):
                raise ValueError(f"leave_out leaves no layer of site {site!r} to adapt")


def init_adapters(model: Adapted, backbone: HasParams, key: jax.Array, *inputs: Any) -> Any:
    """The backbone's parameters with freshly initialised adapters beside them.

    Args:
      model: the adapted module.
      backbone: what has the backbone's `params`; they are taken as they are, not copied.
      key: of the adapters' initial values.
      *inputs: example arguments of a call; by default `model.backbone.dummy_inputs()`.

    Returns:
      A nested dict of arrays.

    Raises:
      ValueError: if `backbone.params` is not what `model.backbone` would initialise, or as
        `Adapted` does.
    """
    if not inputs:
        if not hasattr(model.backbone, "dummy_inputs"):
            raise ValueError(
                f"{type(model.backbone).__name__} has no dummy_inputs(); pass example inputs: "
                "init_adapters(model, backbone, key, input_ids, attention_mask)"
            )
        inputs = model.backbone.dummy_inputs()
    given = flatten_dict(backbone.params, sep="/")
    wanted = jax.eval_shape(model.backbone.init, key, *inputs)["params"]
    _check_backbone(given, flatten_dict(wanted, sep="/"))

    @jax.jit  # what is not returned is not computed: the backbone is not initialised
    def init(key: jax.Array) -> dict[str, jax.Array]:
        flat = flatten_dict(model.init(key, *inputs)["params"], sep="/")
        return {path: leaf for path, leaf in flat.items() if path not in given}

    return unflatten_dict({**given, **init(key)}, sep="/")


def _check_backbone(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    left_over = [path for path in given if path not in wanted]
    missing = [path for path in wanted if path not in given]
    shapes = [
        f"{path}: {given[path].shape} given, {wanted[path].shape} wanted"
        for path in given
        if path in wanted and given[path].shape != wanted[path].shape
    ]
    if left_over or missing or shapes:
        raise ValueError(
            "the parameters are not those of the backbone; "
            f"missing: {missing or 'none'}; left over: {left_over or 'none'}; "
            f"of another shape: {shapes or 'none'}"
        )
