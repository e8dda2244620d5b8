"""Tests of the benchmark for accelerators: its rehearsal, its limits of time, and its programs."""

import argparse
import functools
import io
import json
import signal
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("datasets")

import compacter_jax as cj
from benchmarks import bank, contest, jax_worker
from benchmarks.accelerator import __main__ as accelerator
from benchmarks.accelerator import fast, folders, programs, right, why
from benchmarks.accelerator.scale import FULL, TOY
from benchmarks.accelerator.section import SkippedError, need, run_checks
from benchmarks.turns import ROOT
from train.compute import step
from train.fit import grid

PLATFORMS = ("cuda", "tpu")


@pytest.mark.slow
def test_a_rehearsal_makes_every_check(tmp_path):
    report = tmp_path / "report.json"
    assert accelerator.main(["--rehearse", "--minutes", "30", "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["platform"] == "cpu"
    assert list(found["sections"]) == list(accelerator.SECTIONS)
    results = {
        name: result
        for section in found["sections"].values()
        for name, result in section["checks"].items()
    }
    skipped = [name for name, result in results.items() if "skipped" in result]
    assert skipped == ["demo"]
    passed = [name for name, result in results.items() if result.get("passed")]
    assert {"bert, float32", "t5, int8", "beam search", "bank", "pmap", "kill and resume"} <= set(
        passed
    )
    timed = results["tiny t5, 2 rows, compacter++, step"]
    assert timed["of_matrix_product_rate"] > 0
    kernels = results["tiny t5, compacter++"]
    assert 0 < sum(kernel["share"] for kernel in kernels["kernels"]) <= 1 + 1e-9


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_program_is_lowered_for_a_device_that_is_not_there(platform):
    for name, make in programs.programs(TOY).items():
        program = make()
        traced = jax.jit(program.function).trace(*program.arguments)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo" in text, name


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_step_is_lowered_for_a_device_that_is_not_there(platform, dtype):
    size = TOY.largest
    model, trained, frozen = fast.prepared(size, dtype, TOY.dtype)
    labels = cj.label_params(cj.merge(trained, frozen), model.method)
    tx = cj.optimizer(optax.adamw(1e-3), labels)
    update = functools.partial(
        step.loss_and_update,
        apply=step.apply_function(model, jax_worker.INPUTS[size.family]),
        loss=jax_worker.loss_function(size),
        tx=tx,
    )
    state = step.TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))
    batch = contest.batch_of(size, model.backbone.config.vocab_size)
    traced = jax.jit(update).trace(state, frozen, batch, jax.random.key(0))
    assert "dot_general" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_runs_at_once_are_lowered_for_devices_that_are_not_there(tmp_path):
    folders.classifier(tmp_path, TOY.bank)
    options = argparse.Namespace(backbone=str(tmp_path), task="own", method="compacter++")
    options.max_length, options.runs = 16, TOY.runs
    jobs = bank._jobs(options, 2, folders.task_files(tmp_path))
    trainers = bank._trainers(jobs)
    stacked, asked = grid.StackedRuns(trainers), []
    stacked._step = lambda *arguments: asked.append(arguments) or (stacked.states, [])
    stacked.step([next(bank._batches(job)) for job in jobs])
    (arguments,) = asked
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), arguments)
    traced = jax.jit(stacked._compiled(trainers[0])).trace(*shapes)
    for platform in PLATFORMS:
        assert "dot_general" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_needed_operations_are_counted_without_weights():
    (_, bert, _) = FULL.timed
    full, compacter = (fast.flops_of_step(bert, method) for method in ("full", "compacter++"))
    tokens, d, inner, layers = bert.rows * bert.length, 768, 3072, 12
    matrices = 2 * tokens * layers * (4 * d * d + 2 * d * inner)
    # Attention adds; the last layer needs its products for the first token alone.
    assert 3 * matrices * (layers - 1) / layers < full < 3 * matrices
    # Gradients of frozen weights are a third of the operations of full fine-tuning.
    assert 0.63 < compacter / full < 0.72


# --- comparisons --------------------------------------------------------------------------------


