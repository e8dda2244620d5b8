"""Tests linear layers that are trained whole beside adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.methods.trained_sites import with_trained_sites
from tests.seq2seq_models import inputs_of, small_backbone, tiny

METHOD = cj.TrainedSitesConfig()


@pytest.fixture(scope="module")
def model_and_params():
    backbone = small_backbone(tiny("m2m_100"))
    model = cj.Adapted(backbone.module, METHOD)
    return model, cj.init_adapters(model, backbone, jax.random.key(0))


def own(flat):
    return {path for path in flat if "/adapter/" in path}


def test_all_layers_of_cross_attention(model_and_params):
    """The default sites are the four linear layers of cross-attention, with their biases."""
    _, params = model_and_params
    hosts = {path.partition("/adapter/")[0] for path in own(flatten_dict(params, sep="/"))}
    start = "decoder/layers/0/encoder_attn/"
    assert hosts == {f"{start}{name}_proj" for name in ("q", "k", "v", "out")}


def test_changes_are_those_of_the_weights(model_and_params):
    """Changes compute what changed weights compute, and have their gradients."""
    model, params = model_and_params
    backbone = model.backbone
    inputs = [jnp.asarray(each) for each in inputs_of(backbone.config, seed=1)]
    flat = flatten_dict(params, sep="/")
    paths = sorted(own(flat))
    first = model.apply({"params": params}, *inputs)
    plain = {path: leaf for path, leaf in flat.items() if path not in paths}
    alone = {"params": unflatten_dict(plain, sep="/")}
    np.testing.assert_array_equal(first, backbone.apply(alone, *inputs))

    generator = np.random.default_rng(0)
    changes = {path: generator.normal(0, 0.2, flat[path].shape) for path in paths}
    changes = {path: jnp.asarray(change, jnp.float32) for path, change in changes.items()}
    wanted = jnp.asarray(generator.normal(size=first.shape), jnp.float32)

    def by_changes(changes):
        logits = model.apply({"params": unflatten_dict({**flat, **changes}, sep="/")}, *inputs)
        return jnp.sum(logits * wanted), logits

    def by_weights(weights):
        moved = {"params": unflatten_dict({**plain, **weights}, sep="/")}
        logits = backbone.apply(moved, *inputs)
        return jnp.sum(logits * wanted), logits

    weights = {
        path.replace("/adapter", ""): flat[path.replace("/adapter", "")] + change
        for path, change in changes.items()
    }
    (_, found), gradient = jax.jit(jax.value_and_grad(by_changes, has_aux=True))(changes)
    (_, truth), true = jax.jit(jax.value_and_grad(by_weights, has_aux=True))(weights)
    np.testing.assert_allclose(found, truth, atol=2e-5)
    # The softmax of attention leaves no gradient of the keys' biases but rounding.
    scale = max(np.abs(leaf).max() for leaf in true.values())
    for path in paths:
        expected = true[path.replace("/adapter", "")]
        np.testing.assert_allclose(gradient[path] / scale, expected / scale, atol=1e-5)
    merged = cj.merge_adapter(model, unflatten_dict({**flat, **changes}, sep="/"))
    for path, weight in weights.items():
        np.testing.assert_allclose(flatten_dict(merged, sep="/")[path], weight, atol=1e-6)


def test_they_are_saved_with_the_adapter(tmp_path):
    """An adapter and the trained layers beside it are written and read as one."""
    backbone = small_backbone(tiny("m2m_100"))
    method = with_trained_sites(
        cj.preset("pfeiffer-feed-forward", reduction_factor=4), ("cross_attention", "key")
    )
    assert method.parts[1].sites == (*METHOD.sites, "key")
    assert method.train_layer_norms is False
    with pytest.raises(ValueError, match="twice"):
        with_trained_sites(cj.preset("pfeiffer-feed-forward"), ("cross_attention", "cross_key"))
    method = with_trained_sites(method, ("intermediate",)).replace(train_head=False)
    model = cj.Adapted(backbone.module, method.replace(parts=(method.parts[0], method.parts[2])))
    params = cj.init_adapters(model, backbone, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.5, params)
    kept = {**flatten_dict(params, sep="/"), **flatten_dict(backbone.params, sep="/")}
    params = unflatten_dict(kept, sep="/")
    cj.save_adapter(tmp_path, model, params)
    again, loaded = cj.load_adapter(tmp_path, backbone)
    assert again.method == model.method
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("name", ["full", "intrinsic"])
def test_methods_without_adapters(name):
    """Methods that move the whole backbone, and compositions, are refused by name."""
    with pytest.raises(ValueError, match="moves all weights; choose one with"):
        with_trained_sites(cj.preset(name), ("query",))
    bank = cj.Bank(cj.preset("lora"), size=2)
    with pytest.raises(ValueError, match="method 'bank' is a composition"):
        with_trained_sites(bank, ("query",))
