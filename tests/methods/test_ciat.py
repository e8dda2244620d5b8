"""Tests CIAT and its relatives: their start, count, equations, shared rule, and merging."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.models.families import family_of_module
from compacter_jax.models.seq2seq.model import Seq2Seq
from tests.helpers import ONE_LAYER, TINY_T5, adapted_shapes, quick_jit, quick_key, random_tree
from tests.reference import Reference
from tests.seq2seq_models import CONFIGS, inputs_of, small_backbone, tiny, torch_config
from train.__main__ import _parsed, main

NAMES = ("ciat", "compacter-ciat", "serial-ciat")
RELU = tiny("m2m_100", encoder_layers=2, encoder_ffn_dim=14, decoder_ffn_dim=10)
T5 = cj.T5(dataclasses.replace(TINY_T5, num_layers=1))


def preset(name, **overrides):
    return cj.preset(name, **({"phm_dim": 3} if name.startswith("compacter") else {}), **overrides)


def drawn_beside(backbone, method, seed=2):
    """Returns a model, and the backbone's parameters with random adapters beside them."""
    model = cj.Adapted(backbone.module, method, param_dtype=backbone.module.param_dtype)
    drawn = flatten_dict(random_tree(adapted_shapes(model), seed=seed))
    return model, unflatten_dict({**drawn, **flatten_dict(backbone.params)})


@functools.cache
def relu_backbone():
    return small_backbone(RELU)


def logits_of(model, params, inputs):
    return quick_jit(lambda p: model.apply({"params": p}, *inputs))(params)


# --- the presets --------------------------------------------------------------------------------


def test_the_count_of_trained_parameters(tmp_path, capsys):
    """`params` prints 6,837,760 for a Transformer of width 512 with 6 + 6 layers."""
    stacks = {
        f"{stack}_{name}": value
        for stack in ("encoder", "decoder")
        for name, value in (("layers", 6), ("attention_heads", 8), ("ffn_dim", 2048))
    }
    config = {"model_type": "m2m_100", "vocab_size": 8000, "d_model": 512, **stacks}
    config["architectures"] = ["M2M100ForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["params", "--backbone-config", str(tmp_path), "--method", "ciat", "--json"]
    assert main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    d, r = 512, 256
    assert 2 * (2 * d + 2 * d * r + r + d) + 2 * 12 * (2 * d * r + r + d) == 6_837_760
    assert found["trained"] == found["groups"]["adapters"]["total"] == 6_837_760


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        *(("ciat", name) for name in ("m2m_100", "mbart", "bart", "unshared marian")),
        *(("serial-ciat", name) for name in ("m2m_100", "bart")),
    ],
)
def test_the_start_is_the_frozen_model_bit_for_bit(name, model_type):
    """A fresh adapter leaves every logit of the frozen model as it was."""
    backbone = small_backbone(CONFIGS[model_type])
    model = cj.Adapted(backbone.module, preset(name))
    params = cj.init_adapters(model, backbone, quick_key(1))
    inputs = inputs_of(CONFIGS[model_type], 3)
    logits = model.apply({"params": params}, *inputs)
    plain = backbone.module.apply({"params": backbone.params}, *inputs)
    np.testing.assert_array_equal(logits, plain)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model_type", ["m2m_100", "bart"])
def test_logits_equal_the_equations_in_float64(name, model_type):
    """Norms first (M2M-100) or last (BART), the logits are those of NumPy to 1e-12."""
    module = Seq2Seq(CONFIGS[model_type], param_dtype=jnp.float64)
    with jax.enable_x64(True):
        model = cj.Adapted(module, preset(name))
        params = random_tree(adapted_shapes(model), seed=9)
        inputs = tuple(inputs_of(module.config, 4)[:3])
        logits = logits_of(model, params, inputs)
        assert logits.dtype == jnp.float64
        expected = Reference(module, model.method, params)(*inputs)
    np.testing.assert_allclose(logits, expected, atol=1e-12 * np.abs(expected).max(), rtol=0)


# --- fields of several parts, and what they share ------------------------------------------------


def test_a_field_of_both_parts_is_replaced_in_both():
    """Parts of one kind get the new value where they had one in common; sites differ."""
    method = preset("ciat", reduction_factor=4, inner_dropout=0.1, leave_out=(1,))
    for part in method.parts:
        assert (part.reduction_factor, part.inner_dropout, part.leave_out) == (4, 0.1, (1,))
    assert preset("ciat", reduction_factor=2) == preset("ciat")
    assert {"reduction_factor", "train_head"} <= method.replaceable()
    assert not {"sites", "parallel", "layer_norm_before", "rank"} & method.replaceable()
    with pytest.raises(ValueError, match="'sites' is a field of 2 of the parts bottleneck, bottl"):
        preset("ciat", sites=("feed_forward",))
    with pytest.raises(ValueError, match="'dropout' is a field of 2 of the parts prefix_tuning, b"):
        cj.preset("mam", dropout=0.1)
    with pytest.raises(ValueError, match="reduction_factor=25 leaves no bottleneck at a width of"):
        adapted_shapes(cj.Adapted(Seq2Seq(RELU), preset("ciat", reduction_factor=25)))


