"""`Adapted`: a backbone with a layer of a method at each of its sites."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.errors import ScopeParamNotFoundError
from flax.traverse_util import flatten_dict
from jax import Array

from compacter_jax.compositions.banked_layer import Shared, banked_shared
from compacter_jax.compositions.base import Member, Path, copies_of, members_of
from compacter_jax.compositions.routing import Routing, mixing_sites, route
from compacter_jax.inject.arguments import (
    SWITCHES,
    apart,
    is_deterministic,
    is_own,
    make_room,
    repeat_rows,
)
from compacter_jax.inject.host_call import Placement
from compacter_jax.inject.interceptor import Interceptor
from compacter_jax.inject.merging import has_narrow_kernels, merge_adapter
from compacter_jax.inject.widening import is_widened, widened
from compacter_jax.messages import listing, quote
from compacter_jax.methods.base import InsertedConfig, MethodConfig
from compacter_jax.nn.activations import get_activation
from compacter_jax.nn.dense import Dtype, ParamFunction
from compacter_jax.nn.quantize import is_quantized
from compacter_jax.paths import ADAPTER, OCCUPIED, OWN_MODULES, SHARED, check_groups, group_of
from compacter_jax.patterns import compiled
from compacter_jax.sites import Site, as_site


class Adapted(nn.Module):
    """A backbone with a layer of a method at every module that is one of its sites.

    The parameters of the backbone keep their names. Each adapter has its parameters under its host,
    as `…/adapter/…`; parameters that adapters share are at the top. A call takes the arguments of
    the backbone and returns its result. The argument that turns on the backbone's dropout also
    turns on that of the adapters: `deterministic=False`, or `train`, `training`, `is_training` or
    `enable_dropout` with True. `call`, or `method=` of `apply`, calls other methods of the
    backbone.

    A call of a model with a `Bank` takes one more argument, by name. `adapter_ids`, `[batch]`
    integers, holds the member that each row uses, or -1 for the plain backbone. `mix` holds
    floating-point weights of the members' outputs: `[size]` for all rows, `[batch, size]`, or
    `[batch or 1, sites, size]` with weights for every site of `mixing_sites`. With several banks,
    each of the two arguments is a mapping from the banks' `/`-joined names. An id without a member
    raises a ValueError; inside a transformation, where ids are not known, its row is NaN. A model
    with `Parallel` returns a tuple with one result per member.

    Call the model inside the function that is transformed: a function that was jitted before, on
    the backbone alone, runs without the adapters.

    Attributes:
      backbone: a linen module.
      method: method to insert.
      sites: site name -> `Site`, or a regular expression that matches the whole `/`-joined path of
        a host module, with a group `layer`. The default is the backbone's own table, its class
        attribute `sites`.
      param_dtype: dtype of the adapters' parameters; an adapter computes in the dtype of its host.
      groups: groups of the parameters of a module of others: "head", "layer_norms" or "pooler" ->
        regular expression that matches whole `/`-joined paths of parameters, or of
        modules that have them. `label_params` needs the same mapping.

    Raises:
      ValueError: when constructed, for an unknown site, group or activation, or a site where the
        method cannot act; when called, if no module matches a site or a layer to leave out does not
        exist, if a host does not return an array, or if the adapters have dropout and the backbone
        takes no argument that turns it on.
    """

    backbone: nn.Module
    method: MethodConfig
    sites: Mapping[str, str | Site] | None = None
    param_dtype: Dtype = jnp.float32
    groups: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.backbone, nn.Module):
            raise ValueError(
                f"the backbone has type {type(self.backbone).__name__} and is not a flax.linen "
                "module; to use nnx, adapt a linen module and convert the result to nnx: "
                "bridge.ToNNX(Adapted(…), rngs=…)"
            )
        check_groups(self.groups)
        for part in self.method.inserted():
            if (activation := getattr(part, "non_linearity", None)) is not None:
                get_activation(activation)
            for name, site in self.sites_of(part).items():
                part.check_site(name, site)

    def setup(self) -> None:
        nn.share_scope(self, self.backbone)
        scope = self.scope
        assert scope is not None
        # nn.jit compares calls by these flags; without a new value it would reuse a call without
        # adapters.
        scope.flags = FrozenDict({**scope.flags, ADAPTER: _NeverEqual()})
        self.shared = tuple(self._all_shared())
        for member in members_of(self.method):
            if (bank := member.bank) is not None:
                slots = self._param_under((SHARED, *member.path))
                slots(OCCUPIED, lambda _, size=bank.size: jnp.ones(size, bool))
        if self.method.moves_backbone and not self.is_initializing():
            self._create_own(self.param)

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """Applies the model, as `nn.Module.apply` does.

        `method` may be the name of a method of the backbone, or a function. A function receives the
        adapted model, as in flax. If it needs an attribute that only the backbone has, as functions
        of transformers' wrappers do, it receives the backbone with adapters inserted.
        """
        if not isinstance(method, str) or hasattr(Adapted, method):
            try:
                return super().apply(variables, *args, method=method, **kwargs)
            except AttributeError as error:
                if method is None or not str(error).startswith(_LACKING):
                    raise
            except ScopeParamNotFoundError as error:
                if method is None or '"/backbone' not in str(error):
                    raise
                raise ValueError(
                    "the function given as method= calls the backbone directly, which has no "
                    "parameters there; call its methods on the model that the function receives, "
                    "as in lambda model, x: model.features(x)"
                ) from error
        return super().apply(variables, method, *args, method=Adapted.call, **kwargs)

    def call(self, method: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls any method of the backbone, with adapters inserted.

        Args:
          method: name of the method, or a function that takes the backbone first.
          *args: positional arguments of the method.
          **kwargs: keyword arguments of the method.

        Raises:
          ValueError: if the backbone has no such method.
        """
        if isinstance(method, str) and not hasattr(type(self.backbone), method):
            raise ValueError(f"{type(self.backbone).__name__} has no method {quote(method)}")
        return self._call(method, args, kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the backbone with its own arguments, with adapters inserted."""
        return self._call("__call__", args, kwargs)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method `encode` of a backbone that has one, with adapters inserted."""
        return self._call("encode", args, kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method `decode` of a backbone that has one, with adapters inserted."""
        return self._call("decode", args, kwargs)

    def start_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method `start_cache` of a backbone that decodes, with adapters inserted."""
        return self._call("start_cache", args, kwargs)

    @nn.nowrap
    def precomputed(self, params: Any) -> tuple[Adapted, Any]:
        """Returns an equal model in which values that depend on parameters alone are precomputed.

        This is for inference, where the parameters do not change; a decoder would otherwise compute
        these values at every token. Kronecker sums become dense bottlenecks, prefixes become flat,
        and adapters that `merge_adapter` can merge are merged.

        Args:
          params: parameters of this model.

        Returns:
          The model and its parameters. Both are unchanged if there is nothing to compute, or if
          kernels in fewer bits than float32 would round away a merged update. Outputs are equal up
          to rounding.
        """
        method = self.method
        moves_kernels = any(part.moves_kernels for part in method.inserted())
        is_merged = moves_kernels and method.unmergeable(self.sites_of) is None
        is_merged = is_merged and not is_widened(method)
        if is_merged and has_narrow_kernels(params):
            return self, params
        if is_merged or method.moves_backbone:
            return self.clone(method=method.without_adapters()), merge_adapter(self, params)
        method, params = method.precomputed(params, self.sites_of)
        return (self if method == self.method else self.clone(method=method)), params

    @nn.nowrap
    def merged_module(self) -> nn.Module:
        """Returns the module whose parameters `merge_adapter` makes.

        It is the backbone, or the backbone with wider feed-forward networks if bottlenecks beside
        these become part of them.

        Raises:
          ValueError: if a feed-forward network cannot become wider.
        """
        return widened(self.method, self.backbone)

    @nn.nowrap
    def _all_shared(self) -> Iterator[Shared]:
        """Creates the shared parameters of each part; parts of one member may share the same."""
        made: dict[Any, Shared] = {}
        for member in members_of(self.method):
            for part in member.method.inserted():
                key = (member.path, part.kind, part.sharing)
                known = None if part.sharing is None else made.get(key)
                made[key] = self._shared(member, part) if known is None else known
                yield made[key]

    @nn.nowrap
    def _shared(self, member: Member, part: InsertedConfig) -> Shared:
        """Creates the parameters that the layers of a part share."""
        width = getattr(getattr(self.backbone, "config", None), "hidden_size", None)
        sites = list(self.sites_of(part))

        def create(param: ParamFunction) -> dict[str, Any]:
            return part.shared(_own_names(param, part), width, sites, self.param_dtype)

        param = self._param_under((SHARED, *member.path)) if member.path else self.param
        if member.bank is None:
            return Shared(create(param), {})
        return banked_shared(create, param, member.bank)

    @nn.nowrap
    def _param_under(self, path: tuple[str, ...]) -> ParamFunction:
        """Returns the `param` method of a scope below the model's."""
        scope = self.scope
        assert scope is not None
        for name in path:
            scope = scope.push(name, reuse=True)
        return scope.param

    @nn.nowrap
    def _create_own(self, param: ParamFunction) -> None:
        """Creates the trained parameters of a method that moves the backbone, sized by it."""
        paths = list(flatten_dict(self.variables["params"], sep="/"))
        own = _own_names(param, self.method)
        self.method.own_params(own, paths, self.groups, self.param_dtype)

    @nn.nowrap
    def _call(self, name: str | Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._check_weights()
        is_whole = name == "__call__"
        if self.method.moves_backbone and not self.is_initializing():
            return self._call_moved(name, args, kwargs)
        if isinstance(name, str):
            call = getattr(self.backbone, name)
        else:
            call = functools.partial(name, self.backbone)
        parts = self.method.inserted()
        kwargs, routings = self._routings(kwargs)
        if not parts:
            y = call(*args, **kwargs)
            if self.method.moves_backbone:
                self._create_own(self._param_under(()))
            return y
        bound = inspect.signature(call).bind(*args, **kwargs)
        copies = copies_of(self.method)
        if copies > 1 and not is_whole:
            raise ValueError(
                f"a model with Parallel has no {name!r}: it would have to return one value for "
                f"each of {copies} members; use one model for each member"
            )
        batch = repeat_rows(bound.arguments, copies) if copies > 1 else None
        prompt = sum(part.extra_tokens for part in parts)
        deterministic = is_deterministic(bound)
        self._check_dropout()
        if prompt:
            if is_whole and "input_ids" not in bound.arguments:
                raise ValueError(
                    "prompt tuning needs a backbone that is called with input_ids, but "
                    f"{type(self.backbone).__name__} is not"
                )
            make_room(bound.arguments, prompt, getattr(self.backbone, "config", None))
        interceptor = Interceptor(
            self.method,
            self._places(),
            depth=len(self.path),
            deterministic=deterministic,
            param_dtype=self.param_dtype,
            routings=routings,
            hosts=mixing_sites(self.variables.get("params", {})) if routings else (),
            batch=batch,
            groups=self.groups,
        )
        with nn.intercept_methods(interceptor):
            y = call(*bound.args, **bound.kwargs)
        if not is_whole:  # other methods run only a part of the backbone
            return y
        interceptor.check()
        if prompt and hasattr(self.backbone, "without_first"):
            y = self.backbone.without_first(y, prompt)
        return apart(y, copies) if copies > 1 else y

    @nn.nowrap
    def _check_dropout(self) -> None:
        """Raises ValueError if the method has dropout that no argument of the backbone turns on."""
        rates = [
            (getattr(part, name, 0.0), name)
            for part in self.method.inserted()
            for name in ("dropout", "inner_dropout")
        ]
        rate, name = max(rates, default=(0.0, ""))
        parameters = inspect.signature(type(self.backbone).__call__).parameters.values()
        is_told = any(
            parameter.name in SWITCHES or parameter.kind is parameter.VAR_KEYWORD
            for parameter in parameters
        )
        if rate and not is_told:
            raise ValueError(
                f"{name}={rate} would never be applied: {type(self.backbone).__name__} "
                f"takes none of the arguments {', '.join(SWITCHES)}; set {name}=0.0, or add one "
                "of them to its __call__"
            )

    @nn.nowrap
    def _check_weights(self) -> None:
        """Raises ValueError if weights are of int8 and the backbone cannot compute with it."""
        params = {} if is_own(self.backbone) else self.variables.get("params", {})
        if any(map(is_quantized, flatten_dict(params).values())):
            raise ValueError(
                f"the weights are int8, but {type(self.backbone).__name__} cannot compute with "
                f"int8; for modules other than {OWN_MODULES}, use bfloat16 for frozen weights"
            )

    @nn.nowrap
    def _routings(self, kwargs: Any) -> tuple[dict[str, Any], dict[Path, Routing]]:
        """Returns the arguments of a call for the backbone, and the routings of the banks."""
        given = {name: kwargs.get(name) for name in ("adapter_ids", "mix")}
        kwargs = {name: value for name, value in kwargs.items() if name not in given}
        params = {} if self.is_initializing() else self.variables.get("params", {})
        return kwargs, route(self.method, params, **given)

    @nn.nowrap
    def _places(self) -> list[Placement]:
        """Returns the placements: which method acts at which site."""
        shared, places = iter(self.shared), []
        for member in members_of(self.method):
            for part in member.method.inserted():
                own = next(shared)
                for name, site in self.sites_of(part).items():
                    for each in (site, *part.companions(site)):
                        # The placements share arrays, not modules: closing over a module fails
                        # under remat.
                        of_site = own.at(name) if part.shares_by_site else own
                        pattern = compiled(site.host)
                        places.append(Placement(name, each, pattern, part, of_site, member))
        return places

    @nn.nowrap
    def _call_moved(self, name: str | Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls the backbone with the parameters that the method has moved."""
        moved = self.method.moved(self.variables["params"], self.groups)
        rngs = {"dropout": self.make_rng("dropout")} if self.has_rng("dropout") else None
        backbone = self.backbone.clone(parent=None, name=None)
        return backbone.apply(
            {**self.variables, "params": moved}, *args, rngs=rngs, method=name, **kwargs
        )

    @nn.nowrap
    def sites_of(self, part: InsertedConfig) -> dict[str, Site]:
        """Returns the sites of the backbone where a part of the method acts, by name."""
        table = self._table()
        absent = getattr(self.backbone, "absent_sites", ()) if self.sites is None else ()
        known = [name for name in table if name not in absent]
        passed_over = part.optional_sites()
        unknown = [name for name in part.all_sites() if name not in (*known, *passed_over)]
        present = {name: as_site(table[name]) for name in part.all_sites() if name in known}
        if part.needs_no_site and not present and not unknown:
            if part.leave_out:
                raise ValueError(f"{type(self.backbone).__name__} {part.needs_no_site}")
        elif unknown or not present:
            name = (*unknown, *part.all_sites())[0]
            if isinstance(absent, Mapping) and name in absent:
                raise ValueError(f"there is no site {name!r}: {absent[name]}")
            raise ValueError(
                f"unknown site {quote(name, 100)}; {type(self.backbone).__name__} has "
                f"{listing(known, most=20)}"
            )
        return present

    @nn.nowrap
    def _table(self) -> Mapping[str, str | Site]:
        table = self.sites if self.sites is not None else getattr(self.backbone, "sites", None)
        if table is None:
            raise ValueError(
                f"{type(self.backbone).__name__} has no table of sites; pass "
                "sites={name: regular expression of host paths}"
            )
        if not isinstance(table, Mapping):
            raise ValueError(
                f"sites={quote(table)} must be a mapping, "
                f"{{name: regular expression of host paths}}"
            )
        return table


_LACKING = '"Adapted" object has no attribute'


class _NeverEqual:
    """A value with a new hash at each call, so that no two uses compare equal."""

    _counter = itertools.count()

    def __hash__(self) -> int:
        return hash((id(self), next(self._counter)))


def _own_names(param: ParamFunction, method: MethodConfig) -> ParamFunction:
    """Returns `param`, which then refuses names that are not those of a method's parameters.

    A parameter of another name would count as one of the backbone: it would stay frozen, and would
    not be saved with the adapter.
    """

    def named(name: str, *args: Any) -> Array:
        if group_of(name) not in ("rule", "adapters"):
            raise ValueError(
                f"method {method.kind!r} creates a parameter {name!r} at the top of the tree, "
                "which would count as one of the backbone and not be saved; give it a name of the "
                "groups rule or adapters in compacter_jax.paths.GROUPS"
            )
        return param(name, *args)

    return named
