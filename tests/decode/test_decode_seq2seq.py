"""Compares generation of M2M-100, mBART, BART and Marian with transformers, cached with whole."""

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
from tests.seq2seq_models import CONFIGS, inputs_of, small_backbone, torch_model

MAX_NEW_TOKENS = 9
FORCED = {"m2m_100": None, "mbart": 2, "bart": 2, "marian": 0}


@functools.cache
def backbone(model_type):
    """Returns a module and parameters whose generated text depends on the input."""
    forced = {"forced_eos_token_id": FORCED[model_type]}
    ours = small_backbone(dataclasses.replace(CONFIGS[model_type], **forced), seed=4)
    flat = flatten_dict(ours.params, sep="/")
    for path in flat:
        flat[path] *= 0.5 if path == "shared/embedding" else 1 if path.endswith("scale") else 2
    return types.SimpleNamespace(module=ours.module, params=unflatten_dict(flat, sep="/"))


def generated(model_type, seed, **settings):
    """Returns the tokens of this library and those of transformers."""
    torch = pytest.importorskip("torch")
    ours = backbone(model_type)
    config = ours.module.config
    ids, mask = inputs_of(config, seed)[:2]
    settings = {"max_new_tokens": MAX_NEW_TOKENS, **settings}
    actual = cj.generate(ours.module, ours.params, ids, mask, **settings)
    never = {"bad_words_ids": [[config.pad_token_id]]} if model_type == "marian" else {}
    expected = torch_model(ours).generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, **settings, **never
    )
    return np.asarray(actual), expected.numpy()


@pytest.mark.parametrize("model_type", FORCED)
def test_greedy_equals_pytorch(model_type):
    """Greedy search gives PyTorch's tokens, with the end forced where the configuration says so."""
    rows = []
    for seed in range(3):
        actual, expected = generated(model_type, seed)
        np.testing.assert_array_equal(actual, expected)
        rows += [row.tobytes() for row in actual]
    assert len(set(rows)) > 2
    config = backbone(model_type).module.config
    assert (actual[:, 0] == config.decoder_start_token_id).all()


@pytest.mark.parametrize("model_type", FORCED)
def test_beams_equal_pytorch_with_a_forced_first_token_and_a_length_penalty(model_type):
    """Four beams give PyTorch's tokens, and every row has the forced token in front."""
    penalties = {"length_penalty": 1.7, "early_stopping": model_type == "bart"}
    for seed in range(3):
        actual, expected = generated(
            model_type, seed, num_beams=4, forced_bos_token_id=7, **penalties
        )
        np.testing.assert_array_equal(actual, expected)
        assert (actual[:, 1] == 7).all()


def test_marian_never_generates_its_padding():
    """Padding follows an end at most, even where it has the largest logit; () forces no end."""
    ours = backbone("marian")
    config = ours.module.config
    params = dict(ours.params)
    bias = np.asarray(params["final_logits_bias"]["bias"]).copy()
    bias[config.pad_token_id] = 1e3
    params["final_logits_bias"] = {"bias": jnp.asarray(bias)}
    ids, mask = inputs_of(config, 0)[:2]
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "eos_token_id": (), "forced_eos_token_id": ()}
    tokens = cj.generate(ours.module, params, ids, mask, **settings)
    assert tokens.shape == (3, 1 + MAX_NEW_TOKENS)
    assert (tokens[:, 1:] != config.pad_token_id).all()


