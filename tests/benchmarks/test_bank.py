"""Runs the benchmark of banks of adapters at small size and checks the counts in its report."""

import json

import jax
import pytest

import compacter_jax as cj
from benchmarks.bank import main


@pytest.mark.slow
def test_bytes_and_rates(tiny_backbone, tmp_path, capsys):
    flags = ["--backbone", tiny_backbone, "--method", "lora", "--members", 7, "--rows", 4]
    flags += ["--length", 8, "--runs", 2, "--batch-sizes", 8, "--rounds", 2, "--max-length", 32]
    main([str(flag) for flag in [*flags, "--json", tmp_path / "bank.json"]])
    report = json.loads((tmp_path / "bank.json").read_text())
    backbone = cj.load_backbone(tiny_backbone, head="sequence_classification", num_labels=2)
    model = cj.Adapted(backbone.module, cj.preset("lora"))
    params = cj.init_adapters(model, backbone, jax.random.key(0))
    trained = cj.count(params, cj.label_params(params, model.method)).trained
    assert report["bank"]["bytes"] == report["bank"]["bytes_predicted"] == 7 * (4 * trained + 1)
    (row,) = report["runs_at_once"]
    rates = row["examples_per_second"]
    assert row["batch_size"] == 8
    assert min(rates["at_once"]["lowest"], rates["one_after_another"]["lowest"]) > 0
    # Two runs are padded to the longer of two batches.
    assert 1 <= row["padded_tokens"] <= 2
    printed = capsys.readouterr().out
    assert "rows routed over 7 " in printed
    assert "2 runs of batch 8: " in printed
