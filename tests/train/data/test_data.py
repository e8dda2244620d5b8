"""Tests tokenizers, tokenised sentences, and the batches made of them."""

import dataclasses
import json

import datasets
import numpy as np
import pytest

from train.data import batching, sampled, tokens
from train.data.routes import Routes
from train.objectives.text_to_text import num_tokens

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "##s", "a", "b"]


def save_tokenizer(folder, words=WORDS, **special):
    """Saves a WordPiece tokenizer that joins sentences like that of BERT."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
    )
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | special
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def load(folder, vocab_size=10, max_position_embeddings=64, max_length=64):
    return tokens.load_tokenizer(
        folder,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        max_length=max_length,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), pad_token="[PAD]")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load(folder)


def test_a_padded_vocabulary_and_relative_positions_fit(folder):
    assert len(load(folder, vocab_size=128)) == 10
    assert len(load(str(folder), max_position_embeddings=None, max_length=4096)) == 10


def test_tokenizers_that_do_not_fit(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"does not fit the backbone: it has 10 .* embedding has 9;"
    ):
        load(folder, vocab_size=9)
    with pytest.raises(ValueError, match="max_length=65 exceeds the backbone's 64 positions"):
        load(folder, max_length=65)
    with pytest.raises(ValueError, match="max_length=2 leaves no room for a word; use 3 or more"):
        load(folder, max_length=2)
    with pytest.raises(ValueError, match="has no padding token"):
        load(save_tokenizer(tmp_path / "unpadded"))


@pytest.mark.contract
def test_tokenizers_that_cannot_be_loaded(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for source, reason in [
        (tmp_path / "none", "none does not exist"),
        (tmp_path / "empty", "cannot load a tokenizer from '.*empty': it has no tokenizer files "),
        (tmp_path / "broken", "cannot load a tokenizer from '.*broken': "),
        ("no/such/place", "cannot load a tokenizer from 'no/such/place': "),
        ("nobody/nothing-of-this-name", "cannot load a tokenizer from 'nobody/nothing"),
    ]:
        with pytest.raises(ValueError, match=reason) as caught:
            load(source)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


def test_a_folder_without_a_vocabulary(tmp_path):
    # transformers 5 returns a tokenizer with only special tokens here; 4 raises a TypeError.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"tokenizer\.json or vocab\.txt"):
        load(tmp_path)


def test_token_ids_of_single_sentences(tokenizer):
    rows = {"sentence": ["Good films", "bad x", "a"], "label": [1, 0, 1], "id": [7, 8, 9]}
    encoded = tokens.tokenize(datasets.Dataset.from_dict(rows), tokenizer, 8)
    assert len(encoded) == 3
    assert encoded.input_ids.tolist() == [2, 4, 6, 7, 3, 2, 5, 1, 3, 2, 8, 3]
    assert encoded.token_type_ids.tolist() == [0] * 12
    assert encoded.offsets.tolist() == [0, 5, 9, 12]
    assert encoded.targets.tolist() == [1, 0, 1]
    assert (encoded.input_ids.dtype, encoded.targets.dtype) == (np.int32, np.int32)
    assert (encoded.num_truncated, encoded.max_length, encoded.pad_token_id) == (0, 8, 0)


def test_token_ids_of_pairs(tokenizer):
    rows = {"sentence": ["good films", "a a a a"], "sentence2": ["bad", "b"], "score": [0.5, -1]}
    encoded = tokens.tokenize(rows, tokenizer, 6)
    first, second = np.split(encoded.input_ids, encoded.offsets[1:-1])
    assert first.tolist() == [2, 4, 6, 3, 5, 3]  # the longer sentence is truncated
    assert second.tolist() == [2, 8, 8, 3, 9, 3]
    assert encoded.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1] * 2
    assert encoded.targets.tolist() == [0.5, -1]
    assert encoded.targets.dtype == np.float32
    assert encoded.num_truncated == 2


def test_truncation_is_counted_and_leaves_a_word(tokenizer):
    encoded = tokens.tokenize({"sentence": ["a", "a b", "a " * 5000]}, tokenizer, 3)
    assert encoded.input_ids.tolist() == [2, 8, 3] * 3
    assert encoded.num_truncated == 2
    assert encoded.targets is None
    with pytest.raises(ValueError, match="max_length=4 leaves no room for a word; use 5 or more"):
        tokens.tokenize({"sentence": ["a"], "sentence2": ["b"]}, tokenizer, 4)


def test_more_examples_than_are_tokenised_at_once(tokenizer):
    sentences = ["a " * (1 + i % 5) for i in range(2500)]
    encoded = tokens.tokenize({"sentence": sentences}, tokenizer, 16)
    assert np.diff(encoded.offsets).tolist() == [3 + i % 5 for i in range(2500)]
    assert len(encoded.input_ids) == encoded.offsets[-1]


def test_bucket_lengths():
    assert batching.bucket_lengths(512) == (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    assert batching.bucket_lengths(100) == (16, 32, 48, 64, 96, 100)
    assert batching.bucket_lengths(16) == (16,)
    assert batching.bucket_lengths(3) == (3,)
    assert batching.bucket_lengths(64, multiple=8) == (8, 16, 24, 32, 48, 64)
    with pytest.raises(ValueError, match="max_length=0"):
        batching.bucket_lengths(0)


def make(lengths, targets=None, max_length=128):
    """Returns examples of the given lengths; every token of example `i` is `i + 1`."""
    lengths = np.asarray(lengths, np.int64)
    return tokens.Encoded(
        input_ids=np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths),
        token_type_ids=np.ones(lengths.sum(), np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        targets=targets,
        max_length=max_length,
        pad_token_id=99999,
        num_truncated=0,
    )


@pytest.fixture(scope="module")
def thousand():
    """Returns 1000 examples with few long ones, like natural sentences."""
    lengths = np.minimum(3 + np.random.default_rng(0).geometric(0.06, 1000), 128)
    return make(lengths, targets=np.arange(1000, dtype=np.int32))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 8, 24, 1000, 4096])
def test_every_example_comes_once_and_whole(thousand, shuffle, batch_size):
    seen = []
    for batch in batching.batches(thousand, batch_size, shuffle=shuffle, seed=5):
        length = batch["input_ids"].shape[1]
        assert length in batching.bucket_lengths(128)
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            assert batch[name].shape == (batch_size, length)
            assert batch[name].dtype == np.int32
        real = batch["indices"] >= 0
        seen += batch["indices"][real].tolist()
        expected = np.diff(thousand.offsets)[batch["indices"][real]]
        mask = batch["attention_mask"]
        np.testing.assert_array_equal(mask[real].sum(1), expected)
        np.testing.assert_array_equal(
            mask[real], np.arange(length) < expected[:, None]
        )  # padding is at the right
        values = batch["indices"][:, None] + 1
        np.testing.assert_array_equal(batch["input_ids"][real], np.where(mask, values, 99999)[real])
        np.testing.assert_array_equal(batch["token_type_ids"][real], mask[real])
        np.testing.assert_array_equal(batch["labels"], np.where(real, batch["indices"], 0))
        np.testing.assert_array_equal(batch["weights"], real.astype(np.float32))
        assert (mask[~real].sum(1) == 1).all()
        assert batch["weights"].dtype == np.float32
        assert (batch["labels"].dtype, batch["indices"].dtype) == (np.int32, np.int32)
    assert sorted(seen) == list(range(1000))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 257, 1000])
def test_number_of_batches_is_that_of_every_epoch(size):
    generator = np.random.default_rng(size)
    encoded = make(generator.integers(1, 129, size))
    expected = -(-size // 8)
    assert batching.num_batches(size, 8) == expected
    for epoch in range(5):
        assert (
            len(list(batching.batches(encoded, 8, shuffle=True, seed=0, epoch=epoch))) == expected
        )


def order(encoded, **keywords):
    return [batch["indices"].tolist() for batch in batching.batches(encoded, 8, **keywords)]


def test_order_depends_on_seed_and_epoch_alone(thousand):
    first = order(thousand, shuffle=True, seed=1, epoch=2)
    assert first == order(thousand, shuffle=True, seed=1, epoch=2)
    for seed, epoch in [(1, 3), (2, 2), (2, 1)]:
        other = order(thousand, shuffle=True, seed=seed, epoch=epoch)
        assert first != other
        assert {frozenset(row) for row in first} != {frozenset(row) for row in other}


def test_order_is_the_same_in_every_version():
    # A resumed run must see the rest of its epoch, so this order must not change with NumPy.
    encoded = make([4, 40, 5, 41, 6, 42, 7])
    batches = batching.batches(encoded, 2, shuffle=True, seed=0, epoch=1)
    assert [batch["indices"].tolist() for batch in batches] == [[4, 2], [5, -1], [6, 0], [1, 3]]


@pytest.mark.parametrize("keywords", [{"shuffle": True, "seed": 3, "epoch": 1}, {"shuffle": False}])
def test_start_resumes_at_the_exact_batch(thousand, keywords):
    whole = order(thousand, **keywords)
    for start in (0, 1, 77, len(whole)):
        assert order(thousand, start=start, **keywords) == whole[start:]
    past = len(whole) + 1
    with pytest.raises(ValueError, match=f"start={past} is not within the {len(whole)} batches"):
        batching.batches(thousand, 8, start=past, **keywords)


def test_evaluation_pads_every_input_to_its_own_bucket(thousand):
    for batch in batching.batches(thousand, 8, shuffle=False):
        own = np.searchsorted(batching.bucket_lengths(128), batch["attention_mask"].sum(1))
        real = batch["weights"] > 0
        assert set(np.array(batching.bucket_lengths(128))[own[real]]) == {
            batch["input_ids"].shape[1]
        }


def test_evaluation_order_is_by_bucket_then_position(thousand):
    rows = np.concatenate(order(thousand, shuffle=False))
    rows = rows[rows >= 0]
    assert sorted(rows) == list(range(len(thousand)))
    buckets = np.searchsorted(batching.bucket_lengths(128), np.diff(thousand.offsets))[rows]
    assert (np.diff(buckets) >= 0).all()
    for bucket in np.unique(buckets):
        assert (np.diff(rows[buckets == bucket]) > 0).all()


def test_batches_are_alike_in_length_and_come_in_random_order(thousand):
    shapes, mixed = [], 0
    for batch in batching.batches(thousand, 8, shuffle=True, seed=0):
        own = np.searchsorted(batching.bucket_lengths(128), batch["attention_mask"].sum(1))
        mixed += len(set(own.tolist())) > 1
        shapes.append(batch["input_ids"].shape[1])
    # In a window of 32 batches, at most one batch mixes two neighbouring buckets.
    assert mixed <= 4 * (len(set(shapes)) - 1)
    assert sorted(shapes) != shapes
    real = np.diff(thousand.offsets).sum()
    padded = 8 * sum(shapes)
    assert real / padded > 0.6
    assert real / (8 * 125 * 128) < 0.2  # the fraction if every batch had the maximum length


def test_a_bucket_with_one_example():
    encoded = make([5] * 30 + [128])
    lengths = [batch["input_ids"].shape[1] for batch in batching.batches(encoded, 8, shuffle=False)]
    assert lengths == [16, 16, 16, 16, 128]


def test_unknown_and_real_valued_targets():
    (batch,) = batching.batches(make([3, 4]), 4, shuffle=False)
    assert batch["labels"].dtype == np.int32
    assert batch["labels"].tolist() == [0, 0, 0, 0]
    scores = np.array([0.5, -2], np.float32)
    (batch,) = batching.batches(make([3, 4], scores), 4, shuffle=False)
    assert batch["labels"].dtype == np.float32
    assert batch["labels"].tolist() == [0.5, -2, 0, 0]


def test_no_examples_no_batches():
    assert batching.num_batches(0, 8) == 0
    assert list(batching.batches(make([]), 8, shuffle=True, seed=0)) == []


def test_batches_refuse_bad_arguments(thousand):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        batching.batches(thousand, 0, shuffle=False)
    with pytest.raises(ValueError, match="seed=None and epoch=0 must be at least 0 for shuffling"):
        batching.batches(thousand, 8, shuffle=True)
    with pytest.raises(ValueError, match="seed=-1 and epoch=0 must"):
        batching.batches(thousand, 8, shuffle=True, seed=-1)


def test_parts_make_up_every_batch():
    encoded = make(np.random.default_rng(0).integers(1, 129, 45))
    for shuffle in (False, True):
        parts = [
            list(batching.batches(encoded, 6, shuffle=shuffle, seed=1, start=2, part=(i, 3)))
            for i in range(3)
        ]
        whole = list(batching.batches(encoded, 6, shuffle=shuffle, seed=1, start=2))
        for i, batch in enumerate(whole):
            for name, array in batch.items():
                joined = np.concatenate([part[i][name] for part in parts])
                np.testing.assert_array_equal(joined, array)
    with pytest.raises(
        ValueError, match=r"part=\(0, 4\) is not a part of a batch of 6 that is divided by 4"
    ):
        batching.batches(encoded, 6, shuffle=False, part=(0, 4))
    with pytest.raises(ValueError, match=r"part=\(3, 3\) is not a part"):
        batching.batches(encoded, 6, shuffle=False, part=(3, 3))


def test_shard():
    (batch,) = batching.batches(make(range(1, 9)), 8, shuffle=False)
    shards = batching.shard(batch, 4)
    assert {name: array.shape for name, array in shards.items()} == {
        "input_ids": (4, 2, 16),
        "attention_mask": (4, 2, 16),
        "token_type_ids": (4, 2, 16),
        "labels": (4, 2),
        "weights": (4, 2),
        "indices": (4, 2),
    }
    assert shards["indices"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="3 devices cannot share a batch of 8; use 6 or 9"):
        batching.shard(batch, 3)
    with pytest.raises(ValueError, match="16 devices cannot share a batch of 8; use 16"):
        batching.shard(batch, 16)


def make_pairs(lengths, target_lengths, max_target_length=64):
    """Returns inputs as in `make`, without token types; tokens of target `i` are `100 + i`."""
    target_lengths = np.asarray(target_lengths, np.int64)
    targets = tokens.Texts(
        ids=np.repeat(100 + np.arange(len(target_lengths), dtype=np.int32), target_lengths),
        offsets=np.concatenate([[0], np.cumsum(target_lengths)]),
        max_length=max_target_length,
    )
    return dataclasses.replace(
        make(lengths),
        token_type_ids=None,
        pad_token_id=7,
        target_texts=targets,
        decoder_start_token_id=9,
    )


def test_a_batch_with_target_texts():
    (batch,) = batching.batches(make_pairs([3, 5], [2, 4]), 3, shuffle=False)
    ignored = tokens.IGNORED
    assert "token_type_ids" not in batch
    assert batch["labels"].tolist() == [[100, 100, ignored, ignored], [101] * 4, [ignored] * 4]
    assert batch["decoder_input_ids"].tolist() == [
        [9, 100, 100, 7],
        [9, 101, 101, 101],
        [9, 7, 7, 7],
    ]
    assert batch["weights"].tolist() == [2, 4, 0]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5, 1]
    assert batch["indices"].tolist() == [0, 1, -1]
    names = ("labels", "decoder_input_ids", "indices", "input_ids", "attention_mask")
    assert {batch[name].dtype.name for name in names} == {"int32"}
    assert batch["weights"].dtype == np.float32


def test_targets_are_padded_to_buckets_of_their_own():
    generator = np.random.default_rng(0)
    encoded = make_pairs(generator.integers(1, 129, 300), generator.integers(2, 61, 300), 60)
    for shuffle in (False, True):
        seen, widths = [], set()
        for batch in batching.batches(encoded, 8, shuffle=shuffle, seed=0):
            real = batch["indices"] >= 0
            lengths = batch["weights"].astype(int)
            width = batch["labels"].shape[1]
            widths.add(width)
            seen += batch["indices"][real].tolist()
            np.testing.assert_array_equal(
                batch["labels"] != tokens.IGNORED, np.arange(width) < lengths[:, None]
            )
            if not shuffle:  # every row is alone in its pair of buckets
                below = max((w for w in batching.bucket_lengths(60, 4) if w < width), default=0)
                assert (lengths[real] > below).all()
                own = np.searchsorted(batching.bucket_lengths(128), batch["attention_mask"].sum(1))
                assert len(set(own[real])) == 1
        assert sorted(seen) == list(range(300))
        assert widths <= set(batching.bucket_lengths(60, 4))
        assert max(widths) == 60


def test_given_tokens_are_inputs_and_no_labels():
    """A language token is read by the decoder, and counts neither in the loss nor as a label."""
    encoded = make_pairs([3, 5], [2, 4])
    given = dataclasses.replace(
        encoded, target_texts=dataclasses.replace(encoded.target_texts, given=1)
    )
    ((plain,), (batch,)) = (batching.batches(each, 3, shuffle=False) for each in (encoded, given))
    ignored = tokens.IGNORED
    assert batch["labels"].tolist() == [
        [ignored, 100, ignored, ignored],
        [ignored, *[101] * 3],
        [ignored] * 4,
    ]
    np.testing.assert_array_equal(batch["decoder_input_ids"], plain["decoder_input_ids"])
    assert batch["weights"].tolist() == [1, 3, 0]
    assert num_tokens(given).tolist() == [1, 3]
    part = sampled.taken(
        dataclasses.replace(given, routes=Routes(np.zeros(2, np.int32))), np.array([1])
    )
    assert num_tokens(part).tolist() == [3]


def test_rare_pairs_of_lengths_have_no_shapes_of_their_own_in_training():
    """Few shapes are compiled, each batch fits in one, and little more is padded than before."""
    generator = np.random.default_rng(2)
    lengths = np.clip(generator.gamma(4, 12, 4000).astype(int), 1, 128)
    of_targets = np.clip((lengths * generator.normal(0.4, 0.12, 4000)).astype(int), 1, 120)
    encoded = make_pairs(lengths, of_targets, 128)
    own = batching._padded_lengths(encoded)
    merged = batching._without_rare(own)
    assert (merged >= own).all()
    pairs, counts = np.unique(merged, axis=0, return_counts=True)
    rare = pairs[counts < 0.03 * 4000]
    assert len(rare) <= 1
    assert (rare == own.max(0)).all()
    frequent = own[(counts_of(own) >= 0.03 * 4000)]
    np.testing.assert_array_equal(merged[counts_of(own) >= 0.03 * 4000], frequent)
    shapes, tokens_read = set(), 0
    for epoch in range(3):
        for batch in batching.batches(encoded, 16, shuffle=True, seed=0, epoch=epoch):
            shapes.add((batch["input_ids"].shape[1], batch["labels"].shape[1]))
            tokens_read += batch["input_ids"].size
            assert (batch["weights"] > 0).all()
    assert shapes <= set(map(tuple, pairs))
    assert len(shapes) <= len(pairs) < len(np.unique(own, axis=0)) / 2
    assert tokens_read < 3 * 1.2 * own[:, 0].sum()


def counts_of(pairs):
    """Returns for each row of an array how many rows are equal to it."""
    _, which, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    return counts[which.reshape(-1)]


def test_the_largest_pair_may_be_of_no_example():
    """Rare examples are padded to the largest of both where no pair is as long in both."""
    frequent = [[16, 4]] * 200
    found = batching._without_rare(np.array([*frequent, [64, 4], [16, 32], [32, 8]]))
    assert found.tolist() == [*frequent, [64, 32], [64, 32], [64, 32]]
    found = batching._without_rare(np.array([*frequent, [32, 8], [64, 4], [64, 8], [16, 4]]))
    assert found.tolist() == [*frequent, [64, 8], [64, 8], [64, 8], [16, 4]]
    # Two that are rare may be frequent together.
    found = batching._without_rare(np.array([*frequent, *[[32, 4]] * 4, *[[32, 8]] * 4, [64, 8]]))
    assert found.tolist() == [*frequent, *[[32, 8]] * 8, [64, 8]]
    assert batching._without_rare(np.zeros((0, 2), np.int64)).shape == (0, 2)


def test_targets_beside_generated_text_are_padded_to_one_length():
    """Generation does not read the targets, so their lengths give it no programs of their own."""
    generator = np.random.default_rng(1)
    lengths, of_targets = generator.integers(1, 129, 300), generator.integers(2, 45, 300)
    encoded = make_pairs(lengths, of_targets, 60)
    generated = dataclasses.replace(encoded, is_generated=True)
    batches = list(batching.batches(generated, 8, shuffle=False))
    shapes = {(batch["input_ids"].shape[1], batch["labels"].shape[1]) for batch in batches}
    assert shapes == {(length, 48) for length in batching.bucket_lengths(128)}
    buckets = np.searchsorted(batching.bucket_lengths(128), lengths)
    assert len(batches) == sum(-(-count // 8) for count in np.bincount(buckets))
    seen = np.concatenate([batch["indices"] for batch in batches])
    assert sorted(seen[seen >= 0]) == list(range(300))
    for batch in batches:
        real = batch["indices"] >= 0
        counts = (batch["labels"] != tokens.IGNORED).sum(1)
        np.testing.assert_array_equal(counts[real], of_targets[batch["indices"][real]])
    for one, two in zip(
        batching.batches(encoded, 8, shuffle=True, seed=0),
        batching.batches(generated, 8, shuffle=True, seed=0),
        strict=True,
    ):
        np.testing.assert_array_equal(one["labels"], two["labels"])
    without = dataclasses.replace(generated, target_texts=None)
    assert "labels" in next(iter(batching.batches(without, 8, shuffle=False)))


def test_notices_of_what_was_cut():
    encoded = make_pairs([3, 5], [2, 4])
    assert encoded.user_messages("train") == []
    cut = dataclasses.replace(encoded.target_texts, num_truncated=2)
    encoded = dataclasses.replace(encoded, num_truncated=1, target_texts=cut)
    assert encoded.user_messages("test") == [
        "1 of 2 test examples are cut to max_length=128 tokens",
        "2 of 2 test targets are cut to max_target_length=64 tokens",
    ]


@pytest.mark.contract
def test_a_tokenizer_published_as_sentencepiece_alone(tmp_path):
    """T5 v1.1 and mT5 publish only a sentencepiece file."""
    import sentencepiece

    (tmp_path / "text").write_text("the film was good\nthe plot was dull\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=19,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = tokens.load_tokenizer(
        tmp_path, vocab_size=119, max_position_embeddings=None, max_length=8
    )
    # The first sentinel is the last token of the vocabulary, and end-of-sequence is 1.
    assert tokenizer("the film <extra_id_0>").input_ids[-2:] == [118, 1]