def test_a_wrong_device_fails(monkeypatch):
    wrong = {"logits": np.ones(3), "gradients": {"a": np.ones(2)}, "loss": 1.0}
    right_ones = {"logits": np.ones(3) + 1e-3, "gradients": {"a": np.ones(2)}, "loss": 1.0}
    monkeypatch.setattr(right, "on_both", lambda program: (wrong, right_ones))
    program = programs.Program("made up", lambda: {}, ())
    result = right.like_a_cpu(lambda: program)
    assert not result["passed"]
    assert result["distances"]["logits"] == pytest.approx(1e-3 / 1.001)
    assert result["distances"]["gradients"] == 0


def test_low_precision_may_not_be_much_worse_than_on_a_cpu(monkeypatch):
    exact = {"logits": np.ones(3), "gradients": {"a": np.ones(2)}, "loss": np.ones(1)}
    monkeypatch.setitem(right._ON_CPU, TOY.bert.name, exact)

    def scaled(factor):
        return jax.tree.map(lambda x: x * (1 + factor), exact)

    for factor, passes in ((0.014, True), (0.016, False), (np.nan, False)):
        both = (scaled(factor), scaled(0.01))
        monkeypatch.setattr(right, "on_both", lambda program, both=both: both)
        assert right.low_precision(lambda: None, TOY.bert)["passed"] == passes


def test_other_tokens_fail(monkeypatch):
    tokens = np.arange(40).reshape(2, 20)
    other = tokens.copy()
    other[0, :3] = 0
    both = ({"tokens": other}, {"tokens": tokens})
    monkeypatch.setattr(right, "on_both", lambda program: both)
    result = right.same_tokens(lambda: None)
    assert result["same_tokens"] == 38 / 40  # the first of the three is 0 anyway
    assert result["passed"]
    other[1, 0] = 0
    assert not right.same_tokens(lambda: None)["passed"]


def test_the_longest_kernels_are_those_of_the_streams():
    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "process_name", "pid": 2, "args": {"name": "/host:CPU"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 5, "args": {"name": "Stream #5"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 6, "args": {"name": "XLA Ops"}},
        {"ph": "M", "name": "thread_name", "pid": 2, "tid": 5, "args": {"name": "Stream #5"}},
        *({"ph": "X", "name": "gemm", "pid": 1, "tid": 5, "ts": i, "dur": 30} for i in range(3)),
        {"ph": "X", "name": "copy", "pid": 1, "tid": 5, "ts": 9, "dur": 10},
        {"ph": "X", "name": "gemm", "pid": 1, "tid": 6, "ts": 9, "dur": 90},
        {"ph": "X", "name": "python", "pid": 2, "tid": 5, "ts": 9, "dur": 900},
    ]
    found = why.longest(events)
    assert found["kernel_seconds"] == pytest.approx(1e-4)
    assert [(k["name"], k["count"], round(k["share"], 3)) for k in found["kernels"]] == [
        ("gemm", 3, 0.9),
        ("copy", 1, 0.1),
    ]


# --- sections and their limits --------------------------------------------------------------------


