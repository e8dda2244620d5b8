"""Reads and writes Hugging Face checkpoints of T5."""

import dataclasses
import functools
import json
import logging
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from compacter_jax.checkpoint import save_backbone
from compacter_jax.models.loading import load_backbone, module_from_config, module_from_name
from compacter_jax.models.t5.checkpoint import t5_from_hugging_face, t5_to_hugging_face
from compacter_jax.models.t5.config import HEADS, PUBLISHED, T5Config
from compacter_jax.models.t5.model import T5
from tests.helpers import TINY_T5, quick_jit, random_tree, t5_inputs, torch_t5_outputs

UNTIED = dataclasses.replace(TINY_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
CONFIGS = {"tied": TINY_T5, "untied": UNTIED}
KINDS = {"conditional_generation": "ForConditionalGeneration", None: "Model"}
KINDS |= {"encoder": "EncoderModel"}
MODELS = {
    "T5": ("T5", "conditional_generation", TINY_T5),
    "T5 v1.1": ("T5", "conditional_generation", UNTIED),
    "mT5": ("MT5", "conditional_generation", UNTIED),
    "states of T5": ("T5", None, TINY_T5),
    "states of mT5": ("MT5", None, UNTIED),
    "encoder of T5 v1.1": ("T5", "encoder", UNTIED),
    "encoder of mT5": ("MT5", "encoder", UNTIED),
}


@functools.cache
def shapes_of(config, head):
    module = T5(config, head=head)
    return jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())["params"]


def random_params(config=TINY_T5, head="conditional_generation"):
    return jax.device_get(random_tree(shapes_of(config, head)))


def write_checkpoint(folder, tensors, config=TINY_T5, *, family="T5", head=None, **settings):
    """Writes a folder like that of save_pretrained, without PyTorch."""
    folder.mkdir(exist_ok=True)
    described = dataclasses.asdict(config) | {"model_type": family.lower()}
    described |= {"architectures": [family + KINDS[head]], "transformers_version": "4.57.1"}
    described = {k: v for k, v in (described | settings).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(described))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def written(folder, config=TINY_T5, head="conditional_generation", **settings):
    """Writes a checkpoint of random parameters; returns the folder and the parameters."""
    params = random_params(config, head)
    return write_checkpoint(
        folder, t5_to_hugging_face(params), config, head=head, **settings
    ), params


