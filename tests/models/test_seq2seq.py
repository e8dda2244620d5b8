"""Compares M2M-100, mBART, BART and Marian with transformers' PyTorch models."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.models.names import SEQ2SEQ
from compacter_jax.models.seq2seq.checkpoint import seq2seq_to_hugging_face
from compacter_jax.models.seq2seq.model import Seq2Seq
from compacter_jax.models.seq2seq.positions import m2m_positions, m2m_table, marian_table
from compacter_jax.nn.quantize import is_quantized
from compacter_jax.paths import group_of, own_names
from tests.helpers import (
    IDS,
    MASK,
    ONE_LAYER,
    TINY_T5,
    adapted_shapes,
    mean_square,
    quick_jit,
    random_tree,
    t5_inputs,
)
from tests.reference import Reference
from tests.seq2seq_models import (
    CONFIGS,
    UNSHARED,
    inputs_of,
    small_backbone,
    tiny,
    torch_model,
    torch_outputs,
)
from train.compute import mesh


def loss_and_gradient(module, params, *inputs):
    """Returns `output, gradient` of the mean square."""

    def loss(params):
        output = module.apply({"params": params}, *inputs)
        return mean_square(jax.tree.leaves(output)), output

    (_, output), gradient = quick_jit(jax.value_and_grad(loss, has_aux=True))(params)
    return output, gradient


def exact_sinusoids(model, config):
    """Replaces the sinusoids of PyTorch's model, which are rounded to float32, by exact ones.

    They are a formula of their own here, by the definitions of the two papers.
    """
    import torch

    width, count = config.d_model, config.max_position_embeddings + 4
    if config.model_type == "m2m_100":
        half = width // 2
        table = torch.zeros(count, width, dtype=torch.float64)
        for i in range(count):
            for k in range(half):
                w = math.exp(-k * math.log(10_000) / (half - 1))
                table[i, k], table[i, half + k] = math.sin(i * w), math.cos(i * w)
        table[config.pad_token_id] = 0
        for stack in (model.get_encoder(), model.get_decoder()):
            stack.embed_positions.weights = table
    elif config.model_type == "marian":
        rows = range(config.max_position_embeddings)
        sines, cosines = (
            [[of(i / 10_000 ** (2 * k / width)) for k in range(width // 2)] for i in rows]
            for of in (math.sin, math.cos)
        )
        table = torch.cat([torch.tensor(t, dtype=torch.float64) for t in (sines, cosines)], 1)
        for stack in (model.get_encoder(), model.get_decoder()):
            stack.embed_positions.weight.data = table


def check_against_torch(backbone, inputs, tolerance, *, exact=False):
    module, params = backbone.module, backbone.params
    model = torch_model(backbone)
    if exact:
        exact_sinusoids(model.double(), module.config)
    theirs = torch_outputs(model, inputs)
    mean_square(theirs).backward()
    output, gradient = loss_and_gradient(module, params, *inputs)
    for ours, expected in zip(jax.tree.leaves(output), theirs, strict=True):
        states = expected.detach().numpy()
        assert ours.dtype == states.dtype
        np.testing.assert_allclose(ours, states, atol=tolerance * np.abs(states).max(), rtol=0)
    named = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    gradient = seq2seq_to_hugging_face(gradient, module.head)
    # A buffer in PyTorch.
    copies = {f"model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
    assert gradient.keys() - named.keys() <= {"final_logits_bias", *copies}
    assert named.keys() <= gradient.keys()
    largest = max(np.abs(leaf).max() for leaf in named.values())
    for name, leaf in named.items():
        scale = np.abs(leaf).max()
        if name.endswith("k_proj.bias"):  # the softmax ignores it
            scale = largest
        np.testing.assert_allclose(
            gradient[name], leaf, atol=tolerance * scale, rtol=0, err_msg=name
        )


WIDE = {
    "d_model": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 8,
}
GELU = {"activation_function": "gelu"}
SWISH = {"activation_function": "swish"}
# In both dtypes all types, shared and unshared, have logits, and there are both widths, one to
# three layers, and odd and even lengths of both stacks.
CASES = {
    "float64": {
        "m2m_100": (WIDE, (9, 7)),
        "mbart": (GELU | {"encoder_layers": 3}, (5, 8)),
        "bart": (GELU | WIDE | {"decoder_layers": 2, "scale_embedding": False}, (13, 11)),
        "marian": (SWISH, (10, 9)),
        "unshared marian": (UNSHARED | WIDE, (7, 5)),
    },
    "float32": {
        "m2m_100": ({"decoder_layers": 3, "tie_word_embeddings": False}, (13, 11)),
        "mbart": (GELU | WIDE, (7, 9)),
        "bart": (GELU | {"encoder_layers": 2, "scale_embedding": False}, (11, 6)),
        "marian": (SWISH | WIDE | {"encoder_layers": 2}, (9, 13)),
        "unshared marian": (UNSHARED, (8, 5)),
    },
}


def config_of(name, changes):
    return tiny(name.removeprefix("unshared "), **changes)


@pytest.mark.parametrize("name", CASES["float64"])
def test_logits_and_gradients_equal_pytorch_in_float64(name):
    """Logits and all gradients are PyTorch's to 1e-10 in float64."""
    changes, lengths = CASES["float64"][name]
    with jax.enable_x64(True):
        backbone = small_backbone(config_of(name, changes))
        backbone.module = backbone.module.clone(param_dtype=jnp.float64)
        backbone.params = jax.tree.map(lambda x: np.asarray(x, np.float64), backbone.params)
        inputs = inputs_of(backbone.module.config, 1, lengths)
        check_against_torch(backbone, inputs, 1e-10, exact=True)


