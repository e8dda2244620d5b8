"""Trains, saves and loads heads and norms of third-party modules, or refuses them."""

import json
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.catalogue import preset
from compacter_jax.compositions.stack import Stack
from compacter_jax.methods import intrinsic
from compacter_jax.params import count, label_params
from tests.helpers import random_tree

NO_NORMS = preset("houlsby", sites=("feed_forward",), reduction_factor=2, train_layer_norms=False)
WITH_NORMS = NO_NORMS.replace(train_layer_norms=True)
SITES = {"feed_forward": r"layer_(?P<layer>\d+)"}
GROUPS = {"head": "score", "layer_norms": r".*_norm"}
ADAPTER = [
    f"layer_0/adapter/{name}/{leaf}" for name in ("down", "up") for leaf in ("kernel", "bias")
]


def tree(*paths):
    return unflatten_dict({path: np.zeros(3) for path in (*paths, *ADAPTER)}, sep="/")


def norm(path, *leaves):
    return [f"{path}/{leaf}" for leaf in leaves or ("scale", "bias")]


def trained(params, method, **options):
    labels = flatten_dict(label_params(params, method, **options), sep="/")
    return {path for path, label in labels.items() if label == "train"} - set(ADAPTER)


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("score/kernel", "score"),
        ("lm/proj/out/kernel", "lm/proj/.*"),
        ("Dense_3/kernel", r"Dense_\d"),
        ("head/kernel", "head/kernel"),
        # Paths that contain the names that BERT and T5 have at the top.
        ("encoder/classifier/kernel", "encoder/classifier"),
        ("lm_head/kernel", "lm_head"),
    ],
)
def test_a_head_by_another_name(path, pattern):
    params = tree(path, "embed/embedding")
    with pytest.raises(ValueError, match="train_head=True, but no parameter is called") as error:
        label_params(params, NO_NORMS)
    assert "groups={'head': " in str(error.value)
    assert len(str(error.value)) < 500
    with pytest.raises(ValueError, match="train_head=True"):
        label_params(params, Stack(NO_NORMS, NO_NORMS.replace(train_head=False)))
    assert trained(params, NO_NORMS, groups={"head": pattern}) == {path}
    assert trained(params, NO_NORMS.replace(train_head=False)) == set()
    assert trained(params, NO_NORMS, groups={}) == set()  # the user states that there are none
    assert trained(params, NO_NORMS, rules=[(re.escape(path), "train")]) == {path}
    assert trained(params, cj.preset("bitfit"), groups={"head": pattern}) == {path}


@pytest.mark.parametrize(
    "missed",
    [
        norm("block_0/ln_1"),
        norm("block_0/layernorm_before"),
        norm("block_0/input_norm", "weight"),
        norm("block_0/before", "scale"),
        norm("block_0/a"),
    ],
)
def test_norms_of_which_some_have_a_known_name(missed):
    known = norm("block_0/final_layer_norm")
    params = tree("classifier/kernel", "block_0/dense/kernel", *known, *missed)
    count_of = f"of {len(known + missed)} parameters of norms {len(missed)} have names"
    with pytest.raises(ValueError, match=count_of) as error:
        label_params(params, WITH_NORMS)
    assert missed[0] in str(error.value)
    assert "groups={'layer_norms': " in str(error.value)
    head = {"classifier/kernel"}
    assert trained(params, NO_NORMS) == head
    module = missed[0].rpartition("/")[0]
    groups = {"layer_norms": f"{module}|.*/final_layer_norm"}
    assert trained(params, WITH_NORMS, groups=groups) == head | {*known, *missed}
    counted = count(params, label_params(params, WITH_NORMS, groups=groups), groups).groups
    assert counted["layer norms"] == (3 * len(known + missed),) * 2
    rules = [(rf"{module}/.*", "freeze")]
    assert trained(params, WITH_NORMS, rules=rules) == head | set(known)


def test_rules_for_norms_do_not_stand_for_a_head():
    params = tree("score/kernel", *norm("ln_1"))
    with pytest.raises(ValueError, match="train_head=True"):
        label_params(params, NO_NORMS, rules=[("ln_1/.*", "train")])


