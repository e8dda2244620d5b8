"""Compares T5 with the PyTorch implementation of transformers, and tests it by itself."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from compacter_jax.models.encoder_decoder import EncoderDecoderOutput
from compacter_jax.models.t5.checkpoint import t5_to_hugging_face
from compacter_jax.models.t5.config import T5Config
from compacter_jax.models.t5.layers import T5Attention, T5LayerFeedForward, relative_position_bucket
from compacter_jax.models.t5.model import T5
from compacter_jax.nn.attention import DecoderCache
from tests.helpers import (
    TINY_T5,
    mean_square,
    quick_jit,
    quick_key,
    random_tree,
    t5_inputs,
    torch_t5,
    torch_t5_outputs,
)

GATED = dataclasses.replace(TINY_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
SHALLOW = dataclasses.replace(GATED, num_layers=1)


@functools.cache  # tracing takes most of the time of the error tests
def shapes_of(module):
    return jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())["params"]


def random_params(module, seed=0):
    return random_tree(shapes_of(module), seed)


def inputs_of(module, inputs):
    return inputs[:2] if module.head == "encoder" else inputs


def apply(module, params, *inputs, **named):
    return quick_jit(lambda params: module.apply({"params": params}, *inputs, **named))(params)


def loss_and_gradient(module, params, *inputs, **named):
    """Returns `(loss, output), gradient`."""

    def loss(params):
        output = module.apply({"params": params}, *inputs, **named)
        return mean_square(jax.tree.leaves(output)), output

    return quick_jit(jax.value_and_grad(loss, has_aux=True))(params)


# --- equal to PyTorch ---------------------------------------------------------------------------


def random_config(seed, **changes):
    rng = np.random.default_rng(seed)
    buckets = 4 * int(rng.integers(1, 4))
    heads, d_kv = int(rng.integers(1, 5)), int(rng.integers(2, 7))
    config = {
        "vocab_size": int(rng.integers(11, 40)),
        "d_model": heads * d_kv + int(rng.integers(1, 6)),
        "d_kv": d_kv,
        "d_ff": int(rng.integers(5, 30)),
        "num_layers": 1,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        # Less than the length of the inputs.
        "relative_attention_max_distance": buckets // 2 + int(rng.integers(1, 3)),
        "layer_norm_epsilon": 1e-3,  # large enough to be visible
    }
    return T5Config(**(config | changes))


GATED_UNTIED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
FLAN = GATED_UNTIED | {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
}
CASES = {
    "T5": ("T5", "conditional_generation", {"num_layers": 2, "num_decoder_layers": 1}),
    "T5 v1.1": ("T5", "conditional_generation", GATED_UNTIED | {"num_decoder_layers": 2}),
    "Flan-T5, more tokens than buckets": ("T5", "conditional_generation", FLAN),
    "mT5": ("MT5", "conditional_generation", GATED_UNTIED),
    "mT5, gated silu, states of both": ("MT5", None, {"feed_forward_proj": "gated-silu"}),
    "exact gelu, encoder": ("T5", "encoder", {"feed_forward_proj": "gelu"}),
}


@pytest.mark.parametrize(
    ("seed", "family", "head", "changes"),
    [(seed, *case) for seed, case in enumerate(CASES.values())],
    ids=CASES,
)
def test_outputs_and_gradients_equal_pytorch(seed, family, head, changes):
    module = T5(random_config(seed, **changes), head=head)
    config = module.config
    assert config.d_kv * config.num_heads != config.d_model
    params = random_params(module, seed)
    length = 141 if config.relative_attention_max_distance == 128 else None
    inputs = inputs_of(module, t5_inputs(seed, config, length))
    assert inputs[0].shape[1] > config.relative_attention_max_distance
    model = torch_t5(module, params, family)
    theirs = torch_t5_outputs(model, inputs)
    mean_square(theirs).backward()
    (_, output), gradient = loss_and_gradient(module, params, *inputs)
    ours = jax.tree.leaves(output)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a).max() > 0.5
        np.testing.assert_allclose(a, b.detach().numpy(), atol=2e-5, rtol=0)
    named = {name: p.grad.numpy() for name, p in model.named_parameters()}
    gradient = t5_to_hugging_face(gradient)
    assert gradient.keys() == named.keys()
    for name, g in gradient.items():
        scale = np.abs(named[name]).max()
        assert scale > 1e-5, name
        # Sums over all tokens: some hundred float32 products, some of which cancel.
        np.testing.assert_allclose(g, named[name], atol=5e-5 * scale, rtol=0, err_msg=name)


BUCKETS = [(32, 128), (4, 3), (8, 20), (8, 5), (12, 31), (64, 128), (128, 1000), (256, 500)]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), BUCKETS)
def test_relative_position_buckets_equal_pytorch(num_buckets, max_distance, bidirectional):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    positions = np.arange(-3000, 3001)
    expected = theirs._relative_position_bucket(
        torch.tensor(positions), bidirectional, num_buckets, max_distance
    )
    actual = buckets_of(positions, num_buckets, max_distance, bidirectional=bidirectional)
    np.testing.assert_array_equal(actual, expected.numpy())
    assert actual.max() == num_buckets - 1


def buckets_of(positions, num_buckets, max_distance, *, bidirectional):
    return relative_position_bucket(
        jnp.asarray(positions),
        bidirectional=bidirectional,
        num_buckets=num_buckets,
        max_distance=max_distance,
    )


def test_relative_position_buckets_of_the_published_sizes():
    """In integers: a distance d >= 8 is in the bucket 8 + k with 8 2^(k/2) <= d."""
    distances = np.arange(300)
    steps = [sum(64 * 2**k <= d * d for k in range(1, 8)) for d in distances]
    expected = np.where(distances < 8, distances, 8 + np.array(steps))
    for sign, first in ((-1, 0), (1, 16)):
        actual = buckets_of(sign * distances, 32, 128, bidirectional=True)
        np.testing.assert_array_equal(actual[1:], first + expected[1:])
    assert buckets_of([0], 32, 128, bidirectional=True).tolist() == [0]
    np.testing.assert_array_equal(buckets_of(distances, 32, 128, bidirectional=False), 0)


def test_initial_values_are_pytorchs():
    """Compares the standard deviation of each leaf, for an initializer factor other than one."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    for proj, tied in (("relu", True), ("gated-gelu", False)):
        config = T5Config(
            vocab_size=300,
            d_model=48,
            d_kv=24,
            d_ff=80,
            num_layers=1,
            num_heads=4,
            relative_attention_num_buckets=256,
            relative_attention_max_distance=200,
            initializer_factor=0.7,
            feed_forward_proj=proj,
            tie_word_embeddings=tied,
        )
        module = T5(config)
        theirs = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**dataclasses.asdict(config))
        )
        theirs = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
        params = quick_jit(module.init)(quick_key(0), *module.dummy_inputs())["params"]
        ours = t5_to_hugging_face(params)
        assert ours.keys() - theirs.keys() <= {"lm_head.weight"}
        for name, leaf in ours.items():
            if name not in theirs:  # transformers 5 ties it
                continue
            if "layer_norm" in name:
                np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)
                np.testing.assert_array_equal(leaf, np.float32(0.7))
                continue
            # Each estimate has a relative error of 1 / sqrt(2 size); the bound is six errors of the
            # quotient.
            margin = 6 / np.sqrt(leaf.size)
            assert margin < 0.2
            assert abs(leaf.std() / theirs[name].std() - 1) < margin, name
            assert abs(leaf.mean()) < margin * leaf.std(), name


