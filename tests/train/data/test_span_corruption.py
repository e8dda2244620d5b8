"""Tests train.objectives.noise: removed spans can be restored, and are drawn like those of T5."""

import collections
import itertools

import numpy as np
import pytest

from train.data.corpus import Segments, read_documents, read_segments
from train.data.tokens import sentinel_ids
from train.objectives.noise import SpanCorruption, corrupted

EOS = 1
SENTINELS = tuple(range(1099, 999, -1))
WORDS = [f"w{i}" for i in range(20)]


def corruption_of(input_length, *args, sentinels=SENTINELS):
    return SpanCorruption(input_length, *args, eos_token_id=EOS, sentinel_ids=sentinels)


def spans_after(ids):
    """Returns sentinel -> the tokens up to the next sentinel; None for those before the first."""
    spans = {None: []}
    current = None
    for token in ids.tolist():
        if token in SENTINELS:
            current = token
            spans[current] = []
        else:
            spans[current].append(token)
    return spans


def reconstructed(inputs, targets):
    noise = spans_after(targets[:-1])
    text = [[t] if t not in SENTINELS else noise[t] for t in inputs[:-1].tolist()]
    return list(itertools.chain.from_iterable(text))


def save_tokenizer(sentinels=("<extra_id_0>", "<extra_id_1>"), words=WORDS):
    """Saves a tokenizer of words: `<pad>` 0, `</s>` 1, `<unk>` 2, w0 3, …, sentinels at the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words, *sentinels])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return save_tokenizer()


# --- one segment --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input_length", "segment_length", "target_length"),
    # 512 is T5's own length; its code computes 568 and 114.
    [(512, 568, 114), (114, 126, 26), (3, 2, 3), (4, 3, 3), (16, 17, 5)],
)
def test_lengths(input_length, segment_length, target_length):
    corruption = corruption_of(input_length)
    assert corruption.segment_length == segment_length
    assert corruption.target_length == target_length
    generator = np.random.default_rng(0)
    inputs, targets = corruption.corrupt(np.arange(segment_length) + 2, generator)
    assert len(inputs) == input_length
    assert len(targets) == target_length
    assert inputs.dtype == targets.dtype == np.int32


@pytest.mark.parametrize("density", [0.01, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("mean_span_length", [1, 2.5, 10])
def test_segments_are_as_long_as_fit_and_shorter_ones_make_no_longer_targets(
    density, mean_span_length
):
    generator = np.random.default_rng(1)
    for input_length in range(3, 60):
        corruption = corruption_of(input_length, density, mean_span_length)
        longer = corruption_of(input_length + 2, density, mean_span_length)
        one_more, _ = longer.corrupt(np.full(corruption.segment_length + 1, 2), generator)
        assert len(one_more) > input_length
        for length in range(2, corruption.segment_length + 1):
            inputs, targets = corruption.corrupt(np.full(length, 2), generator)
            assert len(inputs) <= input_length
            assert len(targets) <= corruption.target_length


def test_text_can_be_put_together_again():
    generator = np.random.default_rng(2)
    for _ in range(300):
        corruption = corruption_of(64, generator.uniform(0.05, 0.9), generator.uniform(1, 9))
        length = generator.integers(2, corruption.segment_length, endpoint=True)
        tokens = generator.integers(2, 1000, length)
        inputs, targets = corruption.corrupt(tokens, generator)
        assert reconstructed(inputs, targets) == tokens.tolist()
        assert inputs[-1] == targets[-1] == EOS


def test_order_of_text_spans_and_sentinels():
    corruption = corruption_of(64)
    tokens = np.arange(2, 2 + corruption.segment_length)
    for seed in range(50):
        inputs, targets = corruption.corrupt(tokens, np.random.default_rng(seed))
        spans = spans_after(targets[:-1])
        used = [token for token in inputs.tolist() if token in SENTINELS]
        assert used == [token for token in targets.tolist() if token in SENTINELS]
        assert used == list(SENTINELS[: len(used)])
        assert all(spans[sentinel] for sentinel in used)
        assert spans[None] == []  # the targets begin with a sentinel …
        assert targets[-2] == tokens[-1]  # … and end with text, not with a further sentinel
        assert inputs[0] == tokens[0]
        assert inputs[-2] == used[-1]
        assert not any(a in used and b in used for a, b in itertools.pairwise(inputs.tolist()))


def test_two_tokens_are_one_of_text_and_one_of_noise():
    inputs, targets = corruption_of(8).corrupt(np.array([7, 8]), np.random.default_rng(0))
    assert inputs.tolist() == [7, SENTINELS[0], EOS]
    assert targets.tolist() == [SENTINELS[0], 8, EOS]


@pytest.mark.parametrize(("density", "mean_span_length"), [(0.15, 3.0), (0.3, 5.0), (0.5, 2.0)])
def test_noise_has_the_density_and_the_span_length_asked_for(density, mean_span_length):
    corruption = corruption_of(128, density, mean_span_length)
    length = corruption.segment_length
    generator = np.random.default_rng(3)
    noise_at, lengths = np.zeros(length), []
    for _ in range(400):
        _, targets = corruption.corrupt(np.arange(length) + 2, generator)
        spans = spans_after(targets[:-1])
        lengths += [len(span) for sentinel, span in spans.items() if sentinel is not None]
        noise_at[[token - 2 for span in spans.values() for token in span]] += 1
    assert np.sum(lengths) == 400 * round(density * length)
    assert np.mean(lengths) == pytest.approx(mean_span_length, rel=0.05)
    # Close to the variance of a geometric distribution.
    assert np.var(lengths) > 0.4 * mean_span_length * (mean_span_length - 1)
    middle = noise_at[length // 4 : -length // 4] / 400
    assert middle.mean() == pytest.approx(density, abs=0.02)
    assert middle.min() > density / 2
    assert middle.max() < density * 1.5


def test_all_divisions_are_equally_likely():
    # 4 of 8 tokens are noise, in 2 spans: 1 + 3, 2 + 2 or 3 + 1 for the text, and also for the
    # noise.
    corruption = corruption_of(16, 0.5, 2.0)
    generator = np.random.default_rng(4)
    seen = collections.Counter(
        tuple(corruption.corrupt(np.arange(2, 10), generator)[1].tolist()) for _ in range(4500)
    )
    assert len(seen) == 9
    assert min(seen.values()) > 400  # 500 expected, with a deviation of 21
    assert max(seen.values()) < 600


def test_equal_generators_draw_equal_noise():
    tokens = np.arange(2, 102)
    draws = [corruption_of(100).corrupt(tokens, np.random.default_rng(s)) for s in (5, 5, 6)]
    np.testing.assert_array_equal(draws[0][0], draws[1][0])
    np.testing.assert_array_equal(draws[0][1], draws[1][1])
    assert draws[0][1].tolist() != draws[2][1].tolist()


def test_corrupting_leaves_the_text_as_it_is():
    tokens = np.arange(2, 22, dtype=np.int32)
    corruption_of(32).corrupt(tokens, np.random.default_rng(0))
    assert tokens.tolist() == list(range(2, 22))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_length": 2}, "input_length=2 must be at least 3"),
        ({"noise_density": 0.0}, "noise_density=0.0 must be above 0 and at most 0.9"),
        ({"noise_density": 0.95}, "noise_density=0.95 must be above 0 and at most 0.9"),
        ({"noise_density": float("nan")}, "noise_density=nan must be above 0"),
        ({"mean_span_length": 0.5}, "mean_span_length=0.5 must be at least 1"),
        ({"eos_token_id": -1}, "eos_token_id=-1 must be at least 0"),
        ({"sentinel_ids": (7, 1)}, r"sentinel_ids=\(7, 1\) must be distinct.* eos_token_id=1"),
        ({"sentinel_ids": (7, 7)}, r"sentinel_ids=\(7, 7\) must be distinct"),
        (
            {"sentinel_ids": ()},
            "makes 3 spans, but the tokenizer has 0 sentinels; use a tokenizer with",
        ),
    ],
)
def test_settings_that_cannot_work(changes, message):
    settings = {"input_length": 64, "eos_token_id": EOS, "sentinel_ids": SENTINELS} | changes
    with pytest.raises(ValueError, match=message):
        SpanCorruption(**settings)


def test_more_spans_than_sentinels():
    with pytest.raises(
        ValueError,
        match="input_length=512 makes 28 spans, but the tokenizer has 20 sentinels; use "
        "input_length=369 or less, or a longer mean_span_length",
    ):
        corruption_of(512, sentinels=SENTINELS[:20])
    largest = corruption_of(369, sentinels=SENTINELS[:20])
    tokens = np.full(largest.segment_length, 2)
    inputs, _ = largest.corrupt(tokens, np.random.default_rng(0))
    assert np.isin(inputs, SENTINELS[:20]).sum() == 20
    with pytest.raises(ValueError, match="input_length=370 makes 21 spans"):
        corruption_of(370, sentinels=SENTINELS[:20])


@pytest.mark.parametrize("length", [0, 1, 18])
def test_segments_that_are_too_short_or_too_long(length):
    with pytest.raises(ValueError, match=f"a segment of {length} tokens .* it must have 2 to 17"):
        corruption_of(16).corrupt(np.full(length, 2), np.random.default_rng(0))


# --- all segments -------------------------------------------------------------------------------


def segments_of(*arrays):
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    return Segments(np.concatenate(arrays).astype(np.int32), offsets)


def test_segments_are_a_sequence():
    segments = segments_of([1, 2], [3], [4, 5, 6])
    assert len(segments) == 3
    assert [segment.tolist() for segment in segments] == [[1, 2], [3], [4, 5, 6]]
    assert segments[-1].tolist() == [4, 5, 6]
    with pytest.raises(IndexError):
        segments[3]


def test_noise_depends_on_seed_epoch_and_index_alone():
    corruption = corruption_of(32)
    generator = np.random.default_rng(0)
    texts = [generator.integers(2, 1000, length) for length in (34, 2, 34, 17)]
    inputs, targets = corrupted(segments_of(*texts), corruption, seed=1, epoch=2)
    assert len(inputs) == len(targets) == 4
    for ids in (inputs, targets):
        assert (ids.tokens.dtype, ids.offsets.dtype) == (np.int32, np.int64)
    for i, text in enumerate(texts):
        assert reconstructed(inputs[i], targets[i]) == text.tolist()
        alone = corruption.corrupt(text, np.random.default_rng([1, 2, i]))
        assert inputs[i].tolist() == alone[0].tolist()
        assert targets[i].tolist() == alone[1].tolist()
    # The noise of a segment does not depend on the other segments …
    fewer, _ = corrupted(segments_of(*texts[:1]), corruption, seed=1, epoch=2)
    assert fewer[0].tolist() == inputs[0].tolist()
    # … and differs between epochs and between seeds.
    for seed, epoch in ((1, 3), (2, 2)):
        other, _ = corrupted(segments_of(*texts), corruption, seed=seed, epoch=epoch)
        assert other[0].tolist() != inputs[0].tolist()


def test_nothing_to_corrupt():
    nothing = Segments(np.zeros(0, np.int32), np.zeros(1, np.int64))
    inputs, targets = corrupted(nothing, corruption_of(16), seed=0, epoch=0)
    assert len(inputs) == len(targets) == 0


@pytest.mark.parametrize(("seed", "epoch"), [(-1, 0), (0, -1)])
def test_seeds_that_cannot_work(seed, epoch):
    with pytest.raises(ValueError, match=f"seed={seed} and epoch={epoch} must be at least 0"):
        corrupted(segments_of([2, 3]), corruption_of(16), seed=seed, epoch=epoch)


# --- sentinels ----------------------------------------------------------------------------------


def test_sentinels_come_in_their_order_as_far_as_they_go():
    assert sentinel_ids(save_tokenizer(["<extra_id_1>", "<extra_id_0>"])) == (24, 23)
    assert sentinel_ids(save_tokenizer(["<extra_id_2>", "<extra_id_0>"])) == (24,)
    assert sentinel_ids(save_tokenizer(["▁<extra_id_1>", "▁<extra_id_0>"])) == (24, 23)


def test_a_tokenizer_without_sentinels():
    with pytest.raises(ValueError, match=r"no sentinel token <extra_id_0>.* the tokenizer of a T5"):
        sentinel_ids(save_tokenizer([]))


# --- files --------------------------------------------------------------------------------------


def test_segments_of_a_file(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfw0 w1\r\nw2\r\n\r\n \r\nw3 nonsense w5\r\n\r\n\r\nw6")
    segments = read_segments(path, tokenizer, 3)
    assert [segment.tolist() for segment in segments] == [[3, 4, 5], [6, 2, 8]]  # w6 is left over
    assert (segments.tokens.dtype, segments.offsets.dtype) == (np.int32, np.int64)
    assert read_segments(path, tokenizer, 4).offsets.tolist() == [0, 4, 7]
    assert read_segments(path, tokenizer, 100).tokens.tolist() == [3, 4, 5, 6, 2, 8, 9]


def test_words_that_spell_special_tokens_are_left_out(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("w0 <extra_id_1> w1 </s> w2 <pad> w3 <unk>")
    assert read_segments(path, tokenizer, 9).tokens.tolist() == [3, 4, 5, 6, 2]


def test_documents_are_streamed_in_parts(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("aa\nbb\ncc\ndd\n\n" + "e" * 25 + "\nff\n")
    assert list(read_documents(path, max_characters_per_document=100)) == [
        "aa\nbb\ncc\ndd\n",
        "e" * 25 + "\nff\n",
    ]
    parts = list(read_documents(path, max_characters_per_document=6))
    assert parts == ["aa\nbb\n", "cc\ndd\n", *["e" * 6] * 4, "e\nff\n"]


def test_a_big_file_is_tokenised_in_batches_with_a_progress_bar(tmp_path, tokenizer, capsys):
    path = tmp_path / "text.txt"
    path.write_text(("w7 " * 4000 + "\n\n") * 100)
    segments = read_segments(path, tokenizer, 1000)
    assert len(segments) == 400
    assert (segments.tokens == 10).all()
    assert "tokenising text.txt: 100%" in capsys.readouterr().err
    path.write_text("w7 w8")
    read_segments(path, tokenizer, 1000)
    assert capsys.readouterr().err == ""


def test_files_that_cannot_be_read(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    with pytest.raises(FileNotFoundError, match=r"text\.txt does not exist"):
        read_segments(path, tokenizer, 8)
    with pytest.raises(ValueError, match="is a directory, not a file"):
        read_segments(tmp_path, tokenizer, 8)
    for content, message in [
        (b"", r"text\.txt is empty \(0 bytes\)"),
        (b" \n\n\t", r"text\.txt has no text, only white space"),
        (b"w0 w1\n\xff w2", r"text\.txt is not UTF-8 \(byte 0xff\); convert it to UTF-8"),
        (b"w0 w1\n\xc3", r"text\.txt is not UTF-8 \(byte 0xc3\)"),
        (b"w0\n", r"text\.txt has 1 tokens; pre-training needs 2 or more"),
        (b"</s>\n", r"text\.txt has 0 tokens"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            read_segments(path, tokenizer, 8)
        assert "\n" not in str(caught.value)


def test_limits_that_cannot_work(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("w0 w1")
    with pytest.raises(ValueError, match="segment_length=1 must be at least 2"):
        read_segments(path, tokenizer, 1)
    with pytest.raises(ValueError, match="max_characters_per_document=0 must be at least 1"):
        read_segments(path, tokenizer, 8, max_characters_per_document=0)
