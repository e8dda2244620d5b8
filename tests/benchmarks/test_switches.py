"""Tests of what may pay on an accelerator: replacements compute what they replace."""

import dataclasses
import functools
import importlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compacter_jax as cj
from benchmarks import contest, jax_worker
from benchmarks.accelerator import programs, scanned, switches
from benchmarks.accelerator.scale import TOY
from benchmarks.turns import ROOT
from compacter_jax.nn.attention import attention, padding_bias
from train.compute import step

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


def test_attention_of_the_library_with_keys_for_several_rows():
    q, k, v = (
        jax.random.normal(jax.random.key(i), (rows, SIZES["heads"], 4, SIZES["size"]))
        for i, rows in enumerate((6, 2, 2))
    )
    found = switches.dot_product_attention(q, k, v, scale=0.5)
    np.testing.assert_allclose(found, attention(q, k, v, scale=0.5), atol=1e-5)


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


@pytest.mark.parametrize(("tokens", "words", "parts"), [(7, 12, 3), (1, 5, 1), (16, 64, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_in_parts(tokens, words, parts, dtype):
    """Losses and gradients equal those in float64, in low precision as well as those at once do."""
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(dtype)
    states, table = (
        jnp.asarray(3 * rng.standard_normal((rows, 16)), dtype) for rows in (tokens, words)
    )
    labels = jnp.asarray(rng.integers(0, words, tokens), jnp.int32)
    weights = rng.standard_normal(tokens)
    exact, embeddings = np.asarray(states, np.float64), np.asarray(table, np.float64)
    chances = np.exp(exact @ embeddings.T)
    chances /= chances.sum(-1, keepdims=True)
    losses = -np.log(chances[np.arange(tokens), labels])
    gradient = weights[:, None] * (chances @ embeddings - embeddings[labels])

    def distances(function):
        found, pull = jax.vjp(lambda states: function(states, table, labels), states)
        (own,) = pull(jnp.asarray(weights, jnp.float32))
        assert found.dtype == jnp.float32
        assert own.dtype == dtype
        pairs = ((found, losses), (own, gradient))
        return [np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) for a, b in pairs]

    in_parts = distances(functools.partial(switches.cross_entropy_in_parts, parts=parts))
    at_once = distances(switches.plain_cross_entropy)
    for part, whole in zip(in_parts, at_once, strict=True):
        assert part <= (1e-5 if dtype == jnp.float32 else max(1.2 * whole, 1e-5))


def test_cross_entropy_in_parts_keeps_no_logits():
    """The compiled gradient has less than a quarter of the bytes of all logits in 8 parts."""
    states, table = jnp.ones((256, 8)), jnp.ones((4096, 8))
    labels = jnp.zeros(256, jnp.int32)

    def temporary(function):
        def loss(states):
            return function(states, table, labels).sum()

        compiled = jax.jit(jax.grad(loss)).lower(states).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 256 * 4096
    assert temporary(functools.partial(switches.cross_entropy_in_parts, parts=8)) < logits / 4
    assert temporary(switches.plain_cross_entropy) >= logits


@pytest.fixture(scope="module")
def deep():
    """Returns a BERT of three layers with adapters, its parameters, labels and a batch."""
    size = dataclasses.replace(
        TOY.bert, name="deep", config={**TOY.bert.config, "num_hidden_layers": 3}
    )
    backbone, model, params = programs.adapted(size)
    labels = cj.label_params(params, model.method)
    return size, model, params, labels, contest.batch_of(size, backbone.config.vocab_size, 0.5)


def test_a_scan_over_layers(deep):
    """The logits and gradients of all trained parameters are those of the loop."""
    size, model, params, labels, batch = deep
    apply = step.apply_function(model, jax_worker.INPUTS[size.family])
    loss = jax_worker.loss_function(size)

    def run(params, labels):
        trained, frozen = cj.partition(params, labels)

        def mean(trained):
            logits = apply(cj.merge(trained, frozen), batch, None)
            return loss(logits, batch["labels"]).mean(), logits

        return jax.jit(jax.value_and_grad(mean, has_aux=True))(trained)

    own, gradients = run(params, labels)
    with scanned.scanned_layers():
        found, of_scan = run(
            scanned.stack_layers(params), scanned.stack_layers(labels, lambda names: names[0])
        )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    wanted = scanned.stack_layers(gradients)
    assert jax.tree.structure(of_scan) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(of_scan), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def test_a_scan_compiles_one_layer(deep):
    """Two of three layers are one loop: there are fewer products than in the loop of modules."""
    size, model, params, _, batch = deep
    apply = step.apply_function(model, jax_worker.INPUTS[size.family])

    def products(params):
        text = jax.jit(lambda params: apply(params, batch, None)).lower(params).as_text()
        return text.count("dot_general"), "while" in text

    own, loops = products(params)
    with scanned.scanned_layers():
        found, scans = products(scanned.stack_layers(params))
    assert scans
    assert not loops
    assert found < 0.8 * own


@pytest.mark.parametrize("name", ["scan", "words"])
def test_they_are_lowered_for_devices_that_are_not_there(name, deep):
    size, model, params, _, batch = deep
    if name == "scan":
        apply = step.apply_function(model, jax_worker.INPUTS[size.family])
        with scanned.scanned_layers():
            traced = jax.jit(lambda params: apply(params, batch, None)).trace(
                scanned.stack_layers(params)
            )
    else:
        function = functools.partial(switches.cross_entropy_in_parts, parts=2)
        traced = jax.jit(jax.grad(lambda *given: function(*given).sum())).trace(
            jnp.ones((4, 8), jnp.bfloat16), jnp.ones((6, 8), jnp.bfloat16), jnp.zeros(4, jnp.int32)
        )
    for platform in ("cuda", "tpu"):
        assert "while" in traced.lower(lowering_platforms=(platform,)).as_text()
