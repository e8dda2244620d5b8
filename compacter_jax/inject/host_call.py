"""One call of a host, as a method sees it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from compacter_jax.compositions.banked_layer import BankedLayer, LayerCall, Shared
from compacter_jax.compositions.base import Member, Path
from compacter_jax.methods.base import InsertedConfig
from compacter_jax.paths import ADAPTER, REPLACED
from compacter_jax.patterns import Pattern
from compacter_jax.sites import Site

if TYPE_CHECKING:
    from compacter_jax.inject.interceptor import Interceptor


@dataclasses.dataclass
class Placement:
    """A site, the method that acts there, and the layers of the backbone that it matched."""

    name: str
    site: Site
    pattern: Pattern
    config: InsertedConfig
    shared: Shared
    member: Member
    # None stands for a host outside of the layers.
    matched_layers: set[int | None] = dataclasses.field(default_factory=set)

    @property
    def is_before(self) -> bool:
        """True if the method acts before its host, on the host's arguments."""
        return self.config.is_before(self.name, self.site)


def both_at(one: Placement, other: Placement, path: str) -> str:
    """Returns the message for two sites that match the same host."""
    return (
        f"sites {one.name!r} and {other.name!r} have the same host, {path or 'the model itself'}; "
        "name only one of them"
    )


def descend(tree: Any, path: Path) -> Any:
    """Returns the node of a tree to which the names lead."""
    return functools.reduce(lambda node, name: node[name], path, tree)


NAME_TAKEN = (
    "the host {} already has a variable or submodule '" + ADAPTER + "'; choose another host as site"
)


def _call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer(*args, **kwargs)  # type: ignore[operator]


def _run(layer: nn.Module, shared: Mapping[str, Any], call: LayerCall) -> Any:
    return call.call_layer(layer, *call.inputs, **call.kwargs, **shared)


@dataclasses.dataclass
class HostCall:
    """One call of a host at which a layer of one member acts; it is a `SiteCall`.

    Attributes:
      interceptor: interceptor of the call.
      place: placement with the site and the method.
      context: flax's context of the call.
      path: `/`-joined path of the host.
      run_host: function that runs the host.
      args: positional arguments of the host.
    """

    interceptor: Interceptor
    place: Placement
    context: Any
    path: str
    run_host: Callable[..., Any]
    args: Any

    @property
    def name(self) -> str:
        """Name of the site."""
        return self.place.name

    @property
    def site(self) -> Site:
        """The site."""
        return self.place.site

    @property
    def config(self) -> InsertedConfig:
        """Method that acts at the site."""
        return self.place.config

    @property
    def host(self) -> nn.Module:
        """Module that is called."""
        return self.context.module

    @property
    def deterministic(self) -> bool:
        """True if dropout is off."""
        return self.interceptor.deterministic

    @property
    def needs_plain(self) -> bool:
        """True if some rows may need the result of the backbone without an adapter."""
        return self.place.member.bank is not None

    def run(self, *args: Any) -> Any:
        """Runs the host."""
        return self.run_host(*args)

    def layer(
        self,
        cls: Callable[..., nn.Module],
        like: Any,
        *args: Any,
        inputs: tuple[Any, ...],
        plain: Any,
        call_layer: Callable[..., Any] = _call,
        **kwargs: Any,
    ) -> Any:
        """Calls a layer in the scope of the host, see `SiteCall.layer`."""
        if not isinstance(like, jax.Array):
            raise ValueError(
                f"the host {self.path} returns {type(like).__name__}, not an array; choose as "
                "site a module that returns only the hidden states, or give their index in the "
                "tuple: Site(host=…, output=1)"
            )
        settings = {"dtype": like.dtype, "param_dtype": self.interceptor.param_dtype}
        create = functools.partial(cls, *args, **settings)
        return self._called(create, LayerCall(inputs, kwargs, plain, call_layer))

    def again(
        self, site: str, call_layer: Callable[..., Any], *, inputs: tuple[Any, ...], plain: Any
    ) -> Any:
        """Calls a layer of an earlier host once more, see `SiteCall.again`."""
        run = self.interceptor.embedded[self.place.member.path, self.config, site]
        return run(LayerCall(inputs, {}, plain, call_layer))

    def _called(self, create: functools.partial[nn.Module], call: LayerCall) -> Any:
        if self.place.member.bank is not None:
            run: Callable[[LayerCall], Any] = functools.partial(self._banked, create)
        else:
            run = functools.partial(_run, self._module(create), self.place.shared.common)
        if self.site.role == "embedded":
            self.interceptor.embedded[self.place.member.path, self.config, self.name] = run
        return run(call)

    def _module(self, create: Callable[..., nn.Module]) -> nn.Module:
        host, pushed = self.host, self.interceptor.pushed
        assert host.scope is not None
        member = self.place.member.path
        # A second call of the same host shares the parameters of its adapter.
        key = (host.scope, member)
        if key in pushed:
            return pushed[key]
        owner = self.interceptor.owners.setdefault(key, self.place)
        if owner is not self.place:
            raise ValueError(both_at(owner, self.place, self.path))
        if member:
            pushed[key] = create(parent=self.interceptor.open(host, self.path, member))
            return pushed[key]
        if host.scope.name_reserved(ADAPTER):
            raise ValueError(NAME_TAKEN.format(self.path))
        # A method other than `__call__` runs as a part of a compact call.
        compact = hasattr(self.context.orig_method, "compact")
        if compact or self.place.site.method != "__call__":
            return create(name=ADAPTER)
        # A setup-style host allows no submodules in its call, so the scope is created by hand.
        pushed[key] = create(parent=host.scope.push(ADAPTER))
        return pushed[key]

    def _params(self, init: Callable[[jax.Array], Any]) -> Any:
        """Returns the parameters of a layer; `init` creates them while the model is initialised."""
        host, member = self.host, self.place.member.path
        owner = self.interceptor.owners.setdefault((host.scope, member), self.place)
        if owner is not self.place:
            raise ValueError(both_at(owner, self.place, self.path))
        scope = self.interceptor.open(host, self.path, member)
        stored = host.variables.get("params", {})
        own = dict(descend(stored, (ADAPTER, *member))) if _holds(stored, member) else {}
        own.pop(REPLACED, None)
        if host.is_initializing() and not own:
            with self.interceptor.paused():
                own = init(scope.make_rng("params"))
            for name, leaf in own.items():
                scope.put_variable("params", name, leaf)
        return own

    def _dropout_key(self, call: LayerCall) -> jax.Array | None:
        host = self.host
        drops = not call.kwargs.get("deterministic", True) and host.has_rng("dropout")
        scope = self.interceptor.open(host, self.path, self.place.member.path)
        return scope.make_rng("dropout") if drops else None

    def _banked(self, create: Callable[..., nn.Module], call: LayerCall) -> Any:
        member, shared = self.place.member, self.place.shared
        assert member.bank is not None
        size = member.bank.size

        def init(key: jax.Array) -> Any:
            def one(key: jax.Array, stacked: Any) -> Any:
                return _initial(create(parent=None), key, call, **shared.common, **stacked)

            return jax.vmap(one)(jax.random.split(key, size), shared.stacked)

        params = self._params(init)
        routing = self.interceptor.route(self.path, member.path, call.inputs[0].shape[0])
        if routing.mix is None and not member.bank.allows_unadapted_rows:
            call = call._replace(plain=None)
        key = self._dropout_key(call)
        layer = BankedLayer(_with_per_row(create), params, routing, shared, key)
        with self.interceptor.paused():
            return layer(call)

    def hiding(self, count: int, key: jax.Array, axis: int) -> tuple[jax.Array, ...]:
        """Returns biases of attention that hide the first `count` keys in rows without adapter."""
        member = self.place.member
        if member.bank is None or not member.bank.allows_unadapted_rows:
            return ()
        is_unadapted = self.interceptor.route(self.path, member.path, key.shape[0]).is_unadapted
        hidden = is_unadapted[:, None] & (jnp.arange(key.shape[axis]) < count)
        dtype = jnp.promote_types(key.dtype, jnp.float32)
        return (jnp.where(hidden, jnp.finfo(dtype).min, 0).astype(dtype)[:, None, None, :],)


