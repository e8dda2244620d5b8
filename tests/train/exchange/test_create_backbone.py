"""Creates a tokenizer and a T5 that transformers and this library load in the same way."""

import dataclasses
import itertools
import json
import string

import jax
import numpy as np
import pytest

import compacter_jax as cj
from train.__main__ import main
from train.cli import method_flags
from train.data.tokens import sentinel_ids
from train.exchange import create_backbone as exchange_create_backbone
from train.exchange.create_backbone import CreateOptions, create_backbone, train_tokenizer

SIZES = {"vocab_size": 512, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 3}
FILES = [
    "config.json",
    "create.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
ORDINARY = (
    "The café's film, isn't it good?",
    'Yes -- $3.50 (or 20% more) & a "great" plot; see <b>http://a.org/x_y</b>!',
    "a",
    string.ascii_letters + string.digits + string.punctuation,
)


def words(count):
    """Returns made-up words; the first ones are the most frequent."""
    syllables = ("ka", "lo", "mi", "ter", "sun", "pre", "o", "é")
    made = ["".join(parts) for parts in itertools.product(syllables, repeat=3)][:count]
    return " ".join(word for i, word in enumerate(made) for _ in range(1 + 60 // (i + 1)))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(f"{words(400)}\n\n{words(100)} 日", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("created") / "new" / "t5"
    create_backbone(CreateOptions(text_files=(text_file,), output_dir=folder, **SIZES))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def decoded(tokenizer, text):
    return tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)


# --- tokenizer ----------------------------------------------------------------------------------


def test_special_tokens_have_the_ids_of_t5(tokenizer):
    assert tokenizer.is_fast
    assert len(tokenizer) == 512
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert sentinel_ids(tokenizer) == tuple(range(511, 411, -1))
    assert len(tokenizer.all_special_ids) == 103
    encoded = tokenizer(["kalo", "mi"], ["ter", "sun"])
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert all(ids[-1] == 1 and ids.count(1) == 2 for ids in encoded["input_ids"])


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_comes_back_exactly(tokenizer, text):
    assert decoded(tokenizer, text) == text
    assert 2 not in tokenizer(text)["input_ids"]


def test_frequent_words_are_few_tokens(tokenizer):
    assert len(tokenizer.tokenize("kakaka kakalo")) <= 4
    # The text contains no pair of these letters.
    assert len(tokenizer.tokenize("qqqqqq vvvvvv")) == 14


def test_characters_outside_of_the_vocabulary_become_bytes(tokenizer):
    ids = tokenizer("日")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "<0xE6>", "<0x97>", "<0xA5>", "</s>"]
    text = "日本 語 naïve 🎉 \x00 ok"
    assert decoded(tokenizer, text) == text


def test_white_space_and_compatibility_characters_are_normalised(tokenizer):
    assert decoded(tokenizer, "\tka  lo\r\nmi… \u3000") == "ka lo mi..."
    assert tokenizer("")["input_ids"] == [1]
    assert tokenizer(" \n")["input_ids"] == [1]


def test_text_that_merely_spells_a_byte_is_text(tokenizer):
    assert decoded(tokenizer, "<0x41> </S>") == "<0x41> </S>"
    assert decoded(tokenizer, "ka<extra_id_0> lo</s>") == "ka lo"


def test_training_again_gives_the_same_tokenizer(text_file, folder):
    again = json.loads(train_tokenizer([text_file], 512).to_str())
    assert again == json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def test_the_vocabulary_has_the_size_asked_for_however_many_the_characters(tmp_path):
    path = tmp_path / "text.txt"
    letters = "".join(chr(0x4E00 + i) for i in range(2000))
    path.write_text(f"{words(500)} {letters} {'日' * 90}", encoding="utf-8")
    vocabulary = train_tokenizer([path], 600).get_vocab()
    assert len(vocabulary) == 600
    assert sorted(vocabulary.values()) == list(range(600))
    # Half of 241 pieces leave room for 120 characters, of which 95 are ASCII.
    others = sorted(token for token in vocabulary if len(token) == 1 and token > "\x7f")
    assert len(others) == 26
    assert {"▁", "é", "日"} < set(others)


def test_vocabularies_that_cannot_be_made(text_file, tmp_path):
    with pytest.raises(
        ValueError, match=r"vocab_size=511 is too small: .* already take 454; use 51"
    ):
        train_tokenizer([text_file], 511)
    with pytest.raises(
        ValueError, match=r"vocab_size=90000 is too large: .* use vocab_size=\d+ or"
    ):
        train_tokenizer([text_file], 90000)
    path = tmp_path / "text.txt"
    for text in ("a", "日" * 50):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="yields only 454 tokens; use more text"):
            train_tokenizer([path], 512)


# --- model --------------------------------------------------------------------------------------


