"""Tests the training of speech: mixed batches of languages, masks, and what moves."""

import dataclasses
import json
import wave
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from tests.speech_data import as_bytes, said, utterances, write_speech_model, write_split
from tests.tones import RATE, tone
from train.__main__ import _parsed
from train.cli.method_flags import MethodOptions
from train.compute import step
from train.data import batching
from train.fit.job import prepare
from train.fit.options import FitOptions
from train.objectives import translators
from train.speech.audio import write_wave
from train.speech.spec_augment import SpecAugment
from train.tasks import multilingual


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Returns the options of a run of two languages with a bank."""
    folder = tmp_path_factory.mktemp("speech")
    found = FitOptions(
        backbone=str(write_speech_model(folder)),
        method="st",
        method_options=MethodOptions(reduction_factor=2),
        train_file=write_split(folder, "train", 8),
        validation_file=write_split(folder, "validation", 2, seed=1),
        feature_cache=folder / "cache",
        output_dir=folder / "run",
        adapters="per_target",
        batch_size=16,
        max_target_length=8,
        spec_augment=False,
    )
    return multilingual.resolved(found)


def with_random_parameters(task_run):
    """Returns a task with random parameters in place of initial ones."""
    leaves, structure = jax.tree.flatten(task_run.params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    random = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape, leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else leaf
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return dataclasses.replace(task_run, params=jax.tree.unflatten(structure, random))


@pytest.fixture(scope="module")
def task_run(options):
    """Returns the only task of the run."""
    return with_random_parameters(prepare(options).task_runs[0])


@pytest.fixture(scope="module")
def with_cross_attention(options):
    """Returns the same with cross-attention trained beside `compacter-st`, which shares a rule."""
    given = dataclasses.replace(
        options,
        method="compacter-st",
        method_options=MethodOptions(reduction_factor=2, phm_dim=2),
        trained_sites=("cross_attention",),
    )
    return with_random_parameters(prepare(given).task_runs[0])


def whole_batch(task_run):
    """Returns all rows of training in one batch, which mixes their lengths."""
    (batch,) = batching.batches(task_run.encoded["train"].of_epoch(0), 16, shuffle=True, seed=0)
    return batch


def loss_and_gradient(task_run, batch):
    """Returns the sum of the losses of all tokens, and its gradient by the trained leaves."""
    trained, frozen = cj.partition(task_run.params, task_run.labels)
    apply, loss = task_run.objective.apply, task_run.objective.loss

    def total(trained):
        logits = apply(cj.merge(trained, frozen), batch, None)
        return jnp.sum(loss(logits, batch["labels"]) * batch["weights"])

    return jax.jit(jax.value_and_grad(total))(trained)


@pytest.mark.parametrize("name", ["task_run", "with_cross_attention"])
def test_a_mixed_batch_equals_one_batch_for_each_language(name, request):
    """Losses and gradients of a batch of both languages are the sums of those of one each."""
    task_run = request.getfixturevalue(name)
    mixed = whole_batch(task_run)
    ids = mixed["adapter_ids"]
    assert sorted(set(ids.tolist())) == [0, 1]
    assert mixed["input_features"].dtype == np.float32
    whole, gradient = loss_and_gradient(task_run, mixed)
    total = 0.0
    flat = flatten_dict(gradient, sep="/")
    for member in (0, 1):
        chosen = np.flatnonzero(ids == member)
        alone = {name: values[chosen] for name, values in mixed.items()}
        value, own = loss_and_gradient(task_run, alone)
        total += float(value)
        for path, leaf in flatten_dict(own, sep="/").items():
            if leaf is None:
                continue
            scale = max(1.0, float(np.abs(leaf[member]).max()))
            np.testing.assert_allclose(
                leaf[member] / scale, flat[path][member] / scale, atol=1e-6, err_msg=path
            )
            assert not np.asarray(leaf[1 - member]).any(), path
            assert np.asarray(leaf[member]).any(), path
    np.testing.assert_allclose(whole, total, rtol=1e-6)


def test_the_member_of_a_row_is_the_one_of_its_language(task_run):
    """Rows are routed by their language, begin with its token, and are in the cache once."""
    encoded = task_run.encoded["train"].of_epoch(0)
    assert task_run.objective.directions == ("de", "fr")
    names = np.array(encoded.rows[0])
    np.testing.assert_array_equal(encoded.routes.adapter_ids, (names == "fr").astype(int))
    tokens = task_run.objective.tokenizer.convert_ids_to_tokens(encoded.routes.first_tokens)
    assert tokens == [f"<{name}>" for name in names]
    starts = encoded.target_texts.offsets[:-1]
    np.testing.assert_array_equal(encoded.target_texts.ids[starts], encoded.routes.first_tokens)
    assert encoded.target_texts.given == 1
    np.testing.assert_array_equal(encoded.frames.starts[::2], encoded.frames.starts[1::2])
    assert encoded.frames.lengths[::2].sum() == len(encoded.frames.values)


def test_bytes_give_what_files_give(options, task_run, tmp_path):
    """Recordings as bytes with --sampling-rate are encoded as those of files are."""
    rows = [json.loads(line) for line in options.train_file.read_text().splitlines()]
    numbers = [int(Path(row["audio"]).stem) for row in rows]
    symbols = utterances(8)
    assert [row["target"] for row in rows] == [
        said(symbols[n], row["target_language"]) for n, row in zip(numbers, rows, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(as_bytes(rows)), tmp_path / "train.parquet")
    given = dataclasses.replace(options, train_file=tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="give --sampling-rate"):
        multilingual.load_task(multilingual.resolved(given))
    given = multilingual.resolved(dataclasses.replace(given, sampling_rate=8_000))
    split = multilingual.load_task(given).splits["train"]
    objective = dataclasses.replace(task_run.objective, sampling_rate=8_000)
    found, wanted = objective.encode(split), task_run.encoded["train"].of_epoch(0)
    for name in ("values", "starts", "lengths"):
        np.testing.assert_array_equal(getattr(found.frames, name), getattr(wanted.frames, name))
    np.testing.assert_array_equal(found.target_texts.ids, wanted.target_texts.ids)


def test_several_channels_are_told_of(task_run, tmp_path):
    """A line says how many recordings have several channels, and that the first is read."""
    with wave.open(str(tmp_path / "two.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(RATE)
        first = np.round(tone(440) * 2**15).astype("<i2")
        file.writeframes(np.stack([first, -first // 2], 1).tobytes())
    write_wave(tmp_path / "one.wav", tone(440), RATE)
    rows = {"audio": ["two.wav", "one.wav"], "target_language": ["de", "fr"]}
    found = dataclasses.replace(task_run.objective, folder=tmp_path).encode(rows)
    (note,) = found.user_messages("test")
    assert note == "test: 1 of 2 recordings have several channels; the first is read"
    each = found.frames.padded(np.arange(2), (2, found.frames.lengths[0]))
    np.testing.assert_array_equal(each[0], each[1])


def test_the_switch_of_the_masks(options, task_run):
    """Builds the objective of a run with the masks of SpecAugment or without, as the flag says."""
    assert task_run.objective.spec_augment is None
    model, tokenizer = task_run.objective.model, task_run.objective.tokenizer
    needed = ["--backbone", options.backbone, "--train-file", str(options.train_file)]
    needed += ["--method", "st", "--output-dir", str(options.output_dir)]
    found = {}
    for flag in ("--spec-augment", "--no-spec-augment", None):
        given = _parsed("fit", needed + ([] if flag is None else [flag])).spec_augment
        chosen = dataclasses.replace(options, spec_augment=given)
        made = translators.for_run(task_run.task, chosen, model, tokenizer)
        found[flag] = made.spec_augment
    masks = SpecAugment()
    assert found == {"--spec-augment": masks, "--no-spec-augment": None, None: masks}


def test_features_are_masked_in_training_alone(task_run):
    """With a key, the model reads what SpecAugment leaves; without, all features."""
    batch = whole_batch(task_run)
    seen = []

    class Reader:
        backbone = task_run.model.backbone

        @staticmethod
        def apply(variables, features, *args, **kwargs):
            seen.append(features)
            return jnp.zeros((1, 1, 1))

    augment = SpecAugment()
    objective = dataclasses.replace(task_run.objective, model=Reader(), spec_augment=augment)
    objective.apply({}, batch, None)
    objective.apply({}, batch, jax.random.key(1))
    objective.apply({}, batch, jax.random.key(2))
    np.testing.assert_array_equal(seen[0], batch["input_features"])
    assert (seen[1] != seen[2]).any()
    hidden = np.asarray(seen[1] != batch["input_features"])
    assert hidden.any()
    assert not np.asarray(seen[1])[hidden].any()


def moved(task_run, steps=3):
    """Returns the paths of the leaves that training changes, all others compared to the bit."""
    tx = cj.optimizer(step.adamw(decays=False, clips=False), task_run.labels)
    trained, frozen = cj.partition(task_run.params, task_run.labels)
    before = jax.tree.map(np.asarray, task_run.params)
    batch = whole_batch(task_run)
    state = step.TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))
    numbers = step.Hyperparameters(1e-2, 0.0, 1.0)
    objective = task_run.objective
    update = jax.jit(
        lambda state: step.loss_and_update(
            state,
            frozen,
            batch,
            jax.random.key(0),
            apply=objective.apply,
            loss=objective.loss,
            tx=tx,
            numbers=numbers,
        )[0]
    )
    for _ in range(steps):
        state = update(state)
    after = flatten_dict(cj.merge(state.trained, frozen), sep="/")
    return {
        path
        for path, leaf in flatten_dict(before, sep="/").items()
        if (leaf != np.asarray(after[path])).any()
    }


def test_the_adapters_alone_move(task_run):
    """After training every leaf of the backbone is what it was, bit for bit."""
    flat = flatten_dict(task_run.params, sep="/")
    wanted = {path for path in flat if "/adapter/" in path}
    # In both stacks, an adapter's two projections and its own norm, with biases.
    assert len(wanted) == 2 * 6
    assert moved(task_run) == wanted


def test_cross_attention_moves_as_well(with_cross_attention):
    """With --trained-sites the changes of these sites move beside the adapters, nothing else.

    The rule, which all adapters of a language share, moves as they do.
    """
    flat = flatten_dict(with_cross_attention.params, sep="/")
    adapters = {path for path in flat if "/fc2/adapter/" in path} | {"phm_rule"}
    assert {path.split("/")[0] for path in adapters} == {"encoder", "decoder", "phm_rule"}
    hosts = [f"decoder/layers/0/encoder_attn/{name}_proj" for name in ("q", "k", "v", "out")]
    found = moved(with_cross_attention)
    assert adapters < found
    more = {path.partition("/adapter/")[0] for path in found - adapters}
    assert more == set(hosts)
    leaves = [path.rpartition("/")[2] for path in found - adapters]
    assert sorted(leaves) == ["bias"] * 4 + ["kernel"] * 4