def assert_equal_trees(ours, theirs):
    """Checks that paths, types and bits are the same."""
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        assert ours[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


# --- what a checkpoint without surprises gives --------------------------------------------------


@pytest.mark.parametrize(("family", "head", "config"), MODELS.values(), ids=MODELS)
@pytest.mark.contract
def test_loads_what_the_configuration_names(tmp_path, config, head, family, caplog):
    folder, params = written(tmp_path / "t5", config, head, family=family)
    with caplog.at_level(logging.INFO, logger="compacter_jax"):
        backbone = load_backbone(folder)
    assert backbone.module == T5(config, head=head)
    assert backbone.new_parameters == ()
    assert caplog.records == []
    assert_equal_trees(backbone.params, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(backbone.params))


def test_options_reach_the_module(tmp_path):
    folder, params = written(tmp_path / "t5")
    backbone = load_backbone(
        folder, dropout_rate=0.25, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat="dots"
    )
    module = backbone.module
    assert (module.dtype, module.param_dtype, module.remat) == (jnp.bfloat16, jnp.bfloat16, "dots")
    assert module.config == dataclasses.replace(TINY_T5, dropout_rate=0.25)
    assert_equal_trees(backbone.params, jax.tree.map(lambda a: a.astype(jnp.bfloat16), params))


def test_a_checkpoint_in_bfloat16(tmp_path):
    tensors = t5_to_hugging_face(random_params())
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    folder = write_checkpoint(tmp_path / "t5", tensors, head="conditional_generation")
    params = t5_from_hugging_face(tensors)
    assert_equal_trees(load_backbone(folder, param_dtype=jnp.bfloat16).params, params)
    # Every bfloat16 is a float32.
    exact = jax.tree.map(lambda a: a.astype(np.float32), params)
    assert_equal_trees(load_backbone(folder).params, exact)


@pytest.mark.contract
def test_the_end_and_start_of_sequences(tmp_path):
    """Some files name several end-of-sequence tokens, and no decoder_start_token_id."""
    folder, _ = written(tmp_path / "t5", eos_token_id=[3, 4], pad_token_id=2)
    settings = json.loads((folder / "config.json").read_text())
    del settings["decoder_start_token_id"]
    (folder / "config.json").write_text(json.dumps(settings))
    config = load_backbone(folder).module.config
    assert (config.eos_token_id, config.pad_token_id, config.decoder_start_token_id) == (3, 2, 2)


# --- copies, leftovers, parts that are not there ------------------------------------------------

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
LEFTOVER = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def test_leftovers_and_copies_of_the_embedding(tmp_path):
    params = random_params()
    tensors = t5_to_hugging_face(params)
    embedding = tensors["shared.weight"]
    assert set(tensors) & {*COPIES, LEFTOVER, "lm_head.weight"} == set()
    tensors[LEFTOVER] = np.ones((8, 3), np.float32)
    tensors |= dict.fromkeys((*COPIES, "lm_head.weight"), embedding)
    folder = tmp_path / "t5"
    head = {"head": "conditional_generation"}
    assert_equal_trees(load_backbone(write_checkpoint(folder, tensors, **head)).params, params)
    without = {name: tensor for name, tensor in tensors.items() if name != "shared.weight"}
    assert_equal_trees(load_backbone(write_checkpoint(folder, without, **head)).params, params)
    for copy in COPIES:
        one = {name: t for name, t in without.items() if name == copy or name not in COPIES}
        assert_equal_trees(load_backbone(write_checkpoint(folder, one, **head)).params, params)
        other = tensors | {copy: embedding + 1}
        with pytest.raises(ValueError, match=rf"'{copy}' differs from the shared embedding, but"):
            load_backbone(write_checkpoint(folder, other, **head))
    with pytest.raises(
        ValueError, match=r"lm_head/kernel in .* differs from shared/embedding, but"
    ):
        load_backbone(write_checkpoint(folder, tensors | {"lm_head.weight": embedding + 1}, **head))


FIVES = {
    "T5": {"scale_decoder_outputs": False},
    "MT5": {},
}


@pytest.mark.parametrize("family", FIVES)
def test_a_head_of_its_own_that_transformers_5_has_tied(tmp_path, family):
    """transformers 5 calls every model tied and stores one copy; the head's input is not scaled."""
    params = random_params(UNTIED)
    tensors = t5_to_hugging_face(params)
    del tensors["lm_head.weight"]
    settings = FIVES[family] | {"tie_word_embeddings": True, "transformers_version": "5.23.0"}
    folder = write_checkpoint(
        tmp_path / "t5",
        tensors,
        UNTIED,
        family=family,
        head="conditional_generation",
        **settings,
    )
    backbone = load_backbone(folder)
    assert backbone.module == T5(UNTIED)
    params["lm_head"]["kernel"] = params["shared"]["embedding"].T
    assert_equal_trees(backbone.params, params)
    assert backbone.new_parameters == ()
    # Every version of transformers reads the saved folder as it was meant.
    save_backbone(tmp_path / "again", backbone.module, backbone.params, backbone.config)
    again = load_backbone(tmp_path / "again")
    assert again.module == backbone.module
    assert_equal_trees(again.params, params)


def test_a_head_of_its_own_that_is_not_there(tmp_path):
    """The embedding must not replace a missing head: without the scaling, logits would be wrong."""
    folder, params = written(tmp_path / "t5", UNTIED, None)
    assert_equal_trees(load_backbone(folder).params, params)
    with pytest.raises(ValueError, match=r"has no lm_head, which head='conditional_generation' ne"):
        load_backbone(folder, head="conditional_generation")


def test_a_head_for_a_tied_model_without_one(tmp_path):
    folder, params = written(tmp_path / "t5", TINY_T5, None)
    backbone = load_backbone(folder, head="conditional_generation")
    assert backbone.module.head == "conditional_generation"
    assert backbone.new_parameters == ()
    assert_equal_trees(backbone.params, params)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_encoder_of_a_whole_model(tmp_path, config, caplog):
    folder, params = written(tmp_path / "t5", config)
    with caplog.at_level(logging.INFO, logger="compacter_jax"):
        backbone = load_backbone(folder, head="encoder")
    assert backbone.module.head == "encoder"
    assert_equal_trees(backbone.params, {name: params[name] for name in ("encoder", "shared")})
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    left_out = set(re.findall(r"(?:decoder|lm_head)/[\w/]+", caplog.text))
    flat = flatten_dict(params, sep="/")
    assert left_out == {path for path in flat if path.split("/")[0] in ("decoder", "lm_head")}


@pytest.mark.parametrize("head", [None, "conditional_generation"])
def test_an_encoder_has_no_decoder(tmp_path, head):
    folder, _ = written(tmp_path / "t5", head="encoder")
    message = rf"has no decoder, which head={head!r} needs; .*head='encoder' for an encoder alone"
    with pytest.raises(ValueError, match=message):
        load_backbone(folder, head=head)


# --- what cannot be -----------------------------------------------------------------------------


def test_a_t5_has_no_labels(tmp_path):
    folder, _ = written(tmp_path / "t5")
    for give in (
        lambda: load_backbone(folder, num_labels=2),
        lambda: module_from_name("t5-base", num_labels=2),
    ):
        with pytest.raises(ValueError, match=r"num_labels=2 was given, but T5 has no classifier"):
            give()


def test_a_t5_has_no_head_of_bert(tmp_path):
    folder, _ = written(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"'sequence_classification' is for another kind of backb"):
        load_backbone(folder, head="sequence_classification", num_labels=2)
    with pytest.raises(ValueError, match="unknown head 'regression'"):
        load_backbone(folder, head="regression")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["T5ForTokenClassification"]}, r"T5ForTokenClassification; known: T5F"),
        ({"model_type": "umt5"}, r"model_type='umt5'; supported: 'bert', .*'t5', 'mt5'"),
        ({"feed_forward_proj": "gated-gelo"}, r"feed_forward_proj='gated-gelo': unknown"),
        ({"d_model": 0}, r"d_model=0 is not positive"),
    ],
)
def test_configurations_that_cannot_be(tmp_path, settings, message):
    folder, _ = written(tmp_path / "t5", **settings)
    with pytest.raises(ValueError, match=message):
        load_backbone(folder)


