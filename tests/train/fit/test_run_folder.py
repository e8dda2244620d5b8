"""Tests output folders: foreign files stay, a folder has one run at a time, inputs are fixed."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from train import folders
from train.__main__ import main
from train.cli.method_flags import MethodOptions
from train.compare import runs
from train.compare.options import CompareOptions
from train.fit import grid_folder, run_record
from train.fit import run as fit_run
from train.fit.grid_folder import check_grid_folder
from train.fit.job import Job
from train.fit.options import FitOptions
from train.fit.run_folder import RunFolder, check_run_folder, open_run
from train.folders import alone, new_folder


@pytest.fixture
def options(tmp_path):
    """Returns options of a run whose files are never parsed."""
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (backbone / name).write_text(name)
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text("sentence,label\na,0\nb,1\n")
    return FitOptions(
        backbone=str(backbone),
        train_file=tmp_path / "train.csv",
        validation_file=tmp_path / "validation.csv",
        output_dir=tmp_path / "run",
    )


def contents(folder):
    """Returns name -> content of all entries of a folder; links are not followed."""
    return {
        str(path.relative_to(folder)): path.readlink()
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


def put(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}")


def told(error):
    """Returns the message of an error, which must be one short line."""
    text = str(error.value)
    assert len(text) <= 500
    assert "\n" not in text
    return text


def of_before(options):
    """Creates a run of an earlier version, which had no run ids, with all the files it wrote."""
    folder = options.output_dir
    folder.mkdir()
    settings = run_record.run_settings(options)
    (folder / "run.json").write_text(json.dumps(settings))
    ours = ["adapter/adapter.safetensors", "adapter/adapter_config.json", "checkpoints/8/state/x"]
    ours += ["tensorboard/events.out.tfevents.1", "metrics.json", "report.md", "log.csv"]
    put(folder, *ours, "curves.png", "log.png", "evaluations.csv")
    return folder


FOREIGN = {
    "report": ["report.md"],
    "backbone": ["backbone/model.safetensors"],
    "checkpoints": ["checkpoints/other_project/step_1"],
    "home": ["Documents/a.txt", "adapter/x"],
    # Not on the list of files that were found.
    "hidden": [".git/config"],
    "results": ["metrics.json"],
}


@pytest.mark.parametrize("flag", [{}, {"resume": True}, {"overwrite": True}], ids=str)
@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_others_is_refused_and_stays(name, flag, options):
    put(options.output_dir, *FOREIGN[name])
    before = contents(options.output_dir)
    with pytest.raises(ValueError, match="is not empty and holds no run of fit") as error:
        check_run_folder(dataclasses.replace(options, **flag))
    assert str(options.output_dir) in told(error)
    assert contents(options.output_dir) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "a JSON object, not a list"),
        ("[" * 100_000, "brackets are nested more than 64 deep"),
        ('{"backbone": "', "not valid JSON"),
        ("\udce9", "not UTF-8"),
        ('{"project": "thesis"}', "it has no backbone"),
        ('{"format_version": true}', "it has no"),
        (  # written by another program
            '{"backbone": 1, "task": 1, "method": 1, "seed": 0, "epochs": 1, "batch_size": 8}',
            "it lacks most settings",
        ),
    ],
)
@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_record_that_is_damaged_or_of_others(content, message, flag, options):
    put(options.output_dir, "report.md", "checkpoints/8/x")
    path = options.output_dir / "run.json"
    path.write_text(content, errors="surrogateescape", encoding="utf-8")
    before = contents(options.output_dir)
    with pytest.raises(ValueError, match=message) as error:
        check_run_folder(dataclasses.replace(options, **{flag: True}))
    assert str(path) in told(error)
    assert contents(options.output_dir) == before


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 2, "has format_version 2"),
        ("format_version", True, "format_version=True must be a whole number"),
        ("writes", "log.csv", "writes='log.csv' must be a list"),
        ("inputs", {"--backbone": []}, "inputs="),
        ("run_id", None, "run_id=None must be text"),
    ],
)
def test_a_record_with_a_field_of_another_type(field, value, message, options):
    open_run(options)
    path = options.output_dir / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=message) as error:
        check_run_folder(dataclasses.replace(options, resume=True))
    assert str(path) in told(error)


def test_a_record_cannot_have_files_of_others_removed(options):
    folder = of_before(options)
    open_run(dataclasses.replace(options, overwrite=True))
    path = folder / "run.json"
    record = json.loads(path.read_text())
    put(folder.parent, "thesis/checkpoints/1/x", "thesis/report.md")
    record["writes"] += ["../thesis/checkpoints", "../thesis/report.md", "/etc", "notes.txt"]
    path.write_text(json.dumps(record))
    put(folder, "notes.txt", "log.csv")
    open_run(dataclasses.replace(options, overwrite=True))
    assert (folder / "notes.txt").exists()
    assert not (folder / "log.csv").exists()
    assert len(contents(folder.parent / "thesis")) == 4


def test_overwriting_a_run_of_before_removes_its_files_alone(options):
    folder = of_before(options)
    mine = ["backbone/model.safetensors", "profile/photo.jpg", "thesis.txt", "adapter/notes.txt"]
    mine += ["tensorboard/plan.md", "checkpoints/best.txt"]
    put(folder, *mine)
    overwrite = dataclasses.replace(options, overwrite=True)
    check_run_folder(overwrite)
    open_run(overwrite)
    left = contents(folder)
    assert sorted(name for name in left if left[name]) == sorted([*mine, "run.json"])
    assert json.loads(left["run.json"])["format_version"] == 1


def test_a_run_of_before_is_resumed_and_stays_one(options):
    folder = of_before(options)
    before = contents(folder)
    resume = dataclasses.replace(options, resume=True)
    with RunFolder(resume) as run:
        run.open()
    assert contents(folder) == before
    # A run of a version that lacked an option behaves like one with the option's default.
    path = folder / "run.json"
    settings = json.loads(path.read_text())
    for name in ("score_step", "max_evaluations", "remat", "num_devices"):
        del settings[name]
    path.write_text(json.dumps(settings))
    check_run_folder(resume)
    with pytest.raises(ValueError, match=r"score_step was 0.2, now 0.5") as error:
        check_run_folder(dataclasses.replace(resume, score_step=0.5))
    told(error)


def test_a_run_writes_over_nothing_that_it_did_not_write(options):
    """A run with TensorBoard or with several tasks replaces a run without, but no foreign files."""
    open_run(options)
    put(options.output_dir, "rte/report.md", "profile/photo.jpg")
    overwrite = dataclasses.replace(options, overwrite=True)
    check_run_folder(overwrite)
    several = {"task": "rte,cb", "train_file": None, "validation_file": None}
    for changes in ({"profile": True}, several):
        with pytest.raises(ValueError, match=r"is in the way: the run in .* did not write it"):
            check_run_folder(dataclasses.replace(overwrite, **changes))


@pytest.mark.parametrize("name", ["checkpoints", "report.md", "adapter", "checkpoints/8"])
def test_nothing_behind_a_link_is_removed(name, options, tmp_path):
    folder = of_before(options)
    elsewhere = tmp_path / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is a symbolic link, and its target is never") as error:
        check_run_folder(dataclasses.replace(options, overwrite=True))
    assert str(folder / name) in told(error)
    with pytest.raises(ValueError, match="is a symbolic link"):
        open_run(dataclasses.replace(options, overwrite=True))
    assert contents(tmp_path) == before
    if name == "checkpoints":  # on a larger disk, where a run continues
        check_run_folder(dataclasses.replace(options, resume=True))


@pytest.mark.parametrize(
    ("name", "kind"), [("checkpoints", "a file"), ("adapter", "a file"), ("log.csv", "a folder")]
)
@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_file_for_a_folder_is_found_before_training(name, kind, flag, options):
    folder = of_before(options)
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("kept")
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(ValueError, match=f"{name} is {kind}, not a") as error:
        check_run_folder(dataclasses.replace(options, **{flag: True}))
    told(error)


def test_what_cannot_be_removed_is_an_error(options, monkeypatch):
    """The system's error is simulated, since root, who often runs the tests, may do anything."""
    folder = of_before(options)

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(PermissionError):
        open_run(dataclasses.replace(options, overwrite=True))
    assert "format_version" not in json.loads((folder / "run.json").read_text())


