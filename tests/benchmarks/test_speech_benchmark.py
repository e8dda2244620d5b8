"""Runs the experiment on speech at a tiny size with tones, and tests its numbers and report."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import speech, speech_captions, speech_numbers, speech_report
from tests.tones import tone
from train import figures
from train.speech.audio import read_audio

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


@pytest.fixture
def espeak(tmp_path, monkeypatch):
    """Puts a program with the name and the flags of espeak-ng on PATH; returns its record.

    It speaks tones of a pitch for each letter, as many as the caption has letters, and appends its
    voice, speed and caption to the record.
    """
    record, program = tmp_path / "spoken.txt", tmp_path / "bin/espeak-ng"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable} -IS\n{_FAKE.format(record=str(record))}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return record


_FAKE = """
import array, math, sys, wave
_, v, voice, s, speed, w, path, _, caption = sys.argv
assert (v, s, w) == ("-v", "-s", "-w"), sys.argv
if "mute" in caption:
    sys.exit("Error: no sound")
with open({record!r}, "a") as file:
    file.write(voice + " " + speed + " " + caption + "\\n")
samples = array.array("h")
for letter in caption:
    turn = 0.01 * (ord(letter) % 32 + 1) * (1 + len(voice))
    samples.extend(round(9000 * math.sin(turn * i)) for i in range(441))
with wave.open(path, "wb") as file:
    file.setparams((1, 2, 22050, 0, "NONE", ""))
    file.writeframes(samples.tobytes())
