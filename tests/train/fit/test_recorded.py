"""Resumes a run that commit 9c9f700 began; its adapter and its checkpoint can be loaded."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import compacter_jax as cj
from train.__main__ import main

RECORDED = Path(__file__).parents[2] / "recorded" / "run"
FLAGS = {
    "method": "compacter++",
    "reduction-factor": 2,
    "phm-dim": 2,
    "epochs": 3,
    "batch-size": 4,
    "max-length": 8,
    "seed": 0,
}


@pytest.fixture
def folder(tmp_path):
    """Copies the run, which stopped after the first of three epochs, with paths of this machine."""
    shutil.copytree(RECORDED, tmp_path / "recorded")
    record = tmp_path / "recorded" / "stopped" / "run.json"
    text = record.read_text().replace('"recorded/', f'"{tmp_path}/recorded/')
    record.write_text(text)
    return tmp_path / "recorded"


def losses_of(folder):
    with (folder / "log.csv").open() as file:
        return np.array([float(row["loss"]) for row in csv.DictReader(file)])


@pytest.mark.slow
def test_a_run_of_before_goes_on_to_the_same_end(folder):
    """The resumed run has the losses of the same run without an interruption."""
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    files = [f"--{split}-file={folder / split}.jsonl" for split in ("train", "validation")]
    places = [f"--backbone={folder / 'backbone'}", f"--output-dir={folder / 'stopped'}"]
    assert main(["fit", *flags, *files, *places, "--resume"]) == 0
    whole = json.loads((folder / "whole.json").read_text())
    np.testing.assert_allclose(losses_of(folder / "stopped"), whole["step_losses"], atol=2e-6)
    history = json.loads((folder / "stopped" / "metrics.json").read_text())["history"]
    found = [record["validation_loss"] for record in history]
    np.testing.assert_allclose(found, whole["history"], atol=2e-6)


def test_its_adapter_is_read(folder):
    backbone = cj.load_backbone(folder / "backbone", head="sequence_classification", num_labels=2)
    model, params = cj.load_adapter(folder / "stopped" / "adapter", backbone)
    assert cj.count(params, cj.label_params(params, model.method)).trained == 210
