"""Tests signals while files are read, checkpoints that cannot be read, and incomplete logs."""

import ctypes
import os
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import transformers

import compacter_jax as cj
from train import errors
from train.__main__ import main
from train.cli.options import HostOptions
from train.compute import distributed
from train.data import tokens
from train.errors import EndedRunError, InterruptedRunError, PreemptedRunError, StoppedRunError
from train.fit import logs, stopping
from train.fit.checkpoints import Checkpoints
from train.fit.logs import Log
from train.fit.progress import Progress

STATE = {"one": {"w": np.array([[1.5, -2.0]]), "step": np.array(3)}}
SIGNALS = [(signal.SIGTERM, PreemptedRunError, 0), (signal.SIGINT, InterruptedRunError, 130)]


def sending(original, number, *, wrapped=False):
    """Wraps a function that first gets a signal; the wrapper may convert every exception."""

    def function(*arguments, **keywords):
        try:
            os.kill(os.getpid(), number)
            return original(*arguments, **keywords)
        except BaseException as error:
            if wrapped:
                raise RuntimeError("cannot be read") from error
            raise

    return function


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_signal_is_no_exception():
    for error in (StoppedRunError, PreemptedRunError, InterruptedRunError):
        assert not issubclass(error, Exception)
    for error in (EndedRunError, errors.NonFiniteLossError, errors.FailedRunsError):
        assert issubclass(error, Exception)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves checkpoints of three steps of a run."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(folder, keep=3, run_id="one") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, STATE, {"epoch": step})
    return folder


def restored(folder, run_id="one", notes=None, progress_of=dict):
    """Restores the newest checkpoint of a folder; orbax is closed on return."""
    with Checkpoints(folder, keep=3, run_id=run_id) as checkpoints:
        note = (notes if notes is not None else []).append
        return checkpoints.restore(STATE, note, progress_of)


@pytest.mark.contract
@pytest.mark.parametrize(("number", "kind", "code"), SIGNALS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_signal_in_a_restore_deletes_nothing(number, kind, code, wrapped, saved, monkeypatch):
    restore = sending(ocp.CheckpointManager.restore, number, wrapped=wrapped)
    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    before = names(saved)
    with pytest.raises(kind, match="nothing is lost") as error, stopping.handled():
        restored(saved)
    assert error.value.exit_code == code
    assert names(saved) == before == ["1", "2", "3"]
    monkeypatch.undo()
    assert restored(saved).step == 3


@pytest.mark.parametrize(("number", "kind", "code"), SIGNALS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_signal_while_a_tokenizer_is_read(
    number, kind, code, wrapped, tiny_backbone, monkeypatch
):
    read = sending(transformers.AutoTokenizer.from_pretrained, number, wrapped=wrapped)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", read)
    limits = {"vocab_size": 99, "max_position_embeddings": 64, "max_length": 8}
    with pytest.raises(kind), stopping.handled():
        tokens.load_tokenizer(tiny_backbone, **limits)


def test_a_failure_after_a_signal_that_waited_is_told():
    """The failure is reported, such as that of a checkpoint that could not be written."""

    def run():
        with stopping.handled() as stop, stop.delayed():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked()
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        run()


@pytest.mark.parametrize(("number", "kind", "code"), SIGNALS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_signal_while_a_configuration_is_read(
    number, kind, code, wrapped, tiny_backbone, tmp_path, monkeypatch, capsys
):
    read = sending(transformers.AutoConfig.from_pretrained, number, wrapped=wrapped)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", read)
    with pytest.raises(kind), stopping.handled():
        cj.load_backbone(tiny_backbone)
    rows = tmp_path / "rows.csv"
    rows.write_text("sentence,label\ngood,0\nbad,1\n")
    flags = ["fit", "--backbone", str(tiny_backbone), "--output-dir", str(tmp_path / "run")]
    assert main([*flags, "--train-file", str(rows), "--validation-file", str(rows)]) == code
    captured = capsys.readouterr()
    assert "nothing is lost, go on with --resume" in captured.out + captured.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "kind", "code"), SIGNALS)
def test_a_signal_to_one_of_several_processes(number, kind, code, monkeypatch):
    """JAX installs its own handler, which Python does not see."""

    def join(*_):
        ignore = ctypes.c_void_p(1)
        ctypes.CDLL(None).signal(number, ignore)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(jax.distributed, "initialize", join)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)

    def run():
        with stopping.handled():
            distributed.start(HostOptions(distributed=True))
            os.kill(os.getpid(), number)

    with pytest.raises(kind) as error:
        run()
    assert error.value.exit_code == code


def test_a_failure_of_the_first_process_ends_the_others(monkeypatch):
    def refuse():
        raise ValueError("holds a run")

    with pytest.raises(ValueError, match="holds a run"):
        distributed.of_first(refuse)
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    distributed.of_first(refuse)  # must not be called
    monkeypatch.setattr(distributed, "any_of", lambda _: True)
    with pytest.raises(ValueError, match="the first process did not begin the run"):
        distributed.of_first(refuse)


