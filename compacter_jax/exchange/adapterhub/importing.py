"""The import of a folder of AdapterHub's library `adapters` as an adapted model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.adapter_files import CONFIG_NAME, check_count, check_leaves
from compacter_jax.exchange.adapterhub.heads import read_head
from compacter_jax.exchange.adapterhub.layout import layout_of
from compacter_jax.exchange.adapterhub.reading import Part, Source, method_of, read_parts, sites_of
from compacter_jax.exchange.adapterhub.tensors import (
    Naming,
    PartsAt,
    Tensors,
    from_tensors,
    leaves_by_host,
    to_tensors,
)
from compacter_jax.exchange.tensors import read_tensors
from compacter_jax.files import read_json
from compacter_jax.inject import adapted, initial
from compacter_jax.messages import about, listing, quote, shorten
from compacter_jax.paths import ADAPTER
from compacter_jax.weights import converted

# Names of the file of tensors, without suffix: as safetensors, and as a pickle.
STEMS = ("adapter", "pytorch_adapter")


def import_adapterhub(
    directory: str | os.PathLike[str], backbone: Any, *, with_head: bool = True
) -> tuple[adapted.Adapted, dict[str, Any]]:
    """Loads an adapter that `adapters` saved, onto the backbone it was trained with.

    The result computes the same as `adapters` 1.3.0. Supported are bottleneck adapters (Compacter's
    among them) in all their placements, LoRA, IA3, prefix tuning, and unions of these. A learned
    scaling is multiplied into the weights. Settings of the initial weights are ignored.

    A prediction head in the folder is loaded, too. A language-modelling head that differs from the
    backbone's replaces it in the parameters; `save_backbone` then keeps it, `save_adapter` does
    not.

    Args:
      directory: folder written by `save_adapter` of `adapters`, as safetensors or, if PyTorch is
        installed, in its default format.
      backbone: object with `params` and `module`, a `Bert`, `DistilBert`, `T5` or `Seq2Seq` with
        the head that is in the folder.
      with_head: False to ignore a head in the folder.

    Returns:
      The adapted module and its parameters.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: for a truncated or foreign file, another backbone or head, a configuration without
        a counterpart in this library, or unknown, missing or misshapen tensors; the message says
        which.
    """
    directory, module = Path(directory), backbone.module
    settings = _read_settings(directory)
    source = Source(directory / CONFIG_NAME, module, layout_of(module))
    _check_backbone(settings, source)
    own = flatten_dict(backbone.params, sep="/")
    head = read_head(directory, module, own) if with_head else {}
    with about(source.path):
        parts = read_parts(settings["config"], source)
        method = method_of(parts, train_pooler=any(path.startswith("pooler/") for path in head))
        model = adapted.Adapted(module, method, sites=sites_of(parts, source))
        shapes = jax.eval_shape(
            lambda key: initial.init_adapters(model, backbone, key), jax.random.key(0)
        )
    new = {path: leaf for path, leaf in flatten_dict(shapes, sep="/").items() if path not in own}
    naming = Naming(source.layout, source.layout.layers(module), settings["name"])
    stored = _stored(directory, naming)
    check_count(method, stored)
    found = _fit(directory, stored, new, PartsAt(model, parts), naming)
    adapters = {path: jnp.asarray(array, new[path].dtype) for path, array in found.items()}
    return model, unflatten_dict({**own, **head, **adapters}, sep="/")


# Field of adapter_config.json that is read -> its type. `config` is checked where it is read.
_FIELDS: Mapping[str, Any] = {
    "name": str,
    "model_type": str,
    "hidden_size": int | None,
    "version": str | None,
}
_OTHERS = {
    "adapter_fusion_config.json": "an AdapterFusion",
    "adapter_setup.json": "a setup of several adapters",
}


def _read_settings(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    for name, what in _OTHERS.items():
        if not path.is_file() and (directory / name).is_file():
            raise ValueError(
                f"{directory} holds {what}, which is not supported; give the folder of a single "
                "adapter"
            )
    settings = read_json(path, _FIELDS, what="the configuration of an adapter of AdapterHub")
    for key, reader in (("format_version", "load_adapter"), ("peft_type", "import_peft")):
        if key in settings:
            raise ValueError(
                f"{path} was not written by AdapterHub, since it has the key {key!r}; use {reader}"
            )
    if missing := sorted({"config", "model_type", "name"} - settings.keys()):
        raise ValueError(f"{path} was not written by AdapterHub: it has no {listing(missing)}")
    return settings | {"config": _modernised(settings)}


def _modernised(settings: Mapping[str, Any]) -> Any:
    """Returns the config with the changes that `adapters` makes to those of earlier releases."""
    config, version = settings["config"], str(settings.get("version", ""))
    if not isinstance(config, dict):
        return config
    changes = {}
    if "version" not in settings and config.get("non_linearity") in ("gelu", "gelu_orig"):
        changes["non_linearity"] = {"gelu": "gelu_new"}.get(config["non_linearity"], "gelu")
    release = re.match(r"adapters\.(\d+)\.(\d+)", version)
    is_lora = config.get("architecture") == "lora" and "r" in config
    if release and is_lora and tuple(map(int, release.groups())) < (1, 1):
        changes["alpha"] = config["r"]  # releases before 1.1 did not scale
    return config | changes


def _check_backbone(settings: Mapping[str, Any], source: Source) -> None:
    model_type, width = settings["model_type"], settings.get("hidden_size")
    if model_type not in source.layout.model_types:
        raise ValueError(
            f"{source.path} has model_type={quote(model_type)}, but the backbone is a "
            f"{type(source.module).__name__}; load the backbone that the adapter was trained with"
        )
    wanted = source.module.config.hidden_size
    if width not in (None, wanted):
        raise ValueError(
            f"{source.path} has hidden_size={quote(width, 40)}, but the backbone has {wanted}; "
            "load the backbone that the adapter was trained with"
        )


# The names of bottlenecks in adapter-transformers 1, which told tasks from languages.
_EARLIER = re.compile(r"\.(attention|layer)_text_(task|lang)_adapters\.")
# One pool of prefixes, saved under the name of each layer that uses it.
_POOL = re.compile(r".+\.prefix_tuning\.pool\.(prefix_tunings\..+)")


def _stored(directory: Path, naming: Naming) -> Tensors:
    """Returns the tensors in the folder, each once; raises ValueError if two copies differ."""
    base = f"{naming.layout.base}."
    stored = read_tensors(directory, STEMS)
    once: Tensors = {}
    for key, array in stored.items():
        # An adapter's own norm has its own name and that of the first layer of `adapter_down`.
        norm = key.replace(".adapter_down.0.", ".adapter_norm_before.")
        now = _EARLIER.sub(".adapters.", norm if norm in stored else key)
        name = _POOL.sub(r"prefix_tuning.\1", now).removeprefix(base)
        if name in once and not np.array_equal(once[name], array):
            raise ValueError(
                f"{shorten(key, 100)} and {shorten(name, 100)} in {directory} must be the same "
                "tensor, but differ"
            )
        once[name] = converted(directory, key, array, np.float32)
    return once


def _fit(
    directory: Path,
    stored: Tensors,
    new: Mapping[str, jax.ShapeDtypeStruct],
    part_at: PartsAt[Part],
    naming: Naming,
) -> Tensors:
    """Returns the parameters `new` by path; raises ValueError for missing or further tensors."""
    blank = {path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in new.items()}
    wanted = to_tensors(blank, naming)
    absent: Tensors = {}
    scaled: list[tuple[list[str], Any]] = []
    for host, leaves in leaves_by_host(new).items():
        paths = [f"{host}/{ADAPTER}/{leaf}" for leaf in _scaled_leaves(leaves)]
        if not host or not paths:
            continue
        part, name = part_at(host), naming.of_host(host, "adapters")
        factor: Any = part.factor
        if isinstance(factor, str):
            width = blank[paths[-1]].shape if factor == "channel" else (1,)
            wanted[f"{name}.scaling"] = np.broadcast_to(np.float32(1), width)
            factor = stored.get(f"{name}.scaling")
        scaled.append((paths, factor))
        if not part.has_bias:
            biases = [key for key in wanted if key.startswith(f"{name}.") and key.endswith(".b")]
            absent |= {key: wanted.pop(key) for key in biases}
    _check_shared(directory, stored, wanted, naming)
    check_leaves(directory, stored, wanted)
    found = from_tensors({**stored, **absent}, new, naming)
    for paths, factor in scaled:
        found |= {path: found[path] * np.asarray(factor, np.float32) for path in paths}
    return found


def _scaled_leaves(leaves: set[str]) -> list[str]:
    """Returns the leaves that scale an adapter's effect if they are multiplied by a factor."""
    if "scale" in leaves:
        return ["scale"]
    weights = (f"up/{leaf}" for leaf in ("kernel", "right", "blocks", "phm_rule", "phm_rule_right"))
    # If the adapter owns no part of the weight, the factor is 1.
    return [weight for weight in weights if weight in leaves][:1] + sorted({"up/bias"} & leaves)


def _check_shared(directory: Path, stored: Tensors, wanted: Tensors, naming: Naming) -> None:
    shared = [key for key in wanted if key.startswith("shared_parameters.")]
    if shared and stored.keys().isdisjoint(shared):
        raise ValueError(
            f"the adapter in {directory} has no {' and no '.join(shared)}, and cannot be restored "
            "without these tensors. `adapters` does not save the parameters that adapters share "
            "if the model is not a base model with a head (T5ForConditionalGeneration, T5Model, "
            "BertModel). Save the adapter from a T5AdapterModel, a BertAdapterModel or a BERT "
            "with a head; if the model is still in memory, add "
            f"model.shared_parameters[{naming.name!r}] to the file under these names"
        )
