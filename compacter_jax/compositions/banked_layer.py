"""The layers of a bank at one site, and the values that they share with other sites."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from compacter_jax.compositions.bank import Bank
from compacter_jax.compositions.routing import Routing, along
from compacter_jax.nn.dense import ParamFunction


class LayerCall(NamedTuple):
    """The arguments of one call of a layer.

    Attributes:
      inputs: positional arguments, arrays `[rows, …]`.
      kwargs: keyword arguments, arrays `[rows, …]` or other values; without the shared ones.
      plain: value of the result in rows without an adapter; None if there is none.
      call_layer: `call_layer(layer, *inputs, **kwargs)`.
    """

    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    plain: Any
    call_layer: Callable[..., Any]

    def apply(self, layer: nn.Module, params: Any, key: Array | None, **shared: Any) -> Any:
        """Returns the result of a layer with these parameters and this key of dropout."""
        rngs = None if key is None else {"dropout": key}
        kwargs = {**self.kwargs, **shared}
        return layer.apply(
            {"params": params}, *self.inputs, **kwargs, rngs=rngs, method=self.call_layer
        )


class Shared(NamedTuple):
    """Values that the layers of a part share, as keyword arguments of a layer (or by site).

    Attributes:
      common: values for all members of a bank, or without a bank.
      stacked: values of the members of a bank, with a leading axis `size`.
    """

    common: dict[str, Any]
    stacked: dict[str, Any]

    def at(self, site: str) -> Shared:
        """Returns the shared values of one site, for methods that share by site."""
        common, stacked = (
            {"hidden": tree[site]} if site in tree else {} for tree in (self.common, self.stacked)
        )
        return Shared(common, stacked)


def banked_shared(
    create: Callable[[ParamFunction], dict[str, Any]], param: ParamFunction, bank: Bank
) -> Shared:
    """Creates the values that the layers of each member of a bank share.

    Args:
      create: function that creates the values of one member with the `param` method it is given.
      param: `param` method of the model.
      bank: the bank, which has the number of members and says if they share a rule.
    """
    one: dict[str, Array] = {}
    many: dict[str, Array] = {}

    def declare(name: str, init: Any, *args: Any) -> Array:
        if bank.shared_rule and name.startswith("phm_rule"):
            one[name] = param(name, init, *args)
            return one[name]

        def init_many(key: Array, *args: Any) -> Array:
            return jax.vmap(lambda key: init(key, *args))(jax.random.split(key, bank.size))

        many[name] = param(name, init_many, *args)
        return many[name][0]

    first = create(declare)
    if not many:
        return Shared(first, {})
    stacked = jax.vmap(lambda own: create(lambda name, *_: (one | own)[name]))(many)
    common = {"rule": first["rule"]} if one else {}
    return Shared(common, {name: value for name, value in stacked.items() if name not in common})


@dataclasses.dataclass(frozen=True)
class BankedLayer:
    """The layers of a bank at one site.

    Attributes:
      create: function that creates the layer of a member, without a scope; `create(per_row=True)`
        if a bottleneck must not build its weights.
      params: parameters of the layers, each leaf `[size, …]`.
      routing: the members that each row uses.
      shared: values that the layers share with those at other sites.
      key: key of dropout, or None.
    """

    create: Callable[..., nn.Module]
    params: Any
    routing: Routing
    shared: Shared
    key: Array | None

    def __call__(self, call: LayerCall) -> Any:
        """Returns the result of each row's member, or of the mixture of members."""
        if self.routing.mix is not None:
            return self._mixed(call)
        y = self._routed(call)
        return y if call.plain is None else self.routing.or_backbone(call.plain, y)

    def _routed(self, call: LayerCall) -> Any:
        arrays = {name: value for name, value in call.kwargs.items() if isinstance(value, Array)}
        others = {name: value for name, value in call.kwargs.items() if name not in arrays}
        layer = self.create(per_row=True)
        rows = call.inputs[0].shape[0]
        keys = None if self.key is None else jax.random.split(self.key, rows)

        def one(params: Any, stacked: Any, key: Any, inputs: Any, arrays: Any) -> Any:
            inputs, arrays = jax.tree.map(lambda x: x[None], (inputs, arrays))
            of_row = LayerCall(inputs, {**arrays, **others}, None, call.call_layer)
            y = of_row.apply(layer, params, key, **self.shared.common, **stacked)
            return jax.tree.map(lambda y: y[0], y)

        params, stacked = self.routing.gather((self.params, self.shared.stacked))
        return jax.vmap(one)(params, stacked, keys, call.inputs, arrays)

    def _mixed(self, call: LayerCall) -> Any:
        if call.plain is None:
            raise ValueError(
                "the members of a bank of prefix tuning add tokens to attend to, and have no "
                "output that could be mixed; call the model with adapter_ids instead of mix"
            )
        layer, weights = self.create(), self.routing.weights
        keys = None if self.key is None else jax.random.split(self.key, self.routing.bank.size)

        # The members run one after the other, and the backward pass computes them again. This needs
        # the memory of one member instead of all.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def add(total: Array, member: Any) -> tuple[Array, None]:
            params, stacked, key, weight = member
            y = call.apply(layer, params, key, **self.shared.common, **stacked)
            return total + along(weight, y) * y, None

        members = (self.params, self.shared.stacked, keys, jnp.moveaxis(weights, -1, 0))
        shape = jax.eval_shape(
            lambda member: add(jnp.zeros(()), member)[0],
            jax.tree.map(lambda leaf: leaf[0], members),
        )
        rest = along(1 - weights.sum(-1), shape) * call.plain
        rest = jnp.broadcast_to(rest, shape.shape).astype(shape.dtype)
        total, _ = jax.lax.scan(add, rest, members)
        return total.astype(call.inputs[0].dtype)