# --- checkpoints --------------------------------------------------------------------------------


def test_checkpoints_of_another_run_are_not_taken(saved):
    for run_id in ("other", None):
        with pytest.raises(ValueError, match=r"3 is not a checkpoint of the run") as error:
            restored(saved, run_id)
        assert len(str(error.value)) <= 500
    assert names(saved) == ["1", "2", "3"]


def test_what_cannot_be_read_is_set_aside(tmp_path):
    with Checkpoints(tmp_path, keep=4) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, STATE, {"epoch": step, **({"new": 1} if step == 3 else {})})
        checkpoints.save(4, STATE, {"epoch": "x" * 10_000})
    (tmp_path / "2" / "checksums.json").write_text("[" * 100_000)
    notes = []
    found = restored(tmp_path, None, notes, Progress.from_json)
    assert (found.step, found.progress) == (1, Progress(epoch=1))
    assert names(tmp_path) == ["1", "2.unreadable-0", "3.unreadable-0", "4.unreadable-0"]
    assert "its progress: epoch='xx" in notes[0]
    assert "its progress has new, which this version of the package does not know" in notes[1]
    assert "brackets are nested more than 64 deep" in notes[2]
    assert max(map(len, notes)) <= 500
    with Checkpoints(tmp_path, keep=4) as checkpoints:  # the next run continues next to them
        assert checkpoints.restore(STATE, notes.append).step == 1
        checkpoints.save(2, STATE, {"epoch": 2})
    assert restored(tmp_path, None).step == 2


# --- logs ---------------------------------------------------------------------------------------

ROW = {"loss": 0.5, "learning_rate": 1e-3, "gradient_norm": 1.0}


@pytest.fixture
def recorded(tmp_path):
    """Writes the log of three steps and two evaluations; returns its folder."""
    with Log(tmp_path) as log:
        for step in (1, 2, 3):
            log.step(step, **ROW)
            if step > 1:
                log.evaluation(step, "validation", {"loss": 1.0})
    return tmp_path


def test_a_log_goes_on_where_the_checkpoint_is(recorded):
    before = (recorded / "log.csv").read_text().splitlines()
    with (recorded / "log.csv").open("a") as file:
        file.write("4,0.5\n5,")  # rows after the checkpoint, left by a kill
    with Log(recorded, resume_step=3, evaluations=2) as log:
        log.step(4, **ROW)
    after = (recorded / "log.csv").read_text().splitlines()
    assert after[:-1] == before
    assert after[-1].startswith("4,")


def without(path, text):
    path.write_text(path.read_text().replace(text, ""))


DAMAGES = {
    "removed": ("log.csv", lambda path: path.unlink(), "step 1 is not in its place"),
    "begins late": ("log.csv", lambda path: without(path, "1,0.5,0.001,1.0,,\n"), "step 1 is"),
    "lacks a step": ("log.csv", lambda path: without(path, "2,0.5,0.001,1.0,,\n"), "step 2 is"),
    "a step twice": (
        "log.csv",
        lambda path: path.write_text(path.read_text().replace("\n2,", "\n1,")),
        "step 2 is",
    ),
    "no number": ("log.csv", lambda path: path.write_text("step\n1,x,1,1,,\n"), "after row 0"),
    "no step": ("log.csv", lambda path: path.write_text("step\nx,1,1,1,,\n"), "after row 0"),
    "bytes": ("log.csv", lambda path: path.write_bytes(b"\xff\xfe"), "is damaged"),
    "a field": ("log.csv", lambda path: path.write_text("a\n" + "1" * 200_000), "is damaged"),
    "evaluations": ("evaluations.csv", lambda path: path.unlink(), "has 0 evaluations up to"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_log_that_lacks_steps_is_an_error(name, recorded):
    file, damage, message = DAMAGES[name]
    damage(recorded / file)
    before = {path.name: path.read_bytes() for path in recorded.iterdir()}
    with pytest.raises(ValueError, match=message) as error:
        Log(recorded, resume_step=3, evaluations=2)
    assert str(recorded / file) in str(error.value)
    assert len(str(error.value)) <= 500
    assert {path.name: path.read_bytes() for path in recorded.iterdir()} == before


def test_a_log_is_read_as_numbers(recorded):
    assert logs.read_steps(recorded)["step"].tolist() == [1, 2, 3]
    assert np.isnan(logs.read_steps(recorded)["examples_per_second"]).all()
    with (recorded / "log.csv").open("a") as file:
        file.write("4,zero,1,1,,\n")
    with pytest.raises(ValueError, match=r"log.csv is damaged: could not convert"):
        logs.read_steps(recorded)
