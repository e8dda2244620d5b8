"""Builds banks from saved adapters, and takes members out and puts them in."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from compacter_jax import checkpoint
from compacter_jax.banks import get_member, set_member, stack_adapters, unstack
from compacter_jax.checkpoint import load_adapter, save_adapter
from compacter_jax.compositions import replacements, routing
from compacter_jax.compositions.average import Average
from compacter_jax.compositions.bank import Bank
from compacter_jax.compositions.parallel import Parallel
from compacter_jax.compositions.replacements import NO_LABEL
from compacter_jax.compositions.stack import Stack
from compacter_jax.inject.adapted import Adapted
from compacter_jax.inject.initial import init_adapters
from compacter_jax.models.bert.model import Bert
from compacter_jax.params import count, label_params
from tests.compositions.test_compose import METHODS, ROWS, assert_near, trained_alone
from tests.helpers import ONE_LAYER, backbone_of, quick_key
from tests.hosts import PLUS_PLUS, assert_same, run


def bert(labels=2, **settings):
    """Returns a classifier with any number of labels; the weights below the head are the same."""
    make = functools.partial(Bert, ONE_LAYER, head="sequence_classification")
    own = backbone_of(make(num_labels=labels, **settings))
    params = {**backbone_of(make()).params, "classifier": own.params["classifier"]}
    return types.SimpleNamespace(module=own.module, params=params)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves adapters with 2, 4 and 3 labels; returns their folders and contents."""
    folder = tmp_path_factory.mktemp("adapters")
    alone = []
    for seed, labels in enumerate((2, 4, 3)):
        alone.append(trained_alone(bert(labels), PLUS_PLUS, seed + 1))
        save_adapter(folder / str(seed), *alone[-1])
    return [folder / str(seed) for seed in range(3)], alone


@pytest.mark.contract
def test_saved_adapters_are_stacked_and_given_back_to_the_bit(saved):
    folders, alone = saved
    model, params = stack_adapters(folders, bert(), capacity=5)
    assert model.method == Bank(PLUS_PLUS, size=5)
    assert model.backbone.num_labels == 4
    np.testing.assert_array_equal(params["adapters"]["occupied"], [True] * 3 + [False] * 2)
    members = unstack(model, params)
    assert len(members) == 3
    for (given, leaves), (single, own) in zip(members, alone, strict=True):
        assert given == single
        assert_same(leaves, own)


def test_labels_that_a_member_lacks_have_no_probability(saved):
    folders, alone = saved
    model, params = stack_adapters(folders, bert())
    logits = run(model, params, *ROWS, adapter_ids=np.array([0, 1, 2, -1]))
    probabilities = np.asarray(jax.nn.softmax(logits))
    for row, (labels, (single, own)) in enumerate(zip((2, 4, 3), alone, strict=True)):
        assert_near(logits[row, :labels], run(single, own, *ROWS)[row])
        np.testing.assert_array_equal(probabilities[row, labels:], 0)
    plain = run(bert().module, bert().params, *ROWS)
    assert_near(logits[3, :2], plain[3])
    np.testing.assert_array_equal(logits[3, 2:], np.float32(NO_LABEL))


def of_weights(members, own, weights):
    """Mixes a bias in float64; a label that a weighted member lacks gets no probability."""
    lacking = members == NO_LABEL
    mixed = weights @ np.where(lacking, 0, members)
    mixed += (1 - weights.sum()) * np.where(own == NO_LABEL, 0, own)
    absent = (lacking & (weights[:, None] != 0)).any(0)
    return np.where(absent | ((own == NO_LABEL) & ~weights.any()), NO_LABEL, mixed)


