"""Reads and writes Hugging Face checkpoints of RoBERTa, ELECTRA and DistilBERT."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import compacter_jax as cj
from compacter_jax.models.families import FAMILIES, family_of_module
from compacter_jax.models.loading import module_from_name
from tests.encoder_models import (
    CONFIGS,
    HEADS,
    SETS,
    class_of,
    small_encoder,
    torch_config,
    torch_model,
)
from tests.helpers import assert_equal_trees

CASES = [(name, head) for name in SETS for head in HEADS]
CASES += [("xlm-roberta", "sequence_classification"), ("camembert", "masked_lm")]


@pytest.mark.contract
@pytest.mark.parametrize(("name", "head"), CASES)
def test_checkpoints_there_and_back_bit_for_bit(name, head, tmp_path):
    """Each library reads what the other one wrote, and every weight keeps its bits."""
    ours = small_encoder(name, head)
    theirs = torch_model(ours)
    theirs.save_pretrained(tmp_path / "theirs")
    read = cj.load_backbone(tmp_path / "theirs")
    assert read.module.config == ours.module.config
    assert read.module.head == head
    assert read.new_parameters == ()
    assert_equal_trees(read.params, ours.params)

    cj.save_backbone(tmp_path / "ours", read.module, read.params, read.config)
    again = type(theirs).from_pretrained(tmp_path / "ours")
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for key, tensor in again.state_dict().items():
        assert tensor.numpy().tobytes() == expected[key].numpy().tobytes(), key
    assert_equal_trees(cj.load_backbone(tmp_path / "ours").params, ours.params)
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() <= expected.keys()


def written(folder, module, tensors, **settings):
    """Writes a folder like that of save_pretrained."""
    folder.mkdir(exist_ok=True)
    described = json.loads(torch_config(module).to_json_string(use_diff=False)) | settings
    (folder / "config.json").write_text(json.dumps(described))
    save_file(
        {n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / "model.safetensors"
    )
    return folder


COPIES = {
    "roberta": {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    "electra": {"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    "distilbert": {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_left_out_and_must_be_equal(name, tmp_path):
    """Old checkpoints have copies of the embeddings and of the bias, and a buffer of positions."""
    ours = small_encoder(name, "masked_lm")
    tensors = family_of_module(ours.module).to_hugging_face(ours.params, "masked_lm")
    tensors |= {copy: tensors[original] for copy, original in COPIES[name].items()}
    tensors[f"{name}.embeddings.position_ids"] = np.arange(15)[None]
    architectures = [class_of(ours.module, "masked_lm")]
    folder = written(tmp_path, ours.module, tensors, architectures=architectures)
    backbone = cj.load_backbone(folder)
    assert backbone.new_parameters == ()
    assert_equal_trees(backbone.params, ours.params)
    for copy in COPIES[name]:
        folder = written(tmp_path, ours.module, tensors | {copy: tensors[copy] + 1})
        with pytest.raises(ValueError, match="differ"):
            cj.load_backbone(folder, head="masked_lm")


@pytest.mark.parametrize("name", SETS)
def test_a_classifier_starts_from_the_pre_training(name, tmp_path, caplog):
    """A checkpoint without a classifier gets a new one; its head for words is left out."""
    ours = small_encoder(name, "masked_lm")
    tensors = family_of_module(ours.module).to_hugging_face(ours.params, "masked_lm")
    folder = written(tmp_path, ours.module, tensors)
    with caplog.at_level(logging.INFO, "compacter_jax"):
        backbone = cj.load_backbone(folder, head="sequence_classification", num_labels=2)
    wanted = {
        "distilbert": {"pre_classifier", "classifier"},
        "roberta": {"classifier/dense", "classifier/out_proj"},
    }
    wanted = wanted.get(name, wanted["roberta"])
    assert {path.rpartition("/")[0] for path in backbone.new_parameters} == wanted
    assert "left out of" in caplog.text
    kept = flatten_dict(ours.params, sep="/").keys() & flatten_dict(backbone.params, sep="/").keys()
    assert len(kept) == len(flatten_dict(backbone.params)) - len(backbone.new_parameters)


def test_the_discriminator_of_an_electra_gives_hidden_states(tmp_path):
    """`ElectraForPreTraining` has a head that is none of the five, so "auto" reads no head."""
    transformers = pytest.importorskip("transformers")
    ours = small_encoder("electra")
    model = transformers.ElectraForPreTraining(torch_config(ours.module))
    model.save_pretrained(tmp_path)
    backbone = cj.load_backbone(tmp_path)
    assert backbone.module.head is None
    assert backbone.new_parameters == ()
    words = model.electra.embeddings.word_embeddings.weight.detach().numpy()
    table = backbone.params["embeddings"]["word_embeddings"]["embedding"]
    np.testing.assert_array_equal(table, words)


@pytest.mark.parametrize("name", SETS)
def test_a_head_for_other_rows_is_left_out(name, tmp_path):
    """The classifier of tokens has names of that of sequences, but is another one."""
    ours = small_encoder(name, "token_classification")
    tensors = family_of_module(ours.module).to_hugging_face(ours.params, "token_classification")
    architectures = [class_of(ours.module, "token_classification")]
    folder = written(tmp_path, ours.module, tensors, architectures=architectures)
    backbone = cj.load_backbone(folder, head="sequence_classification", num_labels=3)
    assert all("classifier" in path for path in backbone.new_parameters)
    assert backbone.new_parameters


@pytest.mark.parametrize("name", SETS)
def test_the_mean_of_the_tokens_is_read_by_the_same_classifier(name, tmp_path):
    """With the pooling "mean", the family's classifier reads the mean, and files say so."""
    first = small_encoder(name, "sequence_classification")
    module = first.module.clone(pooling="mean")
    ids, alone = np.array([[5, 6, 7, 8]]), np.array([[1, 0, 0, 0]])

    def logits(module, mask):
        return module.apply({"params": first.params}, ids, mask)

    # The mean of one token is this token.
    np.testing.assert_allclose(logits(module, alone), logits(first.module, alone), atol=2e-6)
    assert np.abs(logits(module, None) - logits(first.module, None)).max() > 1e-3
    cj.save_backbone(tmp_path, module, first.params, torch_config(module))
    again = cj.load_backbone(tmp_path)
    assert again.module.pooling == "mean"
    assert_equal_trees(again.params, first.params)


