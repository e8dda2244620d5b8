"""Tests labels, partition and merge, counts, the optimizer, and compiled gradients."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.catalogue import preset, presets
from compacter_jax.inject.adapted import Adapted
from compacter_jax.models.bert.config import BertConfig
from compacter_jax.models.bert.model import Bert
from compacter_jax.models.encoder import HEADS
from compacter_jax.params import count, label_params, merge, optimizer, partition
from tests.helpers import (
    IDS,
    MASK,
    ONE_LAYER,
    SMALL,
    TINY_BERT,
    adapted_shapes,
    quick_jit,
    random_tree,
)

MINILM = BertConfig(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
)
HALF = {"reduction_factor": 2}
PROMPTS = {"prompt_length": 3}
SIZES = {
    "houlsby": HALF,
    "pfeiffer-attention": HALF,
    "pfeiffer-feed-forward": HALF,
    "adapterdrop": {**HALF, "leave_out": (0,)},
    "low-rank": HALF,
    "phm": SMALL,
    "compacter": SMALL,
    "compacter++": SMALL,
    "compacter++-short": SMALL,
    "prompt-tuning-random": PROMPTS,
    "prompt-tuning-vocabulary": PROMPTS,
    "intrinsic-said": {"dimension": 50},
    "intrinsic": {"dimension": 50},
    "compacter-ciat": {"phm_dim": SMALL["phm_dim"]},
    "compacter-st": {"phm_dim": SMALL["phm_dim"]},
}


def small(name, **overrides):
    return preset(name, **(SIZES.get(name, {}) | overrides))


def shapes_of(method, head="sequence_classification", config=TINY_BERT):
    return adapted_shapes(Adapted(Bert(config, head=head), method))


def trained_paths(labels):
    flat = flatten_dict(labels, sep="/")
    assert set(flat.values()) <= {"train", "freeze"}
    return {path for path, label in flat.items() if label == "train"}


# Group -> a pattern that finds its parameters anywhere in a path.
FOUND_BY = {
    "adapters": r"/adapter/(?!.*phm_rule)|^(phm_(up|down)|prefix|intrinsic)_",
    "rules": r"phm_rule",
    "layer norms": r"^(?!cls/).*/LayerNorm/",  # the language-modelling head stays frozen
    "heads": r"^(classifier|qa_outputs)/",
    "pooler": r"^pooler/",
    "biases": r"^(?!classifier|qa_outputs).*\bbias$",
    "everything": r"",
}
HOUSEHOLD = ("adapters", "rules", "layer norms", "heads")
# Most presets leave the layer norms frozen.
FREEZING_NORMS = ("adapters", "heads")
# Preset -> what it trains, if different.
TRAINED = {
    "full": ("everything",),
    **dict.fromkeys(("houlsby", "pfeiffer-attention", "adapterdrop", "low-rank"), HOUSEHOLD),
    **dict.fromkeys(("phm", "compacter", "compacter++", "compacter++-short"), HOUSEHOLD),
    "bitfit": ("biases", "heads"),
    "compacter-ciat": ("adapters", "rules", "heads"),
    "compacter-st": ("adapters", "rules", "heads"),
}


def found_by(groups, paths):
    return {path for path in paths for group in groups if re.search(FOUND_BY[group], path)}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", presets())
def test_what_each_preset_trains(name, head):
    method = small(name)
    shapes = shapes_of(method, head)
    expected = found_by(TRAINED.get(name, FREEZING_NORMS), flatten_dict(shapes, sep="/"))
    assert trained_paths(label_params(shapes, method)) == expected


@pytest.mark.parametrize(
    ("name", "overrides", "groups"),
    [
        ("compacter", {"train_layer_norms": False}, ("adapters", "rules", "heads")),
        ("compacter", {"train_head": False}, ("adapters", "rules", "layer norms")),
        ("compacter", {"train_pooler": True}, (*HOUSEHOLD, "pooler")),
        ("compacter", {"learn_phm": False}, ("adapters", "layer norms", "heads")),
        ("compacter", {"shared_W_phm": True}, HOUSEHOLD),
        ("compacter", {"factorized_phm_rule": True}, HOUSEHOLD),
        (
            "compacter",
            {"factorized_phm_rule": True, "learn_phm": False},
            ("adapters", "layer norms", "heads"),
        ),
        # With a rule for each projection, and with layer norms inside the adapters.
        ("phm", {"learn_phm": False}, ("adapters", "layer norms", "heads")),
        (
            "phm",
            {"layer_norm_before": True, "layer_norm_after": True, "train_layer_norms": False},
            ("adapters", "rules", "heads"),
        ),
    ],
)
def test_what_the_switches_train(name, overrides, groups):
    method = small(name, **overrides)
    shapes = shapes_of(method)
    expected = found_by(groups, flatten_dict(shapes, sep="/"))
    assert trained_paths(label_params(shapes, method)) == expected


def test_own_rules_win_over_the_method_and_the_first_match_wins():
    method = small("compacter")
    shapes = shapes_of(method)
    rules = [
        (r"encoder/layer/0/.*/adapter/down/bias", "train"),
        (r"encoder/layer/0/.*", "freeze"),
        (r"pooler/dense/kernel", "train"),
    ]
    paths = flatten_dict(shapes, sep="/")
    expected = {
        path for path in found_by(HOUSEHOLD, paths) if not path.startswith("encoder/layer/0/")
    }
    expected |= {path for path in paths if re.search(r"layer/0/.*adapter/down/bias", path)}
    expected |= {"pooler/dense/kernel"}
    assert trained_paths(label_params(shapes, method, rules)) == expected
    swapped = trained_paths(label_params(shapes, method, rules[::-1]))
    assert swapped == {path for path in expected if not path.startswith("encoder/layer/0/")}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [(r"encoder/layer/7/.*", "freeze")],
            r"pattern 'encoder/layer/7/\.\*' matches no parameter",
        ),
        ([(r"pooler", "train")], "pattern 'pooler' matches no parameter"),  # does not match in full
        ("train", "rules='train' must be pairs of a pattern and a label"),
        ({".*": "train"}, "rules={.*} must be pairs of a pattern and a label"),
        ([(".*", "train", "freeze")], r"rules=\[.*\] must be pairs of a pattern and a label"),
        ([(r".*", "frozen")], r"label 'frozen' of pattern '\.\*' must be 'train' or 'freeze'"),
    ],
)
def test_rules_that_cannot_work(rules, message):
    method = small("compacter")
    with pytest.raises(ValueError, match=message):
        label_params(shapes_of(method), method, rules)


@pytest.mark.parametrize(
    ("made_by", "labelled_by", "head", "message"),
    [
        (small("full"), small("compacter"), None, "'phm_bottleneck' trains the adapters, but no"),
        (small("houlsby"), small("compacter"), None, "trains the rule, but no parameter is one"),
        (
            small("compacter"),
            small("compacter", train_pooler=True),
            "question_answering",
            "trains the pooler, but no parameter is one",
        ),
    ],
)
def test_groups_that_are_not_there(made_by, labelled_by, head, message):
    with pytest.raises(ValueError, match=message):
        label_params(shapes_of(made_by, head), labelled_by)


@pytest.mark.parametrize("name", presets())
def test_partition_and_merge(name):
    method = small(name)
    params = random_tree(shapes_of(method))
    labels = label_params(params, method)
    trained, frozen = partition(params, labels)
    assert set(flatten_dict(trained, sep="/")) == set(flatten_dict(params, sep="/"))
    leaves = [path for path, leaf in flatten_dict(trained, sep="/").items() if leaf is not None]
    assert set(leaves) == trained_paths(labels)
    assert len(jax.tree.leaves(trained)) + len(jax.tree.leaves(frozen)) == len(
        jax.tree.leaves(params)
    )
    merged = merge(trained, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (merged, params)), strict=True))


@pytest.mark.parametrize(
    ("trained", "frozen", "message"),
    [
        ({"a": 1, "b": None}, {"a": 2, "b": 3}, r"\['a'\] is in both halves"),
        (
            {"a": {"c": None}, "b": 1},
            {"a": {"c": None}, "b": None},
            r"\['a'\]\['c'\] is in neither",
        ),
    ],
)
def test_halves_that_do_not_fit(trained, frozen, message):
    with pytest.raises(ValueError, match=message):
        merge(trained, frozen)


# MiniLM's configuration with two labels.
LAYER_NORMS = (1 + 2 * 6) * 2 * 384
POOLER = 384 * 384 + 384
MINILM_TOTAL = (
    (30522 + 512 + 2) * 384
    + 6 * (4 * (384 * 384 + 384) + 2 * 384 * 1536 + 1536 + 384)
    + LAYER_NORMS
    + POOLER
    + 770
)


@pytest.mark.parametrize(
    ("name", "overrides", "groups"),
    [
        ("compacter++", {}, {"adapters": 7_128, "rule": 64}),
        ("compacter", {}, {"adapters": 14_256, "rule": 64}),
        ("houlsby", {}, {"adapters": 12 * (2 * 384 * 12 + 384 + 12)}),
        # Blocks [12, 32, 1] and [12, 1, 32]; a rule of 12^3 for each projection.
        ("phm", {}, {"adapters": 12 * (2 * 12 * 32 + 396), "rule": 12 * 2 * 12**3}),
        ("compacter++", {"train_pooler": True}, {"adapters": 7_128, "rule": 64, "pooler": POOLER}),
        ("compacter++", {"train_layer_norms": False}, {"adapters": 7_128, "rule": 64}),
        ("compacter++", {"learn_phm": False}, {"adapters": 7_128, "rule": 0}),
        ("compacter", {"phm_dim": 12, "phm_rank": 2}, {"rule": 12**3}),
        ("compacter", {"reduction_factor": 16, "leave_out": (0,)}, {"rule": 64}),
    ],
)
def test_counts_on_minilm(name, overrides, groups):
    method = preset(name, **overrides)
    shapes = shapes_of(method, config=MINILM)
    counted = count(shapes, label_params(shapes, method))
    if overrides == {"phm_dim": 12, "phm_rank": 2}:
        groups = {**groups, "adapters": 12 * (2 * 2 * 12 * (32 + 1) + 396)}
    if "leave_out" in overrides:
        groups = {**groups, "adapters": 10 * (2 * 4 * (96 + 6) + 384 + 24)}
    expected = {"layer norms": LAYER_NORMS if method.train_layer_norms else 0, "head": 770}
    expected = {"backbone": 0, "pooler": 0, **expected, **groups}
    assert {group: trained for group, (trained, _) in counted.groups.items()} == expected
    assert counted.trained == sum(expected.values())
    rule = counted.groups.get("rule", (0, 0))[1]
    assert counted.total == MINILM_TOTAL + groups["adapters"] + rule
    assert counted.groups["layer norms"][1] == LAYER_NORMS == 9_984
    assert counted.groups["pooler"][1] == POOLER


def test_full_fine_tuning_counts_everything():
    shapes = shapes_of(preset("full"), config=MINILM)
    counted = count(shapes, label_params(shapes, preset("full")))
    assert counted.trained == counted.total == MINILM_TOTAL


# --- The optimizer ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step():
    """Returns parameters, labels, and the gradient of a loss to the trained half."""
    method = small("compacter")
    model = Adapted(Bert(ONE_LAYER, head="sequence_classification"), method)
    params = random_tree(adapted_shapes(model))
    labels = label_params(params, method)
    trained, frozen = partition(params, labels)

    def loss(trained):
        logits = model.apply({"params": merge(trained, frozen)}, IDS, MASK)
        return optax.softmax_cross_entropy_with_integer_labels(logits, np.array([0, 1])).mean()

    return params, labels, quick_jit(jax.grad(loss))(trained)


LIMIT = 0.1
# A large epsilon: plain adam does not depend on the size of the gradients.
CLIPPED_ADAMW = optax.chain(
    optax.clip_by_global_norm(LIMIT), optax.adamw(1e-2, eps=1e-2, weight_decay=0.1)
)


def one_update(labels, gradients, params):
    """Returns the new parameters and the optimizer state."""
    tx = optimizer(CLIPPED_ADAMW, labels)

    @quick_jit
    def update(gradients, params):
        updates, state = tx.update(gradients, tx.init(params), params)
        return optax.apply_updates(params, updates), state

    return update(gradients, params)


def whole_gradients(params, gradients, size):
    """Returns the gradients, with noise of scale `size` where the trained half has none."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf, gradient: (
            jnp.float32(size * rng.standard_normal(leaf.shape)) if gradient is None else gradient
        ),
        params,
        gradients,
    )


