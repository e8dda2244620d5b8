"""Tests of what may pay on an accelerator: replacements compute what they replace."""

import functools
import importlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compacter_jax as cj
from benchmarks import contest, jax_worker
from benchmarks.accelerator import switches
from benchmarks.accelerator.scale import TOY
from benchmarks.turns import ROOT
from compacter_jax.nn.attention import attention, padding_bias

SIZES = {"heads": 3, "size": 8}


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7), (6, 2)])
def test_attention_of_the_library(queries, keys):
    random = functools.partial(jax.random.normal, dtype=jnp.float32)
    names = jax.random.split(jax.random.key(0), 4)
    q, k, v = (
        random(key, (2, SIZES["heads"], length, SIZES["size"]))
        for key, length in zip(names, (queries, keys, keys), strict=False)
    )
    relative = random(names[3], (1, SIZES["heads"], queries, keys))
    mask = jnp.ones((2, keys), jnp.int32).at[1, keys // 2 :].set(0)
    biases = (relative, padding_bias(mask, jnp.float32), None)

    def both(function):
        def loss(q, k, v):
            y = function(q, k, v, biases, scale=0.5)
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    ((_, y), gradients), ((_, own), own_gradients) = (
        both(switches.dot_product_attention),
        both(attention),
    )
    np.testing.assert_allclose(y, own, atol=1e-5)
    for found, wanted in zip(gradients, own_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_model_is_traced_with_it():
    size = TOY.t5
    module = jax_worker.module_of(size)
    params = jax_worker.random_backbone(size).params
    batch = contest.batch_of(size, module.config.vocab_size, shortest=0.5)
    inputs = [batch[name] for name in jax_worker.INPUTS["t5"]]
    own = module.apply({"params": params}, *inputs)
    with mock.patch.object(
        jax.nn, "dot_product_attention", wraps=jax.nn.dot_product_attention
    ) as by:
        with switches.library_attention():
            found = module.apply({"params": params}, *inputs)
        module.apply({"params": params}, *inputs)
    # The encoder's attention, and both of the decoder; nothing beyond the context.
    assert by.call_count == 3
    np.testing.assert_allclose(found, own, atol=2e-5)


def test_every_family_is_traced_with_it():
    names = [
        f"compacter_jax.models.{path.parent.name}.{path.stem}"
        for path in (ROOT / "compacter_jax/models").glob("*/*.py")
    ]
    calling = {name for name in names if hasattr(importlib.import_module(name), "attention")}
    assert {module.__name__ for module in switches._WITH_ATTENTION} == calling


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("tokens", "width", "bottleneck", "n"), [(128, 256, 24, 4), (64, 384, 8, 2)]
)
def test_an_adapter_in_one_kernel(dtype, tokens, width, bottleneck, n):
    dtype = jnp.dtype(dtype)
    adapter = switches.random_adapter(jax.random.key(0), width, bottleneck, n, dtype)
    x, skip = (
        jax.random.normal(key, (tokens, width)).astype(dtype)
        for key in jax.random.split(jax.random.key(1))
    )
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), (x, skip, adapter))
    wanted = switches.plain_adapter(*exact, "gelu_new")
    found = switches.fused_adapter(x, skip, adapter, "gelu_new", True)
    assert found.dtype == dtype

    def distance(y):
        return np.linalg.norm(y.astype(jnp.float32) - wanted) / np.linalg.norm(wanted)

    own = switches.plain_adapter(x, skip, adapter, "gelu_new")
    assert distance(found) <= (1e-6 if dtype == jnp.float32 else 1.2 * distance(own))


def test_its_gradient_is_that_of_the_package():
    adapter = switches.random_adapter(jax.random.key(0), 128, 16, 4, jnp.float32)
    x, skip = jax.random.normal(jax.random.key(1), (2, 64, 128))

    def loss(function, *given):
        return jnp.sum(jnp.cos(function(*given)))

    arguments = (x, skip, adapter)
    fused = jax.grad(
        lambda *given: loss(lambda *a: switches.fused_adapter(*a, "gelu_new", True), *given),
        (0, 1, 2),
    )(*arguments)
    plain = jax.grad(
        lambda *given: loss(lambda *a: switches.plain_adapter(*a, "gelu_new"), *given), (0, 1, 2)
    )(*arguments)
    for found, wanted in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)


def test_the_plain_adapter_is_the_layer_of_the_package():
    method = cj.preset("compacter++", reduction_factor=8, phm_dim=2)
    layer = cj.Bottleneck(method)
    x = jax.random.normal(jax.random.key(0), (5, 16))
    rule = jax.random.normal(jax.random.key(1), (2, 2, 2))
    params = layer.init(jax.random.key(2), x, rule=rule)["params"]
    down, up = params["down"], params["up"]
    adapter = switches.Adapter(
        rule, (down["left"], down["right"]), down["bias"], (up["left"], up["right"]), up["bias"]
    )
    own = layer.apply({"params": params}, x, rule=rule)
    found = switches.plain_adapter(x, x, adapter, method.non_linearity)
    np.testing.assert_allclose(found, own, atol=1e-6)


def test_the_kernel_is_lowered_for_a_gpu_that_is_not_there():
    adapter = switches.random_adapter(jax.random.key(0), 768, 24, 4, jnp.bfloat16)
    x = jnp.ones((128, 768), jnp.bfloat16)
    traced = jax.jit(functools.partial(switches.fused_adapter, activation="gelu_new")).trace(
        x, x, adapter
    )
    assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