@pytest.mark.parametrize("name", CASES["float32"])
def test_logits_and_gradients_equal_pytorch_in_float32(name):
    """Logits and all gradients are PyTorch's to 1e-5 in float32."""
    changes, lengths = CASES["float32"][name]
    backbone = small_backbone(config_of(name, changes), seed=2)
    # Random kernels of these widths would make scores large, and their rounding with them.
    flat = flatten_dict(backbone.params, sep="/")
    flat = {path: leaf * 0.4 if path.endswith("kernel") else leaf for path, leaf in flat.items()}
    backbone.params = unflatten_dict(flat, sep="/")
    check_against_torch(backbone, inputs_of(backbone.module.config, 2, lengths), 1e-5)


def test_states_equal_pytorch_without_a_head():
    """States of both stacks and all gradients are PyTorch's to 1e-5 where there are no logits."""
    backbone = small_backbone(CONFIGS["bart"], None, seed=3)
    check_against_torch(backbone, inputs_of(backbone.module.config, 3), 1e-5)


# --- positions ----------------------------------------------------------------------------------


def test_positions_of_m2m_100_follow_the_definition():
    """Token j of a row that is not padding has the position p + j, and padding has zeros."""
    ids, pad, width = jnp.array([[1, 1, 7, 8, 1, 9], [5, 6, 7, 1, 1, 1]]), 1, 9
    actual = m2m_positions(ids, width, pad, None, None, jnp.float32)
    expected = np.zeros((2, 6, width))
    for row, count in enumerate(([0, 0, 1, 2, 0, 3], [1, 2, 3, 0, 0, 0])):
        for place, j in enumerate(count):
            for k in range(4 if j else 0):
                angle = (pad + j) * math.exp(-k * math.log(10_000) / 3)
                expected[row, place, [k, 4 + k]] = math.sin(angle), math.cos(angle)
    np.testing.assert_allclose(actual, expected, atol=1e-7)
    one = m2m_positions(ids[:1, 2:3], width, pad, jnp.int32(1), 4, jnp.float32)
    np.testing.assert_array_equal(one[0, 0], actual[0, 3])


@pytest.mark.parametrize("width", [24, 27])
def test_sinusoids_equal_those_of_transformers(width):
    """Marian's are equal bit for bit; those of M2M-100 differ by its float32 angles."""
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("transformers.models")
    marian = models.marian.modeling_marian.MarianSinusoidalPositionalEmbedding(40, width)
    marian._init_weight()
    np.testing.assert_array_equal(np.float32(marian_table(40, width)), marian.weight.numpy())
    of_m2m = models.m2m_100.modeling_m2m_100.M2M100SinusoidalPositionalEmbedding
    theirs = of_m2m.get_embedding(42, width, 1).numpy()
    assert theirs.dtype == np.float32
    assert torch.get_default_dtype() == torch.float32
    np.testing.assert_allclose(m2m_table(2, 40, width), theirs[2:], atol=4e-6)