def test_one_rule_for_all_parts():
    """Compacter's parts share one rule, which generation builds into all of them."""
    with jax.enable_x64(True):
        backbone = small_backbone(RELU, param_dtype=jnp.float64)
        model, params = drawn_beside(backbone, preset("compacter-ciat"))
        rules = [path for path in flatten_dict(params, sep="/") if "phm_rule" in path]
        assert rules == ["phm_rule"]
        inputs = inputs_of(RELU, 1)
        twin, built = model.precomputed(params)
        assert "phm_rule" not in built
        assert {part.kind for part in twin.method.inserted()} == {"bottleneck"}
        expected = logits_of(model, params, inputs)
        assert_near(logits_of(twin, built, inputs), expected, 1e-12)
    first, second = preset("compacter-ciat").parts
    with pytest.raises(ValueError, match="but have other settings of it; give them the"):
        cj.CombinedConfig(parts=(first, second.replace(phm_dim=2)))


def test_an_encoder_gets_no_adapter_of_a_decoder():
    """BERT and T5's encoder have one of the two embeddings; alone, the other is refused."""
    for module in (cj.Bert(ONE_LAYER), T5.clone(head="encoder")):
        model = cj.Adapted(module, preset("ciat"))
        assert list(model.sites_of(model.method.parts[0])) == ["encoder_embedding"]
        with pytest.raises(ValueError, match="unknown site 'decoder_embedding'"):
            cj.Adapted(module, cj.BottleneckConfig(sites=("decoder_embedding",)))


# --- merging ------------------------------------------------------------------------------------


def assert_near(actual, expected, bound):
    """Checks the largest difference relative to the largest value; rounding depends on the CPU."""
    np.testing.assert_allclose(actual, expected, atol=bound * np.abs(expected).max(), rtol=0)


BESIDE = {"sites": ("parallel_feed_forward",), "parallel": True, "non_linearity": "relu"}
MERGED = {
    "parallel": cj.preset("scaled-parallel", reduction_factor=5),
    "without a layer": cj.preset("parallel", leave_out=(1,)),
    "of low rank": cj.LowRankBottleneckConfig(**BESIDE, reduction_factor=3, rank=2),
    "of Kronecker products": cj.PHMBottleneckConfig(**BESIDE, reduction_factor=2, phm_dim=3),
    "of two widths, with LoRA": cj.CombinedConfig(
        parts=(
            cj.preset("parallel", reduction_factor=4, leave_out=(0,)),
            cj.preset("parallel", reduction_factor=6, leave_out=(1,)),
            cj.preset("lora", sites=("query", "intermediate"), rank=2),
        )
    ),
}
# Inner units that merging adds at a width of 24, and layers of both stacks.
UNITS = dict(zip(MERGED, (4, 12, 8, 12, 6), strict=True))
TWO_LAYERS = dataclasses.replace(RELU, decoder_layers=2)


@pytest.mark.parametrize("name", MERGED)
def test_a_bottleneck_beside_a_network_becomes_a_part_of_it(name):
    """The wider backbone computes the model's logits, to 1e-12 relative to the largest."""
    with jax.enable_x64(True):
        backbone = small_backbone(TWO_LAYERS, param_dtype=jnp.float64)
        inputs = inputs_of(RELU, 8)
        model, params = drawn_beside(backbone, MERGED[name])
        merged, wide = cj.merge_adapter(model, params), model.merged_module()
        assert wide.config.encoder_ffn_dim == 14 + UNITS[name]
        assert wide.config.decoder_ffn_dim == 10 + UNITS[name]
        shapes = jax.eval_shape(wide.init, quick_key(0), *wide.dummy_inputs())["params"]
        assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, shapes)
        expected = logits_of(model, params, inputs)
        assert expected.dtype == jnp.float64
        assert_near(logits_of(wide, merged, inputs), expected, 1e-12)
        plain = logits_of(backbone.module, backbone.params, inputs)
        assert np.abs(expected - plain).max() > 1e-2 * np.abs(plain).max()
        # Generation keeps the backbone's module.
        twin, built = model.precomputed(params)
        assert twin.backbone == model.backbone
        assert_near(logits_of(twin, built, inputs), expected, 1e-12)