@pytest.mark.contract
def test_a_step_moves_the_trained_leaves_alone(step):
    params, labels, gradients = step
    after, _ = one_update(labels, whole_gradients(params, gradients, 1.0), params)
    before, after = flatten_dict(params, sep="/"), flatten_dict(after, sep="/")
    moved = {path for path in before if np.any(before[path] != after[path])}
    assert moved == trained_paths(labels)
    for path in before.keys() - moved:
        assert np.asarray(before[path]).tobytes() == np.asarray(after[path]).tobytes()


def test_the_trained_half_and_the_whole_tree_give_the_same_step(step):
    """Clipping reads no gradient of a frozen leaf, however large it is."""
    params, labels, gradients = step
    trained, _ = partition(params, labels)
    half, _ = one_update(labels, gradients, trained)
    assert jax.tree.structure(half) == jax.tree.structure(trained)
    for size in (0.0, 1e6):
        whole, _ = one_update(labels, whole_gradients(params, gradients, size), params)
        # The same operations on the same numbers.
        chex.assert_trees_all_close(partition(whole, labels)[0], half, rtol=1e-6, atol=1e-8)


def test_the_step_is_that_of_the_transformation_alone(step):
    """Compares with optax on a flat dict that contains only the trained leaves."""
    params, labels, gradients = step
    keep = trained_paths(labels)
    alone, alone_gradients = (
        {path: leaf for path, leaf in flatten_dict(tree, sep="/").items() if path in keep}
        for tree in (params, gradients)
    )
    state = CLIPPED_ADAMW.init(alone)
    updates, _ = quick_jit(CLIPPED_ADAMW.update)(alone_gradients, state, alone)
    expected = unflatten_dict(optax.apply_updates(alone, updates), sep="/")
    trained, _ = partition(params, labels)
    half, _ = one_update(labels, gradients, trained)
    half = {path: leaf for path, leaf in flatten_dict(half, sep="/").items() if leaf is not None}
    chex.assert_trees_all_close(half, flatten_dict(expected, sep="/"), rtol=1e-6, atol=1e-8)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradients)))
    assert norm > 2 * LIMIT  # clipping had an effect


