"""Test predictions as `fit` writes and `compare` reads them: the scores follow from them."""

import types

import numpy as np
import pytest

from tests.train.tasks.test_written import tokenizer_of
from train.compare.bootstrap import weighted
from train.compare.single_run import Run
from train.data import tokens as data_tokens
from train.fit.run import write_predictions
from train.objectives.classification import Classifier
from train.objectives.text_to_text import TextToText
from train.tasks import metrics, text_format

NAMES = ("no", "perhaps", "yes")


def spoken(tokenizer, texts):
    """Outputs of a decoder that says the tokens of the texts."""
    ids = data_tokens.tokenize_texts(texts, tokenizer, 64, what="target")
    rows = np.zeros((len(texts), 65), np.int32)
    for row, each in zip(rows, np.split(ids.ids, ids.offsets[1:-1]), strict=True):
        row[1 : 1 + len(each)] = each
    return {"ids": rows}


def read_back(folder, objective, outputs, targets, label_names=()):
    """The predictions and targets of a run, written and read."""
    encoded = types.SimpleNamespace(targets=targets, groups=None)
    task = types.SimpleNamespace(kind=objective_kind(objective), label_names=label_names)
    predictions_and_targets = objective.predictions_and_targets(outputs, encoded)
    write_predictions(predictions_and_targets, types.SimpleNamespace(task=task), folder)
    return Run("own", None, "lora", 0, folder, ()).predictions()


def objective_kind(objective):
    return objective.format.kind if isinstance(objective, TextToText) else objective.kind


def value(metric, predictions, targets, label_names=()):
    (found,) = weighted(metric, predictions, targets, np.ones((1, len(targets)), int), label_names)
    return pytest.approx(found)


@pytest.mark.parametrize("labels", [2, 3])
def test_labels_of_a_head(labels, tmp_path):
    generator = np.random.default_rng(0)
    logits, targets = generator.normal(size=(30, labels)), generator.integers(labels, size=30)
    objective, names = Classifier(None, None, "classification", 16), NAMES[:labels]
    found = read_back(tmp_path, objective, logits, targets, names)
    wanted = metrics.compute_metrics("classification", logits, targets)
    for metric in ("accuracy", "macro_f1", "matthews_correlation", *["f1"] * (labels == 2)):
        assert wanted[metric] == value(metric, *found, names)


def test_scores_of_a_head(tmp_path):
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(30, 1)).astype(np.float32)
    targets = (logits[:, 0] + generator.normal(size=30)).astype(np.float32)
    found = read_back(tmp_path, Classifier(None, None, "regression", 16), logits, targets)
    wanted = metrics.compute_metrics("regression", logits, targets)
    for metric in ("pearson", "spearman"):
        assert wanted[metric] == value(metric, *found)


def test_generated_labels_scores_and_texts(tmp_path):
    tokenizer = tokenizer_of("T5")

    def objective(**fields):
        form = text_format.TextFormat(prefix="", evaluate_by="generation", **fields)
        return TextToText(None, tokenizer, None, form, 16)

    texts, labels = ["no", "yes", "noyes", "perhaps"], np.array([0, 2, 1, 0])
    made = objective(kind="classification", label_names=NAMES)
    found = read_back(tmp_path, made, spoken(tokenizer, texts), labels, NAMES)
    assert found[0].tolist() == ["no", "yes", None, "perhaps"]
    wanted = metrics.label_metrics(np.array([0, 2, -1, 1]), labels, 3)
    for metric in ("accuracy", "macro_f1", "matthews_correlation"):
        assert wanted[metric] == value(metric, *found, NAMES)

    texts, targets = ["1.4", "x", "3.0"], np.array([1.0, 2.5, 3.0], np.float32)
    made = objective(kind="regression", score_mean=2.0)
    found = read_back(tmp_path, made, spoken(tokenizer, texts), targets)
    assert found[0].tolist() == [1.4, 2.0, 3.0]
    wanted = metrics.score_metrics(np.array([1.4, np.nan, 3.0]), targets, 2.0)
    assert wanted["pearson"] == value("pearson", *found)

    # The tokenizer cannot write the target as it stands.
    texts = ["a½b", "a film", "good"]
    targets = np.array([*texts[:2], "bad"], object)
    found = read_back(tmp_path, objective(kind="text"), spoken(tokenizer, texts), targets)
    assert found[1][0] != texts[0]
    assert value("exact_match", *found) == 2 / 3
