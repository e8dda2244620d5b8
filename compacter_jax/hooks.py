"""The interceptor behind `Adapted`: which host is a site, and what a method does there."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from compacter_jax import adapters, compose
from compacter_jax.adapters import Dtype
from compacter_jax.compose import Call, Path, Selection, Shared
from compacter_jax.config import (
    AverageMaps,
    BitFitConfig,
    BottleneckConfig,
    Composition,
    IA3Config,
    InsertedConfig,
    LoRAConfig,
    Member,
    MethodConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    dense_twin,
    members_of,
    replaces,
)
from compacter_jax.hosts import by_position, linear
from compacter_jax.messages import quote
from compacter_jax.nn.quantize import is_quantized
from compacter_jax.paths import ADAPTER, REPLACED, Groups
from compacter_jax.patterns import Pattern, compiled
from compacter_jax.sites import Role, Site

_Run = Callable[..., Any]

# Roles where a method acts on what the host is called with -> how it is called.
_BEFORE: dict[Role, str] = {
    "join": "join(residual, output)",
    "attend": "attend(query, key, value, biases), of arrays [batch, length, heads, width] and a "
    "sequence of biases",
    "positions": "positions(queries, keys)",
}

# Kind of method -> the roles of sites where it can act.
_ROLES: dict[type[InsertedConfig], tuple[Role, ...]] = {
    BottleneckConfig: ("output", "parallel", "join"),
    LoRAConfig: ("output",),
    IA3Config: ("output",),
    BitFitConfig: ("output", "bias"),
    PrefixTuningConfig: ("attend",),
    PromptTuningConfig: ("embedding",),
}


def check_site(name: str, site: Site, part: InsertedConfig) -> None:
    """ValueError if `part` cannot act at `site`, or not in the way it says."""
    roles = next(roles for cls, roles in _ROLES.items() if isinstance(part, cls))
    if site.role not in roles:
        raise ValueError(
            f"method {part.kind!r} cannot act at site {name!r}, whose role is {site.role!r}; "
            f"it acts at sites of the roles {', '.join(roles)}"
        )
    _check_output(name, site)
    in_layers = site.role not in ("embedding", "bias")
    if in_layers and "layer" not in compiled(site.host).groupindex:
        raise ValueError(
            f"the pattern {site.host!r} of site {name!r} has no group that is the "
            r"layer's index; write it as (?P<layer>\d+), or (?P<layer>\d+)? under nn.scan"
        )
    if not isinstance(part, BottleneckConfig):
        return
    is_parallel = site.role == "parallel" or name.startswith("parallel_")
    if is_parallel and not part.parallel:
        raise ValueError(f"site {name!r} is for parallel adapters; set parallel=True")
    if site.role == "output" and part.parallel:
        raise ValueError(
            f"at site {name!r} an adapter sees the sub-layer's output alone; parallel ones go to "
            f"'parallel_{name}'"
        )
    moved = part.original_ln_before or not (part.original_ln_after and part.residual_before_ln)
    if site.role != "join" and moved:
        raise ValueError(
            f"original_ln_before, original_ln_after and residual_before_ln need the residual; use "
            f"'residual_{name.removeprefix('parallel_')}' in place of site {name!r}"
        )


def _check_output(name: str, site: Site) -> None:
    """ValueError if a site says which output is acted on, and cannot."""
    index = site.output
    if index is None:
        return
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise ValueError(
            f"site {name!r} has output={quote(index)}; it is the index, 0 or more, of one of "
            "the things that the host returns"
        )
    if site.role in _BEFORE:
        raise ValueError(
            f"site {name!r} has output={index}, but what acts at the role {site.role!r} acts on "
            "what the host is called with; leave output out"
        )


def companions(site: Site, part: InsertedConfig) -> tuple[Site, ...]:
    """Where `part` acts too if it acts at `site`."""
    if isinstance(part, PrefixTuningConfig) and part.shift_positions:
        return (dataclasses.replace(site, method="relative_bias", role="positions"),)
    return ()


@dataclasses.dataclass
class Place:
    """A site, what acts there, and the layers of the backbone in which it was met."""

    name: str
    site: Site
    pattern: Pattern
    config: InsertedConfig
    shared: Shared
    member: Member
    met: set[int | None] = dataclasses.field(default_factory=set)  # None where there are no layers

    @property
    def is_before(self) -> bool:
        """Whether the layer acts before its host, on what the host is called with."""
        if self.site.role in _BEFORE:
            return True
        return isinstance(self.config, IA3Config) and self.name not in self.config.sites


def _both(one: Place, other: Place, path: str) -> str:
    return (
        f"sites {one.name!r} and {other.name!r} are both {path or 'the model itself'}; "
        "name one of them"
    )


class Hook:
    """The interceptor: runs the host, and layers inside the host's scope.

    Attributes:
      method: of the model; a composition or a single method.
      places: where what acts.
      selections: of the banks of a composition.
      hosts: the hosts of a composition's members, in the order in which a `mix` may list them.
      batch: how many rows the model is called with, where the backbone has copies of them; None
        where it has them as they are.
      groups: of the model.
    """

    def __init__(
        self,
        method: MethodConfig,
        places: list[Place],
        *,
        depth: int,
        deterministic: bool,
        param_dtype: Dtype,
        selections: Mapping[Path, Selection],
        hosts: tuple[str, ...],
        batch: int | None,
        groups: Groups | None = None,
    ):
        self.method, self.places, self.depth = method, places, depth
        self.deterministic, self.param_dtype = deterministic, param_dtype
        self.selections, self.hosts, self.batch = selections, hosts, batch
        self.groups = groups
        self.members = members_of(method) if isinstance(method, Composition) else ()
        self.pushed: dict[Any, nn.Module] = {}
        self.owners: dict[Any, Place] = {}
        self.opened: set[Any] = set()
        self.running: set[tuple[str, str]] = set()
        self.called: dict[Any, nn.Module] = {}
        self.is_aside = False

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        host = context.module
        path = "/".join(host.path[self.depth :])
        # A class that calls super().__call__ comes twice, and so do modules within one whose scope
        # they share: the outer call is the host's.
        call = (path, context.method_name)
        if self.is_aside or call in self.running:
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
        """ValueError if a host shares its scope with another one that has been called."""
        other = self.called.setdefault(call, host)
        if (type(other), other.name) != (type(host), host.name):
            raise ValueError(
                f"the site {path or 'the model itself'} is a {type(other).__name__} and a "
                f"{type(host).__name__} that share a scope (nn.share_scope), and one adapter "
                "cannot act at both; choose the module around them as site"
            )

    def _places(self, path: str, method: str) -> list[Place]:
        """Where `path` is, if layers go there, one of each member; notes a layer left out, too."""
        found: dict[Path, Place] = {}
        for place in self.places:
            if place.site.method != method or not (match := place.pattern.fullmatch(path)):
                continue
            layer = match.groupdict().get("layer")
            place.met.add(None if layer is None else int(layer))
            if layer is not None and int(layer) in place.config.leave_out:
                continue
            if place.member.path in found:
                raise ValueError(_both(found[place.member.path], place, path))
            found[place.member.path] = place
        return list(found.values())

    def _around(self, places: list[Place], context: Any, path: str, run: _Run, args: Any) -> Any:
        """The host with what acts before and after it."""
        before = [place for place in places if place.is_before]
        after = [place for place in places if not place.is_before]
        if before:
            acts = self._acts(before, context, path, run, args)
            state, read, put_back = _held(before[0].site, context, path, args)
            state = compose.combine(self.method, acts, state, read)
            if not getattr(before[0].config, "original_ln_after", True):
                return state
            args = put_back(state)
        y = run(*args)
        if not after:
            return y
        acts = self._acts(after, context, path, run, args)
        read = args[_first_array(args)] if args else None
        index = _output_of(after, y, path)
        if index is None:
            return compose.combine(self.method, acts, y, read)
        return _with_item(y, index, compose.combine(self.method, acts, y[index], read))

    def _acts(
        self, places: list[Place], context: Any, path: str, run: _Run, args: Any
    ) -> dict[Path, compose.Act]:
        """What each member does; the members of `AverageMaps` do one thing together."""
        acting = {
            place.member.path: _Acting(self, place, context, path, run, args) for place in places
        }
        for maps in self._averaged():
            together = {key: acting.pop(key) for key in list(acting) if key[:-1] == maps}
            if together:
                node = _node_at(self.method, maps)
                acting[maps] = _ActingTogether.of(node, together)
        return {key: functools.partial(_act, one) for key, one in acting.items()}

    def _averaged(self) -> set[Path]:
        """Paths of what averages the maps of bottlenecks: those of other methods are linear."""
        return {
            member.path[:-1]
            for member in self.members
            if member.path
            and isinstance(member.method, BottleneckConfig)
            and isinstance(_node_at(self.method, member.path[:-1]), AverageMaps)
        }

    def check(self) -> None:
        """ValueError if a site met no module or a layer to leave out does not exist."""
        for place in self.places:
            if place.site.role == "positions":  # some layers have them, none need to
                continue
            if not place.met:
                raise ValueError(
                    f"site {place.name!r} matched no module: no path matches "
                    f"{place.pattern.pattern!r} in full (modules of nnx within one of linen have "
                    "none: adapt the linen module, and turn that into one of nnx)"
                )
            layers = {layer for layer in place.met if layer is not None}
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
    def aside(self) -> Iterator[None]:
        """Within it, calls of modules are no hosts: they are those of layers."""
        before, self.is_aside = self.is_aside, True
        try:
            yield
        finally:
            self.is_aside = before

    def open(self, host: nn.Module, path: str, member: Path) -> Any:
        """The scope of a composition's member under a host, made by hand."""
        scope = host.scope
        assert scope is not None
        if scope not in self.opened and scope.name_reserved(ADAPTER):
            raise ValueError(_NAME_TAKEN.format(path))
        self.opened.add(scope)
        for name in (ADAPTER, *member):
            scope = scope.push(name, reuse=True)
        return scope

    def select(self, host: str, bank: Path, rows: int) -> Selection:
        """Which rows use which members of the bank at a host, all three by their paths."""
        selection = self.selections[bank]
        if selection.occupied is None:  # the model is being initialised
            occupied = jnp.ones(selection.bank.size, bool)
            ids = jnp.zeros(rows, jnp.int32)
            return dataclasses.replace(selection, ids=ids, occupied=occupied)
        mix = selection.mix
        if mix is not None and mix.ndim == 3 and mix.shape[1] != len(self.hosts):
            raise ValueError(
                f"mix has shape {mix.shape}, but the bank acts at {len(self.hosts)} sites; "
                "mixing_sites(params) lists them"
            )
        # Each member of a `Parallel` within another sees some of the copies of the batch.
        batch = rows if self.batch is None else self.batch
        return selection.at(self.hosts.index(host), rows, batch)

    def _run_replaced(
        self, context: Any, path: str, run: _Run, kwargs: Mapping[str, Any], *args: Any
    ) -> Any:
        """The host, with the members' leaves in place of its own where they have such."""
        host = context.module
        if host.is_initializing():
            y = run(*args)
            self._create_replacements(host, path)
            return y
        own = dict(host.variables.get("params", {}))
        inserted = own.pop(ADAPTER, {})
        replaced = {
            name: {
                member.path: _descend(inserted, (*member.path, REPLACED, name))
                for member in members
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
        select = functools.partial(self.select, path)
        leaves = {}
        for name, stored in replaced.items():
            mine = own[name].dequantized() if is_quantized(own[name]) else own[name]
            leaf = compose.Leaf(mine)
            leaves[name] = compose.effective(self.method, leaf, stored, select, x.shape[0])
        with self.aside():
            return compose.run_with(host, own, leaves, x)

    def _replacing(self, own: Mapping[str, Any], path: str) -> dict[str, list[Member]]:
        """Which members have leaves in place of a host's `own`, by the names of the leaves."""
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
                scope.put_variable("params", name, compose.stored_leaf(own[name], member))


def _descend(tree: Any, path: Path) -> Any:
    return functools.reduce(lambda node, name: node[name], path, tree)


def _node_at(method: MethodConfig, path: Path) -> MethodConfig:
    """The member of a composition to which names lead."""
    for name in path:
        assert isinstance(method, Composition)
        method = dict(zip(method.names, method.members, strict=True))[name]
    return method


_NAME_TAKEN = (
    "the host {} has something of its own named '" + ADAPTER + "'; choose another module as site"
)


def _call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer(*args, **kwargs)  # type: ignore[operator]


@dataclasses.dataclass
class _Acting:
    """One call of a host where a layer of one member acts.

    Attributes:
      run: the host, which a layer that acts before it may have to call by itself.
      args: what it is called with.
    """

    hook: Hook
    place: Place
    context: Any
    path: str
    run: _Run
    args: Any

    @property
    def deterministic(self) -> bool:
        return self.hook.deterministic

    @property
    def bottleneck(self) -> BottleneckConfig:
        """The method, which is one of bottlenecks."""
        assert isinstance(self.place.config, BottleneckConfig)
        return self.place.config

    def layer(
        self,
        cls: Callable[..., nn.Module],
        like: Any,
        *args: Any,
        inputs: tuple[Any, ...],
        plain: Any,
        how: Callable[..., Any] = _call,
        **named: Any,
    ) -> Any:
        """Calls a layer in the scope of the host, computing in the dtype of `like`.

        Args:
          cls: of the layer.
          like: an array.
          *args: what the layer is made with.
          inputs: with `plain`, `how` and `named` what a `compose.Call` is.
          plain: see there.
          how: see there.
          **named: see there.

        Raises:
          ValueError: if `like` is no array, or the host has something named as adapters are.
        """
        if not isinstance(like, jax.Array):
            raise ValueError(
                f"the host {self.path} returns {type(like).__name__}, not an array; choose as site "
                "the module that returns the hidden states alone, or, of a tuple, say which they "
                "are: Site(host=…, output=1)"
            )
        settings = {"dtype": like.dtype, "param_dtype": self.hook.param_dtype}
        create = functools.partial(cls, *args, **settings)
        return self._called(create, Call(inputs, named, plain, how))

    def _called(self, create: functools.partial[nn.Module], call: Call) -> Any:
        if self.place.member.bank is not None:
            return self._banked(create, call)
        shared = self.place.shared.common
        return call.how(self._module(create), *call.inputs, **call.named, **shared)

    def _module(self, create: Callable[..., nn.Module]) -> nn.Module:
        host, pushed = self.context.module, self.hook.pushed
        member = self.place.member.path
        # A second call of the same host shares its adapter's parameters.
        key = (host.scope, member)
        if key in pushed:
            return pushed[key]
        owner = self.hook.owners.setdefault(key, self.place)
        if owner is not self.place:
            raise ValueError(_both(owner, self.place, self.path))
        if member:
            pushed[key] = create(parent=self.hook.open(host, self.path, member))
            return pushed[key]
        if host.scope.name_reserved(ADAPTER):
            raise ValueError(_NAME_TAKEN.format(self.path))
        # A method other than a call is a part of a compact call.
        compact = hasattr(self.context.orig_method, "compact")
        if compact or self.place.site.method != "__call__":
            return create(name=ADAPTER)
        # A setup-style host allows no submodules in its call, so the scope is made by hand.
        pushed[key] = create(parent=host.scope.push(ADAPTER))
        return pushed[key]

    def _params(self, init: Callable[[jax.Array], Any]) -> Any:
        """A layer's parameters as a tree, made by `init` while the model is initialised."""
        host, member = self.context.module, self.place.member.path
        owner = self.hook.owners.setdefault((host.scope, member), self.place)
        if owner is not self.place:
            raise ValueError(_both(owner, self.place, self.path))
        scope = self.hook.open(host, self.path, member)
        stored = host.variables.get("params", {})
        own = dict(_descend(stored, (ADAPTER, *member))) if _holds(stored, member) else {}
        own.pop(REPLACED, None)
        if host.is_initializing() and not own:
            with self.hook.aside():
                own = init(scope.make_rng("params"))
            for name, leaf in own.items():
                scope.put_variable("params", name, leaf)
        return own

    def _dropout_key(self, call: Call) -> jax.Array | None:
        host = self.context.module
        drops = not call.named.get("deterministic", True) and host.has_rng("dropout")
        scope = self.hook.open(host, self.path, self.place.member.path)
        return scope.make_rng("dropout") if drops else None

    def _banked(self, create: Callable[..., nn.Module], call: Call) -> Any:
        member, shared = self.place.member, self.place.shared
        assert member.bank is not None
        size = member.bank.size

        def init(key: jax.Array) -> Any:
            def one(key: jax.Array, stacked: Any) -> Any:
                return _initial(create(parent=None), key, call, **shared.common, **stacked)

            return jax.vmap(one)(jax.random.split(key, size), shared.stacked)

        params = self._params(init)
        selection = self.hook.select(self.path, member.path, call.inputs[0].shape[0])
        if selection.mix is None and not member.bank.has_plain:
            call = call._replace(plain=None)
        key = self._dropout_key(call)
        layer = compose.BankedLayer(_foldable(create), params, selection, shared, key)
        with self.hook.aside():
            return layer(call)

    def hiding(self, count: int, key: jax.Array, axis: int) -> tuple[jax.Array, ...]:
        """Biases of attention that hide the first `count` keys in rows of the plain backbone."""
        member = self.place.member
        if member.bank is None or not member.bank.has_plain:
            return ()
        is_plain = self.hook.select(self.path, member.path, key.shape[0]).is_plain
        hidden = is_plain[:, None] & (jnp.arange(key.shape[axis]) < count)
        dtype = jnp.promote_types(key.dtype, jnp.float32)
        return (jnp.where(hidden, jnp.finfo(dtype).min, 0).astype(dtype)[:, None, None, :],)


def _holds(stored: Mapping[str, Any], member: Path) -> bool:
    for name in (ADAPTER, *member):
        if name not in stored:
            return False
        stored = stored[name]
    return True


def _foldable(create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`create` that takes `folded`, which means something to bottlenecks alone."""

    def make(*, folded: bool = False) -> nn.Module:
        layer = create(parent=None)
        return layer.clone(folded=folded) if isinstance(layer, adapters.Bottleneck) else layer

    return make


@dataclasses.dataclass
class _ActingTogether(_Acting):
    """The members of `AverageMaps` where they act: one bottleneck with the average of their maps.

    Attributes:
      members: with their weights.
    """

    members: tuple[tuple[float, _Acting], ...] = ()

    @classmethod
    def of(cls, node: MethodConfig, acting: Mapping[Path, _Acting]) -> _ActingTogether:
        assert isinstance(node, AverageMaps)
        weights = dict(zip(node.names, node.weights, strict=True))
        members = tuple((weights[path[-1]], one) for path, one in acting.items())
        first = next(iter(acting.values()))
        return cls(
            first.hook, first.place, first.context, first.path, first.run, first.args, members
        )

    def _called(self, create: functools.partial[nn.Module], call: Call) -> Any:
        """As for one member; what the members share is built into their maps."""
        settings = create.keywords
        maps = []
        for weight, member in self.members:
            shared = member.place.shared.common
            layer = adapters.Bottleneck(member.bottleneck, **settings, parent=None)
            own = member._params(functools.partial(_initial, layer, call=call, **shared))
            dense = adapters.dense_params(own, shared)
            maps.append(jax.tree.map(lambda leaf, weight=weight: weight * leaf, dense))
        params = jax.tree.map(lambda *leaves: sum(leaves), *maps)
        layer = adapters.Bottleneck(dense_twin(self.bottleneck), **settings, parent=None)
        key = self.members[0][1]._dropout_key(call)
        with self.hook.aside():
            return call.apply(layer, params, key)


def _initial(layer: nn.Module, key: jax.Array, call: Call, **shared: Any) -> Any:
    """The parameters of a layer at first."""
    named = {**call.named, **shared}
    if "deterministic" in named:
        named["deterministic"] = True
    return layer.init(key, *call.inputs, **named, method=call.how)["params"]


def _output_of(places: list[Place], y: Any, path: str) -> int | None:
    """The index of what is acted on in what a host returns, None if it is all of it."""
    given = {place.site.output for place in places}
    if len(given) > 1:
        raise ValueError(
            f"sites {', '.join(repr(place.name) for place in places)} are both {path}, with "
            "different outputs; name one of them"
        )
    index = given.pop()
    if index is None:
        is_parallel = any(place.site.role == "parallel" for place in places)
        return 0 if is_parallel and isinstance(y, tuple) else None
    if not isinstance(y, tuple | list) or index >= len(y):
        count = f"{len(y)} things" if isinstance(y, tuple | list) else type(y).__name__
        raise ValueError(
            f"site {places[0].name!r} has output={index}, but the host {path} returns {count}; "
            "choose another output, or none for a host that returns an array"
        )
    return index


def _with_item(y: Any, index: int, item: Any) -> Any:
    """A tuple or list with another item."""
    items = [*y[:index], item, *y[index + 1 :]]
    return y._make(items) if hasattr(y, "_make") else type(y)(items)


def _held(site: Site, context: Any, path: str, args: Any) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Of a host's arguments what is acted on, what else is read, and how to put the former back."""
    role = site.role
    _check_arguments(role, context, path, args)
    first = {"join": 1, "attend": 1, "positions": 1}.get(role, 0)
    last = 4 if role == "attend" else first + 1
    state = tuple(args[first:last]) if role == "attend" else args[first]

    def put_back(state: Any) -> Any:
        changed = state if role == "attend" else (state,)
        return (*args[:first], *changed, *args[last:])

    return state, args[0] if role == "join" else None, put_back


def _check_arguments(role: Role, context: Any, path: str, args: Any) -> None:
    """ValueError if a host is not called as its role wants it."""
    fits = len(args) >= {"join": 2, "attend": 4, "positions": 2}.get(role, 1)
    if fits and role == "attend":
        arrays = all(isinstance(x, jax.Array) and x.ndim == 4 for x in args[1:3])
        fits = arrays and isinstance(args[3], tuple | list)
    if fits and role == "output":
        fits = isinstance(args[0], jax.Array)
    if not fits:
        kinds = ("array" if isinstance(x, jax.Array) else type(x).__name__ for x in args[:4])
        given = ", ".join(kinds)[:100]
        wanted = _BEFORE.get(role, "f(x), of an array")
        raise ValueError(
            f"a site of the role {role!r} wants a host that is called as {wanted}; "
            f"{type(context.module).__name__}.{context.method_name} at {path or 'the top'} is "
            f"called with ({given}); put it into a method that is called so, and name that: "
            "Site(host=…, method=…)"
        )


# What a method does at a site: `state` is what it acts on, of the host's arguments if it acts
# before it, otherwise its result; `read` is what else it reads, the residual or the host's input.


def _bottleneck(acting: _Acting, state: Any, read: Any) -> Any:
    config, role = acting.bottleneck, acting.place.site.role

    def adapt(x: Any, skip: Any, plain: Any) -> Any:
        deterministic = acting.deterministic
        return acting.layer(
            adapters.Bottleneck,
            x,
            config,
            inputs=(x,),
            plain=plain,
            skip=skip,
            deterministic=deterministic,
        )

    if role == "output":
        return adapt(state, None, state)
    if role == "parallel":
        return adapt(read, state, state)
    needs_plain = acting.place.member.bank is not None and not config.original_ln_after
    needed = config.original_ln_before or needs_plain
    whole = acting.run(read, state, *acting.args[2:]) if needed else state
    joined = whole if config.original_ln_before else state
    if config.residual_before_ln == "post_add":
        skip = read + state
    else:
        skip = state if config.residual_before_ln else joined
    plain = whole if needs_plain else state
    return adapt(read if config.parallel else joined, skip, plain)


def _first_array(args: Any) -> int:
    """The index of what a host acts on: an equation may come before it."""
    return next((i for i, x in enumerate(args) if isinstance(x, jax.Array | np.ndarray)), 0)


def _lora(acting: _Acting, y: Any, x: Any) -> Any:
    # A member may have some of the rows alone.
    first = _first_array(acting.args)
    args = (*acting.args[:first], x, *acting.args[first + 1 :])
    host, x = linear(acting.context.module, args, y, acting.path)
    update = acting.layer(
        adapters.LoRADelta,
        y,
        acting.place.config,
        host.width(y),
        inputs=(host.rows(x),),
        plain=0.0,
        deterministic=acting.deterministic,
    )
    return y + host.columns(update, y)


def _ia3(acting: _Acting, state: Any, _: Any) -> Any:
    name = "input_scale" if acting.place.is_before else "scale"
    return acting.layer(adapters.IA3Scale, state, name, inputs=(state,), plain=state)


def _bitfit(acting: _Acting, y: Any, _: Any) -> Any:
    return acting.layer(adapters.AddedBias, y, inputs=(y,), plain=y)


def _prefix_tuning(acting: _Acting, state: Any, _: Any) -> Any:
    config, site = acting.place.config, acting.place.site
    assert isinstance(config, PrefixTuningConfig)
    if site.role == "positions":
        return state + config.prefix_length
    key, value, biases = state
    length, heads = site.length_axis, 3 - site.length_axis
    width = key.shape[heads] * key.shape[3]
    prefixes = acting.layer(
        adapters.PrefixKeyValue,
        key,
        config,
        width,
        inputs=(key,),
        plain=None,
        how=_prefixes_like,
        deterministic=acting.deterministic,
    )

    def extend(array: Any, prefix: Any) -> Any:
        prefix = prefix.reshape(*prefix.shape[:2], key.shape[heads], key.shape[3])
        prefix = jnp.moveaxis(prefix, 1, length)
        return jnp.concatenate([prefix, array], axis=length)

    key, value = (extend(*pair) for pair in zip((key, value), prefixes, strict=True))

    def lengthen(bias: Any) -> Any:
        # A bias of shifted positions is that of all keys already.
        count = 0 if bias is None else key.shape[length] - bias.shape[-1]
        return jnp.pad(bias, ((0, 0),) * (bias.ndim - 1) + ((count, 0),)) if count else bias

    biases = tuple(lengthen(bias) for bias in biases)
    return key, value, (*biases, *acting.hiding(config.prefix_length, key, length))


def _prefixes_like(layer: nn.Module, key: Any, hidden: Any = None, **named: Any) -> Any:
    assert isinstance(layer, adapters.PrefixKeyValue)
    return layer(key.shape[0], hidden, **named)


def _prompt_tuning(acting: _Acting, y: Any, _: Any) -> Any:
    return acting.layer(adapters.SoftPrompt, y, acting.place.config, inputs=(y,), plain=y)


_ACTS: dict[type[InsertedConfig], Callable[[_Acting, Any, Any], Any]] = {
    BottleneckConfig: _bottleneck,
    LoRAConfig: _lora,
    IA3Config: _ia3,
    BitFitConfig: _bitfit,
    PrefixTuningConfig: _prefix_tuning,
    PromptTuningConfig: _prompt_tuning,
}


def _act(acting: _Acting, state: Any, read: Any) -> Any:
    act = next(act for cls, act in _ACTS.items() if isinstance(acting.place.config, cls))
    return act(acting, state, read)
