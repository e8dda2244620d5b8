"""Tests runs that are killed, terminated, out of disk space, or have a damaged checkpoint."""

import io
import json
import multiprocessing
import os
import resource
import signal
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest

from benchmarks.survive import survive
from tests.train.cli.test_cli import adapter_bytes, fit_flags, write_splits
from train.__main__ import main
from train.fit import trainer as fit_trainer
from train.fit.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("files"), {"train": 120, "validation": 40})


def flags_of(backbone, files, **flags):
    """Returns flags without an output folder; an epoch has 15 steps."""
    flags = {"epochs": 4, "checkpoint-steps": 1, "backbone-dropout": 0.1, **flags}
    given = fit_flags(backbone, files, "none", **flags)
    at = given.index("--output-dir")
    return given[:at] + given[at + 2 :]


@pytest.mark.slow
def test_a_run_killed_where_it_hurts_ends_with_the_same_bytes(tiny_backbone, files, tmp_path):
    """The kills hit a step, an evaluation, and the writing of a checkpoint."""
    flags = flags_of(tiny_backbone, files, epochs=2)
    aims = ("step", "evaluation", "writing")
    kills = survive(flags, tmp_path / "runs", kills=3, seed=0, aims=aims)
    assert tuple(kill.aimed for kill in kills) == aims
    step, evaluation, writing = kills
    # The last checkpoint may not have reached the disk yet.
    assert 7 <= step.step <= 8
    assert 13 <= evaluation.step <= 14
    assert writing.step >= 15
    assert writing.writing
    assert all((kill.resumed or 0) >= kill.step for kill in kills)  # no written checkpoint is lost


@pytest.mark.slow
def test_two_processes_killed_end_with_the_same_bytes(tiny_backbone, files, tmp_path):
    flags = flags_of(tiny_backbone, files, epochs=2)
    (kill,) = survive(
        flags, tmp_path / "runs", kills=1, processes=2, devices=2, seed=0, aims=("writing",)
    )
    assert kill.writing
    assert (kill.resumed or 0) >= kill.step


@pytest.fixture(scope="module")
def whole(tiny_backbone, files, tmp_path_factory):
    """Returns the folder of a run without an interruption."""
    output = tmp_path_factory.mktemp("whole") / "run"
    flags = flags_of(tiny_backbone, files, **{"epochs": 3, "checkpoint-steps": 4})
    assert main(["fit", *flags, "--output-dir", str(output)]) == 0
    return output


