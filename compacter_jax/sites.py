"""Sites: the places of a backbone where a method can act, as its table names them."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

from compacter_jax.messages import quote

Role: TypeAlias = Literal["output", "bias", "parallel", "join", "attend", "positions", "embedding"]

# Roles where a method acts on what the host is called with -> how it is called.
BEFORE: dict[Role, str] = {
    "join": "join(residual, output)",
    "attend": "attend(query, key, value, biases), of arrays [batch, length, heads, width] and a "
    "sequence of biases",
    "positions": "positions(queries, keys)",
}


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

    @property
    def is_before(self) -> bool:
        """Whether what acts here acts on what the host is called with."""
        return self.role in BEFORE


def as_site(site: str | Site) -> Site:
    """Returns a site for the pattern of a host, and a site as it is."""
    return Site(host=site) if isinstance(site, str) else site


def check_output(name: str, site: Site) -> None:
    """Checks that a site which says which output is acted on can have that.

    Raises:
      ValueError: if it cannot.
    """
    index = site.output
    if index is None:
        return
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise ValueError(
            f"site {name!r} has output={quote(index)}; it is the index, 0 or more, of one of "
            "the things that the host returns"
        )
    if site.is_before:
        raise ValueError(
            f"site {name!r} has output={index}, but what acts at the role {site.role!r} acts on "
            "what the host is called with; leave output out"
        )