@pytest.mark.contract
def test_the_folder_is_a_backbone(folder):
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["t5"]
    backbone = cj.load_backbone(folder)
    assert backbone.new_parameters == ()
    assert backbone.module.head == "conditional_generation"
    sizes = {name: getattr(backbone.config, name) for name in SIZES}
    assert sizes == SIZES
    # An attention layer has 4 * 16 * 12 parameters and a feed-forward layer 2 * 16 * 24; there are
    # 5 norms and 2 tables of 32 * 3 positions.
    count = sum(leaf.size for leaf in jax.tree.leaves(backbone.params))
    assert count == 512 * 16 + 3 * 768 + 2 * 768 + 7 * 16 + 2 * 96
    record = json.loads((folder / "create.json").read_text(encoding="utf-8"))
    assert record["parameters"] == count
    assert record["vocab_size"] == 512


def test_what_was_made_is_printed(text_file, tmp_path, capsys):
    made = CreateOptions(text_files=(text_file,), output_dir=tmp_path / "t5", **SIZES)
    create_backbone(made)
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 't5'}: a T5 with 12,336 parameters and 512 tokens\n"
    assert printed.err == ""


def test_weights_depend_on_the_seed_alone(text_file, folder, tmp_path):
    weights = []
    for name, seed in (("same", 0), ("other", 1)):
        output_dir = tmp_path / name
        create_backbone(
            CreateOptions(text_files=(text_file,), output_dir=output_dir, seed=seed, **SIZES)
        )
        weights.append((output_dir / "model.safetensors").read_bytes())
    assert weights[0] == (folder / "model.safetensors").read_bytes()
    assert weights[1] != weights[0]


def test_the_size_by_default(tmp_path):
    made = CreateOptions(text_files=(tmp_path,), output_dir=tmp_path)
    module = exchange_create_backbone.new_module(made)[0]
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *module.dummy_inputs()))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    # Each layer has 4 * 256 * 256 of attention (twice in the decoder), and 2 * 256 * 1024 of
    # feed-forward.
    assert count == 8000 * 256 + 6 * (3 * 262_144 + 2 * 524_288) + 32 * 256 + 2 * 32 * 4


@pytest.mark.slow
@pytest.mark.parametrize(("feed_forward", "tied"), [("relu", True), ("gated-gelu", False)])
def test_logits_equal_those_of_pytorch(text_file, tmp_path, feed_forward, tied):
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    create_backbone(
        CreateOptions(
            text_files=(text_file,),
            output_dir=tmp_path,
            feed_forward=feed_forward,
            tie_word_embeddings=tied,
            seed=3,
            **SIZES,
        )
    )
    model, report = T5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer(["kalo <extra_id_0> mi", "ter"], padding=True, return_tensors="np")
    labels = tokenizer(["sun", "o"], padding=True, return_tensors="np")["input_ids"]
    starts = np.pad(labels, ((0, 0), (1, 0)))[:, :-1]
    with torch.no_grad():
        tensors = {name: torch.tensor(array) for name, array in inputs.items()}
        expected = model.eval()(**tensors, decoder_input_ids=torch.tensor(starts)).logits.numpy()
        generated = model.generate(**tensors, max_new_tokens=3)
    assert generated[:, 0].tolist() == [0, 0]
    backbone = cj.load_backbone(tmp_path)
    actual = jax.jit(backbone.module.apply)(
        {"params": backbone.params}, inputs["input_ids"], inputs["attention_mask"], starts
    )
    np.testing.assert_allclose(actual, expected, atol=2e-5)


# --- options and files --------------------------------------------------------------------------


def test_every_option_is_explained_and_has_a_flag():
    import tyro

    documented = method_flags.documented(CreateOptions)
    assert all(documented[field.name] for field in dataclasses.fields(CreateOptions))
    flags = ["--text-files", "a.txt", "b.txt", "--output-dir", "t5", "--feed-forward", "gated-gelu"]
    made = tyro.cli(CreateOptions, args=[*flags, "--no-tie-word-embeddings", "--d-model", "64"])
    assert [path.name for path in made.text_files] == ["a.txt", "b.txt"]
    assert (made.feed_forward, made.tie_word_embeddings, made.d_model) == ("gated-gelu", False, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 359}, "vocab_size=359 is too small"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"d_model": -1}, "d_model=-1 must be at least 1"),
        ({"seed": -1}, r"seed=-1 must be from 0 to 2\*\*31 - 1"),
        ({"text_files": ()}, "text_files is empty; give at least one"),
    ],
)
def test_options_that_cannot_work(text_file, tmp_path, changes, message):
    made = CreateOptions(text_files=(text_file,), output_dir=tmp_path / "t5")
    with pytest.raises(ValueError, match=message):
        create_backbone(dataclasses.replace(made, **changes))
    assert not list(tmp_path.iterdir())


