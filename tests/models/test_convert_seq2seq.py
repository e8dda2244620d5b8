"""Reads and writes Hugging Face checkpoints of M2M-100, mBART, BART and Marian."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import compacter_jax as cj
from compacter_jax.models.loading import module_from_name
from compacter_jax.models.seq2seq.checkpoint import (
    seq2seq_from_hugging_face,
    seq2seq_to_hugging_face,
)
from compacter_jax.models.seq2seq.config import PUBLISHED, Seq2SeqConfig
from compacter_jax.models.seq2seq.model import Seq2Seq
from tests.helpers import assert_equal_trees
from tests.methods.sizes import m2m_sizes
from tests.seq2seq_models import CONFIGS, UNSHARED, small_backbone, tiny, torch_config, torch_model
from tests.train.cli.test_cli import refusal

SAVED = CONFIGS | {
    # transformers itself cannot read decoders with a vocabulary of another size.
    "unshared marian": tiny("marian", **(UNSHARED | {"decoder_vocab_size": 23})),
    "m2m_100, untied": tiny("m2m_100", tie_word_embeddings=False),
    "unshared marian, untied": tiny(
        "marian", **(UNSHARED | {"decoder_vocab_size": 23}), tie_word_embeddings=False
    ),
}
HEADS = ("conditional_generation", None)
CASES = [
    (name, head) for name in SAVED for head in HEADS if head or name in ("bart", "unshared marian")
]


@pytest.mark.contract
@pytest.mark.parametrize(("name", "head"), CASES)
def test_checkpoints_there_and_back_bit_for_bit(name, head, tmp_path):
    """Each library reads what the other one wrote, and every weight keeps its bits."""
    ours = small_backbone(SAVED[name], head)
    theirs = torch_model(ours)
    theirs.save_pretrained(tmp_path / "theirs")
    read = cj.load_backbone(tmp_path / "theirs")
    assert read.module == ours.module
    assert read.new_parameters == ()
    assert_equal_trees(read.params, ours.params)

    cj.save_backbone(tmp_path / "ours", read.module, read.params, read.config)
    again = type(theirs).from_pretrained(tmp_path / "ours")
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for key, tensor in again.state_dict().items():
        assert tensor.numpy().tobytes() == expected[key].numpy().tobytes(), key
    assert_equal_trees(cj.load_backbone(tmp_path / "ours").params, ours.params)
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert stored.keys() <= expected.keys()
    back = seq2seq_from_hugging_face(stored, model_type=SAVED[name].model_type)
    assert_equal_trees(back, jax.device_get(ours.params))


@pytest.mark.parametrize("head", HEADS)
def test_vocabularies_of_two_sizes_are_saved_and_loaded(head, tmp_path):
    """A model whose decoder has a vocabulary of its own size keeps every bit and its settings."""
    config = CONFIGS["unshared marian"]
    assert config.vocab_size != config.target_vocab_size
    ours = small_backbone(config, head)
    cj.save_backbone(tmp_path, ours.module, ours.params, torch_config(config))
    read = cj.load_backbone(tmp_path, head=head)
    assert read.module == ours.module
    assert read.new_parameters == ()
    assert_equal_trees(read.params, ours.params)
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(read.params) if leaf.shape[-1:] == (24,)}
    assert {config.vocab_size, config.target_vocab_size} <= sizes


def written(folder, config, tensors, **settings):
    """Writes a folder like that of save_pretrained."""
    folder.mkdir(exist_ok=True)
    described = json.loads(torch_config(config).to_json_string(use_diff=False)) | settings
    (folder / "config.json").write_text(json.dumps(described))
    save_file(
        {n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / "model.safetensors"
    )
    return folder


ARCHITECTURES = {
    "m2m_100": "M2M100ForConditionalGeneration",
    "mbart": "MBartForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "marian": "MarianMTModel",
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_leftovers_and_copies(model_type, tmp_path):
    """Old checkpoints have copies of embeddings, sinusoids, versions, and no bias of the logits."""
    ours = small_backbone(CONFIGS[model_type])
    if "final_logits_bias" in ours.params:
        ours.params["final_logits_bias"] = {"bias": jnp.zeros(23)}
    tensors = seq2seq_to_hugging_face(ours.params)
    tensors.pop("final_logits_bias", None)
    embedding = tensors["model.shared.weight"]
    copies = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    tensors |= dict.fromkeys((*copies, "lm_head.weight"), embedding)
    if model_type in ("m2m_100", "marian"):
        name = "weights" if model_type == "m2m_100" else "weight"
        table = np.ones((9, 24), np.float32)
        tensors |= {f"model.{s}.embed_positions.{name}": table for s in ("encoder", "decoder")}
    tensors["model.encoder.version"] = np.ones(1, np.float32)
    settings = {"architectures": [ARCHITECTURES[model_type]]}
    folder = written(tmp_path / "all", ours.module.config, tensors, **settings)
    assert_equal_trees(cj.load_backbone(folder).params, ours.params)
    without = {name: tensor for name, tensor in tensors.items() if name != "model.shared.weight"}
    folder = written(tmp_path / "copies", ours.module.config, without, **settings)
    backbone = cj.load_backbone(folder)
    assert backbone.new_parameters == ()
    assert_equal_trees(backbone.params, ours.params)
    other = without | {copies[1]: embedding + 1}
    folder = written(tmp_path / "other", ours.module.config, other, **settings)
    with pytest.raises(ValueError, match=r"differs from (the )?shared"):
        cj.load_backbone(folder)


def test_states_alone_of_a_whole_checkpoint(tmp_path):
    """Without a head, the bias of the logits is left out."""
    ours = small_backbone(CONFIGS["bart"])
    tensors = seq2seq_to_hugging_face(ours.params)
    folder = written(tmp_path, CONFIGS["bart"], tensors, architectures=[ARCHITECTURES["bart"]])
    backbone = cj.load_backbone(folder, head=None)
    assert backbone.module.head is None
    assert ours.params.keys() - backbone.params.keys() == {"final_logits_bias"}


RELATED = {"pegasus": "bart", "blenderbot": "bart", "nllb-moe": "m2m_100", "fsmt": "marian"}


@pytest.mark.parametrize(("model_type", "family"), RELATED.items())
def test_related_types_are_refused_by_name(model_type, family, tmp_path):
    """A type that resembles one of the four is refused, and the message says which."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    message = rf"says model_type='{model_type}' \(it resembles '{family}', but .*'marian'"
    with pytest.raises(ValueError, match=message):
        cj.load_backbone(tmp_path)


@pytest.mark.parametrize("model_type", ["pegasus", "blenderbot"])
def test_related_types_are_refused_by_commands(model_type, tmp_path, capsys):
    """Commands end with one line that names the type, and write nothing."""
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    (backbone / "config.json").write_text(json.dumps({"model_type": model_type}))
    pair = {"source": "a", "target": "b", "source_language": "en", "target_language": "de"}
    (tmp_path / "train.jsonl").write_text(json.dumps(pair))
    fit = ["fit", "--backbone", backbone, "--train-file", tmp_path / "train.jsonl"]
    fit += ["--method", "ciat", "--output-dir", tmp_path / "run"]
    params = ["params", "--backbone-config", backbone, "--method", "ciat"]
    for command in (fit, params):
        assert f"model_type={model_type!r} (it resembles" in refusal(capsys, *command)
    assert not (tmp_path / "run").exists()


BAD = {
    "LayerDrop": ({"encoder_layerdrop": 1.5}, "encoder_layerdrop=1.5 is not a dropout rate"),
    "heads": ({"decoder_attention_heads": 5}, "decoder_attention_heads=5 does not divide d_model"),
    "activation": ({"activation_function": "gelo"}, "unknown activation 'gelo'"),
    "tokens": ({"forced_bos_token_id": 99}, "forced_bos_token_id=99 is not in the vocabulary"),
    "type": ({"model_type": "pegasus"}, "unknown model_type='pegasus'; use one of m2m_100"),
    "sizes": ({"decoder_layers": 0}, "decoder_layers=0 is not positive"),
    "width": ({"d_model": 2, "decoder_attention_heads": 1}, "d_model=2 is too small"),
    "positions": ({"positions": "rotary"}, "unknown positions='rotary'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_configurations_that_cannot_be(changes, message):
    """A value that no model can have is refused by the name of its field."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny("m2m_100"), **changes)


def test_a_checkpoint_that_does_not_fit(tmp_path):
    """Names, labels, heads and lengths that are not the model's are refused."""
    with pytest.raises(ValueError, match=r"'encoder.x' is not one of these encoder-decoders"):
        seq2seq_from_hugging_face({"model.encoder.x": np.ones(2)})
    with pytest.raises(ValueError, match="num_labels=2 was given, but this encoder-decoder has no"):
        module_from_name("facebook/m2m100_418M", num_labels=2)
    with pytest.raises(ValueError, match="unknown head 'encoder'"):
        Seq2Seq(CONFIGS["bart"], head="encoder")
    ours = small_backbone(CONFIGS["bart"])
    tensors = seq2seq_to_hugging_face(ours.params)
    settings = {"architectures": [ARCHITECTURES["bart"]], "encoder_layers": 2}
    folder = written(tmp_path, CONFIGS["bart"], tensors, **settings)
    with pytest.raises(ValueError, match="encoder_layers=2, but there are weights of 1 layers"):
        cj.load_backbone(folder)


def test_the_published_sizes():
    """The numbers of parameters are the published ones, and the bias of the logits in BART."""
    module = module_from_name("facebook/bart-base")
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 139_420_416 + 50_265
    sizes = m2m_sizes(PUBLISHED["m2m_100"]["facebook/m2m100_418M"])
    assert sizes.everything == 483_905_536


def test_defaults_follow_the_type():
    """Fields that are None follow `model_type`, and others stay as they are."""
    config = Seq2SeqConfig(model_type="bart", last_norms=True)
    assert (config.positions, config.normalize_before, config.last_norms) == (
        "learned",
        False,
        True,
    )
    assert all(c.model_type == kind for kind, own in PUBLISHED.items() for c in own.values())
