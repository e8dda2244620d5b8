"""A user's project, type-checked against the installed wheel by `make test-wheel`; no test module.

mypy --strict --python-executable WHEEL_ENVIRONMENT/bin/python typed_user.py
"""

from pathlib import Path
from typing import Any, assert_type

import jax
import optax  # type: ignore[import-untyped]

import compacter_jax as cj


def adapt(folder: Path) -> tuple[cj.Adapted, Any]:
    """Loads a backbone and adds Compacter++; returns the model and its parameters."""
    backbone = cj.load_backbone(folder, head="sequence_classification", num_labels=2)
    assert_type(backbone, cj.Backbone)
    method = cj.preset("compacter++", reduction_factor=16)
    assert_type(method, cj.MethodConfig)
    model = cj.Adapted(backbone.module, method)
    return model, cj.init_adapters(model, backbone, jax.random.key(0))


def trained_percentage(model: cj.Adapted, params: Any) -> float:
    """Returns the percentage of trained parameters."""
    count = cj.count(params, cj.label_params(params, model.method))
    assert_type(count.trained, int)
    assert_type(cj.presets(), tuple[str, ...])
    return 100 * count.trained / count.total


def optimizer(model: cj.Adapted, params: Any) -> optax.GradientTransformation:
    """Returns AdamW for the trained parameters."""
    return cj.optimizer(optax.adamw(3e-3), cj.label_params(params, model.method))


def weight(rule: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns the weight of a layer from low-rank blocks."""
    return assert_type(cj.kronecker_sum(rule, (left, right)), jax.Array)


def keep(folder: Path, backbone: cj.Backbone) -> None:
    """Saves an adapter and reads it back."""
    model, params = adapt(folder)
    cj.save_adapter(folder / "adapter", model, params, metadata={"labels": ["no", "yes"]})
    again, params = cj.load_adapter(folder / "adapter", backbone)
    assert_type(again, cj.Adapted)
    site = cj.Site(host=r"layer/(?P<layer>\d+)", role="output")
    cj.Adapted(again.backbone, cj.BottleneckConfig(sites=("here",)), sites={"here": site})
