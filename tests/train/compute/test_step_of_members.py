"""Tests steps of a bank: rows of a batch through their own members, and members without rows."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.banks import get_member
from compacter_jax.compositions.bank import Bank
from tests.helpers import adapted_shapes, quick_jit, quick_key, random_tree
from tests.seq2seq_models import small_backbone, tiny
from train.compute import step
from train.compute.compute import make_compute
from train.data.batching import shift_right
from train.data.tokens import IGNORED

CONFIG = tiny("m2m_100", dropout=0.0, attention_dropout=0.0)
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")
SIZE = 3


@functools.cache
def setup():
    """Returns a model whose bank has drawn members, and its parameters."""
    backbone = small_backbone(CONFIG)
    model = cj.Adapted(backbone.module, Bank(cj.preset("ciat"), size=SIZE))
    drawn = flatten_dict(random_tree(adapted_shapes(model), seed=3), sep="/")
    occupied = {path: np.ones(SIZE, bool) for path in drawn if path.endswith("occupied")}
    assert len(occupied) == 1
    own = flatten_dict(backbone.params, sep="/")
    return model, unflatten_dict({**drawn, **occupied, **own}, sep="/")


def batch_of(members, seed=0, length=7, targets=5):
    """Returns a batch with padding, whose rows belong to the given members."""
    rng = np.random.default_rng(seed)
    rows = len(members)
    lengths, ends = rng.integers(2, length + 1, rows), rng.integers(1, targets + 1, rows)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    labels = rng.integers(3, CONFIG.vocab_size, (rows, targets)).astype(np.int32)
    labels[np.arange(targets) >= ends[:, None]] = IGNORED
    ids = rng.integers(3, CONFIG.vocab_size, (rows, length)).astype(np.int32)
    return {
        "input_ids": np.where(mask, ids, CONFIG.pad_token_id).astype(np.int32),
        "attention_mask": mask,
        "decoder_input_ids": shift_right(
            labels, CONFIG.pad_token_id, CONFIG.decoder_start_token_id
        ),
        "labels": labels,
        "weights": (labels != IGNORED).sum(1).astype(np.float32),
        "adapter_ids": np.array(members, np.int32),
    }


def without_ids(batch, rows):
    return {name: x[rows] for name, x in batch.items() if name != "adapter_ids"}


def losses_and_gradient(model, params, batch, labels):
    """Returns each row's mean loss, and the gradient of the sum over all tokens."""
    trained, frozen = cj.partition(params, labels)

    def total(trained):
        apply = step.apply_function(model, INPUTS)
        logits = apply(cj.merge(trained, frozen), batch, None)
        losses = step.loss_function("tokens")(logits, batch["labels"])
        return (losses * batch["weights"]).sum(), losses

    (_, losses), gradient = quick_jit(jax.value_and_grad(total, has_aux=True))(trained)
    return losses, flatten_dict(gradient, sep="/")


def test_rows_of_a_mixed_batch_equal_those_of_their_direction_alone():
    """Loss and gradient of each row are those of a batch of its member alone, to 1e-6."""
    model, params = setup()
    members = [2, 0, 0, 2, 0]
    batch = batch_of(members)
    labels = cj.label_params(params, model.method)
    losses, gradient = losses_and_gradient(model, params, batch, labels)
    for member in range(SIZE):
        rows = np.flatnonzero(np.array(members) == member)
        if not len(rows):
            for path, leaf in gradient.items():
                if leaf is not None:
                    np.testing.assert_array_equal(leaf[member], 0, err_msg=path)
            continue
        alone, own = get_member(model, params, member)
        mine, wanted = losses_and_gradient(
            alone, own, without_ids(batch, rows), cj.label_params(own, alone.method)
        )
        np.testing.assert_allclose(losses[rows], mine, rtol=1e-6)
        scale = max(np.abs(leaf).max() for leaf in wanted.values() if leaf is not None)
        for path, leaf in wanted.items():
            if leaf is not None:
                found = gradient[path][member]
                np.testing.assert_allclose(found, leaf, rtol=0, atol=1e-6 * scale, err_msg=path)


def test_a_fresh_bank_is_the_plain_model_bit_for_bit():
    """The logits of rows of several fresh members are those of the plain model."""
    backbone = small_backbone(CONFIG)
    model = cj.Adapted(backbone.module, Bank(cj.preset("ciat"), size=2))
    params = cj.init_adapters(model, backbone, quick_key(1))
    batch = batch_of([1, 0, 1])
    inputs = [batch[name] for name in INPUTS]
    logits = model.apply({"params": params}, *inputs, adapter_ids=batch["adapter_ids"])
    plain = backbone.module.apply({"params": backbone.params}, *inputs)
    np.testing.assert_array_equal(logits, plain)