# --- types of numbers ---------------------------------------------------------------------------


def test_bfloat16_stays_near_float32():
    module = T5(GATED, head=None)
    params, inputs = random_params(module), t5_inputs(3, GATED)
    exact = apply(module, params, *inputs)
    rough = apply(module.clone(dtype=jnp.bfloat16), params, *inputs)
    for a, b in zip(jax.tree.leaves(rough), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.bfloat16
        # bfloat16 rounds to one part in 256, and a dozen successive roundings add up.
        bound = 12 / 256 * float(np.abs(b).max())
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=bound, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "expected"),
    [
        (None, jnp.float32, jnp.float32),
        (None, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32, jnp.float16),
    ],
)
@pytest.mark.parametrize("config", [TINY_T5, GATED], ids=["tied", "untied"])
def test_types(config, dtype, param_dtype, expected):
    module = T5(config, dtype=dtype, param_dtype=param_dtype)
    shapes = shapes_of(module)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(param_dtype)}
    inputs = t5_inputs(0, config)
    assert jax.eval_shape(module.apply, {"params": shapes}, *inputs).dtype == expected
    text = str(jax.make_jaxpr(module.apply)({"params": shapes}, *inputs))
    # Softmax and norms: 2 layers with 2 + 1 each in the encoder; 4 norms and 2 softmaxes in the
    # decoder.
    assert len(re.findall(r"f32\[[\d,]+\] = exp ", text)) == 4
    assert len(re.findall(r"f32\[[\d,]+\] = rsqrt ", text)) == 9
    assert not re.search(r"f16\[[\d,]*\] = (exp|rsqrt|reduce_sum|reduce_max)", text)