def fit_until(monkeypatch, place, number, sent, flags, output):
    """Runs fit with a signal at the n-th call of a method of the trainer; returns the exit code."""
    original, calls = getattr(fit_trainer.Trainer, place), []

    def method(trainer, *arguments, **keywords):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), sent)
        return original(trainer, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(fit_trainer.Trainer, place, method)
        return main(["fit", *flags, "--output-dir", str(output), "--resume"])


@pytest.mark.slow
def test_termination_writes_a_checkpoint_and_is_no_failure(
    tiny_backbone, files, whole, tmp_path, monkeypatch, capsys
):
    output, flags = (
        tmp_path / "run",
        flags_of(tiny_backbone, files, **{"epochs": 3, "checkpoint-steps": 4}),
    )
    run = lambda *where: fit_until(monkeypatch, *where, flags, output)  # noqa: E731
    assert run("_dispatch", 6, signal.SIGTERM) == 0
    assert "terminated at step 6; the training state is in" in capsys.readouterr().out
    # In the evaluation after the first epoch: the training state is kept, the evaluation is not.
    assert run("scores", 1, signal.SIGTERM) == 0
    assert "terminated at step 15;" in capsys.readouterr().out
    assert not (output / "adapter").exists()
    assert run("_dispatch", 5, signal.SIGINT) == 130
    captured = capsys.readouterr()
    assert "interrupted at step 20;" in captured.err
    assert "resumed at step 15, epoch 1" in captured.out
    assert "epoch 1: train loss" in captured.err + captured.out
    assert run("_dispatch", 10_000, signal.SIGTERM) == 0
    assert adapter_bytes(output) == adapter_bytes(whole)
    log = [(folder / "log.csv").read_text().splitlines() for folder in (output, whole)]
    assert len(log[0]) == 1 + 45
    assert [x.split(",")[:4] for x in log[0]] == [x.split(",")[:4] for x in log[1]]


@pytest.mark.slow
def test_termination_before_the_first_step(tiny_backbone, files, tmp_path, monkeypatch, capsys):
    flags = flags_of(tiny_backbone, files)
    output = tmp_path / "run"
    assert fit_until(monkeypatch, "__init__", 1, signal.SIGTERM, flags, output) == 0
    assert "terminated between two checkpoints" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    tiny_backbone, files, whole, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "run"
    flags = flags_of(tiny_backbone, files, **{"epochs": 3, "checkpoint-steps": 4})
    assert fit_until(monkeypatch, "_dispatch", 22, signal.SIGTERM, flags, output) == 0
    assert sorted(int(p.name) for p in (output / "checkpoints").iterdir()) == [15, 20, 22]
    damage(output / "checkpoints" / "22")
    capsys.readouterr()
    assert main(["fit", *flags, "--output-dir", str(output), "--resume"]) == 0
    captured = capsys.readouterr()
    assert "the checkpoint of step 22 cannot be read: " in captured.out + captured.err
    assert "resumed at step 20, epoch 2" in captured.out
    assert adapter_bytes(output) == adapter_bytes(whole)


def damage(checkpoint):
    """Flips a bit in the middle of every file of the arrays in a checkpoint."""
    files = [path for path in checkpoint.glob("state/**/d/*") if path.is_file()]
    assert files
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


STATE = {"one": {"w": np.array([[1.5, -2.0]]), "step": np.array(3)}}


@pytest.mark.contract
def test_no_checkpoint_that_can_be_read(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(STATE, print) is None
        for step in (1, 2, 3):
            checkpoints.save(step, STATE, {"epoch": step}, best=step == 1)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(STATE, print)
        assert restored.step == 3
        assert restored.progress == {"epoch": 3}
        assert restored.state["one"]["w"].tolist() == [[1.5, -2.0]]
        # The best checkpoint stays, whether later ones come from this process or from another.
        checkpoints.save(4, STATE, {"epoch": 4})
        checkpoints.finish()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "4"]
        checkpoints.save(5, STATE, {"epoch": 5}, best=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]
    for path in tmp_path.iterdir():
        damage(path)
    with (
        Checkpoints(tmp_path, keep=2) as checkpoints,
        pytest.raises(ValueError, match=r"no checkpoint in .* can be read \(step 5: .*; step 4: "),
    ):
        checkpoints.restore(STATE, print)


def fit_with_small_files(flags, largest, send):
    """Runs `fit` with a limit on the size of files; sends its exit code and its output."""
    with io.StringIO() as output, redirect_stdout(output), redirect_stderr(output):
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        send.put((main(["fit", *flags]), output.getvalue()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "largest", "message"),
    [
        (1, 3000, "a checkpoint could not be written to"),
        (0, 3000, "safetensors: file too large"),  # the adapter, after the first epoch
    ],
)
def test_no_room_is_one_line_and_loses_nothing(
    tiny_backbone, files, tmp_path, every, largest, message
):
    """Simulates a full disk by a limit on the size of files."""
    output = tmp_path / "run"
    flags = flags_of(tiny_backbone, files, **{"checkpoint-steps": every, "epochs": 2})
    flags += ["--output-dir", str(output)]
    context = multiprocessing.get_context("forkserver")
    received = context.Queue()
    process = context.Process(target=fit_with_small_files, args=(flags, largest, received))
    process.start()
    code, words = received.get(timeout=300)
    process.join()
    assert code == 2
    error = [line for line in words.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert "Traceback" not in words
    assert list((output / "adapter").glob("adapter*")) == []
    assert main(["fit", *flags, "--resume"]) == 0
    assert json.loads((output / "metrics.json").read_text())["steps"] == 30
