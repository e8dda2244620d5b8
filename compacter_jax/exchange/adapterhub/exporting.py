"""The export of an adapted model to a folder of AdapterHub's library `adapters`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from compacter_jax.adapter_files import CONFIG_NAME
from compacter_jax.compositions.base import Composition
from compacter_jax.exchange.adapterhub.heads import (
    HEAD_CONFIG_NAME,
    HEAD_STEMS,
    check_pooling,
    model_class,
    written_head,
)
from compacter_jax.exchange.adapterhub.importing import STEMS
from compacter_jax.exchange.adapterhub.layout import VERSION, layout_of
from compacter_jax.exchange.adapterhub.tensors import (
    Naming,
    PartsAt,
    Tensors,
    leaves_by_host,
    to_tensors,
)
from compacter_jax.exchange.adapterhub.writing import write_config
from compacter_jax.files import replace_file
from compacter_jax.inject import adapted
from compacter_jax.methods.base import FullFineTuningConfig, InsertedConfig, MethodConfig
from compacter_jax.methods.bitfit import BitFitConfig
from compacter_jax.methods.bottleneck import BottleneckConfig, LowRankBottleneckConfig
from compacter_jax.methods.head_only import HeadOnlyConfig
from compacter_jax.methods.intrinsic import IntrinsicConfig
from compacter_jax.methods.prompt_tuning import PromptTuningConfig
from compacter_jax.params import group_of
from compacter_jax.paths import ADAPTER
from compacter_jax.trees import check_numbers, check_params


def export_adapterhub(
    directory: str | os.PathLike[str],
    model: adapted.Adapted,
    params: Any,
    *,
    name: str = "adapter",
    with_head: bool = True,
) -> None:
    """Writes an adapter with which `adapters` computes the same logits.

    The file is safetensors, which `adapters` must be told: in a model with the same backbone, call
    `torch_model.load_adapter(directory, use_safetensors=True, set_active=True)`. A tied head
    is not written, because it is the backbone's own; `add_seq2seq_lm_head` adds it to a
    `T5AdapterModel`.

    Each file is written to a temporary name, synced and renamed.

    Args:
      directory: folder to write, made if it does not exist.
      model: adapted module with bottleneck adapters (dense or PHM), LoRA, IA3, prefix tuning, or
        several of them.
      params: parameters of the model.
      name: name of the adapter.
      with_head: True to write the prediction head too.

    Raises:
      ValueError: if `adapters` has no counterpart of the method or of its placement, or if `params`
        are not those of the model or hold NaN or infinite numbers. The message says why, and
        nothing is written.
      OSError: if the directory cannot be written.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name={name!r} must consist of letters, digits, '_' and '-'")
    module, layout = model.backbone, layout_of(model.backbone)
    _check_expressible(model)
    check_params(model, params, "exporting an adapter")
    if with_head:
        check_pooling(Path(directory), module, "train it with pooling='first', or leave it out")
    flat = flatten_dict(params, sep="/")
    placed, hosts = _placed(flat, model)
    naming = Naming(layout, layout.layers(module), name)
    settings = {
        "hidden_size": module.config.hidden_size,
        "model_name": "",
        "model_type": layout.model_types[0],
        "version": VERSION,
    }
    own = {
        "config": write_config(hosts, layout, naming.layers),
        "model_class": model_class(module),
        "name": name,
    }
    trained_pooler = model.method.train_pooler
    head = written_head(module, flat, name, trained_pooler=trained_pooler) if with_head else None
    tensors = {f"{layout.base}.{key}": array for key, array in _with_copies(placed, naming).items()}
    check_numbers({**tensors, **(head[1] if head else {})})
    directory = Path(directory)
    _check_folder(directory, has_head=head is not None)
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / f"{STEMS[0]}.safetensors", tensors)
    _write(directory / CONFIG_NAME, settings | own)
    if head is not None:
        _write(directory / f"{HEAD_STEMS[0]}.safetensors", head[1])
        _write(directory / HEAD_CONFIG_NAME, settings | head[0])


_INEXPRESSIBLE: dict[type[MethodConfig], str] = {
    FullFineTuningConfig: "it trains the backbone itself; write it with save_backbone",
    HeadOnlyConfig: "it adds no adapter; write the backbone with its head with save_backbone",
    LowRankBottleneckConfig: "it has no low-rank projections",
    PromptTuningConfig: "it has prompt tuning only for BERT, which is not supported here",
    BitFitConfig: "it has no adapters made of biases",
    IntrinsicConfig: "it trains the backbone itself; write it with merge_adapter and save_backbone",
}