def test_parameters_in_bfloat16_compute_in_float32_as_their_values_do():
    module = T5(SHALLOW, head="encoder", dtype=jnp.float32, param_dtype=jnp.bfloat16)
    params, inputs = random_params(module), t5_inputs(5, SHALLOW)[:2]
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    expected = apply(T5(SHALLOW, head="encoder"), exact, *inputs)
    np.testing.assert_allclose(apply(module, params, *inputs), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("query", "bias", "by_bias"),
    [(16, 0, False), (0, 256, False), (16, 256, False), (0, 256, True), (16, 0, True)],
)
def test_attention_scores_are_not_rounded_to_bfloat16(query, bias, by_bias):
    """bfloat16 would round 257 to 256, so that both keys would get the same attention.

    Scores are `16 query + bias`, and one more for the second key, either from its product with the
    query or from the bias of its position.
    """
    config = dataclasses.replace(TINY_T5, d_model=2, d_kv=2, num_heads=1)
    module = T5Attention(config, dtype=jnp.bfloat16, has_position_bias=True)
    table = np.full((8, 1), bias, np.float32)
    if by_bias:
        table[1] -= 1  # the bias of the key before the query
        table[5] += 1  # the bias of the key after it
    params = {
        "q": {"kernel": np.array([[query, 1], [query, 1]], np.float32)},
        "k": {"kernel": np.array([[16, 0], [16, not by_bias]], np.float32)},
        "v": {"kernel": np.eye(2, dtype=np.float32)},
        "o": {"kernel": np.eye(2, dtype=np.float32)},
        "relative_attention_bias": {"embedding": table},
    }
    x = jnp.eye(2, dtype=jnp.bfloat16)[None]
    # The values are unit vectors, so the output shows the weights of the two keys.
    y, *_ = module.apply({"params": params}, x, None, None, None, None, None, True)
    assert y.dtype == jnp.bfloat16
    expected = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    np.testing.assert_allclose(y[0].astype(jnp.float32), [expected, expected], rtol=2**-8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_norms_do_not_overflow_in_half_precision(dtype):
    """Squares of 300 and their sum exceed float16; a bfloat16 sum of 700 ones would stop at 256."""
    config = dataclasses.replace(TINY_T5, d_model=700, num_layers=1, layer_norm_epsilon=1e-6)
    module = T5(config, head="encoder", dtype=dtype)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes_of(module))
    params["shared"]["embedding"] += 300 * (-1.0) ** np.arange(700)
    params["encoder"]["final_layer_norm"]["scale"] += 1.5
    y = apply(module, params, np.zeros((1, 2), int))
    np.testing.assert_array_equal(np.abs(y.astype(jnp.float32)), 1.5)


@pytest.fixture(scope="module")
def large():
    """Returns a model whose residual stream exceeds the range of float16, and its parameters."""
    module = T5(SHALLOW)

    def scaled(path, leaf):
        name = jax.tree_util.keystr(path)
        return leaf * (3e5 if re.search(r"'(shared|o|wo)'", name) else 1)

    return module, jax.tree_util.tree_map_with_path(scaled, random_params(module, 2))


def test_training_in_bfloat16_is_finite_where_float16_overflows(large):
    module, params = large
    inputs, targets = t5_inputs(2, GATED), np.arange(3 * 11).reshape(3, 11) % 19
    targets = targets[:, : inputs[2].shape[1]]

    def run(dtype):
        largest = []

        def watch(next_fun, args, kwargs, context):
            y = next_fun(*args, **kwargs)
            if isinstance(context.module, T5LayerFeedForward) and context.method_name == "__call__":
                largest.append(jnp.abs(y).max().astype(jnp.float32))
            return y

        def loss(params):
            with nn.intercept_methods(watch):
                logits = module.clone(dtype=dtype).apply({"params": params}, *inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), targets
            )
            return losses.mean(), jnp.stack(largest)

        tx = optax.sgd(1e-2)
        step = jax.value_and_grad(loss, has_aux=True)

        @quick_jit
        def train(params):
            (before, largest), gradient = step(params)
            updates, _ = tx.update(gradient, tx.init(params), params)
            return before, largest, gradient, optax.apply_updates(params, updates)

        return train(params)

    before, largest, gradient, after = run(jnp.bfloat16)
    assert (largest > np.finfo(np.float16).max).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, after)))
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(jnp.float32)}
    exact_before, _, exact, _ = run(jnp.float32)
    assert abs(before - exact_before) < 0.02 * exact_before  # a few roundings to 1 / 256
    for path, leaf in flatten_dict(gradient, sep="/").items():
        other = flatten_dict(exact, sep="/")[path]
        cosine = np.vdot(leaf, other) / (np.linalg.norm(leaf) * np.linalg.norm(other))
        assert cosine > 0.97, (path, cosine)


