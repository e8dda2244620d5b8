"""Compares generated text with labels and targets as a tokenizer writes them; BLEU; .tsv files."""

# ruff: noqa: RUF001 - full-width marks are what some of it is about

import dataclasses
import json
import types

import numpy as np
import pytest
import sacrebleu
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from train.data import corpus as data_corpus
from train.data import tokens as data_tokens
from train.objectives.on_text import Corpus
from train.objectives.text_to_text import TextToText
from train.tasks import load_task, metrics, text_format
from train.tasks.benchmarks import BENCHMARKS, find

LETTERS = "▁abcdefghijklmnopqrstuvwxyz0123456789=>.,!今天气很好电影不错，"
WAYS = {
    "T5": normalizers.NFKC(),
    "decomposing": normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()]),
    "lower case": normalizers.Lowercase(),
}


def tokenizer_of(way):
    """Returns a character tokenizer without `<`, braces and capitals, with T5's normalisation."""
    vocabulary = ["<pad>", "</s>", "<unk>", *LETTERS.replace("，", "")]
    made = Tokenizer(
        models.Unigram([(token, -1.0) for token in vocabulary], unk_id=2, byte_fallback=False)
    )
    made.normalizer = WAYS[way]
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def said(tokenizer, texts):
    """Returns the output of a decoder that generates the texts, with start and end tokens."""
    ids = data_tokens.tokenize_texts(texts, tokenizer, 64, what="target")
    rows = np.zeros((len(texts), 65), np.int32)
    for row, tokens in zip(rows, np.split(ids.ids, ids.offsets[1:-1]), strict=True):
        row[1 : 1 + len(tokens)] = tokens
    return text_format.decode(rows, tokenizer)


PAIRS = [
    ("T5", ["<=50k", ">50k"]),
    ("T5", ["a½b", "½"]),
    ("T5", ["ﬁne", "dull{}"]),
    ("T5", ["今天，好", "电影！"]),
    ("decomposing", ["naïve", "café"]),
    ("lower case", ["Positive", "NOT"]),
]


@pytest.mark.parametrize(("way", "texts"), PAIRS)
def test_the_right_tokens_are_right_by_every_metric(way, texts):
    tokenizer = tokenizer_of(way)
    spoken = said(tokenizer, texts)
    assert list(spoken) != texts  # a comparison with the raw text would fail
    fmt = text_format.TextFormat(kind="classification", prefix="", label_names=tuple(texts))
    assert fmt.read(spoken).tolist() == [0, 1]
    wrong = fmt.read(spoken[::-1])
    assert metrics.label_metrics(wrong, np.arange(2), 2)["accuracy"] == 0
    read = text_format.TextFormat(kind="text", prefix="").read(spoken)
    targets = np.array(texts, object)
    assert metrics.text_metrics(read, targets) == {"exact_match": 1}
    assert metrics.text_metrics(read[::-1], targets) == {"exact_match": 0}
    one = {"exact_match": 1, "f1": 1}
    assert BENCHMARKS["record"].scores(read, {"answers": [[x, "other"] for x in texts]}) == one
    answers = [{"text": [x], "answer_start": [0]} for x in texts]
    assert BENCHMARKS["squad"].scores(read, {"answers": answers}) == one
    # The BLEU of fewer than four words is 0.
    longer = [" ".join([x] * 6) for x in texts]
    rows = {"translation": [{"ro": "x", "en": x} for x in longer]}
    assert find("wmt16-ro-en").scores(said(tokenizer, longer), rows)["bleu"] == pytest.approx(100)


def test_texts_that_no_decoder_wrote_are_compared_as_they_are():
    assert metrics.text_metrics(["½"], ["12"]) == {"exact_match": 0}
    assert metrics.answer_metrics(["a ½"], [["12"]])["exact_match"] == 0


def test_what_is_written_ends_where_a_decoder_ends():
    tokenizer = tokenizer_of("T5")
    assert text_format.written(["good</s> film", "</s>", "", "a b"], tokenizer) == [
        "good",
        "",
        "",
        "a b",
    ]
    assert text_format.written([], tokenizer) == []
    (long,) = text_format.written(["x " * 500], tokenizer)  # never truncated
    assert long.split() == ["x"] * 500


@pytest.mark.parametrize(
    ("way", "names", "message"),
    [
        ("T5", ["good", "<50k", "50k"], "writes both labels '<50k' and '50k' as '50k'; rename one"),
        ("T5", ["½", "1⁄2", "12"], "writes both labels"),
        ("T5", ["ﬁne", "fine"], "writes both labels 'ﬁne' and 'fine' as 'fine'"),
        ("lower case", ["Not", "not"], "writes both labels 'Not' and 'not' as 'not'"),
        ("T5", ["a", "{}"], "has no token for anything in the label '{}'"),
    ],
)
def test_labels_that_become_alike_are_refused(way, names, message):
    with pytest.raises(ValueError, match="rename") as caught:
        text_format.check_written(names, tokenizer_of(way))
    assert message in str(caught.value)
    text_format.check_written(names[:1], tokenizer_of(way))


def test_labels_with_unknown_characters_are_told_of():
    fmt = text_format.TextFormat(
        kind="classification", prefix="", label_names=("<50k", "more", "{}x")
    )
    made = TextToText(None, tokenizer_of("T5"), None, fmt, 16)
    (notice,) = made.user_messages()
    assert notice == (
        "2 of 3 labels have characters that the tokenizer has no token for: '<50k' (written "
        "'50k'), '{}x' (written 'x')"
    )
    for names in (("more", "less"), ()):
        changed = dataclasses.replace(fmt, label_names=names)
        assert dataclasses.replace(made, format=changed).user_messages() == []


