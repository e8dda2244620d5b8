"""Runs the commands on a ModernBERT: fit, evaluate, predict, merge, params and plan."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

import compacter_jax as cj
from compacter_jax.models.modernbert.checkpoint import modernbert_to_hugging_face
from tests.modernbert_models import modeling, small_backbone, tiny, torch_config
from tests.train.cli.test_cli import fit_flags, refusal, write_splits
from tests.train.inference.test_tagging_commands import sentences, write
from train.__main__ import main


@pytest.fixture(scope="module")
def folder(tiny_backbone, tmp_path_factory):
    """Returns the folder of a random ModernBERT as it comes from masked words."""
    folder = tmp_path_factory.mktemp("backbone") / "modernbert"
    shutil.copytree(tiny_backbone, folder)
    words = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    config = tiny(vocab_size=words, hidden_size=24, max_position_embeddings=64, pad_token_id=0)
    backbone = small_backbone(config, "masked_lm")
    settings = torch_config(backbone.module).to_dict()
    settings |= {"architectures": ["ModernBertForMaskedLM"], "classifier_pooling": "mean"}
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    safetensors.numpy.save_file(
        modernbert_to_hugging_face(backbone.params),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    sizes = {"train": 120, "validation": 44, "test": 43}
    return write_splits(tmp_path_factory.mktemp("files"), sizes)


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def test_a_classifier_is_trained_evaluated_predicted_with_and_merged(folder, files, tmp_path):
    """The commands agree on the test split, and PyTorch on the merged backbone."""
    output = tmp_path / "run"
    flags = fit_flags(folder, files, output, epochs=3, method="lora")
    run("fit", *[flag for flag in flags if flag not in ("--reduction-factor", "2")])
    result = json.loads((output / "metrics.json").read_text("utf-8"))
    assert result["test"]["accuracy"] > 0.7
    adapter = output / "adapter"
    run("evaluate", "--adapter", adapter, "--test-file", files["test"], "--output", tmp_path / "j")
    again = json.loads((tmp_path / "j").read_text("utf-8"))
    assert again["metrics"]["accuracy"] == pytest.approx(result["test"]["accuracy"])
    run("predict", "--adapter", adapter, "--input", files["test"], "--output", tmp_path / "p.csv")
    run("merge", "--adapter", adapter, "--to", tmp_path / "merged")
    merged = cj.load_backbone(tmp_path / "merged")
    assert merged.module.head == "sequence_classification"
    assert merged.module.config.classifier_pooling == "mean"
    torch = pytest.importorskip("torch")
    model = modeling().ModernBertForSequenceClassification.from_pretrained(tmp_path / "merged")
    ids = np.random.default_rng(0).integers(5, 20, (2, 9))
    expected = model.eval()(input_ids=torch.tensor(ids)).logits.detach().numpy()
    logits = merged.module.apply({"params": merged.params}, ids)
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=0)


def test_a_tagger_is_trained_and_evaluated(folder, tmp_path):
    """Words with tags are learned, and `evaluate` repeats the score of `fit`."""
    files = {
        split: write(tmp_path / f"{split}.jsonl", sentences(rows, seed))
        for seed, (split, rows) in enumerate({"train": 80, "validation": 20, "test": 30}.items())
    }
    output = tmp_path / "run"
    run("fit", *fit_flags(folder, files, output, epochs=6))
    result = json.loads((output / "metrics.json").read_text("utf-8"))
    assert result["test"]["f1"] > 0.5
    adapter = output / "adapter"
    run("evaluate", "--adapter", adapter, "--test-file", files["test"], "--output", tmp_path / "j")
    again = json.loads((tmp_path / "j").read_text("utf-8"))
    assert again["metrics"]["f1"] == pytest.approx(result["test"]["f1"])


def test_params_and_plan_know_the_published_sizes(capsys):
    """Both need no weights; the counts are those of LoRA on queries and values."""
    name = "answerdotai/ModernBERT-base"
    run("params", "--backbone-config", name, "--method", "lora", "--num-labels", "2")
    trained = 22 * 2 * 8 * (768 + 768) + 2 * 768 + 2
    assert f"{trained:,}" in capsys.readouterr().out
    run("plan", "--backbone", name, "--method", "lora", "--task", "mrpc", "--max-length", "128")
    assert f"trained {trained:,} of {149_606_402 + trained - 1538:,}" in capsys.readouterr().out


def test_a_pooling_is_chosen_on_the_command_line(folder, capsys):
    """`--pooling` replaces the configuration's; a word that is no pooling is an error."""
    run("params", "--backbone", folder, "--method", "lora", "--pooling", "cls")
    assert "trained" in capsys.readouterr().out
    assert "--pooling" in refusal(capsys, "params", "--backbone", folder, "--pooling", "max")