@pytest.mark.parametrize("narrow", [True, False])
def test_labels_of_a_mixture(narrow):
    """Uses softmax weights, which sum to 1 up to rounding, on a backbone of two or four labels."""
    rng = np.random.default_rng(0)
    members, own = rng.standard_normal((3, 4)).astype(np.float32), np.float32(rng.random(4))
    for row, labels in ((members[0], 2), (members[2], 3), (own, 2 if narrow else 4)):
        row[labels:] = NO_LABEL
    weights = np.array(jax.nn.softmax(jnp.float32(3 * rng.standard_normal((40, 3)))))
    weights[0], weights[1], weights[2], weights[3] = [0, 1, 0], [0, 0, 0], [0, 2, -1], [0, 0.5, 0]
    # Rounded, so that their sum is never exactly 1.
    weights[20:, 0] += np.float32(1e-6)
    bank, occupied = Bank(PLUS_PLUS, size=3), jnp.ones(3, bool)
    found = routing.Routing(bank, occupied, mix=jnp.asarray(weights)).choose(members, own)
    expected = [of_weights(members, own, each) for each in np.float64(weights)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    alone = routing.Routing(bank, occupied, mix=jnp.asarray(weights[7]))
    np.testing.assert_allclose(alone.choose(members, own), expected[7], rtol=1e-5, atol=1e-5)
    none = routing.Routing(bank, occupied, mix=jnp.zeros(3))
    np.testing.assert_array_equal(none.choose(members, own), own)
    unknown = routing.Routing(bank, jnp.array([True, True, False]), mix=jnp.asarray(weights[7]))
    assert np.isnan(unknown.choose(members, own)).all()


@pytest.mark.parametrize("weights", [(0.5, 0.2, 0.3), (2, -1, 0), (0, 0.5, 0), (0, 0, 0)])
def test_labels_of_an_average(weights):
    rng = np.random.default_rng(0)
    members, own = rng.standard_normal((3, 4)).astype(np.float32), np.float32(rng.random(4))
    members[1, 3] = own[2:] = NO_LABEL
    method = Average(PLUS_PLUS, PLUS_PLUS, PLUS_PLUS, weights=weights)
    stored = {(name,): jnp.asarray(leaf) for name, leaf in zip("012", members, strict=True)}
    found = replacements.effective(method, replacements.Leaf(jnp.asarray(own)), stored, None, 4)
    expected = of_weights(members, own, np.float64(weights))
    np.testing.assert_allclose(found.value, expected, rtol=1e-5, atol=1e-5)
    assert not found.by_row


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (1 / 3, 1 / 3, 1 / 3)])
def test_an_average_on_a_backbone_with_fewer_labels(weights):
    """The sums of these weights are rounded, too."""
    members = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    own = jnp.array([1, 2, NO_LABEL, NO_LABEL])
    method = Average(PLUS_PLUS, PLUS_PLUS, PLUS_PLUS, weights=weights)
    stored = {(name,): jnp.asarray(leaf) for name, leaf in zip("012", members, strict=True)}
    found = replacements.effective(method, replacements.Leaf(own), stored, None, 4)
    np.testing.assert_allclose(found.value, weights @ members, rtol=1e-5, atol=1e-5)


def test_a_mixture_on_a_backbone_with_fewer_labels():
    """The result equals that on a backbone with as many labels as the members."""
    alone = [trained_alone(bert(4), PLUS_PLUS, seed) for seed in (1, 2, 3)]
    mix = np.array(jax.nn.softmax(jnp.float32(np.random.default_rng(1).standard_normal((4, 3)))))

    def mixed(labels):
        model, params = stack_adapters(alone, bert(labels))

        def logits_fn(params, mix, ids, mask):
            return model.apply({"params": params}, ids[None], mask[None], mix=mix[None])[0]

        function = jax.tree_util.Partial(logits_fn, params)
        least = cj.minimize_entropy(function, 3, *ROWS, steps=3, learning_rate=0.5)
        return run(model, params, *ROWS, mix=mix), least

    (narrow, least), (wide, wanted) = mixed(2), mixed(4)
    assert_near(narrow, wide, 1e-5)
    assert (np.diff(least.entropies, axis=1) < 0).all()
    np.testing.assert_allclose(least.weights, wanted.weights, atol=1e-4)
    np.testing.assert_allclose(least.logits, wanted.logits, atol=1e-3)


