"""Adapters at single linear layers of a module that PyTorch has as one linear layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from compacter_jax.methods.base import InsertedConfig, MethodConfig
from compacter_jax.methods.ia3 import IA3Config
from compacter_jax.methods.lora import LoRAConfig
from compacter_jax.paths import ADAPTER, fused_parts


def fuse(method: MethodConfig, own: Mapping[str, Any]) -> tuple[MethodConfig, dict[str, Any]]:
    """Moves adapters of fused linear layers to the module that fuses them.

    The result computes the same. LoRA of several layers becomes one of the sum of their ranks: the
    factors `left` lie side by side, and `right` has zeros between a layer's rows and the columns of
    the others. PEFT has one rank for all modules, so zeros fill up the others. IA3 gets factors of
    one for the layers that it leaves alone.

    Args:
      method: method of the model.
      own: `/`-joined path -> array, of the adapters.

    Returns:
      The method with the new rank and the same scaling, and the new arrays; the arguments if no
      adapter is at such a layer.

    Raises:
      ValueError: if IA3 scales the input of such a layer, which is the input of the others, too.
    """
    hosts = {path.partition(f"/{ADAPTER}/")[0] for path in own}
    if not any(fused_parts(_parent(host)) for host in hosts):
        return method, dict(own)
    return _FUSED[type(method)](method, own)


def _fuse_lora(method: LoRAConfig, own: Mapping[str, Any]) -> tuple[InsertedConfig, dict[str, Any]]:
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    end = f"/{ADAPTER}/left"
    for path, left in own.items():
        if not path.endswith(end):
            continue
        host = path.removesuffix(end)
        place, columns = _place(host)
        right = columns(np.asarray(own[f"{host}/{ADAPTER}/right"]), 0.0)
        pairs.setdefault(place, []).append((np.asarray(left), right))
    rank = max(sum(left.shape[1] for left, _ in those) for those in pairs.values())
    moved = {}
    for place, those in pairs.items():
        left = np.concatenate([left for left, _ in those], axis=1)
        right = np.concatenate([right for _, right in those])
        missing = rank - left.shape[1]
        moved[f"{place}/{ADAPTER}/left"] = np.pad(left, ((0, 0), (0, missing)))
        moved[f"{place}/{ADAPTER}/right"] = np.pad(right, ((0, missing), (0, 0)))
    ratio = rank / method.rank
    alpha = method.lora_alpha * (ratio**0.5 if method.use_rslora else ratio)
    return method.replace(rank=rank, lora_alpha=alpha), moved


def _fuse_ia3(method: IA3Config, own: Mapping[str, Any]) -> tuple[InsertedConfig, dict[str, Any]]:
    moved: dict[str, Any] = {}
    for path, factors in own.items():
        host, leaf = path.split(f"/{ADAPTER}/")
        place, columns = _place(host)
        if leaf == "input_scale" and place != host:
            raise ValueError(
                f"IA3 scales the input of {host}, but PEFT has the one module {place} of "
                f"{', '.join(fused_parts(place))}, which all read this input; scale outputs, or "
                "the input of the whole module"
            )
        own_factors = np.asarray(factors)
        whole = own_factors if leaf == "input_scale" else columns(own_factors, 1.0)
        name = f"{place}/{ADAPTER}/{leaf}"
        moved[name] = moved[name] * whole if name in moved else whole
    return method, moved


_FUSED: Mapping[type[MethodConfig], Callable[..., Any]] = {
    LoRAConfig: _fuse_lora,
    IA3Config: _fuse_ia3,
}


def _parent(host: str) -> str:
    return host.rpartition("/")[0]


def _place(host: str) -> tuple[str, Callable[[np.ndarray, float], np.ndarray]]:
    """Returns the module in PyTorch for a host, and a function that fills up its last axis."""
    parent, _, name = host.rpartition("/")
    parts = fused_parts(parent)
    if not parts:
        return host, lambda x, filler: x
    return parent, functools.partial(_filled, parts.index(name), len(parts))


def _filled(index: int, count: int, x: np.ndarray, filler: float) -> np.ndarray:
    """Returns `count` blocks of the shape of `x` along the last axis: `x`, and others constant."""
    blocks = [np.full_like(x, filler)] * count
    blocks[index] = x
    return np.concatenate(blocks, axis=-1)
