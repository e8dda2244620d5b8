"""Trims the vocabulary of backbones: the same pieces, the same hidden states, fewer rows."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from transformers import AutoTokenizer

import compacter_jax as cj
from tests.conftest import WORDS
from tests.train.exchange.test_create_backbone import words
from train.__main__ import main
from train.exchange.create_backbone import CreateOptions, create_backbone

SENTENCES = (" ".join(WORDS[:3]), f"{WORDS[2]} zz {WORDS[5]}")


def trim(folder, text, out):
    path = out.parent / "text.txt"
    path.write_text(text, encoding="utf-8")
    flags = ["--backbone", folder, "--text-files", path, "--output-dir", out]
    return main(["trim-vocabulary", *map(str, flags)])


def refusal(capsys, *arguments):
    assert trim(*arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert not arguments[-1].exists() or arguments[-1].is_file()
    return error


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """Returns the folder of a random T5 with a Unigram tokenizer, and its text."""
    folder = tmp_path_factory.mktemp("unigram")
    (folder / "text.txt").write_text(words(400), encoding="utf-8")
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 3}
    out = folder / "t5"
    files = (folder / "text.txt",)
    create_backbone(CreateOptions(text_files=files, output_dir=out, vocab_size=512, **sizes))
    return out, f"{words(3)} xyz"


def test_hidden_states_of_kept_pieces_stay(tiny_backbone, tmp_path, capsys):
    """Pieces, special tokens and hidden states are those of the whole vocabulary, bit for bit."""
    out = tmp_path / "small"
    assert trim(tiny_backbone, "\n\n".join(SENTENCES), out) == 0
    tokenizers = [AutoTokenizer.from_pretrained(str(f)) for f in (tiny_backbone, out)]
    size = len(tokenizers[1])
    assert f"pieces: {len(tokenizers[0]):,} -> {size:,}" in capsys.readouterr().out
    assert size < len(tokenizers[0])
    models = [cj.load_backbone(str(f)) for f in (tiny_backbone, out)]
    assert models[1].config.vocab_size == size
    states = []
    for tokenizer, model in zip(tokenizers, models, strict=True):
        inputs = tokenizer(list(SENTENCES), padding=True, return_tensors="np")
        found = model.module.apply(
            {"params": model.params}, inputs["input_ids"], inputs["attention_mask"]
        )
        pieces = [tokenizer.convert_ids_to_tokens(row) for row in inputs["input_ids"]]
        states.append((pieces, np.asarray(found.last_hidden_state)))
    assert states[0][0] == states[1][0]
    np.testing.assert_array_equal(states[0][1], states[1][1])
    (_, one), (_, other) = ((m.config, dict(m.params)) for m in models)
    for tree in (one, other):
        tree["embeddings"] = {k: v for k, v in tree["embeddings"].items() if "word" not in k}
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_unigram_vocabulary_and_its_settings(t5, tmp_path):
    """All pieces of one character stay; ids in config and post-processor are the new ones."""
    folder, text = t5
    out = tmp_path / "small"
    assert trim(folder, text, out) == 0
    before, after = (AutoTokenizer.from_pretrained(str(f)) for f in (folder, out))
    assert before.tokenize(text) == after.tokenize(text)
    assert after(text)["input_ids"][-1] == after.eos_token_id
    pieces = set(after.get_vocab())
    single = {piece for piece in before.get_vocab() if len(piece.removeprefix("▁")) <= 1}
    needed = {*before.tokenize(text), *single, *before.all_special_tokens}
    assert pieces == needed
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == len(pieces)
    for name in ("pad", "eos"):
        assert config[f"{name}_token_id"] == getattr(after, f"{name}_token_id")
    old, new = (safetensors.numpy.load_file(f / "model.safetensors") for f in (folder, out))
    rows = before.convert_tokens_to_ids(after.convert_ids_to_tokens(range(len(pieces))))
    np.testing.assert_array_equal(new["shared.weight"], old["shared.weight"][rows])
    assert {name for name in old if old[name].shape != new[name].shape} == {"shared.weight"}


def test_the_bias_of_masked_words_and_shards(tiny_backbone, tmp_path):
    """A checkpoint in two files, with a head for masked words, is trimmed as a whole."""
    folder, out = tmp_path / "sharded", tmp_path / "small"
    shutil.copytree(tiny_backbone, folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    head = {"cls.predictions.bias": np.arange(size, dtype=np.float32)}
    (folder / "model.safetensors").unlink()
    shards = {"a.safetensors": tensors, "b.safetensors": head}
    for name, of_shard in shards.items():
        safetensors.numpy.save_file(of_shard, folder / name)
    names = {name: shard for shard, of_shard in shards.items() for name in of_shard}
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert trim(folder, SENTENCES[0], out) == 0
    new = safetensors.numpy.load_file(out / "model.safetensors")
    before, after = (AutoTokenizer.from_pretrained(str(f)) for f in (folder, out))
    rows = before.convert_tokens_to_ids(after.convert_ids_to_tokens(range(len(after))))
    np.testing.assert_array_equal(new["cls.predictions.bias"], rows)
    assert new.keys() == names.keys()


def changed(folder, out, name, change):
    shutil.copytree(folder, out)
    settings = json.loads((out / name).read_text())
    change(settings)
    (out / name).write_text(json.dumps(settings))
    return out


def test_what_cannot_be_trimmed_is_refused(tiny_backbone, tmp_path, capsys):
    text, out = SENTENCES[0], tmp_path / "small"
    merges = changed(
        tiny_backbone,
        tmp_path / "bpe",
        "tokenizer.json",
        lambda t: t.update(model={"type": "BPE", "vocab": {"a": 0}, "merges": []}),
    )
    assert "is of the kind BPE" in refusal(capsys, merges, text, out)
    few = changed(tiny_backbone, tmp_path / "few", "config.json", lambda c: c.update(vocab_size=6))
    assert "but the backbone has 6 embeddings" in refusal(capsys, few, text, out)
    other = changed(
        tiny_backbone, tmp_path / "other", "config.json", lambda c: c.update(vocab_size=1000)
    )
    assert "no tensor of the backbone has 1,000 rows" in refusal(capsys, other, text, out)
    assert "has no text" in refusal(capsys, tiny_backbone, "\n \n", out)
    assert "not a folder" in refusal(capsys, "no/such/folder", text, out)
    out.write_text("mine")
    assert "choose another --output-dir" in refusal(capsys, tiny_backbone, text, out)
    assert out.read_text() == "mine"


def test_texts_of_embeddings_in_lower_case_and_their_pooling(tiny_backbone, tmp_path):
    """Pieces of texts in lower case stay where they are read so; the pooling's folder is copied."""
    folder, out = tmp_path / "sentences", tmp_path / "small"
    shutil.copytree(tiny_backbone, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    kinds = {"": "Transformer", "pool": "Pooling"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "pool").mkdir()
    (folder / "pool/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    assert trim(folder, WORDS[2].upper(), out) == 0
    assert WORDS[2] in AutoTokenizer.from_pretrained(str(out)).get_vocab()
    assert cj.read_sentence_embedding(out) == cj.read_sentence_embedding(folder)
    assert cj.read_sentence_embedding(out).pooling == "cls"
    (out / "pool/config.json").unlink()
    with pytest.raises(
        ValueError, match=r"names a pooling in 'pool/config.json', which is missing"
    ):
        cj.read_sentence_embedding(out)
