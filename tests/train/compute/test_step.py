"""Tests the training step on one and on four devices: losses, gradients, updates, reductions."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from tests.helpers import SOME_PRESETS
from train.compute import step
from train.compute.compute import AXIS, make_compute
from train.data import batching, tokens

CONFIG = cj.BertConfig(
    vocab_size=31,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=44,
    max_position_embeddings=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
METHOD = cj.preset("compacter++", reduction_factor=3)
LEARNING_RATE = 1e-2


def setup(method=METHOD, *, config=CONFIG, num_labels=3, seed=0, **module_attributes):
    module = cj.Bert(
        config, head="sequence_classification", num_labels=num_labels, **module_attributes
    )
    params = module.init(jax.random.key(seed), *module.dummy_inputs())["params"]
    model = cj.Adapted(module, method)
    backbone = cj.Backbone(module, params, None, "random")
    params = cj.init_adapters(model, backbone, jax.random.key(seed + 1))
    return model, params, cj.label_params(params, method)


def make_batch(rows=8, real=8, length=7, seed=0, *, num_labels=3):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, length + 1, rows)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    return {
        "input_ids": generator.integers(0, 31, (rows, length)).astype(np.int32) * mask,
        "attention_mask": mask,
        "token_type_ids": np.zeros((rows, length), np.int32),
        "labels": generator.integers(0, num_labels, rows).astype(np.int32),
        "weights": (np.arange(rows) < real).astype(np.float32),
    }


def compute(model, labels, devices, *, tx=None, **keywords):
    return make_compute(
        step.apply_function(model),
        step.loss_function("classification"),
        cj.optimizer(tx or optax.adamw(LEARNING_RATE), labels),
        seed=0,
        devices=jax.local_devices()[:devices],
        **keywords,
    )


def run(model, params, labels, batches, devices=1, **keywords):
    """Returns the losses, gradient norms and final trained half of a few steps."""
    made = compute(model, labels, devices, **keywords)
    trained, frozen = cj.partition(params, labels)
    state, frozen = made.init_state(trained), made.place(frozen)
    losses, norms = [], []
    for batch in batches:
        state, values = made.step(state, frozen, batch)
        losses.append(float(values.loss))
        norms.append(float(values.gradient_norm))
    return losses, norms, jax.device_get(made.host_state(state))


# The last global batch is incomplete: two devices have no real row.
BATCHES = [make_batch(seed=0), make_batch(seed=1, length=11), make_batch(seed=2, real=3)]


def assert_trees_close(left, right, atol):
    left, right = flatten_dict(left, sep="/"), flatten_dict(right, sep="/")
    assert left.keys() == right.keys()
    for path in left:
        if left[path] is not None:
            np.testing.assert_allclose(left[path], right[path], atol=atol, err_msg=path)


@pytest.mark.contract
@pytest.mark.parametrize("accumulation_steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_four_devices_give_the_losses_of_one(accumulation_steps):
    arguments = setup()
    one = run(*arguments, BATCHES)
    four = run(*arguments, BATCHES, devices=4, accumulation_steps=accumulation_steps)
    np.testing.assert_allclose(four[0], one[0], atol=1e-6, rtol=0)
    np.testing.assert_allclose(four[1], one[1], atol=1e-6, rtol=1e-5)
    # Adam's first steps have the size of the learning rate for any gradient, so another order of
    # summation may move a leaf with a gradient near zero by a part of it.
    assert_trees_close(four[2].trained, one[2].trained, atol=LEARNING_RATE * 0.05)


@pytest.mark.slow
def test_accumulation_gives_the_losses_of_one_large_batch():
    arguments = setup()
    whole, parts = run(*arguments, BATCHES), run(*arguments, BATCHES, accumulation_steps=4)
    np.testing.assert_allclose(parts[0], whole[0], atol=1e-6, rtol=0)
    np.testing.assert_allclose(parts[1], whole[1], atol=1e-6, rtol=1e-5)


def test_loss_is_the_mean_over_real_rows_alone():
    model, params, labels = setup()
    batch = make_batch(real=5, seed=4)
    real = {name: array[:5] for name, array in batch.items()}
    (padded,), (norm,), _ = run(model, params, labels, [batch])
    (alone,), (norm_alone,), _ = run(model, params, labels, [real])
    np.testing.assert_allclose([padded, norm], [alone, norm_alone], rtol=1e-5)
    logits = np.asarray(
        model.apply({"params": params}, batch["input_ids"], batch["attention_mask"]), np.float64
    )[:5]
    picked = logits[np.arange(5), batch["labels"][:5]]
    expected = np.mean(np.log(np.exp(logits).sum(-1)) - picked)
    np.testing.assert_allclose(padded, expected, atol=1e-6)


def test_regression_loss():
    loss = step.loss_function("regression")
    values = loss(jnp.array([[1.5], [-1.0]], jnp.bfloat16), jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(values, [0.25, 9.0])
    assert values.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("compacter++", 4),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in SOME_PRESETS),
        pytest.param("full", 4, marks=pytest.mark.slow),
    ],
)
def test_a_step_moves_the_trained_leaves_and_no_other(name, devices):
    overrides = {} if name == "full" else {"reduction_factor": 2}
    method = cj.preset(name, **overrides)
    model, params, labels = setup(method)
    made = compute(model, labels, devices)
    trained, frozen = cj.partition(params, labels)
    before = jax.device_get(frozen)
    state, placed = made.init_state(trained), made.place(frozen)
    for batch in BATCHES[:2]:  # a gradient can be exactly zero in one batch
        state, _ = made.step(state, placed, batch)
    after = made.host_state(state).trained
    placed = placed if devices == 1 else jax.tree.map(lambda x: x[0], placed)
    assert_same_bits(before, jax.device_get(placed))
    flat, flat_labels = flatten_dict(after, sep="/"), flatten_dict(labels, sep="/")
    start = flatten_dict(params, sep="/")
    for path, label in flat_labels.items():
        if label == "freeze":
            assert flat[path] is None
        else:
            moved = not np.array_equal(flat[path], start[path])
            assert moved, path
    count = cj.count(params, labels)
    adam = [leaf for leaf in jax.tree.leaves(made.host_state(state).opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in adam) == 2 * count.trained


def assert_same_bits(left, right):
    left, right = jax.tree.leaves(left), jax.tree.leaves(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["compacter++", "full"])
@pytest.mark.contract
def test_only_trained_leaves_are_reduced_over_devices(name):
    method = METHOD if name == "compacter++" else cj.preset("full")
    model, params, labels = setup(method)
    trained, frozen = cj.partition(params, labels)
    tx = cj.optimizer(optax.adamw(LEARNING_RATE), labels)
    update = functools.partial(
        step.loss_and_update,
        apply=step.apply_function(model),
        loss=step.loss_function("classification"),
        tx=tx,
        axis_name=AXIS,
    )
    state = step.TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))
    copies = jax.tree.map(lambda x: jnp.stack([x] * 4), (state, frozen))
    batch = {name: array.reshape(4, 2, -1) for name, array in make_batch().items()}
    batch = {
        name: array[..., 0] if name in ("labels", "weights") else array
        for name, array in batch.items()
    }
    pmapped = jax.pmap(lambda s, f, b: update(s, f, b, jax.random.key(0)), AXIS)
    hlo = pmapped.lower(*copies, batch).compile().as_text()
    reduced = 0
    for line in hlo.splitlines():
        if match := re.search(r"= (.*?) all-reduce(-start)?\(", line):
            for shape in re.findall(r"f32\[([\d,]*)\]", match[1]):
                reduced += int(np.prod([int(n) for n in shape.split(",") if n]))
    # The gradients, the loss and the number of real rows.
    assert reduced == cj.count(params, labels).trained + 2


@pytest.mark.slow
@pytest.mark.contract
def test_state_is_donated_and_the_callers_arrays_are_not():
    model, params, labels = setup()
    made = compute(model, labels, 1)
    trained, frozen = cj.partition(params, labels)
    state = made.init_state(trained)
    made.step(state, made.place(frozen), make_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trained))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_clipping_reads_trained_gradients_alone():
    # Plain gradient descent moves parameters by the learning rate times the clipped gradient.
    model, params, labels = setup()
    limit = 1e-3
    tx = optax.chain(optax.clip_by_global_norm(limit), optax.sgd(1.0))
    _, (norm,), state = run(model, params, labels, BATCHES[:1], tx=tx)
    trained, _ = cj.partition(params, labels)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, state.trained, trained))
    assert norm > limit
    np.testing.assert_allclose(moved, limit, rtol=1e-2)  # differences of float32 numbers near 1


@pytest.mark.slow
def test_dropout_depends_on_seed_and_step_alone():
    config = cj.BertConfig(**{**vars(CONFIG), "hidden_dropout_prob": 0.3})
    arguments = setup(config=config)
    batches = [BATCHES[0], BATCHES[0]]
    still = optax.sgd(0.0)
    first = run(*arguments, batches, tx=still)[0]
    assert first == run(*arguments, batches, tx=still)[0]
    assert first[0] != first[1]


@pytest.mark.slow
def test_remat_changes_nothing():
    plain = run(*setup(), BATCHES)
    again = run(*setup(remat="full"), BATCHES)
    np.testing.assert_allclose(again[0], plain[0], atol=1e-6)
    np.testing.assert_allclose(again[1], plain[1], rtol=1e-4)


@pytest.mark.contract
def test_bfloat16_keeps_parameters_and_state_in_float32():
    losses, _, state = run(*setup(dtype=jnp.bfloat16), BATCHES)
    reference, _, _ = run(*setup(), BATCHES)
    # 8 bits of mantissa through two layers: an error of a few per cent of a loss near 1.
    np.testing.assert_allclose(losses, reference, rtol=3e-2)
    leaves = jax.tree.leaves((state.trained, state.opt_state))
    assert {leaf.dtype.name for leaf in leaves} == {"float32", "int32"}


def test_adamw_takes_its_numbers_with_each_gradient():
    model, params, labels = setup()
    rates = optax.join_schedules(
        [optax.linear_schedule(0.0, 3e-2, 2), optax.linear_schedule(3e-2, 0.0, 4)], [2]
    )
    tx = optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(rates, weight_decay=0.1))
    batches = [BATCHES[0]] * 6
    losses, norms, expected = run(model, params, labels, batches, tx=tx)
    assert min(norms) > 0.05
    made = compute(model, labels, 1, tx=step.adamw(decays=True, clips=True))
    trained, frozen = cj.partition(params, labels)
    state, frozen = made.init_state(trained), made.place(frozen)
    schedule = step.linear_schedule(3e-2, 2, 6)
    for i, batch in enumerate(batches):
        numbers = step.Hyperparameters(schedule(i), weight_decay=0.1, clip_norm=0.05)
        state, metrics = made.step(state, frozen, batch, numbers)
        np.testing.assert_allclose(float(metrics.loss), losses[i], rtol=1e-5)
    # A checkpoint of optax's own AdamW fits.
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert_trees_close(state.trained, expected.trained, atol=1e-5)


def test_linear_schedule():
    schedule = step.linear_schedule(2.0, 4, 12)
    np.testing.assert_allclose([schedule(i) for i in (0, 1, 4, 8, 12)], [0, 0.5, 2, 1, 0])
    np.testing.assert_allclose([step.linear_schedule(2.0, 0, 10)(i) for i in (0, 5)], [2, 1])


def test_loss_decreases():
    batches = [make_batch(seed=7)] * 40
    losses, _, _ = run(*setup(), batches)
    assert losses[-1] < 0.7 * losses[0]


def text_batch(rows=8, real=8, seed=0, length=6, target_length=5):
    """Returns targets of different lengths, so that means over tokens and over rows differ."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, target_length + 1, rows) * (np.arange(rows) < real)
    labels = generator.integers(2, 31, (rows, target_length)).astype(np.int32)
    labels[np.arange(target_length) >= lengths[:, None]] = tokens.IGNORED
    return {
        "input_ids": generator.integers(2, 31, (rows, length)).astype(np.int32),
        "attention_mask": np.ones((rows, length), np.int32),
        "decoder_input_ids": batching.shift_right(labels, 0, 0),
        "labels": labels,
        "weights": lengths.astype(np.float32),
    }