@pytest.mark.parametrize("config", [TINY_T5, GATED], ids=["tied", "gated"])
def test_float16_is_as_near_to_float64_as_pytorch_s(config):
    """The residual stream exceeds the range, and so does the input of `wo` in a gated model."""
    module = T5(dataclasses.replace(config, num_layers=1))

    def scaled(path, leaf):
        return leaf * (3e5 if "wo" in jax.tree_util.keystr(path) else 1)

    params = jax.tree_util.tree_map_with_path(scaled, random_params(module, 2))
    ids, _, decoder_ids, _ = t5_inputs(2, config)
    inputs = (ids, np.ones_like(ids), decoder_ids, np.ones_like(decoder_ids))

    def of_torch(model):
        outputs = torch_t5_outputs(model, inputs)
        sum((y.double() ** 2).mean() for y in outputs).backward()
        gradient = {name: p.grad.double().numpy() for name, p in model.named_parameters()}
        return outputs[0].detach().double().numpy(), gradient

    exact = of_torch(torch_t5(module, params).double())
    half = torch_t5(module, params)
    for name, parameter in half.named_parameters():
        if not name.endswith("wo.weight"):  # `from_pretrained` does the same
            parameter.data = parameter.data.half()
    theirs = of_torch(half)
    assert np.isfinite(theirs[0]).all()
    (_, output), gradient = loss_and_gradient(module.clone(dtype=jnp.float16), params, *inputs)
    assert output.dtype == jnp.float16
    ours = np.float64(output), t5_to_hugging_face(gradient)

    def error(y, exact):
        return np.abs(np.float64(y) - exact).max() / np.abs(exact).max()

    assert error(ours[0], exact[0]) < max(2**-9, 1.5 * error(theirs[0], exact[0]))
    for name, leaf in ours[1].items():
        bound = 1.5 * error(theirs[1][name], exact[1][name])
        assert error(leaf, exact[1][name]) < max(2**-7, bound), name


# --- dropout, remat -----------------------------------------------------------------------------


def test_dropout_is_a_function_of_its_key():
    module = T5(dataclasses.replace(SHALLOW, dropout_rate=0.3), head="encoder")
    params, inputs = random_params(module), t5_inputs(1, SHALLOW)[:2]

    @quick_jit
    def run(key):
        return module.apply({"params": params}, *inputs, deterministic=False, rngs={"dropout": key})

    one, other = quick_key(0), quick_key(1)
    np.testing.assert_array_equal(run(one), run(one))
    assert np.abs(run(one) - run(other)).max() > 0.1
    none = module.clone(config=dataclasses.replace(SHALLOW, dropout_rate=0.0))
    still = apply(none, params, *inputs, deterministic=False)  # no key is needed
    np.testing.assert_array_equal(still, apply(module, params, *inputs))


STACK = {"dropout_in", "dropout_out"}
LAYER = {"layer/0/dropout", "layer/0/SelfAttention/dropout"}
DROPOUTS = {
    "encoder": STACK
    | {
        f"block/{i}/{path}"
        for i in range(2)
        for path in LAYER | {"layer/1/dropout", "layer/1/DenseReluDense/dropout"}
    },
    "decoder": STACK
    | {
        f"block/0/{path}"
        for path in LAYER
        | {"layer/1/dropout", "layer/1/EncDecAttention/dropout"}
        | {"layer/2/dropout", "layer/2/DenseReluDense/dropout"}
    },
}


def test_dropout_acts_where_transformers_has_it():
    module = T5(dataclasses.replace(GATED, dropout_rate=0.5))
    acting = []

    def watch(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        if isinstance(context.module, nn.Dropout) and y is not args[0]:
            acting.append("/".join(context.module.path))
        return y

    def run(deterministic):
        with nn.intercept_methods(watch):
            return module.apply(
                {"params": random_params(module)},
                *t5_inputs(0, GATED),
                deterministic=deterministic,
                rngs={"dropout": quick_key(0)},
            )

    jax.eval_shape(lambda: run(deterministic=True))
    assert acting == []
    jax.eval_shape(lambda: run(deterministic=False))
    assert sorted(acting) == sorted(f"{s}/{path}" for s in DROPOUTS for path in DROPOUTS[s])


def test_dropout_keeps_the_expectation():
    """Both dropouts of a feed-forward layer are followed only by linear maps."""
    layer = T5LayerFeedForward(dataclasses.replace(TINY_T5, dropout_rate=0.25))
    params = random_params(T5(TINY_T5))["encoder"]["block"]["0"]["layer"]["1"]
    x = np.float32(np.random.default_rng(1).standard_normal((2, 12)))

    @jax.jit
    def sample(keys):
        def one(key):
            return layer.apply({"params": params}, x, False, rngs={"dropout": key})

        return jax.vmap(one)(keys)

    y = np.float64(sample(jax.random.split(jax.random.key(0), 4096)))
    expected = layer.apply({"params": params}, x, True)
    error = (y.mean(0) - expected) / (y.std(0) / 64)
    assert np.abs(error).max() < 4.5  # 24 independent normal deviations
    # Where the output of the sub-layer is dropped, only the residual remains.
    assert abs((y == x).mean() - 0.25) < 0.01


def test_remat_changes_nothing():
    """The recomputation drops the same entries."""
    module = T5(SHALLOW)
    params, inputs = random_params(module), t5_inputs(4, SHALLOW)
    options = {"deterministic": False, "rngs": {"dropout": quick_key(1)}}
    plain, *recomputed = (
        loss_and_gradient(module.clone(remat=remat), params, *inputs, **options)
        for remat in ("off", "full", "dots")
    )
    for again in recomputed:
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
            # The same operations, fused in another way.
            np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * np.abs(a).max(), rtol=0)


