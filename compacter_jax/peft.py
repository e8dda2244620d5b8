"""Adapters of PEFT in and out: LoRA, IA3 and prompt tuning.

PEFT: https://github.com/huggingface/peft, as of 0.21.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.checkpoint import check_leaves
from compacter_jax.config import (
    ADAPTER,
    IA3Config,
    InsertedConfig,
    LoRAConfig,
    MethodConfig,
    PromptTuningConfig,
)
from compacter_jax.files import converted, read_json, replace_file
from compacter_jax.foreign import hugging_face_names, read_tensors
from compacter_jax.inject import Adapted, init_adapters
from compacter_jax.messages import about, listing, quote
from compacter_jax.params import TRAIN, group_of, label_params
from compacter_jax.patterns import compiled
from compacter_jax.trees import check_numbers, check_params

CONFIG_NAME = "adapter_config.json"
WEIGHTS_STEM = "adapter_model"

# Our name of a parameter -> what its tensor's name ends in.
_SUFFIXES = {
    "left": "lora_A.weight",
    "right": "lora_B.weight",
    "scale": "ia3_l",
    "input_scale": "ia3_l",
}
_PROMPT = "prompt_embeddings"
_TASKS = {
    None: "FEATURE_EXTRACTION",
    "encoder": "FEATURE_EXTRACTION",
    "masked_lm": "FEATURE_EXTRACTION",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "conditional_generation": "SEQ_2_SEQ_LM",
}
# Type of a task -> ends of the names of its head, which PEFT saves and reads beside the adapter.
# Since 0.11 it writes them into `modules_to_save`, too; before, that was null.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Of sites that are linear layers, one name each, so that a layer has one.
_LINEAR_SITES = ("query", "key", "value", "output_projection", "intermediate", "feed_forward")
# Groups of the backbone's parameters that may be trained beside a method -> the field that says so.
_TRAINED_BESIDE = {
    "head": "train_head",
    "pooler": "train_pooler",
    "layer norms": "train_layer_norms",
}


def import_peft(directory: str | os.PathLike[str], backbone: Any) -> tuple[Adapted, dict[str, Any]]:
    """Reads a folder that PEFT's `save_pretrained` wrote.

    What the folder has of the head, pooler or layer norms takes the place of the backbone's: the
    modules that `modules_to_save` names, and the head of the task, which PEFT before 0.11 did not
    name there. Where `target_modules` are not all the modules of sites of the backbone, the
    model has a table of sites of its own.

    With prompt tuning, a BERT here leaves out the outputs at the prompts' positions, which PEFT
    returns too.

    Args:
      directory: has adapter_config.json, and adapter_model.safetensors or adapter_model.bin.
      backbone: has `module` and `params`, of the model and with the head the adapter is for.

    Returns:
      The adapted module and its parameters.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: for a setting that would change what is computed and cannot be expressed, an
        adapter for another head, missing tensors or ones left over; it lists which.
    """
    directory = Path(directory)
    path, module = directory / CONFIG_NAME, backbone.module
    settings = read_json(path, _FIELDS, what="the configuration of an adapter of PEFT")
    for name in ("r", "num_virtual_tokens"):
        if (settings.get(name) or 0) > _LARGEST_SIZE:
            raise ValueError(f"{path}: {name}={quote(settings[name], 40)} is too large")
    peft_type = settings.get("peft_type")
    if peft_type not in _READERS:
        raise ValueError(
            f"peft_type={quote(peft_type)} in {path} is not supported; supported: "
            f"{', '.join(map(repr, _READERS))}"
        )
    names = hugging_face_names(module, backbone.params)
    _check_task(path, settings, module.head)
    with about(path):
        method, sites = _READERS[peft_type](path, settings, module, names)
    stored = read_tensors(directory, (WEIGHTS_STEM,))
    with about(path):
        saved = _saved(
            path, settings, names, lambda place: _tensor_name(place, names, method) in stored
        )
        groups = {group_of(place) for place in saved}
        beside = {field: group in groups for group, field in _TRAINED_BESIDE.items()}
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

    The head is written whether it was trained or not, as PEFT wants it; pooler and layer norms
    where the method trains them. Each file is written to a temporary name, synced and renamed.

    Args:
      directory: made if it does not exist.
      model: the adapted module, a BERT or T5 with LoRA, IA3 or prompt tuning.
      params: its parameters.
      base_model_name: what PEFT calls `base_model_name_or_path`.

    Raises:
      ValueError: if PEFT does not have the method, or cannot put it where it is, or `params` are
        not those of the model or hold NaN or infinite numbers.
      OSError: if the directory cannot be written.
    """
    method = model.method
    if type(method) not in _WRITERS:
        kinds = ", ".join(cls.kind for cls in _WRITERS)
        raise ValueError(f"PEFT does not have the method {method.kind!r}; written are {kinds}")
    check_params(model, params, "exporting an adapter")
    flat = flatten_dict(params, sep="/")
    own = {path: leaf for path, leaf in flat.items() if _is_adapter(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in own}
    names = hugging_face_names(model.backbone, unflatten_dict(rest, sep="/"))
    labels = flatten_dict(label_params(params, method), sep="/")
    saved = [path for path in rest if group_of(path) == "head" or labels[path] == TRAIN]
    check_numbers({path: flat[path] for path in [*own, *saved]})
    tensors = {
        _tensor_name(path, names, method): np.ascontiguousarray(
            _to_torch(path, np.asarray(flat[path]))
        )
        for path in [*own, *saved]
    }
    settings = {
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "modules_to_save": _modules_to_save(saved, names) or None,
        "task_type": _TASKS[model.backbone.head],
        **_WRITERS[type(method)](method, own, names),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replace_file(directory / f"{WEIGHTS_STEM}.safetensors") as temporary:
        temporary.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    with replace_file(directory / CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


# --- tensors ------------------------------------------------------------------------------------


def _is_adapter(path: str) -> bool:
    return ADAPTER in path.split("/")


def _tensor_name(path: str, names: Mapping[str, str], method: MethodConfig) -> str:
    # Prompt tuning does not wrap the model that it is for, so there is one prefix less.
    prefix = "base_model." if isinstance(method, PromptTuningConfig) else "base_model.model."
    if not _is_adapter(path):
        return prefix + names[path]
    host, leaf = path.rsplit("/", 2)[0], path.rsplit("/", 1)[-1]
    return _PROMPT if leaf == "prompt" else f"{prefix}{_module_of(host, names)}.{_SUFFIXES[leaf]}"


def _to_torch(path: str, leaf: Any) -> Any:
    """A parameter in the orientation of PyTorch's tensor."""
    kind = path.rpartition("/")[2]
    if kind in ("left", "right", "kernel"):
        return leaf.T
    if kind == "scale" and _is_adapter(path):  # a norm has a parameter of this name too
        return leaf[:, None]
    return leaf[None] if kind == "input_scale" else leaf


def _from_torch(path: str, tensor: np.ndarray) -> np.ndarray:
    """Inverse of `_to_torch`."""
    kind = path.rpartition("/")[2]
    if kind in ("left", "right", "kernel"):
        return tensor.T
    return tensor.reshape(-1) if kind in ("scale", "input_scale") else tensor


def _first_prompts(
    path: Path, settings: Mapping[str, Any], stored: dict[str, np.ndarray], count: int
) -> dict[str, np.ndarray]:
    """`stored` without the prompts of a decoder, which PEFT keeps for a T5 but does not read."""
    is_pair = settings["task_type"] == "SEQ_2_SEQ_LM"
    submodules = settings.get("num_transformer_submodules") or (2 if is_pair else 1)
    if submodules != 1 and not (is_pair and submodules == 2):
        raise ValueError(f"num_transformer_submodules={quote(submodules, 40)} in {path} must be 1")
    prompts = stored.get(_PROMPT)
    if prompts is None or prompts.shape[:1] != (submodules * count,):
        return stored  # not what is wanted, as is said where all tensors are checked
    return {**stored, _PROMPT: prompts[:count]}


# --- settings -----------------------------------------------------------------------------------

# More than any adapter has.
_MOST_NAMES, _LARGEST_SIZE = 10_000, 2**20
# Field of adapter_config.json that is read -> its type. Numbers that may be absent are null.
_NAMES = str | list[str] | None
_FIELDS: Mapping[str, Any] = {
    "peft_type": str | None,
    "task_type": str | None,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "feedforward_modules": _NAMES,
    "layers_pattern": _NAMES,
    "layers_to_transform": int | list[int] | None,
    "modules_to_save": list[str] | None,
    "r": int | None,
    "lora_alpha": float | None,
    "lora_dropout": float | None,
    "use_rslora": bool | None,
    "init_lora_weights": bool | str | None,
    "num_virtual_tokens": int | None,
    "num_transformer_submodules": int | None,
}

# Keys that do not change what is computed, whatever they say: `fan_in_fan_out` is about layers that
# BERT and T5 do not have, and some are read only beside another key that is refused.
_HARMLESS = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "init_ia3_weights",
        "megatron_core",
        "num_attention_heads",
        "num_layers",
        "peft_type",
        "peft_version",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "token_dim",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    ]
)
_READ = frozenset(["exclude_modules", "modules_to_save", "target_modules", "task_type"])
# Initial values of LoRA that leave the backbone's weights as they are.
_LORA_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def _check_settings(path: Path, settings: Mapping[str, Any], *read: str) -> None:
    """ValueError for keys beyond those `read` and the harmless ones, unless they are off."""
    strangers = {
        key: value
        for key, value in settings.items()
        if key not in _HARMLESS | _READ | set(read) and value and (key, value) != ("bias", "none")
    }
    if strangers:
        listed = listing((f"{key}={quote(value, 60)}" for key, value in strangers.items()), most=4)
        raise ValueError(f"{path} has settings that are not supported: {listed}")


def _check_task(path: Path, settings: Mapping[str, Any], head: str | None) -> None:
    task = settings.get("task_type")
    if task is None and settings["peft_type"] == "PROMPT_TUNING":
        raise ValueError(
            f"task_type=None in {path}, with which PEFT itself does not use the prompts; set it to "
            f"{_TASKS[head]!r} if that is what they were trained for"
        )
    if task is not None and task != _TASKS[head]:
        raise ValueError(
            f"task_type={quote(task)} in {path} is not for head={head!r}, whose is "
            f"{_TASKS[head]!r}; "
            "load the backbone with the adapter's head"
        )


def _list_of_names(settings: Mapping[str, Any], key: str) -> list[str]:
    """A list of strings, empty for None; ValueError if it is longer than any model is deep."""
    names: list[str] = settings.get(key) or []
    if len(names) > _MOST_NAMES:
        raise ValueError(f"{key} has {len(names):,} names; at most {_MOST_NAMES:,} are supported")
    return names


def _names_or_pattern(settings: Mapping[str, Any], key: str) -> list[str] | str:
    """A regular expression, or a list of names; ValueError if it is neither."""
    value = settings.get(key)
    if not isinstance(value, str):
        return _list_of_names(settings, key)
    with about(f"{key}={quote(value, 100)}"):
        compiled(value)
    return value


# A method, and the table of sites that it needs if that is not the backbone's.
_Placed: TypeAlias = tuple[InsertedConfig, dict[str, str] | None]


def _read_lora(
    path: Path, settings: Mapping[str, Any], module: Any, names: Mapping[str, str]
) -> _Placed:
    _check_settings(
        *(path, settings, "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"),
        *("layers_to_transform", "layers_pattern"),
    )
    init = settings.get("init_lora_weights")
    if init not in _LORA_INITS:
        raise ValueError(
            f"init_lora_weights={quote(init)} in {path} is not supported: it changes the "
            "backbone's "
            "weights; convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    (sites,), leave_out, table = _place(module, names, [_targets(path, settings, names)])
    method = LoRAConfig(
        sites=sites,
        leave_out=leave_out,
        rank=settings.get("r", 8),
        lora_alpha=settings.get("lora_alpha", 8),
        use_rslora=settings.get("use_rslora", False),
        dropout=settings.get("lora_dropout", 0.0),
    )
    return method, table


def _read_ia3(
    path: Path, settings: Mapping[str, Any], module: Any, names: Mapping[str, str]
) -> _Placed:
    _check_settings(path, settings, "feedforward_modules")
    of_inputs = _names_or_pattern(settings, "feedforward_modules")
    if settings.get("feedforward_modules") is None:
        raise ValueError(
            f"feedforward_modules in {path} is missing; PEFT writes the names of the modules whose "
            "inputs are scaled, [] if there are none"
        )
    targets = _targets(path, settings, names)
    inputs = {host for host in targets if _is_feed_forward(of_inputs, _module_of(host, names))}
    (sites, input_sites), leave_out, table = _place(module, names, [targets - inputs, inputs])
    return IA3Config(sites=sites, input_sites=input_sites, leave_out=leave_out), table


def _read_prompt_tuning(
    path: Path, settings: Mapping[str, Any], module: Any, names: Mapping[str, str]
) -> _Placed:
    _check_settings(path, settings, "num_virtual_tokens", "num_transformer_submodules")
    return PromptTuningConfig(prompt_length=settings.get("num_virtual_tokens", 0)), None


_READERS: dict[str, Callable[..., _Placed]] = {
    "IA3": _read_ia3,
    "LORA": _read_lora,
    "PROMPT_TUNING": _read_prompt_tuning,
}


def _write_lora(
    method: LoRAConfig, params: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
    wanted = _adapted_modules(params, "left", names)
    modules, alpha = _modules(names), method.lora_alpha
    (targets,) = _shortest([wanted], lambda ends: _found(ends, modules) == wanted)
    return {
        "peft_type": "LORA",
        "target_modules": targets,
        "r": method.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": method.use_rslora,
        "lora_dropout": method.dropout,
        "bias": "none",
    }


def _write_ia3(
    method: IA3Config, params: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
    inputs = _adapted_modules(params, "input_scale", names)
    wanted, modules = inputs | _adapted_modules(params, "scale", names), _modules(names)

    def fits(ends: list[str], ends_of_inputs: list[str]) -> bool:
        found = {name for name in wanted if _is_feed_forward(ends_of_inputs, name)}
        return _found(ends, modules) == wanted and found == inputs

    targets, of_inputs = _shortest([wanted, inputs], fits)
    return {"peft_type": "IA3", "target_modules": targets, "feedforward_modules": of_inputs}


def _write_prompt_tuning(
    method: PromptTuningConfig, params: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
    (prompt,) = (leaf for path, leaf in params.items() if path.endswith(f"{ADAPTER}/prompt"))
    return {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": method.prompt_length,
        "num_transformer_submodules": 1,
        "token_dim": prompt.shape[1],
    }


_WRITERS: dict[type[MethodConfig], Callable[..., dict[str, Any]]] = {
    LoRAConfig: _write_lora,
    IA3Config: _write_ia3,
    PromptTuningConfig: _write_prompt_tuning,
}


# --- which modules ------------------------------------------------------------------------------


def _modules(names: Mapping[str, str]) -> set[str]:
    """What PyTorch calls the modules that have parameters, or that hold ones which do."""
    modules: set[str] = set()
    for name in names.values():
        parts = name.split(".")[:-1]
        modules |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    return modules


def _linear_layers(names: Mapping[str, str]) -> dict[str, str]:
    """Name of a linear layer's module -> its path."""
    end = "/kernel"
    return {
        name.removesuffix(".weight"): path.removesuffix(end)
        for path, name in names.items()
        if path.endswith(end)
    }


def _module_of(host: str, names: Mapping[str, str]) -> str:
    if f"{host}/kernel" not in names:
        raise ValueError(f"{host} is no linear layer, and PEFT has this method at these alone")
    return names[f"{host}/kernel"].removesuffix(".weight")


def _adapted_modules(params: Mapping[str, Any], leaf: str, names: Mapping[str, str]) -> set[str]:
    end = f"/{ADAPTER}/{leaf}"
    hosts = [path.removesuffix(end) for path in params if path.endswith(end)]
    return {_module_of(host, names) for host in hosts}


def _found(wanted: list[str] | str, modules: Iterable[str]) -> set[str]:
    """The modules that PEFT finds by a regular expression, or by what their names end in."""
    if isinstance(wanted, str):
        pattern = compiled(wanted)
        return {name for name in modules if pattern.fullmatch(name)}
    return {name for name in modules if any(f".{name}".endswith(f".{end}") for end in wanted)}


def _is_feed_forward(wanted: list[str] | str, module: str) -> bool:
    """Whether IA3 scales the input of a module; an end of its name may start within a part."""
    if isinstance(wanted, str):
        return compiled(wanted).fullmatch(module) is not None
    return module.endswith(tuple(wanted))


def _targets(path: Path, settings: Mapping[str, Any], names: Mapping[str, str]) -> set[str]:
    """Paths of the linear layers that a configuration means by `target_modules`."""
    wanted = _names_or_pattern(settings, "target_modules")
    if not wanted or str(wanted).lower() == "all-linear":
        raise ValueError(
            f"target_modules={quote(settings.get('target_modules'))} in {path} does not name the "
            "modules; PEFT writes their names when it saves an adapter"
        )
    modules = _modules(names)
    found = _found(wanted, modules)
    found -= _found(_names_or_pattern(settings, "exclude_modules"), modules)
    # PEFT adds the head of this task alone before it looks for targets.
    heads = _HEADS["SEQ_CLS"] if settings.get("task_type") == "SEQ_CLS" else ()
    for saved in (*_list_of_names(settings, "modules_to_save"), *heads):
        found -= {name for name in found if f".{saved}." in f".{name}."}
    in_layers = _layer_filter(path, settings, wanted)
    found = {name for name in found if name in wanted or in_layers(name)}
    linear = _linear_layers(names)
    if not found or not found <= linear.keys():
        listed = listing(sorted(found - linear.keys()), most=3) or "nothing"
        raise ValueError(
            f"target_modules={quote(wanted)} in {path} matches {listed}, but must match linear "
            "layers"
        )
    return {linear[name] for name in found}


def _layer_filter(
    path: Path, settings: Mapping[str, Any], wanted: list[str] | str
) -> Callable[[str], bool]:
    """Whether `layers_to_transform`, if there is one, has the layer of a module.

    The layer is the first number in a name; before 0.20, PEFT took a T5's last. Such a folder has
    tensors for other modules, which is an error where they are checked.
    """
    indices = settings.get("layers_to_transform")
    if indices is None or indices == []:
        return lambda name: True
    indices = indices if isinstance(indices, list) else [indices]
    if isinstance(wanted, str):
        raise ValueError(
            f"layers_to_transform={quote(indices)} in {path} must be indices of layers, with a "
            "list of "
            "names as target_modules"
        )
    patterns = _names_or_pattern(settings, "layers_pattern")
    patterns = [patterns] if isinstance(patterns, str) else patterns
    ahead = [rf"(?:.*?\.)?{re.escape(pattern)}" for pattern in patterns] or [r".*?\.[^.]*"]

    def in_layers(name: str) -> bool:
        matches = (re.match(rf"{start}\.(\d+)\.", name) for start in ahead)
        first = next((match for match in matches if match), None)
        return first is not None and int(first[1]) in indices

    return in_layers


def _saved(
    path: Path,
    settings: Mapping[str, Any],
    names: Mapping[str, str],
    is_stored: Callable[[str], bool],
) -> set[str]:
    """Paths of the backbone's parameters that a folder has beside its adapter.

    They are named by `modules_to_save`, or else they are the head of the task, where it is stored.
    """
    ends = tuple(_list_of_names(settings, "modules_to_save"))
    saved = _under(ends, names)
    strangers = sorted(place for place in saved if group_of(place) not in _TRAINED_BESIDE)
    if strangers:
        raise ValueError(
            f"modules_to_save={quote(list(ends))} in {path} has {listing(strangers, 3)}; only a "
            "head, a "
            "pooler and layer norms can be kept beside an adapter"
        )
    head = _under(_HEADS.get(settings.get("task_type") or "", ()), names)
    return saved | head if any(map(is_stored, head)) else saved


def _under(ends: tuple[str, ...], names: Mapping[str, str]) -> set[str]:
    """Paths of the parameters of the modules whose names end in one of `ends`."""
    whole = {module for module in _modules(names) if module.endswith(ends)}
    return {place for place, name in names.items() if _within(name, whole)}


def _within(name: str, modules: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in modules for i in range(1, len(parts)))


def _modules_to_save(saved: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """The shortest names by which PEFT finds the modules of `saved` and no other."""
    wanted = {names[place].rpartition(".")[0] for place in saved}
    modules = _modules(names)

    def fits(ends: list[str]) -> bool:
        return {module for module in modules if module.endswith(tuple(ends))} == wanted

    return _shortest([wanted], fits)[0]


def _shortest(groups: Sequence[set[str]], fits: Callable[..., bool]) -> list[list[str]]:
    """The ends of each group's names, all of as few parts as it takes to fit."""
    longest = max((name.count(".") + 1 for group in groups for name in group), default=1)
    for parts in range(1, longest):
        ends = [sorted({".".join(n.split(".")[-parts:]) for n in group}) for group in groups]
        if fits(*ends):
            return ends
    return [sorted(group) for group in groups]


# --- sites --------------------------------------------------------------------------------------


def _place(
    module: Any, names: Mapping[str, str], groups: Sequence[set[str]]
) -> tuple[list[tuple[str, ...]], tuple[int, ...], dict[str, str] | None]:
    """Sites that are `groups` of hosts, none of which has another's.

    Returns:
      Names of sites for each group, the layers to leave out, and None; or names, no layers, and
      the table that they are from, where the groups are not whole sites of the backbone.
    """
    hosts: dict[str, dict[str, int]] = {}
    for site in _LINEAR_SITES:
        matches = (
            re.fullmatch(module.sites[site], path) for path in _linear_layers(names).values()
        )
        hosts[site] = {match[0]: int(match["layer"]) for match in matches if match}
    chosen = [tuple(site for site in hosts if hosts[site].keys() & group) for group in groups]
    layer_of = {path: n for sites in chosen for site in sites for path, n in hosts[site].items()}
    kept = {layer_of.get(path) for group in groups for path in group}
    whole = [{p for site in sites for p in hosts[site] if layer_of[p] in kept} for sites in chosen]
    if whole == list(groups):
        return chosen, tuple(sorted(set(layer_of.values()) - kept)), None
    tables = [_table(group, suffix) for group, suffix in zip(groups, ("", "/input"), strict=False)]
    return (
        [tuple(table) for table in tables],
        (),
        {k: v for table in tables for k, v in table.items()},
    )


def _table(hosts: Iterable[str], suffix: str) -> dict[str, str]:
    """Site name -> pattern: hosts that differ in the index of their layer alone are one site."""
    layers: dict[tuple[str, ...], list[str]] = {}
    for path in hosts:
        before, *rest = re.split(r"/(\d+)/", path, maxsplit=1)
        layers.setdefault((before, *rest[1:]), []).extend(rest[:1])
    table = {}
    for ends, indices in sorted(layers.items()):
        name = "/".join(ends)
        if indices:
            listed = "|".join(sorted(indices, key=int))
            table[name + suffix] = f"/(?P<layer>{listed})/".join(map(re.escape, ends))
        else:  # a pattern must have the group, which need not take part
            table[name + suffix] = re.escape(name) + r"(?P<layer>\d+)?"
    return table
