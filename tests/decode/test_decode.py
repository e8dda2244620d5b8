"""Compares generate with PyTorch's in transformers, and with plain loops without a cache."""

import collections
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from compacter_jax.catalogue import preset
from compacter_jax.decode import sampling
from compacter_jax.decode.generate import _generate, generate
from compacter_jax.inject.adapted import Adapted
from compacter_jax.models.bert.model import Bert
from compacter_jax.models.t5.checkpoint import t5_to_hugging_face
from compacter_jax.models.t5.config import T5Config
from compacter_jax.models.t5.model import T5
from tests.helpers import TINY_BERT, backbone_of, quick_jit, quick_key, random_tree

PLAIN = T5Config(
    vocab_size=23,
    d_model=12,
    d_kv=4,
    d_ff=20,
    num_layers=2,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)
GATED = dataclasses.replace(
    PLAIN,
    vocab_size=29,
    d_kv=5,
    num_heads=2,
    num_decoder_layers=1,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
)
SMALL = dataclasses.replace(PLAIN, num_layers=1, num_decoder_layers=1)
CONFIGS = {"plain": PLAIN, "gated": GATED, "small": SMALL}
# With several end tokens, which are often the most probable ones, rows end at many lengths.
SEVERAL = {"plain": (1, 4, 5, 9, 16), "small": (1, 4, 5, 9, 16), "gated": (1, 12, 18, 22)}
MAX_NEW_TOKENS = 11


CALLS = collections.Counter()


class Counted(T5):
    """A T5 that counts the executions of encoder and decoder, not their traces."""

    def encode(self, *args, **kwargs):
        jax.debug.callback(lambda: CALLS.update(["encode"]))
        return super().encode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        jax.debug.callback(lambda: CALLS.update(["decode"]))
        return super().decode(*args, **kwargs)


@functools.cache
def backbone(name):
    """Returns a module and parameters whose generated text depends on the input."""
    module = Counted(CONFIGS[name])
    flat = flatten_dict(backbone_of(module).params, sep="/")
    for path in flat:
        # With smaller embeddings and larger kernels, a tied model does not just repeat its input.
        flat[path] *= 0.5 if path.startswith("shared") else 1 if path.endswith("scale") else 2
    return types.SimpleNamespace(module=module, params=unflatten_dict(flat, sep="/"))


@functools.cache
def adapted(name):
    """Returns the same model with adapters whose weights are far from zero."""
    method = preset("compacter", reduction_factor=2, phm_dim=3)
    model = Adapted(backbone(name).module, method)
    inputs = model.backbone.dummy_inputs()
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    flat = flatten_dict(random_tree(shapes, seed=1), sep="/")
    return model, unflatten_dict(flat | flatten_dict(backbone(name).params, sep="/"), sep="/")


@functools.cache
def torch_model(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ours = backbone(name)
    config = transformers.T5Config(**dataclasses.asdict(ours.module.config))
    model = transformers.T5ForConditionalGeneration(config).eval()
    tensors = t5_to_hugging_face(ours.params)
    missing, left_over = model.load_state_dict(
        {name: torch.tensor(tensor) for name, tensor in tensors.items()}, strict=False
    )
    assert not left_over
    copies = ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    assert all(name.startswith(copies) for name in missing)
    model.tie_weights()
    model.decoder.register_forward_hook(lambda *_: CALLS.update(["theirs"]))
    return model


def prompts(seed, vocab_size, length=7):
    """Returns four rows: padding at the end, padding at the beginning, and two without padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, vocab_size, (4, length))
    mask = np.ones_like(ids)
    mask[0, -2:] = 0
    mask[1, :3] = 0
    ids[mask == 0] = 0
    return ids, mask


def assert_equals_torch(name, *, mask=True, **settings):
    """Checks that tokens and the number of steps equal PyTorch's; returns our outputs."""
    torch = pytest.importorskip("torch")
    ours, theirs = backbone(name), torch_model(name)
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "eos_token_id": SEVERAL[name], **settings}
    results = []
    for seed in range(3, 8):
        ids, attention_mask = prompts(seed, ours.module.config.vocab_size)
        if not mask:
            attention_mask = None
        CALLS.clear()
        actual = generate(ours.module, ours.params, ids, attention_mask, **settings)
        eos = list(np.ravel(settings["eos_token_id"]))
        expected = theirs.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(attention_mask) if mask else None,
            do_sample=False,
            **{**settings, "eos_token_id": eos},
        )
        np.testing.assert_array_equal(actual, expected.numpy())
        jax.effects_barrier()
        assert CALLS["encode"] == 1
        assert 1 <= CALLS["decode"] == CALLS["theirs"] <= settings["max_new_tokens"]
        results.append(np.asarray(actual))
    return results


