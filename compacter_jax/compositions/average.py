"""Averages of adapters: of their outputs, or of their linear maps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from compacter_jax.compositions.base import Combine, Composition, EffectiveOf, Leaf
from compacter_jax.compositions.replacements import labels_apart, with_rest
from compacter_jax.methods.base import InsertedConfig


@dataclasses.dataclass(frozen=True, init=False)
class Average(Composition):
    """The weighted sum of the members' outputs at every site, `sum_m w_m y_m`.

    If the weights do not sum to 1, the output without adapters gets the rest, so the weights of
    task arithmetic are possible, too. Heads and layer norms are averaged in the same way.

    Attributes:
      weights: weights of the members, one each; by default equal, for the mean.

    References:
      Wang et al., Efficient Test Time Adapter Ensembling for Low-resource Language Varieties,
      Findings of EMNLP 2021, arXiv:2109.04877.
    """

    kind: ClassVar[str] = "average"

    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weights:
            count = len(self.members)
            object.__setattr__(self, "weights", (1 / count,) * count)
        if len(self.weights) != len(self.members):
            raise ValueError(
                f"weights={self.weights} must have {len(self.members)} entries, one for each member"
            )
        self._refuse_unjoined()
        self._refuse_added_tokens(
            "it adds tokens to attend to, and has no output that could be averaged",
        )

    def combine(self, child: Combine, x: Any, context: Any) -> Any:
        """Returns the weighted sum of the members' effects."""
        rest = 1 - sum(self.weights)
        total = rest * x if rest else 0
        for weight, name in zip(self.weights, self.names, strict=True):
            total += weight * child(name, x, context)
        return total

    def effective(self, child: EffectiveOf, own: Leaf, rows: int) -> Leaf:
        """Returns the weighted sum of the members' leaves, without labels that a member lacks."""
        leaves = [child(name, own, rows) for name in self.names]
        mixed: Any = 0
        lacking: Any = False
        for weight, (part, _) in zip(self.weights, leaves, strict=True):
            values, lacks = labels_apart(part)
            mixed, lacking = mixed + weight * values, lacking | (lacks & (weight != 0))
        rest, unused = 1 - sum(self.weights), not any(self.weights)
        value = with_rest(mixed, lacking, rest, unused, own.value)
        return Leaf(value, any(by_row for _, by_row in (own, *leaves)))


@dataclasses.dataclass(frozen=True, init=False)
class AverageMaps(Average):
    """One adapter whose linear maps are the weighted sums of the members' maps.

    `down` is `sum_m w_m W_m`, and so are `up`, biases and layer norms. The non-linearity lies
    between them, so this costs one adapter and differs from the average of outputs. It also differs
    from the average of parameters if maps are products of factors. With `W_m = sum_i A_i (x) l_i
    r_i`, averaged factors would give terms `A_i (x) l_i r_i` whose factors come from different
    members: `M^3` terms, of which the average of maps has the `M` with all factors from one member.
    For methods without a non-linearity (LoRA, IA3, BitFit) it equals `Average`.
    """

    kind: ClassVar[str] = "average_maps"

    def __post_init__(self) -> None:
        super().__post_init__()
        singles = [member for member in self.members if isinstance(member, InsertedConfig)]
        if len(singles) < len(self.members):
            raise ValueError(
                "the members of average_maps must be single methods; a composition does not have "
                "a single map"
            )
        signatures = [member.map_signature() for member in singles]
        if all(signature == signatures[0] for signature in signatures):
            return
        if singles[0].has_dense_equivalent:
            raise ValueError(
                f"the members {', '.join(self.names)} of average_maps differ in more than the "
                "form in which their projections are stored; their widths, sites and activations "
                "must agree"
            )
        kinds = ", ".join(member.kind for member in self.members)
        raise ValueError(f"the members of average_maps must be of one kind, not of {kinds}")

    def map_weights(self) -> Mapping[str, float]:
        """Returns the weights of the members by name."""
        return dict(zip(self.names, self.weights, strict=True))
