"""Tests of the benchmark of directions of arrival: scores by hand, its report, and its flags."""

import json

import numpy as np
import pytest

from benchmarks import arrays as benchmark
from benchmarks import arrays_trials
from benchmarks.arrays_trials import METHODS, Case
from compacter_jax import arrays
from tests.pages import ROOT

FLAGS = ["--sensors", "12", "--snapshots", "8", "--snr", "10", "--separation", "8", "--trials", "3"]
FLAGS += ["--choosing-trials", "2", "--grid", "70,110,1", "--correlation", "0", "--chunk", "2"]


def test_scores_by_hand():
    """Both sources have to be found within half the separation; errors are of such trials alone."""
    angles = np.array([[88.0, 92.0]] * 4)
    found = np.array([[88.5, 92.0], [88.0, 90.0], [91.0, np.nan], [88.0, 93.9]])
    scored = arrays_trials.score(found, angles, 4.0)
    assert scored["resolved"] == 0.5
    assert scored["rmse"] == pytest.approx(np.sqrt((0.5**2 + 1.9**2) / 4))
    nothing = arrays_trials.score(found[2:3], angles[:1], 4.0)
    assert nothing["resolved"] == 0
    assert nothing["rmse"] is None


def test_trials_are_drawn_as_the_case_says():
    """Sources lie a separation apart near broadside, interferers outside; seeds differ."""
    case = Case(12, 8, 10.0, 8.0, 0.0, interferers=2, interferer_snr=40.0)
    angles, x = arrays_trials.draw(case, 5, 0)
    assert x.shape == (5, 8, 12)
    np.testing.assert_allclose(angles[:, 1] - angles[:, 0], 8)
    assert np.abs(angles[:, :2].mean(axis=1) - 90).max() <= 8
    assert (angles[:, 2:] < 60).all()
    # Two interferers of 40 dB have nearly all of the power.
    power = np.linalg.svd(np.array(x), compute_uv=False) ** 2
    assert (power[:, 2:].sum(axis=1) < 0.02 * power.sum(axis=1)).all()
    other, _ = arrays_trials.draw(case, 5, 1)
    assert np.abs(other[:, 0] - angles[:, 0]).min() > 1e-6
    quiet = Case(12, 8, 10.0, 8.0, 0.0)
    expected = [arrays.cramer_rao(pair, 12, 8, 10.0, 0.0) for pair in angles[:, :2]]
    np.testing.assert_allclose(
        arrays_trials.bound(quiet, angles), np.sqrt(np.mean(np.square(expected))), rtol=1e-3
    )


def test_settings_are_chosen_one_after_the_other(monkeypatch):
    """Windows come first, then forgetting and loading, and nothing is tried twice."""

    class Programs:
        def estimates(self, method, case, setting, x):
            wanted = {"window": 9, "forgetting": 0.95, "loading": 5.0}
            right = sum(setting[name] == value for name, value in wanted.items())
            return np.array([[0.0, 10.0]] * right + [[50.0, 50.0]] * (4 - right)), 0.0

    case = Case(12, 8, 10.0, 8.0, 0.0)
    drawn = np.array([[0.0, 10.0]] * 4), None
    chosen, tried = arrays_trials.choose(Programs(), "ALRD-RLS", case, [1.0, 5.0], drawn)
    assert chosen == {"window": 9, "rank": 4, "forgetting": 0.95, "loading": 5.0}
    assert len(tried) == 5
    assert max(each["resolved"] for each in tried) == 0.75


@pytest.mark.slow
def test_the_report(tmp_path, capsys):
    """Every method has a score; JSON, tables and figures are written, and a trial can be redone."""
    methods = "ALRD-RLS,MUSIC,ESPRIT"
    file = tmp_path / "arrays.json"
    folder = tmp_path / "figures"
    benchmark.main([*FLAGS, "--methods", methods, "--json", str(file), "--figures", str(folder)])
    report = json.loads(file.read_text())
    (case,) = report["cases"]
    assert list(case["methods"]) == methods.split(",")
    printed = capsys.readouterr().out
    for name, found in case["methods"].items():
        assert found["milliseconds"] > 0
        assert 0 <= found["resolved"] <= 1
        assert f"| {name} | {found['resolved']:.3f} | " in printed
        assert found["setting"] in [each["setting"] for each in found["tried"]]
    assert "\n".join(benchmark.table(report["cases"])) in printed
    assert case["methods"]["ESPRIT"]["resolved"] == 1
    assert {path.name for path in folder.iterdir()} == {
        "arrays_resolution.png",
        "arrays_spectra.png",
    }
    # The measured trials, one by one and without a program of the benchmark.
    shape = Case(12, 8, 10.0, 8.0, 0.0)
    angles, x = arrays_trials.draw(shape, 3, 0)
    window = case["methods"]["ESPRIT"]["setting"]["window"]
    found = np.stack([arrays.esprit(each, 2, window=window) for each in x])
    scored = arrays_trials.score(found, angles, 8.0)
    assert scored["rmse"] == pytest.approx(case["methods"]["ESPRIT"]["rmse"], rel=1e-3)


REFUSED = {
    "--sensors 40,x": "'40,x' should be whole numbers with commas between them",
    "--sensors 8": "--sensors 8 should be at least 12",
    "--trials 0": "0 should be at least 1",
    "--snr nan": "nan should be from -100 to 100",
    "--correlation 0,2": "2.0 should be from 0 to 1",
    "--methods MUSIC,RARE": "'RARE' should be one of ALRD-RLS, MARLD-RLS",
    "--grid 96,84,0.1": "--grid 96,84,0.1 should be FIRST,LAST,STEP",
    "--separation 5": "--grid 84,96,… should reach 7.5 degrees to both sides of 90",
    "--snapshots 4 --interferers 4": "--snapshots 4 is fewer than the 6 sources",
    "--json /no/such/folder/x.json": "there is no folder /no/such/folder",
    "--bogus 1": "unrecognized arguments: --bogus 1",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_do_not_fit(flags, capsys):
    """A wrong flag is one line on standard error, and exit code 2."""
    with pytest.raises(SystemExit) as ended:
        benchmark.main(flags.split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert REFUSED[flags] in line


@pytest.mark.parametrize("name", ["arrays_cpu.json", "arrays_large_cpu.json"])
def test_the_page_has_the_measured_table(name):
    """The documentation shows the recorded results, and calls the method what it is."""
    report = json.loads((ROOT / "benchmarks/results" / name).read_text(encoding="utf-8"))
    page = (ROOT / "docs/arrays.md").read_text(encoding="utf-8")
    assert "\n".join(benchmark.table(report["cases"])) in page
    assert all(case["trials"] == 200 for case in report["cases"])
    assert report["settings"]["methods"] == list(METHODS)
    assert "after the abstract of Qiu, Cai, de Lamare and Zhao" in " ".join(page.split())
    assert "reproduced" not in page.replace("not reproduced", "")