RELATED = {
    "deberta-v2": "roberta",
    "longformer": "roberta",
    "xlm-roberta-xl": "xlm-roberta",
    "albert": "bert",
}


@pytest.mark.parametrize(("model_type", "family"), RELATED.items())
def test_related_types_are_refused_by_name(model_type, family, tmp_path):
    """A type that resembles a family is refused, and the message says which."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    message = rf"says model_type='{model_type}' \(it resembles '{family}', but .*'distilbert'"
    with pytest.raises(ValueError, match=message):
        cj.load_backbone(tmp_path)


BAD = {
    "type": ("roberta", {"model_type": "deberta"}, "unknown model_type='deberta'; use one of bert"),
    "padding": ("roberta", {"pad_token_id": None}, "pad_token_id=None: .* counts positions from"),
    "positions": (
        "roberta",
        {"max_position_embeddings": 2},
        "max_position_embeddings=2 leaves no position after .* pad_token_id=1; use 3 or more",
    ),
    "embeddings": ("roberta", {"embedding_size": 8}, "embedding_size=8 was given, but embeddings"),
    "no embeddings": ("electra", {"embedding_size": 0}, "embedding_size=0 is not positive"),
    "heads": ("distilbert", {"n_heads": 5}, "n_heads=5 does not divide dim=12; use one of 1, 2"),
    "rates": ("distilbert", {"qa_dropout": 1.0}, "qa_dropout=1.0 is not a dropout rate"),
    "activation": ("distilbert", {"activation": "gelo"}, "unknown activation 'gelo'"),
}


@pytest.mark.parametrize(("name", "changes", "message"), BAD.values(), ids=BAD)
def test_configurations_that_cannot_be(name, changes, message):
    """A value that no model can have is refused by the name of its field."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIGS[name], **changes)


def test_tensors_and_layers_that_are_not_the_models(tmp_path):
    """Tensors of unknown kinds, and fewer layers than config.json says, are refused."""
    for name, called in (("roberta", "BERT"), ("distilbert", "DistilBERT")):
        with pytest.raises(ValueError, match=f"'encoder.x' is not one of {called}: its name ends"):
            FAMILIES[name].from_hugging_face({"encoder.x": np.ones(2)})
    ours = small_encoder("distilbert")
    tensors = FAMILIES["distilbert"].to_hugging_face(ours.params, None)
    folder = written(tmp_path, ours.module, tensors, n_layers=3)
    with pytest.raises(ValueError, match="n_layers=3, but there are weights of 1 layers"):
        cj.load_backbone(folder, head=None)
    with pytest.raises(ValueError, match="num_labels=2 was given, but head='masked_lm' has no"):
        cj.load_backbone(folder, head="masked_lm", num_labels=2)


# Counts that transformers gives for its models without a head; of ELECTRA, those of Keras less the
# pooler that it adds, of width 256.
PUBLISHED = {
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "xlm-roberta-base": 278_043_648,
    "camembert-base": 110_621_952,
    "distilbert-base-uncased": 66_362_880,
    "distilbert-base-multilingual-cased": 134_734_080,
    "google/electra-small-discriminator": 13_548_800 - 65_792,
    "google/electra-base-generator": 33_576_960 - 65_792,
    "google/electra-large-generator": 51_065_344 - 65_792,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_the_published_sizes(name, count):
    """The numbers of parameters follow from the configuration alone."""
    module = module_from_name(name)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.dummy_inputs())["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("name", SETS)
def test_int8_stores_kernels_and_words(name):
    """Logits of an 8-bit backbone stay near those of float32, and layer norms stay float32."""
    ours = small_encoder(name, "sequence_classification", hidden_size=24)
    narrow = cj.cast_frozen(ours.params, "int8")
    ids = jnp.array([[4, 5, 6, 7]])
    exact, rough = (ours.module.apply({"params": p}, ids) for p in (ours.params, narrow))
    assert 0 < np.abs(exact - rough).max() < 0.1 * np.abs(exact).max()
