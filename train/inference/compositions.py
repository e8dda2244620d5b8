"""Compositions of saved adapters, loaded from an expression."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

import compacter_jax as cj
from compacter_jax.compositions.base import Composition, members_of
from compacter_jax.messages import quote
from train.cli.compositions import Node, composed, parse
from train.cli.method_flags import MethodOptions, is_composition
from train.inference import saved as inference_saved


def with_saved(
    expression: Node, model: cj.Adapted, params: Any, backbone: cj.Backbone, source: str
) -> Any:
    """Returns the parameters of a composition with those of its saved members in place.

    Args:
      expression: the expression that the model's method was made from.
      model: the composition on its backbone.
      params: the parameters of the model.
      backbone: the backbone without adapters.
      source: the folder or id of the backbone, to load it with the head of a member that was
        trained with another head.

    Raises:
      ValueError, FileNotFoundError: as `compacter_jax.load_adapter` and `set_member`.
    """
    places, loaded = expression.places(), {}
    for path, leaf in expression.leaves().items():
        if leaf.folder is None:
            continue
        name, head = places[path], _head_of(leaf.folder)
        key = tuple(sorted(head.items()))
        if key not in loaded:
            loaded[key] = _with_head(head, backbone, source)
        saved = cj.load_adapter(leaf.folder, loaded[key])
        if leaf.member is not None:
            saved = cj.get_member(*saved, which=leaf.member)
        for member in members_of(saved[0].method):
            if not member.path:
                params = cj.set_member(model, params, name, saved)
                continue
            inner = "/".join(member.path)
            alone = cj.get_member(*saved, which=inner)
            params = cj.set_member(model, params, f"{name}/{inner}", alone)
    return params


def _head_of(folder: Path) -> dict[str, Any]:
    """Returns the arguments to load a backbone with the head that an adapter was saved with."""
    settings = cj.read_adapter_config(folder)
    inference_saved.check_head(folder, settings)
    return {"num_labels": settings["num_labels"], **inference_saved.head_of(settings)}


def _with_head(head: dict[str, Any], backbone: cj.Backbone, source: str) -> cj.Backbone:
    """Returns the backbone with another head, unless the head is its own."""
    if all(getattr(backbone.module, name, None) == value for name, value in head.items()):
        return backbone
    return cj.load_backbone(source, **head, dtype=backbone.module.dtype)


def of_saved(adapter: Path) -> Node | None:
    """Parses an expression that is given in place of a saved adapter's folder; None for a folder.

    Raises:
      ValueError: as `parse`, or if it has presets, which are not trained.
    """
    text = str(adapter)
    if not is_composition(text) or adapter.exists():
        return None
    expression = parse(text, "--adapter")
    if new := expression.presets():
        raise ValueError(
            f"{quote(new[0])} is a preset, which is not trained; name only folders of saved "
            "adapters"
        )
    return expression


def of_all(expression: Node) -> Composition:
    """Returns the method of a composition of saved adapters, ready for use."""
    return composed(expression, MethodOptions(), ",".join(expression.leaves()))


def with_heads(expression: Node) -> dict[str, Path]:
    """Returns name -> folder of the saved adapters whose heads a composition uses."""
    used = [
        (*member.path, *([str(at)] if member.bank is not None else []))
        for member in members_of(of_all(expression))
        if "head" in member.replaces
        for at in range(1 if member.bank is None else member.bank.size)
    ]
    places = expression.places()
    return {
        name: leaf.folder
        for name, leaf in expression.leaves().items()
        if leaf.folder is not None
        and any("/".join((*path, "")).startswith(f"{places[name]}/") for path in used)
    }


def load(expression: Node, backbone: cj.Backbone, source: str) -> tuple[cj.Adapted, Any]:
    """Loads a composition of saved adapters and its parameters, as in `with_saved`."""
    model = cj.Adapted(backbone.module, of_all(expression))
    # Every parameter drawn here is replaced: the composition has no new members.
    params = cj.init_adapters(model, backbone, jax.random.key(0))
    return model, with_saved(expression, model, params, backbone, source)