@pytest.mark.contract
def test_remat_recomputes_the_layers():
    def checkpoints(remat):
        module = T5(TINY_T5, remat=remat)
        jaxpr = jax.make_jaxpr(module.apply)({"params": shapes_of(module)}, *t5_inputs(0, TINY_T5))
        return sum(e.primitive.name in ("checkpoint", "remat", "remat2") for e in jaxpr.eqns)

    assert [checkpoints(remat) for remat in ("off", "full", "dots")] == [0, 3, 3]


def test_remat_has_the_same_initial_values():
    module = T5(SHALLOW, head="encoder")
    plain, remat = (
        quick_jit(module.clone(remat=r).init)(quick_key(1), *module.dummy_inputs())
        for r in ("off", "full")
    )
    jax.tree.map(np.testing.assert_array_equal, plain, remat)


# --- encoder and decoder by themselves, and the cache -------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """Returns a module, its parameters, inputs, the states of the encoder, and the logits."""
    module = T5(dataclasses.replace(SHALLOW, num_decoder_layers=2))
    params, inputs = random_params(module, 6), t5_inputs(6, SHALLOW, 9)
    ids, mask, decoder_ids, _ = inputs
    states = apply(module, params, ids, mask, method="encode")
    logits = apply(module, params, decoder_ids, states, mask, method="decode")
    return module, params, inputs, states, logits


def test_encode_and_decode_are_the_parts_of_a_call(tiny):
    module, params, inputs, states, logits = tiny
    ids, mask, decoder_ids, decoder_mask = inputs

    def both(module, decoder_mask=None):
        return module.decode(decoder_ids, module.encode(ids, mask), mask, decoder_mask)

    for given in ((), (decoder_mask,)):
        whole = apply(module, params, ids, mask, decoder_ids, *given)
        parts = apply(module, params, *given, method=both)
        np.testing.assert_allclose(parts, whole, atol=1e-6, rtol=0)
        if not given:
            np.testing.assert_allclose(logits, whole, atol=1e-6, rtol=0)
    # Without the mask, tokens that follow padding on the left would differ.
    assert np.abs(whole - logits).max() > 0.1
    output = apply(module.clone(head=None), params, ids, mask, decoder_ids)
    assert isinstance(output, EncoderDecoderOutput)
    np.testing.assert_allclose(output.encoder_last_hidden_state, states, atol=1e-6, rtol=0)
    projected = output.last_hidden_state @ params["lm_head"]["kernel"]
    np.testing.assert_allclose(projected, logits, atol=1e-5, rtol=0)


