"""Runs the command line on a T5: tasks cast as text, span corruption, and errors."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import QUICK, WORDS, write_t5
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from tests.train.cli.test_cli import (
    FIT_AND_KEEP_LOGITS,
    ROOT,
    adapter_bytes,
    check_run,
    fit_flags,
    refusal,
    small_flags,
    write_splits,
)
from train.__main__ import main
from train.data import batching, tokens
from train.fit import trainer as fit_trainer
from train.inference import adapter as inference_adapter
from train.inference.options import AdapterOptions
from train.objectives import noise as objectives_noise
from train.objectives import span_corruption


def t5_flags(folder, files, output, **flags):
    """Returns flags for few inputs of one length, since compilation takes most of the time."""
    return fit_flags(folder, files, output, **{"max-length": 16, "epochs": 1, **flags})


def command(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_splits(
        tmp_path_factory.mktemp("files"), {"train": 120, "validation": 40, "test": 43}
    )


def write_corpus(path, documents, *, seed):
    generator = np.random.default_rng(seed)
    texts = [" ".join(generator.choice(WORDS[:10], 30)) for _ in range(documents)]
    path.write_text("\n\n".join(texts))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt", 20, seed=0)


@pytest.fixture(scope="module")
def fitted(tiny_t5, files, tmp_path_factory):
    """Returns the folder of a finished classification run on the four devices of the tests."""
    output = tmp_path_factory.mktemp("runs") / "run"
    command("fit", *t5_flags(tiny_t5, files, output, task="movie", epochs=4))
    return output


@pytest.mark.contract
def test_classification_as_text(fitted, tiny_t5):
    result = json.loads((fitted / "metrics.json").read_text())
    assert result["test"]["accuracy"] >= 0.9
    best = result["history"][result["best_epoch"] - 1]
    assert result["validation"]["accuracy"] == best["accuracy"]
    assert result["validation"]["loss"] == best["validation_loss"]
    assert result["history"][-1]["train_loss"] < result["history"][0]["train_loss"]
    assert "invalid" not in result["validation"]  # scored predictions are always labels
    settings = json.loads((fitted / "adapter" / "adapter_config.json").read_text())
    assert settings["head"] == "conditional_generation"
    assert settings["label_names"] == ["negative", "positive"]
    assert settings["text_to_text"] == {
        "prefix": "movie",
        "score_step": 0.2,
        "score_mean": 0.0,
        "max_target_length": 64,
        "max_new_tokens": 2,  # the longest label and its end-of-sequence token
        "evaluate_by": "scoring",
        "num_beams": 1,
    }
    report = (fitted / "report.md").read_text()
    assert "| prefix | `movie` |" in report
    assert not (fitted / "backbone").exists()


@pytest.mark.contract
def test_evaluation_by_scoring_and_by_generation(fitted, files, tmp_path, capsys):
    output = tmp_path / "metrics.json"
    flags = ["--adapter", fitted / "adapter", "--test-file", files["test"], "--output", output]
    command("evaluate", *flags)
    scored = json.loads(output.read_text())
    of_fit = json.loads((fitted / "metrics.json").read_text())["test"]
    assert scored["metrics"] == pytest.approx(of_fit, rel=1e-6)
    assert scored["examples"] == 43
    assert scored["truncated"] > 0
    assert scored["truncated_targets"] == 0
    command("evaluate", *flags, "--evaluate-by", "generation")
    generated = json.loads(output.read_text())["metrics"]
    assert isinstance(generated["invalid"], int)
    assert f"test invalid: {generated['invalid']}" in capsys.readouterr().out
    # Greedy search returns the likeliest label, or a likelier text that is no label and thus
    # invalid.
    wrong = 43 * (scored["metrics"]["accuracy"] - generated["accuracy"])
    assert 0 <= round(wrong) <= generated["invalid"]
    assert generated["loss"] == pytest.approx(scored["metrics"]["loss"], rel=1e-5)


@pytest.mark.contract
def test_predict_labels(fitted, tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("id,sentence\n7,good fine great loved\n8,bad dull awful hated\n")
    command("predict", "--adapter", fitted / "adapter", "--input", source, "--output", target)
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prediction"] for row in rows] == ["positive", "negative"]
    assert [(row["id"], row["label_id"]) for row in rows] == [("7", "1"), ("8", "0")]
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)


@pytest.mark.slow
def test_predict_in_a_new_process_gives_the_scores_of_the_run(tiny_t5, files, tmp_path):
    flags = t5_flags(tiny_t5, files, tmp_path / "run", task="movie")
    one_device = {"XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **one_device}
    script = FIT_AND_KEEP_LOGITS.replace('"test"))', '"test")["scores"])')
    run = [sys.executable, "-c", script, tmp_path / "scores.npy", *flags]
    subprocess.run(run, env=environment, check=True, capture_output=True)
    run = [sys.executable, "-m", "train", "predict", "--logits", "--eval-batch-size", "16"]
    run += ["--adapter", tmp_path / "run" / "adapter", "--input", files["test"]]
    run += ["--output", tmp_path / "out.parquet"]
    subprocess.run(run, env=environment, check=True, capture_output=True, cwd=ROOT)
    table = pq.read_table(tmp_path / "out.parquet")
    scores = np.array(table["logits"].to_pylist(), np.float32)
    np.testing.assert_array_equal(scores, np.load(tmp_path / "scores.npy"))
    np.testing.assert_array_equal(table["label_id"], scores.argmax(-1))
    assert (scores < 0).all()  # log-likelihoods


def test_label_scores_are_the_likelihoods_of_the_labels_alone(fitted):
    """One call of the decoder for labels of different lengths equals one call for each label."""
    loaded = inference_adapter.load(AdapterOptions(adapter=fitted / "adapter"))
    names = ("good", "not very good", "0")
    fmt = dataclasses.replace(loaded.objective.format, label_names=names)
    objective = dataclasses.replace(loaded.objective, format=fmt)
    backbone = cj.load_backbone(loaded.settings["backbone"])
    _, params = cj.load_adapter(fitted / "adapter", backbone)
    rows = {"sentence": ["a fine film", "dull", "we loved it"]}
    (batch,) = batching.batches(objective.encode(rows), 3, shuffle=False)
    scores = jax.jit(objective.outputs)(params, batch)["scores"]
    assert scores.shape == (3, 3)
    apply = jax.jit(lambda batch: objective.apply(params, batch, None))
    for label, name in enumerate(names):
        ids = objective.tokenizer(name)["input_ids"]  # with the end-of-sequence token
        inputs = np.zeros((3, 5), np.int32)
        inputs[:, 1 : len(ids)] = ids[:-1]
        logits = np.asarray(apply({**batch, "decoder_input_ids": inputs}), np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = logits[:, np.arange(len(ids)), ids].sum(-1)
        np.testing.assert_allclose(scores[:, label], expected, atol=1e-5)


def test_regression_by_generation(tiny_t5, tmp_path, capsys):
    paths = write_splits(tmp_path, {"train": 24, "validation": 24}, score=True)
    flags = {"task": "stars", "max-target-length": 8, "epochs": 2}
    command(
        "fit", *t5_flags(tiny_t5, paths, tmp_path / "run", **flags), "--regression", "--prefix", "s"
    )
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(result["validation"]) == {"pearson", "spearman", "mse", "mae", "invalid", "loss"}
    assert f"validation invalid: {result['validation']['invalid']}" in capsys.readouterr().out
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    scores = pq.read_table(paths["train"])["score"].to_numpy()
    assert settings["text_to_text"]["score_mean"] == pytest.approx(scores.mean())
    assert settings["text_to_text"]["prefix"] == "s"
    adapter = ["--adapter", tmp_path / "run" / "adapter", "--input", paths["validation"]]
    command("predict", *adapter, "--output", tmp_path / "out.jsonl", "--num-beams", "2")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    invalid = sum(row["prediction"] is None for row in rows)
    message = f"{invalid} of 24 rows have no prediction, since the generated text is not a number"
    assert (message in capsys.readouterr().out) == (invalid > 0)
    assert all(isinstance(row["prediction"], float | None) for row in rows)
    error = refusal(capsys, "predict", *adapter, "--output", tmp_path / "o.csv", "--logits")
    assert "--logits needs a task with labels" in error
    assert not (tmp_path / "o.csv").exists()


def test_own_targets_are_cut_counted_and_generated(tiny_t5, tmp_path, capsys):
    path = tmp_path / "pairs.csv"
    lines = [f"{word},{word}" + " very" * (i % 4) for i, word in enumerate(WORDS[10:18])]
    path.write_text("\n".join(["sentence,target", *lines]))
    paths = {"train": path, "validation": path}
    flags = {"task": "copy", "max-target-length": 4, "eval-batch-size": 8}
    command("fit", *t5_flags(tiny_t5, paths, tmp_path / "run", **flags))
    output = capsys.readouterr().out
    assert "2 of 8 train targets are cut to max_target_length=4 tokens" in output
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (result["kind"], result["metric"]) == ("text", "exact_match")
    assert set(result["validation"]) == {"exact_match", "loss"}
    adapter = ["--adapter", tmp_path / "run" / "adapter"]
    command("predict", *adapter, "--input", path, "--output", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["sentence", "target", "prediction"]
    assert all(len(row["prediction"].split()) <= 4 for row in rows)


PRE_TRAINING = {"epochs": 5, "max-steps": 11, "backbone-dropout": 0.1}


@pytest.fixture(scope="module")
def pretrained(tiny_t5, corpus, tmp_path_factory):
    """Returns the folder of a finished pre-training run."""
    output = tmp_path_factory.mktemp("runs") / "pretrained"
    flags = span_flags(tiny_t5, corpus, output, **PRE_TRAINING)
    command("fit", *flags)
    return output


def span_flags(folder, corpus, output, **flags):
    # Short spans, since a single long span would always be at the end of its segment.
    flags = {"max-length": 20, "mean-span-length": 1, **flags}
    flags = {"task": "span_corruption", "method": "full", **flags}
    made = t5_flags(folder, {"train": corpus}, output, **flags)
    at = made.index("--reduction-factor")
    return made[:at] + made[at + 2 :]


def test_span_corruption_makes_a_backbone(pretrained, tiny_t5, corpus, tmp_path, capsys):
    result = json.loads((pretrained / "metrics.json").read_text())
    assert (result["kind"], result["metric"]) == ("span_corruption", "token_accuracy")
    assert set(result["validation"]) == {"token_accuracy", "loss"}
    losses = [record["validation_loss"] for record in result["history"]]
    assert losses[-1] < losses[0]
    # 33 segments of 19 tokens, one of them held out: 4 updates in each epoch, 3 in the last.
    assert result["train_examples"] == 32
    assert result["steps"] == 11
    assert len(result["history"]) == 3
    backbone = cj.load_backbone(pretrained / "backbone")
    _, params = cj.load_adapter(pretrained / "adapter", cj.load_backbone(tiny_t5))
    assert_equal_trees(backbone.params, params)
    assert backbone.module.head == "conditional_generation"
    assert f"fit --backbone {pretrained / 'backbone'}" in (pretrained / "report.md").read_text()
    adapter = ["--adapter", pretrained / "adapter", "--backbone", tiny_t5]
    flags = ["--task", "span_corruption", "--test-file", corpus, "--output", tmp_path / "test.json"]
    command("evaluate", *adapter, *flags)
    test = json.loads((tmp_path / "test.json").read_text())
    assert test["examples"] == 33
    assert set(test["metrics"]) == {"token_accuracy", "loss"}
    source = tmp_path / "in.csv"
    source.write_text("sentence\na\n")
    flags = ["--input", source, "--output", tmp_path / "out.csv"]
    error = refusal(capsys, "predict", *adapter, *flags)
    assert "an adapter of span_corruption cannot predict" in error


def assert_equal_trees(left, right):
    left, right = (flatten_dict(tree, sep="/") for tree in (left, right))
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


@pytest.mark.slow
def test_an_interrupted_pre_training_resumes_to_the_same_bytes(
    pretrained, tiny_t5, corpus, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "run"
    flags = span_flags(tiny_t5, corpus, output, **PRE_TRAINING)
    noted = fit_trainer.Trainer._note

    def interrupt(trainer, pending, bar):
        noted(trainer, pending, bar)
        if trainer._step_number() == 9:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(fit_trainer.Trainer, "_note", interrupt)
    assert main([str(flag) for flag in ("fit", *flags)]) == 130
    # Two of the three steps of the last epoch are done.
    assert "interrupted at step 10" in capsys.readouterr().err
    monkeypatch.setattr(fit_trainer.Trainer, "_note", noted)
    command("fit", *flags, "--resume")
    assert "resumed at step 10, epoch 3" in capsys.readouterr().out
    assert adapter_bytes(output) == adapter_bytes(pretrained)
    left, right = (json.loads((f / "metrics.json").read_text()) for f in (pretrained, output))
    for result in (left, right):
        result.pop("measured")
        for record in result["history"]:
            record.pop("examples_per_second")
    assert left == right
    name = "backbone/model.safetensors"
    assert (output / name).read_bytes() == (pretrained / name).read_bytes()


def test_a_corpus_is_corrupted_anew_in_every_epoch_and_validated_with_one_noise(tiny_t5, corpus):
    tokenizer = tokens.load_tokenizer(
        tiny_t5, vocab_size=96, max_position_embeddings=None, max_length=20
    )
    noise = objectives_noise.SpanCorruption(
        20,
        mean_span_length=1.0,
        eos_token_id=1,
        sentinel_ids=tokens.sentinel_ids(tokenizer),
    )
    made = span_corruption.SpanCorruption(None, tokenizer, cj.T5Config(), noise)
    splits = dataclasses.replace(made, seed=3).encode_all({"train": corpus})
    train, validation = splits["train"], splits["validation"]
    first, again, other = (train.of_epoch(epoch).input_ids for epoch in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert len(first) == len(other)
    assert (first != other).mean() > 0.1
    assert validation is validation.of_epoch(1)
    # Another seed changes the noise of the training split, not that of validation or the held-out
    # segments.
    splits = dataclasses.replace(made, seed=4).encode_all({"train": corpus})
    assert (splits["train"].of_epoch(0).input_ids != first).mean() > 0.1
    np.testing.assert_array_equal(splits["validation"].input_ids, validation.input_ids)
    # Three tokens, their sentinels, the end-of-sequence token.
    assert validation.target_texts.max_length == 7
    assert train.user_messages("train") == [
        "train: 600 tokens in 32 segments",
        "19 of 600 tokens of the train segments (3.2 %), in 19 of them, are unknown to the "
        "tokenizer",
    ]


def test_a_text_to_text_task_on_the_new_backbone(pretrained, files, tmp_path):
    flags = {"task": "movie", "method": "full", "train-size": 16}
    made = t5_flags(pretrained / "backbone", files, tmp_path / "run", **flags)
    at = made.index("--reduction-factor")
    command("fit", *made[:at], *made[at + 2 :])
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result["train_examples"] == 16
    assert np.isfinite(result["validation"]["loss"])
    assert not (tmp_path / "run" / "backbone").exists()


BAD_FLAGS = {
    "num_beams": ({"num-beams": 0}, "num_beams=0 must be at least 1"),
    "target": ({"max-target-length": 1}, "max_target_length=1 must be at least 2"),
    "label": ({"max-target-length": 2}, "2 labels are longer than max_target_length=2 tokens"),
    "step": ({"score-step": 0}, "score_step=0.0 must be above 0"),
    "steps": ({"max-steps": 0}, "max_steps=0 must be at least 1"),
    "noise": ({"task": "span_corruption", "noise-density": 1.5}, "noise_density=1.5 must be"),
    "sample": ({"task": "span_corruption", "train-size": 2}, "--train-size limits the examples of"),
    "parquet": ({"task": "span_corruption"}, "is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(name, tiny_t5, files, tmp_path, capsys):
    flags, message = BAD_FLAGS[name]
    output = tmp_path / "run"
    assert message in refusal(capsys, "fit", *t5_flags(tiny_t5, files, output, **flags))
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prefix": "x"}, "--prefix needs an encoder-decoder such as T5, but"),
        ({"evaluate-by": "generation"}, "--evaluate-by needs an encoder-decoder such as T5, but"),
        ({"task": "span_corruption"}, "needs an encoder-decoder such as T5, but"),
    ],
)
def test_a_bert_writes_no_text(flags, message, tiny_backbone, files, tmp_path, capsys):
    output = tmp_path / "run"
    error = refusal(capsys, "fit", *fit_flags(tiny_backbone, files, output, **flags))
    assert message in error
    assert str(tiny_backbone) in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"architecture": "T5EncoderModel"},
            "is a T5 with head='encoder', which cannot write text",
        ),
        ({"architecture": "T5Model"}, "is a T5 with head=None, which cannot write text"),
        (
            {"vocab_size": 64},
            "it has 87 tokens, but the backbone's embedding has 64; use the backbone's",
        ),
        ({"eos_token_id": 2}, "ends sequences with the token 1, but the backbone with 2; use the"),
        ({"sentinels": 0}, "no sentinel token <extra_id_0>"),
    ],
)
def test_backbones_that_do_not_do(settings, message, corpus, tmp_path, capsys):
    backbone, output = write_t5(tmp_path / "t5", seed=0, **settings), tmp_path / "run"
    assert message in refusal(capsys, "fit", *span_flags(backbone, corpus, output))
    assert not output.exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": ["映画", "音楽"]}, "cannot tell the labels '映画' and '音楽' apart"),
        ({"target": ["a", " "]}, "row 2: target is empty"),
        ({"target": ["a", "\u200b"]}, "row 2: the tokenizer returns no tokens for the target"),
    ],
)
def test_bad_targets(columns, message, tiny_t5, tmp_path, capsys):
    path, output = tmp_path / "bad.parquet", tmp_path / "run"
    pq.write_table(pa.table({"sentence": ["a", "b"], **columns}), path)
    flags = t5_flags(tiny_t5, {"train": path, "validation": path}, output)
    assert message in refusal(capsys, "fit", *flags)
    assert not output.exists()


def test_an_input_without_tokens(tiny_t5, tmp_path, capsys):
    path, output = tmp_path / "bad.parquet", tmp_path / "run"
    pq.write_table(pa.table({"sentence": ["a", "\u200b"], "target": ["a", "b"]}), path)
    flags = t5_flags(tiny_t5, {"train": path, "validation": path}, output, prefix="")
    assert "row 2: the tokenizer returns no tokens for the input" in refusal(capsys, "fit", *flags)
    assert not output.exists()


def test_evaluation_of_another_kind(fitted, corpus, capsys):
    flags = ["--adapter", fitted / "adapter", "--test-file", corpus]
    error = refusal(capsys, "evaluate", *flags, "--task", "span_corruption")
    assert "is for tasks of kind classification, but span_corruption" in error
    assert "num_beams=0 must be at least 1" in refusal(capsys, "evaluate", *flags, "--num-beams", 0)


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        (["compacter", "--reduction-factor", "32"], 161_728),
        (["compacter++", "--reduction-factor", "32"], 104_704),
        (["houlsby", "--reduction-factor", "32"], 1_855_104),
    ],
)
def test_the_papers_counts_from_a_name_alone(flags, trained, capsys):
    """Table 1 of the paper, for T5-base."""
    flags = ["params", "--backbone-config", "t5-base", "--method", *flags]
    command(*flags, "--json")
    counts = json.loads(capsys.readouterr().out)
    assert (counts["trained"], counts["backbone_total"]) == (trained, 222_903_552)


def test_params_of_a_configuration_file(tiny_t5, capsys):
    flags = ["params", "--reduction-factor", "2"]
    command(*flags, "--backbone", tiny_t5)
    table = capsys.readouterr().out
    command(*flags, "--backbone-config", tiny_t5 / "config.json")
    assert capsys.readouterr().out == table
    # Two layers of (16 + 8) + 8 + (8 + 16) + 16 for n = 4, a rule of 64, seven norms of 16.
    assert table.splitlines()[0] == "backbone alone: 6,384; trained: 5.0125 % of it"
    assert "one of them" in refusal(capsys, *flags)
    both = ["--backbone", tiny_t5, "--backbone-config", "t5-base"]
    assert "one of them" in refusal(capsys, *flags, *both)
    assert "'t5-bas' is neither" in refusal(capsys, *flags, "--backbone-config", "t5-bas")


# The kinds of methods that `test_cli.py` does not train on a BERT.
KINDS = {
    "intrinsic-said": {"dimension": 60},
    "lora": {},
    "ia3": {},
    "mam": {"prefix-length": 2, "bottleneck-size": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "flags"), KINDS.items(), ids=KINDS)
def test_every_kind_of_method(method, flags, tiny_t5, files, tmp_path, capsys):
    flags = small_flags(tiny_t5, files, tmp_path / "run", method, **flags)
    command("fit", *flags, "--task", "movie")
    check_run(tmp_path / "run", files, tmp_path, capsys)
    flags = ["--adapter", tmp_path / "run" / "adapter", "--test-file", files["test"]]
    command("evaluate", *flags, "--evaluate-by", "generation", "--output", tmp_path / "by.json")
    by_generation = json.loads((tmp_path / "by.json").read_text())["metrics"]
    by_scoring = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    assert by_generation["loss"] == pytest.approx(by_scoring["loss"], rel=1e-5)


def test_convert_there_and_back(fitted, tiny_t5, files, tmp_path, capsys):
    method = cj.preset("pfeiffer-feed-forward", reduction_factor=2)
    backbone = cj.load_backbone(tiny_t5)
    model = cj.Adapted(backbone.module, method)
    params = cj.init_adapters(model, backbone, jax.random.key(0))
    settings = cj.read_adapter_config(fitted / "adapter")
    kept = ("backbone", "dtype", "task", "kind", "label_names", "max_length", "text_to_text")
    metadata = {name: settings[name] for name in kept}
    cj.save_adapter(tmp_path / "ours", model, params, metadata=metadata)
    command(
        *("convert", "--from", "compacter_jax", tmp_path / "ours"),
        *("--to-format", "adapterhub", "--to", tmp_path / "theirs"),
    )
    back = ["convert", "--from", "adapterhub", tmp_path / "theirs", "--backbone", tiny_t5]
    back += ["--to", tmp_path / "back", "--max-length", "16"]
    assert "give --task, or --prefix" in refusal(capsys, *back)
    command(*back, "--task", "movie")
    settings = cj.read_adapter_config(tmp_path / "back")
    assert {name: settings[name] for name in kept[2:-1]} == {
        name: metadata[name] for name in kept[2:-1]
    }
    assert settings["text_to_text"] == {**metadata["text_to_text"], "max_new_tokens": 64}
    for name in ("ours", "back"):
        flags = ["--adapter", tmp_path / name, "--test-file", files["test"]]
        command("evaluate", *flags, "--output", tmp_path / f"{name}.json")
    ours, back = (
        json.loads((tmp_path / f"{name}.json").read_text())["metrics"] for name in ("ours", "back")
    )
    assert ours == back
