"""Small tokenizers of the classes that translation models were published with, in Python."""

import json

import sentencepiece

from tests.parallel_data import sentences

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
# Those of the other languages are left out: these tests have no more.
LANGUAGES = ("de", "en", "fr")


def _model(path, texts, size):
    """Trains byte pairs of texts; returns the pieces."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(path.with_suffix("")),
        vocab_size=size,
        model_type="bpe",
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
    )
    path.with_suffix(".vocab").unlink()
    found = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [found.id_to_piece(i) for i in range(found.get_piece_size())]


def _written(path, pieces):
    path.write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}), encoding="utf-8")
    return str(path)


def texts_of(*languages):
    return [row[language] for row in sentences(40, seed=0) for language in languages]


def write_m2m_100(folder):
    """Writes a tokenizer of M2M-100, with the tokens of its hundred languages."""
    from transformers import M2M100Tokenizer
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES

    folder.mkdir()
    pieces = _model(folder / "pieces.model", texts_of(*LANGUAGES), 60)
    M2M100Tokenizer(
        _written(folder / "vocab.json", pieces),
        str(folder / "pieces.model"),
        additional_special_tokens=[f"__{code}__" for code in FAIRSEQ_LANGUAGE_CODES["m2m100"]],
    ).save_pretrained(folder)
    return folder


def write_marian(folder):
    """Writes a tokenizer of OPUS-MT, of one language into two, with pieces of its own for each."""
    from transformers import MarianTokenizer

    folder.mkdir()
    read = _model(folder / "read.model", texts_of("en"), 40)
    said = _model(folder / "said.model", texts_of("de", "fr"), 50)
    pieces = [each for each in dict.fromkeys([*read, *said]) if each not in SPECIAL]
    pieces = ["</s>", "<unk>", ">>de<<", ">>fr<<", *pieces, "<pad>"]
    vocabulary = _written(folder / "vocab.json", pieces)
    MarianTokenizer(
        str(folder / "read.model"), str(folder / "said.model"), vocabulary
    ).save_pretrained(folder)
    return folder


def write_speech_to_text(folder):
    """Writes a tokenizer of fairseq's multilingual speech translation."""
    from transformers import Speech2TextTokenizer

    folder.mkdir()
    pieces = _model(folder / "pieces.model", texts_of(*LANGUAGES), 60)
    named = [f"<lang:{language}>" for language in LANGUAGES]
    Speech2TextTokenizer(
        _written(folder / "vocab.json", [*pieces, *named]),
        str(folder / "pieces.model"),
        additional_special_tokens=named,
    ).save_pretrained(folder)
    return folder


def write_with_codes(folder, kind):
    """Writes a fast tokenizer with codes such as `de_DE`, of mBART or NLLB-200."""
    import transformers

    folder.mkdir()
    _model(folder / "sentencepiece.bpe.model", texts_of(*LANGUAGES), 60)
    made = getattr(transformers, kind)(vocab_file=str(folder / "sentencepiece.bpe.model"))
    made.save_pretrained(folder)
    return folder
