"""The interceptor behind `Adapted`: it finds the hosts that are sites and runs methods there."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from compacter_jax.compositions import replacements
from compacter_jax.compositions.base import (
    Act,
    Leaf,
    Member,
    Path,
    combine,
    composed_members,
    node_at,
    replaces,
)
from compacter_jax.compositions.routing import Routing
from compacter_jax.hosts import by_position, first_array
from compacter_jax.inject.arguments import output_of, split_args, with_item
from compacter_jax.inject.host_call import (
    NAME_TAKEN,
    AveragedHostCall,
    HostCall,
    Placement,
    both_at,
    descend,
)
from compacter_jax.methods.base import InsertedConfig, MethodConfig
from compacter_jax.nn.dense import Dtype
from compacter_jax.nn.quantize import is_quantized
from compacter_jax.paths import ADAPTER, REPLACED, Groups

Run = Callable[..., Any]


class Interceptor:
    """An interceptor that runs the host, and layers of methods inside the host's scope.

    Attributes:
      method: method of the model; a composition or a single method.
      places: the placements: which method acts at which site.
      routings: path of each bank of a composition -> `Routing` of its members.
      hosts: hosts of a composition's members, in the order of a `mix` by site.
      batch: number of rows that the model is called with, if the backbone runs on copies of the
        rows; otherwise None.
      groups: `groups` of the model.
    """

    def __init__(
        self,
        method: MethodConfig,
        places: list[Placement],
        *,
        depth: int,
        deterministic: bool,
        param_dtype: Dtype,
        routings: Mapping[Path, Routing],
        hosts: tuple[str, ...],
        batch: int | None,
        groups: Groups | None = None,
    ):
        self.method, self.places, self.depth = method, places, depth
        self.deterministic, self.param_dtype = deterministic, param_dtype
        self.routings, self.hosts, self.batch = routings, hosts, batch
        self.groups = groups
        self.members = composed_members(method)
        self.pushed: dict[Any, nn.Module] = {}
        self.owners: dict[Any, Placement] = {}
        self.opened: set[Any] = set()
        # The layers at hosts behind the embeddings, which a later host may call again.
        self.embedded: dict[tuple[Path, InsertedConfig, str], Run] = {}
        self.running: set[tuple[str, str]] = set()
        self.called: dict[Any, nn.Module] = {}
        self.is_paused = False

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        host = context.module
        path = "/".join(host.path[self.depth :])
        # flax intercepts a class that calls super().__call__ twice; the same holds for modules
        # within a host that share its scope. The outer call is the host's.
        call = (path, context.method_name)
        if self.is_paused or call in self.running:
            return next_fun(*args, **kwargs)
        places = self._places(path, context.method_name)
        if not places and not (self.members and context.method_name == "__call__"):
            return next_fun(*args, **kwargs)
        if places:
            self._check_alone((host.scope, context.method_name), host, path)
        args, kwargs = by_position(context, args, kwargs)

        def run(*args: Any) -> Any:
            self.running.add(call)
            try:
                return next_fun(*args, **kwargs)
            finally:
                self.running.discard(call)

        if self.members and context.method_name == "__call__":
            run = functools.partial(self._run_replaced, context, path, run, kwargs)
        return self._around(places, context, path, run, args)

    def _check_alone(self, call: Any, host: nn.Module, path: str) -> None:
        """Raises ValueError if a host shares its scope with another host that was called."""
        other = self.called.setdefault(call, host)
        if (type(other), other.name) != (type(host), host.name):
            raise ValueError(
                f"the site {path or 'the model itself'} is a {type(other).__name__} and a "
                f"{type(host).__name__} that share a scope (nn.share_scope), and one adapter "
                "cannot act at both; choose the module around them as site"
            )

    def _places(self, path: str, method: str) -> list[Placement]:
        """Returns the placements at a path, one per member, and records the layers left out."""
        found: dict[Path, Placement] = {}
        for place in self.places:
            if place.site.method != method or not (match := place.pattern.fullmatch(path)):
                continue
            layer = match.groupdict().get("layer")
            place.matched_layers.add(None if layer is None else int(layer))
            if layer is not None and int(layer) in place.config.leave_out:
                continue
            if place.member.path in found:
                raise ValueError(both_at(found[place.member.path], place, path))
            found[place.member.path] = place
        return list(found.values())

    def _around(self, places: list[Placement], context: Any, path: str, run: Run, args: Any) -> Any:
        """Runs the host, and the methods that act before and after it."""
        before = [place for place in places if place.is_before]
        after = [place for place in places if not place.is_before]
        if before:
            acts = self._acts(before, context, path, run, args)
            x, residual, join_args = split_args(before[0].site, context, path, args)
            x = combine(self.method, acts, x, residual)
            if before[0].config.replaces_residual:
                return x
            args = join_args(x)
        y = run(*args)
        if not after:
            return y
        acts = self._acts(after, context, path, run, args)
        host_input = args[first_array(args)] if args else None
        index = output_of(after, y, path)
        if index is None:
            return combine(self.method, acts, y, host_input)
        return with_item(y, index, combine(self.method, acts, y[index], host_input))

    def _acts(
        self, places: list[Placement], context: Any, path: str, run: Run, args: Any
    ) -> dict[Path, Act]:
        """Returns the effect of each member; the members of `AverageMaps` have one together."""
        calls = {
            place.member.path: HostCall(self, place, context, path, run, args) for place in places
        }
        for maps in self._averaged():
            together = {key: calls.pop(key) for key in list(calls) if key[:-1] == maps}
            if together:
                weights = node_at(self.method, maps).map_weights()
                calls[maps] = AveragedHostCall.of(weights, together)
        return {key: functools.partial(one.config.act, one) for key, one in calls.items()}

    def _averaged(self) -> set[Path]:
        """Returns the paths of averages whose members become one dense layer."""
        return {
            member.path[:-1]
            for member in self.members
            if member.path
            and node_at(self.method, member.path[:-1]).map_weights() is not None
            and any(part.has_dense_equivalent for part in member.method.inserted())
        }

    def check(self) -> None:
        """Raises ValueError if a site matched no module, or a layer to leave out does not exist."""
        for place in self.places:
            if place.site.role == "positions":  # a layer may lack them
                continue
            if not place.matched_layers:
                raise ValueError(
                    f"site {place.name!r} matched no module: no path matches "
                    f"{place.pattern.pattern!r} in full (nnx modules inside a linen module have "
                    "no paths: adapt a linen module, and convert the result to nnx)"
                )
            layers = {layer for layer in place.matched_layers if layer is not None}
            leave_out = set(place.config.leave_out)
            if not layers or not leave_out:
                continue
            if absent := sorted(leave_out - layers):
                raise ValueError(
                    f"leave_out has {absent}, but site {place.name!r} has layers "
                    f"{min(layers)} to {max(layers)}"
                )
            if layers <= leave_out:
                raise ValueError(f"leave_out leaves no layer of site {place.name!r} to adapt")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pauses the interceptor, so that calls within are those of layers instead of hosts."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def open(self, host: nn.Module, path: str, member: Path) -> Any:
        """Opens the scope of a composition's member under a host, created by hand."""
        scope = host.scope
        assert scope is not None
        if scope not in self.opened and scope.name_reserved(ADAPTER):
            raise ValueError(NAME_TAKEN.format(path))
        self.opened.add(scope)
        for name in (ADAPTER, *member):
            scope = scope.push(name, reuse=True)
        return scope

    def route(self, host: str, bank: Path, rows: int) -> Routing:
        """Returns the routing of a bank at a host, both by their paths."""
        routing = self.routings[bank]
        if routing.occupied is None:  # the model is being initialised
            occupied = jnp.ones(routing.bank.size, bool)
            ids = jnp.zeros(rows, jnp.int32)
            return dataclasses.replace(routing, ids=ids, occupied=occupied)
        mix = routing.mix
        if mix is not None and mix.ndim == 3 and mix.shape[1] != len(self.hosts):
            raise ValueError(
                f"mix has shape {mix.shape}, but the bank acts at {len(self.hosts)} sites; "
                "mixing_sites(params) lists them"
            )
        # A member of a `Parallel` within another `Parallel` sees some of the copies of the batch.
        batch = rows if self.batch is None else self.batch
        return routing.at(self.hosts.index(host), rows, batch)

    def _run_replaced(
        self, context: Any, path: str, run: Run, kwargs: Mapping[str, Any], *args: Any
    ) -> Any:
        """Runs the host with the members' leaves in place of its own."""
        host = context.module
        if host.is_initializing():
            y = run(*args)
            self._create_replacements(host, path)
            return y
        own = dict(host.variables.get("params", {}))
        inserted = own.pop(ADAPTER, {})
        replaced = {
            name: {
                member.path: descend(inserted, (*member.path, REPLACED, name)) for member in members
            }
            for name, members in self._replacing(own, path).items()
        }
        if not replaced:
            return run(*args)
        if len(args) != 1 or kwargs or any(isinstance(leaf, Mapping) for leaf in own.values()):
            raise ValueError(
                f"{path} is not a plain norm or dense layer, so members of a composition cannot "
                f"have {', '.join(replaced)} of their own there"
            )
        (x,) = args
        route = functools.partial(self.route, path)
        leaves = {}
        for name, stored in replaced.items():
            mine = own[name].dequantized() if is_quantized(own[name]) else own[name]
            leaf = Leaf(mine)
            leaves[name] = replacements.effective(self.method, leaf, stored, route, x.shape[0])
        with self.paused():
            return replacements.run_with(host, own, leaves, x)

    def _replacing(self, own: Mapping[str, Any], path: str) -> dict[str, list[Member]]:
        """Returns name of a leaf -> members that replace this leaf of a host's `own`."""
        replacing: dict[str, list[Member]] = {}
        for name, leaf in own.items():
            whole = f"{path}/{name}" if path else name
            members = [member for member in self.members if replaces(member, whole, self.groups)]
            if members and not isinstance(leaf, Mapping):
                replacing[name] = members
        return replacing

    def _create_replacements(self, host: nn.Module, path: str) -> None:
        own = dict(host.variables.get("params", {}))
        for name, members in self._replacing(own, path).items():
            for member in members:
                scope = self.open(host, path, (*member.path, REPLACED))
                scope.put_variable("params", name, replacements.stored_leaf(own[name], member))