"""


def write_captions(folder, **rows):
    """Writes the tables of captions with these English captions; returns their folder."""
    folder.mkdir(exist_ok=True)
    for name, english in rows.items():
        made = [{"en": text} | {to: f"{text}{to}" for to in LANGUAGES} for text in english]
        pq.write_table(pa.Table.from_pylist(made), folder / f"{name}.parquet")
    return folder


LANGUAGES = speech_captions.Captions.languages


@pytest.fixture
def captions(tmp_path):
    """Returns a folder of tables of captions, of which some cannot be used."""
    pairs = [f"{a} {b}." for a in ("Cat", "Dog", "Man") for b in ("sits", "runs", "eats", "naps")]
    return write_captions(
        tmp_path / "captions",
        train=[*pairs[:8], "cat EATS", "...", ""],
        validation=pairs[8:10],
        test_2016_flickr=[*pairs[10:], "Cat eats!"],
    )


def test_captions_are_spoken_once_by_voices_of_their_split(captions, espeak, tmp_path, capsys):
    """No voice, speed or caption of a split is in another; sounds are kept after a failure."""
    data, folder = speech_captions.Captions(captions), tmp_path / "made"
    counts = {"train": 7, "validation": 2, "synthetic": 3}
    files = data.write_splits(folder, counts)
    assert "train.parquet: 7 captions; left out 2 without words" in capsys.readouterr().out
    found = {
        split: [json.loads(line) for line in path.read_text().splitlines()]
        for split, path in files.items()
    }
    for name in ("speaker", "speed", "source"):
        values = [{row[name] for row in rows} for rows in found.values()]
        assert all(one.isdisjoint(two) for one, two in itertools.combinations(values, 2)), name
    for split, rows in found.items():
        assert len(rows) == 3 * counts[split]
        assert [row["target_language"] for row in rows[:3]] == list(LANGUAGES)
        for row in rows:
            read = read_audio(folder / row["audio"])
            assert read.rate == speech_captions.RATE
            letters = len(row["source"]) + 1  # the punctuation that is spoken, and not written
            assert read.seconds == pytest.approx(letters * 441 / 22050, abs=1e-3)
    spoken = espeak.read_text().splitlines()
    assert len(spoken) == sum(counts.values())
    # An interruption leaves sounds without the file of rows, which is written last.
    files["train"].unlink()
    next((folder / "train").glob("*.wav")).unlink()
    data.write_splits(folder, counts)
    assert len(espeak.read_text().splitlines()) == len(spoken) + 1
    with pytest.raises(ValueError, match=r"train.jsonl has 7 utterances, not 6"):
        data.write_splits(folder, {"train": 6})


def test_captions_that_cannot_be_spoken_end_in_one_line(captions, espeak, tmp_path, capsys):
    """A failing program, too few captions, and a missing program each name the fix."""
    data = speech_captions.Captions(captions)
    with pytest.raises(ValueError, match=r"train.parquet has 7 captions to speak, not 8"):
        data.write_splits(tmp_path / "many", {"train": 8})
    write_captions(captions, validation=["mute"])
    with pytest.raises(ValueError, match=r"could not speak 'mute' with -v .*: Error: no sound"):
        data.write_splits(tmp_path / "mute", {"validation": 1})
    (espeak.parent / "bin/espeak-ng").unlink()
    with pytest.raises(SystemExit) as ended:
        speech.main(["--captions", str(captions), "--output-dir", str(tmp_path / "none")])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "install the system package espeak-ng" in told


def flags_of(folder, **changes):
    settings = {
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
    flags = flags_of(tmp_path, data=data)
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


def result(data, scores_of):
    """Returns a report of two seeds in one language, with scores by the data's first metric.

    Args:
      data: the data of the report.
      scores_of: condition -> the score of each seed.
    """
    metric = next(iter(data.metrics))
    runs = [
        {
            "condition": condition,
            "seed": seed,
            "scores": {split: {"de": {metric: score, "chrf": 50.0}} for split in data.tests},
            "trained_parameters": 10,
            "bytes_of_a_language": 1000.0,
            "run": f"{condition}/seed-{seed}",
            "start": "a1",
        }
        for condition, scores in scores_of.items()
        for seed, score in enumerate(scores)
    ]
    heard = {"en": {metric: 0.25, "word_error_rate": 0.125}}
    first = [
        {"condition": "recogniser", "scores": dict.fromkeys(data.tests, heard), "weights": "a1"}
    ]
    first[0]["start"] = "a0"
    return {**data.described, "languages": ["de"], "runs": runs, "first": first}


def test_when_the_claim_stands():
    """Adapters have to be within the spread of full fine-tuning, and above the shared adapter."""

    def of_digits(ours, whole, one):
        scores = {"st-2": (ours, ours), "full": (whole, whole + 0.02), "shared": (one, one)}
        return result(speech_numbers.Digits(Path()), scores)

    assert speech_report.stands(of_digits(0.50, 0.50, 0.4)) is True
    assert speech_report.stands(of_digits(0.48, 0.50, 0.4)) is False
    assert speech_report.stands(of_digits(0.50, 0.50, 0.6)) is False
    alone = of_digits(0.5, 0.5, 0.4)
    alone["runs"] = [run for run in alone["runs"] if run["seed"] == 0]
    assert speech_report.stands(alone) is None
    text = speech_report.report(of_digits(0.50, 0.50, 0.4))
    assert "| full | 2 | 51.0 ± 1.4 | 51.0 |" in " ".join(text.split())
    assert "exact matches in % 25.0 (new numbers, a new speaker)" in text
    assert "stands." in text
    assert "another first stage" not in text
    alone["runs"][0]["start"] = "b1"
    text = speech_report.report(alone)
    assert "These runs started from another first stage than the one in the table" in text
    assert text.endswith("since: st-2/seed-0.\n")


def test_the_figure_has_every_seed_of_every_condition(monkeypatch):
    """A panel for each test has the scores against what all runs of a seed train together."""
    scores = {"st-2": (0.50, 0.54), "full": (0.48, 0.52), "shared": (0.4, 0.4)}
    found = result(speech_numbers.Digits(Path()), scores)
    whole = next(run for run in found["runs"] if run["condition"] == "full")
    # Another run of the same seed, as of another language; and one of a seed that is not finished.
    found["runs"] += [{**whole, "trained_parameters": 32}, {**whole, "seed": 2, "scores": {}}]
    found["runs"][-1]["scores"] = {split: {} for split in found["tests"]}
    found["first"].append(
        {**found["first"][0], "condition": "translator", "scores": whole["scores"]}
    )
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    speech_report.figure(found, Path("never-written.png"))
    panels = drawn[0].axes
    assert [panel.get_title() for panel in panels] == list(found["tests"].values())
    for panel in panels:
        lines = {line.get_label(): line for line in panel.get_lines()}
        assert lines.keys() == {*scores, "translator"}
        assert list(lines["full"].get_xdata()) == [42, 42]
        assert list(lines["st-2"].get_xdata()) == [10, 10]
        for condition, values in scores.items():
            np.testing.assert_allclose(lines[condition].get_ydata(), 100 * np.array(values))
        np.testing.assert_allclose(lines["translator"].get_ydata(), 48.0)
        looks = {
            (line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines.values()
        }
        assert len(looks) == len(lines)
    assert "| full | 2 | 50.0 ± 2.8 | 50.0 | 42 |" in " ".join(speech_report.report(found).split())


def test_every_condition_has_a_look_of_its_own():
    """No condition is left out of the figure's colours and markers, and no two are alike."""
    looks = speech_report._DRAWN
    assert looks.keys() == set(speech.CONDITIONS)
    assert len(set(looks.values())) == len(looks)


def test_reports_of_captions_say_that_the_speech_is_synthetic():
    """Every table and every line with a score says it; BLEU stays as it is."""
    scores = {"st-2": (20.0, 22.0), "full": (19.0, 21.0), "shared": (18.0, 18.0)}
    found = result(speech_captions.Captions(Path()), scores)
    assert speech_report.stands(found) is True
    parts = speech_report.report(found).split("\n\n")
    for before, part in itertools.pairwise(parts):
        if any(character.isdigit() for character in part):
            assert "synthetic" in (before if part.startswith("|") else part), part
    assert "BLEU, synthetic speech, new captions and voices" in parts
    assert "word error rate in % 12.5 (synthetic speech" in parts[-2]
    assert "| full | 2 | 20.0 ± 1.4 | 20.0 |" in " ".join(parts[2].split())
