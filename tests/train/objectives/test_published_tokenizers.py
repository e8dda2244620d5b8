"""Tests translation with the classes of tokenizers that the published models have."""

import json
import shutil

import numpy as np
import pytest

from tests.parallel_data import fit_flags, write_jsonl, write_model, write_tables
from tests.published_tokenizers import (
    write_m2m_100,
    write_marian,
    write_speech_to_text,
    write_with_codes,
)
from tests.seq2seq_models import tiny
from train.__main__ import main
from train.data.languages import language_tokens
from train.data.tokens import load_tokenizer, token_ids
from train.objectives.translation import Translation
from train.tasks import text_format

SOURCES = ["ba do", "ki lume", "me"]
TARGETS = ["sch ech", "ung einber", "ber"]


def loaded(folder):
    return load_tokenizer(
        folder, vocab_size=10**6, max_position_embeddings=None, max_length=16, may_be_slow=True
    )


def encoded_by_us(tokenizer, source, target):
    """Returns the ids that are read and written for each pair of texts."""
    config = tiny("m2m_100", pad_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    objective = Translation(
        None, tokenizer, config, 16, (f"{source}-{target}",), max_target_length=16
    )
    languages = {"source_language": [source] * 3, "target_language": [target] * 3}
    encoded = objective.encode({"source": SOURCES, "target": TARGETS, **languages})
    pairs = [(encoded.input_ids, encoded.offsets)]
    pairs.append((encoded.target_texts.ids, encoded.target_texts.offsets))
    return [[part.tolist() for part in np.split(ids, ends[1:-1])] for ids, ends in pairs]


@pytest.mark.parametrize(
    ("write", "source", "target"),
    [
        (write_m2m_100, "en", "de"),
        (lambda folder: write_with_codes(folder, "MBart50TokenizerFast"), "en_XX", "de_DE"),
        (lambda folder: write_with_codes(folder, "NllbTokenizerFast"), "eng_Latn", "deu_Latn"),
    ],
    ids=["m2m-100", "mbart-50", "nllb-200"],
)
def test_texts_are_those_of_the_tokenizer_itself(write, source, target, tmp_path):
    """Reads and writes the ids that transformers makes for the two languages."""
    tokenizer = loaded(write(tmp_path / "tokenizer"))
    ours = encoded_by_us(tokenizer, source, target)
    tokenizer.src_lang, tokenizer.tgt_lang = source, target
    wanted = tokenizer(SOURCES, text_target=TARGETS)
    assert ours == [wanted["input_ids"], wanted["labels"]]
    said = text_format.decode(np.array([[2, *row] for row in ours[1][:1]]), tokenizer)
    assert text_format.plain(said) == TARGETS[:1]


def test_the_first_mbart_is_refused(tmp_path):
    """Names the tokenizer whose languages follow the text."""
    tokenizer = loaded(write_with_codes(tmp_path / "tokenizer", "MBartTokenizerFast"))
    with pytest.raises(ValueError, match="is a MBartTokenizer: mBART's first models read the"):
        language_tokens(["en_XX", "de_DE"], tokenizer)


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_opus_mt_has_pieces_of_its_own_for_what_it_writes(tmp_path):
    """Divides targets as the target's model does, and knows languages by `>>de<<`."""
    tokenizer = loaded(write_marian(tmp_path / "tokenizer"))
    source, target = (
        token_ids(texts, tokenizer, are_written=are_written)
        for texts, are_written in ((SOURCES, False), (TARGETS, True))
    )
    wanted = tokenizer(SOURCES, text_target=TARGETS)
    assert [[*ids, 0] for ids in source] == wanted["input_ids"]
    assert [[*ids, 0] for ids in target] == wanted["labels"]
    assert target != token_ids(TARGETS, tokenizer, are_written=False)
    assert text_format.written(TARGETS, tokenizer) == TARGETS
    found = language_tokens(["de", "fr"], tokenizer)
    assert found.ids == {"de": 2, "fr": 3}
    assert not found.are_forced


def test_languages_of_fairseq_speech_are_forced(tmp_path):
    """Finds `<lang:de>`, and writes texts as the tokenizer itself does."""
    tokenizer = loaded(write_speech_to_text(tmp_path / "tokenizer"))
    found = language_tokens(["de", "fr"], tokenizer)
    assert found.are_forced
    assert found.ids["de"] == tokenizer.convert_tokens_to_ids("<lang:de>")
    ids = token_ids(TARGETS, tokenizer, are_written=True)
    assert [[*each, 2] for each in ids] == tokenizer(TARGETS)["input_ids"]
    assert text_format.written(TARGETS, tokenizer) == TARGETS


def test_encoders_need_a_fast_tokenizer(tmp_path):
    """Refuses a tokenizer that does not know the places of its tokens."""
    folder = write_m2m_100(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="is a slow tokenizer, which is for encoder-decoders"):
        load_tokenizer(folder, vocab_size=200, max_position_embeddings=None, max_length=16)


def test_a_run_with_the_tokenizer_of_m2m_100(tmp_path):
    """Trains adapters, saves the tokenizer with them, and translates by the saved folder."""
    backbone = write_model(tmp_path)
    for path in backbone.glob("tokenizer*"):
        path.unlink()
    shutil.copytree(write_m2m_100(tmp_path / "tokenizer"), backbone, dirs_exist_ok=True)
    config = json.loads((backbone / "config.json").read_text())
    config |= {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    (backbone / "config.json").write_text(json.dumps(config))
    flags = fit_flags(backbone, write_tables(tmp_path), tmp_path / "run", directions="en-de,de-en")
    assert main(["fit", *flags]) == 0
    rows = [{"source": "ba do", "source_language": "en", "target_language": "de"}]
    output = tmp_path / "said.jsonl"
    read = write_jsonl(tmp_path / "read.jsonl", rows)
    flags = ["--adapter", tmp_path / "run", "--input", read, "--output", output]
    assert main(["predict", *map(str, flags)]) == 0
    assert "prediction" in json.loads(output.read_text())
