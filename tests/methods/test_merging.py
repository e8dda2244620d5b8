"""Tests the precision in which adapters are merged into a backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compacter_jax as cj
from tests.helpers import adapted_shapes, quick_jit, random_tree
from tests.seq2seq_models import inputs_of, small_backbone, tiny


@pytest.mark.parametrize(
    "method",
    [cj.preset("lora"), cj.preset("ia3"), cj.TrainedSitesConfig()],
    ids=["lora", "ia3", "trained sites"],
)
def test_a_backbone_of_float64_is_merged_in_float64(method):
    """The merged backbone has the adapted one's logits to 1e-12 of the largest."""
    with jax.enable_x64(True):
        backbone = small_backbone(tiny("m2m_100"), param_dtype=jnp.float64)
        model = cj.Adapted(backbone.module, method, param_dtype=jnp.float64)
        params = random_tree(adapted_shapes(model), seed=3)
        inputs = inputs_of(backbone.module.config, 1)
        merged = cj.merge_adapter(model, params)
        expected, found, plain = (
            np.asarray(quick_jit(lambda p, m=module: m.apply({"params": p}, *inputs))(of))
            for module, of in (
                (model, params),
                (backbone.module, merged),
                (backbone.module, backbone.params),
            )
        )
    largest = np.abs(expected).max()
    assert np.abs(expected - plain).max() > 1e-2 * largest
    np.testing.assert_allclose(found, expected, atol=1e-12 * largest, rtol=0)
