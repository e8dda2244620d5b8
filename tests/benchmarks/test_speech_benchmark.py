"""Runs the experiment on speech at a tiny size with tones, and tests its numbers and report."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import speech, speech_numbers, speech_report
from tests.tones import tone

SPEAKERS = {"train": ("ann", "bob"), "validation": ("ann", "bob"), "test": ("theo",)}


def spell(number, language):
    """Returns the digits of a number as syllables of one word, others in each language."""
    shift = speech_numbers.LANGUAGES.index(language)
    syllables = [
        f"{'bdfgklmnprstvz'[(int(d) + shift) % 14]}{'aeiou'[int(d) % 5]}" for d in str(number)
    ]
    return "".join(syllables)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Returns a folder of tables like those of the data set, of short tones."""
    folder = tmp_path_factory.mktemp("digits")
    for split, speakers in SPEAKERS.items():
        sounds = {
            (digit, speaker, take): tone(200 * 1.2**digit, 0.06, 8_000, take)
            for digit in range(10)
            for speaker in speakers
            for take in range(5)
        }
        rows = speech_numbers.as_table(sounds)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


def test_parts_of_the_numbers():
    """Every number is in one part, and each part has numbers of three and four digits."""
    parts = {part: speech_numbers.numbers_of(part) for part in ("train", "validation", "test")}
    flat = {part: [n for numbers in each for n in numbers] for part, each in parts.items()}
    assert sorted(itertools.chain(*flat.values())) == list(range(10_000))
    assert 7_700 < len(flat["train"]) < 8_300
    for part, numbers in parts.items():
        assert len(numbers[-1]) > 100, part
        assert all(len({len(str(n)) for n in each}) == 1 for each in numbers)


def test_utterances_are_the_digits_of_their_number(data):
    """An utterance is the recordings of its digits by one speaker with pauses between them."""
    recordings = speech_numbers.recordings_of(data / "validation.parquet", (0, 1))
    assert sorted(recordings) == ["ann", "bob"]
    assert {len(takes) for of in recordings.values() for takes in of.values()} == {2}
    found = list(speech_numbers.utterances(recordings, "test", 40, seed=0))
    again = list(speech_numbers.utterances(recordings, "test", 40, seed=0))
    for (speaker, number, samples), (_, _, same) in zip(found, again, strict=True):
        np.testing.assert_array_equal(samples, same)
        assert speech_numbers.part_of(number) == "test"
        digits = str(number)
        first, last = (recordings[speaker][int(digit)] for digit in (digits[0], digits[-1]))
        whole = np.round(samples * 2**15)
        assert any((whole[: len(take)] == take).all() for take in first)
        assert any((whole[-len(take) :] == take).all() for take in last)
        spoken = len(digits) * len(first[0])
        pauses = (len(samples) - spoken) / speech_numbers.RATE
        count = len(digits) - 1
        assert 0.05 * count - 1e-3 <= pauses <= 0.15 * count + 1e-3
    assert {len(str(number)) for _, number, _ in found} >= {3, 4}


def flags_of(data, folder, **changes):
    settings = {
        "data": data,
        "output-dir": folder / "runs",
        "train-utterances": 16,
        "test-utterances": 2,
        "d-model": 16,
        "encoder-layers": 1,
        "decoder-layers": 1,
        "heads": 2,
        "vocab-size": 421,
        "first-steps": 2,
        "steps": 2,
        "batch-size": 8,
        "max-evaluations": 1,
        "flops-per-second": "1e9",
        **changes,
    }
    listed = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [*listed, "--seeds", "0", "--conditions", "st-8", "recogniser-cross"]


@pytest.mark.slow
def test_a_rehearsal_runs_through(data, tmp_path, capsys):
    """The plan trains nothing; the runs are evaluated, and what is done is not repeated."""
    flags = flags_of(data, tmp_path)
    speech.main([*flags, "--plan"], spell=spell)
    assert "minutes predicted" in capsys.readouterr().out
    assert not (tmp_path / "runs/translator").exists()
    speech.main(flags, spell=spell)
    report = json.loads((tmp_path / "runs/speech.json").read_text())
    assert [run["condition"] for run in report["first"]] == ["translator", "recogniser"]
    runs = {run["condition"]: run for run in report["runs"]}
    assert runs.keys() == {"st-8", "recogniser-cross"}
    for run in runs.values():
        assert set(run["scores"]) == {"known", "new"}
        assert set(run["scores"]["new"]) == set(speech_numbers.LANGUAGES)
    more = runs["recogniser-cross"]["trained_parameters"] - runs["st-8"]["trained_parameters"]
    # Eight members: bottlenecks of width 8 instead of 2 in two layers, and four layers of 16.
    assert more == 8 * (2 * (2 * 16 + 1) * 6 + 4 * (16 * 16 + 16))
    capsys.readouterr()
    speech.main(flags, spell=spell)
    told = capsys.readouterr().out
    assert "epoch 1" not in told
    assert "was not tested by these runs" in told


def test_when_the_claim_stands():
    """Adapters have to be within the spread of full fine-tuning, and above the shared adapter."""

    def result(ours, whole, one):
        runs = []
        for seed in (0, 1):
            scores = {"st-2": ours, "full": whole + 0.02 * seed, "shared": one}
            for condition, score in scores.items():
                of_split = {"de": {"exact_match": score, "chrf": 50.0}}
                runs.append(
                    {
                        "condition": condition,
                        "seed": seed,
                        "scores": {"known": of_split, "new": of_split},
                        "trained_parameters": 10,
                        "bytes_of_a_language": 1000.0,
                    }
                )
        return {"languages": ["de"], "runs": runs, "first": []}

    assert speech_report.stands(result(0.50, 0.50, 0.4)) is True
    assert speech_report.stands(result(0.48, 0.50, 0.4)) is False
    assert speech_report.stands(result(0.50, 0.50, 0.6)) is False
    alone = result(0.5, 0.5, 0.4)
    alone["runs"] = [run for run in alone["runs"] if run["seed"] == 0]
    assert speech_report.stands(alone) is None
    text = speech_report.report(result(0.50, 0.50, 0.4))
    assert "| full | 51.0 ± 1.4 | 51.0 |" in " ".join(text.split())
    assert "stands." in text