METHOD = cj.CombinedConfig(
    parts=(
        cj.BottleneckConfig(
            sites=("encoder_embedding", "decoder_embedding"),
            reduction_factor=2,
            layer_norm_before=True,
        ),
        cj.BottleneckConfig(
            sites=("parallel_attention", "parallel_feed_forward"), reduction_factor=3, parallel=True
        ),
        cj.BottleneckConfig(sites=("residual_cross_attention",), reduction_factor=4),
        cj.PrefixTuningConfig(sites=("cross_key_value",), prefix_length=2, flat=True),
        cj.LoRAConfig(rank=2),
    )
)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("m2m_100", METHOD), ("mbart", None), ("bart", METHOD), ("unshared marian", None)),
        *(("m2m_100", cj.preset("ciat")), ("bart", cj.preset("serial-ciat"))),
        ("m2m_100", cj.preset("compacter-ciat")),
    ],
)
def test_cached_logits_equal_those_of_the_whole_decoder(name, method):
    """Token by token, with and without adapters, the decoder computes what it does for all."""
    ours = small_backbone(CONFIGS[name], seed=5)
    model, params = ours.module, ours.params
    if method is not None:
        model = cj.Adapted(ours.module, method)
        drawn = flatten_dict(random_tree(adapted_shapes(model), seed=6))
        params = unflatten_dict({**drawn, **flatten_dict(params)})
    ids, mask, targets, _ = inputs_of(CONFIGS[name], 5)
    # M2M-100 counts a token of a cache as if none before it were padding.
    targets = np.where(targets == CONFIGS[name].pad_token_id, 5, targets)

    @quick_jit
    def whole(params):
        def call(method, *args, **named):
            return model.apply({"params": params}, *args, method=method, **named)

        states = call("encode", ids, mask)
        room = targets.shape[1] + 2
        logits = model.apply({"params": params}, ids, mask, targets)
        return logits, call("start_cache", states, room)

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
    for i in range(targets.shape[1]):
        logits, cache = step(params, targets[:, i : i + 1], cache, jnp.int32(i))
        bound = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(logits[:, 0], expected[:, i], atol=bound, rtol=0)
    assert jax.tree.leaves(cache)[0].shape[2] == targets.shape[1] + 2


def test_adapted_greedy_tokens_are_the_most_probable_of_the_whole_decoder():
    """Tokens stay the best with Compacter at embeddings, whose weights generation builds once."""
    ours = backbone("bart")
    config = ours.module.config
    sites = ("encoder_embedding", "decoder_embedding", "feed_forward")
    model = cj.Adapted(
        ours.module, cj.preset("compacter", sites=sites, reduction_factor=4, phm_dim=3)
    )
    drawn = flatten_dict(random_tree(adapted_shapes(model), seed=6))
    params = unflatten_dict({**drawn, **flatten_dict(ours.params)})
    ids, mask = inputs_of(config, 1)[:2]
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "forced_bos_token_id": 7}
    settings |= {"forced_eos_token_id": (), "eos_token_id": ()}
    tokens = np.asarray(cj.generate(model, params, ids, mask, **settings))
    assert (tokens[:, 1] == 7).all()
    logits = quick_jit(lambda p: model.apply({"params": p}, ids, mask, tokens[:, :-1]))(params)
    np.testing.assert_array_equal(tokens[:, 2:], logits[:, 1:].argmax(-1))
    assert len({tuple(row) for row in tokens}) > 1


@pytest.mark.parametrize("num_beams", [1, 4])
def test_each_row_has_its_forced_first_token(num_beams):
    """A token for each row gives each row what PyTorch gives it where all rows have its token."""
    first = np.array([7, 3, 11])
    actual, _ = generated("m2m_100", 1, num_beams=num_beams, forced_bos_token_id=7)
    ids, mask = inputs_of(CONFIGS["m2m_100"], 1)[:2]
    ours = backbone("m2m_100")
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": num_beams}
    found = cj.generate(ours.module, ours.params, ids, mask, forced_bos_token_id=first, **settings)
    for row, token in enumerate(first):
        _, wanted = generated("m2m_100", 1, num_beams=num_beams, forced_bos_token_id=int(token))
        wanted = wanted[row][: found.shape[1]]
        np.testing.assert_array_equal(found[row, : len(wanted)], wanted)
        assert found[row, 1] == token
    np.testing.assert_array_equal(found[0, : actual.shape[1]], actual[0, : found.shape[1]])
    with pytest.raises(ValueError, match=r"forced_bos_token_id has shape \(2,\)"):
        cj.generate(ours.module, ours.params, ids, mask, forced_bos_token_id=first[:2], **settings)
