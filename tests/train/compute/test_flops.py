import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compacter_jax as cj
from train.compute import flops, program, step

B, L, T = 4, 32, 8
BERT = cj.BertConfig(
    vocab_size=31,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=L,
)
T5 = cj.T5Config(vocab_size=48, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
DECODER_INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")


def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def bert_step(method, **attributes):
    """Returns a tiny BERT, its inputs, loss and batch."""
    module = cj.Bert(BERT, head="sequence_classification", **attributes)
    batch = {name: integers(B, L) for name in ENCODER_INPUTS}
    batch |= {"labels": integers(B), "weights": jax.ShapeDtypeStruct((B,), jnp.float32)}
    return cj.Adapted(module, method), ENCODER_INPUTS, step.loss_function("classification"), batch


def t5_step(method, **attributes):
    module = cj.T5(T5, **attributes)
    batch = {name: integers(B, L) for name in DECODER_INPUTS[:2]}
    batch |= {"decoder_input_ids": integers(B, T), "labels": integers(B, T)}
    batch |= {"weights": jax.ShapeDtypeStruct((B,), jnp.float32)}
    return cj.Adapted(module, method), DECODER_INPUTS, step.loss_function("tokens"), batch


def speech_step(method):
    """Returns a tiny Speech2Text, whose convolutions are half of its work, as `bert_step`."""
    config = cj.SpeechToTextConfig(
        **{"vocab_size": 48, "d_model": 64, "conv_channels": 128, "decoder_layers": 1},
        **{"encoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
        **{"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "input_feat_per_channel": 20},
    )
    features = jax.ShapeDtypeStruct((B, 4 * L, 20), jnp.float32)
    batch = {"input_features": features, "attention_mask": integers(B, 4 * L)}
    batch |= {"decoder_input_ids": integers(B, T), "labels": integers(B, T)}
    batch |= {"weights": jax.ShapeDtypeStruct((B,), jnp.float32)}
    names = ("input_features", *DECODER_INPUTS[1:])
    return cj.Adapted(cj.SpeechToText(config), method), names, step.loss_function("tokens"), batch


def halves(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.backbone.dummy_inputs())["params"]
    return shapes, cj.label_params(shapes, model.method)


def traced(model, inputs, loss, batch):
    parts = cj.partition(*halves(model))
    return program.gradient_program(step.apply_function(model, inputs), loss, *parts, batch)


# Tokens whose states are computed: all, but in a classifier's last layer only the first.
TOKENS = (BERT.num_hidden_layers - 1) * B * L + B


def bert_layers():
    """Counts the forward FLOPs of BERT's layers by hand: projections, attention, feed-forward."""
    d, ff = BERT.hidden_size, BERT.intermediate_size
    keys_and_values = BERT.num_hidden_layers * 2 * B * L * 2 * d * d
    return keys_and_values + 2 * TOKENS * (2 * d * d + 2 * L * d + 2 * d * ff)


def test_full_fine_tuning_of_bert_by_hand():
    d = BERT.hidden_size
    forward = bert_layers() + 2 * B * (d * d + 2 * d)  # pooler and classifier
    # In the backward pass each product has two gradients; the embeddings are no product.
    assert flops.of_step(traced(*bert_step(cj.preset("full")))) == 3 * forward


def test_an_adapter_needs_no_gradients_of_frozen_weights_by_hand():
    d, r = BERT.hidden_size, BERT.hidden_size // 32
    # Trains the layer norm of the embeddings, which is below all layers.
    method = cj.preset("houlsby")
    bottlenecks = 2 * (2 * TOKENS * 2 * d * r)
    attention = 2 * TOKENS * 2 * L * d
    # Attention multiplies activations, so both gradients are needed. The pooler is frozen.
    head, pooler = 2 * B * 2 * d, 2 * B * d * d
    expected = 2 * bert_layers() + attention + 3 * bottlenecks + 3 * head + 2 * pooler
    assert flops.of_step(traced(*bert_step(method))) == expected


def test_nothing_below_the_lowest_trained_parameter_is_differentiated():
    whole, without_norms = (
        flops.of_step(traced(*bert_step(cj.preset("houlsby", train_layer_norms=trains))))
        for trains in (True, False)
    )
    d, r = BERT.hidden_size, BERT.hidden_size // 32
    # The part below the first adapter: its input projection, four projections, and attention.
    assert whole - without_norms == 2 * B * L * (d * r + 4 * d * d + 2 * 2 * L * d)


def test_full_fine_tuning_of_t5_by_hand():
    d, ff, inner = T5.d_model, T5.d_ff, T5.num_heads * T5.d_kv
    encoder = T5.num_layers * 2 * B * L * (4 * d * inner + 2 * L * inner + 2 * d * ff)
    own = 4 * d * inner + 2 * T * inner
    crossed = 2 * d * inner + 2 * L * inner
    decoder = T5.num_layers * 2 * B * (T * (own + crossed + 2 * d * ff) + L * 2 * d * inner)
    logits = 2 * B * T * d * T5.vocab_size
    expected = 3 * (encoder + decoder + logits)
    assert flops.of_step(traced(*t5_step(cj.preset("full")))) == expected


@pytest.mark.parametrize("make", [bert_step, t5_step, speech_step])
@pytest.mark.parametrize("method", ["full", "compacter++"])
def test_xla_counts_as_much(make, method):
    overrides = {"reduction_factor": 8} if method == "compacter++" else {}
    model, inputs, loss, batch = make(cj.preset(method, **overrides))
    trained, frozen = cj.partition(*halves(model))

    def run(trained, frozen, batch):
        def total(trained):
            key = jax.random.key(0)
            logits = step.apply_function(model, inputs)(cj.merge(trained, frozen), batch, key)
            return jnp.sum(loss(logits, batch["labels"]) * batch["weights"])

        return jax.value_and_grad(total)(trained)

    compiled = jax.jit(run).lower(trained, frozen, batch).compile()
    counted = flops.of_step(traced(model, inputs, loss, batch))
    # XLA also counts elementwise operations, whose share is larger in a narrow model.
    assert 0.75 * compiled.cost_analysis()["flops"] < counted <= compiled.cost_analysis()["flops"]


def test_sizes_of_products():
    def function(x, weight, keys):
        return jnp.einsum("bqd,bkd->bqk", jnp.tanh(x @ weight), keys)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 5, 3), (3, 7), (2, 4, 7))]
    made = program.traced(function, *shapes)
    sizes = [operation.product for operation in made.operations]
    assert [size for size in sizes if size is not None] == [(1, 10, 3, 7), (2, 5, 7, 4)]
    assert flops.of_step(made) == 2 * (10 * 3 * 7 + 2 * 5 * 7 * 4)