def test_padding_cannot_be_seen(tiny):
    module, params, (ids, mask, decoder_ids, _), states, logits = tiny
    other = np.where(mask == 1, ids, (ids + 1) % 19)
    assert (other != ids).any()
    encoder = module.clone(head="encoder")
    seen = [apply(encoder, params, i, m) for i, m in ((other, mask.astype(bool)), (ids, None))]
    np.testing.assert_allclose(seen[0][mask == 1], states[mask == 1], atol=1e-6, rtol=0)
    assert np.abs(seen[0] - states).max() > 0.1
    change = np.abs(seen[1] - states).max((1, 2))
    np.testing.assert_array_equal(change > 1e-3, (mask == 0).any(1))

    @quick_jit
    def decode(ids, states):
        return module.apply({"params": params}, ids, states, mask, method="decode")

    np.testing.assert_array_equal(
        decode(decoder_ids, states), decode(decoder_ids, np.where(mask[..., None], states, 7.0))
    )
    # Later tokens of the decoder have no influence either.
    later = decoder_ids.copy()
    later[:, 3:] = (later[:, 3:] + 1) % 19
    changed = decode(later, states)
    np.testing.assert_array_equal(changed[:, :3], decode(decoder_ids, states)[:, :3])
    assert np.abs(changed[:, 3:] - logits[:, 3:]).max() > 0.1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_decoding_with_a_cache_equals_decoding_at_once(tiny, dtype):
    module, params, (_, mask, decoder_ids, _), states, logits = tiny
    module = module.clone(dtype=dtype)
    length = decoder_ids.shape[1]
    assert length > GATED.relative_attention_max_distance
    cache = apply(module, params, states, length + 2, method="start_cache")
    assert isinstance(cache, DecoderCache)
    own, crossed = (3, 3, length + 2, 5), (3, 3, 9, 5)
    shapes = jax.tree.map(lambda leaf: leaf.shape, cache)
    assert shapes == DecoderCache(((own, own),) * 2, ((crossed, crossed),) * 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(dtype)}

    @quick_jit
    def step(cache, ids, index):
        return module.apply(
            {"params": params},
            ids,
            attention_mask=mask,
            cache=cache,
            index=index,
            method="decode",
        )

    # bfloat16 rounds to one part in 256, as in a full call.
    bound = 1e-5 if dtype == jnp.float32 else 12 / 256 * np.abs(logits).max()
    for i in range(length):
        assert all((leaf[:, :, i:] == 0).all() for pair in cache.self_attention for leaf in pair)
        y, after = step(cache, decoder_ids[:, i : i + 1], i)
        assert y.shape == (3, 1, 19)
        np.testing.assert_allclose(
            y[:, 0].astype(jnp.float32), logits[:, i], atol=bound, rtol=0, err_msg=f"token {i}"
        )
        jax.tree.map(np.testing.assert_array_equal, after.cross_attention, cache.cross_attention)
        cache = after


def test_the_encoders_states_are_projected_once(tiny):
    """`start_cache` projects the states; each later token reads the result, not the kernels."""
    module, params, (_, mask, decoder_ids, _), states, _ = tiny
    called = []

    def watch(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Dense):
            called.append("/".join(context.module.path))
        return next_fun(*args, **kwargs)

    def start(states):
        with nn.intercept_methods(watch):
            return module.apply({"params": params}, states, 4, method="start_cache")

    def step(cache):
        options = {"attention_mask": mask, "cache": cache, "index": 0, "method": "decode"}
        with nn.intercept_methods(watch):
            return module.apply({"params": params}, decoder_ids[:, :1], **options)

    layer = "decoder/block/{}/layer/1/EncDecAttention/{}"
    crossed = [layer.format(i, name) for i in range(2) for name in "kv"]
    compiled = quick_jit(start).lower(states).compile()
    assert [path for path in called if path in crossed] == crossed
    # The compiler removes all other computations of the pass for one token.
    assert len(re.findall(r" dot\(", compiled.as_text())) == len(crossed)
    cache = compiled(states)
    for i, pair in enumerate(cache.cross_attention):
        attention = params["decoder"]["block"][str(i)]["layer"]["1"]["EncDecAttention"]
        for leaf, name in zip(pair, "kv", strict=True):
            expected = (states @ attention[name]["kernel"]).reshape(3, 9, 3, 5)
            np.testing.assert_allclose(leaf, np.moveaxis(expected, 1, 2), atol=1e-5, rtol=0)
    called.clear()
    jax.eval_shape(step, cache)
    assert len(called) == 2 * (4 + 2 + 3) + 1
    assert not set(called) & set(crossed)


# --- names --------------------------------------------------------------------------------------

ATTENTION = {f"{name}/kernel": (12, 15) for name in "qkv"} | {"o/kernel": (15, 12)}
RELATIVE = "block/0/layer/0/SelfAttention/relative_attention_bias/embedding"


def stack_paths(name, layers, feed_forward):
    """Returns path -> shape of the parameters of the encoder or the decoder."""
    crossed = ["0/SelfAttention"] + ["1/EncDecAttention"] * (name == "decoder")
    paths = {RELATIVE: (8, 3), "final_layer_norm/scale": (12,)}
    for i in range(layers):
        for sublayer in crossed:
            for path, shape in ATTENTION.items():
                paths[f"block/{i}/layer/{sublayer}/{path}"] = shape
        for path, shape in feed_forward.items():
            paths[f"block/{i}/layer/{len(crossed)}/DenseReluDense/{path}"] = shape
        for j in range(len(crossed) + 1):
            paths[f"block/{i}/layer/{j}/layer_norm/scale"] = (12,)
    return {f"{name}/{path}": shape for path, shape in paths.items()}


PLAIN = {"wi/kernel": (12, 14), "wo/kernel": (14, 12)}
GATES = {"wi_0/kernel": (12, 14), "wi_1/kernel": (12, 14), "wo/kernel": (14, 12)}


