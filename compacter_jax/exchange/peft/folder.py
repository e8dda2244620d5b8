"""Import and export of PEFT's folders with LoRA, IA3 and prompt tuning.

References:
  PEFT 0.21, https://github.com/huggingface/peft.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.adapter_files import check_leaves
from compacter_jax.exchange.peft.fusing import fuse
from compacter_jax.exchange.peft.modules import (
    LARGEST_SIZE,
    TRAINED_BESIDE,
    module_of,
    modules_to_save,
    saved_modules,
)
from compacter_jax.exchange.peft.settings import (
    FIELDS,
    READERS,
    WRITERS,
    check_pooling,
    check_prompts,
    check_task,
    task_of,
)
from compacter_jax.exchange.tensors import read_tensors
from compacter_jax.files import read_json, replace_file
from compacter_jax.inject.adapted import Adapted
from compacter_jax.inject.initial import init_adapters
from compacter_jax.messages import about, quote
from compacter_jax.methods.base import MethodConfig
from compacter_jax.methods.prompt_tuning import PromptTuningConfig
from compacter_jax.models.families import hugging_face_names
from compacter_jax.params import TRAIN, group_of, label_params
from compacter_jax.paths import ADAPTER
from compacter_jax.trees import check_numbers, check_params
from compacter_jax.weights import converted

CONFIG_NAME = "adapter_config.json"


WEIGHTS_STEM = "adapter_model"


# Name of a parameter in this library -> the end of its tensor's name.
_SUFFIXES = {
    "left": "lora_A.weight",
    "right": "lora_B.weight",
    "scale": "ia3_l",
    "input_scale": "ia3_l",
}


_PROMPT = "prompt_embeddings"


def import_peft(directory: str | os.PathLike[str], backbone: Any) -> tuple[Adapted, dict[str, Any]]:
    """Loads a folder that PEFT's `save_pretrained` wrote.

    A head, pooler or layer norms in the folder replace those of the backbone: the modules that
    `modules_to_save` names, and the head of the task, which PEFT before 0.11 did not name there. If
    `target_modules` are not exactly the modules of some sites of the backbone, the model gets its
    own table of sites.

    With prompt tuning, a BERT of this library omits the outputs at the positions of the prompts,
    which PEFT returns. In an M2M-100 or a RoBERTa, PEFT counts padding among the positions then,
    and the library does not, so rows padded on the left differ.

    Args:
      directory: folder with adapter_config.json, and adapter_model.safetensors or
        adapter_model.bin.
      backbone: object with the `module` and `params` of the model, with the head that the adapter
        is for.

    Returns:
      The adapted module and its parameters.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: for a setting that changes the result and cannot be expressed, an adapter for
        another head, and missing or further tensors; the message lists them.
    """
    directory = Path(directory)
    path, module = directory / CONFIG_NAME, backbone.module
    settings = read_json(path, FIELDS, what="the configuration of an adapter of PEFT")
    for name in ("r", "num_virtual_tokens"):
        if (settings.get(name) or 0) > LARGEST_SIZE:
            raise ValueError(f"{path}: {name}={quote(settings[name], 40)} is too large")
    peft_type = settings.get("peft_type")
    if peft_type not in READERS:
        raise ValueError(
            f"peft_type={quote(peft_type)} in {path} is not supported; supported: "
            f"{', '.join(map(repr, READERS))}"
        )
    names = hugging_face_names(module, backbone.params)
    check_task(path, settings, module.head)
    check_pooling(path, module)
    if peft_type == "PROMPT_TUNING":
        check_prompts(path, module)
    with about(path):
        method, sites = READERS[peft_type](path, settings, module, names)
    stored = read_tensors(directory, (WEIGHTS_STEM,))
    with about(path):
        saved = saved_modules(
            path, settings, names, lambda place: _tensor_name(place, names, method) in stored
        )
        groups = {group_of(place) for place in saved}
        beside = {field: group in groups for group, field in TRAINED_BESIDE.items()}
        model = Adapted(module, method.replace(**beside), sites=sites)

    shapes = jax.eval_shape(lambda: init_adapters(model, backbone, jax.random.key(0)))
    leaves = {
        place: leaf
        for place, leaf in flatten_dict(shapes, sep="/").items()
        if place in saved or _is_adapter(place)
    }
    origin = {place: _tensor_name(place, names, method) for place in leaves}
    wanted = {
        origin[place]: jax.eval_shape(functools.partial(_to_torch, place), leaf)
        for place, leaf in leaves.items()
    }
    if isinstance(method, PromptTuningConfig):
        stored = _first_prompts(path, settings, stored, method.prompt_length)
    check_leaves(directory, stored, wanted)
    tensors = {place: _from_torch(place, stored[origin[place]]) for place in leaves}
    params = flatten_dict(backbone.params, sep="/") | {
        place: jnp.asarray(converted(directory, origin[place], tensors[place], leaf.dtype))
        for place, leaf in leaves.items()
    }
    return model, unflatten_dict(params, sep="/")


def export_peft(
    directory: str | os.PathLike[str],
    model: Adapted,
    params: Any,
    base_model_name: str | None = None,
) -> None:
    """Writes a folder that PEFT's `PeftModel.from_pretrained` reads.

    The head is always written, as PEFT needs it; pooler and layer norms are written if the method
    trains them. The queries, keys and values of a ModernBERT are one module `Wqkv` in PEFT: LoRA at
    n of them becomes one of n times the rank with zeros in it, and IA3 gets factors of one for the
    others. Both compute the same, but trained further in PEFT, zeros and ones change, too; an
    adapter at `query_key_value` is the same in both. Each file is written to a temporary name,
    synced and renamed.

    Args:
      directory: folder to write, made if it does not exist.
      model: adapted module of this library's backbones with LoRA, IA3 or prompt tuning.
      params: parameters of the model.
      base_model_name: value of PEFT's `base_model_name_or_path`.

    Raises:
      ValueError: if PEFT does not have the method or its placement, or if `params` are not those of
        the model or hold NaN or infinite numbers.
      OSError: if the directory cannot be written.
    """
    method = model.method
    if type(method) not in WRITERS:
        kinds = ", ".join(cls.kind for cls in WRITERS)
        raise ValueError(
            f"method {method.kind!r} cannot be exported to PEFT; these methods can: {kinds}"
        )
    check_pooling(Path(directory), model.backbone)
    if isinstance(method, PromptTuningConfig):
        check_prompts(Path(directory), model.backbone)
    check_params(model, params, "exporting an adapter")
    flat = flatten_dict(params, sep="/")
    own = {path: leaf for path, leaf in flat.items() if _is_adapter(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in own}
    names = hugging_face_names(model.backbone, unflatten_dict(rest, sep="/"))
    labels = flatten_dict(label_params(params, method), sep="/")
    saved = [path for path in rest if group_of(path) == "head" or labels[path] == TRAIN]
    check_numbers({path: flat[path] for path in [*own, *saved]})
    method, own = fuse(method, own)
    tensors = {
        _tensor_name(path, names, method): np.ascontiguousarray(_to_torch(path, np.asarray(leaf)))
        for path, leaf in [*own.items(), *((path, flat[path]) for path in saved)]
    }
    heads = getattr(model.backbone.config, "num_attention_heads", None)
    settings = {
        "base_model_name_or_path": base_model_name,
        # Beside prompts PEFT needs this number, and does not know DistilBERT's name of it.
        **({"num_attention_heads": heads} if isinstance(method, PromptTuningConfig) else {}),
        "inference_mode": True,
        "modules_to_save": modules_to_save(saved, names) or None,
        "task_type": task_of(model.backbone),
        **WRITERS[type(method)](method, own, names),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replace_file(directory / f"{WEIGHTS_STEM}.safetensors") as temporary:
        temporary.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    with replace_file(directory / CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def _is_adapter(path: str) -> bool:
    return ADAPTER in path.split("/")


def _tensor_name(path: str, names: Mapping[str, str], method: MethodConfig) -> str:
    # Prompt tuning does not wrap the model that it is for, so there is one prefix less.
    prefix = "base_model." if isinstance(method, PromptTuningConfig) else "base_model.model."
    if not _is_adapter(path):
        return prefix + names[path]
    host, leaf = path.rsplit("/", 2)[0], path.rsplit("/", 1)[-1]
    return _PROMPT if leaf == "prompt" else f"{prefix}{module_of(host, names)}.{_SUFFIXES[leaf]}"


def _to_torch(path: str, leaf: Any) -> Any:
    """Returns a parameter in the orientation of PyTorch's tensor."""
    kind = path.rpartition("/")[2]
    if kind in ("left", "right", "kernel"):
        return leaf.T
    if kind == "scale" and _is_adapter(path):  # a norm also has a parameter of this name
        return leaf[:, None]
    return leaf[None] if kind == "input_scale" else leaf


def _from_torch(path: str, tensor: np.ndarray) -> np.ndarray:
    """Returns a tensor of PyTorch in the orientation of its parameter."""
    kind = path.rpartition("/")[2]
    if kind in ("left", "right", "kernel"):
        return tensor.T
    return tensor.reshape(-1) if kind in ("scale", "input_scale") else tensor


def _first_prompts(
    path: Path, settings: Mapping[str, Any], stored: dict[str, np.ndarray], count: int
) -> dict[str, np.ndarray]:
    """Returns `stored` without a decoder's prompts, which PEFT saves for a T5 but does not read."""
    is_pair = settings["task_type"] == "SEQ_2_SEQ_LM"
    submodules = settings.get("num_transformer_submodules") or (2 if is_pair else 1)
    if submodules != 1 and not (is_pair and submodules == 2):
        raise ValueError(f"num_transformer_submodules={quote(submodules, 40)} in {path} must be 1")
    prompts = stored.get(_PROMPT)
    if prompts is None or prompts.shape[:1] != (submodules * count,):
        return stored  # the check of all tensors raises the error
    return {**stored, _PROMPT: prompts[:count]}
