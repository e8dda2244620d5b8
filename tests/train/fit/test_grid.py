"""Runs that are trained together give the same results as alone."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import QUICK
from safetensors.numpy import load_file

from tests.helpers import weights_of
from tests.train.cli.test_cli import ROOT, fit_flags, refusal, write_splits
from train.__main__ import main
from train.data import tokens
from train.fit import grid
from train.fit.options import FitOptions
from train.fit.run_folder import check_run_folder

DROPOUT = {"backbone-dropout": 0.1, "dropout": 0.1}  # of the backbone and of the adapters
# Two lengths: batches of several runs are padded to the longest.
LENGTHS = {"max-length": 20}
GRID = {"seeds": "0,1", "train-sizes": "60,120", **LENGTHS}
ONE_AFTER_ANOTHER = """
import json, sys
from train.__main__ import main
sys.exit(max(main(["fit", *flags]) for flags in json.load(sys.stdin)))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_splits(
        tmp_path_factory.mktemp("files"), {"train": 120, "validation": 44, "test": 43}
    )


def run_alone(runs):
    """Trains runs on one device, as a grid does, since dropout masks differ between devices."""
    one_device = {"XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **one_device}
    process = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER],
        input=json.dumps(runs),
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr


def losses_of(folder):
    with (folder / "log.csv").open() as file:
        return np.array([float(row["loss"]) for row in csv.DictReader(file)])