def test_no_norm_has_a_known_name():
    params = tree("classifier/kernel", *norm("ln_1"))
    with pytest.raises(
        ValueError, match=r"no path matches.*; give Adapted and label_params groups="
    ):
        label_params(params, WITH_NORMS)
    # Full fine-tuning trains everything, whatever its name.
    assert trained(params, cj.preset("full")) == {"classifier/kernel", *norm("ln_1")}


def test_a_norm_within_a_head_is_the_heads():
    paths = [*norm("score/LayerNorm"), "score/kernel", *norm("block/LayerNorm")]
    groups = {"head": "score"}
    assert trained(tree(*paths), NO_NORMS, groups=groups) == set(paths[:3])
    headless = WITH_NORMS.replace(train_head=False)
    assert trained(tree(*paths), headless, groups=groups) == set(paths[3:])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"norms": ".*"}, "groups has no 'norms'; its names are head, layer_norms, pooler"),
        ({"head": "("}, r"groups\['head'\]: '\(' is not a valid regular expression"),
        ({"head": 5}, "is not a regular expression"),
        (["head"], "must be a mapping"),
        ({"head": "skore"}, r"groups\['head'\]='skore' matches no parameter"),
    ],
)
def test_groups_that_are_none(groups, message):
    with pytest.raises(ValueError, match=message):
        label_params(tree("score/kernel"), NO_NORMS, groups=groups)
    if "skore" not in message:
        with pytest.raises(ValueError, match=message):
            cj.Adapted(Theirs(), NO_NORMS, SITES, groups=groups)


def test_intrinsic_dimension_leaves_their_head_alone():
    params = {
        "score": {"kernel": np.ones(4, np.float32)},
        "body": {"kernel": np.ones(4, np.float32)},
    }
    moved = intrinsic.perturb(params, jnp.ones(3), None, 0, {"head": "score"})
    np.testing.assert_array_equal(moved["score"]["kernel"], params["score"]["kernel"])
    assert (moved["body"]["kernel"] != 1).any()
    assert intrinsic.layers_of(["score/kernel", "body/kernel"], {"head": "score"}) == ("body",)


