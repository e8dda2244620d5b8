"""Runs the experiment on varieties at a tiny size, and tests its intervals and its choice."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import (
    varieties,
    varieties_data,
    varieties_report,
    varieties_tagging,
    varieties_width,
)
from benchmarks.varieties_tagging import score
from tests.conftest import WORDS
from tests.train.inference.test_tagging_commands import TAGS, sentences

TOY = varieties_data.Group(("nb", "da"), ("nn",))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Writes tables of tagged sentences, and one of news in the names of NTREX."""
    folder = tmp_path_factory.mktemp("tagging")
    (folder / "pos").mkdir()
    for seed, name in enumerate(("nb", "da", "nn")):
        rows = []
        for split, count in (("train", 60), ("validation", 8), ("test", 8)):
            for words in sentences(count, seed, longest=7):
                tags = [TAGS.get(word, "O") for word in words]
                rows.append({"tokens": words, "tags": tags, "split": split})
        pq.write_table(pa.Table.from_pylist(rows), folder / "pos" / f"{name}.parquet")
    news = [" ".join(np.random.default_rng(at).choice(WORDS, 5)) for at in range(40)]
    pq.write_table(pa.table({"nob": news, "dan": news[::-1]}), folder / "news.parquet")
    return folder


def flags_of(data, backbone, output):
    settings = {
        "backbone": backbone,
        "tagging": data,
        "ntrex": data / "news.parquet",
        "sentences": 40,
        "train-sentences": 24,
        "validation-sentences": 4,
        "test-sentences": 6,
        "many-step-sentences": 3,
        "layers": 1,
        "epochs": 1,
        "head-epochs": 1,
        "task-epochs": 1,
        "batch-size": 8,
        "eval-batch-size": 8,
        "max-length": 16,
        "fit-steps": 2,
        "flops-per-second": "1e9",
        "output-dir": output,
    }
    listed = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    listed += ["--adapters", "dense", "joint", "--seeds", "0"]
    return [*listed, "--steps", "1", "2", "--rates", "10"]


def assert_costs_of(predicted):
    """Checks the passes of the conditions against each other."""
    passes = {row["what"]: row.get("passes") for row in predicted}
    assert passes["only"] > 1  # members with weight 0 are computed, too
    assert passes["probabilities"] == pytest.approx(1.5 * passes["equal"], rel=0.2)
    # A step computes what the weights change, forward and back; the rest is there already.
    first = passes["entropy-1-10"] - passes["equal"]
    assert 0 < first < passes["equal"]
    assert passes["entropy-2-10"] - passes["entropy-1-10"] == pytest.approx(first, rel=0.05)


def refused(flags, capsys, main=varieties.main):
    """Runs an experiment, which has to end with exit code 2; returns the one line it tells."""
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def assert_widths_of(flags, output):
    """Trains another width on the same head, and compares both on validation sentences alone."""
    varieties_width.main([*flags, "--reduction-factors", "2", "4"])
    folders = {path.parent for path in output.rglob("metrics.json")}
    assert len(folders) == 9
    assert {path.parts[-3:] for path in folders if "reduction-4" in path.parts} == {
        ("dense", "seed-0", name) for name in ("nb", "da", "task")
    }
    widths = json.loads((output / "widths.json").read_text())["widths"]
    assert all("/validation/" in key for each in widths.values() for key in each["cells"])
    wide, narrow = (widths[key]["adapters"]["0"]["dense/nb"]["bytes"] for key in ("2", "4"))
    assert wide > 1.3 * narrow
    text = (output / "widths.md").read_text()
    assert text.count("| 2 |") == text.count("| 4 |") == 1
    assert "The best mean is that of reduction" in text