def test_what_a_run_reads_is_not_where_it_writes(options):
    folder = options.output_dir
    open_run(options)
    overwrite = dataclasses.replace(options, overwrite=True)
    shutil.copytree(options.backbone, folder / "adapter")
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    read = {"backbone": str(folder / "adapter")}
    composed = {"method": f"stack(a={folder / 'adapter'}, b=compacter++)"}
    for changes in (read, composed, {"train_file": folder / "adapter" / "model.safetensors"}):
        with pytest.raises(ValueError, match=r"lies in .*, which the run writes") as error:
            check_run_folder(dataclasses.replace(overwrite, **changes))
        told(error)


# --- one run to a folder ------------------------------------------------------------------------


def test_a_lock_lasts_as_long_as_its_process(tmp_path, capsys):
    with alone(tmp_path):
        with pytest.raises(ValueError, match="another process works in") as error, alone(tmp_path):
            pass
        told(error)
    hold = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=1)"
    command = [sys.executable, "-S", "-c", f"{hold}; sys.stdin.read()", str(tmp_path / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match="another process works in"), alone(tmp_path):
            pass
        process.kill()
        with alone(tmp_path, waiting="waiting"):
            pass
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(OSError, match="lock"), alone(tmp_path):
        pass
    assert not (tmp_path / "thesis.txt").exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folders.fcntl, "flock", refuse)
    with alone(tmp_path):
        assert (
            "does not support locks; make sure that no other run works there"
            in capsys.readouterr().out
        )


