"""Tests of the benchmark of compressed decoders: its data, its reports and its predictions."""

import json
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import compressed as benchmark
from benchmarks import compressed_quality as quality
from benchmarks import compressed_speed as speed
from benchmarks import compressed_training as training
from benchmarks.compressed_speed import Cell, Decoder

SMALL = ["--vocabulary", "460", "--d", "16", "--heads", "2", "--encoder-layers", "1"]
SMALL += ["--steps", "4", "--adapter-steps", "3", "--rows", "8", "--warmup", "2", "--beams", "1"]
SMALL += ["--longest", "16", "--reduction-factor", "2", "--seeds", "0", "--test-pairs", "8"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Returns a folder with generated sentences; German is upper case, French is reversed.

    There is no German to test with, for every language is a program of its own.
    """
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnop"))
    words = ["".join(rng.choice(letters, rng.integers(2, 6))) for _ in range(90)]
    for split, rows in (("train", 60), ("test", 12)):
        english = [" ".join(rng.choice(words, 3)) for _ in range(rows)]
        is_kept = split == "train"
        german = [text.upper() if i % 5 and is_kept else None for i, text in enumerate(english)]
        french = [sentence[::-1] for sentence in english]
        columns = {"en": english, "de": german, "fr": french}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return folder


def flags_of(text, folder, *more):
    places = ["--data", str(text), "--domain", str(text), "--test-split", "test"]
    results = ["--folder", str(folder / "runs"), "--json", str(folder / "quality.json")]
    return ["quality", *places, *results, *SMALL, *more]


@pytest.mark.slow
def test_a_rehearsal_of_the_experiment(text, tmp_path, capsys):
    """A decoder is trained, scored and adapted; another call goes on with cells that are done."""
    flags, file = flags_of(text, tmp_path), tmp_path / "quality.json"
    benchmark.main([*flags, "--decoders", "standard-1,compressed-1", "--plan"])
    assert not file.exists()
    first = capsys.readouterr().out
    assert "standard-1: FLOPs " in first
    assert "all 2 cells: " in first
    benchmark.main([*flags, "--decoders", "compressed-1"])
    report = json.loads(file.read_text())
    (cell,) = report["cells"].values()
    assert list(cell["scores"]) == list(quality.STAGES)
    for stage in cell["scores"].values():
        assert set(stage) == {"fr"}
        assert 0 < stage["fr"]["loss"] < 12
        assert 0 <= stage["fr"]["bleu"] <= 100
        assert 0 <= stage["fr"]["chrf"] <= 100
    before, after = (cell["scores"][stage]["fr"]["loss"] for stage in quality.STAGES[1:])
    assert before != after
    report["cells"]["standard-1/0"] = cell
    file.write_text(json.dumps(report))
    capsys.readouterr()
    figure = tmp_path / "bleu.png"
    more = ["--decoders", "standard-1,compressed-1", "--figure", str(figure)]
    benchmark.main([*flags, *more])
    out = capsys.readouterr().out
    assert "minutes; {" not in out
    assert "compressed-1 and standard-1, adapted, fr: +0.00 BLEU, one seed" in out
    assert figure.stat().st_size > 10_000
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([*flags, "--steps", "5"])
    assert stopped.value.code == 2
    assert "quality.json has results with --steps 4, not 5" in capsys.readouterr().err


def test_pairs_and_batches(text, tmp_path):
    """Every pair is in an epoch once, with its language in front, and missing ones are left out."""
    rows = training.read_texts(text, "train")
    assert len(rows) == 60 + 48
    assert training.read_texts(text, "train", 5) == rows[:5]
    tokenizer = training.tokenizer_of(tmp_path, rows, 460)
    pairs = training.encode(tokenizer, rows, 48)
    assert len(pairs.source) == len(rows)
    assert max(map(len, training.encode(tokenizer, rows, 10).source)) <= 10
    assert {own[0] for own in pairs.source} == {tokenizer.token_to_id("<en>")}
    assert [tokenizer.id_to_token(own[0])[1:-1] for own in pairs.target] == list(pairs.languages)
    assert tokenizer.decode(pairs.target[3]) == pairs.texts[3]
    seen, batches = [], training.batches(pairs, 8, 0)
    while len(seen) < len(rows):
        batch = next(batches)
        assert batch["input_ids"].shape == batch["labels"].shape
        assert (batch["decoder_input_ids"][:, 0] == 1).all()
        seen += [tuple(ids[ids > 0]) for ids in batch["input_ids"][batch["weights"] > 0]]
    assert sorted(seen) == sorted(pairs.source)
    assert set(pairs.of_language("de").languages) == {"de"}


def test_results_within_the_spread_are_on_par():
    """Means and deviations are over seeds; a gap is compared with the larger deviation."""

    def cell(bleu):
        return {"scores": {"multi30k": {"de": {"bleu": bleu}}}}

    bleu = {"standard-6": (30.0, 32.0), "compressed-6": (31.0, 31.5), "compressed-2": (20.0, 20.1)}
    cells = {f"{n}/{s}": cell(v) for n, values in bleu.items() for s, v in enumerate(values)}
    found = quality.summary(cells)
    value = found["standard-6"]["multi30k"]["de"]["bleu"]
    assert value == {"mean": 31.0, "deviation": pytest.approx(2**0.5), "seeds": 2}
    assert quality.on_par(found) == [
        "compressed-6 and standard-6, multi30k, de: +0.25 BLEU, on par "
        "(deviation of the seeds 1.41)",
        "compressed-2 and standard-6, multi30k, de: -10.95 BLEU, not on par "
        "(deviation of the seeds 1.41)",
    ]


def test_weights_and_caches_of_the_predictions():
    """At F = 4d both read 14 d^2 weights a layer; numbers of the model by hand."""
    standard, compressed = Decoder("standard", 6), Decoder("compressed", 6)
    names = [one.name for one in speed.decoders(types.SimpleNamespace(layers=6, few=2))]
    assert len(set(names)) == 4
    assert names[-1] == "compressed 2, F = 4d"
    assert standard.weights(8) == compressed.weights(8) == 14 * 64
    assert Decoder("compressed", 6, wide=1).weights(8) == 5 * 64
    assert (standard.cached(8), compressed.cached(8)) == (16, 40)
    cell = Cell(d=100, batch=2, source=10, beams=4)
    weights, cached = 6 * 14 * 10_000 + 50 * 100, 6 * 8 * 500 * (10 + 20 + 40)
    by_hand = 2 * 8 * weights / 40e9 + 4 * cached / 10e9 + 2e-6 * 24
    assert speed.predicted(compressed, cell, 20, 50) == pytest.approx(by_hand)


def test_speeds_are_measured_and_kept(tmp_path, capsys, monkeypatch):
    """Every case has tokens per second and ratios; a second call measures nothing again."""
    file, tested = tmp_path / "speed.json", [Decoder("standard", 1), Decoder("compressed", 1)]
    monkeypatch.setattr(speed, "decoders", lambda options: tested)
    flags = ["speed", "--d", "8", "--batch", "2", "--source", "4", "--beams", "1", "--tokens", "3"]
    flags += ["--heads", "2", "--vocabulary", "30", "--rounds", "2"]
    flags += ["--json", str(file)]
    benchmark.main(flags)
    (case,) = json.loads(file.read_text())["cells"]
    assert list(case["decoders"]) == [one.name for one in tested]
    for one in case["decoders"].values():
        assert one["tokens_per_second"]["median"] > 0
        assert one["speed_by_processor_time"]["median"] > 0
    assert case["decoders"]["standard 1, F = 4d"]["speed"]["median"] == 1
    benchmark.main(flags)
    assert json.loads(file.read_text())["cells"] == [case]
    with pytest.raises(SystemExit):
        benchmark.main([*flags, "--tokens", "4"])
    assert "speed.json has results with --tokens 3, not 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["speed", "--batch", "0"], "--batch: 0 should be at least 1"),
        (["speed", "--d", "x"], "'x' should be whole numbers with commas between them"),
        (["quality", "--decoders", "tall-2"], "'tall-2' should be such as standard-6"),
    ],
)
def test_flags_that_do_not_fit(flags, message, capsys):
    """A flag that does not fit is one line and exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
