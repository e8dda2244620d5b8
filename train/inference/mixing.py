"""Weights of the members of a mix: equal, given, or found for each row (EMEA)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from compacter_jax.compositions.base import members_of
from compacter_jax.messages import listing
from compacter_jax.paths import ADAPTER
from train.cli.compositions import Node
from train.cli.options import ENTROPY, MixOptions
from train.compute import step
from train.compute.outputs import split_outputs
from train.data import tokens
from train.objectives import Objective
from train.objectives.base import LabelLogits

# The site of weights that hold at all sites.
ALL_SITES = "all"


class Found(NamedTuple):
    """Weights that were found for the rows of a file.

    Attributes:
      weights: `[rows, sites, members]`; they sum to 1.
      entropies: `[rows, steps + 1]`, before every step and after the last, in nats.
    """

    weights: Any
    entropies: Any


class Computed(NamedTuple):
    """Outputs of a split.

    Attributes:
      outputs: the outputs of an objective, a tree of `[rows, …]` arrays.
      found: the weights of the rows, where they were found by their entropy.
    """

    outputs: Any
    found: Found | None = None


def names_of(expression: Node | None, options: MixOptions) -> tuple[str, ...]:
    """Returns the names of the members of the mix in an expression; none without a mix.

    Raises:
      ValueError: if there are several mixes, a mix without `--mix` or `--mix` without a mix, or
        numbers that are not as many as the members.
    """
    mixes = [] if expression is None else expression.mixes()
    if not mixes and options.mix is not None:
        raise ValueError(
            f"--mix {options.mix} needs a mix(…) in --adapter, as in 'mix(a=runs/a,b=runs/b)'"
        )
    if not mixes:
        return ()
    if len(mixes) > 1:
        raise ValueError(
            f"--adapter has {len(mixes)} mixes, but --mix gives the weights of one; use average(…) "
            "for the others"
        )
    names = mixes[0].names
    if options.mix is None:
        raise ValueError(
            f"--adapter has a mix of {listing(names)}; give its weights by --mix equal, --mix "
            "entropy or a number for each member"
        )
    weights = options.given_weights()
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"--mix {options.mix} has {len(weights)} weights, but the mix has {len(names)} "
            f"members, {listing(names)}; give one for each"
        )
    return names


def labels_of(objective: Objective, kind: str, options: MixOptions) -> LabelLogits:
    """Returns the logits of labels; raises ValueError if no weights can be found by them."""
    labels = objective.label_logits
    if labels is None:
        raise ValueError(
            f"--mix {ENTROPY} needs probabilities of labels, which this adapter for tasks of kind "
            f"{kind} does not have for its rows; use --mix equal or a number for each member"
        )
    if options.mix_positions == "all" and objective.has_row_labels:
        raise ValueError(
            "--mix-positions all is for tags of words, but the adapter has one label for each row; "
            "leave it out"
        )
    return labels


def constant(names: tuple[str, ...], options: MixOptions) -> np.ndarray:
    """Returns the weights `[members]` of `--mix` for all rows, float32: equal if not numbers."""
    weights = options.given_weights() or (1 / len(names),) * len(names)
    return np.array(weights, np.float32)


@dataclasses.dataclass(frozen=True)
class EntropyMixer:
    """Outputs with the weights that make the labels of each row most certain.

    Attributes:
      objective: an objective whose model has one bank.
      labels: the logits of its labels.
      params: the parameters of the model.
      members: the names of the members.
      options: steps, learning rate, sites and positions.

    References:
      Wang et al., Efficient Test Time Adapter Ensembling for Low-resource Language Varieties,
      Findings of EMNLP 2021, arXiv:2109.04877, section 3.
    """

    objective: Objective
    labels: LabelLogits
    params: Any
    members: tuple[str, ...]
    options: MixOptions

    def compute(
        self, encoded: tokens.Encoded, batch_size: int, description: str | None = None
    ) -> Computed:
        """Computes the outputs of every row, and its weights at `sites`."""
        objective, options = self.objective, self.options
        logits = jax.tree_util.Partial(_LogitsOfRow(objective, self.labels), self.params)
        count = None if options.mix_sites == "one" else len(cj.mixing_sites(self.params))

        def outputs(batch: step.Batch) -> Any:
            mixed = cj.minimize_entropy(
                logits,
                len(self.members),
                {name: jnp.asarray(batch[name]) for name in objective.inputs},
                steps=options.mix_steps,
                learning_rate=options.mix_learning_rate,
                mask=self._counted(encoded, batch),
                sites=count,
            )
            found = Found(mixed.weights, mixed.entropies)
            return jax.device_get((self._outputs_of(mixed.logits, batch), found))

        found_outputs, found = split_outputs(outputs, encoded, batch_size, description=description)
        return Computed(found_outputs, self._at_own_sites(found))

    @functools.cached_property
    def _outputs_of(self) -> Any:
        return jax.jit(self.labels.outputs)

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites of the weights: the modules where members act, or `ALL_SITES`."""
        if self.options.mix_sites == "one":
            return (ALL_SITES,)
        return tuple(np.array(cj.mixing_sites(self.params))[self._own_sites()].tolist())

    def _own_sites(self) -> list[int]:
        """Returns the positions of the sites of the bank; a task has sites of its own."""
        (member,) = [each for each in members_of(self.objective.model.method) if each.bank]
        inside = (ADAPTER, *member.path)
        hosts = {
            "/".join(path[: path.index(ADAPTER)])
            for path in flatten_dict(self.params)
            if ADAPTER in path and path[path.index(ADAPTER) :][: len(inside)] == inside
        }
        return [at for at, site in enumerate(cj.mixing_sites(self.params)) if site in hosts]

    def _at_own_sites(self, found: Found) -> Found:
        if self.options.mix_sites == "one":
            return found._replace(weights=found.weights[:, None])
        return found._replace(weights=found.weights[:, self._own_sites()])

    def _counted(self, encoded: tokens.Encoded, batch: step.Batch) -> np.ndarray | None:
        """Returns `[rows, length]`, True at the first tokens of words; None where all count."""
        if encoded.words is None or self.options.mix_positions == "all":
            return None
        counted = np.zeros(batch["input_ids"].shape, bool)
        for row, position in enumerate(batch["indices"]):
            if position >= 0:
                own = encoded.words.indices[slice(*encoded.offsets[position : position + 2])]
                counted[row, : len(own)] = own >= 0
        return counted


@dataclasses.dataclass(frozen=True, eq=False)
class _LogitsOfRow:
    """Logits of one row with weights `[members]` or `[sites, members]`, for `minimize_entropy`.

    Those of one objective are equal, so that each shape is compiled once.
    """

    objective: Objective
    labels: LabelLogits

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _LogitsOfRow) and other.objective is self.objective

    def __hash__(self) -> int:
        return id(self.objective)

    def __call__(self, params: Any, weights: jax.Array, inputs: dict[str, jax.Array]) -> jax.Array:
        batch = {name: values[None] for name, values in inputs.items()}
        return self.labels.compute(params, {**batch, "mix": weights[None]})[0]
