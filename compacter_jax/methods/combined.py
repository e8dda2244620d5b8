"""Several methods at once, at different sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from compacter_jax.methods.base import InsertedConfig, MethodConfig, SitesOf
from compacter_jax.methods.fields import typed


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombinedConfig(MethodConfig):
    """Several methods at once, at different sites: AdapterHub's `ConfigUnion`.

    Attributes:
      parts: the methods; their own `train_…` fields are ignored.
    """

    kind: ClassVar[str] = "combined"

    parts: tuple[InsertedConfig, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ValueError("parts is empty; name at least one method")
        sharing = [part.sharing for part in self.parts if part.sharing is not None]
        if len(set(sharing)) > 1:
            raise ValueError(
                f"{len(sharing)} of the parts share a rule or blocks under the same names, but "
                "have other settings of it; give them the same ones, or set "
                "shared_phm_rule=False and shared_W_phm=False in all but one"
            )

    def replace(self, **overrides: Any) -> Self:
        """Returns a copy with overrides of its own fields, or of fields of its parts.

        A field of several parts is replaced in all of them if they are of one kind and have one
        value of it.
        """
        own = {field.name for field in dataclasses.fields(self)}
        hint = tuple[InsertedConfig, ...]
        parts = list(typed("parts", overrides.get("parts", self.parts), hint))
        for name in overrides.keys() - own:
            having = [i for i, part in enumerate(parts) if _has(part, name)]
            if not _is_one_value([parts[i] for i in having], name):
                kinds = ", ".join(part.kind for part in parts)
                raise ValueError(
                    f"{name!r} is a field of {len(having) or 'none'} of the parts {kinds}; "
                    "replace `parts` instead"
                )
            for i in having:
                parts[i] = parts[i].replace(**{name: overrides[name]})
        kept = {name: value for name, value in overrides.items() if name in own}
        return super().replace(**{**kept, "parts": tuple(parts)})

    def replaceable(self) -> set[str]:
        """Returns the names of the fields that `replace` accepts."""
        names = {field.name for part in self.parts for field in dataclasses.fields(part)}
        of_parts = {
            name
            for name in names
            if _is_one_value([part for part in self.parts if _has(part, name)], name)
        }
        return super().replaceable() | of_parts

    def inserted(self) -> tuple[InsertedConfig, ...]:
        """Returns the parts."""
        return self.parts

    def trained_inserted_groups(self) -> set[str]:
        """Returns the groups of the parts' own parameters that are trained."""
        return set().union(*(part.trained_inserted_groups() for part in self.parts))

    def unmergeable(self, sites_of: SitesOf) -> str | None:
        """Returns the first part that backbone weights cannot express and why, or None."""
        for part in self.parts:
            if (reason := part.unmergeable(sites_of)) is not None:
                return f"its part {part.kind!r} cannot be merged: {reason}"
        return None

    def precomputed(
        self, params: Mapping[str, Any], sites_of: SitesOf
    ) -> tuple[MethodConfig, Mapping[str, Any]]:
        """Computes values that depend on the parameters of each part alone once."""
        parts, used_up = [], dict[str, Any]()
        for part in self.parts:
            # Parts may share what the first of them does not need any more.
            whole = {**params, **used_up} if used_up else params
            new, params = part.precomputed(whole, sites_of)
            used_up |= {name: leaf for name, leaf in whole.items() if name not in params}
            parts.append(new)
        return self.replace(parts=tuple(parts)), params


def _has(part: InsertedConfig, name: str) -> bool:
    return name in {field.name for field in dataclasses.fields(part)}


def _is_one_value(parts: list[InsertedConfig], name: str) -> bool:
    """Returns True if parts with a field have one kind and one value of it."""
    return len({(part.kind, getattr(part, name)) for part in parts}) == 1