@pytest.mark.parametrize(
    ("config", "head", "feed_forward", "head_paths"),
    [
        (TINY_T5, "conditional_generation", PLAIN, {}),
        (GATED, "conditional_generation", GATES, {"lm_head/kernel": (12, 19)}),
        (GATED, None, GATES, {}),
        (TINY_T5, "encoder", PLAIN, {}),
    ],
)
def test_parameter_paths(config, head, feed_forward, head_paths):
    module = T5(config, head=head)
    flat = {path: leaf.shape for path, leaf in flatten_dict(shapes_of(module), sep="/").items()}
    expected = {"shared/embedding": (19, 12)} | stack_paths("encoder", 2, feed_forward)
    if head != "encoder":
        expected |= stack_paths("decoder", 1, feed_forward)
    assert flat == expected | head_paths


@pytest.mark.parametrize("remat", ["off", "full"])
def test_sites_are_the_outputs_before_dropout_and_residual(remat):
    module = T5(TINY_T5, head=None, remat=remat)
    params, hits = random_params(module), []

    def silence(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        path = "/".join(context.module.path)
        for site in ("attention", "cross_attention", "feed_forward"):
            matched = re.fullmatch(T5.sites[site], path)
            if context.method_name == "__call__" and (m := matched):
                hits.append((site, path.split("/")[0], int(m["layer"]), type(context.module)))
                return jnp.zeros_like(y)
        return y

    inputs = t5_inputs(0, TINY_T5)
    with nn.intercept_methods(silence):
        output = apply(module, params, *inputs)
    expected = [
        (site, "encoder", i, nn.Dense) for site in ("attention", "feed_forward") for i in range(2)
    ]
    expected += [
        (site, "decoder", 0, nn.Dense) for site in ("attention", "cross_attention", "feed_forward")
    ]
    assert sorted(hits, key=str) == sorted(expected, key=str)
    # If every sub-layer returns zero, only the residual stream and its last norms remain.
    for side, ids, states in (
        ("encoder", inputs[0], output.encoder_last_hidden_state),
        ("decoder", inputs[2], output.last_hidden_state),
    ):
        x = np.asarray(params["shared"]["embedding"])[ids]
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        scale = params[side]["final_layer_norm"]["scale"]
        np.testing.assert_allclose(states, x * scale, atol=1e-5, rtol=0)


def test_module_is_hashable_and_compares_by_value():
    assert T5(TINY_T5) == T5(dataclasses.replace(TINY_T5))
    assert hash(T5(TINY_T5)) == hash(T5(dataclasses.replace(TINY_T5)))
    assert T5(TINY_T5) != T5(TINY_T5, head=None)
    assert "sites" not in {field.name for field in dataclasses.fields(T5)}


def test_configurations_of_their_own_accord():
    assert T5Config(num_layers=3).num_decoder_layers == 3
    assert T5Config(num_layers=3, num_decoder_layers=1).num_decoder_layers == 1
    assert T5Config(d_model=48).hidden_size == 48
    assert [T5Config(feed_forward_proj=p).is_gated for p in ("relu", "gated-relu")] == [False, True]


# --- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, r"vocab_size=0 is not positive"),
        ({"d_kv": 0}, r"d_kv=0 is not positive"),
        ({"num_decoder_layers": 0}, r"num_decoder_layers=0 is not positive"),
        ({"relative_attention_num_buckets": 2}, r"num_buckets=2 must be a multiple of 4"),
        ({"relative_attention_num_buckets": 10}, r"num_buckets=10 must be a multiple of 4.*use 32"),
        ({"relative_attention_max_distance": 4}, r"max_distance=4 must be .* half of .*=8; use 1"),
        ({"dropout_rate": 1.0}, r"dropout_rate=1.0 .* use 0 <="),
        ({"layer_norm_epsilon": 0.0}, r"layer_norm_epsilon=0.0 is not positive"),
        ({"pad_token_id": 19}, r"pad_token_id=19 .* vocab_size=19"),
        ({"decoder_start_token_id": -1}, r"decoder_start_token_id=-1 is not in the vocabulary"),
        ({"feed_forward_proj": "gelo"}, r"feed_forward_proj='gelo': unknown .* with or without"),
        ({"feed_forward_proj": "relu-gated"}, r"feed_forward_proj='relu-gated': unknown act"),
        ({"feed_forward_proj": "gated-"}, r"feed_forward_proj='gated-': unknown activation ''"),
    ],
)
def test_configurations_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY_T5, **changes)


def test_heads_that_cannot_be():
    with pytest.raises(ValueError, match=r"unknown head 'lm'; use one of .*'conditional_gen.*None"):
        T5(TINY_T5, head="lm")


