import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.compute import distributed
from train.fit import logs, profiler


def record(folder, steps, **settings):
    """Writes a log of steps whose loss is a tenth of their number; returns its two tables."""
    with logs.Log(folder, **settings) as log:
        for number in steps:
            log.step(number, loss=number / 10, learning_rate=1e-3, gradient_norm=2.0)
            if number % 2 == 0:
                log.evaluation(number, "validation", {"accuracy": number / 100, "loss": 1.5})
    return rows_of(folder / logs.STEPS_NAME), rows_of(folder / logs.EVALUATIONS_NAME)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_every_step_and_evaluation_is_a_row(tmp_path):
    steps, evaluations = record(tmp_path, range(1, 4))
    assert steps[0] == ["step", *logs.QUANTITIES]
    assert steps[1:] == [[str(n), str(n / 10), "0.001", "2.0", "", ""] for n in (1, 2, 3)]
    assert evaluations == [
        ["step", "split", "metric", "value"],
        ["2", "validation", "accuracy", "0.02"],
        ["2", "validation", "loss", "1.5"],
    ]


def test_columns_are_read_as_numbers(tmp_path):
    with logs.Log(tmp_path) as log:
        known = {"loss": 0.1, "learning_rate": 1e-3, "gradient_norm": 2.0}
        log.step(1, **known, examples_per_second=8.0, model_flops_utilisation=0.4)
        log.step(2, **known)
    columns = logs.read_steps(tmp_path)
    np.testing.assert_array_equal(columns["step"], [1, 2])
    np.testing.assert_array_equal(columns["model_flops_utilisation"], [0.4, np.nan])
    np.testing.assert_array_equal(columns["loss"], [0.1, 0.1])


def test_a_resumed_log_has_every_step_once(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    record(killed, range(1, 7))
    with (killed / logs.STEPS_NAME).open("a") as file:
        file.write("7,0.")  # the process was killed while it wrote this row
    assert record(killed, range(5, 9), resume_step=4) == record(whole, range(1, 9))


@pytest.mark.parametrize(("evaluated", "kept"), [(True, ["2", "4"]), (False, ["2"])])
def test_an_evaluation_that_comes_again_is_taken_back(tmp_path, evaluated, kept):
    with logs.Log(tmp_path) as log:
        for number in range(1, 5):
            log.step(number, loss=0.5, learning_rate=1e-3, gradient_norm=2.0)
        for number in (2, 4):
            log.evaluation(number, "validation", {"loss": 0.5})
    with logs.Log(tmp_path, resume_step=4, evaluated=evaluated):
        pass
    assert [row[0] for row in rows_of(tmp_path / logs.EVALUATIONS_NAME)] == ["step", *kept]


def test_a_new_run_leaves_nothing_of_the_last(tmp_path):
    record(tmp_path, range(1, 7))
    steps, evaluations = record(tmp_path, [1])
    assert [row[0] for row in steps] == ["step", "1"]
    assert len(evaluations) == 1


def test_flushed_rows_survive_a_kill(tmp_path):
    with logs.Log(tmp_path) as log:
        log.step(1, loss=0.5, learning_rate=1e-3, gradient_norm=2.0)
        log.flush()
        assert [row[0] for row in rows_of(tmp_path / logs.STEPS_NAME)] == ["step", "1"]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "index", lambda: 1)
    with logs.Log(tmp_path, tensorboard=True) as log:
        log.step(1, loss=0.5, learning_rate=1e-3, gradient_norm=2.0)
        log.evaluation(1, "validation", {"accuracy": 0.5})
        log.flush()
    assert not list(tmp_path.iterdir())


@pytest.mark.contract
def test_tensorboard_reads_what_was_recorded(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    record(tmp_path, range(1, 4), tensorboard=True)
    record(tmp_path, range(3, 5), tensorboard=True, resume_step=2)
    first, second = (
        [Event.FromString(x) for x in records_of(path)]
        for path in sorted((tmp_path / logs.TENSORBOARD_NAME).iterdir())
    )
    values = {(v.tag, e.step): v.simple_value for e in first for v in e.summary.value}
    assert values["train/loss", 3] == np.float32(0.3)
    assert values["train/learning_rate", 1] == np.float32(1e-3)
    assert values["validation/accuracy", 2] == np.float32(0.02)
    assert not any(tag.endswith("utilisation") for tag, _ in values)
    # TensorBoard drops the events of other files in the folder from this step on.
    start = next(e for e in second if e.session_log.status == SessionLog.START)
    assert start.step == 3
    assert {e.step for e in second if e.summary.value} == {3, 4}


def records_of(path):
    """Returns the payloads of a TFRecord file: length, its checksum, payload, its checksum."""
    content, records = path.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        records.append(content[12 : 12 + length])
        content = content[12 + length + 4 :]
    return records


def test_the_plot_has_a_panel_for_what_is_known(tmp_path):
    from matplotlib import image

    from train.fit import logs, report

    record(tmp_path, range(1, 4))
    report.plot_log(logs.read_steps(tmp_path), tmp_path / "log.png")
    pixels = image.imread(tmp_path / "log.png")
    assert pixels.shape[:2] == (3 * 2 * 120, 10 * 120)  # loss, learning rate, gradient norm


@pytest.mark.parametrize("steps", [3, 12, 20])
@pytest.mark.contract
def test_profile_of_the_steps_after_compilation(tmp_path, capsys, steps):
    double = jax.jit(lambda x: 2 * x)
    with profiler.Profiler(tmp_path) as profile:
        for number in range(steps):
            with profile.step(number):
                double(jnp.ones(3)).block_until_ready()
    traces = list(tmp_path.rglob("*.xplane.pb"))
    assert len(traces) == (steps > 10)
    assert ("no profile" in capsys.readouterr().out) == (steps <= 10)


def test_no_profile_unless_wanted(tmp_path, monkeypatch):
    with profiler.Profiler(None) as profile, profile.step(1):
        pass
    monkeypatch.setattr(distributed, "index", lambda: 1)
    with profiler.Profiler(tmp_path) as profile:
        for number in range(20):
            with profile.step(number):
                pass
    assert not list(tmp_path.iterdir())
