"""Names and shapes of AdapterHub's tensors, and their parameters in this library."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from compacter_jax.exchange.adapterhub.layout import Layer, Layout
from compacter_jax.inject.adapted import Adapted
from compacter_jax.paths import ADAPTER
from compacter_jax.patterns import compiled

Tensors = dict[str, np.ndarray]
Own = TypeVar("Own")

_LORA_NAMES = {"left": "lora_A", "right": "lora_B", "scale": "lora_B"}
_PREFIX_NAMES = {
    "embedding": "wte.weight",
    "kernel": "control_trans.0.weight",
    "bias": "control_trans.0.bias",
}
_SHARED_NAMES = {
    "phm_rule": "phm_rule",
    "phm_rule_left": "phm_rule_left",
    "phm_rule_right": "phm_rule_right",
    "phm_down_left": "W_down_left",
    "phm_down_right": "W_down_right",
    "phm_up_left": "W_up_left",
    "phm_up_right": "W_up_right",
}
_DENSE_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_PHM_NAMES = {
    "left": "W_left",
    "right": "W_right",
    "blocks": "W",
    "bias": "b",
    "phm_rule": "phm_rule",
    "phm_rule_left": "phm_rule_left",
    "phm_rule_right": "phm_rule_right",
}

# PyTorch's linear layers have weights `[out, in]`; the factors of LoRA are `[r, in]` and `[out,
# r]`, those of IA3 `[out, 1]`.
_TRANSPOSED = re.compile(rf".*/{ADAPTER}/(([fg]/)?(down|up)/kernel|left|right)|prefix_\w+_kernel")
_COLUMN = re.compile(rf".*/{ADAPTER}/scale")


class Naming(NamedTuple):
    """AdapterHub's names for the tensors of one adapter, in a model without head.

    Attributes:
      layout: layout of the family.
      layers: layers in the order of AdapterHub's numbers.
      name: name of the adapter.
    """

    layout: Layout
    layers: list[Layer]
    name: str

    def of_host(self, host: str, kind: str) -> str:
        """Returns the prefix of the names of a host's tensors; `kind` is `adapters` or `loras`."""
        return f"{self.layout.name_of(host)}.{kind}.{self.name}"

    def of_prefixes(self, location: str) -> str:
        """Returns the prefix of the names of a location's prefixes."""
        named = self.layout.renamed.get(location, location)
        return f"prefix_tuning.prefix_tunings.{self.name}.{named}"

    def of_shared(self, path: str) -> str:
        """Returns the name of a top-level parameter; raises ValueError if AdapterHub has none."""
        if path in _SHARED_NAMES:
            return f"shared_parameters.{self.name}.{_SHARED_NAMES[path]}"
        match = re.fullmatch(r"prefix_(\w+)_(embedding|kernel|bias)", path)
        for location, site in self.layout.sites.items():
            if match and match[1] == site:
                return f"{self.of_prefixes(location)}.{_PREFIX_NAMES[match[2]]}"
        raise ValueError(f"AdapterHub has no place for the parameter {path}")

    def names(self, paths: Collection[str]) -> dict[str, str]:
        """Returns path -> name, except for the parameters of single layers in prefix tuning."""
        named = {}
        for host, leaves in leaves_by_host(paths).items():
            for leaf in leaves:
                if not host:
                    named[leaf] = self.of_shared(leaf)
                elif leaf.startswith(("f/", "g/")):
                    own = _invertible_name(leaf)
                    named[f"{host}/{ADAPTER}/{leaf}"] = f"invertible_adapters.{self.name}.{own}"
                elif "/" in leaf:
                    own = _bottleneck_name(leaf, leaves)
                    named[f"{host}/{ADAPTER}/{leaf}"] = f"{self.of_host(host, 'adapters')}.{own}"
                elif leaf in _LORA_NAMES:
                    own = _LORA_NAMES[leaf]
                    named[f"{host}/{ADAPTER}/{leaf}"] = f"{self.of_host(host, 'loras')}.{own}"
        return named

    def prefixed(self, paths: Collection[str]) -> dict[str, list[str]]:
        """Returns location -> hosts with prefixes, in the order of layers."""
        hosts = {
            host
            for host, leaves in leaves_by_host(paths).items()
            if host and not leaves.isdisjoint({"key", "kernel"})
        }
        found: dict[str, list[str]] = {}
        for layer in self.layers:
            for location in layer:
                having = [host for host in layer[location] if host in hosts]
                if having:
                    found.setdefault(location, []).extend(having)
        return found


def leaves_by_host(paths: Iterable[str]) -> dict[str, set[str]]:
    """Returns host -> names of its adapter's parameters; "" has those at the top."""
    leaves: dict[str, set[str]] = {}
    for path in paths:
        host, _, leaf = path.rpartition(f"/{ADAPTER}/")
        leaves.setdefault(host, set()).add(leaf)
    return leaves


