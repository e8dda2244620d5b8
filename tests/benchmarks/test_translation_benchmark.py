"""Runs the experiment on translation at a tiny size, and tests its counts."""

import argparse
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import translation, translation_data, translation_report
from tests.parallel_data import sentences, write_jsonl


def flags_of(folder, **changes):
    """Returns the flags of a rehearsal with generated text in two languages."""
    tables = {
        name: write_jsonl(
            folder / f"{name}.jsonl",
            [{key: row[key] for key in ("en", "de")} for row in sentences(count, seed, longest=4)],
        )
        for seed, (name, count) in enumerate({"train": 300, "validation": 10}.items())
    }
    settings = {
        **tables,
        "d-model": 16,
        "d-ff": 24,
        "layers": 1,
        "heads": 2,
        "vocab-size": 416,
        "first-steps": 3,
        "steps": 4,
        "batch-size": 8,
        "eval-batch-size": 16,
        "max-length": 16,
        "max-evaluations": 1,
        "flops-per-second": "1e9",
        "output-dir": folder / "runs",
        **changes,
    }
    listed = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [*listed, "--languages", "en", "de"]


@pytest.mark.slow
def test_a_rehearsal_runs_through(tmp_path, capsys):
    """Every kind of condition trains and is evaluated; what is done is not repeated."""
    flags = flags_of(tmp_path)
    flags += ["--seeds", "0", "--conditions", "longer", "ciat", "bilingual", "--most-rows", "6"]
    translation.main(flags)
    report = json.loads((tmp_path / "runs/translation.json").read_text())
    runs = {(run["condition"], *run["scores"]): run for run in report["runs"]}
    assert set(runs) == {
        ("longer", "en-de", "de-en"),
        ("ciat", "en-de", "de-en"),
        ("bilingual", "en-de"),
        ("bilingual", "de-en"),
    }
    assert [row["condition"] for row in report["predicted"]] == [
        "first",
        "longer",
        "ciat",
        "bilingual",
    ]
    assert all(row["minutes"] > 0 for row in report["predicted"])
    d, r, layers = 16, 8, 2
    members = 2 * (2 * (2 * d + 2 * d * r + r + d) + 2 * layers * (2 * d * r + r + d))
    assert runs["ciat", "en-de", "de-en"]["trained_parameters"] == members
    text = (tmp_path / "runs/translation.md").read_text()
    assert "| longer |" in text
    assert "Nothing can be said of the claim" in text
    assert (tmp_path / "runs/translation.png").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.json")}
    translation.main([*flags, "--json", str(tmp_path / "again.json")])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((tmp_path / "again.json").read_text())["runs"] == report["runs"]
    # A result is not computed again, even if its folder is gone.
    for path in before:
        path.unlink()
    translation.main(flags)
    assert not any(path.exists() for path in before)
    assert json.loads((tmp_path / "runs/translation.json").read_text()) == report
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        translation.main([*flags, "--d-model", "20"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "translation.json has results with --d-model 16, not 20" in told
    assert told.count("\n") == 1


def test_minutes_are_predicted_without_training(tmp_path, capsys):
    """Each condition has its runs of all seeds, and nothing is trained."""
    conditions = ("shared", "ciat", "full")
    flags = [*flags_of(tmp_path), "--conditions", *conditions, "--seeds", "0", "1"]
    translation.main([*flags, "--predict-only"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines if "|" in line}
    assert {*conditions, "first"} < {*rows}
    assert rows["ciat"][1] == "2"  # seeds
    assert rows["full"][1] == "4"  # seeds and directions
    assert not (tmp_path / "runs/first").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--languages", "en", "de", "it"], "train.jsonl has no column 'it' for --languages; its "),
        (["--directions", "en-xx"], "xx"),
        (["--most-rows", "0"], "--most-rows 0 must be 1 or more"),
        (["--test", "no.parquet"], "no.parquet"),
        (["--languages", "en", "de", "fr"], "validation.jsonl has no row of en-fr, de-fr, fr-en"),
    ],
)
def test_bad_tables_are_refused_before_anything_is_made(changed, told, tmp_path, capsys):
    """A language without a column or a direction without a row gives one line that names it."""
    flags = flags_of(tmp_path)
    for name in ("train", "validation"):
        path = tmp_path / f"{name}.jsonl"
        rows = map(json.loads, path.read_text().splitlines())
        write_jsonl(path, [row | {"fr": row["de"] if name == "train" else None} for row in rows])
    with pytest.raises(SystemExit) as ended:
        translation.main([*flags, *changed])
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert told in line
    assert line.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("temperature", "full", "first"), [(1.0, (30, 30, 10, 10), 90), (1e6, (20, 20, 20, 20), 90)]
)
def test_each_direction_gets_its_share_of_the_steps(tmp_path, temperature, full, first):
    """Conditions with a model for each direction train it for the rows that the others draw."""
    rows = [{"en": f"a {i}", "de": f"b {i}", "fr": f"c {i}" if i < 10 else None} for i in range(30)]
    options = argparse.Namespace(
        train=write_jsonl(tmp_path / "train.jsonl", rows),
        languages=["en", "de", "fr"],
        temperature=temperature,
        output_dir=tmp_path,
        first_steps=first,
        steps=80,
        seeds=[0, 1],
        conditions=["full", "bilingual"],
    )
    directions = ("en-de", "de-en", "en-fr", "fr-en")
    runs = list(translation.runs_of(options, directions, tmp_path / "random"))
    steps = {(run.condition, run.directions): run.steps for run in runs}
    assert steps["first", directions] == first
    for name, count in zip(directions, full, strict=True):
        assert steps["full", (name,)] == count
        assert steps["bilingual", (name,)] == count + math.ceil(count * first / 80)
    assert len(runs) == 1 + 2 * 2 * 4
    assert {run.backbone.name for run in runs if run.condition == "bilingual"} == {"random"}


