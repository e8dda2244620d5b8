"""Every benchmark from files in the hub's schema to scores, on an encoder and on a T5."""

import functools

import datasets
import hub_data
import jax
import numpy as np
import pytest

import compacter_jax as cj
from train import inference, objective, tasks
from train.objective.decoder import TextToText
from train.objective.encoder import SpanExtractor
from train.options import FitOptions

NAMES = tuple(hub_data.FEATURES)
MEANS = {
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "cb": ("accuracy", "macro_f1"),
    "multirc": ("exact_match", "f1"),
    "record": ("exact_match", "f1"),
    "squad": ("exact_match", "f1"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All benchmarks, each in the folder of its name."""
    root = tmp_path_factory.mktemp("hub")
    for name in NAMES:
        hub_data.write(root, name)
    return root


def options_of(backbone, folder, name, **changes):
    changes = {"max_length": 64, "eval_batch_size": 8, **changes}
    return FitOptions(
        backbone=str(backbone), task=name, data_dir=folder, output_dir=folder, **changes
    )


@functools.cache
def adapted(backbone, **head):
    """The backbone with nothing inserted, and its parameters."""
    made = cj.load_backbone(backbone, **head)
    return made, cj.Adapted(made.module, cj.preset("full"))


def prepared(backbone, folder, name, **changes):
    """Task, objective and parameters of a run that has not begun."""
    options = options_of(backbone, folder, name, **changes)
    task = tasks.load_task(name, data_dir=folder)
    objective.check_options(task, options)
    head = objective.head_arguments(backbone, task.num_labels, task.kind)
    made, model = adapted(backbone, **head)
    tokenizer = inference.load_tokenizer(backbone, made, options.max_length)
    return task, objective.for_task(task, options, model, tokenizer), made.params


def right_outputs(made, encoded):
    """Outputs of a model that knows everything: from the examples themselves."""
    targets = encoded.targets
    if isinstance(made, SpanExtractor):
        logits = np.zeros((len(encoded), made.max_length, 2), np.float32)
        # A window without the answer is not sure of anything.
        sure = np.where(targets[:, 0] > 0, 9.0, 0.1)
        for end in (0, 1):
            logits[np.arange(len(encoded)), targets[:, end], end] = sure
        return logits
    if isinstance(made, TextToText) and made.casting.generates:
        texts = np.split(encoded.target_texts.ids, encoded.target_texts.offsets[1:-1])
        ids = np.zeros((len(encoded), 1 + max(map(len, texts))), np.int32)
        for row, tokens in zip(ids, texts, strict=True):
            row[1 : 1 + len(tokens)] = tokens
        return {"ids": ids, "loss": np.zeros(len(encoded))}
    if encoded.targets.dtype == np.float32:
        return targets[:, None]
    logits = np.eye(1 + targets.max(), dtype=np.float32)[targets]
    return {"scores": logits} if isinstance(made, TextToText) else logits


@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_is_scored(name, family, folder, tiny_backbone, tiny_t5):
    backbone = tiny_backbone if family == "bert" else tiny_t5
    if family == "bert" and name.startswith("wmt"):
        with pytest.raises(ValueError, match=f"task '{name}' .* needs an encoder-decoder such as"):
            prepared(backbone, folder, name)
        return
    # As short as the answers, which are generated token by token.
    changes = {} if family == "bert" else {"max_target_length": 20}
    task, made, params = prepared(backbone, folder, name, **changes)
    encoded = made.encode_all(task.splits)["validation"]
    compiled = jax.jit(made.outputs)
    outputs = inference.split_outputs(
        lambda batch: jax.device_get(compiled(params, batch)), encoded, 8, description=None
    )
    scores = made.scores(outputs, encoded)
    assert np.isfinite(list(scores.values())).all()
    assert scores["loss"] > 0
    means = MEANS.get(name, (task.metric,))
    assert scores[task.metric] == pytest.approx(np.mean([scores[one] for one in means]))
    # The right answers get full marks, and those of other rows do not.
    right = right_outputs(made, encoded)
    full = 100 if name.startswith("wmt") else 1
    rounding = 0.02 if (name, family) == ("stsb", "t5") else 1e-6  # to multiples of 0.2
    assert made.scores(right, encoded)[task.metric] == pytest.approx(full, rel=rounding)
    wrong = jax.tree.map(lambda leaf: np.roll(leaf, 1, axis=0), right)
    assert made.scores(wrong, encoded)[task.metric] < 0.97 * full
    # Without what is to be predicted, there are predictions for every row.
    columns = {column: task.splits["validation"][column][:] for column in made.benchmark.columns}
    unlabelled = made.encode(columns)
    assert unlabelled.targets is None or name.startswith("wmt")
    predicted = made.predictions(
        jax.tree.map(lambda leaf: leaf[: len(unlabelled)], right), unlabelled
    )
    assert len(predicted) == 6


@pytest.mark.parametrize("name", NAMES)
def test_official_splits(name, folder):
    task = tasks.load_task(name, data_dir=folder)
    assert task.name == name
    splits = ["train", "validation", *hub_data.VALIDATION.get(name, ())[1:]]
    splits += ["test"] if name in hub_data.OPEN_TEST else []
    sizes = {"train": 8, "test": 4}
    assert {split: len(rows) for split, rows in task.splits.items()} == {
        split: sizes.get(split, 6) for split in splits
    }
    label = hub_data.FEATURES[name].get("label")
    expected = tuple(label.names) if isinstance(label, datasets.ClassLabel) else ()
    assert task.label_names == expected
    assert task.metric == "_and_".join(MEANS.get(name, (task.metric,)))
    original = hub_data.rows(name, 6, seed=1)  # written second
    for column in task.benchmark.columns:
        assert task.splits["validation"][column][:] == original[column][:]