def test_a_second_run_in_a_folder_is_refused(options, capsys):
    flags = ["--backbone", options.backbone, "--output-dir", str(options.output_dir)]
    flags += ["--train-file", str(options.train_file)]
    flags += ["--validation-file", str(options.validation_file)]
    with RunFolder(options) as first, RunFolder(options) as second:
        first.open()
        with pytest.raises(ValueError, match="another process works in"):
            second.open()  # both have found it empty
        for flag in ("--resume", "--overwrite"):
            assert main(["fit", *flags, flag]) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: another process works in ")
            assert error.count("\n") == 1
    with RunFolder(dataclasses.replace(options, resume=True)) as third:
        third.open()


# --- several runs -------------------------------------------------------------------------------


def test_folders_of_several_runs(tmp_path):
    names = ["seed-0", "seed-1"]
    check_grid_folder(tmp_path / "none", names)
    put(tmp_path, "seed-0/fit.log", "seed-1/flags.json")  # like the start of `compare`
    check_grid_folder(tmp_path, names)
    put(tmp_path, "report.md")
    with pytest.raises(ValueError, match="is not empty and holds no runs of fit"):
        check_grid_folder(tmp_path, names)
    grid_folder.open_grid(tmp_path)
    check_grid_folder(tmp_path, names)
    (tmp_path / "grid.json").unlink()
    results = {"runs": {}, "summary": [], "failed": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(results))  # written before runs had a record
    check_grid_folder(tmp_path, names)


@pytest.mark.parametrize("names", [["report.md"], ["results.json", "notes/a.txt"], ["runs/a.txt"]])
def test_a_comparison_in_a_folder_of_others(names, options, tmp_path, capsys):
    given = CompareOptions(
        **{name: getattr(options, name) for name in ("backbone", "train_file", "validation_file")},
        output_dir=tmp_path / "out",
        method_options=MethodOptions(),
    )
    runs._check_folder(given)
    put(given.output_dir, *names)
    with pytest.raises(ValueError, match="is not empty and holds no comparison") as error:
        runs._check_folder(given)
    told(error)
    # Written before runs had a record.
    put(given.output_dir, "runs/custom/all/lora/seed-0/flags.json")
    runs._check_folder(given)
    data = given.output_dir / "runs" / "train.csv"
    put(given.output_dir, "runs/train.csv")
    with pytest.raises(ValueError, match=r"--train-file: .* lies in"):
        runs._check_folder(dataclasses.replace(given, train_file=data))


def test_a_run_of_a_comparison_clears_its_own_files(tmp_path):
    run = runs.Run("movie", None, "lora", 0, tmp_path / "seed-0", ())
    put(run.folder, "notes.txt", "adapter/adapter.safetensors", "metrics.json", "fit.log")
    run.clear()
    assert list(contents(run.folder)) == ["notes.txt"]


# --- resuming with the same inputs --------------------------------------------------------------