@pytest.fixture(scope="module")
def text_to_text():
    """Returns a tiny T5 with adapters, its parameters, their labels, and how steps call it."""
    sizes = {"vocab_size": 31, "d_model": 16, "d_kv": 8, "d_ff": 24}
    module = cj.T5(cj.T5Config(**sizes, num_layers=1, num_heads=2, dropout_rate=0.0))
    params = module.init(jax.random.key(0), *module.dummy_inputs())["params"]
    model = cj.Adapted(module, cj.preset("compacter++", reduction_factor=2))
    backbone = cj.Backbone(module, params, None, "random")
    params = cj.init_adapters(model, backbone, jax.random.key(1))
    apply = step.apply_function(model, ("input_ids", "attention_mask", "decoder_input_ids"))
    return apply, params, cj.label_params(params, model.method)


@pytest.mark.parametrize(("devices", "parts"), [(4, 1), (1, 4), (4, 2)])
def test_token_loss_is_that_of_one_large_batch(text_to_text, devices, parts):
    apply, params, labels = text_to_text
    batches = [text_batch(seed=0), text_batch(seed=1, real=3)]
    batches += [text_batch(seed=2, target_length=9)] * (devices * parts > 4)

    def run_on(devices, parts):
        made = make_compute(
            apply,
            step.loss_function("tokens"),
            cj.optimizer(optax.sgd(LEARNING_RATE), labels),
            seed=0,
            accumulation_steps=parts,
            devices=jax.local_devices()[:devices],
        )
        trained, frozen = cj.partition(params, labels)
        state, frozen = made.init_state(trained), made.place(frozen)
        values = []
        for batch in batches:
            state, metrics = made.step(state, frozen, batch)
            values.append([float(metrics.loss), float(metrics.gradient_norm)])
        return np.array(values)

    values = run_on(devices, parts)
    np.testing.assert_allclose(values, run_on(1, 1), atol=1e-6, rtol=2e-6)
    logits = np.asarray(apply(params, batches[0], None), np.float64)
    known = batches[0]["labels"] != tokens.IGNORED
    picked = np.take_along_axis(logits, np.where(known, batches[0]["labels"], 0)[..., None], -1)
    losses = np.log(np.exp(logits).sum(-1)) - picked[..., 0]
    np.testing.assert_allclose(values[0, 0], losses[known].mean(), atol=1e-6)


def test_token_loss_of_a_row_without_targets_is_zero():
    labels = jnp.array([[2, tokens.IGNORED], [tokens.IGNORED, tokens.IGNORED]])
    logits = jnp.array([[[0.0, 0, 1], [9, 9, 9]], [[1, 2, 3], [4, 5, 6]]], jnp.bfloat16)
    losses = step.loss_function("tokens")(logits, labels)
    np.testing.assert_allclose(losses, [np.log(2 + np.e) - 1, 0], rtol=1e-6)
    assert losses.dtype == jnp.float32
