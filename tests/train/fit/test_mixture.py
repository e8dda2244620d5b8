"""Trains several tasks in one run: how often each task is drawn, and what it trains."""

import functools
import itertools
import json
import os
import signal

import hub_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from train.__main__ import main
from train.data import batching
from train.fit import job, stopping
from train.fit import trainer as fit_trainer
from train.fit.mixture import Mixture, parse
from train.fit.options import FitOptions
from train.fit.run_folder import open_run


@pytest.mark.parametrize(
    ("text", "sizes", "expected"),
    [
        ("temperature=1", [100, 300], [0.25, 0.75]),
        ("temperature=2", [100, 400], [1 / 3, 2 / 3]),
        ("limit=100", [50, 1000, 100], [0.2, 0.4, 0.4]),
        ("temperature=2,limit=900", [100, 100_000], [0.25, 0.75]),
        (" limit=1 , temperature=7 ", [3, 9], [0.5, 0.5]),
        ("temperature=10", [392_702, 2_490], [0.623886, 0.376114]),
    ],
)
def test_rates(text, sizes, expected):
    np.testing.assert_allclose(parse(text).rates(sizes), expected, atol=5e-6)


def test_order_has_the_rates_and_depends_on_its_arguments_alone():
    mixture = Mixture(temperature=2)
    order = mixture.order([100, 400, 900], 6000, seed=3, epoch=1)
    # Rates 1/6, 2/6 and 3/6: four standard deviations of 6,000 draws are below 160.
    np.testing.assert_allclose(np.bincount(order), [1000, 2000, 3000], atol=160)
    again = mixture.order([100, 400, 900], 6000, seed=3, epoch=1)
    np.testing.assert_array_equal(order, again)
    for other in ({"seed": 4, "epoch": 1}, {"seed": 3, "epoch": 2}):
        assert (mixture.order([100, 400, 900], 6000, **other) != order).any()
    np.testing.assert_array_equal(mixture.order([7], 3, seed=0, epoch=0), [0, 0, 0])


@pytest.mark.parametrize(
    "text", ["", "10", "temperature", "temperature=hot", "temperature=2,temperature=3", "scale=2"]
)
def test_what_is_no_mixture(text):
    with pytest.raises(ValueError, match="must be temperature=NUMBER, limit=NUMBER"):
        parse(text)


def test_numbers_out_of_range():
    with pytest.raises(ValueError, match=r"temperature=0.5 of --mixture must be at least 1"):
        parse("temperature=0.5")
    with pytest.raises(ValueError, match="limit=0 of --mixture must be at least 1"):
        parse("limit=0")


MIXED = {"train": 24, "validation": 8}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Writes two tasks, one with two labels and one with three."""
    folder = tmp_path_factory.mktemp("data")
    hub_data.write(folder, "rte", **MIXED)
    return hub_data.write(folder, "cb", train=40, validation=8)


def flags_of(backbone, data_dir, output, **flags):
    flags = {
        "backbone": backbone,
        "task": "rte,cb",
        "data-dir": data_dir,
        "output-dir": output,
        "reduction-factor": 2,
        "max-length": 16,  # one bucket, and so only one shape to compile
        "batch-size": 8,
        "eval-batch-size": 8,
        "epochs": 2,
        "learning-rate": 1e-2,
        "backbone-dropout": 0,
        "mixture": "temperature=2",
        **flags,
    }
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def prepared(flags):
    work = job.prepare(tyro.cli(FitOptions, args=flags))
    open_run(work.options)
    return work


def trained(flags):
    """Returns the job, and the final state of its learners on the host."""
    work = prepared(flags)
    with fit_trainer.Trainer(work, stopping.Stopping()) as trainer:
        trainer.run()
        return work, [training.host_state()["trained"] for training in trainer.learners]


def assert_close(actual, expected, tolerance):
    actual, expected = flatten_dict(actual, sep="/"), flatten_dict(expected, sep="/")
    assert actual.keys() == expected.keys()
    for path, leaf in actual.items():
        assert (leaf is None) == (expected[path] is None)
        if leaf is None:  # frozen
            continue
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=tolerance, err_msg=path)


@pytest.mark.slow
def test_one_adapter_for_two_tasks_is_the_loop_written_by_hand(tiny_backbone, data_dir, tmp_path):
    """Each step takes a batch of one task and updates shared parameters and that task's head."""
    work, (shared,) = trained(flags_of(tiny_backbone, data_dir, tmp_path / "run"))
    order = work.order
    assert len(order) == 2 * (3 + 5)
    assert set(order) == {0, 1}
    (learner,) = work.learners
    params, frozen = cj.partition(learner.params, learner.labels)
    heads = {task_run.name: task_run.params["classifier"] for task_run in work.task_runs}
    assert [heads[name]["kernel"].shape[1] for name in ("rte", "cb")] == [2, 3]
    assert cj.count(learner.params, learner.labels).groups["head"] == (5 * 25, 5 * 25)
    warmup = optax.linear_schedule(0.0, 1e-2, round(0.1 * 16))
    decay = optax.linear_schedule(1e-2, 0.0, 16 - round(0.1 * 16))
    schedule = optax.join_schedules([warmup, decay], [round(0.1 * 16)])
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
    state = tx.init(params)
    streams = [rows_of(task_run, 8) for task_run in work.task_runs]

    def loss(params, batch, task_run):
        whole = cj.merge(params, frozen)
        own = {**whole, "classifier": whole["classifier"][task_run.name]}
        names = ("input_ids", "attention_mask", "token_type_ids")
        logits = task_run.model.apply({"params": own}, *(batch[name] for name in names))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return jnp.sum(losses * batch["weights"]) / batch["weights"].sum()

    slopes = [
        jax.jit(jax.grad(functools.partial(loss, task_run=task_run))) for task_run in work.task_runs
    ]
    for task_run in order:
        updates, state = tx.update(
            slopes[task_run](params, dict(next(streams[task_run]))), state, params
        )
        params = optax.apply_updates(params, updates)
    # Adam divides by square roots that may be tiny.
    assert_close(shared, params, 2e-5)
    with pytest.raises(AssertionError):
        assert_close(shared, cj.partition(learner.params, learner.labels)[0], 1e-3)