def test_the_backbone_is_hashed_once(saved, tmp_path, monkeypatch):
    folders = [tmp_path / str(seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        save_adapter(folder, *trained_alone(bert(), PLUS_PLUS, seed))
    hashed = []
    once = checkpoint.hash_params
    monkeypatch.setattr(checkpoint, "hash_params", lambda params: hashed.append(1) or once(params))
    stack_adapters(folders, bert())
    assert len(hashed) == 1
    stack_adapters([*folders, *saved[0]], bert())  # with other numbers of labels
    assert len(hashed) == 2


def test_a_bank_on_disk(saved, tmp_path):
    folders, alone = saved
    model, params = stack_adapters(folders, bert(4))
    save_adapter(tmp_path, model, params, metadata={"names": ["a", "b", "c"]})
    loaded_model, loaded = load_adapter(tmp_path, bert(4))
    assert loaded_model == model
    assert_same(loaded, params)
    # A head has 12 weights and a bias for each label.
    single = count(alone[1][1], label_params(alone[1][1], PLUS_PLUS)).trained
    assert count(params, label_params(params, model.method)).trained == 3 * single


def test_one_rule_for_all(saved):
    _, alone = saved
    model, params = alone[0]
    other = {**alone[0][1], "phm_rule": params["phm_rule"]}
    bank, stacked = stack_adapters([alone[0], (model, other)], bert(4), shared_rule=True)
    assert stacked["phm_rule"].shape == params["phm_rule"].shape
    for single, own in unstack(bank, stacked):
        assert single == model
        assert_same(own, params)
    with pytest.raises(ValueError, match="shared_rule=True, but the adapters have different value"):
        stack_adapters(alone, bert(), shared_rule=True)
    with pytest.raises(
        ValueError, match="all members of the bank share one phm_rule, but the adap"
    ):
        set_member(bank, stacked, 1, alone[1])


def test_a_member_takes_its_place(saved):
    folders, alone = saved
    bank, params = stack_adapters(folders[1:], bert(), capacity=4)
    params = set_member(bank, params, 3, folders[0])
    np.testing.assert_array_equal(params["adapters"]["occupied"], [True, True, False, True])
    params = set_member(bank, params, 0, alone[2])
    for index, which in ((0, 2), (1, 2), (3, 0)):
        assert get_member(bank, params, index)[0] == alone[which][0]
        assert_same(get_member(bank, params, index)[1], alone[which][1])
    for which in (4, -1, "a"):
        with pytest.raises(ValueError, match=f"no member {which!r}; the composition has 0 to 3"):
            set_member(bank, params, which, folders[0])


def test_members_of_a_composition_from_disk(saved):
    folders, alone = saved
    backbone = bert(4)
    dense = METHODS["houlsby"].replace(train_layer_norms=False, train_pooler=False)
    tasks = Bank(PLUS_PLUS, size=2)
    model = Adapted(backbone.module, Stack(dense, tasks, names=("language", "tasks")))
    params = init_adapters(model, backbone, quick_key(0))
    language = trained_alone(bert(), dense, 9)
    params = set_member(model, params, "language", language)
    params = set_member(model, params, "tasks/0", folders[1])
    params = set_member(model, params, "tasks/1", folders[2])
    for which, index in (("tasks/0", 1), ("tasks/1", 2)):
        single, own = get_member(model, params, which)
        assert single == alone[index][0]
        assert_same(own, alone[index][1])
    taken = flatten_dict(get_member(model, params, "language")[1], sep="/")
    given = flatten_dict(language[1], sep="/")
    for path in taken:
        if "/adapter/" in path:
            np.testing.assert_array_equal(taken[path], given[path])
    with pytest.raises(
        ValueError, match="there is no member 'task'; the composition has language, "
    ):
        get_member(model, params, "task")
    with pytest.raises(
        ValueError,
        match="the model's method is 'stack', not a bank; for another composition, use get_member",
    ):
        unstack(model, params)


def test_adapters_that_do_not_fit(saved, tmp_path):
    folders, alone = saved
    with pytest.raises(ValueError, match="0 adapters were given for a bank with a capacity of 0"):
        stack_adapters([], bert())
    with pytest.raises(ValueError, match="3 adapters were given for a bank with a capacity of 2"):
        stack_adapters(folders, bert(), capacity=2)
    other = trained_alone(bert(), PLUS_PLUS.replace(reduction_factor=4, sites=("attention",)), 0)
    save_adapter(tmp_path, *other)
    message = (
        rf"the adapter in {tmp_path} differs from the others; "
        r"sites: \['attention'\], not \['feed_forward'\]; reduction_factor: 4, not 2"
    )
    with pytest.raises(ValueError, match=message):
        stack_adapters([folders[0], tmp_path], bert())
    with pytest.raises(ValueError, match="adapter 1 differs from the others; sites"):
        stack_adapters([alone[0], other], bert())
    bank, params = stack_adapters(folders[:1], bert(), capacity=2)
    with pytest.raises(ValueError, match="the adapter for 1 differs from the others; sites"):
        set_member(bank, params, 1, other)
    with pytest.raises(ValueError, match=r"has shape \(4,\), but must have \(2,\); an adapter"):
        set_member(bank, params, 1, folders[1])
    elsewhere = bert()
    elsewhere.params["pooler"] = jax.tree.map(jnp.zeros_like, elsewhere.params["pooler"])
    with pytest.raises(ValueError, match="was made for a backbone with the hash"):
        stack_adapters(folders, elsewhere)


def test_a_parallel_model_of_tasks_with_their_labels(saved):
    folders, alone = saved
    backbone = bert(4)
    model = Adapted(backbone.module, Parallel(PLUS_PLUS, PLUS_PLUS, names=("two", "four")))
    params = init_adapters(model, backbone, quick_key(0))
    params = set_member(model, params, "two", folders[0])
    params = set_member(model, params, "four", folders[1])
    two, four = run(model, params, *ROWS)
    assert_near(two[:, :2], run(*alone[0], *ROWS))
    np.testing.assert_array_equal(jax.nn.softmax(two)[:, 2:], 0)
    assert_near(four, run(*alone[1], *ROWS))


def test_what_is_for_one_adapter_says_so(saved, tmp_path):
    folders, _ = saved
    model, params = stack_adapters(folders, bert())
    for refuse, message in (
        (lambda: cj.merge_adapter(model, params), "cannot be merged .*: it is several adapters"),
        (
            lambda: cj.export_adapterhub(tmp_path, model, params),
            "get each with get_member",
        ),
        (
            lambda: cj.export_peft(tmp_path, model, params),
            "method 'bank' cannot be exported to PEFT",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            refuse()
    assert model.precomputed(params)[0] is model