@pytest.mark.slow
def test_a_rehearsal_runs_through(data, tiny_backbone, tmp_path, monkeypatch, capsys):
    """Every condition has a cell, the plan has its cost, and nothing is done twice."""
    monkeypatch.setitem(varieties_data.GROUPS, "1", TOY)
    output = tmp_path / "runs"
    flags = flags_of(data, tiny_backbone, output)
    varieties.main([*flags, "--plan"])
    assert "minutes predicted" in capsys.readouterr().out
    assert not (output / "head").exists()
    varieties.main(flags)
    report = json.loads((output / "varieties.json").read_text())
    cells = report["cells"]
    emea = ("entropy-1-10", "entropy-2-10")
    assert {key for key in cells if "/validation/" in key} == {
        f"0/da/validation/{name}" for name in ("equal", *emea)
    }
    single = {"nn": ("only-nb", "only-da"), "da": ("only-nb",)}
    for variety, own in single.items():
        names = ("none", *own, "equal", *emea, "probabilities", "labels", "joint")
        found = {key for key in cells if key.startswith(f"0/{variety}/test/")}
        assert found == {f"0/{variety}/test/{name}" for name in names}
    assert cells["0/nn/test/equal"]["sentences"] == 6
    assert cells["0/nn/test/entropy-2-10"]["sentences"] == 3
    # A mixture of one adapter is this adapter, whatever mixes it.
    for name in ("only-nb", "entropy-1-10", "probabilities", "labels"):
        assert cells[f"0/da/test/{name}"]["counts"] == cells["0/da/test/equal"]["counts"]
    losses = cells["0/nn/test/labels"]["losses"]
    assert losses[1] < losses[0]
    assert_costs_of(report["predicted"])
    text = (output / "varieties.md").read_text()
    assert "| `labels` |" in text
    assert "less equal weights" in text
    assert (output / "varieties.png").stat().st_size > 5_000
    times = {path: path.stat().st_mtime_ns for path in output.rglob("metrics.json")}
    assert len(times) == 6
    # A cell that is missing is computed again, and no other one.
    del cells["0/nn/test/equal"]
    report["adapters"]["0"]["compacter/nb"] = report["adapters"]["0"]["dense/nb"]
    kept = {key: cell["seconds"] for key, cell in cells.items()}
    (output / "varieties.json").write_text(json.dumps(report))
    capsys.readouterr()
    varieties.main(flags)
    written = json.loads((output / "varieties.json").read_text())
    assert written["adapters"] == report["adapters"]
    again = written["cells"]
    assert {key: again[key]["seconds"] for key in kept} == kept
    assert "0/nn/test/equal" in again
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert_widths_of(flags, output)
    # Nothing is trained for a seed with all its cells, and no other settings are mixed in.
    for path in times:
        path.unlink()
    varieties.main(flags)
    assert not any(path.exists() for path in times)
    capsys.readouterr()
    told = refused([*flags, "--max-length", "9"], capsys)
    assert "results with --max-length" in told


def test_flags_of_language_adapters(tiny_backbone, tmp_path, data):
    """Adapters in all layers have an invertible one; those in the upper ones leave others out."""
    options = varieties.parser().parse_args(flags_of(data, tiny_backbone, tmp_path))
    upper = varieties.language_flags(options, "dense")
    assert upper[0] == "pfeiffer-feed-forward"
    assert upper[-2:] == ["--leave-out", "0"]
    assert upper[upper.index("--reduction-factor") + 1] == "2"
    options.layers = 0
    assert varieties.language_flags(options, "dense") == ["mad-x"]
    assert varieties.language_flags(options, "joint", 4) == ["mad-x", "--expansion-factor", "4"]
    assert varieties.language_flags(options, "compacter")[0] == "compacter++-short"


def test_the_width_of_mad_x_is_its_own(tiny_backbone, tmp_path, data, capsys):
    """A width that the preset would ignore is refused, in one line, before anything is made."""
    flags = [*flags_of(data, tiny_backbone, tmp_path / "runs"), "--layers", "0"]
    told = refused([*flags, "--reduction-factor", "4"], capsys)
    assert "error: --reduction-factor 4: mad-x has reduction factor 2" in told
    # Not even the first width is trained.
    widths = [*flags, "--reduction-factors", "2", "4"]
    told = refused(widths, capsys, varieties_width.main)
    assert "error: --reduction-factor 4: mad-x" in told
    assert not (tmp_path / "runs").exists()


def test_scores_are_those_of_sums():
    """Accuracy is over all words, F1 over all entities."""
    assert score(np.array([[1, 2], [3, 3]])) == 0.8
    assert score(np.array([[1, 2, 1], [0, 0, 2]])) == pytest.approx(2 / 5)
    assert score(np.zeros((2, 3), int)) == 0


def test_a_group_is_tagged_where_there_are_tags(tmp_path):
    """A language without entities keeps its adapter, with the text of its parts of speech."""
    words = {"nb": "fjord", "da": "sund", "is": "foss", "nn": "elv", "fo": "vik"}
    splits = {"nb": ("train", "validation", "test"), "da": ("validation", "test")}
    for task, names in (("pos", words), ("ner", ("nb", "da", "nn"))):
        (tmp_path / task).mkdir()
        for name in names:
            own = ("train", *splits["da"]) if task == "pos" else splits.get(name, splits["da"])
            rows = [{"tokens": [words[name], task], "tags": ["O", "O"], "split": at} for at in own]
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / task / f"{name}.parquet")
    whole = varieties_data.Group(("nb", "da", "is"), ("nn", "fo"))
    assert whole.tagged_in(tmp_path / "pos") == whole
    group = whole.tagged_in(tmp_path / "ner")
    assert (group.languages, group.varieties) == (whole.languages, ("nn",))
    assert group.left_out == ("da",)
    sizes = {"text": 4, "train": 4, "validation": 4, "test": 4}
    folder = tmp_path / "files"
    files = varieties_data.write(folder, group, "ner", tagging=tmp_path, ntrex=None, sizes=sizes)
    texts = {name: files.text(name).read_text() for name in group.languages}
    assert texts == {"nb": "fjord ner\n", "da": "sund pos\n", "is": "foss pos\n"}
    written = {path.stem for path in folder.glob("*.jsonl")}
    tested = {f"{name}-{split}" for name in ("nb", "da", "nn") for split in splits["da"]}
    assert written == {"nb-train", *tested}
    (tmp_path / "ner" / "nb.parquet").unlink()
    with pytest.raises(ValueError, match=r"ner has no nb\.parquet, whose sentences"):
        whole.tagged_in(tmp_path / "ner")