class Theirs(nn.Module):
    """A module without dummy inputs, whose norm and head have unusual names."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="first_norm")(x)
        x = nn.Dense(4, name="layer_0")(x)
        return nn.Dense(3, name="score")(x)


X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4)), jnp.float32)


def model_and_params(method=WITH_NORMS, groups=GROUPS, seed=1):
    """Returns a model, its random parameters, and a backbone whose head and norms differ."""
    model = cj.Adapted(Theirs(), method, SITES, groups=groups)
    params = random_tree(jax.eval_shape(model.init, jax.random.key(0), X)["params"], seed)
    shapes = jax.eval_shape(Theirs().init, jax.random.key(0), X)["params"]
    own = random_tree(shapes)
    params["layer_0"] |= own["layer_0"]
    return model, params, types.SimpleNamespace(module=Theirs(), params=own)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_groups_train_is_saved_and_loaded(tmp_path):
    model, params, backbone = model_and_params()
    labels = label_params(params, model.method, groups=model.groups)
    assert labels["score"] == {"kernel": "train", "bias": "train"}
    assert labels["first_norm"] == {"scale": "train", "bias": "train"}
    assert labels["layer_0"]["kernel"] == "freeze"
    cj.save_adapter(tmp_path, model, params)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["backbone_groups"] == GROUPS
    assert "also_trained" not in settings
    again, loaded = cj.load_adapter(tmp_path, backbone, X)
    assert again.groups == GROUPS
    assert_same(loaded, params)
    with pytest.raises(ValueError, match=r"Theirs has no dummy_inputs\(\).*load_adapter\(dir"):
        cj.load_adapter(tmp_path, backbone)


def test_what_rules_train_is_saved_and_loaded(tmp_path):
    model, params, backbone = model_and_params(NO_NORMS)
    params["layer_0"]["bias"] = params["layer_0"]["bias"] + 1
    rules = [("first_norm/scale|layer_0/bias", "train"), ("first_norm/.*", "freeze")]
    params["first_norm"]["bias"] = backbone.params["first_norm"]["bias"]
    labels = label_params(params, model.method, rules, groups=model.groups)
    cj.save_adapter(tmp_path, model, params, labels=labels)
    settings = cj.read_adapter_config(tmp_path)
    assert settings["also_trained"] == ["first_norm/scale", "layer_0/bias"]
    assert_same(cj.load_adapter(tmp_path, backbone, X)[1], params)
    with pytest.raises(ValueError, match="has its own first_norm/scale, layer_0/bias"):
        cj.stack_adapters([tmp_path], backbone)
    path = tmp_path / "adapter_config.json"
    for wrong in ("layer_0/bias", [5]):
        path.write_text(json.dumps({**settings, "also_trained": wrong}))
        with pytest.raises(
            ValueError, match=r"adapter_config.json: also_trained=.* must be a list"
        ):
            cj.load_adapter(tmp_path, backbone, X)
    path.write_text(json.dumps({**settings, "also_trained": ["layer_0/bias", "layer_9/bias"]}))
    with pytest.raises(
        ValueError,
        match=r"json: also_trained names parameters that the model does not .*: layer_9/bias$",
    ):
        cj.load_adapter(tmp_path, backbone, X)
    path.write_text(json.dumps({**settings, "also_trained": ["layer_0/bias"]}))
    with pytest.raises(ValueError, match=r"left over: first_norm/scale"):
        cj.load_adapter(tmp_path, backbone, X)


def test_what_would_not_be_stored_is_said_where_the_backbone_is_given(tmp_path):
    model, params, backbone = model_and_params(NO_NORMS)
    params["first_norm"] = backbone.params["first_norm"]
    cj.save_adapter(tmp_path, model, params, backbone=backbone)
    assert_same(cj.load_adapter(tmp_path, backbone, X)[1], params)
    before = (tmp_path / "adapter_config.json").read_bytes()
    # The hash rounds values to bfloat16, so it does not notice a change this small.
    trained = {**params, "first_norm": {**params["first_norm"]}}
    trained["first_norm"]["scale"] = trained["first_norm"]["scale"] * (1 + 1e-4)
    with pytest.raises(
        ValueError, match=r"1 leaves differ .*\(first_norm/scale\); .* give save_adapter labels"
    ):
        cj.save_adapter(tmp_path, model, trained, backbone=backbone)
    assert (tmp_path / "adapter_config.json").read_bytes() == before
    rules = [("first_norm/scale", "train")]
    labels = label_params(trained, model.method, rules, groups=model.groups)
    cj.save_adapter(tmp_path, model, trained, labels=labels, backbone=backbone)
    assert_same(cj.load_adapter(tmp_path, backbone, X)[1], trained)


def test_a_backbone_in_16_bits_is_the_one_that_was_given(tmp_path):
    model, params, backbone = model_and_params(NO_NORMS)
    params["first_norm"] = backbone.params["first_norm"]
    halved = {**params, "layer_0": {**params["layer_0"]}}
    kernel = params["layer_0"]["kernel"]
    halved["layer_0"]["kernel"] = kernel.astype(jnp.bfloat16)
    cj.save_adapter(tmp_path, model, halved, backbone=backbone)
    halved["layer_0"]["kernel"] = (kernel + 1).astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="layer_0/kernel"):
        cj.save_adapter(tmp_path, model, halved, backbone=backbone)


def test_labels_of_something_else_are_refused(tmp_path):
    model, params, _ = model_and_params()
    labels = label_params(params, model.method, groups=model.groups)
    with pytest.raises(ValueError, match="labels do not match params"):
        cj.save_adapter(tmp_path / "new", model, params, labels={"score": labels["score"]})
    with pytest.raises(ValueError, match="labels do not match params"):
        cj.save_adapter(tmp_path / "new", model, params, labels="train")
    with pytest.raises(
        ValueError, match=r"backbone=.* has no attribute params; give the result of load_backbone"
    ):
        cj.save_adapter(tmp_path / "new", model, params, backbone=Theirs())
    assert not (tmp_path / "new").exists()


def test_an_adapter_saved_before_there_were_groups(tmp_path):
    """The head had an unknown name, so it was frozen and is taken from the backbone."""
    model, params, backbone = model_and_params(NO_NORMS, groups=None)
    params |= {name: backbone.params[name] for name in ("score", "first_norm")}
    cj.save_adapter(tmp_path, model, params)
    assert not {"backbone_groups", "also_trained"} & set(cj.read_adapter_config(tmp_path))
    again, loaded = cj.load_adapter(tmp_path, backbone, X)
    assert again.groups is None
    assert_same(loaded, params)


def test_sites_with_outputs_are_saved_and_loaded(tmp_path):
    model, params, backbone = model_and_params()
    sites = {"feed_forward": cj.Site(host=SITES["feed_forward"], output=1), "other": "a"}
    with_output = model.clone(sites=sites)
    cj.save_adapter(tmp_path, with_output, params)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    assert settings["sites"]["feed_forward"]["output"] == 1
    del settings["sites"]["feed_forward"]["output"]  # the format of an earlier release
    path.write_text(json.dumps(settings))
    assert cj.load_adapter(tmp_path, backbone, X)[0].sites["feed_forward"].output is None
    cj.save_adapter(
        tmp_path, model.clone(sites={"feed_forward": cj.Site(host=SITES["feed_forward"])}), params
    )
    assert "output" not in json.loads(path.read_text())["sites"]["feed_forward"]


class TheirsWithClassifier(nn.Module):
    """A third-party module whose head has a known name, but no number of labels."""

    head: str = "classifier"

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name=self.head)(nn.Dense(4, name="layer_0")(x))


def test_a_classifier_whose_module_has_no_number_of_labels(tmp_path):
    model = cj.Adapted(TheirsWithClassifier(), NO_NORMS, SITES)
    params = random_tree(jax.eval_shape(model.init, jax.random.key(0), X)["params"])
    own = {
        name: {k: v for k, v in leaves.items() if k != "adapter"} for name, leaves in params.items()
    }
    cj.save_adapter(tmp_path, model, params)
    backbone = types.SimpleNamespace(module=TheirsWithClassifier(), params=own)
    assert_same(cj.load_adapter(tmp_path, backbone, X)[1], params)


class TheirsWithInputs(Theirs):
    def dummy_inputs(self):
        return (X,)


def test_a_bank_has_their_heads_and_norms(tmp_path):
    pairs = [model_and_params(seed=seed) for seed in (1, 2)]
    backbone = types.SimpleNamespace(module=TheirsWithInputs(), params=pairs[0][2].params)
    for i, (model, params, _) in enumerate(pairs):
        cj.save_adapter(tmp_path / str(i), model, params)
    bank, params = cj.stack_adapters([tmp_path / "0", tmp_path / "1"], backbone)
    routed = bank.apply({"params": params}, X, adapter_ids=jnp.array([1, -1]))
    model, second, _ = pairs[1]
    expected = [
        model.apply({"params": second}, X)[0],
        Theirs().apply({"params": backbone.params}, X)[1],
    ]
    np.testing.assert_allclose(routed, expected, rtol=0, atol=1e-5)


def test_int8_of_their_weights_is_refused():
    model, params, _ = model_and_params()
    labels = label_params(params, model.method, groups=model.groups)
    _, frozen = cj.partition(params, labels)
    with pytest.raises(ValueError, match=r"int8 is for the weights of Bert, .*T5") as error:
        cj.cast_frozen(frozen, "int8")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    assert cj.cast_frozen(frozen, "bfloat16")["layer_0"]["kernel"].dtype == jnp.bfloat16
    # The module has names that cast_frozen accepts, so its own call must refuse int8.
    from compacter_jax.nn.quantize import quantize

    params["layer_0"]["kernel"] = quantize(params["layer_0"]["kernel"], 0)
    with pytest.raises(ValueError, match="but Theirs cannot compute"):
        model.apply({"params": params}, X)
