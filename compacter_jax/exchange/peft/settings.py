"""PEFT's settings of each method, and the methods that equal them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from compacter_jax.exchange.peft.modules import (
    NAMES,
    adapted_modules,
    found_modules,
    is_feed_forward,
    module_names,
    module_of,
    names_or_pattern,
    place_sites,
    shortest,
    target_modules,
)
from compacter_jax.exchange.pooling import reads_as_first
from compacter_jax.messages import listing, quote
from compacter_jax.methods.base import InsertedConfig, MethodConfig
from compacter_jax.methods.ia3 import IA3Config
from compacter_jax.methods.lora import LoRAConfig
from compacter_jax.methods.prompt_tuning import PromptTuningConfig
from compacter_jax.models.families import family_of_module
from compacter_jax.paths import ADAPTER

TASKS = {
    None: "FEATURE_EXTRACTION",
    "encoder": "FEATURE_EXTRACTION",
    "masked_lm": "FEATURE_EXTRACTION",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "conditional_generation": "SEQ_2_SEQ_LM",
}


FIELDS: Mapping[str, Any] = {
    "peft_type": str | None,
    "task_type": str | None,
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "feedforward_modules": NAMES,
    "layers_pattern": NAMES,
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


# Keys that never change the result: `fan_in_fan_out` is about layers that BERT and T5 do not have,
# and some keys are read only beside another key that is refused.
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


# Initial values of LoRA that leave the backbone's weights unchanged.
_LORA_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def _check_settings(path: Path, settings: Mapping[str, Any], *read: str) -> None:
    """Raises ValueError for keys that are neither in `read`, nor harmless, nor off."""
    unsupported = {
        key: value
        for key, value in settings.items()
        if key not in _HARMLESS | _READ | set(read) and value and (key, value) != ("bias", "none")
    }
    if unsupported:
        listed = listing(
            (f"{key}={quote(value, 60)}" for key, value in unsupported.items()), most=4
        )
        raise ValueError(f"{path} has settings that are not supported: {listed}")


def task_of(module: Any) -> str | None:
    """Returns the type of a backbone's task in PEFT, None for one that does not read tokens.

    PEFT calls a model of the type SEQ_2_SEQ_LM with `input_ids`, which a speech model does not
    take; without a type, it passes on the arguments that it is called with.
    """
    reads_tokens = family_of_module(module).inputs[0] == "input_ids"
    return TASKS[module.head] if reads_tokens else None


def check_task(path: Path, settings: Mapping[str, Any], head: str | None) -> None:
    """Raises ValueError if an adapter is for another task than the backbone's head."""
    task = settings.get("task_type")
    if task is None and settings["peft_type"] == "PROMPT_TUNING":
        raise ValueError(
            f"task_type=None in {path} makes PEFT itself ignore the prompts; set it to "
            f"{TASKS[head]!r} if the prompts were trained for this task"
        )
    if task is not None and task != TASKS[head]:
        raise ValueError(
            f"task_type={quote(task)} in {path} does not fit head={head!r}, which has "
            f"task_type={TASKS[head]!r}; load the backbone with the adapter's head"
        )


def check_pooling(place: Path, module: Any) -> None:
    """Raises ValueError if the backbone's classifier is none of PEFT's, which use transformers'."""
    if reads_as_first(module):
        return
    of_config = getattr(module.config, "classifier_pooling", None)
    reads = "the first token, as transformers does, of a BERT through the pooler"
    if of_config is not None:
        reads = f"what classifier_pooling={of_config!r} in config.json says"
    raise ValueError(
        f"{place}: with task_type='SEQ_CLS' PEFT reads {reads}, but the backbone has "
        f"pooling={module.pooling!r}; use pooling='first'"
    )


def check_decoder(place: Path, module: Any) -> None:
    """Raises ValueError for a compressed decoder, whose layers transformers does not have."""
    if getattr(getattr(module, "config", None), "is_compressed", False):
        raise ValueError(
            f"{place}: PEFT adapts models of transformers, which has none with "
            "decoder_layer='compressed'; use save_adapter and load_adapter"
        )


def check_prompts(place: Path, module: Any) -> None:
    """Raises ValueError if PEFT's prompts would lie beside embeddings that are not scaled.

    Marian scales embeddings outside of their module, so that PEFT, which embeds the tokens itself,
    leaves the factor out.
    """
    config = module.config
    if getattr(config, "model_type", None) == "marian" and config.scale_embedding:
        raise ValueError(
            f"{place}: PEFT does not scale the embeddings of a Marian beside prompts, so the model "
            "would compute something else there; use LoRA or IA3"
        )


# A method, and the table of sites that it needs if it is not the backbone's.
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
    (sites,), leave_out, table = place_sites(module, names, [target_modules(path, settings, names)])
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
    of_inputs = names_or_pattern(settings, "feedforward_modules")
    if settings.get("feedforward_modules") is None:
        raise ValueError(
            f"feedforward_modules in {path} is missing; PEFT writes the names of the modules whose "
            "inputs are scaled, [] if there are none"
        )
    targets = target_modules(path, settings, names)
    inputs = {host for host in targets if is_feed_forward(of_inputs, module_of(host, names))}
    (sites, input_sites), leave_out, table = place_sites(module, names, [targets - inputs, inputs])
    return IA3Config(sites=sites, input_sites=input_sites, leave_out=leave_out), table


def _read_prompt_tuning(
    path: Path, settings: Mapping[str, Any], module: Any, names: Mapping[str, str]
) -> _Placed:
    _check_settings(path, settings, "num_virtual_tokens", "num_transformer_submodules")
    return PromptTuningConfig(prompt_length=settings.get("num_virtual_tokens", 0)), None


READERS: dict[str, Callable[..., _Placed]] = {
    "IA3": _read_ia3,
    "LORA": _read_lora,
    "PROMPT_TUNING": _read_prompt_tuning,
}


def _write_lora(
    method: LoRAConfig, params: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
    wanted = adapted_modules(params, "left", names)
    modules, alpha = module_names(names), method.lora_alpha
    (targets,) = shortest([wanted], lambda ends: found_modules(ends, modules) == wanted)
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
    inputs = adapted_modules(params, "input_scale", names)
    wanted, modules = inputs | adapted_modules(params, "scale", names), module_names(names)

    def fits(ends: list[str], ends_of_inputs: list[str]) -> bool:
        found = {name for name in wanted if is_feed_forward(ends_of_inputs, name)}
        return found_modules(ends, modules) == wanted and found == inputs

    targets, of_inputs = shortest([wanted, inputs], fits)
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


WRITERS: dict[type[MethodConfig], Callable[..., dict[str, Any]]] = {
    LoRAConfig: _write_lora,
    IA3Config: _write_ia3,
    PromptTuningConfig: _write_prompt_tuning,
}