def test_a_check_that_fails_does_not_stop_the_others():
    def fails():
        raise ZeroDivisionError("by zero")

    def skips():
        raise SkippedError("no such package")

    def lacks():
        import never_made  # noqa: F401

    def needs():
        need("json", "never_made.part")

    channel = io.StringIO()
    checks = {"a": fails, "b": skips, "c": lambda: {"passed": True}, "d": lacks, "e": needs}
    run_checks(checks, channel)
    first, *lines = map(json.loads, channel.getvalue().splitlines())
    assert first == {"checks": ["a", "b", "c", "d", "e"]}
    a, b, c, d, e = (line["result"] for line in lines)
    assert a["error"] == "ZeroDivisionError: by zero"
    assert not a["passed"]
    assert b["skipped"] == "no such package"
    assert c["passed"]
    assert accelerator.summary(a).startswith("FAILED, ZeroDivisionError")
    assert accelerator.summary(b) == "skipped, no such package"
    for missing in (d, e):
        assert accelerator.summary(missing) == "skipped, never_made is not installed"


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Replaces the process of every section by a script, written in Bash."""

    def write(script):
        path = tmp_path / "python"
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(accelerator.sys, "executable", str(path))
        machine = {"platform": "cpu", "device": "none", "devices": 1, "processor": "none"}
        monkeypatch.setattr(accelerator, "_machine", lambda _: {**machine, "versions": {}})

    return write


ANSWER = """{"name": "a", "result": {"passed": true, "check_seconds": 1}}"""


def test_what_a_section_has_no_time_for_is_named(pretended, tmp_path, capsys):
    pretended(f'echo \'{{"checks": ["a", "b"]}}\'; echo \'{ANSWER}\'; sleep 60')
    report = tmp_path / "a folder that is not there" / "report.json"
    flags = ["--section", "right", "--minutes", "0.02", "--json", str(report)]
    assert accelerator.main(flags) == 1
    assert "right: b: left out, 1 s were over" in capsys.readouterr().out
    (section,) = json.loads(report.read_text())["sections"].values()
    assert section["checks"]["a"]["passed"]
    assert section["left_out"] == ["b"]
    assert section["ended"] is None


def test_a_section_that_dies_says_how(pretended, tmp_path, capsys):
    pretended(f'echo \'{{"checks": ["a", "b"]}}\'; echo \'{ANSWER}\'; echo a fault >&2; exit 3')
    report = tmp_path / "report.json"
    assert accelerator.main(["--section", "why", "--json", str(report)]) == 1
    assert "why: it ended before its checks, code 3: a fault" in capsys.readouterr().out
    (section,) = json.loads(report.read_text())["sections"].values()
    assert section["ended"] == "code 3: a fault"
    pretended("sleep 60")
    assert accelerator.main(["--section", "why", "--minutes", "0.01"]) == 1
    assert "why: nothing was announced within 1 s" in capsys.readouterr().out


def test_sections_of_a_rehearsal_run_side_by_side(pretended, tmp_path, capsys):
    """Each of two sections waits until the other has begun."""
    begun = tmp_path / "begun"
    begun.mkdir()
    waits = f"touch {begun}/$$; until [ $(ls {begun} | wc -l) = 2 ]; do sleep 0.05; done"
    pretended(f"{waits}; echo '{{\"checks\": [\"a\"]}}'; echo '{ANSWER}'")
    report = tmp_path / "report.json"
    flags = ["--rehearse", "--section", "right", "--section", "why", "--minutes", "0.5"]
    assert accelerator.main([*flags, "--json", str(report)]) == 0
    sections = json.loads(report.read_text())["sections"]
    assert list(sections) == ["right", "why"]
    assert all(section["checks"]["a"]["passed"] for section in sections.values())
    assert "why: a: passed" in capsys.readouterr().out


def test_an_interrupt_ends_the_sections_of_a_rehearsal():
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        accelerator._RUNNING.add(process.pid)
        with pytest.raises(KeyboardInterrupt), accelerator._killing_if_interrupted():
            raise KeyboardInterrupt
        assert process.wait(timeout=5) == -signal.SIGKILL
    accelerator._RUNNING.discard(process.pid)


def test_a_rehearsal_compiles_quickly_unless_asked_otherwise(tmp_path):
    given = {"XLA_FLAGS": "--xla_backend_optimization_level=2", "OMP_NUM_THREADS": "3"}
    found = accelerator._rehearsing(given, tmp_path)
    assert found["XLA_FLAGS"].split() == [
        "--xla_backend_optimization_level=0",
        "--xla_backend_optimization_level=2",  # the last one counts
    ]
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)


def test_only_missing_packages_are_taken_from_wheels(tmp_path):
    for name in ("numpy-9.9-cp311-cp311-linux_x86_64.whl", "never_made-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    assert accelerator._missing(tmp_path) == [tmp_path / "never_made-1.0-py3-none-any.whl"]
    with pytest.raises(SystemExit, match=r"has no file NAME-VERSION"):
        accelerator._missing(Path(__file__).parent)


def test_bad_flags(capsys):
    for flags in (["--minutes", "0"], ["--section", "slow"], ["--minutes", "nan"]):
        with pytest.raises(SystemExit) as ended:
            accelerator.main(flags)
        assert ended.value.code == 2
    assert "must be above 0" in capsys.readouterr().err


def test_the_script_and_the_rehearsal_have_the_same_checks():
    for name in accelerator.SECTIONS:
        module = __import__(f"benchmarks.accelerator.{name}", fromlist=["checks"])
        full, toy = (module.checks(scale) for scale in (FULL, TOY))
        assert len(full) >= len(toy) > 0
    page = (ROOT / "benchmarks" / "accelerator.md").read_text()
    for name, share in accelerator.SECTIONS.items():
        assert f"| `{name}` | {share:.0%} |".replace("%", " %") in page
    assert sum(accelerator.SECTIONS.values()) == pytest.approx(1)
