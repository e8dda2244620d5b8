"""Adapts the Flax BERT of transformers 4, a third-party module that is made in setup."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.catalogue import preset
from compacter_jax.inject.adapted import Adapted
from compacter_jax.inject.initial import init_adapters
from tests.helpers import IDS, MASK, ONE_LAYER, SMALL, quick_jit, quick_key, random_tree
from tests.hosts import adapter_of

flax_bert = pytest.importorskip(
    "transformers.models.bert.modeling_flax_bert",
    reason="transformers 5 has no Flax models",
    exc_type=ImportError,
)
# Its classes warn that they will be removed, and use deprecated features of numpy and JAX.
pytestmark = pytest.mark.filterwarnings("ignore")

INPUTS = (IDS, MASK, np.zeros_like(IDS), np.arange(IDS.shape[1])[None].repeat(2, 0), None)


def module():
    from transformers import BertConfig

    return flax_bert.FlaxBertModule(BertConfig(**dataclasses.asdict(ONE_LAYER)))


def hidden_states(module, params, **options):
    return quick_jit(lambda params: module.apply({"params": params}, *INPUTS, **options))(params)


def layer_norm(params, x):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + ONE_LAYER.layer_norm_eps)
    return normal * np.float64(params["scale"]) + np.float64(params["bias"])


# The sub-layer of the last layer: the path of the host -> the rest of the computation.
HOSTS = {
    "compact: the projection": "output/dense",
    "setup: the whole sub-layer": "output",
}


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_a_table_of_sites_by_the_caller(host):
    backbone = module()
    method = preset("compacter++", **SMALL)
    sites = {"feed_forward": rf"encoder/layer/(?P<layer>\d+)/{host}"}
    model = Adapted(backbone, method, sites)
    shapes = jax.eval_shape(backbone.init, jax.random.key(0), *INPUTS)["params"]
    own = random_tree(shapes, seed=1)
    backbone_and_params = types.SimpleNamespace(module=backbone, params=own)
    params = init_adapters(model, backbone_and_params, quick_key(0), *INPUTS)
    params = unflatten_dict({**flatten_dict(random_tree(params, seed=2)), **flatten_dict(own)})

    _, state = backbone.apply(
        {"params": own}, *INPUTS, capture_intermediates=True, mutable=["intermediates"]
    )
    layer = state["intermediates"]["encoder"]["layer"]["0"]
    adapter = adapter_of(params, f"encoder/layer/0/{host}", method)
    if host == "output":
        expected = adapter(np.float64(layer["output"]["__call__"][0]))
    else:
        projected = adapter(np.float64(layer["output"]["dense"]["__call__"][0]))
        residual = np.float64(layer["attention"]["__call__"][0][0])
        norm = own["encoder"]["layer"]["0"]["output"]["LayerNorm"]
        expected = layer_norm(norm, projected + residual)
    actual = hidden_states(model, params)[0]
    plain = hidden_states(backbone, own)[0]
    assert np.abs(expected - plain).max() > 0.1
    # Float32; layer norms keep the states of order one.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_a_host_that_returns_a_tuple_is_refused():
    """The attention module returns a tuple; its output projection is the right site."""
    sites = {"feed_forward": r"encoder/layer/(?P<layer>\d+)/attention"}
    model = Adapted(module(), preset("compacter++", **SMALL), sites)
    with pytest.raises(ValueError, match="host encoder/layer/0/attention returns tuple, not an a"):
        jax.eval_shape(model.init, jax.random.key(0), *INPUTS)
