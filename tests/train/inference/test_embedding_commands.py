"""Tests the commands on sentence embeddings: evaluate, predict and merge repeat what fit scores."""

import csv
import json

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

import compacter_jax as cj
from tests.conftest import WORDS
from tests.train.cli.test_cli import fit_flags, refusal
from tests.train.inference.test_tagging_commands import refused, rows_of
from train.__main__ import main
from train.compare import plan, single_run
from train.compare.options import CompareOptions
from train.data import tokens

PAIRS, TRIPLETS = ("anchor", "positive"), ("anchor", "positive", "negative")
SCORED = ("sentence1", "sentence2", "score")
# Words that mean the same to the task, but not to a random backbone.
ALIKE = dict(zip(WORDS[:9], WORDS[9:], strict=True))


def texts(rows, seed, *, scored=False, negative=False):
    """Returns rows whose second text has, word by word, the counterparts of the first."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        words = generator.choice(list(ALIKE), generator.integers(2, 6)).tolist()
        other = generator.choice(list(ALIKE.values()), 4).tolist()
        positive = [ALIKE[word] for word in words]
        kept = int(generator.integers(0, len(words) + 1))
        if scored:
            mixed = positive[:kept] + other[: len(words) - kept]
            made.append([" ".join(words), " ".join(mixed), kept / len(words)])
        else:
            rest = [" ".join(other)] if negative else []
            made.append([" ".join(words), " ".join(positive), *rest])
    return made


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="module")
def sentence_backbone(tiny_backbone, tmp_path_factory):
    """Returns the tiny BERT as a folder of sentence-transformers, with embeddings of norm 1."""
    folder = tmp_path_factory.mktemp("sentences") / "backbone"
    folder.mkdir()
    for path in tiny_backbone.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    cj.write_sentence_embedding(folder, cj.SentenceEmbedding("mean", True), 24, 16)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    made = {
        split: write(folder / f"{split}.csv", PAIRS, texts(rows, seed))
        for seed, (split, rows) in enumerate({"train": 90, "validation": 20, "test": 20}.items())
    }
    sentences = [[row[0]] for row in texts(21, 5)]
    return made | {"texts": write(folder / "texts.csv", ("sentence",), sentences)}


def splits(files):
    return {split: files[split] for split in ("train", "validation", "test")}


def flags_of(folder, paths, output, **flags):
    """Returns the flags of `fit_flags` without that of a bottleneck."""
    found = fit_flags(folder, paths, output, **flags)
    place = found.index("--reduction-factor")
    return found[:place] + found[place + 2 :]


@pytest.fixture(scope="module")
def fitted(sentence_backbone, files, tmp_path_factory):
    """Returns a folder with two adapters of pairs that differ in their seeds."""
    folder = tmp_path_factory.mktemp("embedders")
    for seed, epochs in ((0, 4), (1, 1)):
        flags = flags_of(sentence_backbone, splits(files), folder / f"lora-{seed}", epochs=epochs)
        more = ["--matryoshka-dimensions", "24", "8", "--seed", str(seed)]
        assert main(["fit", *flags, "--method", "lora", *more]) == 0
    return folder


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def test_fit_learns_pairs_and_evaluate_repeats_its_metrics(fitted, files, tmp_path, capsys):
    result = json.loads((fitted / "lora-0" / "metrics.json").read_text())
    assert (result["kind"], result["metric"]) == ("embedding", "mrr")
    assert result["objective"]["embedding"] == {
        "pooling": "mean",
        "normalize": True,
        "lower_case": False,
        "loss": "multiple-negatives",
        "scale": 20.0,
        "margin": 5.0,
        "dimensions": [24, 8],
    }
    names = ["accuracy_at_1", "mrr", "8/accuracy_at_1", "8/mrr", "loss"]
    assert list(result["test"]) == names
    first, *_, last = result["history"]
    assert last["train_loss"] < 0.9 * first["train_loss"]
    assert "predict --adapter" in (fitted / "lora-0" / "report.md").read_text()
    output = tmp_path / "metrics.json"
    adapter = ("--adapter", fitted / "lora-0")
    given = f"pairs={files['test']},valid={files['validation']}"
    run("evaluate", *adapter, "--test-files", given, "--output", output)
    found = json.loads(output.read_text())["files"]
    assert found["pairs"]["metrics"] == pytest.approx(result["test"], abs=1e-5)
    assert found["valid"]["metrics"] == pytest.approx(result["validation"], abs=1e-5)
    scored = write(tmp_path / "scored.csv", SCORED, texts(15, 7, scored=True))
    run("evaluate", *adapter, "--test-file", scored, "--output", output)
    names = ["spearman", "pearson", "8/spearman", "8/pearson", "loss"]
    assert list(json.loads(output.read_text())["metrics"]) == names
    triplets = write(tmp_path / "triplets.csv", TRIPLETS, texts(15, 6, negative=True))
    run("evaluate", *adapter, "--test-file", triplets, "--output", output)
    assert 0 < json.loads(output.read_text())["metrics"]["8/triplet_accuracy"] <= 1
    said = capsys.readouterr().out
    assert (
        "an embedding is the mean of the tokens, of norm 1; trained by the loss multiple-n" in said
    )


def test_predict_writes_the_embeddings_that_merge_gives_to_others(
    fitted, files, tmp_path, sentence_backbone
):
    adapter = ("--adapter", fitted / "lora-0")
    array, table, merged = tmp_path / "e.npy", tmp_path / "e.parquet", tmp_path / "merged"
    run("predict", *adapter, "--input", files["texts"], "--output", array)
    found = np.load(array)
    assert (found.shape, found.dtype) == ((21, 24), np.float32)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    run("predict", *adapter, "--input", files["texts"], "--output", table)
    np.testing.assert_array_equal(np.array(pq.read_table(table)["prediction"].to_pylist()), found)
    # The cosines of pairs.
    scored = write(tmp_path / "scored.csv", SCORED, texts(6, 8, scored=True))
    run("predict", *adapter, "--input", scored, "--output", tmp_path / "c.jsonl")
    rows = rows_of(tmp_path / "c.jsonl")
    alone = write(
        tmp_path / "alone.csv",
        ("sentence",),
        [[row[name]] for row in rows for name in SCORED[:2]],
    )
    run("predict", *adapter, "--input", alone, "--output", array)
    both = np.load(array).reshape(6, 2, 24)
    cosines = [row["prediction"] for row in rows]
    np.testing.assert_allclose(cosines, (both[:, 0] * both[:, 1]).sum(-1), atol=1e-6)
    # A folder of sentence-transformers, which this library reads as another would.
    run("merge", *adapter, "--to", merged)
    embedding = cj.read_sentence_embedding(merged)
    assert embedding == cj.read_sentence_embedding(sentence_backbone)
    settings = json.loads((merged / "sentence_bert_config.json").read_text())
    assert settings["max_seq_length"] == 16
    backbone = cj.load_backbone(merged)
    assert backbone.module.head is None
    tokenizer = tokens.load_tokenizer(
        merged, vocab_size=100, max_position_embeddings=64, max_length=16
    )
    with files["texts"].open() as file:
        given = [row["sentence"] for row in csv.DictReader(file)]
    encoded = tokenizer(given, padding="max_length", max_length=16, return_tensors="np")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    states = backbone.module.apply({"params": backbone.params}, ids, mask).last_hidden_state
    np.testing.assert_allclose(embedding(states, mask), found, atol=2e-6)


def test_a_bank_embeds_as_each_adapter_alone(fitted, files, tmp_path):
    with files["texts"].open() as file:
        rows = [{"adapter": f"lora-{i % 2}", **row} for i, row in enumerate(csv.DictReader(file))]
    source, output = tmp_path / "mixed.csv", tmp_path / "out.jsonl"
    write(source, tuple(rows[0]), [list(row.values()) for row in rows])
    run("predict", "--adapter", fitted, "--input", source, "--output", output)
    mixed = [row["prediction"] for row in rows_of(output)]
    for number in (0, 1):
        run(
            "predict", "--adapter", fitted / f"lora-{number}", "--input", source, "--output", output
        )
        alone = [row["prediction"] for row in rows_of(output)]
        np.testing.assert_allclose(mixed[number::2], alone[number::2], atol=1e-6)


def test_fit_learns_scores_and_writes_what_they_are_compared_with(sentence_backbone, tmp_path):
    paths = {
        split: write(tmp_path / f"{split}.csv", SCORED, texts(rows, seed, scored=True))
        for seed, (split, rows) in enumerate({"train": 90, "validation": 20, "test": 20}.items())
    }
    rates = {"epochs": 6, "learning-rate": 3e-3}
    flags = flags_of(sentence_backbone, paths, tmp_path / "run", **rates)
    assert main(["fit", *flags, "--method", "full"]) == 0
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result["objective"]["embedding"]["loss"] == "cosine"
    assert result["history"][-1]["train_loss"] < 0.8 * result["history"][0]["train_loss"]
    assert result["metric"] == "spearman"
    assert result["validation"]["spearman"] > 0.5
    run_of = single_run.Run("custom", None, "full", 0, tmp_path / "run", ())
    predictions, targets = run_of.predictions()
    assert len(predictions) == len(targets) == 20
    found = stats.spearmanr(predictions, targets)[0]
    assert found == pytest.approx(result["test"]["spearman"], abs=1e-6)


def test_compare_trains_no_pooler_and_no_method_without_parameters(tiny_backbone, files, tmp_path):
    options = CompareOptions(
        backbone=str(tiny_backbone),
        task="pairs",
        output_dir=tmp_path / "out",
        methods="all",
        seeds="1",
        **{f"{split}_file": path for split, path in splits(files).items()},
    )
    points = plan.points([options])
    assert "head-only" not in [point.method for point in points]
    assert all("--train-pooler" not in point.run(0, None).flags for point in points)


def test_bad_input_gives_one_line(tiny_backbone, fitted, files, tmp_path, capsys, tiny_t5):
    good, out = splits(files), tmp_path / "run"

    def told(backbone=tiny_backbone, *more, **changed):
        return refusal(capsys, "fit", *fit_flags(backbone, good | changed, out), *more)

    bad = write(tmp_path / "bad.csv", PAIRS, [["a", "b"], ["a", " "]])
    assert f"{bad}, row 2: positive is empty" in told(train=bad)
    scored = write(tmp_path / "scored.csv", SCORED, texts(6, 8, scored=True))
    wanted = "--embedding-loss cosine needs a column score, but the training rows are pairs; give"
    assert wanted in told(tiny_backbone, "--embedding-loss", "cosine")
    wanted = "--embedding-loss triplet needs the columns anchor, positive and negative, but the"
    assert wanted in told(tiny_backbone, "--embedding-loss", "triplet")
    line = told(tiny_backbone, "--embedding-loss", "multiple-negatives", train=scored)
    assert "takes every pair as one that belongs together, and does not read the column sco" in line
    line = told(tiny_backbone, "--batch-size", "8", "--accumulation-steps", "2")
    assert "accumulation_steps=2 divides a batch, and with --embedding-loss multiple-negat" in line
    one = write(tmp_path / "one.csv", PAIRS, [["a", "b"]])
    assert "batches of 8 of 1 training rows leave each pair alone in its batch" in told(train=one)
    alone = "batches of 1 of 90 training rows leave each pair alone in its batch"
    assert alone in told(tiny_backbone, "--train-size", "1")
    line = told(tiny_backbone, "--matryoshka-dimensions", "24", "25")
    assert "the Matryoshka dimension 25 must be from 1 to 24, the width of the embeddings" in line
    line = told(tiny_backbone, "--matryoshka-dimensions", "8", "8")
    assert "matryoshka_dimensions=(8, 8) must be different numbers, each at least 1" in line
    assert "similarity_scale=0.0 must be above 0" in told(tiny_backbone, "--similarity-scale", "0")
    assert "pooling='first' is not one of sentence embe" in told(
        tiny_backbone, "--pooling", "first"
    )
    assert "task 'custom' has pairs of texts for embeddings, which needs an encoder" in told(
        tiny_t5
    )
    labels = [["a", "x"], ["b", "y"]]
    classes = write(tmp_path / "classes.csv", ("sentence", "label"), labels)
    same = dict.fromkeys(good, classes)
    line = told(tiny_backbone, "--similarity-scale", "5", **same)
    assert "--similarity-scale is for sentence embeddings, from files with the columns" in line
    flags = flags_of(tiny_backbone, good, out)
    line = refused(capsys, "fit", *flags, "--method", "head-only")
    assert "--method head-only trains no parameter of" in line
    assert not out.exists()
    adapter = ("--adapter", fitted / "lora-0")
    assert f"{classes} has no pairs of texts" in refusal(
        capsys, "evaluate", *adapter, "--test-file", classes
    )
    pairs = write(tmp_path / "pairs.csv", ("sentence", "sentence2"), [["a", "b"]])
    for source, wanted in (
        (pairs, "has pairs of texts, and"),
        (scored, "has no column 'sentence'; its columns are sentence1, sentence2, score"),
    ):
        flags = ("--input", source, "--output", tmp_path / "e.npy")
        assert f"{source} {wanted}" in refused(capsys, "predict", *adapter, *flags)
    flags = ("--input", files["texts"], "--output", tmp_path / "e.npy")
    line = refused(capsys, "predict", "--adapter", fitted, *flags)
    assert "has the unsupported file type '.npy'; use .parquet" in line
    flags = ("--input", files["texts"], "--output", tmp_path / "e.csv", "--logits")
    assert "--logits needs a task with labels" in refused(capsys, "predict", *adapter, *flags)
    assert not list(tmp_path.glob("e.*"))


def test_damaged_settings_are_refused(fitted, files, tmp_path, capsys):
    place = tmp_path / "damaged"
    place.mkdir()
    for path in (fitted / "lora-0" / "adapter").iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    settings = json.loads((place / "adapter_config.json").read_text())
    flags = ("--adapter", place, "--input", files["texts"], "--output", tmp_path / "e.npy")
    for change, wanted in {
        "pooling": ("max", "embedding: pooling='max' must be"),
        "dimensions": ([99], "the Matryoshka dimension 99 must be from 1 to 24"),
        "other": (1, "embedding has the unknown fields other"),
    }.items():
        value, told = wanted
        damaged = settings | {"embedding": settings["embedding"] | {change: value}}
        (place / "adapter_config.json").write_text(json.dumps(damaged))
        assert told in refused(capsys, "predict", *flags)
    damaged = {name: value for name, value in settings.items() if name != "embedding"}
    (place / "adapter_config.json").write_text(json.dumps(damaged))
    assert "embedding has no pooling, normalize" in refused(capsys, "predict", *flags)


def test_a_method_that_cannot_be_merged_is_refused_by_name(
    sentence_backbone, fitted, tmp_path, capsys
):
    backbone = cj.load_backbone(sentence_backbone, head=None)
    model = cj.Adapted(backbone.module, cj.preset("compacter++", reduction_factor=2))
    params = jax.jit(lambda key: cj.init_adapters(model, backbone, key))(jax.random.key(0))
    settings = cj.read_adapter_config(fitted / "lora-0" / "adapter")
    names = ("backbone", "kind", "label_names", "max_length", "dtype", "embedding")
    metadata = {name: settings[name] for name in names}
    cj.save_adapter(tmp_path / "adapter", model, params, metadata=metadata)
    line = refusal(capsys, "merge", "--adapter", tmp_path / "adapter", "--to", tmp_path / "merged")
    assert "method 'phm_bottleneck' cannot be merged into the backbone" in line
    assert not (tmp_path / "merged").exists()