def test_text_that_cannot_be_read(text_file, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"ka \xff")
    for path, error, message in [
        (tmp_path / "none.txt", FileNotFoundError, r"none\.txt does not exist"),
        (tmp_path, ValueError, "is a directory, not a file"),
        (bad, ValueError, r"bad\.txt is not UTF-8 \(byte 0xff\)"),
    ]:
        made = CreateOptions(text_files=(text_file, path), output_dir=tmp_path / "t5", **SIZES)
        with pytest.raises(error, match=message):
            create_backbone(made)
        assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_only_what_the_command_wrote_is_replaced(text_file, tmp_path):
    output_dir = tmp_path / "t5"
    made = CreateOptions(text_files=(text_file,), output_dir=output_dir, **SIZES)
    again = dataclasses.replace(made, overwrite=True, seed=1)
    output_dir.mkdir()
    create_backbone(made)  # an empty folder counts as none
    before = (output_dir / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a backbone; replace it with --overwrite"):
        create_backbone(made)
    (output_dir / "notes.md").write_text("mine")
    with pytest.raises(
        ValueError, match=r"holds files that this command did not write, for .* notes\.md;"
    ):
        create_backbone(again)
    assert (output_dir / "model.safetensors").read_bytes() == before
    (output_dir / "notes.md").unlink()
    create_backbone(again)
    assert (output_dir / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in output_dir.iterdir()) == FILES
    (output_dir / "create.json").unlink()
    with pytest.raises(ValueError, match="holds files, but no backbone that this command wrote"):
        create_backbone(again)
    assert [path.name for path in tmp_path.iterdir()] == ["t5"]
    with pytest.raises(ValueError, match=r"text\.txt is a file, not a folder"):
        create_backbone(dataclasses.replace(made, output_dir=text_file))


def test_a_failure_leaves_what_was_there(text_file, folder, tmp_path, monkeypatch):
    output_dir = tmp_path / "t5"
    output_dir.mkdir()
    for name in FILES:
        (output_dir / name).write_bytes((folder / name).read_bytes())

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(cj, "save_backbone", fail)
    made = CreateOptions(text_files=(text_file,), output_dir=output_dir, overwrite=True, **SIZES)
    with pytest.raises(OSError, match="No space left"):
        create_backbone(made)
    assert [path.name for path in tmp_path.iterdir()] == ["t5"]
    for name in FILES:
        assert (output_dir / name).read_bytes() == (folder / name).read_bytes()


# --- M2M-100 ------------------------------------------------------------------------------------

M2M = {"vocab_size": 420, "d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4}


def test_an_m2m_100_with_tokens_of_languages(text_file, tmp_path):
    """Both libraries load it; languages have the last tokens, and weights their distributions."""
    from transformers import AutoTokenizer

    options = CreateOptions(
        text_files=(text_file,),
        output_dir=tmp_path / "m2m",
        model_type="m2m_100",
        languages=("en", "pt_BR"),
        **M2M,
    )
    create_backbone(options)
    tokenizer = AutoTokenizer.from_pretrained(options.output_dir)
    assert tokenizer.convert_tokens_to_ids(["<en>", "<pt_BR>"]) == [418, 419]
    assert len(tokenizer) == 420
    assert tokenizer("<en> ka")["input_ids"][0] == 418
    backbone = cj.load_backbone(options.output_dir)
    config = backbone.module.config
    assert (config.model_type, config.encoder_layerdrop) == ("m2m_100", 0.0)
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, 1, 1)
    embedding = np.asarray(backbone.params["shared"]["embedding"])
    np.testing.assert_array_equal(embedding[0], 0)
    assert abs(embedding[1:].std() * np.sqrt(32) - 1) < 0.03  # of 13,408 numbers
    kernel = np.asarray(backbone.params["encoder"]["layers"]["0"]["fc1"]["kernel"])
    bound = np.sqrt(6 / (32 + 48))
    assert 0.99 * bound < np.abs(kernel).max() <= bound
    assert abs(kernel.std() * np.sqrt(3) / bound - 1) < 0.06  # of 1,536 numbers


def test_an_m2m_100_with_a_compressed_decoder(text_file, tmp_path):
    """Its layers have one attention with Glorot-uniform weights, and both fields are written."""
    folder = tmp_path / "m2m"
    flags = ["--decoder-layer", "compressed", "--decoder-value-dim", "40", "--vocab-size", "420"]
    flags += ["--d-model", "32", "--d-ff", "48", "--num-layers", "1", "--num-heads", "4"]
    places = ["--text-files", str(text_file), "--output-dir", str(folder)]
    assert main(["create-backbone", *places, "--model-type", "m2m_100", *flags]) == 0
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["decoder_layer"], settings["decoder_value_dim"]) == ("compressed", 40)
    backbone = cj.load_backbone(folder)
    (layer,) = backbone.params["decoder"]["layers"].values()
    assert set(layer) == {"encoder_attn", "encoder_attn_layer_norm"}
    kernel = np.asarray(layer["encoder_attn"]["encoder_v_proj"]["kernel"])
    assert kernel.shape == (32, 40)
    bound = np.sqrt(6 / (32 + 40))
    assert 0.98 * bound < np.abs(kernel).max() <= bound


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "t5", "languages": (), "decoder_layer": "compressed"},
            "decoder_layer and decoder_value_dim are for model_type=m2m_100; a T5 has no compress",
        ),
        ({"decoder_value_dim": 8}, "decoder_value_dim=8 is for decoder_layer=compressed; leave it"),
        (
            {"decoder_layer": "compressed", "decoder_value_dim": 6},
            "decoder_value_dim=6, the width of a compressed decoder's values, must be a positive",
        ),
        ({"decoder_layer": "compressed", "d_ff": 42}, "d_ff=42, the width of a compressed deco"),
        ({"model_type": "t5"}, "languages are for model_type=m2m_100; a T5 has no tokens of them"),
        ({"d_kv": 8}, "d_kv=8 is for model_type=t5; leave it out"),
        ({"feed_forward": "gated-gelu"}, "feed_forward=gated-gelu is for model_type=t5"),
        ({"num_heads": 5}, "num_heads=5 does not divide d_model=32"),
        (
            {"languages": ("de", "de")},
            "languages: 'de' is given twice, or is no name of a language",
        ),
        ({"languages": ("<de>",)}, "languages: '<de>' is given twice, or is no name of a language"),
        ({"vocab_size": 413}, "vocab_size=413 is too small"),
    ],
)
def test_an_m2m_100_that_cannot_be(changes, message, text_file, tmp_path):
    """A field of the other type, languages that are none and sizes that do not fit are refused."""
    settings = {"model_type": "m2m_100", "languages": ("en", "de"), **M2M, **changes}
    with pytest.raises(ValueError, match=message):
        create_backbone(CreateOptions(text_files=(text_file,), output_dir=tmp_path, **settings))


