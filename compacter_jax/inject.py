"""`Adapted`: an `nn.intercept_methods` hook that runs a layer at each site of a backbone."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.errors import ScopeParamNotFoundError
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax import adapters, compose, hooks, intrinsic
from compacter_jax.activations import get_activation
from compacter_jax.adapters import Dtype, ParamFunction
from compacter_jax.config import (
    ADAPTER,
    OCCUPIED,
    REPLACED,
    SHARED,
    BitFitConfig,
    BottleneckConfig,
    CombinedConfig,
    Composition,
    FullFineTuningConfig,
    IA3Config,
    InsertedConfig,
    IntrinsicConfig,
    LoRAConfig,
    Member,
    MethodConfig,
    PHMBottleneckConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    copies_of,
    dense_twin,
    members_of,
    own_path,
    parts_of,
)
from compacter_jax.groups import check_groups
from compacter_jax.hosts import DENSE, Linear, met_in
from compacter_jax.limits import check_memory
from compacter_jax.messages import listing, mismatches, quote, shorten
from compacter_jax.patterns import compiled
from compacter_jax.quantize import check_float, is_quantized
from compacter_jax.sites import Site
from compacter_jax.trees import check_params


class HasParams(Protocol):
    """Anything with a tree of parameters: `Backbone`, or a model of another library."""

    @property
    def params(self) -> Any: ...


class Adapted(nn.Module):
    """`backbone` with a layer of `method` at every module that is one of its sites.

    The parameters are the backbone's under their own names, each adapter under its host as
    `…/adapter/…`, and what adapters share at the top. It is called as the backbone is, and
    returns what the backbone returns. What turns on the backbone's dropout, `deterministic=False`
    or, by another name, `train=True`, `training`, `is_training` or `enable_dropout`, turns on the
    adapters' too. Other methods of the backbone are called through `call`, or by `method=`.

    A model with a `Bank` is called with one argument more, by name: `adapter_ids`, `[batch]`
    integers, the member that each row uses, -1 for the plain backbone; or `mix`, floating-point
    weights of the members' outputs, `[size]` for all rows, `[batch, size]`, or `[batch or 1, sites,
    size]` with weights for every site of `mixing_sites`. With several banks each is a mapping of
    their names, `/`-joined. An id that no member has is a ValueError where ids are known, and
    where they are traced the row is NaN. A model with `Parallel` returns a tuple, of its members.

    Enter it inside the traced function: a function jitted before, outside, ignores the hook.

    Attributes:
      backbone: a linen module.
      method: what to insert.
      sites: site name -> `Site`, or a regular expression that fully matches `/`-joined paths of
        host modules, with a group `layer`. By default the backbone's own table, its class
        attribute `sites`.
      param_dtype: of the adapters' parameters; they compute in their host's dtype.
      groups: of the parameters of a backbone of others: "head", "layer_norms" or "pooler" ->
        regular expression that fully matches `/`-joined paths of parameters, or of modules that
        have them. `label_params` wants it, too.

    Raises:
      ValueError: when constructed, for an unknown site, group or activation, or a site where the
        method cannot act; when called, if a site or a layer to leave out was never met, a host does
        not return an array, or the adapters have dropout and the backbone takes nothing that
        turns it on.
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
                f"the backbone is of type {type(self.backbone).__name__}, no module of flax.linen; "
                "for one of nnx adapt its linen module, and turn that into one of nnx: "
                "bridge.ToNNX(Adapted(…), rngs=…)"
            )
        check_groups(self.groups)
        for part in parts_of(self.method):
            if (activation := getattr(part, "non_linearity", None)) is not None:
                get_activation(activation)
            for name, site in self._sites_of(part).items():
                hooks.check_site(name, site, part)

    def setup(self) -> None:
        nn.share_scope(self, self.backbone)
        scope = self.scope
        assert scope is not None
        # Part of what nn.jit compares calls by: it would reuse a call without adapters.
        scope.flags = FrozenDict({**scope.flags, ADAPTER: _NeverEqual()})
        self.shared = tuple(
            self._shared(member, part)
            for member in members_of(self.method)
            for part in parts_of(member.method)
        )
        for member in members_of(self.method):
            if (bank := member.bank) is not None:
                slots = self._param_under((SHARED, *member.path))
                slots(OCCUPIED, lambda _, size=bank.size: jnp.ones(size, bool))
        self.intrinsic: dict[str, Any] = {}
        if isinstance(self.method, IntrinsicConfig) and not self.is_initializing():
            self.intrinsic = self._intrinsic_params(self.method, self.param)

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `nn.Module.apply`; `method` may be the name of a method of the backbone.

        A function is called with the adapted model, as flax does; one that wants what only the
        backbone has, as those of transformers' wrappers, with that, adapters inserted.
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
                    "the function given as method= calls the backbone itself, which has no "
                    "parameters there; call its methods on the model that the function is given, "
                    "as in lambda model, x: model.features(x)"
                ) from error
        return super().apply(variables, method, *args, method=Adapted.call, **kwargs)

    def call(self, method: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls any method of the backbone, adapters inserted.

        Args:
          method: its name, or a function that takes the backbone first.
          *args: as the method takes them.
          **kwargs: likewise.

        Raises:
          ValueError: if the backbone has no such method.
        """
        if isinstance(method, str) and not hasattr(type(self.backbone), method):
            raise ValueError(f"{type(self.backbone).__name__} has no method {quote(method)}")
        return self._call(method, args, kwargs)

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
        """An equal model that computes only once what depends on parameters alone.

        For inference, where they do not change: a decoder would otherwise compute it at every
        token. Kronecker sums become dense bottlenecks, prefixes flat; what `merge_adapter` can
        merge is merged.

        Args:
          params: of this model.

        Returns:
          The model and its parameters; both as given if there is nothing to compute, or kernels of
          few bits would round away what is merged into them. Outputs are equal to rounding.
        """
        if isinstance(self.method, Composition):
            return self, params
        if isinstance(self.method, PHMBottleneckConfig):
            return self.clone(method=dense_twin(self.method)), adapters.build_weights(params)
        parts = parts_of(self.method)
        moves_kernels = any(isinstance(part, LoRAConfig | IA3Config) for part in parts)
        is_merged = moves_kernels and _unmergeable(self) is None
        if is_merged and _has_narrow_kernels(params):
            return self, params
        if is_merged or isinstance(self.method, IntrinsicConfig):
            return self.clone(method=FullFineTuningConfig()), merge_adapter(self, params)
        for part in parts:
            if isinstance(part, PrefixTuningConfig) and not part.flat:
                flat = part.replace(flat=True)
                hosts = {name: site.host for name, site in self._sites_of(part).items()}
                model = self.clone(method=_with_part(self.method, part, flat))
                return model.built(adapters.flat_prefixes(params, part, hosts))
        return self, params

    @nn.nowrap
    def _shared(self, member: Member, part: InsertedConfig) -> compose.Shared:
        """What the layers of a part share: arrays, as arguments of a layer, or by site."""

        def create(param: ParamFunction) -> dict[str, Any]:
            return self._create_shared(part, param)

        param = self._param_under((SHARED, *member.path)) if member.path else self.param
        if member.bank is None:
            return compose.Shared(create(param), {})
        return compose.banked_shared(create, param, member.bank)

    @nn.nowrap
    def _create_shared(self, part: InsertedConfig, param: ParamFunction) -> dict[str, Any]:
        width = getattr(getattr(self.backbone, "config", None), "hidden_size", None)
        if isinstance(part, PHMBottleneckConfig):
            return adapters.shared_params(param, part, width, self.param_dtype)
        if isinstance(part, PrefixTuningConfig) and not part.flat:
            return {
                site: adapters.prefix_hidden(param, part, site, width, self.param_dtype)
                for site in self._sites_of(part)
            }
        return {}

    @nn.nowrap
    def _param_under(self, path: tuple[str, ...]) -> ParamFunction:
        """The `param` method of a scope below the model's."""
        scope = self.scope
        assert scope is not None
        for name in path:
            scope = scope.push(name, reuse=True)
        return scope.param

    @nn.nowrap
    def _intrinsic_params(self, config: IntrinsicConfig, param: ParamFunction) -> dict[str, Any]:
        stored = flatten_dict(self.variables["params"], sep="/")
        paths = [path for path in stored if not _INTRINSIC.fullmatch(path)]
        init, dtype, groups = nn.initializers, self.param_dtype, self.groups
        size = (intrinsic.vector_size(config, paths, groups),)
        own = {"vector": param("intrinsic_vector", init.zeros, size, dtype), "scale": None}
        if config.structure_aware:
            layers = (len(intrinsic.layers_of(paths, groups)),)
            own["scale"] = param("intrinsic_scale", init.ones, layers, dtype)
        return own

    @nn.nowrap
    def _call(self, name: str | Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._check_weights()
        is_whole = name == "__call__"
        if isinstance(self.method, IntrinsicConfig) and not self.is_initializing():
            return self._perturbed(name, args, kwargs)
        if isinstance(name, str):
            call = getattr(self.backbone, name)
        else:
            call = functools.partial(name, self.backbone)
        parts = parts_of(self.method)
        kwargs, selections = self._selections(kwargs)
        if not parts:
            y = call(*args, **kwargs)
            if isinstance(self.method, IntrinsicConfig):  # its size follows from the backbone's
                self._intrinsic_params(self.method, self._param_under(()))
            return y
        bound = inspect.signature(call).bind(*args, **kwargs)
        copies = copies_of(self.method)
        if copies > 1 and not is_whole:
            raise ValueError(
                f"a model with Parallel has no {name!r}: what it returns would be of {copies} "
                "members; use a model of each"
            )
        batch = _repeat_rows(bound.arguments, copies) if copies > 1 else None
        prompt = sum(p.prompt_length for p in parts if isinstance(p, PromptTuningConfig))
        deterministic = _deterministic(bound)
        self._check_dropout()
        if prompt:
            if is_whole and "input_ids" not in bound.arguments:
                raise ValueError(
                    f"prompt tuning wants a backbone that is called with input_ids, and "
                    f"{type(self.backbone).__name__} is not"
                )
            _make_room(bound.arguments, prompt, getattr(self.backbone, "config", None))
        hook = hooks.Hook(
            self.method,
            self._places(),
            depth=len(self.path),
            deterministic=deterministic,
            param_dtype=self.param_dtype,
            selections=selections,
            hosts=compose.mixing_sites(self.variables.get("params", {})) if selections else (),
            batch=batch,
            groups=self.groups,
        )
        with nn.intercept_methods(hook):
            y = call(*bound.args, **bound.kwargs)
        if not is_whole:  # another method runs a part of the backbone
            return y
        hook.check()
        if prompt and hasattr(self.backbone, "without_first"):
            y = self.backbone.without_first(y, prompt)
        return _apart(y, copies) if copies > 1 else y

    @nn.nowrap
    def _check_dropout(self) -> None:
        """ValueError if the method has dropout and no call of the backbone turns it on."""
        rates = [getattr(part, "dropout", 0.0) for part in parts_of(self.method)]
        parameters = inspect.signature(type(self.backbone).__call__).parameters.values()
        is_told = any(
            parameter.name in _SWITCHES or parameter.kind is parameter.VAR_KEYWORD
            for parameter in parameters
        )
        if any(rates) and not is_told:
            raise ValueError(
                f"dropout={max(rates)} would never be on: {type(self.backbone).__name__} takes "
                f"none of {', '.join(_SWITCHES)}; set dropout=0.0, or give its __call__ one"
            )

    @nn.nowrap
    def _check_weights(self) -> None:
        """ValueError if weights are of int8 and the backbone's layers cannot compute with it."""
        params = {} if _is_own(self.backbone) else self.variables.get("params", {})
        if any(map(is_quantized, flatten_dict(params).values())):
            raise ValueError(
                f"the weights are of int8, with which {type(self.backbone).__name__} cannot "
                "compute; frozen weights of other modules than Bert and T5 can be of bfloat16"
            )

    @nn.nowrap
    def _selections(self, kwargs: Any) -> tuple[dict[str, Any], dict[Any, compose.Selection]]:
        """A call's arguments for the backbone, and those for the banks."""
        given = {name: kwargs.get(name) for name in ("adapter_ids", "mix")}
        kwargs = {name: value for name, value in kwargs.items() if name not in given}
        params = {} if self.is_initializing() else self.variables.get("params", {})
        return kwargs, compose.select(self.method, params, **given)

    @nn.nowrap
    def _places(self) -> list[hooks.Place]:
        """Where what acts."""
        shared, places = iter(self.shared), []
        for member in members_of(self.method):
            for part in parts_of(member.method):
                own = next(shared)
                for name, site in self._sites_of(part).items():
                    for acted_on in (site, *hooks.companions(site, part)):
                        # Arrays, not modules, are shared: closing over a module breaks under remat.
                        of_site = own.at(name) if isinstance(part, PrefixTuningConfig) else own
                        pattern = compiled(site.host)
                        places.append(hooks.Place(name, acted_on, pattern, part, of_site, member))
        return places

    @nn.nowrap
    def _perturbed(self, name: str | Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The call with every parameter of the backbone moved within the subspace."""
        assert isinstance(self.method, IntrinsicConfig)
        params = _at_least_float32(_without_intrinsic(self.variables["params"]))
        seed = self.method.projection_seed
        vector, scale = self.intrinsic["vector"], self.intrinsic["scale"]
        moved = intrinsic.perturb(params, vector, scale, seed, self.groups)
        rngs = {"dropout": self.make_rng("dropout")} if self.has_rng("dropout") else None
        backbone = self.backbone.clone(parent=None, name=None)
        return backbone.apply(
            {**self.variables, "params": moved}, *args, rngs=rngs, method=name, **kwargs
        )

    @nn.nowrap
    def _sites_of(self, part: InsertedConfig) -> dict[str, Site]:
        """The sites of `part` by name, those passed over left out."""
        table = self._table()
        absent = getattr(self.backbone, "absent_sites", ()) if self.sites is None else ()
        known = [name for name in table if name not in absent]
        passed_over = type(part)().sites if part.passes_over else ()
        unknown = [name for name in part.all_sites() if name not in (*known, *passed_over)]
        present = {name: _as_site(table[name]) for name in part.all_sites() if name in known}
        if isinstance(part, BitFitConfig) and not present and not unknown:
            if part.leave_out:
                raise ValueError(
                    f"{type(self.backbone).__name__} has biases of its own, and BitFit trains them "
                    "all; leave_out is for new ones"
                )
        elif unknown or not present:
            name = (*unknown, *part.all_sites())[0]
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


_INTRINSIC = re.compile("intrinsic_(vector|scale)")
_OWN = "compacter_jax.models."
_LACKING = '"Adapted" object has no attribute'
# Names under which backbones are told to be deterministic, or the opposite.
_SWITCHES = ("deterministic", "train", "training", "is_training", "enable_dropout")


def _is_own(backbone: nn.Module) -> bool:
    """Whether a backbone is `Bert` or `T5`, whose layers are known."""
    return any(cls.__module__.startswith(_OWN) for cls in type(backbone).__mro__)


class _NeverEqual:
    """A value whose hash is another one each time."""

    _counter = itertools.count()

    def __hash__(self) -> int:
        return hash((id(self), next(self._counter)))


def _with_part(method: MethodConfig, part: InsertedConfig, new: InsertedConfig) -> MethodConfig:
    """`method` with `new` in place of `part`, which is one of its parts or itself."""
    if not isinstance(method, CombinedConfig):
        return new
    return method.replace(parts=tuple(new if own is part else own for own in method.parts))


def _as_site(site: str | Site) -> Site:
    return Site(host=site) if isinstance(site, str) else site


def _deterministic(bound: inspect.BoundArguments) -> bool:
    """What the backbone is told, by position or by name; True if it takes no such thing."""
    given = {
        parameter.name: parameter.default
        for parameter in bound.signature.parameters.values()
        if parameter.default is not parameter.empty
    } | dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    for name in _SWITCHES:
        if (value := given.get(name)) is not None:
            return value if name == "deterministic" else not value
    return True


def _make_room(arguments: dict[str, Any], count: int, config: Any) -> None:
    """Lengthens a call's arguments by `count` tokens in front, whose embeddings are replaced."""
    ids = arguments.get("input_ids")
    if ids is not None:
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and count + ids.shape[1] > limit:
            raise ValueError(
                f"prompt_length={count} and {ids.shape[1]} tokens are more than the backbone's "
                f"max_position_embeddings={limit}; truncate to {max(0, limit - count)} tokens"
            )
    # Any token but padding, through whose embedding BERT sends no gradient.
    token = 1 if getattr(config, "pad_token_id", None) == 0 else 0
    for name, filler in (("input_ids", token), ("attention_mask", 1), ("token_type_ids", 0)):
        if (array := arguments.get(name)) is not None:
            arguments[name] = jnp.pad(array, ((0, 0), (count, 0)), constant_values=filler)
    if (positions := arguments.get("position_ids")) is not None:
        first = jnp.broadcast_to(jnp.arange(count), (positions.shape[0], count))
        arguments["position_ids"] = jnp.concatenate([first, positions + count], axis=1)


def _repeat_rows(arguments: dict[str, Any], copies: int) -> int:
    """Puts as many copies of a batch behind each other; what is one row for all stays one.

    Returns:
      How many rows the batch has.
    """
    rows = max(np.shape(x)[0] for x in jax.tree.leaves(arguments) if np.ndim(x))

    def repeat(x: Any) -> Any:
        is_batch = np.ndim(x) > 0 and np.shape(x)[0] == rows
        return jnp.concatenate([jnp.asarray(x)] * copies) if is_batch else x

    for name, value in arguments.items():
        arguments[name] = jax.tree.map(repeat, value)
    return rows


def _apart(y: Any, copies: int) -> tuple[Any, ...]:
    """What was returned for each copy of a batch."""
    leaves, structure = jax.tree.flatten(y)
    parts = zip(*(jnp.split(leaf, copies) for leaf in leaves), strict=True)
    return tuple(jax.tree.unflatten(structure, part) for part in parts)


def merge_adapter(model: Adapted, params: Any, *inputs: Any) -> Any:
    """The backbone's parameters with a weight-space method merged into them.

    `model.backbone` with them computes what `model` does, to rounding, at no cost beyond its own;
    `save_backbone` writes them.

    Args:
      model: the adapted module: LoRA, IA3, BitFit on a backbone with biases of its own, several
        of these at once, intrinsic dimension, or full fine-tuning.
      params: its parameters; or all of them with one more axis, as after replicating for pmap,
        which the result has then too.
      *inputs: example arguments of a call; by default `model.backbone.dummy_inputs()`.

    Returns:
      A nested dict of arrays, as `model.backbone` has them.

    Raises:
      ValueError: if the method is none that weights of the backbone can express; it says why. Or if
        the backbone is of int8, `params` are not those of the model, or a host is of a class whose
        kernel may lie in another way than those of `nn.Dense`, `nn.DenseGeneral` and `nn.Einsum`.
    """
    if check_params(model, params, "merging an adapter", stacked=True):
        return jax.vmap(lambda one: merge_adapter(model, one, *inputs))(params)
    check_float(params, "merging an adapter")
    method = model.method
    if (reason := _unmergeable(model)) is not None:
        raise ValueError(f"method {method.kind!r} cannot be merged into the backbone: {reason}")
    if isinstance(method, IntrinsicConfig):
        vector, scale = params["intrinsic_vector"], params.get("intrinsic_scale")
        own = _at_least_float32(_without_intrinsic(params))
        return intrinsic.perturb(own, vector, scale, method.projection_seed, model.groups)
    if not any(isinstance(part, LoRAConfig | IA3Config) for part in parts_of(method)):
        return params
    hosts = _linear_hosts(model, params, inputs)
    if isinstance(method, LoRAConfig | IA3Config):
        return adapters.merge_weights(params, method, hosts)
    return _merge_parts(model, params, hosts)


def _linear_hosts(model: Adapted, params: Any, inputs: Any) -> dict[str, Linear]:
    """What the hosts of adapters compute, by path; ValueError for a class that is not known."""
    flat = flatten_dict(params, sep="/")
    paths = {path.partition(f"/{ADAPTER}/")[0] for path in flat if f"/{ADAPTER}/" in path}
    if _is_own(model.backbone) and all(f"{path}/kernel" in flat for path in paths):
        return dict.fromkeys(paths, DENSE)  # no need to trace the model
    hosts = {}
    met = met_in(model, inputs or _example_inputs(model.backbone))
    for path in sorted(paths):
        name, found = met.get(path, ("module that the example inputs do not meet", None))
        if found is None:
            raise ValueError(
                f"{path} is a {name}, and how the kernel of such a host lies is not known, so "
                "nothing can be merged into it; keep the adapter, or adapt an nn.Dense, "
                "nn.DenseGeneral or nn.Einsum"
            )
        hosts[path] = found
    return hosts


def _unmergeable(model: Adapted) -> str | None:
    """Why weights of the backbone cannot express the method, None if they can."""
    if isinstance(model.method, Composition):
        return "it is several adapters"
    for part in parts_of(model.method):
        if (reason := _unmergeable_part(model, part)) is not None:
            is_all = part is model.method
            return reason if is_all else f"of its parts, {part.kind!r} cannot: {reason}"
    return None


def _unmergeable_part(model: Adapted, part: InsertedConfig) -> str | None:
    if isinstance(part, LoRAConfig | IA3Config):
        return None
    if isinstance(part, BottleneckConfig):
        return "its adapters have a non-linearity, and no weight of the backbone is equal to one"
    if isinstance(part, BitFitConfig):
        new = "its biases are new, and the backbone's architecture has no place for them"
        return new if model._sites_of(part) else None
    if isinstance(part, PrefixTuningConfig | PromptTuningConfig):
        return "it adds tokens to attend to, not weights"
    return "it adds more than weights"


def _merge_parts(model: Adapted, params: Any, hosts: Mapping[str, Linear]) -> Any:
    """The backbone's parameters with one part after the other merged: a host has one part's."""
    places = [
        (compiled(site.host), part)
        for part in parts_of(model.method)
        for site in model._sites_of(part).values()
    ]

    def part_at(host: str) -> InsertedConfig:
        for pattern, part in places:
            match = pattern.fullmatch(host)
            if match and (match["layer"] is None or int(match["layer"]) not in part.leave_out):
                return part
        raise ValueError(f"no part of the method acts at {host}, where there is an adapter")

    flat = flatten_dict(params, sep="/")
    own = {path: path.partition(f"/{ADAPTER}/")[0] for path in flat}
    owners = {path: part_at(host) for path, host in own.items() if host != path}
    merged = {path: leaf for path, leaf in flat.items() if path not in owners}
    for part in parts_of(model.method):
        if isinstance(part, LoRAConfig | IA3Config):
            mine = {path: flat[path] for path, owner in owners.items() if owner is part}
            whole = unflatten_dict({**merged, **mine}, sep="/")
            tree = adapters.merge_weights(whole, part, hosts)
            merged = flatten_dict(tree, sep="/")
    return unflatten_dict(merged, sep="/")


def _has_narrow_kernels(params: Mapping[str, Any]) -> bool:
    """Whether kernels of the backbone have fewer bits than float32."""
    kernels = [
        leaf
        for path, leaf in flatten_dict(params).items()
        if path[-1] == "kernel" and ADAPTER not in path
    ]
    return any(is_quantized(kernel) or kernel.dtype.itemsize < 4 for kernel in kernels)


def _at_least_float32(params: Mapping[str, Any]) -> Any:
    """What moves by less than bfloat16 tells apart must not be rounded to it."""
    check_float(params, "intrinsic dimension")
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), params)


def _without_intrinsic(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: leaf for name, leaf in params.items() if not _INTRINSIC.fullmatch(name)}


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
    inputs = inputs or _example_inputs(model.backbone)
    given = flatten_dict(backbone.params, sep="/")
    wanted = jax.eval_shape(model.backbone.init, key, *inputs)["params"]
    _check_backbone(given, flatten_dict(wanted, sep="/"))

    @jax.jit  # what is not returned is not computed: the backbone is not initialised
    def init(key: jax.Array) -> dict[str, jax.Array]:
        flat = flatten_dict(model.init(key, *inputs)["params"], sep="/")
        return {path: leaf for path, leaf in flat.items() if path not in given}

    check_memory("the adapters", jax.eval_shape(init, key), "use fewer members or a smaller method")
    new = init(key)
    members = members_of(model.method)
    for path, leaf in new.items():
        # A member's own norms and heads start as the backbone's are, not as they are initialised.
        if f"/{REPLACED}/" in path and (owned := own_path(members, path)) is not None:
            new[path] = jnp.broadcast_to(given[owned[1]], leaf.shape)
    for part in parts_of(model.method):
        if isinstance(part, PromptTuningConfig) and part.prompt_init == "vocabulary":
            new |= _prompts_of_tokens(model, part, given, new)
    return unflatten_dict({**given, **new}, sep="/")


def _example_inputs(backbone: Any) -> Any:
    if not hasattr(backbone, "dummy_inputs"):
        raise ValueError(
            f"{type(backbone).__name__} has no dummy_inputs(); pass example inputs of a call: "
            "init_adapters(model, backbone, key, input_ids, attention_mask), "
            "load_adapter(directory, backbone, input_ids, attention_mask), and so on"
        )
    return backbone.dummy_inputs()


def _prompts_of_tokens(
    model: Adapted, config: PromptTuningConfig, given: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, Any]:
    """The prompts, each the embedding of one of the tokens, in turn."""
    path = getattr(model.backbone, "word_embeddings", "")
    if path not in given:
        raise ValueError(
            f"prompt_init='vocabulary' wants {type(model.backbone).__name__} to have a class "
            "attribute word_embeddings, the path of its embeddings; or use prompt_init='random'"
        )
    table = given[path]
    ids = config.prompt_token_ids
    if not ids:
        raise ValueError(
            "prompt_init='vocabulary' wants prompt_token_ids, such as the most common tokens of "
            "the task or those of its labels' names"
        )
    if max(ids) >= len(table):
        raise ValueError(
            f"prompt_token_ids has {max(ids)}, but the vocabulary has {len(table)} tokens"
        )
    chosen = np.resize(ids, config.prompt_length)
    return {
        path: jnp.asarray(table)[chosen].astype(leaf.dtype)
        for path, leaf in new.items()
        if path.endswith(f"{ADAPTER}/prompt")
    }


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
            shorten(
                "the parameters are not those of the backbone; "
                f"{mismatches(missing, left_over, shapes)}"
            )
        )