@pytest.mark.contract
def test_optimizer_state_exists_for_trained_leaves_only(step):
    params, labels, _ = step
    trained, _ = partition(params, labels)
    size = sum(leaf.size for leaf in jax.tree.leaves(trained))
    for tree in (params, trained):
        state = jax.eval_shape(optimizer(CLIPPED_ADAMW, labels).init, tree)
        # Two moments, and adam's step counter.
        assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * size + 1


# --- What a compiled gradient computes ----------------------------------------------------------

# Sizes that occur together only in the backbone's weights: 35 tokens, bottleneck 12.
UNMISTAKABLE = BertConfig(
    vocab_size=31,
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=26,
    max_position_embeddings=13,
    type_vocab_size=3,
)
# Instructions that store or rearrange a weight without computing one.
MOVES = {"parameter", "copy", "transpose", "bitcast", "get-tuple-element", "constant", "broadcast"}


def computed_shapes(method):
    """Returns the shapes that the compiled gradient computes, and those of the frozen matrices."""
    model = Adapted(Bert(UNMISTAKABLE, head="token_classification"), method)
    shapes = adapted_shapes(model)
    labels = label_params(shapes, method)

    def loss(trained, frozen, ids):
        return jnp.square(model.apply({"params": merge(trained, frozen)}, ids)).mean()

    ids = jax.ShapeDtypeStruct((5, 7), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(*partition(shapes, labels), ids).compile()
    found = re.findall(r"= f32\[([\d,]*)\]\S* ([\w-]+)\(", compiled.as_text())
    assert len(found) > 50
    return {tuple(map(int, dims.split(","))) for dims, op in found if op not in MOVES and dims}


BACKBONE_MATRICES = [(24, 24), (24, 26), (26, 24), (31, 24), (13, 24), (3, 24)]


def test_no_gradient_of_a_frozen_weight_is_computed():
    frozen = {shape[::step] for shape in BACKBONE_MATRICES for step in (1, -1)}
    sizes = {"reduction_factor": 2, "phm_dim": 4}
    assert not computed_shapes(preset("compacter", **sizes)) & frozen


def test_full_fine_tuning_computes_them_all():
    """Control: the search above finds matrices that are computed."""
    computed = computed_shapes(preset("full"))
    assert [shape for shape in BACKBONE_MATRICES if not {shape, shape[::-1]} & computed] == []
