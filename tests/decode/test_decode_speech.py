"""Compares generation from features of speech with transformers, cached with whole."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from tests.helpers import adapted_shapes, quick_jit, random_tree
from tests.speech_models import speech_backbone, speech_inputs, tiny_speech, torch_speech_model

MAX_NEW_TOKENS = 9


@functools.cache
def backbone():
    """Returns a module and parameters whose generated text depends on the speech."""
    ours = speech_backbone(tiny_speech(forced_eos_token_id=2), seed=4)
    flat = flatten_dict(ours.params, sep="/")
    for path in flat:
        flat[path] *= 0.5 if path.endswith("embedding") else 1 if path.endswith("scale") else 2
    return types.SimpleNamespace(module=ours.module, params=unflatten_dict(flat, sep="/"))


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 4, "forced_bos_token_id": 7, "length_penalty": 1.7}]
)
def test_tokens_equal_pytorch(settings):
    """Greedy search and beams give PyTorch's tokens for rows of different lengths."""
    torch = pytest.importorskip("torch")
    ours, model, rows = backbone(), torch_speech_model(backbone()), []
    settings = {"max_new_tokens": MAX_NEW_TOKENS, **settings}
    for seed in range(3):
        features, mask, _ = speech_inputs(ours.module.config, seed)
        actual = np.asarray(cj.generate(ours.module, ours.params, features, mask, **settings))
        expected = model.generate(
            torch.tensor(features), attention_mask=torch.tensor(mask), do_sample=False, **settings
        )
        np.testing.assert_array_equal(actual, expected.numpy())
        rows += [row.tobytes() for row in actual]
    assert len(set(rows)) > 2
    assert (actual[:, 0] == ours.module.config.decoder_start_token_id).all()


def test_without_a_mask_there_is_no_padding():
    """Features without a mask are read to their end, and those of a masked row to theirs."""
    ours = backbone()
    config = dataclasses.replace(ours.module.config, mask_between_convolutions=True)
    module = ours.module.clone(config=config)
    features, mask, _ = speech_inputs(config, 1)

    def tokens(*inputs):
        return cj.generate(module, ours.params, *inputs, max_new_tokens=MAX_NEW_TOKENS)

    np.testing.assert_array_equal(tokens(features), tokens(features, np.ones_like(mask)))
    alone = np.asarray(tokens(features[1:2, : mask[1].sum()]))[0]
    together = np.asarray(tokens(features, mask))[1]
    np.testing.assert_array_equal(together[: len(alone)], alone)


@pytest.mark.parametrize("name", ["st", "prefix-tuning"])
def test_cached_logits_equal_those_of_the_whole_decoder(name):
    """Token by token, an adapted decoder computes what it does for all, and generates the best."""
    fields = {"prefix_length": 2, "bottleneck_size": 5} if name == "prefix-tuning" else {}
    ours = speech_backbone(tiny_speech(mask_between_convolutions=True), seed=5)
    model = cj.Adapted(ours.module, cj.preset(name, **fields))
    drawn = flatten_dict(random_tree(adapted_shapes(model), seed=6))
    params = unflatten_dict({**drawn, **flatten_dict(ours.params)})
    features, mask, targets = speech_inputs(ours.module.config, 5)
    # A token of a cache counts as if none before it were padding.
    targets = np.where(targets == ours.module.config.pad_token_id, 5, targets)

    @quick_jit
    def whole(params):
        states = model.apply({"params": params}, features, mask, method="encode")
        cache = model.apply({"params": params}, states, targets.shape[1] + 2, method="start_cache")
        return model.apply({"params": params}, features, mask, targets), cache

    @quick_jit
    def step(params, tokens, cache, index):
        return model.apply(
            {"params": params},
            tokens,
            attention_mask=mask,
            cache=cache,
            index=index,
            method="decode",
        )

    expected, cache = whole(params)
    bound = 1e-5 * np.abs(expected).max()
    for i in range(targets.shape[1]):
        logits, cache = step(params, targets[:, i : i + 1], cache, jnp.int32(i))
        np.testing.assert_allclose(logits[:, 0], expected[:, i], atol=bound, rtol=0)
    tokens = cj.generate(model, params, features, mask, max_new_tokens=4, eos_token_id=())
    logits = jax.device_get(model.apply({"params": params}, features, mask, tokens[:, :-1]))
    np.testing.assert_array_equal(logits.argmax(-1), tokens[:, 1:])