def test_weights_that_do_not_fit_list_both_sides(tmp_path):
    tensors = t5_to_hugging_face(random_params())
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    tensors["decoder.block.1.layer.2.layer_norm.weight"] = np.ones(12, np.float32)
    tensors["shared.weight"] = np.ones((19, 11), np.float32)
    folder = write_checkpoint(tmp_path / "t5", tensors, head="conditional_generation")
    with pytest.raises(ValueError, match="do not fit the module") as caught:
        load_backbone(folder)
    for part in (
        "missing in the checkpoint: encoder/block/1/layer/0/SelfAttention/q/kernel (12, 15)",
        "not in the module: decoder/block/1/layer/2/layer_norm/scale (12,)",
        "of another shape: shared/embedding (checkpoint (19, 11), module (19, 12))",
    ):
        assert part in str(caught.value)


def test_names_that_cannot_be():
    with pytest.raises(ValueError, match=r"'shared.bias' is not one of T5: .* not end in weight"):
        t5_from_hugging_face({"shared.bias": np.ones(2)})
    with pytest.raises(ValueError, match=r"'weight' is not one of T5"):
        t5_from_hugging_face({"weight": np.ones((2, 2))})
    adapted = flatten_dict(random_params(), sep="/")
    adapted["encoder/block/0/layer/0/SelfAttention/o/adapter/down/kernel"] = np.ones((12, 2))
    with pytest.raises(ValueError, match=r"not parameters of T5: .*adapter/down/kernel; take adap"):
        t5_to_hugging_face(unflatten_dict(adapted, sep="/"))


# --- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_names_and_values_round_trip(tmp_path, config, head):
    params = random_params(config, head)
    tensors = t5_to_hugging_face(params)
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())
    assert_equal_trees(t5_from_hugging_face(tensors), params)
    save_file(tensors, tmp_path / "t.safetensors")
    assert_equal_trees(t5_from_hugging_face(load_file(tmp_path / "t.safetensors")), params)


def test_weights_are_transposed_and_renamed():
    weight = np.arange(6.0).reshape(2, 3)
    name = "decoder.block.0.layer.2.DenseReluDense.wi_0.weight"
    layer = t5_from_hugging_face({name: weight})["decoder"]["block"]["0"]["layer"]["2"]
    np.testing.assert_array_equal(layer["DenseReluDense"]["wi_0"]["kernel"], weight.T)
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    layer = t5_from_hugging_face({name: weight})["encoder"]["block"]["0"]["layer"]["0"]
    bias = layer["SelfAttention"]["relative_attention_bias"]
    np.testing.assert_array_equal(bias["embedding"], weight)


@pytest.mark.parametrize(("family", "head", "config"), MODELS.values(), ids=MODELS)
def test_saving_a_backbone_is_exact(tmp_path, config, head, family):
    folder, params = written(tmp_path / "t5", config, head, family=family)
    loaded = load_backbone(folder)
    before = loaded.config.to_json_string()
    save_backbone(tmp_path / "new", loaded.module, loaded.params, loaded.config)
    assert loaded.config.to_json_string() == before
    again = load_backbone(tmp_path / "new")
    assert again.module == loaded.module
    assert_equal_trees(again.params, params)
    settings = json.loads((tmp_path / "new" / "config.json").read_text())
    assert settings["architectures"] == [family + KINDS[head]]
    assert settings["tie_word_embeddings"] is config.tie_word_embeddings
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["config.json", "model.safetensors"]