MIXTURES = ([0, 2, 2, 0], [2, 2, 2, 2], [0, 0, 0, 0], [2, 0, 2, 2])


@pytest.fixture(scope="module")
def trained():
    """Trains members 0 and 2 for 20 steps; returns parameters before and after, and the traces."""
    backbone = small_backbone(CONFIG)
    model = cj.Adapted(backbone.module, Bank(cj.preset("ciat"), size=SIZE))
    params = cj.init_adapters(model, backbone, quick_key(1))
    labels = cj.label_params(params, model.method)
    traces = []

    def apply(params, batch, key):
        traces.append(1)
        return step.apply_function(model, INPUTS)(params, batch, key)

    compute = make_compute(
        apply,
        step.loss_function("tokens"),
        cj.optimizer(step.adamw(decays=True, clips=True, members=True), labels),
        seed=0,
        devices=jax.local_devices()[:1],
    )
    half, rest = cj.partition(params, labels)
    before = jax.tree.map(np.array, params)
    state, frozen = compute.init_state(half), compute.place(rest)
    batches = [batch_of(MIXTURES[i % len(MIXTURES)], seed=i) for i in range(20)]
    counts = []
    for batch in batches:
        state, _ = compute.step(state, frozen, batch, step.Hyperparameters(1e-2, 0.1, 1.0))
        counts.append(len(traces))
    after = jax.tree.map(np.array, cj.merge(state.trained, frozen))
    flat = [flatten_dict(tree, sep="/") for tree in (before, after, labels)]
    return *flat, counts, jax.tree.map(np.array, state.opt_state), params


def test_steps_move_the_members_that_had_rows(trained):
    """After 20 steps every leaf of these members has moved, others and the backbone not one bit."""
    before, after, labels, *_ = trained
    assert sum(label == "train" for label in labels.values()) > 20
    for path, label in labels.items():
        if label == "freeze":
            np.testing.assert_array_equal(after[path], before[path], err_msg=path)
            continue
        np.testing.assert_array_equal(after[path][1], before[path][1], err_msg=path)
        for member in (0, 2):
            assert (after[path][member] != before[path][member]).any(), (path, member)


def test_members_without_rows_keep_their_moments(trained):
    """A member without rows has moments of 0; each counts the steps in which it had rows."""
    *_, state, params = trained
    leaves = jax.tree.leaves(state)
    counts = [leaf for leaf in leaves if leaf.shape == (SIZE,) and leaf.dtype == np.int32]
    assert counts
    for count in counts:
        assert count.tolist() == [15, 0, 15]
    for leaf in leaves:
        if leaf.ndim > 1:
            assert leaf.shape[0] == SIZE
            np.testing.assert_array_equal(leaf[1], 0)
    del params


def test_all_mixtures_share_one_program(trained):
    """The step is traced once, with whichever members the rows of a batch belong."""
    counts = trained[3]
    assert counts[0] >= 1
    assert counts[-1] == counts[0]


def test_a_member_is_updated_as_if_it_were_alone():
    """A member's parameters are those of Adam on the batches with its rows, to 1e-6."""
    rng = np.random.default_rng(0)
    tx = step.by_member(optax.adamw(1e-2, weight_decay=0.1))
    alone = optax.adamw(1e-2, weight_decay=0.1)
    params = {"a": rng.normal(size=(2, 3, 4)), "b": rng.normal(size=(2, 5))}
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    one = jax.tree.map(lambda x: x[1], params)
    state, own = tx.init(params), alone.init(one)
    for number in range(7):
        gradient = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), params)
        if number % 3 == 1:  # no rows of member 1
            for leaf in gradient.values():
                leaf[1] = 0
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        if number % 3 != 1:
            updates, own = alone.update(jax.tree.map(lambda x: x[1], gradient), own, one)
            one = optax.apply_updates(one, updates)
    for name, leaf in one.items():
        np.testing.assert_allclose(params[name][1], leaf, rtol=1e-6)


def test_a_gradient_that_is_no_number_reaches_the_parameters():
    """NaN is not taken for a member without rows."""
    tx = step.by_member(optax.sgd(1.0))
    params = {"a": np.zeros((2, 3), np.float32)}
    gradient = {"a": np.array([[np.nan, 0, 0], [0, 0, 0]], np.float32)}
    updates, _ = tx.update(gradient, tx.init(params), params)
    assert np.isnan(updates["a"][0, 0])
    np.testing.assert_array_equal(updates["a"][1], 0)
