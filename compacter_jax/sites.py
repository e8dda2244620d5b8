"""Sites: the places of a backbone where a method can act, as its table names them."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

Role: TypeAlias = Literal["output", "bias", "parallel", "join", "attend", "positions", "embedding"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A place in a backbone where a method can act, one in each layer or one in all.

    Attributes:
      host: regular expression that the `/`-joined path of a module matches in full; a group
        `layer` is the layer's index, where there are layers.
      method: which method of the host.
      role: what the method is. `output` returns what is acted on, and is a linear layer for methods
        that change its weight; `bias` returns what only a bias is added to; `parallel` takes the
        input of a sub-layer and returns its output (alone or first in a tuple);
        `join(residual, output, …)` ends a sub-layer; `attend(query, key, value, biases, …)` is
        attention, each bias an array `[…, keys]` or None; `positions(queries, keys, …)` is the bias
        of relative positions, for these numbers of queries and keys; `embedding` returns
        `[batch, length, width]`.
      length_axis: of keys and values, where the role is `attend`.
      output: where the host returns a tuple, the index of what is acted on in it; None where it
        returns an array. Of a `parallel` sub-layer's tuple it is the first by default.
    """

    host: str
    method: str = "__call__"
    role: Role = "output"
    length_axis: int = 1
    output: int | None = None


def as_site(site: str | Site) -> Site:
    """Returns a site for the pattern of a host, and a site as it is."""
    return Site(host=site) if isinstance(site, str) else site