def _check_expressible(model: adapted.Adapted) -> None:
    method, head = model.method, model.backbone.head
    if isinstance(method, Composition):
        raise ValueError(
            f"AdapterHub saves one adapter at a time, but method {method.kind!r} has several; get "
            "each with get_member and export it"
        )
    for part in method.inserted() or (method,):
        for cls, reason in _INEXPRESSIBLE.items():
            if isinstance(part, cls):
                raise ValueError(f"AdapterHub cannot express method {part.kind!r}: {reason}")
    if method.train_layer_norms:
        raise ValueError(
            "AdapterHub has no place for trained layer norms: write the backbone with "
            "save_backbone, then export an Adapted of method.replace(train_layer_norms=False), "
            "and load it on that backbone"
        )
    if method.train_pooler and head != "sequence_classification":
        raise ValueError(
            f"AdapterHub has no place for a trained pooler with head={head!r}; it has one only "
            "with head='sequence_classification'"
        )


def _placed(
    flat: Mapping[str, Any], model: adapted.Adapted
) -> tuple[dict[str, np.ndarray], list[tuple[InsertedConfig, set[str]]]]:
    """Returns adapters' parameters under AdapterHub's hosts, and these hosts for each part."""
    adapters = [path for path in flat if group_of(path) in ("adapters", "rule")]
    parts = model.method.inserted()
    part_at, layout = PartsAt(model, range(len(parts))), layout_of(model.backbone)
    hosts: list[tuple[InsertedConfig, set[str]]] = [(part, set()) for part in parts]
    placed: dict[str, np.ndarray] = {}
    for host, leaves in leaves_by_host(adapters).items():
        if not host:
            placed |= {leaf: np.asarray(flat[leaf], np.float32) for leaf in leaves}
            continue
        part, there = hosts[part_at(host)]
        for leaf in leaves:
            array = np.asarray(flat[f"{host}/{ADAPTER}/{leaf}"], np.float32)
            new_host, new_leaf = host, leaf
            if isinstance(part, BottleneckConfig):
                new_host = layout.join_of(host)
                if leaf.startswith("layer_norm_after/"):
                    array = array * np.float32(part.scaling)
            elif leaf == "input_scale":
                new_host, new_leaf = _before_last(host, model.backbone), "scale"
            placed[f"{new_host}/{ADAPTER}/{new_leaf}"] = array
            there.add(new_host)
    return placed, hosts


def _before_last(host: str, module: Any) -> str:
    """Returns where AdapterHub scales the input of a feed-forward network's last projection."""
    if not getattr(module.config, "is_gated", False) or not host.endswith("/wo"):
        raise ValueError(
            f"AdapterHub cannot scale the input of {host}, since it scales before the activation; "
            "use IA3Config(sites=('key', 'value', 'intermediate'), input_sites=())"
        )
    return f"{host.removesuffix('/wo')}/wi_1"


def _with_copies(placed: Mapping[str, np.ndarray], naming: Naming) -> Tensors:
    """Returns the tensors; an adapter's own norm before it has two names."""
    tensors = to_tensors(placed, naming)
    norm = ".adapter_norm_before."
    copies = {key.replace(norm, ".adapter_down.0."): tensors[key] for key in tensors if norm in key}
    return tensors | copies


def _check_folder(directory: Path, *, has_head: bool) -> None:
    """Raises ValueError if files of another adapter would be read with the new ones."""
    names = [f"{stem}.bin" for stem in (STEMS[1], HEAD_STEMS[1])]
    if not has_head:
        names += [HEAD_CONFIG_NAME, f"{HEAD_STEMS[0]}.safetensors"]
    if there := [name for name in names if (directory / name).exists()]:
        raise ValueError(
            f"{directory} has {', '.join(there)} of another adapter, which `adapters` would read "
            "too; export to another folder"
        )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    if path.suffix == ".json":
        data = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    else:
        # `save` writes the memory of an array as it lies, so a view must be copied first.
        tensors = {name: np.ascontiguousarray(array, np.float32) for name, array in content.items()}
        data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    with replace_file(path) as temporary:
        temporary.write_bytes(data)
