"""Saved adapters, loaded with their settings for evaluation and prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import compacter_jax as cj
from compacter_jax.catalogue import from_dict
from compacter_jax.compositions.base import parallel_names
from compacter_jax.messages import quote
from compacter_jax.models.families import family_of
from compacter_jax.models.family import Family
from compacter_jax.models.loading import module_from_config, read_config
from train.cli import compositions as cli_compositions
from train.cli.options import ENTROPY
from train.compute.outputs import OutputsFunction, split_outputs
from train.data import tokens
from train.inference import compositions as inference_compositions
from train.inference import mixing
from train.inference.folders import members_of
from train.inference.options import AdapterOptions
from train.inference.saved import head_of, settings_of
from train.objectives import Objective, from_settings, shapes
from train.objectives.translators import with_audio
from train.tasks.multilingual import KINDS


@dataclasses.dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on its backbone, ready to compute.

    Attributes:
      settings: the content of `adapter_config.json`.
      objective: the objective, with the limits of training.
      outputs: batch -> the outputs for scores or predictions, on the host.
      mixer: what finds the weights of a mix for each row, in place of `outputs`; None without.
    """

    settings: dict[str, Any]
    objective: Objective
    outputs: OutputsFunction
    mixer: mixing.EntropyMixer | None = None

    def compute(
        self, encoded: tokens.Encoded, batch_size: int, description: str | None = None
    ) -> mixing.Computed:
        """Computes the outputs of every example, as `train.compute.outputs.split_outputs`."""
        if self.mixer is not None:
            return self.mixer.compute(encoded, batch_size, description)
        found = split_outputs(self.outputs, encoded, batch_size, description=description)
        return mixing.Computed(found)

    @property
    def mixed_at(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the members and sites whose weights `mixer` finds; none without one."""
        return ((), ()) if self.mixer is None else (self.mixer.members, self.mixer.sites)


def load(options: AdapterOptions, **changes: Any) -> LoadedAdapter:
    """Loads an adapter, and the backbone that it names unless another folder is given.

    Args:
      options: the options that name the adapter.
      **changes: changes, as for `train.objectives.from_settings`.

    Raises:
      FileNotFoundError, ValueError: as `compacter_jax.load_adapter`, or if `fit` did not write it.
    """
    options.check()
    if members := translation_members(options.adapter):
        mixing.names_of(None, options)
        return _of_members(options, members, **changes)
    expression = inference_compositions.of_saved(options.adapter)
    mixed = mixing.names_of(expression, options)
    if expression is None:
        settings = settings_of(cli_compositions.folder_of(options.adapter))
    else:
        settings = joined_settings(expression)
    name = options.backbone or settings["backbone"]
    backbone = load_backbone(
        options, settings, None if expression is None else inference_compositions.of_all(expression)
    )
    if expression is None:
        model, params = cj.load_adapter(cli_compositions.folder_of(options.adapter), backbone)
    else:
        model, params = inference_compositions.load(expression, backbone, name)
    params = stored(params, model.method, options, settings)
    if model.method.moves_backbone:
        # Otherwise the backbone would be moved again for every batch.
        model, params = model.precomputed(params)
    tokenizer = load_tokenizer(name, backbone, settings["max_length"])
    objective = from_settings(settings, model, tokenizer, num_beams=options.num_beams, **changes)
    objective = with_audio(objective, name, options)
    given, mixer = {}, None
    if options.mix == ENTROPY:
        labels = mixing.labels_of(objective, settings["kind"], options)
        mixer = mixing.EntropyMixer(objective, labels, params, mixed, options)
    elif mixed:
        given = {"mix": mixing.constant(mixed, options)}
    jitted = jax.jit(objective.outputs)
    return LoadedAdapter(
        settings, objective, lambda batch: jax.device_get(jitted(params, {**batch, **given})), mixer
    )


def translation_members(folder: Path) -> dict[str, Path]:
    """Returns name -> folder of the adapters of directions in a folder; empty if there are none."""
    members = members_of(folder)
    return members if any(map(_translates, members.values())) else {}


def _translates(folder: Path) -> bool:
    """Returns True for an adapter that translates; False also for one that cannot be read."""
    try:
        return cj.read_adapter_config(folder).get("kind") in KINDS
    except (ValueError, OSError):
        return False


def _of_members(
    options: AdapterOptions, members: Mapping[str, Path], **changes: Any
) -> LoadedAdapter:
    """Loads the adapters of a folder, each for its directions, as a bank.

    Raises:
      ValueError: if the adapters cannot be computed together, or two serve the same direction.
    """
    settings = {name: settings_of(folder) for name, folder in members.items()}
    check_shared(settings)
    first = next(iter(settings.values()))
    kind = first["kind"]
    replaced = ("num_beams", "max_seconds", "sampling_rate")
    given = [name for name in replaced if getattr(options, name) is not None]
    check_alike({name: each[kind] for name, each in settings.items()}, given)
    serving: dict[str, int] = {}
    for place, (name, each) in enumerate(settings.items()):
        for direction in each[kind]["directions"]:
            if direction in serving:
                other = list(settings)[serving[direction]]
                raise ValueError(
                    f"both {other} and {name} in {options.adapter} translate {direction}; move one "
                    "of them away"
                )
            serving[direction] = place
    joined = {**first[kind], "directions": list(serving), "members": list(serving.values())}
    name = options.backbone or first["backbone"]
    backbone = load_backbone(options, first)
    model, params = cj.stack_adapters(list(members.values()), backbone)
    params = stored(params, model.method, options, first)
    tokenizer = load_tokenizer(name, backbone, first["max_length"])
    whole = {**first, kind: joined}
    objective = from_settings(whole, model, tokenizer, num_beams=options.num_beams, **changes)
    objective = with_audio(objective, name, options)
    jitted = jax.jit(objective.outputs)
    return LoadedAdapter(whole, objective, lambda batch: jax.device_get(jitted(params, batch)))


def load_backbone(
    options: AdapterOptions, settings: Mapping[str, Any], method: cj.MethodConfig | None = None
) -> cj.Backbone:
    """Loads the backbone of a saved adapter, after a check that the method fits it.

    Args:
      options: the options, which may name another folder or dtype.
      settings: the settings of `settings_of`.
      method: the method to use; by default that of the settings.

    Raises:
      ValueError, OSError: as `train.objectives.shapes.check_fit` and `compacter_jax.load_backbone`.
    """
    name, head = options.backbone or settings["backbone"], head_of(settings)
    head["dtype"] = jnp.dtype(options.dtype or settings["dtype"])
    if settings["sites"] is None:
        config = read_config(name)
        method = method or from_dict(settings["method"])
        shapes.check_fit(module_from_config(config, **head), method, config, settings["max_length"])
    return cj.load_backbone(name, **head)


# Settings that saved adapters must share to be computed together.
SHARED = ("backbone", "head", "pooling", "kind", "max_length", "dtype", "backbone_dtype")


def check_shared(settings: Mapping[str, Mapping[str, Any]], keys: Sequence[str] = SHARED) -> None:
    """Raises ValueError if adapters, name -> settings, cannot be computed together."""
    first_name, first = next(iter(settings.items()))
    for name, each in settings.items():
        for key in keys:
            if each.get(key) != first.get(key):
                raise ValueError(
                    f"adapters that are computed together must share their {key}: {first_name} "
                    f"has {quote(first.get(key), 100)}, but {name} has {quote(each.get(key), 100)}"
                )


def check_alike(settings: Mapping[str, Mapping[str, Any]], given: Collection[str] = ()) -> None:
    """Raises ValueError if adapters of directions were trained for different outputs or inputs.

    Args:
      settings: name -> what the adapter says of its task, such as `max_target_length`.
      given: settings that a flag replaces, whatever the adapters say.
    """
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    check_shared(settings, [key for key in keys if key not in {"directions", *given}])


def joined_settings(expression: cli_compositions.Node) -> dict[str, Any]:
    """Returns the settings to predict with a composition of saved adapters, like `settings_of`.

    Raises:
      ValueError: if the adapters whose heads are used differ in more than labels, or differ in
        labels and are not parallel.
    """
    folders = inference_compositions.with_heads(expression)
    settings = {name: settings_of(folder) for name, folder in folders.items()}
    check_shared(settings, (*SHARED, "embedding", "text_to_text", "benchmark"))
    joined = dict(next(iter(settings.values())))
    parallel = parallel_names(inference_compositions.of_all(expression))
    labels = {}
    for group in parallel or ("",):
        of_group = {
            name: each
            for name, each in settings.items()
            if not group or f"{name}/".startswith(f"{group}/")
        }
        check_shared(of_group, ("label_names",))
        labels[group] = next(iter(of_group.values()))["label_names"]
    if parallel:
        joined["parallel_label_names"] = labels
    counts = [each["num_labels"] for each in settings.values() if each["num_labels"] is not None]
    return joined | {"num_labels": max(counts, default=None)}


def labels_of(adapter: LoadedAdapter) -> list[str] | dict[str, list[str]]:
    """Returns the names of the labels of rows; with parallel adapters, name -> those of one."""
    if not adapter.objective.has_row_labels:
        return []
    names = parallel_names(adapter.objective.model.method)
    own: list[str] = adapter.settings["label_names"]
    if not names:
        return own
    each: dict[str, list[str]] = adapter.settings.get("parallel_label_names", {})
    return {name: each.get(name, own) for name in names}


def stored(
    params: Any, method: cj.MethodConfig, options: AdapterOptions, settings: Mapping[str, Any]
) -> Any:
    """Returns the parameters, frozen ones cast to the requested dtype or that of training."""
    dtype = options.backbone_dtype or settings.get("backbone_dtype", "float32")
    if dtype == "float32":
        return params
    trained, frozen = cj.partition(params, cj.label_params(params, method))
    return cj.merge(trained, cj.cast_frozen(frozen, dtype))


def load_tokenizer(name: str, backbone: cj.Backbone, max_length: int) -> Any:
    """Loads the tokenizer of a backbone.

    Raises:
      ValueError: as `train.data.tokens.load_tokenizer`; or if the tokenizer is one of another
        family than the backbone.
    """
    config, family = backbone.config, family_of(backbone.config)
    tokenizer = tokens.load_tokenizer(
        name,
        vocab_size=config.vocab_size,
        max_position_embeddings=family.max_tokens(config),
        max_length=max_length,
        may_be_slow=family.writes_text,
    )
    if family.tokenizers:
        _check_family(name, tokenizer, family, config)
    return tokenizer


def _check_family(name: str, tokenizer: Any, family: Family, config: Any) -> None:
    """Raises ValueError if a tokenizer is not one of the backbone's family.

    A tokenizer with as many tokens as the backbone has embeddings fits whatever its class is.
    """
    kind = type(tokenizer).__name__.removesuffix("Fast")
    own = (*family.tokenizers, "PreTrainedTokenizer", "TokenizersBackend")
    if kind not in own and len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"the tokenizer of {quote(name, 100)} is a {kind}, but the backbone of "
            f"model_type={config.model_type!r} reads tokens of a {family.tokenizers[0]}; use the "
            "backbone's own tokenizer"
        )
    if tokenizer.pad_token_id != config.pad_token_id:
        raise ValueError(
            f"the tokenizer of {quote(name, 100)} pads with token {tokenizer.pad_token_id}, but "
            f"the backbone of model_type={config.model_type!r} counts positions from its "
            f"pad_token_id={config.pad_token_id}; use the backbone's own tokenizer"
        )