def test_entities_are_counted_by_sentence():
    """Right, predicted and wanted entities; a part of one is none."""
    predicted = [["B-PER", "I-PER", "O"], ["B-LOC", "O"], ["O", "O"]]
    wanted = [["B-PER", "I-PER", "B-LOC"], ["B-LOC", "I-LOC"], ["O", "O"]]

    class Objective:
        def predictions_and_targets(self, outputs, encoded):
            return np.array(outputs, object), np.array(encoded, object)

    counts = varieties_tagging._counts(Objective(), predicted, wanted, "ner")
    assert counts.tolist() == [[1, 1, 2], [0, 1, 1], [0, 0, 0]]
    assert score(counts) == pytest.approx(2 / 5)


def report_of(cells):
    """Returns a report with counts of right and all words of each sentence, by key."""
    made = {
        key: {"counts": counts, "score": score(np.array(counts)), "sentences": len(counts)}
        for key, counts in cells.items()
    }
    return {
        "cells": made,
        "adapters": {"0": {}},
        "languages": ["nb", "da"],
        "left_out": ["da"],
        "varieties": ["nn"],
        "predicted": [],
    }


def test_the_interval_is_that_of_paired_sentences():
    """Sentences that differ alike have an interval without width; noise gives one around 0."""
    generator = np.random.default_rng(1)
    right = generator.integers(0, 9, (2, 200))
    words = np.full_like(right, 10)
    theirs = np.stack([right, words], -1)
    ours = np.stack([right + 1, words], -1)
    found = varieties_report.paired(ours, theirs)
    assert found == pytest.approx({"difference": 0.1, "low": 0.1, "high": 0.1})
    noise = theirs + np.stack([generator.integers(-1, 2, right.shape), 0 * words], -1)
    found = varieties_report.paired(noise, theirs)
    assert found["low"] < 0 < found["high"]
    assert found["low"] < found["difference"] < found["high"]
    expected = (noise - theirs)[..., 0].mean(0).std() / 10 / np.sqrt(200)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * expected, rel=0.15)
    # Entities, and conditions on different numbers of sentences.
    entities = np.stack([right, right + 2, right + 3], -1)
    found = varieties_report.paired(entities, entities[:, :50])
    assert found["difference"] == 0


def test_the_setting_is_chosen_on_left_out_languages_alone():
    """The best setting on the test split of a variety does not count."""
    cells = {
        "0/da/validation/equal": [[5, 10]] * 4,
        "0/da/validation/entropy-1-10": [[6, 10]] * 4,
        "0/da/validation/entropy-1-100": [[7, 10]] * 2,
        "0/nn/test/equal": [[5, 10]] * 4,
        "0/nn/test/only-nb": [[4, 10]] * 4,
        "0/nn/test/only-da": [[6, 10]] * 4,
        "0/nn/test/entropy-1-10": [[9, 10]] * 4,
        "0/nn/test/entropy-1-100": [[4, 10]] * 4,
    }
    report = report_of(cells)
    assert varieties_report.chosen(report) == "entropy-1-100"
    claims = varieties_report.claims(report)
    assert claims["mixture"]["nn"]["difference"] == pytest.approx(0.1)
    assert claims["best"]["nn"]["difference"] == pytest.approx(-0.1)
    assert claims["emea"]["nn"]["difference"] == pytest.approx(-0.1)
    text = varieties_report.report(report)
    assert "`entropy-1-100` less equal weights" in text
    assert varieties_report.chosen(report_of({})) is None


def test_conditions_are_compared_by_the_seeds_that_both_have():
    """A seed without a condition hides it from no table, and takes no part in its comparisons."""
    cells = {
        "0/nn/test/only-nb": [[4, 10]] * 3,
        "0/nn/test/equal": [[5, 10]] * 3,
        "1/nn/test/equal": [[9, 10]] * 3,
        "1/nn/test/joint": [[2, 10]] * 3,
        "0/da/validation/equal": [[5, 10]] * 3,
        "1/da/validation/equal": [[1, 10]] * 3,
        "1/da/validation/entropy-1-10": [[2, 10]] * 3,
        "0/da/validation/entropy-1-100": [[4, 10]] * 3,
    }
    report = {**report_of(cells), "adapters": {"0": {}, "1": {}}}
    assert varieties_report.chosen(report) == "entropy-1-10"
    claims = varieties_report.claims(report)
    assert claims["mixture"]["nn"]["difference"] == pytest.approx(0.1)
    assert not claims["emea"]
    text = " ".join(varieties_report.report(report).split())
    assert "| `only-nb` | 40.0 (3, 1 of 2 seeds) | - |" in text
    assert "| `equal` | 70.0 ± 28.3 (3) | - |" in text
    assert "| `joint` | 20.0 (3, 1 of 2 seeds) | - |" in text
    apart = [
        varieties_report.counts_of(report, "nn", name, "test") for name in ("only-nb", "joint")
    ]
    assert varieties_report.compared(*apart) is None
