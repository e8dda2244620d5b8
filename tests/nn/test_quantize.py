"""Tests frozen weights in fewer bits: storage, computation, and refused operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, path_aware_map

import compacter_jax as cj
from compacter_jax.nn import quantize
from tests.helpers import quick_jit
from tests.train.compute.test_step import make_batch, setup, text_batch
from train.compute import step
from train.compute.compute import make_compute

T5_CONFIG = cj.T5Config(
    vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0
)
BERT_CONFIG = cj.BertConfig(
    vocab_size=31,
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=44,
    max_position_embeddings=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def t5(method, **changes):
    module = cj.T5(cj.T5Config(**{**vars(T5_CONFIG), **changes}))
    params = module.init(jax.random.key(0), *module.dummy_inputs())["params"]
    model, backbone = cj.Adapted(module, method), cj.Backbone(module, params, None, "random")
    params = felt(cj.init_adapters(model, backbone, jax.random.key(1)))
    return model, params, cj.label_params(params, method)


def bert(method):
    model, params, labels = setup(method, config=BERT_CONFIG)
    return model, felt(params), labels


def felt(params):
    """Returns the parameters with adapters that have an effect, since many start at zero."""
    generator = np.random.default_rng(0)

    def change(path, leaf):
        noise = generator.normal(0, 0.1, leaf.shape).astype(np.float32)
        return leaf + noise if "adapter" in path else leaf

    return path_aware_map(change, params)


def cast(params, labels, dtype):
    trained, frozen = cj.partition(params, labels)
    return cj.merge(trained, cj.cast_frozen(frozen, dtype))


def dequantized(params):
    is_leaf = quantize.is_quantized
    return jax.tree.map(
        lambda leaf: leaf.dequantized() if is_leaf(leaf) else leaf, params, is_leaf=is_leaf
    )


PLUS_PLUS = cj.preset("compacter++", reduction_factor=2)
BERT = (bert, ("input_ids", "attention_mask", "token_type_ids"), "classification", make_batch())
T5 = (t5, ("input_ids", "attention_mask", "decoder_input_ids"), "tokens", text_batch())
UNTIED = (functools.partial(t5, tie_word_embeddings=False), *T5[1:])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("of", [np.asarray, jnp.asarray], ids=["NumPy", "JAX"])
def test_quantized_values_are_the_nearest(axis, of):
    weight = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    weight[:, 2] = weight[3] = 0
    quantized = quantize.quantize(of(weight), axis)
    largest = np.abs(weight).max(axis, keepdims=True)
    scale = np.where(largest == 0, 1, largest / np.float32(127))
    np.testing.assert_allclose(quantized.scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(quantized.values, np.rint(weight / np.asarray(quantized.scale)))
    assert (quantized.values.dtype, quantized.scale.dtype) == (jnp.int8, jnp.float32)
    error = np.abs(np.float64(quantized.values) * quantized.scale - weight)
    assert np.all(error <= np.float64(quantized.scale) * (0.5 + 1e-5))
    assert (quantized.shape, quantized.ndim, quantized.size) == ((7, 5), 2, 35)


@pytest.mark.parametrize(
    ("make", "inputs", "loss", "batch"), [BERT, T5, UNTIED], ids=["bert", "t5", "t5 untied"]
)
@pytest.mark.contract
def test_int8_computes_with_the_dequantised_weights(make, inputs, loss, batch):
    model, params, labels = make(PLUS_PLUS)
    trained, frozen = cj.partition(cast(params, labels, jnp.int8), labels)
    apply, loss = step.apply_function(model, inputs), step.loss_function(loss)

    def outcome(trained, frozen):
        logits = apply(cj.merge(trained, frozen), batch, None)
        return loss(logits, batch["labels"]).mean(), logits

    run = quick_jit(jax.value_and_grad(outcome, has_aux=True))
    (value, logits), gradient = run(trained, frozen)
    (expected, wanted), wanted_gradient = run(trained, dequantized(frozen))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(logits, wanted, atol=2e-5 * np.abs(wanted).max(), rtol=0)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max() + 1e-7, rtol=0)
    whole = run(trained, cj.partition(params, labels)[1])[0][1]
    assert 0 < np.abs(logits - whole).max() < 0.1 * np.abs(whole).max()


def test_masked_language_model_of_int8():
    module = cj.Bert(BERT_CONFIG, head="masked_lm")
    params = module.init(jax.random.key(0), *module.dummy_inputs())["params"]
    frozen = cj.cast_frozen(params, jnp.int8)
    ids = make_batch()["input_ids"]
    logits, expected = (module.apply({"params": p}, ids) for p in (frozen, dequantized(frozen)))
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_what_int8_is_for():
    _, params, labels = bert(cj.preset("compacter", reduction_factor=2, learn_phm=False))
    frozen = flatten_dict(cj.cast_frozen(cj.partition(params, labels)[1], "int8"), sep="/")
    quantized = {path for path, leaf in frozen.items() if quantize.is_quantized(leaf)}
    kernels = {
        path for path, leaf in frozen.items() if path.endswith("kernel") and leaf is not None
    }
    assert quantized == kernels | {"embeddings/word_embeddings/embedding"}
    assert len(kernels) == 7  # including that of the pooler
    assert frozen["phm_rule"].dtype == jnp.float32
    assert cj.count(params, labels) == cj.count(cast(params, labels, "int8"), labels)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize(
    "where", [{"devices": jax.devices()}, {"mesh": "data=2,model=2"}], ids=["pmap", "mesh"]
)
def test_several_devices_give_what_one_gives(dtype, where):
    model, params, labels = bert(PLUS_PLUS)
    trained, frozen = cj.partition(params, labels)
    frozen = cj.cast_frozen(frozen, dtype)

    def run(**where):
        made = make_compute(
            step.apply_function(model),
            step.loss_function("classification"),
            cj.optimizer(optax.sgd(0.1), labels),
            seed=0,
            **where,
        )
        state, metrics = made.step(made.init_state(trained), made.place(frozen), make_batch())
        assert {leaf.dtype for leaf in jax.tree.leaves(state.trained)} == {jnp.dtype("float32")}
        return float(metrics.loss), float(metrics.gradient_norm)

    np.testing.assert_allclose(run(**where), run(devices=jax.devices()[:1]), rtol=2e-5)


@pytest.mark.parametrize("name", cj.presets())
def test_every_method_trains_float32_on_narrow_weights(name):
    config = cj.BertConfig(num_hidden_layers=6 if name == "adapterdrop" else 1)
    module = cj.Bert(config, head="sequence_classification", num_labels=3, dtype=jnp.bfloat16)
    model = cj.Adapted(module, cj.preset(name))
    params = jax.eval_shape(model.init, jax.random.key(0), *module.dummy_inputs())["params"]
    trained, frozen = cj.partition(params, cj.label_params(params, model.method))

    def gradient(trained, frozen, dtype):
        frozen = cj.cast_frozen(frozen, dtype)

        def loss(trained):
            logits = step.apply_function(model)(cj.merge(trained, frozen), make_batch(), None)
            return jnp.mean(logits.astype(jnp.float32)), logits

        return jax.grad(loss, has_aux=True)(trained)

    def shapes(dtype):
        return jax.eval_shape(functools.partial(gradient, dtype=dtype), trained, frozen)

    of_trained, logits = shapes(jnp.bfloat16)
    assert logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(of_trained)} == {jnp.dtype("float32")}
    if isinstance(model.method, cj.FullFineTuningConfig):
        with pytest.raises(ValueError, match="no kernel is frozen, so int8 stores nothing"):
            shapes(jnp.int8)
    elif isinstance(model.method, cj.IntrinsicConfig):
        with pytest.raises(ValueError, match="intrinsic dimension needs the backbone's original"):
            shapes(jnp.int8)
    else:
        assert shapes(jnp.int8) == (of_trained, logits)


def test_intrinsic_dimension_moves_bfloat16_weights_in_float32():
    model, params, labels = bert(cj.preset("intrinsic-said", dimension=8))
    params = {**params, "intrinsic_vector": params["intrinsic_vector"] + 1e-3}
    narrow = cast(params, labels, jnp.bfloat16)
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    run = quick_jit(lambda params: model.apply({"params": params}, make_batch()["input_ids"]))
    np.testing.assert_allclose(run(narrow), run(widened), rtol=1e-6, atol=1e-8)
    still = {**narrow, "intrinsic_vector": 0 * params["intrinsic_vector"]}
    assert np.any(run(narrow) != run(still))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_generation_keeps_lora_apart_from_narrow_kernels(dtype):
    model, params, labels = t5(cj.preset("lora", rank=2))
    narrow = cast(params, labels, dtype)
    assert model.precomputed(narrow) == (model, narrow)
    generate = functools.partial(
        cj.generate,
        model,
        input_ids=text_batch()["input_ids"],
        max_new_tokens=3,
        eos_token_id=1,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), dequantized(narrow))
    np.testing.assert_array_equal(generate(params=narrow), generate(params=wide))


def test_adapters_of_bfloat16_backbones_fit_float32_ones(tmp_path):
    model, params, labels = bert(PLUS_PLUS)
    cj.save_adapter(tmp_path, model, cast(params, labels, jnp.bfloat16))
    own = {name: params[name] for name in ("embeddings", "encoder", "pooler", "classifier")}
    backbone = cj.Backbone(model.backbone, without_adapters(own), None, "random")
    _, loaded = cj.load_adapter(tmp_path, backbone)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def without_adapters(params):
    return {
        name: without_adapters(child) if isinstance(child, dict) else child
        for name, child in params.items()
        if name != "adapter"
    }


def test_what_int8_cannot_do(tmp_path):
    model, params, labels = bert(cj.preset("lora", rank=2))
    narrow = cast(params, labels, jnp.int8)
    with pytest.raises(
        ValueError, match="merging an adapter needs the backbone's original weights"
    ):
        cj.merge_adapter(model, narrow)
    with pytest.raises(ValueError, match=r"saving an adapter needs .* from before cast_frozen"):
        cj.save_adapter(tmp_path, model, narrow)
    with pytest.raises(ValueError, match="a floating-point type or int8, not int16"):
        cj.cast_frozen(params, jnp.int16)