IDS, MASK = np.ones((2, 5), int), np.ones((2, 5), int)
STATES = np.ones((2, 5, 12), np.float32)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((IDS[0], None, IDS), r"input_ids has shape \(5,\); it must be \[batch, length\]"),
        ((IDS[:, :0], None, IDS), r"input_ids has shape \(2, 0\), so it has no tokens"),
        ((IDS, None, IDS[:, :0]), r"decoder_input_ids has shape \(2, 0\), so it has no tokens"),
        ((IDS, None, IDS[None]), r"decoder_input_ids has shape \(1, 2, 5\); it must be"),
        ((IDS, MASK[:, :4], IDS), r"attention_mask has shape \(2, 4\); .*\(2, 5\)"),
        ((IDS, MASK, IDS, MASK[:1]), r"decoder_attention_mask has shape \(1, 5\); .*\(2, 5\)"),
        (
            (IDS, MASK.astype(np.float32), IDS),
            r"attention_mask has dtype float32; .*integers or bool",
        ),
        (
            (IDS, MASK, IDS, MASK.astype(np.float32)),
            r"decoder_attention_mask has dtype float32; .*integers or booleans",
        ),
        ((IDS, MASK), r"decoder_input_ids are missing; .*call the method `encode`"),
        ((IDS, MASK, IDS[:1]), r"decoder_input_ids has 1 rows, but the encoder's states have 2"),
    ],
)
def test_inputs_that_cannot_be(inputs, message):
    module = T5(TINY_T5)
    variables = {"params": shapes_of(module)}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.apply, variables, *inputs)


CACHE = DecoderCache(((STATES[:, None], STATES[:, None]),), ((STATES[:, None], STATES[:, None]),))


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((IDS,), {}, r"decode takes encoder_hidden_states, or a cache with the index"),
        ((IDS, STATES), {"cache": CACHE, "index": 0}, r"decode takes encoder_hidden_states, or"),
        ((IDS,), {"cache": CACHE}, r"decode takes encoder_hidden_states, or a cache with the ind"),
        ((IDS, STATES), {"index": 0}, r"decode takes encoder_hidden_states, or a cache with the"),
        ((IDS,), {"cache": CACHE, "index": 0}, r"has shape \(2, 5\); with a cache.*one token"),
        (
            (IDS[:, :1],),
            {"cache": CACHE, "index": 0, "decoder_attention_mask": MASK[:, :1]},
            r"with a cache, decode takes one token .*no decoder_attention_mask",
        ),
        ((IDS[:, :0], STATES), {}, r"decoder_input_ids has shape \(2, 0\), so it has no tokens"),
        (
            (IDS, STATES, 1.0 * MASK),
            {},
            r"attention_mask has dtype float64; .*integers or booleans",
        ),
        ((IDS, STATES, MASK[:, :4]), {}, r"attention_mask has shape \(2, 4\); .*\(2, 5\)"),
        ((IDS, STATES[:, :, 0]), {}, r"encoder_hidden_states has shape \(2, 5\); .*12\]"),
        ((IDS, STATES[..., :5]), {}, r"encoder_hidden_states has shape \(2, 5, 5\); .*12\]"),
        ((IDS, STATES[:1]), {}, r"decoder_input_ids has 2 rows, but the encoder's states have 1"),
        (
            (IDS[:1, :1],),
            {"cache": CACHE, "index": 0},
            r"decoder_input_ids has 1 rows, but the encoder's states have 2",
        ),
        (
            (IDS[:, :1], None, MASK[:, :4]),
            {"cache": CACHE, "index": 0},
            r"attention_mask has shape \(2, 4\); .*\(2, 5\)",
        ),
    ],
)
def test_calls_of_the_decoder_that_cannot_be(inputs, options, message):
    module = T5(TINY_T5)
    variables = {"params": shapes_of(module)}
    with pytest.raises(ValueError, match=message):
        module.apply(variables, *inputs, **options, method="decode")


def test_a_cache_has_room():
    module = T5(TINY_T5)
    with pytest.raises(ValueError, match=r"max_length=0 is not positive"):
        module.apply({"params": shapes_of(module)}, STATES, 0, method="start_cache")


def test_an_encoder_does_not_decode():
    module = T5(TINY_T5, head="encoder")
    variables = {"params": shapes_of(module)}
    message = r"head='encoder', which has no decoder; load a checkpoint with a decoder"
    with pytest.raises(ValueError, match=message):
        module.apply(variables, IDS, MASK, IDS)
    with pytest.raises(ValueError, match=message):
        module.apply(variables, IDS, STATES, method="decode")
    with pytest.raises(ValueError, match=message):
        module.apply(variables, STATES, 3, method="start_cache")
