"""Trees that do not fit the model are refused by all functions that write or merge them."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.models.bert.model import Bert
from compacter_jax.trees import check_params
from tests.helpers import ONE_LAYER, TINY_BERT, WIDTH, adapted_shapes, random_tree

MODEL = cj.Adapted(Bert(ONE_LAYER, head="sequence_classification"), cj.preset("lora"))
CONFIG = types.SimpleNamespace(model_type="bert")


@pytest.fixture(scope="module")
def params():
    return random_tree(adapted_shapes(MODEL))


def backbone_part(params):
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({p: x for p, x in flat.items() if "/adapter/" not in p}, sep="/")


WRITERS = {
    "save_adapter": lambda folder, tree: cj.save_adapter(folder, MODEL, tree),
    "export_peft": lambda folder, tree: cj.export_peft(folder, MODEL, tree),
    "export_adapterhub": lambda folder, tree: cj.export_adapterhub(folder, MODEL, tree),
    "save_backbone": lambda folder, tree: cj.save_backbone(folder, MODEL.backbone, tree, CONFIG),
    "merge_adapter": lambda folder, tree: cj.merge_adapter(MODEL, tree),
}


def half(params, index):
    return cj.partition(params, cj.label_params(params, MODEL.method))[index]


def masked(params):
    labels = cj.label_params(params, MODEL.method)
    return jax.tree.map(
        lambda x, label: x if label == "train" else optax.MaskedNode(), params, labels
    )


def without(params, *ends):
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({p: x for p, x in flat.items() if not p.endswith(ends)}, sep="/")


# A change of the right tree, and the message.
WRONG = {
    "wrapped": (lambda p: {"params": p}, r'params is \{"params": …\}, .* give params\["params"\]'),
    "all variables": (lambda p: {"params": p, "cache": {}}, r'give params\["params"\]'),
    "trained half": (
        lambda p: half(p, 0),
        r"leaves are not arrays .*give merge\(trained, frozen\)",
    ),
    "frozen half": (lambda p: half(p, 1), r"leaves are not arrays .*give merge\(trained, frozen\)"),
    "of optax.masked": (masked, r"leaves are not arrays"),
    "labels": (lambda p: jax.tree.map(lambda _: "train", p), "leaves are not arrays"),
    "a list": (jax.tree.leaves, "params has type list; give the nested dict"),
    "a leaf less": (lambda p: without(p, "pooler/dense/bias"), "missing: pooler/dense/bias; left"),
    "a leaf more": (
        lambda p: p | {"new": jnp.ones(3)},
        "left over: new; .*all parameters of this model",
    ),
    "one leaf of another shape": (
        lambda p: p | {"classifier": {"kernel": jnp.ones((WIDTH, 3)), "bias": jnp.ones(2)}},
        r"of another shape: classifier/kernel has shape \(12, 3\), not \(12, 2\); give",
    ),
}
REPLICATED = (1, 3)  # of one device, and of three devices or seeds


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_tree_that_is_not_the_model_s_is_refused(tmp_path, params, wrong, writer):
    change, message = WRONG[wrong]
    if writer == "save_backbone" and wrong.endswith("half"):
        change = lambda p: half(p, 1)  # noqa: E731
    tree = change(params)
    if writer == "save_backbone" and isinstance(tree, dict):
        tree = backbone_part(tree)
    with pytest.raises(ValueError, match=message) as caught:
        WRITERS[writer](tmp_path / "new", tree)
    assert len(str(caught.value)) <= 500
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("writer", sorted(WRITERS.keys() - {"merge_adapter"}))
def test_numbers_that_no_reader_takes_are_not_written(tmp_path, params, writer, value):
    tree = backbone_part(params) if writer == "save_backbone" else params
    bias = jnp.asarray(tree["classifier"]["bias"]).at[1].set(value)
    bad = {**tree, "classifier": {**tree["classifier"], "bias": bias}}
    with pytest.raises(ValueError, match=r"in params has 1 of 2 numbers that are NaN") as caught:
        WRITERS[writer](tmp_path / "new", bad)
    assert "bias" in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("copies", REPLICATED)
@pytest.mark.parametrize("writer", sorted(WRITERS.keys() - {"merge_adapter"}))
def test_a_replicated_tree_is_refused(tmp_path, params, copies, writer):
    tree = jax.tree.map(lambda x: np.stack([x] * copies), params)
    tree = backbone_part(tree) if writer == "save_backbone" else tree
    match = rf"every leaf has an additional leading axis of size {copies} .* x\[0\], params\)"
    with pytest.raises(ValueError, match=match):
        WRITERS[writer](tmp_path / "new", tree)
    assert not list(tmp_path.iterdir())


def test_adapters_in_a_backbone_are_refused(tmp_path, params):
    with pytest.raises(ValueError, match=r"left over: .*adapter/left.* remove the adapters"):
        WRITERS["save_backbone"](tmp_path / "new", params)


def test_parameters_of_a_deeper_model_are_refused(params):
    deeper = random_tree(adapted_shapes(cj.Adapted(Bert(TINY_BERT), MODEL.method)))
    with pytest.raises(ValueError, match=r"missing: classifier/bias.*left over: encoder/layer/1"):
        check_params(MODEL, deeper, "saving")


@pytest.mark.parametrize(
    ("method", "copies"),
    # As many copies as a kernel has rows; they could be broadcast to it by mistake.
    [(cj.preset("lora"), WIDTH), (cj.IA3Config(), WIDTH), (cj.preset("intrinsic", dimension=9), 1)],
    ids=["lora", "ia3", "intrinsic"],
)
def test_merging_keeps_the_axis_of_a_replicated_tree(method, copies):
    model = MODEL.clone(method=method)
    shapes = adapted_shapes(model)
    ones = [random_tree(shapes, seed) for seed in range(copies)]
    merged = cj.merge_adapter(model, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ones))
    expected = jax.tree.map(
        lambda *leaves: np.stack(leaves), *(cj.merge_adapter(model, p) for p in ones)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), merged, expected
    )


class Foreign(nn.Module):
    """A backbone without example inputs."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, use_bias=False, name="layer_0")(x)


def test_without_example_inputs_trees_are_refused_that_no_module_has(tmp_path):
    sites = {"feed_forward": r"layer_(?P<layer>\d+)"}
    model = cj.Adapted(
        Foreign(), cj.LoRAConfig(sites=("feed_forward",), rank=2, train_head=False), sites=sites
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4)))["params"]
    params = random_tree(shapes)
    for tree, message in (
        (jax.tree.map(lambda x: x[None], params), "an additional leading axis of size 1"),
        ({"params": params}, "give params"),
        (cj.partition(params, cj.label_params(params, model.method))[0], "half of partition"),
    ):
        with pytest.raises(ValueError, match=message):
            cj.save_adapter(tmp_path / "new", model, tree)
    assert not list(tmp_path.iterdir())
    cj.save_adapter(tmp_path / "new", model, params)
    assert (tmp_path / "new/adapter_config.json").is_file()
