"""Sites: the places in a backbone where a method can act, and the names of these places."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

from compacter_jax.messages import quote

Role: TypeAlias = Literal[
    "output",
    "bias",
    "parallel",
    "join",
    "attend",
    "positions",
    "embedding",
    "embedded",
    "vocabulary",
]

# Roles where a method acts on the arguments of the host -> the signature of the host.
BEFORE: dict[Role, str] = {
    "join": "join(residual, output)",
    "attend": "attend(query, key, value, biases), where biases is a sequence and the others are "
    "arrays [batch, length, heads, width]",
    "positions": "positions(queries, keys)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A place in a backbone where a method can act, one in each layer or one in all.

    Attributes:
      host: regular expression that matches the whole `/`-joined path of a module. A group named
        `layer` is the index of the layer, if there are layers.
      method: name of the host's method that is intercepted.
      role: purpose of that method. `output` returns the array that an adapter changes; it must be a
        linear layer for methods that change its weight. `bias` returns an array that only a bias is
        added to. `parallel` takes the input of a sub-layer and returns its output (alone or first
        in a tuple). `join(residual, output, …)` ends a sub-layer. `attend(query, key, value,
        biases, …)` is attention; each bias is an array `[…, keys]` or None. `positions(queries,
        keys, …)` returns the bias of relative positions for these numbers of queries and keys.
        `embedding` returns the embeddings of the tokens, `[batch, length, width]`, which prompts
        replace; `embedded` returns what the first layer reads, positions included. `vocabulary`
        returns the states that the embeddings of the tokens turn into logits.
      length_axis: axis of keys and values that counts positions, for the role `attend`.
      output: index of the adapted array if the host returns a tuple; None if it returns an array.
        For a tuple of a `parallel` sub-layer, the default is the first item.
    """

    host: str
    method: str = "__call__"
    role: Role = "output"
    length_axis: int = 1
    output: int | None = None

    @property
    def is_before(self) -> bool:
        """True if a method at this site acts on the arguments of the host, before the host runs."""
        return self.role in BEFORE


def as_site(site: str | Site) -> Site:
    """Returns `site`, or the site with this pattern as its host."""
    return Site(host=site) if isinstance(site, str) else site


def check_output(name: str, site: Site) -> None:
    """Checks that a site with an `output` index can have one.

    Raises:
      ValueError: if the index is not valid, or the role does not allow one.
    """
    index = site.output
    if index is None:
        return
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise ValueError(
            f"site {name!r} has output={quote(index)}; it must be the index, 0 or more, of one of "
            "the values that the host returns"
        )
    if site.is_before:
        raise ValueError(
            f"site {name!r} has output={index}, but methods at the role {site.role!r} act on the "
            "arguments of the host; leave output out"
        )
