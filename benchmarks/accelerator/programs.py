"""Programs whose results on an accelerator are compared with those on a CPU.

Each is a pure function of arrays, so that it can be run on any device, and compiled for one that is
not there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import compacter_jax as cj
from benchmarks.accelerator.scale import Scale
from benchmarks.contest import Size, batch_of
from benchmarks.jax_worker import (
    INPUTS,
    loss_function,
    quick_key,
    random_backbone,
    random_members,
)
from compacter_jax.models.loading import Backbone
from train.compute import step

# Scale of the noise added to an adapter's initial values, so that every parameter has an effect.
_NOISE = 0.05
METHOD = "compacter++"
_LAST: dict[tuple[str, str], tuple[Backbone, cj.Adapted, Any]] = {}


@dataclasses.dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
      name: the name of its results, which for gradients in float32 is that of the size.
      function: a pure function that returns a dict of trees of arrays.
      arguments: its arguments, arrays on the host.
    """

    name: str
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]


def adapted(size: Size, method: str = METHOD) -> tuple[Backbone, cj.Adapted, Any]:
    """Returns a random backbone, its adapted module, and parameters whose trained half has noise.

    The last one is kept for the next call.
    """
    key = (size.name, method)
    if key not in _LAST:
        _LAST.clear()
        _LAST[key] = _adapted(size, method)
    return _LAST[key]


def _adapted(size: Size, method: str) -> tuple[Backbone, cj.Adapted, Any]:
    backbone = random_backbone(size)
    model = cj.Adapted(backbone.module, cj.preset(method))
    params = backbone.params
    if method != "full":
        params = cj.init_adapters(model, backbone, quick_key(1))
    labels = cj.label_params(params, model.method)
    trained, frozen = cj.partition(params, labels)
    rng = np.random.default_rng(1)

    def moved(leaf: Any) -> np.ndarray:
        return np.asarray(leaf) + _NOISE * rng.standard_normal(leaf.shape, np.float32)

    return backbone, model, cj.merge(jax.tree.map(moved, trained), jax.device_get(frozen))


def in_dtype(model: cj.Adapted, params: Any, dtype: str) -> tuple[cj.Adapted, Any, Any]:
    """Returns a model that computes in a dtype, and both halves of its parameters.

    Args:
      model: the model, in float32.
      params: its parameters.
      dtype: the dtype of the computation and of frozen weights; int8 is that of frozen weights
        alone.
    """
    trained, frozen = cj.partition(params, cj.label_params(params, model.method))
    if dtype == "float32":
        return model, trained, frozen
    if dtype != "int8":
        model = model.clone(backbone=model.backbone.clone(dtype=jnp.dtype(dtype)))
    return model, trained, cj.cast_frozen(frozen, dtype)


def gradients(size: Size, dtype: str, method: str = METHOD) -> Program:
    """Returns logits, losses and the gradients of trained parameters."""
    backbone, model, params = adapted(size, method)
    model, trained, frozen = in_dtype(model, params, dtype)
    batch = batch_of(size, backbone.config.vocab_size, shortest=0.5)
    apply, loss = step.apply_function(model, INPUTS[size.family]), loss_function(size)

    def function(trained: Any, frozen: Any, batch: Any) -> dict[str, Any]:
        def mean_loss(trained: Any) -> tuple[Array, Array]:
            logits = apply(cj.merge(trained, frozen), batch, None)
            return jnp.mean(loss(logits, batch["labels"])), logits

        (value, logits), found = jax.value_and_grad(mean_loss, has_aux=True)(trained)
        return {"logits": logits.astype(jnp.float32), "loss": value, "gradients": found}

    name = size.name if dtype == "float32" else f"{size.name}, {dtype}"
    return Program(name, function, (trained, frozen, batch))


def generation(size: Size, tokens: int, num_beams: int) -> Program:
    """Returns generated tokens, by greedy or beam search."""
    backbone, model, params = adapted(size)
    batch = batch_of(size, backbone.config.vocab_size, shortest=0.5)

    def function(params: Any, ids: Any, mask: Any) -> dict[str, Any]:
        found = cj.generate(
            model, params, ids, mask, max_new_tokens=tokens, num_beams=num_beams, eos_token_id=()
        )
        return {"tokens": found}

    return Program(
        f"{num_beams} beams", function, (params, batch["input_ids"], batch["attention_mask"])
    )


def bank(size: Size, members: int) -> Program:
    """Returns logits of rows that are routed over the members of a bank."""
    backbone, model, params = adapted(size)
    many, stacked = cj.stack_adapters([(model, params)], backbone, capacity=members)
    stacked = random_members(stacked, backbone.params)
    batch = batch_of(size, backbone.config.vocab_size, shortest=0.5)
    batch["adapter_ids"] = np.arange(size.rows, dtype=np.int32) % members
    apply = step.apply_function(many, INPUTS[size.family])

    def function(params: Any, batch: Any) -> dict[str, Any]:
        return {"logits": apply(params, batch, None)}

    return Program("bank", function, (stacked, batch))


def programs(scale: Scale) -> dict[str, Callable[[], Program]]:
    """Returns functions that make the programs of a scale, by name and by worth."""
    made: dict[str, Callable[[], Program]] = {}
    for size in (scale.bert, scale.t5):
        for dtype in ("float32", "bfloat16", "int8"):
            made[f"{size.family}, {dtype}"] = functools.partial(gradients, size, dtype)
    made["greedy search"] = functools.partial(generation, scale.t5, scale.generated, 1)
    made["beam search"] = functools.partial(generation, scale.t5, scale.generated, 4)
    made["bank"] = functools.partial(bank, scale.bank, scale.members)
    return made
