"""Tests how sentences are put to a model that translates, and how translations are scored."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

import compacter_jax as cj
from tests.helpers import quick_key
from tests.parallel_data import write_model
from tests.seq2seq_models import tiny
from train.compute.outputs import split_outputs
from train.data import batching
from train.data.languages import language_tokens
from train.objectives.translation import Translation
from train.tasks import metrics


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns two tokenizers: one with `<en>`, and one with `__en__` as M2M-100 has it."""
    folder = tmp_path_factory.mktemp("tokenizers")
    own, like_m2m = write_model(folder), folder / "like-m2m"
    shutil.copytree(own, like_m2m)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (like_m2m / name).read_text()
        for language in ("en", "de", "fr"):
            text = text.replace(f"<{language}>", f"__{language}__")
        json.loads(text)
        (like_m2m / name).write_text(text)
    return own, like_m2m


ROWS = {
    "source": ["ba do", "sch", "ba ki lu"],
    "target": ["sch ech", "ba", "eau tre que"],
    "source_language": ["en", "de", "en"],
    "target_language": ["de", "en", "fr"],
}
DIRECTIONS = ("en-fr", "en-de", "de-en")


def objective_of(folder, **changes):
    config = tiny("m2m_100", pad_token_id=0, eos_token_id=1, decoder_start_token_id=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = Translation(
        None, tokenizer, config, 16, DIRECTIONS, members=(2, 0, 1), max_target_length=8
    )
    return dataclasses.replace(made, **changes), tokenizer


def split(ids, offsets):
    return [part.tolist() for part in np.split(ids, offsets[1:-1])]


def test_the_token_of_the_target_comes_before_the_source(folders):
    """`<de>` is the first token of what is read; what is written begins with its first word."""
    objective, tokenizer = objective_of(folders[0])
    encoded = objective.encode(ROWS)
    plain = tokenizer(ROWS["source"])["input_ids"]
    first = tokenizer.convert_tokens_to_ids(["<de>", "<en>", "<fr>"])
    wanted = [[token, *ids] for token, ids in zip(first, plain, strict=True)]
    assert split(encoded.input_ids, encoded.offsets) == wanted
    texts = encoded.target_texts
    assert split(texts.ids, texts.offsets) == tokenizer(ROWS["target"])["input_ids"]
    assert encoded.routes.first_tokens is None
    assert encoded.routes.adapter_ids.tolist() == [0, 1, 2]
    assert encoded.max_length == 16


def test_the_tokens_of_m2m_100_are_forced(folders):
    """The source's token precedes the source, and the target's is written first."""
    objective, tokenizer = objective_of(folders[1])
    encoded = objective.encode(ROWS)
    ids = dict(
        zip(
            ("en", "de", "fr"),
            tokenizer.convert_tokens_to_ids(["__en__", "__de__", "__fr__"]),
            strict=True,
        )
    )
    plain = tokenizer(ROWS["source"])["input_ids"]
    before = [ids[language] for language in ROWS["source_language"]]
    wanted = [[token, *rest] for token, rest in zip(before, plain, strict=True)]
    assert split(encoded.input_ids, encoded.offsets) == wanted
    plain = tokenizer(ROWS["target"])["input_ids"]
    before = [ids[language] for language in ROWS["target_language"]]
    assert encoded.routes.first_tokens.tolist() == before
    wanted = [[token, *rest] for token, rest in zip(before, plain, strict=True)]
    assert split(encoded.target_texts.ids, encoded.target_texts.offsets) == wanted
    assert encoded.target_texts.max_length == 8
    # The token of the source is read; the one of the target is forced, so it is no label.
    assert encoded.target_texts.given == 1
    (batch, *_) = batching.batches(encoded, 4, shuffle=False)
    assert not np.isin(batch["labels"], before).any()
    assert np.isin(batch["decoder_input_ids"], before).any()


def test_what_is_too_long_keeps_its_language(folders):
    """Long texts are cut to the maximum, with the language and the end of the sequence."""
    for folder in folders:
        objective, _ = objective_of(folder)
        long = {**ROWS, "source": [" ".join(["ba do"] * 20)] * 3, "target": ["ein ber " * 9] * 3}
        encoded = objective.encode(long)
        assert np.diff(encoded.offsets).tolist() == [16, 16, 16]
        assert np.diff(encoded.target_texts.offsets).tolist() == [8, 8, 8]
        assert encoded.num_truncated == encoded.target_texts.num_truncated == 3


def test_languages_of_other_forms(folders):
    """Names that are tokens themselves, as NLLB-200 has them, are found; mixed forms are not."""
    _, tokenizer = objective_of(folders[0])
    tokenizer.add_special_tokens({"additional_special_tokens": ["deu_Latn", "eng_Latn"]})
    found = language_tokens(["deu_Latn", "eng_Latn"], tokenizer)
    assert found.are_forced
    assert found.ids["eng_Latn"] == tokenizer.convert_tokens_to_ids("eng_Latn")
    with pytest.raises(ValueError, match="no token for the language 'es'"):
        language_tokens(["en", "es"], tokenizer)


def test_directions_without_an_adapter(folders):
    """A row of another direction is refused by its number, except by a model for all of them."""
    objective, _ = objective_of(folders[0])
    rows = {name: [*values[:1], values[1]] for name, values in ROWS.items()}
    rows["target_language"] = ["de", "fr"]
    with pytest.raises(ValueError, match="row 2: there is no adapter for 'de-fr'; there are those"):
        objective.encode(rows)
    shared = dataclasses.replace(objective, members=None, is_open=True)
    assert shared.encode(rows).routes.adapter_ids is None


def test_scores_are_those_of_sacrebleu(folders):
    """BLEU and chrF of each direction are sacrebleu's, and their means those over directions."""
    sacrebleu = pytest.importorskip("sacrebleu")
    objective, tokenizer = objective_of(folders[0], generates=True)
    rng = np.random.default_rng(0)
    words = ("sch", "ech", "ung", "ein", "ber", "eau", "tre", "que", "ba", "do")
    text = lambda: " ".join(rng.choice(words, rng.integers(4, 9)))  # noqa: E731
    languages = [("en", "de"), ("en", "fr"), ("en", "de"), ("de", "en"), ("en", "de")]
    rows = {
        "source": [text() for _ in languages],
        "target": [text() for _ in languages],
        "source_language": [a for a, _ in languages],
        "target_language": [b for _, b in languages],
    }
    said = [f"{wanted} ba" if i % 2 else text() for i, wanted in enumerate(rows["target"])]
    encoded = dataclasses.replace(objective, max_target_length=64).encode(rows)
    ids = [[1, *tokens] for tokens in tokenizer(said)["input_ids"]]
    padded = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = tokens
    outputs = {
        "ids": padded,
        "correct": np.array([1, 2, 0, 1, 0]),
        "loss": np.array([0.5, 1.0, 2.0, 0.1, 0.7]),
    }
    found = objective.scores(outputs, encoded)
    lengths = np.diff(encoded.target_texts.offsets)
    assert found["token_accuracy"] == pytest.approx(4 / lengths.sum())
    assert found["loss"] == pytest.approx((outputs["loss"] * lengths).sum() / lengths.sum())
    bleus = []
    for name in ("en-de", "en-fr", "de-en"):
        of_it = [i for i, pair in enumerate(languages) if "-".join(pair) == name]
        mine, theirs = [said[i] for i in of_it], [[rows["target"][i] for i in of_it]]
        bleus.append(sacrebleu.corpus_bleu(mine, theirs).score)
        assert found[f"bleu_{name}"] == pytest.approx(bleus[-1])
        assert found[f"chrf_{name}"] == pytest.approx(sacrebleu.corpus_chrf(mine, theirs).score)
    assert found["bleu"] == pytest.approx(np.mean(bleus))
    assert max(bleus) > 20


def test_generation_is_compiled_for_each_length_of_the_inputs_alone(folders):
    """Targets of other lengths need no program of their own; the scores are those of all rows."""
    objective, tokenizer = objective_of(
        folders[0], generates=True, members=None, max_length=40, max_target_length=64
    )
    config = dataclasses.replace(objective.config, vocab_size=len(tokenizer))
    model = cj.Adapted(cj.Seq2Seq(config), cj.preset("head-only"))
    objective = dataclasses.replace(objective, model=model, config=config)
    params = model.init(quick_key(0), *model.backbone.dummy_inputs())["params"]
    count = 6
    rows = {
        "source": [" ".join(["sch"] * (1 + 19 * (i % 2))) for i in range(count)],
        "target": [" ".join(["ung"] * (1 + i)) for i in range(count)],
        "source_language": ["en"] * count,
        "target_language": ["de"] * count,
    }
    encoded = objective.encode(rows)
    compiled = jax.jit(objective.outputs)
    found = split_outputs(lambda batch: compiled(params, batch), encoded, 4, description=None)
    inputs = np.searchsorted(batching.bucket_lengths(40), np.diff(encoded.offsets))
    targets = np.searchsorted(batching.bucket_lengths(64, 4), np.diff(encoded.target_texts.offsets))
    assert len(set(inputs)) == compiled._cache_size() == 2
    assert len(set(zip(inputs, targets, strict=True))) > 2
    apart = dataclasses.replace(objective, generates=False)
    own = split_outputs(
        lambda batch: apart.outputs(params, batch),
        dataclasses.replace(encoded, is_generated=False),
        4,
        description=None,
    )
    np.testing.assert_array_equal(found["correct"], own["correct"])
    np.testing.assert_allclose(found["loss"], own["loss"], rtol=1e-5)


def test_the_code_of_a_language_without_its_script():
    """BLEU divides by the language, whatever the region or script in its name."""
    names = ("de", "pt_BR", "zho_Hans", "jpn_Jpan", "zh-Hans")
    assert [metrics.base_language(name) for name in names] == ["de", "pt", "zh", "ja", "zh"]