def rows_of(task_run, size):
    """Yields the batches of a task, epoch after epoch."""
    for epoch in itertools.count():
        yield from batching.batches(
            task_run.encoded["train"], size, shuffle=True, seed=0, epoch=epoch
        )


@pytest.mark.slow
def test_an_adapter_for_each_task_is_that_of_a_run_of_its_own(tiny_backbone, data_dir, tmp_path):
    flags = {"adapters": "per_task", "backbone-dropout": 0.1}
    work, both = trained(flags_of(tiny_backbone, data_dir, tmp_path / "both", **flags))
    steps = int((work.order == 1).sum())
    flags |= {"task": "cb", "max-steps": steps, "epochs": 9}
    _, (alone,) = trained(flags_of(tiny_backbone, data_dir, tmp_path / "cb", **flags))
    jax.tree.map(np.testing.assert_array_equal, both[1], alone)


@pytest.mark.slow
def test_a_mixture_that_is_stopped_ends_with_the_same_bytes(
    tiny_t5, data_dir, tmp_path, monkeypatch, capsys
):
    outputs = tmp_path / "whole", tmp_path / "stopped"
    flags = [flags_of(tiny_t5, data_dir, output) for output in outputs]
    assert main(["fit", *flags[0]]) == 0

    def fit_until(place, number):
        method, calls = getattr(fit_trainer.Trainer, place), []

        def stop(trainer, *arguments, **keywords):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return method(trainer, *arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(fit_trainer.Trainer, place, stop)
            assert main(["fit", *flags[1], "--resume"]) == 0
        return capsys.readouterr().out

    # First in the evaluation of the second task, after that of the first task; then within an
    # epoch.
    assert "terminated at step 8;" in fit_until("scores", 2)
    assert "terminated at step 11;" in fit_until("_dispatch", 3)
    assert main(["fit", *flags[1], "--resume"]) == 0
    left, right = ((output / "evaluations.csv").read_text() for output in outputs)
    assert left == right
    for name in ("rte", "cb"):
        left, right = (
            {path.name: path.read_bytes() for path in (output / name / "adapter").iterdir()}
            for output in outputs
        )
        assert left == right
        for file in ("curves.png", "report.md", "metrics.json"):
            assert (outputs[1] / name / file).stat().st_size > 0
    result = json.loads((outputs[1] / "metrics.json").read_text())
    assert list(result["tasks"]) == ["rte", "cb"]
    steps = [result["tasks"][name]["steps"] for name in ("rte", "cb")]
    assert sum(steps) == 16
    # `evaluate` finds the saved results, each with the head of its task.
    command = ["evaluate", "--adapter", outputs[1] / "cb" / "adapter", "--task", "cb"]
    command += ["--data-dir", data_dir, "--split", "validation", "--output", tmp_path / "out.json"]
    assert main([str(part) for part in command]) == 0
    scores = json.loads((tmp_path / "out.json").read_text())["metrics"]
    expected = result["tasks"]["cb"]["validation"]
    assert scores == pytest.approx(expected, rel=1e-5)


def test_tasks_that_do_not_go_together(tiny_backbone, data_dir, tmp_path, capsys):
    def refusal(**flags):
        assert main(["fit", *flags_of(tiny_backbone, data_dir, tmp_path / "run", **flags)]) == 2
        return capsys.readouterr().err

    assert "must be different names with commas between them" in refusal(task="rte,rte")
    assert "files are those of one task" in refusal(**{"train-file": "train.csv"})
    assert "--mixture 'temperature' must be" in refusal(mixture="temperature")
    vocabulary = flags_of(
        tiny_backbone,
        data_dir,
        tmp_path / "run",
        **{"method": "prompt-tuning-vocabulary", "prompt-length": 3},
    )
    at = vocabulary.index("--reduction-factor")
    assert main(["fit", *vocabulary[:at], *vocabulary[at + 2 :]]) == 2
    assert "give --prompt-words, or --adapters per_task" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