def test_scores_that_the_tokenizer_cannot_write_are_refused():
    tokenizer = tokenizer_of("T5")  # the tokenizer has no minus sign
    text_format.check_scores(["0.4", "12", "0.4"], tokenizer)
    with pytest.raises(ValueError, match=r"writes the score '-0\.4' as '0\.4', so no decoder"):
        text_format.check_scores(["0.4", "-0.4"], tokenizer)


def test_unknown_tokens_of_a_corpus_are_told_of():
    tokenizer = tokenizer_of("T5")
    ids = np.array(tokenizer("good <film", add_special_tokens=False)["input_ids"], np.int32)
    segments = data_corpus.Segments(ids, np.array([0, 5, len(ids)]))
    corpus = Corpus(types.SimpleNamespace(tokenizer=tokenizer), segments, 0)
    assert corpus.user_messages("train") == [
        "train: 11 tokens in 2 segments",
        "1 of 11 tokens of the train segments (9.1 %), in 1 of them, are unknown to the tokenizer",
    ]


def test_bleu_of_chinese_is_sacrebleu_s_own():
    right = ["今天天气很好，我们去公园。", "这部电影很不错。", "他在一九九八年离开了北京。"]
    spoken = ["今天天气很好,我们去公园玩。", "这部电影不错。", "他于1998年离开北京。"]
    rows = {"translation": [{"en": "x", "zh": x} for x in right]}
    value = find("wmt17-en-zh").scores(spoken, rows)["bleu"]
    assert value == sacrebleu.corpus_bleu(spoken, [right], tokenize="zh").score > 20
    # The other direction, and languages with spaces between words, keep the tokenizer 13a.
    english, other = ["it is a good film, we loved it"], ["it is a good film; we loved it"]
    for name, code in [("wmt17-zh-en", "en"), ("wmt16-en-ro", "ro"), ("wmt14-en-hi", "hi")]:
        rows = {"translation": [{"en": "x", name.split("-")[1]: "x", code: english[0]}]}
        by_words = sacrebleu.corpus_bleu(other, [english]).score
        assert find(name).scores(other, rows)["bleu"] == by_words


@pytest.mark.parametrize("language", ["ja", "ko", "th"])
def test_bleu_without_its_tokenizer_is_by_characters_and_says_so(language, monkeypatch):
    monkeypatch.setattr(metrics, "_is_there", lambda name: name == "char")
    metrics.bleu_tokenizer.cache_clear()
    spoken, right = ["東京へ行きます", "きれいな花"], ["東京に行きます", "きれいな花です"]
    name, told = metrics.bleu_tokenizer(language)
    assert name == "char"
    assert "sacrebleu" in told
    assert "'char'" in told
    expected = sacrebleu.corpus_bleu(spoken, [right], tokenize="char").score
    assert metrics.bleu(spoken, right, language) == expected > 20
    monkeypatch.setattr(metrics, "_is_there", lambda name: True)
    metrics.bleu_tokenizer.cache_clear()
    wanted = {"ja": "ja-mecab", "ko": "ko-mecab", "th": "flores200"}
    assert metrics.bleu_tokenizer(language) == (wanted[language], "")
    metrics.bleu_tokenizer.cache_clear()


def test_no_examples_are_no_score():
    for empty in (
        lambda: metrics.text_metrics([], []),
        lambda: metrics.answer_metrics([], []),
        lambda: metrics.bleu([], []),
        lambda: metrics.all_of_group([], []),
        lambda: metrics.label_metrics(np.zeros(0, int), np.zeros(0, int), 2),
        lambda: metrics.score_metrics(np.zeros(0), np.zeros(0), 0.0),
    ):
        with pytest.raises(ValueError, match="no examples to evaluate on"):
            empty()


TSV = {
    "swallowed rows": '"He left .\t1\nShe said no .\t0\nthey came ."\t1\nfine\t0\n',
    "a field of two lines": 'fine\t0\n"two\nlines"\t1\n',
    "a carriage return": 'fine\t0\n"two\rlines"\t1\n',
    "in another column": 'a\t"0\n1"\nb\t0\n',
}


@pytest.mark.parametrize("name", TSV)
def test_a_field_of_a_tsv_with_a_line_break_is_refused_with_its_line(tmp_path, name):
    path = tmp_path / "t.tsv"
    path.write_bytes(("sentence\tlabel\n" + TSV[name]).encode())
    line = 3 if TSV[name].startswith("fine") else 2
    with pytest.raises(ValueError, match="a quotation mark opens a field") as caught:
        load_task(train_file=path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert len(str(caught.value)) < 500
    # In .csv, where fields are quoted, such a field is valid; in .jsonl it needs no quotation
    # marks.
    if name == "a field of two lines":
        path.with_suffix(".csv").write_text('sentence,label\nfine,0\n"two\nlines",1\n')
        task = load_task(train_file=path.with_suffix(".csv"))
        assert task.splits["train"]["sentence"][1] == "two\nlines"
        rows = [{"sentence": "two\nlines", "label": 1}, {"sentence": "fine", "label": 0}]
        path.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert load_task(train_file=path.with_suffix(".jsonl")).splits["train"]["label"][:] == [
            1,
            0,
        ]


def test_a_tsv_quoted_in_one_line_is_read(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text('sentence\tlabel\n"""so"" he\tsaid"\t0\nplain "marks" inside\t1\n')
    rows = load_task(train_file=path).splits["train"]
    assert rows["sentence"][:] == ['"so" he\tsaid', 'plain "marks" inside']