@pytest.mark.parametrize("name", ["bart", "marian"])
def test_longer_inputs_than_positions_are_refused(name):
    """Learned positions and those of Marian end, in a call and in a cache; M2M-100's do not."""
    module, inputs = Seq2Seq(CONFIGS[name]), inputs_of(CONFIGS[name], 0, (20, 7))
    with pytest.raises(
        ValueError, match=r"input_ids is 20 tokens long, .*max_position_embeddings=19"
    ):
        module.init(jax.random.key(0), *inputs)
    with pytest.raises(ValueError, match="a cache is 20 tokens long"):
        module.init(jax.random.key(0), jnp.ones((1, 3, 24)), 20, method="start_cache")
    unlimited = Seq2Seq(CONFIGS["m2m_100"])
    jax.eval_shape(unlimited.init, jax.random.key(0), *inputs_of(CONFIGS["m2m_100"], 0, (30, 25)))


# --- training -----------------------------------------------------------------------------------


def test_layers_are_not_dropped_in_training():
    """LayerDrop has no effect without dropout, and is refused with it."""
    config = tiny("m2m_100", decoder_layerdrop=0.05)
    module, inputs = Seq2Seq(config), inputs_of(config, 0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    assert jax.eval_shape(module.apply, shapes, *inputs).shape == (3, 7, 23)
    with pytest.raises(ValueError, match=r"decoder_layerdrop=0.05: training with LayerDrop is not"):
        module.apply(shapes, *inputs, deterministic=False)


def test_dropout_is_where_transformers_has_it(monkeypatch):
    """Rates and shapes of all dropouts are those that PyTorch's model has in training."""
    torch = pytest.importorskip("torch")
    rates = {"dropout": 0.25, "attention_dropout": 0.5, "activation_dropout": 0.125}
    config = tiny("bart", **rates)
    inputs = inputs_of(config, 0)
    model, theirs = torch_model(small_backbone(config)).train(), []

    def counted(x, p=0.5, training=True, inplace=False):
        theirs.append((tuple(x.shape), p))
        return x

    monkeypatch.setattr(torch.nn.functional, "dropout", counted)
    torch_outputs(model, inputs)
    ours = []

    def watch(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
            ours.append((args[0].shape, context.module.rate))
        return next_fun(*args, **kwargs)

    module = Seq2Seq(config)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    with nn.intercept_methods(watch):
        jax.eval_shape(
            lambda p: module.apply(
                p, *inputs, deterministic=False, rngs={"dropout": jax.random.key(0)}
            ),
            shapes,
        )
    assert ours == theirs


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_finds_the_same_sites(remat):
    """Adapters in recomputed layers have the same parameters."""
    beside = cj.BottleneckConfig(
        sites=("parallel_feed_forward",), parallel=True, reduction_factor=2
    )
    after = cj.BottleneckConfig(
        sites=("residual_feed_forward", "encoder_embedding"), reduction_factor=2
    )
    method = cj.CombinedConfig(parts=(beside, after))
    module = Seq2Seq(CONFIGS["bart"])
    plain = adapted_shapes(cj.Adapted(module, method))
    again = adapted_shapes(cj.Adapted(module.clone(remat=remat), method))
    assert jax.tree.structure(plain) == jax.tree.structure(again)


# --- sites --------------------------------------------------------------------------------------

EMBEDDINGS = ("encoder_embedding", "decoder_embedding")
BESIDE = ("parallel_attention", "parallel_cross_attention", "parallel_feed_forward")
AT_EMBEDDINGS = cj.BottleneckConfig(
    sites=EMBEDDINGS, reduction_factor=2, layer_norm_before=True, non_linearity="relu"
)
EVERYWHERE = cj.CombinedConfig(
    parts=(AT_EMBEDDINGS, AT_EMBEDDINGS.replace(sites=BESIDE, parallel=True))
)
MODULES = {
    "m2m_100": Seq2Seq(CONFIGS["m2m_100"]),
    "bart": Seq2Seq(CONFIGS["bart"]),
    "t5": cj.T5(dataclasses.replace(TINY_T5, num_layers=1)),
    "bert": cj.Bert(ONE_LAYER, head="sequence_classification", num_labels=3),
}


def inputs_for(module):
    if isinstance(module, cj.Bert):
        return IDS, MASK
    if isinstance(module, cj.T5):
        return tuple(t5_inputs(0, module.config, length=7)[:3])
    return tuple(inputs_of(module.config, 4)[:3])


@pytest.mark.parametrize("name", MODULES)
def test_adapters_at_embeddings_and_beside_sub_layers_equal_numpy(name):
    """Logits of every backbone are those of the equations to 1e-12 in float64."""
    module = MODULES[name].clone(param_dtype=jnp.float64)
    sites = EMBEDDINGS[:1] if name == "bert" else EMBEDDINGS
    method = AT_EMBEDDINGS.replace(sites=sites)
    if isinstance(module, Seq2Seq):
        method = EVERYWHERE
    with jax.enable_x64(True):
        model = cj.Adapted(module, method)
        params = random_tree(adapted_shapes(model), seed=9)
        inputs = inputs_for(module)
        logits = quick_jit(lambda p: model.apply({"params": p}, *inputs))(params)
        assert logits.dtype == jnp.float64
        expected = Reference(module, method, params)(*inputs)
    np.testing.assert_allclose(logits, expected, atol=1e-12 * np.abs(expected).max(), rtol=0)


def test_what_cannot_act_at_embeddings():
    """Parallel adapters, adapters that read a residual, and LoRA are refused at embeddings."""
    for name in ("m2m_100", "t5", "bert"):
        with pytest.raises(ValueError, match="parallel=True at site 'encoder_embedding'"):
            cj.Adapted(MODULES[name], AT_EMBEDDINGS.replace(sites=EMBEDDINGS[:1], parallel=True))
    moved = AT_EMBEDDINGS.replace(original_ln_before=True)
    with pytest.raises(ValueError, match="which site 'encoder_embedding' does not have; leave"):
        cj.Adapted(MODULES["m2m_100"], moved)
    with pytest.raises(ValueError, match="'lora' cannot act at site 'encoder_embedding', whose ro"):
        cj.Adapted(MODULES["m2m_100"], cj.LoRAConfig(sites=EMBEDDINGS))
    with pytest.raises(ValueError, match="unknown site 'decoder_embedding'; Bert has"):
        cj.Adapted(MODULES["bert"], AT_EMBEDDINGS.replace(sites=EMBEDDINGS[1:]))


def test_prompts_from_the_vocabulary_are_scaled_as_tokens_are():
    """A prompt of tokens equals their embeddings where the encoder reads them."""
    ours = small_backbone(CONFIGS["m2m_100"])
    method = cj.preset("prompt-tuning-vocabulary", prompt_length=2, prompt_token_ids=(5, 7))
    model = cj.Adapted(ours.module, method)
    params = cj.init_adapters(model, ours, jax.random.key(0))
    table = np.asarray(ours.params["shared"]["embedding"])
    expected = np.sqrt(24) * table[[5, 7]]
    np.testing.assert_allclose(params["adapter"]["prompt"], expected, rtol=1e-6)


def test_dropout_inside_of_a_bottleneck():
    """`inner_dropout` drops entries between activation and `up`, and nothing without dropout."""
    config = cj.BottleneckConfig(reduction_factor=1, inner_dropout=0.5, non_linearity="linear")
    layer = cj.Bottleneck(config)
    x = jnp.ones((1, 64))
    params = {name: {"kernel": jnp.eye(64), "bias": jnp.zeros(64)} for name in ("down", "up")}
    rngs = {"dropout": jax.random.key(0)}
    y = layer.apply({"params": params}, x, deterministic=False, rngs=rngs)
    assert set(np.unique(y)) == {1.0, 3.0}
    np.testing.assert_array_equal(layer.apply({"params": params}, x), 2.0)
    with pytest.raises(ValueError, match=r"inner_dropout=1.0 must be in \[0, 1\)"):
        config.replace(inner_dropout=1.0)


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_variant_has_the_names_of_the_family(name):
    """Norms, kernels and embeddings of all types are found, divided over a mesh and quantised."""
    ours = small_backbone(CONFIGS[name])
    flat = flatten_dict(ours.params, sep="/")
    assert own_names(list(flat)) is SEQ2SEQ
    for path in flat:
        assert (group_of(path) == "layer norms") == ("norm" in path.split("/")[-2]), path
    sizes = {"data": 2, "model": 2}
    for path in (*SEQ2SEQ.more_embeddings, SEQ2SEQ.embeddings, "encoder/layers/0/fc1/kernel"):
        if path in flat:
            shape = (4096, 4096)
            assert set(mesh.spec_of(path, shape, sizes)) == {mesh.DATA, mesh.MODEL}, path
    small = flatten_dict(cj.cast_frozen(ours.params, "int8"), sep="/")
    for path, leaf in small.items():
        is_table = path in (*SEQ2SEQ.more_embeddings, SEQ2SEQ.embeddings)
        assert is_quantized(leaf) == (is_table or path.endswith("kernel")), path
