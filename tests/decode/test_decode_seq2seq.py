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
from tests.helpers import adapted_shapes, quick_jit, quick_key, random_tree
from tests.seq2seq_models import CONFIGS, inputs_of, small_backbone, torch_model

MAX_NEW_TOKENS = 9
FORCED = {"m2m_100": None, "mbart": 2, "bart": 2, "marian": 0, "unshared marian": 0}
# The first token that greedy search is made to write; BART's is that of the configuration.
FIRST = {"mbart": 7, "bart": 5, "unshared marian": 28}
# Penalties that change the tokens; mBART and BART write the ends of their configurations too late.
PENALTIES = {"m2m_100": 1.7, "mbart": 0.4, "bart": 1.7, "marian": -0.8, "unshared marian": 2.5}
ENDS = {"mbart": {"eos_token_id": 14}, "bart": {"eos_token_id": 9}}


@functools.cache
def backbone(model_type):
    """Returns a module and parameters whose generated text depends on the input."""
    changes = {"forced_eos_token_id": FORCED[model_type]}
    changes |= {"forced_bos_token_id": FIRST["bart"]} if model_type == "bart" else {}
    ours = small_backbone(dataclasses.replace(CONFIGS[model_type], **changes), seed=4)
    flat = flatten_dict(ours.params, sep="/")
    for path in flat:
        is_table = path in ("shared/embedding", "decoder_embed_tokens/embedding")
        flat[path] *= 0.5 if is_table else 1 if path.endswith("scale") else 2
    return types.SimpleNamespace(module=ours.module, params=unflatten_dict(flat, sep="/"))


def torch_tokens(model_type, seed, **settings):
    """Returns the tokens of transformers."""
    torch = pytest.importorskip("torch")
    ours = backbone(model_type)
    config = ours.module.config
    ids, mask = inputs_of(config, seed)[:2]
    settings = {"max_new_tokens": MAX_NEW_TOKENS, **settings}
    never = {"bad_words_ids": [[config.pad_token_id]]} if "marian" in model_type else {}
    model = torch_model(ours)
    # Its beam search takes the encoder's vocabulary for that of the logits.
    model.config.vocab_size = config.target_vocab_size
    expected = model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, **settings, **never
    )
    return expected.numpy()


def our_tokens(model_type, seed, **settings):
    """Returns the tokens of this library."""
    ours = backbone(model_type)
    ids, mask = inputs_of(ours.module.config, seed)[:2]
    settings = {"max_new_tokens": MAX_NEW_TOKENS, **settings}
    return np.asarray(cj.generate(ours.module, ours.params, ids, mask, **settings))


@pytest.mark.parametrize("model_type", FORCED)
def test_greedy_equals_pytorch(model_type):
    """Greedy search gives PyTorch's tokens, with the end forced where the configuration says so.

    Some types have a first token forced, as an argument or by the configuration.
    """
    given = {"bart": {}}.get(model_type, {"forced_bos_token_id": FIRST.get(model_type)})
    rows = []
    for seed in range(3):
        actual = our_tokens(model_type, seed, **given)
        np.testing.assert_array_equal(actual, torch_tokens(model_type, seed, **given))
        rows += [row.tobytes() for row in actual]
    assert len(set(rows)) > 2
    config = backbone(model_type).module.config
    assert (actual[:, 0] == config.decoder_start_token_id).all()
    assert model_type not in FIRST or (actual[:, 1] == FIRST[model_type]).all()


@pytest.mark.parametrize("model_type", FORCED)
def test_beams_equal_pytorch_with_a_forced_first_token_and_a_length_penalty(model_type):
    """Four beams give PyTorch's tokens, and every row has the forced token in front."""
    settings = {"num_beams": 4, "forced_bos_token_id": 7, "early_stopping": model_type == "bart"}
    settings |= {"length_penalty": PENALTIES[model_type], **ENDS.get(model_type, {})}
    for seed in range(3):
        actual = our_tokens(model_type, seed, **settings)
        np.testing.assert_array_equal(actual, torch_tokens(model_type, seed, **settings))
        assert (actual[:, 1] == 7).all()


def test_sampling_with_a_forced_first_token():
    """Samples begin with it, and are greedy search's where one token alone is left to draw."""
    settings = {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "key": quick_key(0)}
    given = {"forced_bos_token_id": FIRST["mbart"]}
    actual = our_tokens("mbart", 1, **settings, **given)
    expected = np.repeat(our_tokens("mbart", 1, **given), 2, axis=0)
    np.testing.assert_array_equal(actual, expected)
    assert (actual[:, 1] == FIRST["mbart"]).all()


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
        *(("m2m_100", METHOD), ("m2m_100", None), ("unshared marian", METHOD)),
        *(("mbart", cj.preset("ciat")), ("bart", None), ("bart", cj.preset("serial-ciat"))),
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
    ids, mask = inputs_of(CONFIGS["m2m_100"], 1)[:2]
    ours = backbone("m2m_100")
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": num_beams}
    found = cj.generate(ours.module, ours.params, ids, mask, forced_bos_token_id=first, **settings)
    for row, token in enumerate(first):
        wanted = torch_tokens("m2m_100", 1, num_beams=num_beams, forced_bos_token_id=int(token))
        wanted = wanted[row][: found.shape[1]]
        np.testing.assert_array_equal(found[row, : len(wanted)], wanted)
        assert found[row, 1] == token
    # A token for all rows is what the array is for a row that has it.
    actual = our_tokens("m2m_100", 1, num_beams=num_beams, forced_bos_token_id=7)
    np.testing.assert_array_equal(found[0, : actual.shape[1]], actual[0, : found.shape[1]])
    with pytest.raises(ValueError, match=r"forced_bos_token_id has shape \(2,\)"):
        cj.generate(ours.module, ours.params, ids, mask, forced_bos_token_id=first[:2], **settings)
