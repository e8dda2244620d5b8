"""Compares generation by a compressed decoder, one token at a time, with the whole decoder."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.nn.attention import JoinedCache
from tests.helpers import adapted_shapes, quick_jit, random_tree
from tests.seq2seq_models import inputs_of, small_backbone, tiny

CONFIG = tiny("mbart", decoder_layer="compressed", decoder_value_dim=15, decoder_layers=2)
LENGTH, BEAMS = 6, 4
# Prefixes on the joined keys, and adapters at every kind of site that the layer has.
METHOD = cj.CombinedConfig(
    parts=(
        cj.BottleneckConfig(sites=("parallel_feed_forward",), reduction_factor=3, parallel=True),
        cj.BottleneckConfig(sites=("residual_feed_forward",), reduction_factor=4),
        cj.PrefixTuningConfig(prefix_length=2, bottleneck_size=3),
        cj.LoRAConfig(rank=2, sites=("query", "key", "value", "intermediate")),
    )
)


@functools.cache
def case_of(is_adapted):
    """Returns a model, its parameters, and compiled functions for the whole and for a step."""
    ours = small_backbone(CONFIG, seed=4)
    flat = flatten_dict(ours.params, sep="/")
    flat = {
        p: x * (1 if p.endswith("scale") or p.startswith("shared") else 2) for p, x in flat.items()
    }
    flat["final_logits_bias/bias"] = flat["final_logits_bias/bias"].at[CONFIG.pad_token_id].set(-99)
    model, params = ours.module, unflatten_dict(flat, sep="/")
    if is_adapted:
        model = cj.Adapted(model, METHOD)
        drawn = flatten_dict(random_tree(adapted_shapes(model), seed=6))
        params = unflatten_dict({**drawn, **flatten_dict(params)})

    def call(*args, **named):
        return model.apply({"params": params}, *args, **named)

    ids, mask = inputs_of(CONFIG, 5)[:2]
    states = quick_jit(lambda: call(ids, mask, method="encode"))()
    rows = np.repeat(np.arange(len(ids)), BEAMS)
    whole = quick_jit(
        lambda targets: call(targets, states[rows], mask[rows], method="decode").astype(jnp.float32)
    )
    start = quick_jit(
        lambda: jax.tree.map(
            lambda leaf: leaf[rows], call(states, LENGTH + 2, method="start_cache")
        )
    )

    @quick_jit
    def step(tokens, cache, index):
        return call(tokens, attention_mask=mask[rows], cache=cache, index=index, method="decode")

    return types.SimpleNamespace(**locals())


@pytest.mark.parametrize("is_adapted", [False, True], ids=["plain", "adapted"])
def test_steps_with_reordered_hypotheses_equal_the_whole_decoder(is_adapted):
    """Logits of each step, after hypotheses were exchanged, are those of all tokens at once."""
    case, rng = case_of(is_adapted), np.random.default_rng(0)
    cache, count = case.start(), 3 * BEAMS
    assert isinstance(cache, JoinedCache)
    tokens = np.full((count, LENGTH), 5)
    tokens[:, 0] = 2
    for i in range(LENGTH):
        logits, cache = case.step(jnp.asarray(tokens[:, i : i + 1]), cache, jnp.int32(i))
        expected = case.whole(jnp.asarray(tokens))[:, i]
        bound = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(logits[:, 0], expected, atol=bound, rtol=0)
        parents = rng.integers(0, BEAMS, count) + BEAMS * (np.arange(count) // BEAMS)
        cache = cache.with_changing(cache.reordered(cache.changing, jnp.asarray(parents)))
        tokens = tokens[parents]
        if i + 1 < LENGTH:
            tokens[:, i + 1] = rng.integers(3, 23, count)


def beams_at_once(case):
    """Returns the best hypotheses of a beam search that runs the whole decoder for each token."""
    tokens = np.full((3, BEAMS, LENGTH + 1), 5)
    tokens[..., 0] = 2
    scores = np.zeros((3, BEAMS))
    scores[:, 1:] = -1e9
    for i in range(LENGTH):
        logits = case.whole(jnp.asarray(tokens[..., :LENGTH].reshape(3 * BEAMS, LENGTH)))[:, i]
        own = np.float64(jax.nn.log_softmax(logits)).reshape(3, BEAMS, -1) + scores[..., None]
        flat = own.reshape(3, -1)
        best = np.argsort(-flat, axis=1)[:, :BEAMS]
        scores = np.take_along_axis(flat, best, 1)
        parents = best // own.shape[-1]
        tokens = np.take_along_axis(tokens, parents[..., None], 1)
        tokens[..., i + 1] = best % own.shape[-1]
    return tokens.reshape(3 * BEAMS, -1)


@pytest.mark.parametrize("is_adapted", [False, True], ids=["plain", "adapted"])
def test_greedy_and_beams_choose_the_tokens_of_the_whole_decoder(is_adapted):
    """Greedy tokens are the most probable, and four beams are those of a search without cache."""
    case = case_of(is_adapted)
    settings = {"max_new_tokens": LENGTH, "eos_token_id": (), "forced_eos_token_id": ()}
    inputs = (case.model, case.params, case.ids, case.mask)
    tokens = np.asarray(cj.generate(*inputs, **settings))
    logits = case.whole(jnp.asarray(tokens[case.rows, :LENGTH]))[::BEAMS]
    np.testing.assert_array_equal(tokens[:, 1:], logits.argmax(-1))
    beams = cj.generate(*inputs, num_beams=BEAMS, num_return_sequences=BEAMS, **settings)
    np.testing.assert_array_equal(beams, beams_at_once(case))
    found = np.asarray(beams).reshape(3, BEAMS, -1)
    assert all(len(np.unique(row, axis=0)) == BEAMS for row in found)
    assert (found[0] != found[1]).any()


def test_sampling_ends_and_repeats_with_the_key():
    """The same key draws the same tokens, another key others."""
    case = case_of(False)
    settings = {"max_new_tokens": LENGTH, "do_sample": True, "eos_token_id": ()}
    one, two, other = (
        np.asarray(
            cj.generate(
                case.model, case.params, case.ids, case.mask, key=jax.random.key(k), **settings
            )
        )
        for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def test_a_reordering_copies_the_targets_part_alone():
    """The cache has one array of source and target a layer; only the target's rows are gathered."""
    case = case_of(False)
    cache = case.start()
    source = case.ids.shape[1]
    shapes = {leaf.shape for leaf in jax.tree.leaves(cache)}
    assert shapes == {(3 * BEAMS, 3, source + LENGTH + 2, size) for size in (24 // 3, 15 // 3)}
    assert len(jax.tree.leaves(cache)) == 2 * CONFIG.decoder_layers
    assert (cache.room, cache.source_shape) == (LENGTH + 2, (3 * BEAMS, source))
    program = jax.make_jaxpr(cache.reordered)(cache.changing, jnp.zeros(3 * BEAMS, jnp.int32))

    def gathered(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "gather":
                yield equation.params["slice_sizes"]
            for inner in equation.params.values():
                if hasattr(inner, "jaxpr"):
                    yield from gathered(inner.jaxpr)

    lengths = [size[2] for size in gathered(program.jaxpr)]
    assert lengths == [LENGTH + 2] * 2 * CONFIG.decoder_layers
    marked = jax.tree.map(lambda leaf: leaf + jnp.arange(3 * BEAMS)[:, None, None, None], cache)
    parents = jnp.asarray([1, 1, 0, 3] * 3) + BEAMS * (jnp.arange(3 * BEAMS) // BEAMS)
    moved = marked.reordered(marked.changing, parents)
    for old, new in zip(*map(jax.tree.leaves, (marked.changing, moved)), strict=True):
        np.testing.assert_array_equal(new[:, :, :source], old[:, :, :source])
        np.testing.assert_array_equal(new[:, :, source:], old[:, :, source:][parents])


def test_a_cache_without_room_and_rows_that_do_not_fit():
    """Positions beyond the cache are refused, or NaN if traced; so are other numbers of rows."""
    case = case_of(False)
    cache, tokens = case.start(), jnp.full((3 * BEAMS, 1), 5)
    with pytest.raises(ValueError, match="index is 8; use 0 to max_length of start_cache - 1 = 7"):
        case.model.apply(
            {"params": case.params}, tokens, cache=cache, index=jnp.int32(8), method="decode"
        )
    assert np.isnan(case.step(tokens, cache, jnp.int32(8))[0]).all()
    with pytest.raises(ValueError, match="decoder_input_ids has 2 rows, but the encoder's states"):
        case.model.apply(
            {"params": case.params}, tokens[:2], cache=cache, index=jnp.int32(0), method="decode"
        )


def test_a_bank_of_adapters_generates_as_each_of_its_members():
    """Rows of one call take different adapters of a compressed decoder."""
    ours = small_backbone(CONFIG, seed=4)
    method = cj.preset("compacter", reduction_factor=4, phm_dim=3)
    model = cj.Adapted(ours.module, method)
    members = {}
    for seed, name in enumerate("ab"):
        drawn = flatten_dict(random_tree(adapted_shapes(model), seed=6 + seed))
        params = unflatten_dict({**drawn, **flatten_dict(ours.params)})
        members[name] = types.SimpleNamespace(model=model, params=params)
    bank, params = cj.stack_adapters([(m.model, m.params) for m in members.values()], ours)
    ids, mask = inputs_of(CONFIG, 5)[:2]
    settings = {"max_new_tokens": LENGTH, "eos_token_id": ()}
    together = np.asarray(
        cj.generate(bank, params, ids, mask, adapter_ids=np.array([1, 0, 1]), **settings)
    )
    for row, name in zip(itertools.count(), "bab"):
        own = members[name]
        alone = np.asarray(cj.generate(own.model, own.params, ids, mask, **settings))
        np.testing.assert_array_equal(together[row], alone[row])
