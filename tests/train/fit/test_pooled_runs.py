"""Tests pooling on the command line: fit, evaluate, predict, grids and banks; and short runs."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest

import compacter_jax as cj
from tests.train.cli.test_cli import BAD, GOOD, fit_flags, refusal, write_splits
from train.__main__ import main
from train.data import tokens

# Without dropout, whose masks differ between one device and several.
SHORT = {"epochs": 1, "learning-rate": "1e-2", "backbone-dropout": 0.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    sizes = {"train": 64, "validation": 24, "test": 24}
    return write_splits(tmp_path_factory.mktemp("files"), sizes)


@pytest.fixture(scope="module")
def mean_backbone(tiny_backbone, tmp_path_factory):
    """Copies the tiny backbone into a folder of sentence-transformers that uses mean pooling."""
    folder = tmp_path_factory.mktemp("mean") / "backbone"
    shutil.copytree(tiny_backbone, folder)
    (folder / "1_Pooling").mkdir()
    settings = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def runs(mean_backbone, files, tmp_path_factory):
    """Trains two seeds together, with the pooling that the folder of the backbone states."""
    folder = tmp_path_factory.mktemp("runs")
    flags = fit_flags(mean_backbone, files, folder / "both", **SHORT, seeds="0,1")
    assert main(["fit", *flags]) == 0
    return folder / "both"


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def sentences(count, seed=0):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(GOOD + BAD, generator.integers(1, 9))) for _ in range(count)]


def numpy_logits(backbone_folder, adapter_folder, texts):
    """Computes the mean over the tokens of each text alone, without a mask, then the classifier."""
    backbone = cj.load_backbone(
        backbone_folder, head="sequence_classification", num_labels=2, pooling="mean"
    )
    model, params = cj.load_adapter(adapter_folder, backbone)
    plain = cj.load_backbone(backbone_folder, head=None)
    states_model = cj.Adapted(plain.module, model.method)
    own = {name: leaf for name, leaf in params.items() if name != "classifier"}
    own["pooler"] = plain.params["pooler"]  # the pooler is not read
    tokenizer = tokens.load_tokenizer(
        str(backbone_folder), vocab_size=23, max_position_embeddings=64, max_length=16
    )
    head = {name: np.asarray(leaf, np.float64) for name, leaf in params["classifier"].items()}
    logits = []
    for text in texts:
        ids = np.array([tokenizer(text)["input_ids"]])
        states = states_model.apply({"params": own}, ids).last_hidden_state
        logits.append(np.asarray(states, np.float64)[0].mean(0) @ head["kernel"] + head["bias"])
    return np.stack(logits)


def test_a_grid_reads_the_mean_as_the_folder_says(runs, mean_backbone, tmp_path):
    """A run of a grid predicts what NumPy computes from the means of each text alone."""
    texts, source = sentences(11), tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in texts))
    adapter = runs / "seed-1/adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["pooling"] == "mean"
    output = tmp_path / "out.jsonl"
    flags = ["--adapter", adapter, "--input", source, "--output", output, "--logits"]
    assert main(["predict", *map(str, flags)]) == 0
    found = [json.loads(line)["logits"] for line in output.read_text().splitlines()]
    np.testing.assert_allclose(found, numpy_logits(mean_backbone, adapter, texts), atol=1e-4)


def test_a_grid_gives_what_a_run_gives_alone(runs, mean_backbone, files, tmp_path):
    flags = fit_flags(mean_backbone, files, tmp_path / "run", **SHORT, seed=1, pooling="mean")
    assert main(["fit", *flags]) == 0
    alone, at_once = (
        np.array([float(row["loss"]) for row in rows_of(folder / "log.csv")])
        for folder in (tmp_path / "run", runs / "seed-1")
    )
    np.testing.assert_allclose(at_once, alone, atol=1e-5)


def test_evaluate_reads_as_the_adapter_says(runs, files, capsys):
    """`evaluate` uses the pooling of the adapter, not the default of the folder."""
    result = json.loads((runs / "seed-0/metrics.json").read_text())
    flags = ["--adapter", runs / "seed-0", "--test-file", files["test"]]
    assert main(["evaluate", *map(str, flags)]) == 0
    capsys.readouterr()
    (path,) = (runs / "seed-0/adapter").glob("evaluation_*.json")
    assert json.loads(path.read_text())["metrics"] == pytest.approx(result["test"], abs=1e-6)


def test_a_bank_of_one_pooling(runs, mean_backbone, files, tmp_path, capsys):
    texts, source = sentences(6, seed=3), tmp_path / "in.jsonl"
    names = ["seed-0", "seed-1"] * 3
    lines = [
        json.dumps({"sentence": text, "adapter": name})
        for text, name in zip(texts, names, strict=True)
    ]
    source.write_text("\n".join(lines) + "\n")
    output = tmp_path / "out.jsonl"
    flags = ["predict", "--adapter", runs, "--input", source, "--output", output, "--logits"]
    assert main(list(map(str, flags))) == 0
    found = [json.loads(line)["logits"] for line in output.read_text().splitlines()]
    wanted = {name: numpy_logits(mean_backbone, runs / name / "adapter", texts) for name in names}
    expected = [wanted[name][row] for row, name in enumerate(names)]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    other = tmp_path / "adapters"
    shutil.copytree(runs / "seed-0", other / "seed-0")
    flags = fit_flags(mean_backbone, files, other / "seed-1", **SHORT, pooling="first")
    assert main(["fit", *flags]) == 0
    capsys.readouterr()
    told = refusal(
        capsys, "predict", "--adapter", other, "--input", source, "--output", tmp_path / "x.jsonl"
    )
    assert "must share their pooling: seed-0 has 'mean', but seed-1 has 'first'" in told


def test_adapters_of_before_are_read_as_before(mean_backbone, tiny_backbone, files, tmp_path):
    """An adapter without pooling in its file is read as before, even if the folder says mean."""
    flags = fit_flags(tiny_backbone, files, tmp_path / "run", **SHORT)
    assert main(["fit", *flags]) == 0
    result = json.loads((tmp_path / "run/metrics.json").read_text())
    path = tmp_path / "run/adapter/adapter_config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("pooling") == "first"
    path.write_text(json.dumps(settings))
    flags = ["--adapter", tmp_path / "run", "--backbone", mean_backbone]
    flags += ["--test-file", files["test"], "--output", tmp_path / "scores.json"]
    assert main(["evaluate", *map(str, flags)]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["metrics"]
    assert scores == pytest.approx(result["test"], abs=1e-6)


@pytest.mark.parametrize("method", ["full", "compacter++"])
def test_methods_that_train_the_pooler_do_without(mean_backbone, files, tmp_path, capsys, method):
    flags = fit_flags(mean_backbone, files, tmp_path / "run", **SHORT, method=method)
    if method == "full":
        at = flags.index("--reduction-factor")
        flags = flags[:at] + flags[at + 2 :]
    assert main(["fit", *flags, "--train-pooler", "True"]) == 0
    said = capsys.readouterr().out
    assert "the classifier reads the mean of the tokens, without a pooler (--pooling mean)" in said
    assert not [line for line in said.splitlines() if line.startswith("pooler ")]


def test_backbones_that_do_not_pool(tiny_t5, files, tmp_path, capsys):
    flags = ["--backbone", tiny_t5, "--train-file", files["train"], "--pooling", "mean"]
    told = refusal(capsys, "fit", *flags, "--output-dir", tmp_path / "run")
    assert "pooling='mean' was given, but head='conditional_generation' of a 't5' does not" in told
    assert not (tmp_path / "run").exists()


def test_params_and_plan_count_no_pooler(mean_backbone, capsys):
    pooler = 24 * 24 + 24
    totals = {}
    for pooling in (None, "first", "mean", "cls"):
        given = [] if pooling is None else ["--pooling", pooling]
        flags = ["--backbone", str(mean_backbone), "--reduction-factor", "2", *given, "--json"]
        assert main(["params", *flags]) == 0
        counted = json.loads(capsys.readouterr().out)["total"]
        assert main(["plan", "--task", "movie", "--max-length", "16", *flags]) == 0
        (planned,) = json.loads(capsys.readouterr().out)
        assert planned["cost"]["total"] == counted
        totals[pooling] = counted
    assert totals[None] == totals["mean"] == totals["cls"] == totals["first"] - pooler


def test_a_run_that_is_too_short_is_told_once(tiny_backbone, files, tmp_path, capsys):
    flags = {"learning-rate": "1e-4", "max-steps": 2, "epochs": 1}
    given = fit_flags(tiny_backbone, files, tmp_path / "grid", **flags, seeds="0,1")
    assert main(["fit", *given]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "compacter++-short" in line]
    assert len(said) == 1
    assert "the learning rates of all steps sum to" in said[0]
    flags |= {"method": "compacter++-short"}
    assert main(["fit", *fit_flags(tiny_backbone, files, tmp_path / "other", **flags)]) == 0
    assert "sum to" not in capsys.readouterr().out
    flags = {"epochs": 1, "learning-rate": "3e-2"}
    assert main(["fit", *fit_flags(tiny_backbone, files, tmp_path / "longer", **flags)]) == 0
    assert "sum to" not in capsys.readouterr().out


def test_the_start_of_a_run_is_the_backbone(tiny_backbone, tmp_path):
    """With `compacter++-short` and the mean, a run starts as the backbone, bit for bit."""
    backbone = cj.load_backbone(
        tiny_backbone, head="sequence_classification", num_labels=2, pooling="mean"
    )
    model = cj.Adapted(backbone.module, cj.preset("compacter++-short", reduction_factor=3))
    params = cj.init_adapters(model, backbone, jax.random.key(0))
    ids, mask = np.array([[2, 7, 9, 3, 0]]), np.array([[1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(
        model.apply({"params": params}, ids, mask),
        backbone.module.apply({"params": backbone.params}, ids, mask),
    )