def _holds(stored: Mapping[str, Any], member: Path) -> bool:
    for name in (ADAPTER, *member):
        if name not in stored:
            return False
        stored = stored[name]
    return True


def _with_per_row(create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Returns `create` with an argument `per_row`, which layers without this field ignore."""

    def make(*, per_row: bool = False) -> nn.Module:
        layer = create(parent=None)
        return layer.clone(per_row=per_row) if hasattr(layer, "per_row") else layer

    return make


@dataclasses.dataclass
class AveragedHostCall(HostCall):
    """One call of a host at which the members of `AverageMaps` act as one dense layer.

    Attributes:
      members: pairs of a member's weight and its call.
    """

    members: tuple[tuple[float, HostCall], ...] = ()

    @classmethod
    def of(cls, weights: Mapping[str, float], calls: Mapping[Path, HostCall]) -> AveragedHostCall:
        """Combines the calls of an average's members, by their paths, into one."""
        members = tuple((weights[path[-1]], one) for path, one in calls.items())
        first = next(iter(calls.values()))
        return cls(
            first.interceptor,
            first.place,
            first.context,
            first.path,
            first.run_host,
            first.args,
            members,
        )

    def _called(self, create: functools.partial[nn.Module], call: LayerCall) -> Any:
        """Runs one layer; parameters that members share are built into their maps."""
        settings = create.keywords
        maps = []
        for weight, member in self.members:
            shared = member.place.shared.common
            layer = create.func(member.config, **settings, parent=None)
            own = member._params(functools.partial(_initial, layer, call=call, **shared))
            dense = member.config.dense_params(own, shared)
            maps.append(jax.tree.map(lambda leaf, weight=weight: weight * leaf, dense))
        params = jax.tree.map(lambda *leaves: sum(leaves), *maps)
        layer = create.func(self.config.dense_equivalent(), **settings, parent=None)
        key = self.members[0][1]._dropout_key(call)
        with self.interceptor.paused():
            return call.apply(layer, params, key)


def _initial(layer: nn.Module, key: jax.Array, call: LayerCall, **shared: Any) -> Any:
    """Returns the initial parameters of a layer."""
    kwargs = {**call.kwargs, **shared}
    if "deterministic" in kwargs:
        kwargs["deterministic"] = True
    return layer.init(key, *call.inputs, **kwargs, method=call.call_layer)["params"]