def check_equal(folder, alone):
    """Checks the losses of every step, the metrics of every evaluation, and the final adapter."""
    found, wanted = losses_of(folder), losses_of(alone)
    assert len(found) == len(wanted)
    np.testing.assert_allclose(found[:50], wanted[:50], atol=1e-5)
    found, wanted = (json.loads((f / "metrics.json").read_text()) for f in (folder, alone))
    for result in (found, wanted):
        del result["measured"]
        for record in result["history"]:
            del record["examples_per_second"], record["step_losses"]
    numbers = {name: pytest.approx(value, abs=1e-4) for name, value in wanted["test"].items()}
    assert found["test"] == numbers
    assert found["best_epoch"] == wanted["best_epoch"]
    assert found["learning_rate"] == wanted["learning_rate"]
    for one, other in zip(found["history"], wanted["history"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    tensors = [load_file(weights_of(f / "adapter")) for f in (folder, alone)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        np.testing.assert_allclose(tensor, tensors[1][name], atol=1e-4, err_msg=name)


def grid_flags(backbone, files, output, **flags):
    given = fit_flags(backbone, files, output, **{"epochs": 4, **DROPOUT, **flags})
    unused = {"learning-rate": "learning-rates" in flags, "reduction-factor": "method" in flags}
    for name in (name for name, is_unused in unused.items() if is_unused):
        del given[(at := given.index(f"--{name}")) : at + 2]
    return given


@pytest.fixture(scope="module")
def trained(tiny_backbone, files, tmp_path_factory):
    """Returns the folder of a grid of two seeds and two training sizes, on four devices."""
    output = tmp_path_factory.mktemp("grid") / "run"
    flags = grid_flags(tiny_backbone, files, output, **GRID)
    assert main(["fit", *flags]) == 0
    return output


def test_each_run_is_what_it_is_alone(trained, tiny_backbone, files, tmp_path):
    points = [(seed, size) for seed in (0, 1) for size in (60, 120)]
    runs = [
        grid_flags(
            tiny_backbone,
            files,
            tmp_path / f"{seed}-{size}",
            **{"seed": seed, "train-size": size, **LENGTHS},
        )
        for seed, size in points
    ]
    run_alone(runs)
    for seed, size in points:
        check_equal(trained / f"seed-{seed}_train-size-{size}", tmp_path / f"{seed}-{size}")
    assert len(losses_of(trained / "seed-0_train-size-60")) == 32
    assert len(losses_of(trained / "seed-0_train-size-120")) == 60


@pytest.mark.slow
def test_five_runs_of_lora_on_one_device(tiny_backbone, files, tmp_path):
    """Five runs cannot be divided over four devices."""
    flags = {"epochs": 1, "method": "lora", "train-size": 60}
    seeds = {"seeds": "0,1,2,3,4"}
    given = grid_flags(tiny_backbone, files, tmp_path / "grid", **flags, **seeds)
    assert main(["fit", *given]) == 0
    alone = {seed: tmp_path / f"alone-{seed}" for seed in (1, 4)}
    run_alone(
        [
            grid_flags(tiny_backbone, files, folder, **flags, seed=seed)
            for seed, folder in alone.items()
        ]
    )
    for seed, folder in alone.items():
        check_equal(tmp_path / "grid" / f"seed-{seed}", folder)


def test_mean_and_spread_are_over_seeds(trained):
    result = json.loads((trained / "metrics.json").read_text())
    assert list(result["runs"]) == [
        f"seed-{seed}_train-size-{size}" for seed in (0, 1) for size in (60, 120)
    ]
    for row, size in zip(result["summary"], (60, 120), strict=True):
        assert row["train_examples"] == size
        assert row["learning_rate"] == 3e-2
        each = [
            json.loads((trained / name / "metrics.json").read_text())["test"]["accuracy"]
            for name in row["runs"]
        ]
        assert row["test"]["accuracy"]["mean"] == pytest.approx(np.mean(each))
        deviation = row["test"]["accuracy"]["standard_deviation"]
        assert deviation == pytest.approx(np.std(each, ddof=1))
    report = (trained / "report.md").read_text()
    assert "[seed-1_train-size-60](seed-1_train-size-60/report.md)" in report


def test_a_t5_with_frozen_rules_of_its_own_and_two_learning_rates(tiny_t5, files, tmp_path):
    """The rule is frozen and differs between seeds; targets differ in length."""
    flags = {"epochs": 1, "max-length": 16, "learn-phm": "False", "train-size": 60}
    given = grid_flags(
        tiny_t5,
        files,
        tmp_path / "grid",
        **{**flags, "seeds": "0,3", "learning-rates": "1e-2,3e-2"},
    )
    assert main(["fit", *given]) == 0
    run_alone(
        [
            grid_flags(
                tiny_t5,
                files,
                tmp_path / f"alone-{seed}",
                **{**flags, "seed": seed, "learning-rate": rate},
            )
            for seed, rate in ((0, 3e-2), (3, 1e-2))
        ]
    )
    check_equal(tmp_path / "grid" / "seed-0_learning-rate-0.03", tmp_path / "alone-0")
    check_equal(tmp_path / "grid" / "seed-3_learning-rate-0.01", tmp_path / "alone-3")


def test_a_terminated_grid_goes_on_to_the_same_end(
    trained, tiny_backbone, files, tmp_path, monkeypatch
):
    step, calls = grid.StackedRuns.step, []

    def terminated_at_the_tenth(joint, batches):
        calls.append(batches)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(joint, batches)

    flags = grid_flags(tiny_backbone, files, tmp_path / "run", **GRID)
    with monkeypatch.context() as patch:
        patch.setattr(grid.StackedRuns, "step", terminated_at_the_tenth)
        assert main(["fit", *flags]) == 0  # terminated on request
    assert len(calls) == 10
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert main(["fit", *flags, "--resume"]) == 0
    for name in ("seed-0_train-size-60", "seed-1_train-size-120"):
        wanted = load_file(weights_of(trained / name / "adapter"))
        found = load_file(weights_of(tmp_path / "run" / name / "adapter"))
        for path, tensor in wanted.items():
            np.testing.assert_array_equal(found[path], tensor, err_msg=path)
        np.testing.assert_array_equal(losses_of(tmp_path / "run" / name), losses_of(trained / name))


def test_a_run_that_diverges_leaves_the_others_alone(tiny_backbone, files, tmp_path, capsys):
    flags = {"epochs": 1, "clip-norm": 0, "learning-rates": "0.01,1e38"}
    given = grid_flags(tiny_backbone, files, tmp_path / "run", **flags)
    assert main(["fit", *given]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: 1 of 2 runs failed: learning-rate-1e+38: step ")
    assert (tmp_path / "run" / "learning-rate-0.01" / "metrics.json").exists()
    assert not (tmp_path / "run" / "learning-rate-1e+38" / "metrics.json").exists()
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert list(result["runs"]) == ["learning-rate-0.01"]
    assert list(result["failed"]) == ["learning-rate-1e+38"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seeds": "0,a"}, "--seeds '0,a' must be numbers with commas between them"),
        ({"seeds": ""}, "--seeds '' must be numbers with commas between them"),
        ({"seeds": "1,1"}, "--seeds '1,1' has a number twice"),
        ({"seeds": "1,2", "seed": 3}, "--seed and --seeds contradict each other"),
        ({"seeds": "-1,2"}, "seed=-1 must be from 0 to"),
        ({"train-sizes": "0,2"}, "train_size=0 must be at least 1"),
        ({"seeds": "1,2", "mesh": "data=1"}, "--mesh works with one run, not with --seed"),
    ],
)
def test_bad_flags(flags, message, tiny_backbone, files, tmp_path, capsys):
    flags = grid_flags(tiny_backbone, files, tmp_path / "run", **flags)
    assert message in refusal(capsys, "fit", *flags)
    assert not (tmp_path / "run").exists()


def test_the_runs_of_a_grid_are_all_combinations(tmp_path):
    options = FitOptions(
        backbone="b", task="movie", output_dir=tmp_path, seeds="0,2", learning_rates="1e-3,0.01"
    )
    runs = grid.runs_of(options)
    assert {name: (run.seed, run.learning_rate) for name, run in runs.items()} == {
        "seed-0_learning-rate-0.001": (0, 1e-3),
        "seed-0_learning-rate-0.01": (0, 0.01),
        "seed-2_learning-rate-0.001": (2, 1e-3),
        "seed-2_learning-rate-0.01": (2, 0.01),
    }
    assert all(run.output_dir == tmp_path / name for name, run in runs.items())
    assert not any(run.is_grid for run in runs.values())


def test_runs_with_long_numbers_have_folders_of_their_own(tmp_path):
    options = FitOptions(backbone="b", task="movie", output_dir=tmp_path, seeds="1234567,1234568")
    assert list(grid.runs_of(options)) == ["seed-1234567", "seed-1234568"]


def test_a_single_run_is_not_overwritten(trained, tiny_backbone, files, capsys):
    flags = grid_flags(tiny_backbone, files, trained / "seed-0_train-size-60", seeds="0,1")
    assert "holds a single run" in refusal(capsys, "fit", *flags)


def test_several_runs_are_not_overwritten(trained, tiny_backbone, files, tmp_path, capsys):
    """A single run replaces several runs only with --overwrite."""
    results = {name: (trained / name).read_bytes() for name in ("metrics.json", "report.md")}
    message = "holds the metrics.json of several runs"
    flags = grid_flags(tiny_backbone, files, trained)
    for more in ([], ["--resume"]):
        assert message in refusal(capsys, "fit", *flags, *more)
    assert results == {name: (trained / name).read_bytes() for name in results}
    options = FitOptions(backbone="b", task="movie", output_dir=tmp_path, overwrite=True)
    kept = {"runs": {}, "summary": [], "failed": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(kept))
    check_run_folder(options)
    with pytest.raises(ValueError, match=message):
        check_run_folder(dataclasses.replace(options, overwrite=False))
    (tmp_path / "metrics.json").write_text("{}")  # somebody else's file
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        check_run_folder(options)


def test_batches_are_padded_to_the_longest():
    def batch(length, targets):
        return {
            "input_ids": np.full((2, length), 7, np.int32),
            "labels": np.full((2, targets), 5, np.int32),
            "weights": np.ones(2, np.float32),
        }

    padded = grid.padded([batch(3, 2), batch(2, 4)])
    np.testing.assert_array_equal(padded["input_ids"][1], [[7, 7, 0]] * 2)
    np.testing.assert_array_equal(padded["labels"][0], [[5, 5, tokens.IGNORED, tokens.IGNORED]] * 2)
    assert padded["weights"].shape == (2, 2)