# --- Equal to PyTorch ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "gated", "small"])
def test_greedy_equals_pytorch(name):
    results = assert_equals_torch(name)
    assert all((ids[:, 0] == 0).all() for ids in results)
    assert len({row.tobytes() for ids in results for row in ids}) > 5
    early = [np.isin(ids[:, :-1], SEVERAL[name]).any(1) for ids in results]
    assert 3 < np.sum(early) < np.size(early) - 3
    if name == "small":  # whole batches end early
        assert len({ids.shape[1] for ids in results}) > 2


GREEDY = {
    "at least six, own padding": ("small", {"min_new_tokens": 6, "pad_token_id": 7}),
    "one token, own start": (
        "plain",
        {"decoder_start_token_id": 7, "max_new_tokens": 1, "eos_token_id": 1},
    ),
    "no mask": ("small", {"mask": False}),
    # If the padding token also ends sequences, no mask is inferred: all positions are attended to.
    "no mask, padding ends": ("small", {"mask": False, "eos_token_id": (1, 0)}),
}


@pytest.mark.parametrize("case", GREEDY)
def test_greedy_with_other_settings_equals_pytorch(case):
    name, settings = GREEDY[case]
    assert_equals_torch(name, **settings)


BEAMS = {
    "two": ("small", {"num_beams": 2}),
    "three, one end, early": ("gated", {"num_beams": 3, "eos_token_id": 1, "early_stopping": True}),
    "three, early, long": (
        "plain",
        {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    ),
    "three, never": ("small", {"num_beams": 3, "early_stopping": "never"}),
    "three, never, shorter": (
        "gated",
        {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0},
    ),
    "five, long": ("gated", {"num_beams": 5, "length_penalty": 2.0}),
    "five, never, short": (
        "small",
        {"num_beams": 5, "early_stopping": "never", "length_penalty": 0.5},
    ),
    "three of three, own padding": (
        "small",
        {"num_beams": 3, "num_return_sequences": 3, "pad_token_id": 3},
    ),
    "two, at least six": ("small", {"num_beams": 2, "min_new_tokens": 6, "length_penalty": 0.5}),
}


@pytest.mark.parametrize("case", BEAMS)
def test_beam_search_equals_pytorch(case):
    name, settings = BEAMS[case]
    assert_equals_torch(name, **settings)


# --- The cache, and adapters --------------------------------------------------------------------


@functools.cache
def compiled(model):
    return quick_jit(model.apply)


def logits_of(model, params, ids, mask, decoder_ids):
    return compiled(model)({"params": params}, ids, mask, decoder_ids)


def test_the_most_probable_token_is_the_first_of_equals():
    logits = np.random.default_rng(0).integers(0, 4, (5, 17)).astype(np.float32)
    logits[1], logits[2, 3:] = -np.inf, -np.inf
    np.testing.assert_array_equal(sampling._most_probable(jnp.asarray(logits)), logits.argmax(-1))
    logits[3, 5] = np.nan
    assert sampling._most_probable(jnp.asarray(logits))[3] == -1  # no token


@pytest.mark.contract
def test_cached_logits_equal_those_of_the_whole_decoder():
    model, params = adapted("plain")
    ids, mask = prompts(3, 20)
    tokens = np.random.default_rng(4).integers(0, 20, (4, 5))
    whole = logits_of(model, params, ids, mask, tokens)

    @quick_jit
    def cached(params):
        built, params = model.precomputed(params)
        apply = functools.partial(built.apply, {"params": params})
        cache = apply(apply(ids, mask, method="encode"), 5, method="start_cache")

        def step(cache, position_and_token):
            position, token = position_and_token
            logits, cache = apply(
                token[:, None], attention_mask=mask, cache=cache, index=position, method="decode"
            )
            return cache, logits[:, 0]

        _, logits = jax.lax.scan(step, cache, (jnp.arange(5), jnp.asarray(tokens).T))
        return jnp.swapaxes(logits, 0, 1)

    np.testing.assert_allclose(cached(params), whole, atol=1e-5, rtol=1e-5)


def test_adapted_greedy_equals_a_loop_without_a_cache():
    model, params = adapted("plain")
    ids, mask = prompts(5, PLAIN.vocab_size)
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "eos_token_id": SEVERAL["plain"]}
    actual = generate(model, params, ids, mask, **settings)

    expected = np.zeros((4, 1 + MAX_NEW_TOKENS), np.int32)
    ended = np.zeros(4, bool)
    for position in range(MAX_NEW_TOKENS):
        # The decoder is causal: later positions have no influence.
        logits = np.asarray(logits_of(model, params, ids, mask, expected))[:, position]
        expected[:, position + 1] = np.where(ended, 0, logits.argmax(-1))
        ended |= np.isin(expected[:, position + 1], SEVERAL["plain"])
    np.testing.assert_array_equal(actual, expected[:, : actual.shape[1]])
    assert not expected[:, actual.shape[1] :].any()

    without = generate(model.backbone, backbone("plain").params, ids, mask, **settings)
    assert without.shape != actual.shape or (without != actual).any()