def test_inputs_that_changed_are_named(options, tmp_path):
    put(tmp_path, "a/adapter_config.json", "a/adapter.safetensors", "data/rte/train-0.parquet")
    composed = dataclasses.replace(options, method=f"stack(old={tmp_path / 'a'}, new=lora)")
    benchmark = dataclasses.replace(
        options, task="rte", train_file=None, validation_file=None, data_dir=tmp_path / "data"
    )
    backbone = options.backbone + "/"
    cases = [
        (options, str(options.train_file), "--train-file: train.csv has changed"),
        (options, str(options.validation_file), "--validation-file: validation.csv has changed"),
        (options, backbone + "model.safetensors", "--backbone: model.safetensors has changed"),
        (options, backbone + "config.json", "--backbone: config.json has changed"),
        (options, backbone + "tokenizer.json", "--backbone: tokenizer.json has changed"),
        (options, backbone + "added_tokens.json", "--backbone: added_tokens.json is new"),
        (composed, f"{tmp_path}/a/adapter.safetensors", "old in --method: adapter.safetensors has"),
        (benchmark, f"{tmp_path}/data/rte/train-0.parquet", "--data-dir of rte: train-0.parquet"),
        (benchmark, f"{tmp_path}/data/rte/train-1.parquet", "train-1.parquet is new"),
    ]
    for number, (given, path, message) in enumerate(cases):
        case = dataclasses.replace(given, output_dir=tmp_path / f"run-{number}")
        open_run(case)
        resume = dataclasses.replace(case, resume=True)
        check_run_folder(resume)
        with open(path, "a") as file:
            file.write("x")
        with pytest.raises(ValueError, match=r"was started with other data or another") as error:
            check_run_folder(resume)
        assert message in told(error)


def test_files_are_hashed_once(options, monkeypatch):
    from train import fingerprints

    fingerprints._sha256.cache_clear()
    open_run(options)
    check_run_folder(dataclasses.replace(options, resume=True))
    assert fingerprints._sha256.cache_info().misses == 5
    found = json.loads((options.output_dir / "run.json").read_text())["inputs"]
    # printf config.json | sha256sum
    wanted = "587cb980af76fdc7e52369fd0b9d926dff266976b6f8ac631e358fecc49ff8cf"
    assert found["--backbone"]["config.json"] == {"bytes": 11, "sha256": wanted}


# --- folders that appear at once ----------------------------------------------------------------


def test_new_folders_leave_those_of_others_alone(tmp_path):
    put(tmp_path, ".x.tmp/notes.txt", f".x.{os.getpid()}.tmp/notes.txt", ".x.old/notes.txt")
    before = contents(tmp_path)
    target = tmp_path / "x"

    def write(name, folder=target):
        with new_folder(folder, replace=True) as temporary:
            put(temporary, name)
            if name == "half.txt":
                raise KeyboardInterrupt

    targets = [tmp_path / f"x{i}" for i in range(8)]
    threads = [threading.Thread(target=write, args=("a", folder)) for folder in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for folder in targets:
        assert list(contents(folder)) == ["a"]
        shutil.rmtree(folder)
    write("first.txt")
    write("last.txt")
    assert list(contents(target)) == ["last.txt"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()
    with pytest.raises(KeyboardInterrupt):
        write("half.txt")
    assert list(contents(target)) == ["last.txt"]
    shutil.rmtree(target)
    assert contents(tmp_path) == before


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_no_room_is_found_before_training(options, monkeypatch):
    import numpy as np

    weights = {"w": np.zeros(250_000, np.float32)}
    job = Job(options, (), ())
    learner = type("Learner", (), {"params": weights, "labels": {"w": "train"}})
    job = dataclasses.replace(job, learners=(learner,))
    usage = type(shutil.disk_usage(options.backbone))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 3 * 10**6))
    with pytest.raises(OSError, match=r"has 3.0 MB free, but .* takes 4.0 MB; make room"):
        fit_run.check_room([job])
    # The space of replaced files counts as free.
    folder = of_before(options)
    with (folder / "checkpoints" / "8" / "state" / "x").open("wb") as file:
        file.truncate(10**6)
    fit_run.check_room(
        [dataclasses.replace(job, options=dataclasses.replace(options, overwrite=True))]
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 5 * 10**6))
    fit_run.check_room([job])