def test_saving_in_bfloat16_is_exact(tmp_path):
    folder, _ = written(tmp_path / "t5", UNTIED)
    loaded = load_backbone(folder, param_dtype=jnp.bfloat16)
    save_backbone(tmp_path / "new", loaded.module, loaded.params, loaded.config)
    again = load_backbone(tmp_path / "new", param_dtype=jnp.bfloat16)
    assert_equal_trees(again.params, jax.device_get(loaded.params))


# --- sizes by name ------------------------------------------------------------------------------

TOTALS = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "google/t5-v1_1-small": 76_961_152,
    "google/t5-v1_1-base": 247_577_856,
    "google/mt5-small": 300_176_768,
}


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_published_sizes(name, total):
    module = module_from_name(name)
    assert module.head == "conditional_generation"
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == total


def test_published_sizes_are_those_of_their_family():
    for size in ("small", "base", "large", "xl", "xxl"):
        config = PUBLISHED[f"google/t5-v1_1-{size}"]
        assert config.feed_forward_proj == "gated-gelu"
        assert not config.tie_word_embeddings
        assert PUBLISHED[f"google/flan-t5-{size}"] == config
        assert PUBLISHED[f"google/t5-{size}-lm-adapt"] == config
        assert PUBLISHED[f"google/mt5-{size}"] == dataclasses.replace(config, vocab_size=250112)
    assert PUBLISHED["t5-small"] == T5Config() == module_from_config_of(transformers.T5Config)
    assert PUBLISHED["google/mt5-small"] == module_from_config_of(transformers.MT5Config)


def module_from_config_of(kind):
    return module_from_config(kind(), head=None).config


@pytest.mark.contract
def test_modules_by_name(tmp_path):
    assert module_from_name("t5-small", head="encoder") == T5(T5Config(), head="encoder")
    folder, _ = written(tmp_path / "t5", UNTIED, None)
    for place in (folder, str(folder), folder / "config.json"):
        assert module_from_name(place) == T5(UNTIED, head=None)
    other = folder / "other.json"
    other.write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"d_ff": 99}))
    assert module_from_name(other).config.d_ff == 99
    for unknown in ("t5-bass", tmp_path / "nowhere"):
        with pytest.raises(
            ValueError, match=r"neither a config.json here nor .* sizes are known, such as "
        ):
            module_from_name(unknown)
    with pytest.raises(ValueError, match=r"has no config.json"):
        module_from_name(tmp_path)


# --- against PyTorch ----------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "head", "config"), MODELS.values(), ids=MODELS)
def test_saved_by_pytorch(tmp_path, family, head, config):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    settings = getattr(transformers, f"{family}Config")(**dataclasses.asdict(config))
    model = getattr(transformers, family + KINDS[head])(settings)
    shards = head is None or family == "T5"
    model.save_pretrained(tmp_path, max_shard_size="2KB" if shards else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) is shards
    backbone = load_backbone(tmp_path)
    assert backbone.module == T5(config, head=head)
    assert backbone.new_parameters == ()
    named = {name: p.detach().numpy() for name, p in model.named_parameters()}
    if config == UNTIED and head == "conditional_generation":
        named.setdefault("lm_head.weight", named["shared.weight"])  # transformers 5 ties it
    assert_equal_trees(t5_to_hugging_face(backbone.params), named)


def logits_of(backbone, inputs):
    return quick_jit(backbone.module.apply)({"params": backbone.params}, *inputs)


WRITTEN = ("T5", "mT5", "states of T5", "encoder of mT5")


@pytest.mark.parametrize("name", WRITTEN)
def test_pytorch_loads_what_we_write(tmp_path, name):
    torch = pytest.importorskip("torch")
    family, head, config = MODELS[name]
    folder, _ = written(tmp_path / "t5", config, head, family=family)
    backbone = load_backbone(folder)
    save_backbone(tmp_path / "new", backbone.module, backbone.params, backbone.config)
    model, report = getattr(transformers, family + KINDS[head]).from_pretrained(
        tmp_path / "new", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = t5_inputs(3, config)[: 2 if head == "encoder" else 4]
    with torch.no_grad():
        theirs = torch_t5_outputs(model.eval(), inputs)
    ours = jax.tree.leaves(logits_of(backbone, inputs))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=0)
