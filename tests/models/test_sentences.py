"""Tests the files of sentence-transformers: what they say is read, and what is written loads."""

import json
import shutil

import numpy as np
import pytest

import compacter_jax as cj

TYPES = {
    "old": "sentence_transformers.models.{}",
    "new": "sentence_transformers.sentence_transformer.modules.any.{}",
}


def modules(*names, style="old", pooling="1_Pooling"):
    paths = {"Transformer": "", "Pooling": pooling}
    return [
        {
            "idx": i,
            "name": str(i),
            "path": paths.get(name, f"{i}_{name}"),
            "type": TYPES[style].format(name),
        }
        for i, name in enumerate(names)
    ]


def folder(place, of_modules=None, pooling=None, where="1_Pooling", **files):
    place.mkdir()
    if of_modules is not None:
        (place / "modules.json").write_text(json.dumps(of_modules))
    if pooling is not None:
        (place / where).mkdir()
        (place / where / "config.json").write_text(json.dumps(pooling))
    for name, content in files.items():
        (place / f"{name}.json").write_text(json.dumps(content))
    return place


CLS = {"word_embedding_dimension": 24, "pooling_mode_cls_token": True}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({}, cj.SentenceEmbedding("mean")),
        ({"pooling": CLS}, cj.SentenceEmbedding("cls")),
        (
            {"of_modules": modules("Transformer", "Pooling", "Normalize"), "pooling": CLS},
            cj.SentenceEmbedding("cls", normalize=True),
        ),
        (
            {
                "of_modules": modules("Transformer", "Pooling", style="new", pooling="pooled"),
                "pooling": {"pooling_mode": "cls"},
                "where": "pooled",
                "sentence_bert_config": {"max_seq_length": 8, "do_lower_case": True},
                "config_sentence_transformers": {
                    "prompts": {"query": "q: ", "none": ""},
                    "default_prompt_name": "none",
                },
            },
            cj.SentenceEmbedding("cls", lower_case=True),
        ),
    ],
)
def test_a_folder_says_how_it_embeds(arguments, wanted, tmp_path):
    made = folder(tmp_path / "made", **arguments)
    assert cj.read_sentence_embedding(made) == wanted
    chosen = cj.read_sentence_embedding(made, "mean")
    assert chosen.pooling == "mean"
    assert chosen.normalize == wanted.normalize


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"of_modules": modules("Transformer", "Pooling", "Dense")},
            r"modules\.json has the module 'Dense', which is not supported",
        ),
        ({"of_modules": modules("Pooling", "Transformer")}, "has the modules Pooling, Transformer"),
        ({"of_modules": modules("Transformer")}, "has the modules Transformer; supported are"),
        ({"of_modules": {"type": "x"}}, "must hold a list of modules"),
        ({"of_modules": [{"type": 3, "path": ""}]}, "type=3 must be"),
        (
            {"of_modules": modules("Transformer", "Pooling", pooling="../x")},
            "outside of its folder",
        ),
        (
            {
                "of_modules": [
                    {"type": "Transformer", "path": "0_Transformer"},
                    modules("a", "Pooling")[1],
                ]
            },
            "has its Transformer in '0_Transformer', as in old releases",
        ),
        ({"pooling": {"pooling_mode": "lasttoken"}}, "pooling_mode='lasttoken', which is not"),
        (
            {
                "config_sentence_transformers": {
                    "prompts": {"query": "query: "},
                    "default_prompt_name": "query",
                }
            },
            "puts the prompt 'query: ' before every text, which is not supported",
        ),
        ({"sentence_bert_config": {"do_lower_case": "yes"}}, "do_lower_case='yes' must be"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(arguments, told, tmp_path):
    made = folder(tmp_path / "made", **arguments)
    with pytest.raises(ValueError, match=told) as caught:
        cj.read_sentence_embedding(made)
    assert str(made) in str(caught.value)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_is_written_is_read(pooling, normalize, tmp_path):
    embedding = cj.SentenceEmbedding(pooling, normalize, lower_case=normalize)
    cj.write_sentence_embedding(tmp_path, embedding, 24, 16)
    assert cj.read_sentence_embedding(tmp_path) == embedding
    names = {path.name for path in tmp_path.iterdir()}
    assert ("2_Normalize" in names) == normalize
    settings = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    assert settings["max_seq_length"] == 16


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False)])
def test_sentence_transformers_loads_what_is_written(pooling, normalize, tiny_backbone, tmp_path):
    """The written folder has the embeddings of this library in sentence-transformers, to 1e-6."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("sentence_transformers")
    place = tmp_path / "place"
    shutil.copytree(tiny_backbone, place)
    embedding = cj.SentenceEmbedding(pooling, normalize)
    cj.write_sentence_embedding(place, embedding, 24, 8)
    texts = ["the film", "a very good plot was not dull and it was fine", "we"]
    model = theirs.SentenceTransformer(str(place), device="cpu")
    with torch.no_grad():
        found = model.encode(texts)
    assert model.max_seq_length == 8
    backbone = cj.load_backbone(place, head=None)
    encoded = model.tokenizer(texts, padding=True, truncation=True, max_length=8)
    ids, mask = (np.array(encoded[name]) for name in ("input_ids", "attention_mask"))
    states = backbone.module.apply({"params": backbone.params}, ids, mask).last_hidden_state
    np.testing.assert_allclose(embedding(states, mask), found, atol=1e-6)