# --- speech -------------------------------------------------------------------------------------


def test_a_speech_model_with_fewer_layers_in_the_decoder(text_file, tmp_path):
    """Its rows do not depend on padding, its frames have positions, and it speaks to no one yet."""
    folder = tmp_path / "speech"
    flags = ["--vocab-size", "420", "--d-model", "32", "--d-ff", "48", "--num-heads", "4"]
    flags += ["--num-layers", "2", "--num-decoder-layers", "1", "--conv-channels", "20"]
    places = ["--text-files", str(text_file), "--output-dir", str(folder), "--languages", "de"]
    assert main(["create-backbone", *places, "--model-type", "speech_to_text", *flags]) == 0
    backbone = cj.load_backbone(folder)
    config = backbone.module.config
    assert isinstance(config, cj.SpeechToTextConfig)
    assert config.mask_between_convolutions
    assert (config.encoder_layers, config.decoder_layers, config.feature_size) == (2, 1, 80)
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, 1, 1)
    kernel = np.asarray(backbone.params["encoder_conv"]["conv_layers"]["0"]["kernel"])
    assert kernel.shape == (5, 80, 20)
    bound = np.sqrt(6 / (5 * (80 + 20)))
    assert 0.99 * bound < np.abs(kernel).max() <= bound
    embedding = np.asarray(backbone.params["decoder_embed_tokens"]["embedding"])
    assert abs(embedding[1:].std() * np.sqrt(32) - 1) < 0.03


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_channels": 7}, "conv_channels=7 is odd, and a gated linear unit halves it"),
        ({"conv_channels": 0}, "conv_channels=0 must be at least 1"),
        ({"num_decoder_layers": 0}, "num_decoder_layers=0 must be at least 1"),
        ({"decoder_layer": "compressed"}, "decoder_layer=compressed is for model_type=m2m_100; a"),
        ({"decoder_value_dim": 8}, "decoder_value_dim=8 is for decoder_layer=compressed; leave it"),
        ({"d_kv": 8}, "d_kv=8 is for model_type=t5; leave it out"),
        (
            {"model_type": "m2m_100", "conv_channels": 8},
            "conv_channels=8 is for model_type=speech_to_text; leave it out",
        ),
    ],
)
def test_a_speech_model_that_cannot_be(changes, message, text_file, tmp_path):
    """Fields of other types and numbers out of range are refused."""
    settings = {"model_type": "speech_to_text", "languages": ("de",), **M2M, **changes}
    with pytest.raises(ValueError, match=message):
        create_backbone(CreateOptions(text_files=(text_file,), output_dir=tmp_path, **settings))