def test_a_part_of_a_table_has_few_rows_of_each_direction(tmp_path):
    """Each language keeps as many texts as asked for, or all it has, beside their English."""
    rows = [
        {"en": f"a {i}", "de": f"b {i}", "fr": f"c {i}" if i % 20 == 0 else None, "source": "x"}
        for i in range(100)
    ]
    table, part = write_jsonl(tmp_path / "test.jsonl", rows), tmp_path / "new" / "part.parquet"
    translation_data.write_part(table, ["en", "de", "fr"], 8, part)
    found = pq.read_table(part).to_pydict()
    assert set(found) == {"en", "de", "fr"}
    counts = translation_data.counts(part, ("en", "de", "fr"))
    assert (counts["en-de"], counts["de-en"], counts["en-fr"]) == (8, 8, 5)
    assert all(a[1:] == b[1:] for a, b in zip(found["en"], found["de"], strict=True) if b)
    assert 8 <= len(found["en"]) <= 13
    kept = [int(text[2:]) for text in found["en"]]
    assert kept == sorted(kept)
    assert kept != list(range(len(kept)))
    texts = [row["en"] for row in rows]
    few = translation_data.drawn(texts, 9)
    assert len(few) == 9
    assert sorted(few, key=texts.index) == few != texts[:9]
    assert translation_data.drawn(texts, 100) == translation_data.drawn(texts, None) == texts
    again = tmp_path / "again.parquet"
    translation_data.write_part(table, ["en", "de", "fr"], 8, again)
    assert pq.read_table(again).to_pydict() == found


def made(scores):
    """Returns a report with BLEU `[seeds, directions]` of each condition."""
    directions = [f"en-{i}" for i in range(np.shape(next(iter(scores.values())))[1])]
    runs = [
        {
            "condition": condition,
            "seed": seed,
            "scores": {n: {"bleu": x} for n, x in zip(directions, row, strict=True)},
        }
        for condition, rows in scores.items()
        for seed, row in enumerate(rows)
    ]
    return {"directions": directions, "runs": runs}


def test_wins_are_counted_beyond_the_spread():
    """Better in x of n, by more than 0.5 in y, and by more than both standard deviations in z."""
    ours = np.array([[10.0, 10.0, 10.0, 10.0], [10.2, 10.2, 10.2, 14.0]])
    theirs = np.array([[9.0, 9.8, 10.5, 11.0], [9.2, 10.0, 10.7, 9.0]])
    assert translation_report.wins(ours, theirs) == {
        "better": 3,
        "clearly_better": 2,
        "beyond_spread": 1,
        "directions": 4,
    }


@pytest.mark.parametrize(
    ("shared", "wanted"), [([[8.0, 8.0, 11.0]] * 2, True), ([[8.0, 11.0, 11.0]] * 2, False)]
)
def test_the_claim_needs_most_directions_against_both(shared, wanted):
    """`ciat` has to beat longer training and the shared adapter in most directions."""
    ours, longer = [[10.0, 10.0, 10.0], [10.1, 10.1, 10.1]], [[9.0, 9.0, 9.0]] * 2
    report = made({"ciat": ours, "longer": longer, "shared": shared})
    assert translation_report.stands(report) is wanted
    for few in ("ciat", "longer", "shared"):
        scores = {"ciat": ours, "longer": longer, "shared": shared}
        one_seed = made(scores | {few: scores[few][:1]})
        assert translation_report.stands(one_seed) is None


def test_seeds_that_are_missing_are_left_out_of_the_tables():
    """Each condition has its own seeds; wins are of common ones, and minutes of all its runs."""
    scores = {"ciat": [[10.0, 12.0], [11.0, 13.0]], "longer": [[9.0, 12.5]], "full": [[8.0, 8.0]]}
    report = made(scores)
    kept = {"trained_parameters": 7, "adapter_bytes": 9, "seconds": 30.0, "start": "b"}
    for run in report["runs"]:
        run |= {"run": f"{run['condition']}/seed-{run['seed']}", **kept}
        for values in run["scores"].values():
            values["chrf"] = 2 * values["bleu"]
    full = report["runs"][-1]
    full |= {"seed": 5, "start": "c"}
    first = {"condition": "first", "seed": 0, "weights": "b", "scores": full["scores"], **kept}
    report["first"] = [first | {"start": "a"}]
    report["predicted"] = [
        {"condition": name, "runs": 1, "minutes": 1.5} for name in ("first", *scores)
    ]
    told = " ".join(translation_report.report(report).split())
    assert "| ciat | 7 | 9 | 3.0 | 1.0 |" in told
    assert "| ciat | 2 | 10.5 ± 0.7 | 12.5 ± 0.7 | 11.50 |" in told
    assert "| longer | 1 | 9.0 | 12.5 | 10.75 |" in told
    assert "| longer | 1 | 1 of 2 | 1 of 2 | - |" in told
    assert told.count("| full |") == 3  # in no table of wins
    assert "another first stage than the one in the table" in told
    assert told.endswith("since: full/seed-0.")
    report["first"] = []
    assert "| first stage |" not in translation_report.report(report)
