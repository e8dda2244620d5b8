"""Intrinsic dimension: the whole backbone moves within a random subspace."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from compacter_jax.fastfood import mixed, project_all
from compacter_jax.methods.base import MethodConfig
from compacter_jax.methods.fields import require
from compacter_jax.nn.dense import Dtype, ParamFunction
from compacter_jax.nn.dtypes import at_least_float32
from compacter_jax.nn.quantize import check_float
from compacter_jax.paths import ADAPTER, Groups, group_of

_INTRINSIC = re.compile("intrinsic_(vector|scale)")


def layer_of(path: str) -> str:
    """Returns the layer of a parameter by its `/`-joined path, for structure-aware scaling.

    It ends with the first number in the path, whatever the family calls its layers:
    `encoder/layer/3`, `decoder/block/11`. The layer of any other parameter is the first name of its
    path (`embeddings`, `shared`, `pooler`), or the first two names under `encoder` and `decoder`
    (`encoder/final_layer_norm`).
    """
    found = re.match(r"([^/]+/)*?[^/]+/\d+(?=/)|(encoder|decoder)/[^/]+|[^/]+", path)
    return found[0] if found else path


def layers_of(paths: Iterable[str], groups: Groups | None = None) -> tuple[str, ...]:
    """Returns the distinct layers of the parameters that `perturb` moves, layer 2 before 10."""

    def natural(layer: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in layer.split("/")]

    return tuple(sorted({layer_of(path) for path in paths if _is_moved(path, groups)}, key=natural))


def _is_moved(path: str, groups: Groups | None) -> bool:
    """Returns True for a parameter of the backbone, which is in no task head or adapter."""
    return group_of(path, groups) != "head" and ADAPTER not in path.split("/")


def vector_size(config: IntrinsicConfig, paths: Iterable[str], groups: Groups | None = None) -> int:
    """Returns the size of the vector: the method's dimension less one scale for each layer.

    Raises:
      ValueError: if nothing is left.
    """
    scales = len(layers_of(paths, groups)) if config.structure_aware else 0
    if config.dimension <= scales:
        raise ValueError(
            f"dimension={config.dimension} leaves nothing for the vector: the layers have {scales} "
            f"scales; use {scales + 1} or more, or structure_aware=False"
        )
    return config.dimension - scales


def perturb(
    params: Mapping[str, Any],
    vector: Array,
    scale: Array | None,
    seed: int | Array,
    groups: Groups | None = None,
) -> dict[str, Any]:
    """Returns the backbone's parameters at `vector`: each is `theta + scale_layer P v`.

    If `vector` is zero, they equal the given parameters to the bit, except that negative zeros
    become positive. `P` depends on the seed and on the paths and sizes of the tensors; each call
    draws it again.

    Args:
      params: nested dict of arrays. Task heads and adapters in it are returned unchanged.
      vector: trained vector, `[d]`.
      scale: scales `[m]`, one for each of `layers_of` the paths of `params`; None for no scaling.
      seed: `IntrinsicConfig.projection_seed`.
      groups: `groups` of the `Adapted` model, which define the head.

    Returns:
      A dict of `params`' structure, shapes and dtypes; sums are computed in float32 at least.

    Raises:
      ValueError: if `vector` is empty or does not have rank 1, or `scale` does not have one entry
        per layer.

    References:
      Aghajanyan et al., arXiv:2012.13255: with `scale` SAID, without it DID.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    flat = {"/".join(str(part.key) for part in path): leaf for path, leaf in leaves}
    layers = layers_of(flat, groups)
    sizes = {path: leaf.size for path, leaf in flat.items() if _is_moved(path, groups)}
    factors = jnp.asarray(1 / np.sqrt(list(sizes.values())), jnp.float32)
    if scale is not None:
        if scale.shape != (len(layers),):
            raise ValueError(
                f"scale of shape {scale.shape} must have one entry for each of the {len(layers)} "
                f"layers {', '.join(layers)}"
            )
        where = np.array([layers.index(layer_of(path)) for path in sizes])
        factors *= scale.astype(jnp.float32)[where]
    moves = project_all(mixed(vector, seed), sizes, factors, seed)

    def moved(path: str, leaf: Array) -> Array:
        if path not in moves:
            return leaf
        return (leaf + moves[path].reshape(leaf.shape)).astype(leaf.dtype)

    return jax.tree.unflatten(structure, [moved(path, leaf) for path, leaf in flat.items()])


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntrinsicConfig(MethodConfig):
    """A method that moves the whole backbone within a random subspace of few dimensions.

    The parameters are `theta_j = theta_j(0) + scale_layer(j) (P v)_j` with a fixed Fastfood
    projection `P`. The method trains `v` and, with `structure_aware`, one scale for each layer:
    `dimension` numbers in total.

    Attributes:
      dimension: number of trained values, scales included.
      structure_aware: True to learn a scale for each layer (SAID); otherwise all scales are 1.
      projection_seed: seed of the random projection, which is not stored but drawn again when
        needed.

    References:
      Aghajanyan et al., Intrinsic Dimensionality Explains the Effectiveness of Language Model
      Fine-Tuning, ACL 2021, arXiv:2012.13255; Le et al., Fastfood, ICML 2013, arXiv:1408.3060.
    """

    kind: ClassVar[str] = "intrinsic"
    heading: ClassVar[str] = "for intrinsic and intrinsic-said"
    moves_backbone: ClassVar[bool] = True

    dimension: int = 20_000
    structure_aware: bool = True
    projection_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.dimension >= 1, "dimension", self.dimension, "at least 1")
        require(
            0 <= self.projection_seed < 2**31,
            "projection_seed",
            self.projection_seed,
            "from 0 to 2**31 - 1",
        )

    def own_params(
        self, param: ParamFunction, paths: list[str], groups: Groups | None, dtype: Dtype
    ) -> dict[str, Any]:
        """Creates the vector, initially zero, and the layers' scales, initially one."""
        paths = [path for path in paths if not _INTRINSIC.fullmatch(path)]
        size = (vector_size(self, paths, groups),)
        own = {"vector": param("intrinsic_vector", nn.initializers.zeros, size, dtype)}
        if self.structure_aware:
            layers = (len(layers_of(paths, groups)),)
            own["scale"] = param("intrinsic_scale", nn.initializers.ones, layers, dtype)
        return own

    def moved(self, params: Mapping[str, Any], groups: Groups | None) -> Any:
        """Returns the backbone's parameters at the vector, in float32 at least."""
        vector, scale = params["intrinsic_vector"], params.get("intrinsic_scale")
        own = {name: leaf for name, leaf in params.items() if not _INTRINSIC.fullmatch(name)}
        # A change may be smaller than the resolution of bfloat16, so the sum must not be rounded to
        # it.
        check_float(own, "intrinsic dimension")
        own = jax.tree.map(at_least_float32, own)
        return perturb(own, vector, scale, self.projection_seed, groups)