def loops(jaxpr):
    """Yields every `while` equation, however deeply it is nested."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield equation
        if "jaxpr" in equation.params:  # of jit
            yield from loops(equation.params["jaxpr"].jaxpr)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("is_built", [True, False], ids=["as it is", "with factors kept"])
def test_phm_weights_are_built_before_the_loop(num_beams, is_built, monkeypatch):
    model, params = adapted("small")
    if not is_built:  # shows that the check would find it
        monkeypatch.setattr(Adapted, "precomputed", lambda self, params: (self, params))
    ids = np.ones((2, 3), np.int32)

    def run(params):
        return generate(model, params, ids, max_new_tokens=13, num_beams=num_beams)

    _generate.clear_cache()
    (loop,) = loops(jax.make_jaxpr(run)(params).jaxpr)
    _generate.clear_cache()
    shapes = {operand.aval.shape for operand in loop.invars}
    bottleneck = SMALL.d_model // 2
    assert ((SMALL.d_model, bottleneck) in shapes) == is_built
    assert ((3, 3, 3) in shapes) != is_built
    assert ((3, SMALL.d_model // 3, 1) in shapes) != is_built


# --- Sampling -----------------------------------------------------------------------------------


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def exact_probabilities(logits, temperature=1.0, top_k=None, top_p=1.0):
    """Computes probabilities by definition: the k best, then the fewest that sum up to p."""
    p = softmax(np.float64(logits) / temperature)
    best_first = np.argsort(-p)
    keep = best_first[:top_k]
    p = np.where(np.isin(np.arange(p.size), keep), p, 0)
    p /= p.sum()
    before = np.cumsum(p[best_first]) - p[best_first]
    p[best_first[before >= top_p]] = 0
    return p / p.sum()


def assert_drawn_from(counts, probabilities):
    """Checks each count to five standard deviations; tokens of probability zero must not occur."""
    total = counts.sum()
    deviation = np.sqrt(total * probabilities * (1 - probabilities))
    assert (np.abs(counts - total * probabilities) <= 5 * deviation + 1e-6 * total).all()
    assert not counts[probabilities == 0].any()


SAMPLING = {
    "hot": {"temperature": 3.0},
    "nucleus": {"temperature": 2.0, "top_p": 0.7},
    "all three": {"temperature": 2.5, "top_k": 9, "top_p": 0.8},
}


@pytest.mark.parametrize("case", SAMPLING)
def test_samples_have_the_exact_distribution(case):
    settings = SAMPLING[case]
    ours = backbone("small")
    ids, mask = prompts(6, SMALL.vocab_size)
    draws = 5_000
    samples = generate(
        ours.module,
        ours.params,
        ids[:2],
        mask[:2],
        max_new_tokens=1,
        do_sample=True,
        num_return_sequences=draws,
        key=quick_key(0),
        **settings,
    )
    assert samples.shape == (2 * draws, 2)
    start = np.zeros((2, 1), np.int32)
    logits = logits_of(ours.module, ours.params, ids[:2], mask[:2], start)[:, 0]
    for row in range(2):
        drawn = samples[row * draws : (row + 1) * draws, 1]
        probabilities = exact_probabilities(np.asarray(logits[row]), **settings)
        assert_drawn_from(np.bincount(drawn, minlength=SMALL.vocab_size), probabilities)
        if "top_k" in settings:
            assert (probabilities > 0).sum() <= settings["top_k"]


def test_the_second_token_is_drawn_given_the_first_and_a_key_decides_both():
    ours = backbone("small")
    ids, mask = (x[:1] for x in prompts(6, SMALL.vocab_size))
    settings = {"temperature": 3.0, "top_k": 3}

    def sample(seed):
        samples = generate(
            ours.module,
            ours.params,
            ids,
            mask,
            max_new_tokens=2,
            do_sample=True,
            num_return_sequences=10_000,
            key=quick_key(seed),
            eos_token_id=(),
            **settings,
        )
        return np.asarray(samples)

    samples = sample(1)
    vocab = SMALL.vocab_size
    histories = np.stack([np.zeros(vocab, int), np.arange(vocab)], 1)
    repeated = (np.repeat(x, vocab, 0) for x in (ids, mask))
    logits = np.asarray(logits_of(ours.module, ours.params, *repeated, histories))
    first = exact_probabilities(logits[0, 0], **settings)
    joint = first[:, None] * [exact_probabilities(x, **settings) for x in logits[:, 1]]
    counts = np.bincount(samples[:, 1] * vocab + samples[:, 2], minlength=vocab**2)
    assert_drawn_from(counts, joint.ravel())
    assert (joint > 0).sum() == 9
    np.testing.assert_array_equal(samples, sample(1))
    assert (samples != sample(2)).any(1).mean() > 0.5


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 4}, {"top_k": 60}, {"top_p": 0.6}, {"top_p": 1e-6}, {"top_k": 6, "top_p": 0.5}],
    ids=str,
)
def test_cuts_equal_those_of_transformers(settings):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = np.float32(np.random.default_rng(0).integers(-8, 8, (5, 29)) / 2)
    if "top_p" in settings:
        # Without distinct logits, PyTorch would choose between equal tokens in its own way.
        logits += np.arange(29, dtype=np.float32) / 20_000
    expected = processors.TemperatureLogitsWarper(0.5)(None, torch.tensor(logits))
    if "top_k" in settings:
        expected = processors.TopKLogitsWarper(settings["top_k"])(None, expected)
    if "top_p" in settings:
        expected = processors.TopPLogitsWarper(settings["top_p"])(None, expected)
    settings = types.SimpleNamespace(**{"top_k": None, "top_p": 1.0, **settings}, temperature=0.5)
    np.testing.assert_array_equal(
        sampling.cut_logits(jnp.asarray(logits), settings), expected.numpy()
    )


# --- Compiled once, here and inside transformations ---------------------------------------------


@pytest.mark.contract
def test_a_second_call_compiles_nothing(caplog):
    ids, mask = prompts(0, SMALL.vocab_size)
    model, params = adapted("small")
    model = model.clone(sites=dict(T5.sites))
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "eos_token_id": SEVERAL["small"]}
    first = generate(model, params, ids, mask, **settings)
    backbone = Counted(dataclasses.replace(SMALL))
    same = Adapted(backbone, dataclasses.replace(model.method), sites=dict(T5.sites))
    params = jax.tree.map(lambda leaf: 0.7 * leaf, params)
    inputs = [prompts(seed, SMALL.vocab_size) for seed in range(1, 4)]
    with jax.log_compiles():
        results = [generate(same, params, *pair, **settings) for pair in inputs]
        assert not [record for record in caplog.records if "ompil" in record.message]
        jax.jit(jnp.negative)(ids)
        assert [record for record in caplog.records if "ompil" in record.message]
    assert len({first.shape, *(result.shape for result in results)}) > 1


@pytest.mark.contract
def test_inside_jit_and_pmap_the_result_has_its_full_width():
    ours = backbone("small")
    ids, mask = prompts(4, SMALL.vocab_size)
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "eos_token_id": SEVERAL["small"]}

    def run(ids, mask):
        return generate(ours.module, ours.params, ids, mask, **settings)

    alone = run(ids, mask)
    width = alone.shape[1]
    assert width < 1 + MAX_NEW_TOKENS
    assert alone.dtype == jnp.int32
    wide = jax.jit(run)(ids, mask)
    assert wide.shape == (4, 1 + MAX_NEW_TOKENS)
    np.testing.assert_array_equal(wide[:, :width], alone)
    assert not wide[:, width:].any()
    by_device = jax.pmap(run)(ids.reshape(2, 2, -1), mask.reshape(2, 2, -1))
    np.testing.assert_array_equal(by_device.reshape(wide.shape), wide)


def test_bfloat16_generates():
    ours = backbone("small")
    module = T5(SMALL, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ours.params)
    ids, mask = prompts(2, SMALL.vocab_size)
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "eos_token_id": SEVERAL["small"], "num_beams": 2}
    result = generate(module, params, ids, mask, **settings)
    assert result.dtype == jnp.int32
    assert ((result >= 0) & (result < SMALL.vocab_size)).all()
    # In a model this small, rounding leaves most first tokens unchanged.
    float32 = generate(ours.module, ours.params, ids, mask, **settings)
    assert (result[:, 1] == float32[:, 1]).sum() >= 2


# --- What cannot be --------------------------------------------------------------------------


IDS = np.ones((2, 3), np.int32)
REFUSED = {
    "no beams": ({"num_beams": 0}, "num_beams=0 is out of range; use 1"),
    "more beams than tokens": ({"num_beams": 24}, "num_beams=24 .* vocabulary, 23"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens=0 is too few; use 1"),
    "more than the most": ({"min_new_tokens": 5}, "min_new_tokens=5 .* max_new_tokens=4"),
    "an empty prompt": ({"input_ids": IDS[:, :0]}, r"\(2, 0\), so it has no tokens"),
    "a prompt without batch": ({"input_ids": IDS[0]}, r"\(3,\); it must be \[batch, length\]"),
    "sampling without key": ({"do_sample": True}, r"needs a key; pass key=jax.random.key\(0\)"),
    "a key without sampling": ({"key": 0}, "set do_sample=True"),
    "sampled beams": ({"do_sample": True, "num_beams": 2}, "beam search or sampling"),
    "cold": ({"do_sample": True, "temperature": 0.0}, "temperature=0.0 .* do_sample=False"),
    "NaN": ({"do_sample": True, "temperature": float("nan")}, "temperature=nan"),
    "nothing of p": ({"do_sample": True, "top_p": 0.0}, "top_p=0.0 .* 0 < top_p <= 1"),
    "more than p": ({"do_sample": True, "top_p": 1.1}, "top_p=1.1"),
    "nothing of k": ({"do_sample": True, "top_k": 0}, "top_k=0 keeps no token"),
    "warm but greedy": ({"temperature": 0.7}, "temperature=0.7 is used only in sampling"),
    "k but greedy": ({"top_k": 5}, "top_k=5 is used only in sampling"),
    "a penalty without beams": (
        {"length_penalty": 2.0},
        "length_penalty=2.0 is used only in beam search",
    ),
    "stopping without beams": (
        {"early_stopping": "never"},
        "early_stopping='never' is used only in beam",
    ),
    "a strange penalty": ({"num_beams": 2, "length_penalty": np.inf}, "length_penalty=inf"),
    "strange stopping": ({"num_beams": 2, "early_stopping": "soon"}, "'soon' is unknown; use True"),
    "several greedy results": ({"num_return_sequences": 2}, "num_return_sequences=2 .* do_sample"),
    "no results": ({"do_sample": True, "num_return_sequences": 0}, "num_return_sequences=0"),
    "an end beyond the vocabulary": (
        {"eos_token_id": (1, 23)},
        r"eos_token_id=23 is not in the vocabulary; use 0 to 22; \(\) never ends",
    ),
    "a negative start": ({"decoder_start_token_id": -1}, "decoder_start_token_id=-1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_be(case):
    changes, message = REFUSED[case]
    arguments = {"input_ids": IDS, "max_new_tokens": 4, **changes}
    with pytest.raises(ValueError, match=message):
        generate(T5(SMALL), {}, arguments.pop("input_ids"), **arguments)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Bert(TINY_BERT), "Bert cannot generate: it has no decoder"),
        (T5(SMALL, head="encoder"), "T5 with head='encoder' cannot generate"),
        (T5(SMALL, head=None), "T5 with head=None cannot generate"),
        (
            T5(dataclasses.replace(SMALL, decoder_start_token_id=None)),
            "no decoder_start_token_id; pass one",
        ),
    ],
    ids=["BERT", "encoder", "no head", "no start token"],
)
@pytest.mark.parametrize("with_adapters", [False, True], ids=["alone", "adapted"])
def test_modules_that_cannot_generate(module, message, with_adapters):
    if with_adapters:
        module = Adapted(module, preset("compacter++", reduction_factor=2, phm_dim=3))
    with pytest.raises(ValueError, match=message):
        generate(module, {}, IDS, max_new_tokens=4)


# --- Keys and values of the source ---------------------------------------------------------------


def shapes_of(jaxpr):
    """Returns the shapes of all arrays that a program computes, inner programs included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {var.aval.shape for var in equation.outvars}
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                program = getattr(inner, "jaxpr", inner)
                if hasattr(program, "eqns"):
                    found |= shapes_of(program)
    return found


@pytest.mark.parametrize(
    "settings", [{"num_beams": 4}, {"do_sample": True, "num_return_sequences": 4}]
)
@pytest.mark.parametrize("method", ["pfeiffer-feed-forward", "prefix-tuning"])
def test_hypotheses_of_a_row_share_the_keys_of_its_source(settings, method):
    """They exist once for a row, except with prefixes before them, which routes may choose."""
    config = {"reduction_factor": 2} if method != "prefix-tuning" else {"prefix_length": 2}
    model = Adapted(T5(SMALL), preset(method, **config))
    ids = jnp.ones((2, 9), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), *model.backbone.dummy_inputs())["params"]
    if "do_sample" in settings:
        settings = {**settings, "key": jax.random.key(0)}

    def run(params):
        return generate(model, params, ids, max_new_tokens=3, eos_token_id=1, **settings)

    found = shapes_of(jax.make_jaxpr(run)(params).jaxpr)
    heads, size = SMALL.num_heads, SMALL.d_kv
    assert (2, heads, 9, size) in found
    assert ((8, heads, 9, size) in found) == (method == "prefix-tuning")
