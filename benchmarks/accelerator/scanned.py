"""A scan over the layers of a BERT, in place of a module for each: it compiles one layer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from compacter_jax.models.bert.layers import BertEncoder, BertLayers, BertModule

_STACKED = "stacked"


def stack_layers(
    params: Mapping[str, Any], stack: Callable[[Sequence[Any]], Any] = jnp.stack
) -> dict[str, Any]:
    """Returns a BERT's parameters with those of all layers but the last stacked, for a scan.

    The last layer stays alone, since a classifier wants its state of the first token only. Every
    layer must have the same parameters, those of adapters included.

    Args:
      params: the parameters of an adapted BERT, or a tree like theirs.
      stack: function that makes one leaf of those of all layers but the last.
    """
    layers = params["encoder"]["layer"]
    last = len(layers) - 1
    stacked = jax.tree.map(lambda *leaves: stack(leaves), *(layers[str(i)] for i in range(last)))
    layer = {_STACKED: stacked, str(last): layers[str(last)]}
    return {**params, "encoder": {**params["encoder"], "layer": layer}}


@contextlib.contextmanager
def scanned_layers() -> Iterator[None]:
    """Makes BERTs that are traced within scan over their layers; `stack_layers` makes parameters.

    Adapters act at every layer, and see the layer's number as 0.
    """
    own = BertLayers.__call__

    def call(self: BertLayers, x: Array, bias: Array | None, deterministic: bool) -> Array:
        if _STACKED not in (params := self.variables["params"]):
            return own(self, x, bias, deterministic)
        config = dataclasses.replace(self.config, num_hidden_layers=1)

        def run(x: Array, layer: Any, first_only: bool = False) -> Array:
            one = _OneLayer(config, self.dtype, self.param_dtype, first_only, parent=None)
            variables = {"params": {"encoder": {"layer": {"0": layer}}}}
            states: Any = one.apply(variables, x, bias, deterministic)
            return states

        x, _ = jax.lax.scan(lambda x, layer: (run(x, layer), None), x, params[_STACKED])
        (last,) = (layer for name, layer in params.items() if name != _STACKED)
        return run(x, last, self.first_only)

    with mock.patch.object(BertLayers, "__call__", call):
        yield


class _OneLayer(BertModule):
    """An encoder of one layer, whose modules have the paths of a model's first layer."""

    first_only: bool = False

    @nn.compact
    def __call__(self, x: Array, bias: Array | None, deterministic: bool) -> Array:
        encoder = self.child(BertEncoder, "encoder", first_only=self.first_only)
        return encoder(x, bias, deterministic)