def test_the_wider_backbone_is_saved_with_its_widths(tmp_path):
    """A saved merged backbone has the logits of the model, also where transformers reads it."""
    model, params = drawn_beside(relu_backbone(), MERGED["parallel"])
    inputs, merged = inputs_of(RELU, 2), cj.merge_adapter(model, params)
    config = torch_config(RELU)
    cj.save_backbone(tmp_path, model.merged_module(), merged, config)
    assert config.encoder_ffn_dim == 14
    expected = logits_of(model, params, inputs)
    loaded = cj.load_backbone(tmp_path)
    assert loaded.module == model.merged_module()
    found = logits_of(loaded.module, loaded.params, inputs)
    np.testing.assert_array_equal(found, logits_of(model.merged_module(), merged, inputs))
    assert_near(found, expected, 1e-5)
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.M2M100ForConditionalGeneration.from_pretrained(tmp_path).eval()
    names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
    with torch.no_grad():
        output = theirs(**{n: torch.tensor(x) for n, x in zip(names, inputs, strict=True)})
    assert_near(output.logits.numpy(), expected, 1e-5)


def test_merging_keeps_the_dtype_of_a_narrow_backbone():
    """Adapters of float32 are rounded to the bfloat16 of the network that they join."""
    backbone = small_backbone(TWO_LAYERS)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), backbone.params)
    drawn = drawn_beside(backbone, MERGED["without a layer"])
    params = unflatten_dict({**flatten_dict(drawn[1]), **flatten_dict(narrow)})
    merged = cj.merge_adapter(drawn[0], params)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


SITES = {"parallel_feed_forward": Seq2Seq.sites["parallel_feed_forward"]}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            cj.Adapted(Seq2Seq(RELU), preset("ciat")),
            "its part 'bottleneck' cannot be merged: .* at encoder_embedding, decoder_embedding "
            "as ciat has them; only bottlenecks at 'parallel_feed_forward' alone",
        ),
        (
            cj.Adapted(Seq2Seq(RELU), cj.preset("parallel", layer_norm_before=True)),
            "norms of their own",
        ),
        (
            cj.Adapted(Seq2Seq(CONFIGS["bart"]), cj.preset("parallel")),
            "non_linearity='relu', but the feed-forward networks beside them 'gelu'",
        ),
        (
            cj.Adapted(T5, cj.preset("parallel")),
            "networks of T5 cannot become wider by the bottlenecks beside them",
        ),
        (
            cj.Adapted(Seq2Seq(RELU), cj.preset("parallel"), sites=SITES),
            "the model has a table of sites of its own",
        ),
    ],
)
def test_what_cannot_become_a_part_of_a_network(model, message):
    params = adapted_shapes(model)
    with pytest.raises(ValueError, match=message):
        cj.merge_adapter(model, params)


# --- dropout ------------------------------------------------------------------------------------


def test_dropout_within_attention_and_feed_forward_alone(tmp_path):
    """`inside` keeps the rates within sub-layers; a T5, which has one rate, is refused."""
    rates = {"dropout": 0.3, "attention_dropout": 0.2, "activation_dropout": 0.1}
    config = dataclasses.replace(RELU, **rates)
    backbone = small_backbone(config)
    cj.save_backbone(tmp_path, backbone.module, backbone.params, torch_config(config))
    loaded = cj.load_backbone(tmp_path, dropout_rate="inside").module
    assert loaded.config == dataclasses.replace(config, dropout=0.0)
    loaded = cj.load_backbone(tmp_path, dropout_rate=0.4).module
    assert loaded.config == dataclasses.replace(config, **dict.fromkeys(rates, 0.4))
    with pytest.raises(ValueError, match="T5 has one rate for all dropout, dropout_rate; give a n"):
        family_of_module(T5).with_dropout(T5, "inside")
    bert = family_of_module(cj.Bert(ONE_LAYER)).with_dropout(cj.Bert(ONE_LAYER), "inside")
    expected = dataclasses.replace(ONE_LAYER, hidden_dropout_prob=0.0)
    assert bert.config == expected
    flags = ["--backbone", "DIR", "--task", "movie", "--output-dir", "runs", "--backbone-dropout"]
    assert _parsed("fit", [*flags, "inside"]).backbone_dropout == "inside"
    assert _parsed("fit", [*flags, "0"]).backbone_dropout == 0.0
    with pytest.raises(ValueError, match=r"backbone_dropout=1.0 must be in \[0, 1\), or inside"):
        _parsed("fit", [*flags, "1"]).check()
