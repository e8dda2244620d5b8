"""The interceptor behind `Adapted`: which host is a site, and what a method does there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from compacter_jax import adapters
from compacter_jax.adapters import Dtype
from compacter_jax.config import (
    ADAPTER,
    BitFitConfig,
    BottleneckConfig,
    IA3Config,
    InsertedConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from compacter_jax.sites import Role, Site

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
    in_layers = site.role not in ("embedding", "bias")
    if in_layers and "layer" not in re.compile(site.host).groupindex:
        raise ValueError(
            f"the pattern {site.host!r} of site {name!r} has no group that is the "
            r"layer's index; write it as (?P<layer>\d+)"
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
    pattern: re.Pattern[str]
    config: InsertedConfig
    shared: Mapping[str, Any]
    met: set[int | None] = dataclasses.field(default_factory=set)  # None where there are no layers


def _both(one: Place, other: Place, path: str) -> str:
    return (
        f"sites {one.name!r} and {other.name!r} are both {path or 'the model itself'}; "
        "name one of them"
    )


class Hook:
    """The interceptor: runs the host, and a layer inside the host's scope."""

    def __init__(self, places: list[Place], *, depth: int, deterministic: bool, param_dtype: Dtype):
        self.places, self.depth = places, depth
        self.deterministic, self.param_dtype = deterministic, param_dtype
        self.pushed: dict[Any, nn.Module] = {}
        self.owners: dict[Any, Place] = {}
        self.running: set[tuple[int, str]] = set()

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        host = context.module
        path = "/".join(host.path[self.depth :])
        # A class that calls super().__call__ comes twice: the outer call is the host's.
        call = (id(host), context.method_name)
        place = None if call in self.running else self._place(path, context.method_name)
        if place is None:
            return next_fun(*args, **kwargs)

        def run(*args: Any) -> Any:
            self.running.add(call)
            try:
                return next_fun(*args, **kwargs)
            finally:
                self.running.discard(call)

        act = next(act for cls, act in _ACTS.items() if isinstance(place.config, cls))
        return act(_Acting(self, place, context, path), run, args)

    def _place(self, path: str, method: str) -> Place | None:
        """Where `path` is, if a layer goes there; notes the layer, left out or not."""
        found = None
        for place in self.places:
            if place.site.method != method or not (match := place.pattern.fullmatch(path)):
                continue
            layer = match.groupdict().get("layer")
            place.met.add(None if layer is None else int(layer))
            if layer is not None and int(layer) in place.config.leave_out:
                continue
            if found is not None:
                raise ValueError(_both(found, place, path))
            found = place
        return found

    def check(self) -> None:
        """ValueError if a site met no module or a layer to leave out does not exist."""
        for place in self.places:
            if place.site.role == "positions":  # some layers have them, none need to
                continue
            if not place.met:
                raise ValueError(
                    f"site {place.name!r} matched no module: no path matches "
                    f"{place.pattern.pattern!r} in full (and under nn.jit, what was "
                    "traced before runs without adapters: take nn.jit out of the backbone)"
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


@dataclasses.dataclass
class _Acting:
    """One call of a host where a layer acts."""

    hook: Hook
    place: Place
    context: Any
    path: str

    @property
    def deterministic(self) -> bool:
        return self.hook.deterministic

    def layer(self, cls: Callable[..., nn.Module], like: Any, *args: Any, **settings: Any) -> Any:
        """A layer of class `cls` in the scope of the host, computing in the dtype of `like`.

        Raises:
          ValueError: if `like` is no array, or the host has something named as adapters are.
        """
        if not isinstance(like, jax.Array):
            raise ValueError(
                f"the host {self.path} returns {type(like).__name__}, not an array; choose as site "
                "the module that returns the hidden states alone"
            )
        host, pushed = self.context.module, self.hook.pushed
        # A second call of the same host shares its adapter's parameters.
        if host.scope in pushed:
            return pushed[host.scope]
        owner = self.hook.owners.setdefault(host.scope, self.place)
        if owner is not self.place:
            raise ValueError(_both(owner, self.place, self.path))
        if host.scope.name_reserved(ADAPTER):
            raise ValueError(
                f"the host {self.path} has something of its own named {ADAPTER!r}; choose another "
                "module as site"
            )
        settings |= {"dtype": like.dtype, "param_dtype": self.hook.param_dtype}
        # A method other than a call is a part of a compact call.
        compact = hasattr(self.context.orig_method, "compact")
        if compact or self.place.site.method != "__call__":
            return cls(*args, name=ADAPTER, **settings)
        # A setup-style host allows no submodules in its call, so the scope is made by hand.
        pushed[host.scope] = cls(*args, parent=host.scope.push(ADAPTER), **settings)
        return pushed[host.scope]


# What a method does at a site: `run` is the host, to be called before a layer is made, so that its
# rng counters and names stay as they were; `args` are its arguments.
_Run = Callable[..., Any]


def _bottleneck(acting: _Acting, run: _Run, args: Any) -> Any:
    config, role = acting.place.config, acting.place.site.role
    assert isinstance(config, BottleneckConfig)

    def adapt(x: Any, skip: Any) -> Any:
        layer = acting.layer(adapters.Bottleneck, x, config)
        return layer(x, skip=skip, deterministic=acting.deterministic, **acting.place.shared)

    if role == "output":
        y = run(*args)
        return adapt(y, None)
    if role == "parallel":
        y = run(*args)
        if isinstance(y, tuple):
            return (adapt(args[0], y[0]), *y[1:])
        return adapt(args[0], y)
    residual, output, *rest = args
    joined = run(residual, output, *rest) if config.original_ln_before else output
    skip = output if config.residual_before_ln else joined
    out = adapt(residual if config.parallel else joined, skip)
    return run(residual, out, *rest) if config.original_ln_after else out


def _lora(acting: _Acting, run: _Run, args: Any) -> Any:
    y = run(*args)
    delta = acting.layer(adapters.LoRADelta, y, acting.place.config, y.shape[-1])
    return y + delta(args[0], acting.deterministic)


def _ia3(acting: _Acting, run: _Run, args: Any) -> Any:
    config, x = acting.place.config, args[0]
    assert isinstance(config, IA3Config)
    if acting.place.name in config.sites:
        y = run(*args)
        return acting.layer(adapters.IA3Scale, y, "scale")(y)
    return run(acting.layer(adapters.IA3Scale, x, "input_scale")(x), *args[1:])


def _bitfit(acting: _Acting, run: _Run, args: Any) -> Any:
    y = run(*args)
    return acting.layer(adapters.AddedBias, y)(y)


def _prefix_tuning(acting: _Acting, run: _Run, args: Any) -> Any:
    config, site = acting.place.config, acting.place.site
    assert isinstance(config, PrefixTuningConfig)
    if site.role == "positions":
        queries, keys, *rest = args
        return run(queries, keys + config.prefix_length, *rest)
    query, key, value, biases, *rest = args
    length, heads = site.length_axis, 3 - site.length_axis
    width = key.shape[heads] * key.shape[3]
    layer = acting.layer(adapters.PrefixKeyValue, key, config, width)
    hidden = acting.place.shared.get(acting.place.name)
    prefixes = layer(key.shape[0], hidden, acting.deterministic)

    def extend(array: Any, prefix: Any) -> Any:
        prefix = prefix.reshape(*prefix.shape[:2], key.shape[heads], key.shape[3])
        prefix = jnp.moveaxis(prefix, 1, length)
        return jnp.concatenate([prefix, array], axis=length)

    key, value = (extend(*pair) for pair in zip((key, value), prefixes, strict=True))

    def lengthen(bias: Any) -> Any:
        # A bias of shifted positions is that of all keys already.
        count = 0 if bias is None else key.shape[length] - bias.shape[-1]
        return jnp.pad(bias, ((0, 0),) * (bias.ndim - 1) + ((count, 0),)) if count else bias

    return run(query, key, value, tuple(lengthen(bias) for bias in biases), *rest)


def _prompt_tuning(acting: _Acting, run: _Run, args: Any) -> Any:
    y = run(*args)
    return acting.layer(adapters.SoftPrompt, y, acting.place.config)(y)


_ACTS: dict[type[InsertedConfig], Callable[[_Acting, _Run, Any], Any]] = {
    BottleneckConfig: _bottleneck,
    LoRAConfig: _lora,
    IA3Config: _ia3,
    BitFitConfig: _bitfit,
    PrefixTuningConfig: _prefix_tuning,
    PromptTuningConfig: _prompt_tuning,
}