def _bottleneck_name(leaf: str, leaves: Collection[str]) -> str:
    """Returns the name of a tensor within a bottleneck adapter with the parameters `leaves`."""
    owner, kind = leaf.split("/")
    # In `adapter_down`, the adapter's own norm comes first.
    first = 1 if "layer_norm_before/scale" in leaves else 0
    owners = {
        "down": f"adapter_down.{first}",
        "up": "adapter_up",
        "layer_norm_before": "adapter_norm_before",
        "layer_norm_after": "adapter_norm_after",
    }
    is_phm = owner in ("down", "up") and f"{owner}/kernel" not in leaves
    return f"{owners[owner]}.{(_PHM_NAMES if is_phm else _DENSE_NAMES)[kind]}"


def _invertible_name(leaf: str) -> str:
    """Returns the name of a tensor within an invertible adapter; an activation is number 1."""
    half, layer, kind = leaf.split("/")
    number = {"down": 0, "up": 2}[layer]
    return f"{half.upper()}.{number}.{_DENSE_NAMES[kind]}"


def to_tensors(flat: Mapping[str, np.ndarray], naming: Naming) -> Tensors:
    """Converts adapters' parameters, by `/`-joined path, to AdapterHub's names and shapes."""
    tensors = {}
    for path, name in naming.names(flat).items():
        if _COLUMN.fullmatch(path):
            tensors[name] = flat[path][:, None]
        else:
            tensors[name] = flat[path].T if _TRANSPOSED.fullmatch(path) else flat[path]
    for location, hosts in naming.prefixed(flat).items():
        tensors |= _stacked(flat, hosts, naming.of_prefixes(location))
    return tensors


def from_tensors(
    tensors: Mapping[str, np.ndarray], wanted: Mapping[str, Any], naming: Naming
) -> Tensors:
    """Converts tensors back to parameters with the paths and shapes of `wanted`."""
    flat: Tensors = {}
    for path, name in naming.names(wanted).items():
        if _COLUMN.fullmatch(path):
            flat[path] = tensors[name][:, 0]
        else:
            flat[path] = tensors[name].T if _TRANSPOSED.fullmatch(path) else tensors[name]
    for location, hosts in naming.prefixed(wanted).items():
        flat |= _unstacked(tensors, hosts, naming.of_prefixes(location), wanted)
    return flat


def _stacked(flat: Mapping[str, np.ndarray], hosts: list[str], prefix: str) -> Tensors:
    """Returns the prefixes of a location: all its layers in one tensor, keys before values."""

    def of(leaf: str) -> list[np.ndarray]:
        return [flat[f"{host}/{ADAPTER}/{leaf}"] for host in hosts]

    if f"{hosts[0]}/{ADAPTER}/key" in flat:
        # [layers, 2, length, width] -> [length, layers, 2, width], flattened
        both = np.stack([np.stack(pair) for pair in zip(of("key"), of("value"), strict=True)])
        return {f"{prefix}.control_trans": np.moveaxis(both, 2, 0).reshape(-1)}
    return {
        f"{prefix}.control_trans.2.weight": np.concatenate([k.T for k in of("kernel")]),
        f"{prefix}.control_trans.2.bias": np.concatenate(of("bias")),
    }


def _unstacked(
    tensors: Mapping[str, np.ndarray], hosts: list[str], prefix: str, wanted: Mapping[str, Any]
) -> Tensors:
    """Splits the tensors of `_stacked` into the prefixes of each host."""
    flat: Tensors = {}
    key = wanted.get(f"{hosts[0]}/{ADAPTER}/key")
    if key is not None:
        both = tensors[f"{prefix}.control_trans"].reshape(key.shape[0], len(hosts), 2, -1)
        for i, host in enumerate(hosts):
            flat |= {f"{host}/{ADAPTER}/{n}": both[:, i, j] for j, n in enumerate(("key", "value"))}
        return flat
    kernels = np.split(tensors[f"{prefix}.control_trans.2.weight"], len(hosts))
    biases = np.split(tensors[f"{prefix}.control_trans.2.bias"], len(hosts))
    for host, kernel, bias in zip(hosts, kernels, biases, strict=True):
        flat |= {f"{host}/{ADAPTER}/kernel": kernel.T, f"{host}/{ADAPTER}/bias": bias}
    return flat


class PartsAt(Generic[Own]):
    """A function that returns the item of `parts`, one per part of the method, at a host."""

    def __init__(self, model: Adapted, parts: Sequence[Own]):
        table = model.sites if model.sites is not None else model.backbone.sites
        self._places = []
        for part, own in zip(model.method.inserted(), parts, strict=True):
            for name in part.all_sites():
                if name in table:  # the method skips other sites
                    site = table[name]
                    host = site if isinstance(site, str) else site.host
                    self._places.append((compiled(host), part.leave_out, own))

    def __call__(self, host: str) -> Own:
        for pattern, leave_out, part in self._places:
            match = pattern.fullmatch(host)
            # Embeddings are outside of the layers.
            layer = match.groupdict().get("layer") if match else None
            if match and (layer is None or int(layer) not in leave_out):
                return part
        raise ValueError(f"no part of the method acts at {host}")