@pytest.mark.parametrize(
    ("size", "window", "channels", "options"),
    [
        ((17,), (5,), (6, 8), {"window_strides": (2,), "padding": [(2, 2)]}),
        ((18,), (3,), (4, 8), {"padding": [(0, 3)], "rhs_dilation": (3,)}),
        ((7,), (4,), (4, 6), {"padding": [(3, 1)], "lhs_dilation": (2,)}),
        ((9, 6), (3, 2), (4, 8), {"window_strides": (2, 1), "padding": [(1, 1), (0, 1)]}),
        ((11,), (3,), (6, 9), {"padding": [(1, 1)], "feature_group_count": 3}),
    ],
)
def test_convolutions_count_as_xla_counts_them(size, window, channels, options):
    """Strides, padding, holes and groups, in the forward pass and in both gradients."""
    (inputs, outputs), groups = channels, options.get("feature_group_count", 1)
    x = jax.ShapeDtypeStruct((2, *size, inputs), jnp.float32)
    kernel = jax.ShapeDtypeStruct((*window, inputs // groups, outputs), jnp.float32)
    layout = ("NWC", "WIO", "NWC") if len(size) == 1 else ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1,) * len(size), **options}
    forward = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=layout, **options)
    of_x = lambda x, kernel, y: jax.vjp(lambda x: forward(x, kernel), x)[1](y)  # noqa: E731
    of_kernel = lambda x, kernel, y: jax.vjp(lambda w: forward(x, w), kernel)[1](y)  # noqa: E731
    y = jax.eval_shape(forward, x, kernel)
    for function, arguments in (
        (forward, (x, kernel)),
        (of_x, (x, kernel, y)),
        (of_kernel, (x, kernel, y)),
    ):
        lowered = jax.jit(function).lower(*arguments)
        counted = flops.of_step(program.traced(function, *arguments))
        assert counted == lowered.cost_analysis()["flops"] > 0


@pytest.mark.contract
def test_rounds_of_a_loop_count():
    def loss(logits, labels):
        weight = jnp.ones((3, 3))
        return jax.lax.scan(lambda x, _: (x @ weight, None), logits, length=5)[0].sum(-1)

    apply = lambda params, batch, key: batch["x"] * params["scale"]  # noqa: E731
    batch = {"x": jnp.ones((2, 3)), "labels": jnp.zeros(2), "weights": jnp.ones(2)}
    made = program.gradient_program(apply, loss, {"scale": jnp.ones(3)}, {"scale": None}, batch)
    assert flops.of_step(made) == 2 * 5 * (2 * 2 * 3 * 3)


def apply_of(inputs):
    return functools.partial(step.apply_function, inputs=inputs)


def test_recomputation_is_not_counted_as_utilisation():
    found = {}
    for remat in ("off", "full"):
        model, inputs, loss, batch = bert_step(cj.preset("compacter++", reduction_factor=8))
        model = model.clone(backbone=model.backbone.clone(remat=remat))
        meter = flops.Meter(model, apply_of(inputs), loss, *halves(model), peak=1e9, devices=2)
        found[remat] = meter.utilisation(batch, 0.5)
        assert flops.of_step(traced(model, inputs, loss, batch)) >= found[remat] * 1e9
    assert found["full"] == found["off"]
    assert flops.of_step(traced(*bert_step(model.method))) == found["full"] * 2 * 0.5 * 1e9


def test_utilisation_needs_a_peak():
    model, inputs, loss, batch = bert_step(cj.preset("compacter++", reduction_factor=8))
    meter = flops.Meter(model, apply_of(inputs), loss, *halves(model), peak=None, devices=1)
    assert meter.utilisation(batch, 1.0) is None


def test_peaks_of_known_devices():
    assert flops.peak("cpu", "float32") is None
    assert flops.peak("Tesla T4", "bfloat16") is None
    assert flops.peak("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    for kind in flops.known_devices():
        assert flops.peak(kind, "float32") is not None
    np.testing.assert_array_less(0, [flops.peak(k, "float32") for k in flops.known_devices()])
