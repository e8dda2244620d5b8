"""The command `compare`: its plan, its runs, its tables and figures."""

import dataclasses
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.parse
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK
from matplotlib import image

import compacter_jax as cj
from tests.train.cli.test_cli import refusal, write_splits
from train import tasks
from train.__main__ import main
from train.cli.method_flags import MethodOptions
from train.compare import figures, plan
from train.compare import report as compare_report
from train.compare.options import CompareOptions
from train.compare.summaries import summaries
from train.fit import job, timing
from train.folders import alone
from train.objectives import learning_rates, prompt_init


@pytest.fixture(autouse=True)
def working_folder(tmp_path_factory, monkeypatch):
    """A folder with `DIR`, which is as much of a BERT as a plan reads."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "DIR").mkdir()
    (folder / "DIR" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    monkeypatch.chdir(folder)


# --- learning rates -----------------------------------------------------------------------------


def test_every_preset_has_learning_rates():
    assert set(learning_rates.CLASSIFIER) == set(cj.presets())
    rows = re.split(r"\n *\| `", cj.preset.__doc__)[1:]  # of `| name | what | rate | source |`
    names, rates = [row.partition("`")[0] for row in rows], [row.split("|")[2] for row in rows]
    documented = dict(zip(names, map(float, rates), strict=True))
    assert documented == learning_rates.TEXT_TO_TEXT


# --- the tokens of prompts ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_backbone)


def test_the_commonest_tokens_of_the_training_texts(tokenizer):
    generator = np.random.default_rng(0)
    words = ["a", "the", "film", "good", "bad", "unheard"]  # the last is [UNK], a special token
    texts = [
        " ".join(generator.choice(words, 7, p=[0.1, 0.2, 0.2, 0.3, 0.1, 0.1])) for _ in "ab" * 9
    ]
    counts = Counter(word for text in texts for word in text.split() if word != "unheard")
    vocabulary = tokenizer.get_vocab()
    order = sorted(counts, key=lambda word: (-counts[word], vocabulary[word]))
    expected = tuple(vocabulary[word] for word in order)
    assert prompt_init.most_common_tokens(texts, tokenizer, 9) == expected
    assert prompt_init.most_common_tokens(texts, tokenizer, 2) == expected[:2]
    with pytest.raises(ValueError, match="have no tokens"):
        prompt_init.most_common_tokens(["unheard"], tokenizer, 2)


def test_prompts_take_words_or_the_texts_of_a_task(tokenizer):
    method = cj.preset("prompt-tuning-vocabulary", prompt_length=3)
    rows = {"sentence": ["good film", "good"], "sentence2": ["bad good", "film"]}
    task = tasks.Task("own", "classification", ("0", "1"), {"train": rows})
    names = lambda method: tokenizer.convert_ids_to_tokens(method.prompt_token_ids)  # noqa: E731
    assert names(prompt_init.with_tokens(method, None, task, tokenizer)) == ["good", "film", "bad"]
    assert names(prompt_init.with_tokens(method, "awful good", task, tokenizer)) == [
        "awful",
        "good",
    ]
    given = method.replace(prompt_token_ids=(7,))
    assert prompt_init.with_tokens(given, None, task, tokenizer) is given
    for words in ("", "a a a a"):
        with pytest.raises(ValueError, match="give 1 to 3 tokens"):
            prompt_init.with_tokens(method, words, task, tokenizer)


# --- what a run costs ---------------------------------------------------------------------------


def test_the_clock_leaves_out_steps_in_which_something_was_compiled(monkeypatch):
    times = iter([0.0, 10.0, 12.0, 15.0, 19.0, 100.0, 101.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    clock = timing.StepClock([])
    short, long = {"ids": np.zeros((2, 16))}, {"ids": np.zeros((2, 32))}
    clock.start()
    clock.dispatched(short)  # compiled
    clock.dispatched(short)
    clock.finished()  # the first, 10 s: left out
    clock.dispatched(short)
    clock.finished()  # 2 s
    clock.dispatched(long)  # compiled while the third is under way
    clock.finished()  # 3 s: left out
    clock.finished()  # both may have been done at 15.0: left out
    clock.start()
    clock.dispatched(long)
    clock.finished()
    assert clock.seconds == [2.0, 1.0]


def test_the_peak_of_memory_is_the_process_s_own():
    """`ru_maxrss` of Linux would be that of the process which started it."""
    held = np.ones(2**27, np.uint8)  # 128 MiB
    script = "from train.fit.timing import peak_memory; print(peak_memory())"
    script = f"import numpy; {script}; x = numpy.ones(2**26); print(peak_memory())"
    run = [sys.executable, "-c", script]
    output = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    before, after = map(int, output.split())
    assert timing.peak_memory() > held.nbytes
    assert 2**29 * 0.9 < after - before < 2**29 * 1.1


@pytest.mark.parametrize(
    ("epochs", "most", "expected"),
    [(3, None, [0, 1, 2]), (10, 3, [3, 7, 9]), (100, 10, range(9, 100, 10)), (2, 5, [0, 1])],
)
def test_evaluations_are_spread_over_the_epochs(epochs, most, expected):
    class Job:
        options = type("Options", (), {"max_evaluations": most})

    Job.epochs = epochs
    assert [i for i in range(epochs) if job.Job.evaluates(Job, i)] == list(expected)


# --- the plan -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_splits(
        tmp_path_factory.mktemp("files"), {"train": 40, "validation": 16, "test": 16}
    )


def planned(each):
    return plan.in_order(run for point in plan.points(each) for run in point.runs(None))


def test_the_plan_has_every_method_before_the_next_seed(tmp_path, capsys):
    options = CompareOptions(
        backbone="DIR",
        output_dir=tmp_path,
        methods="full,lora",
        train_size="100,4000",
        seeds="2,1",
        steps="50,60",
        method_options=MethodOptions(rank=4),
    )
    runs = planned([options, dataclasses.replace(options, task="product")])
    assert [(run.task, run.size, run.method, run.seed) for run in runs] == [
        ("movie", 100, "full", 0),
        ("movie", 100, "lora", 0),
        ("movie", 4000, "full", 0),
        ("movie", 4000, "lora", 0),
        ("product", 100, "full", 0),
        ("product", 100, "lora", 0),
        ("movie", 100, "full", 1),
        ("movie", 100, "lora", 1),
        ("product", 100, "full", 1),
        ("product", 100, "lora", 1),
    ]
    assert "product has 2,583 training examples: 4,000 are left out" in capsys.readouterr().out
    assert runs[3].folder == tmp_path / "runs" / "movie" / "4000" / "lora" / "seed-0"
    flags = "--backbone DIR --task movie --max-length 64 --epochs 60 --max-evaluations 10 "
    flags += "--train-size 4000 --method lora --max-steps 60 --checkpoint-steps 0 --rank 4 "
    flags += "--train-head True --train-pooler True"
    assert sorted(runs[3].flags) == sorted(flags.split())
    assert "--rank" not in runs[2].flags
    assert runs[3].name == "movie, 4,000 examples, lora, seed 0"


def test_the_plan_of_all_methods_has_every_preset(tmp_path):
    # `rank` is for some of them, and kept from the others.
    flags = {"method_options": MethodOptions(rank=4), "train_size": "100"}
    options = CompareOptions(backbone="DIR", output_dir=tmp_path, methods="all", seeds="1", **flags)
    runs = planned([options])
    assert tuple(run.method for run in runs) == cj.presets()
    have_rank = {name for name in cj.presets() if hasattr(cj.preset(name), "rank")}
    assert {run.method for run in runs if "--rank" in run.flags} == have_rank
    assert have_rank >= {"low-rank", "lora"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"methods": "full,compactor"}, "did you mean 'compacter'"),
        ({"methods": "full,full"}, "must be different names"),
        ({"train-size": "100,x"}, "--train-size '100,x' must be numbers"),
        ({"seeds": "0"}, "from 1 on, with commas between them: how many seeds"),
        ({"train-size": "10,20", "seeds": "1,2,3"}, "--seeds has 3 numbers for 2 training sizes"),
        ({"train-size": "99999"}, "--train-size 99999 leaves nothing to train on"),
        ({"steps": "10,20"}, "--steps has 2 numbers for 1 training sizes"),
        ({"task": "films"}, "unknown task 'films'"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"phm-dim": 0}, "phm_dim=0 must be at least 1"),
    ],
)
def test_bad_flags(flags, message, tmp_path, capsys):
    values = {"backbone": "DIR", "output-dir": tmp_path / "out", **flags}
    error = refusal(
        capsys, "compare", *itertools.chain(*((f"--{k}", v) for k, v in values.items()))
    )
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_output_folder(tmp_path, capsys):
    file = tmp_path / "out"
    file.write_text("kept")
    error = refusal(capsys, "compare", "--backbone", "DIR", "--task", "movie", "--output-dir", file)
    assert f"{file} is a file; choose another --output-dir" in error
    assert file.read_text() == "kept"


def test_a_task_without_a_test_split(files, tmp_path, capsys):
    given = ["--train-file", files["train"], "--validation-file", files["validation"]]
    flags = ["--backbone", "DIR", "--task", "own", *given, "--output-dir", tmp_path / "out"]
    assert "'own' has train, validation" in refusal(capsys, "compare", *flags)


# --- the runs, with a process that only pretends to train ----------------------------------------

PRETEND = """
import json, math, os, sys, time
from pathlib import Path
values = dict(zip(sys.argv[4::2], sys.argv[5::2]))
folder, seed, method = Path(values["--output-dir"]), values.get("--seed", "0"), values["--method"]
seeds = values.get("--seeds", seed)
with open(os.environ["CALLS"], "a") as file:
    rate = values.get("--learning-rate")
    file.write(f"{method} {seeds}{' at ' + rate if rate else ''}\\n")
if method == os.environ.get("FAILS") or (rate and rate == os.environ.get("FAILS_AT")):
    print("Traceback (most recent call last):\\nerror: it cannot work")
    sys.exit(2)
if method == os.environ.get("STOPS"):
    sys.exit(0)
if method == os.environ.get("HANGS"):
    Path(os.environ["CALLS"] + ".hangs").touch()
    time.sleep(float(os.environ.get("SECONDS_OF_HANGING", "3")))
for seed in seeds.split(","):
    run = folder / f"seed-{seed}" if "--seeds" in values else folder
    (run / "adapter").mkdir()
    (run / "checkpoints").mkdir()
    result = {"metric": "accuracy", "learning_rate": 1e-3, "train_examples": 40, "steps": 6}
    result |= {"best_epoch": 1, "trained_parameters": 10, "total_parameters": 1000}
    result |= {"adapter_bytes": 99, "label_names": ["no", "yes"]}
    rate = float(values.get("--learning-rate", 1e-3))
    # Best at a rate of 0.001.
    result["learning_rate"], best = rate, 1 - abs(math.log(rate / 1e-3)) / 10
    result["validation"] = {"accuracy": best * float(os.environ.get("BEST", "0.5"))}
    result["test"] = {"accuracy": 0.5 + 0.1 * int(seed)}
    if "PREDICTS" in os.environ:
        right = 5 + int(seed) + (method == "lora")
        result["test"]["accuracy"] = right / 10
        rows = [{"prediction": "yes" if i < right else "no", "target": "yes"} for i in range(10)]
        lines = "".join(json.dumps(row) + "\\n" for row in rows)
        (run / "test_predictions.jsonl").write_text(lines)
    result["measured"] = {"step_seconds": 0.1, "seconds": 90.0, "peak_memory_bytes": 10**9}
    if "--seeds" in values:
        result["measured"]["runs_at_once"] = len(seeds.split(","))
    if method == os.environ.get("DIVERGES") and seed == "1":
        print("error: 1 of 2 runs failed: seed-1: it diverged")
        continue
    (run / "metrics.json").write_text(json.dumps(result))
sys.exit(method == os.environ.get("DIVERGES"))
"""


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A command line whose runs are quick, and a function that gives the runs there were."""
    program, calls = tmp_path / "python", tmp_path / "calls"
    script = tmp_path / "pretend.py"
    script.write_text(PRETEND)
    python = shlex.quote(sys.executable)
    program.write_text(f'#!/bin/sh\nexec {python} -S {shlex.quote(str(script))} "$@"\n')
    program.chmod(0o755)
    calls.touch()
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setattr(sys, "executable", str(program))

    def made():
        lines = calls.read_text().splitlines()
        calls.write_text("")
        return lines

    return made


def compare_flags(files, output, **flags):
    values = {f"{split}-file": path for split, path in files.items()}
    values |= {"backbone": "DIR", "task": "own", "output-dir": output, **flags}
    return ["compare", *(part for k, v in values.items() for part in (f"--{k}", str(v)))]


def test_only_what_is_not_finished_is_run(pretended, files, tmp_path, capsys):
    output = tmp_path / "out"
    flags = {"methods": "full,lora", "seeds": 1}
    assert main(compare_flags(files, output, **flags)) == 0
    assert pretended() == ["full 0", "lora 0"]
    words = capsys.readouterr().out
    line = "[1/2] own, full, seed 0: test accuracy 0.5000 in 90 s; about 0 h 02 min left"
    assert line in words
    folder = output / "runs" / "own" / "all" / "full" / "seed-0"
    assert sorted(path.name for path in folder.iterdir()) == [
        "fit.log",
        "flags.json",
        "metrics.json",
    ]
    flags = {"methods": "full,lora,bitfit", "seeds": 2}
    assert main(compare_flags(files, output, **flags)) == 0
    assert pretended() == ["bitfit 0", "full 1", "lora 1", "bitfit 1"]
    assert "2 of 6 runs are finished already" in capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    assert len(results["runs"]) == 6
    assert results["failed"] == []
    report = (output / "report.md").read_text()
    # 0.5 and 0.6: mean 0.55, standard deviation 0.1 / sqrt(2).
    row = "| `lora` | 10 | 1.000 % | 0.001 | 0.5500 ± 0.0707 (2) | 100 ms | 1,000 MB | 0 kB |"
    assert row in report
    assert main(compare_flags(files, output, **flags)) == 0
    assert pretended() == []


def test_finished_runs_with_other_settings_are_not_mixed_in(pretended, files, tmp_path, capsys):
    output = tmp_path / "out"
    flags = {"methods": "full", "seeds": 1}
    assert main(compare_flags(files, output, **flags)) == 0
    other = compare_flags(files, output, **flags, epochs=4)
    error = refusal(capsys, *other)
    assert "seed-0 and 0 more hold finished runs with other settings" in error
    assert pretended() == ["full 0"]
    assert main([*other, "--overwrite", "--keep-adapters"]) == 0
    assert pretended() == ["full 0"]
    assert (output / "runs" / "own" / "all" / "full" / "seed-0" / "adapter").exists()


def test_a_run_that_fails_is_reported_and_the_others_go_on(
    pretended, files, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FAILS", "full")
    output = tmp_path / "out"
    flags = compare_flags(files, output, methods="full,lora", seeds=2)
    assert main(flags) == 1
    error = capsys.readouterr().err
    assert (
        "error: 2 of 4 runs failed: own, full, seed 0: it cannot work; own, full, seed 1" in error
    )
    assert pretended() == ["full 0", "lora 0", "full 1", "lora 1"]
    assert "| own, full, seed 0 | it cannot work |" in (output / "report.md").read_text()
    monkeypatch.delenv("FAILS")
    assert main(flags) == 0  # failed runs are tried again
    assert pretended() == ["full 0", "full 1"]
    assert "cannot work" not in (output / "report.md").read_text()


def test_a_run_that_was_terminated_is_not_taken_for_done(
    pretended, files, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("STOPS", "full")
    flags = compare_flags(files, tmp_path / "out", methods="full,lora", seeds=1)
    assert main(flags) == 1
    assert "own, full, seed 0: terminated before its end, see" in capsys.readouterr().err
    monkeypatch.delenv("STOPS")
    assert main(flags) == 0
    assert pretended() == ["full 0", "lora 0", "full 0"]


def test_seeds_at_once(pretended, files, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    flags = {"methods": "full,lora", "seeds": 3, "at-once": 2}
    monkeypatch.setenv("DIVERGES", "lora")
    assert main(compare_flags(files, output, **flags)) == 1
    captured = capsys.readouterr()
    assert "error: 1 of 6 runs failed: own, lora, seed 1: 1 of 2 runs failed" in captured.err
    assert pretended() == ["full 0,1", "lora 0,1", "full 2", "lora 2"]
    # Two runs in 90 s.
    line = "[2/6] own, full, seed 1: test accuracy 0.6000 in 45 s; about 0 h 03 min left"
    assert line in captured.out
    runs = json.loads((output / "results.json").read_text())["runs"]
    found = {(run["method"], run["seed"]): run["test"]["accuracy"] for run in runs}
    wanted = {("full", 0): 0.5, ("full", 1): 0.6, ("full", 2): 0.7, ("lora", 0): 0.5}
    assert found == {**wanted, ("lora", 2): 0.7}
    assert {run["step_seconds"] for run in runs} == {0.05, 0.1}
    assert not any(output.glob("runs/own/all/full/*/adapter"))
    monkeypatch.delenv("DIVERGES")
    assert main(compare_flags(files, output, **flags)) == 0
    assert pretended() == ["lora 1"]
    for flag, name in (("at-once", "at_once"), ("processes", "processes")):
        error = refusal(capsys, *compare_flags(files, tmp_path / "b", **{**flags, flag: 0}))
        assert f"{name}=0 must be at least 1" in error


def test_runs_side_by_side(pretended, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HANGS", "full")  # and does not keep the others waiting
    monkeypatch.setenv("FAILS", "ia3")
    output = tmp_path / "out"
    flags = compare_flags(files, output, methods="full,lora,ia3", seeds=1, processes=2)
    assert main(flags) == 1
    ends = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line[0] == "["]
    assert ends == ["[1/3] own, lora, seed 0", "[2/3] own, ia3, seed 0", "[3/3] own, full, seed 0"]
    report = (output / "report.md").read_text()
    assert "2 runs at a time, each with its share of the processors" in report
    assert "| own, ia3, seed 0 | it cannot work |" in report


def test_a_second_comparison_is_refused(pretended, files, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    with alone(output):
        error = refusal(capsys, *compare_flags(files, output, methods="full", seeds=1))
    assert error.startswith(f"error: another process works in {output}; wait until it ends")
    assert pretended() == []


def wait_for(path):
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


# Whoever starts the tests in the background has them ignore SIGINT, and what they start.
COMPARE = """
import signal, sys
from train.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.executable, *arguments = sys.argv[1:]
sys.exit(main(arguments))
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_comparison_that_was_killed_goes_on(sent, pretended, files, tmp_path, capsys):
    """After SIGKILL its run goes on, is waited for, and is not started a second time."""
    output = tmp_path / "out"
    flags = compare_flags(files, output, methods="full,lora,bitfit", seeds=1)
    environment = {**os.environ, "HANGS": "lora", "PYTHONPATH": str(Path(__file__).parents[3])}
    if sent == signal.SIGINT:  # which ends the run long before
        environment["SECONDS_OF_HANGING"] = "60"
    real = shlex.split((tmp_path / "python").read_text().splitlines()[1])[1]
    command = [real, "-c", COMPARE, sys.executable, *flags]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path / "calls.hangs")
        process.send_signal(sent)
        assert process.wait(timeout=60) == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    assert pretended() == ["full 0", "lora 0"]
    assert main(flags) == 0
    # Ctrl-C ends the run, SIGKILL leaves it.
    assert pretended() == (["lora 0", "bitfit 0"] if sent == signal.SIGINT else ["bitfit 0"])
    assert ("waiting for another comparison" in capsys.readouterr().out) == (sent == signal.SIGKILL)
    assert len(json.loads((output / "results.json").read_text())["runs"]) == 3


# --- learning rates that are tried, and differences ----------------------------------------------


def test_the_best_learning_rate_of_the_first_seed_is_that_of_all(
    pretended, files, tmp_path, capsys
):
    output = tmp_path / "out"
    flags = {"methods": "full,lora", "seeds": 2, "tune-learning-rates": 3}
    assert main(compare_flags(files, output, **flags)) == 0
    # Those of their tables, 5e-5 and 3e-3, and a factor of 3 apart; pretended runs like 0.001 best.
    tried = ["full 0 at 1.67e-05", "full 0 at 5e-05", "full 0 at 0.00015"]
    tried += ["lora 0 at 0.001", "lora 0 at 0.003", "lora 0 at 0.009"]
    assert pretended() == [*tried, "full 1 at 0.00015", "lora 1 at 0.001"]
    assert "6 runs choose the learning rates" in capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    rates = [(run["method"], run["seed"], run["learning_rate"]) for run in results["runs"]]
    assert rates == [
        ("full", 0, 0.00015),
        ("lora", 0, 0.001),
        ("full", 1, 0.00015),
        ("lora", 1, 0.001),
    ]
    folder = output / "runs" / "own" / "all" / "lora" / "learning-rate-0.001"
    assert sorted(path.name for path in folder.iterdir()) == ["seed-0", "seed-1"]
    report = (output / "report.md").read_text()
    assert "the best of 3 by the validation score of 1 seed(s)" in report
    assert "| `lora` | **0.001: 0.5000**\\* | 0.003: 0.4451 | 0.009: 0.3901 |" in report
    assert main(compare_flags(files, output, **flags)) == 0
    assert pretended() == []


def test_every_tuning_seed_counts_and_the_nearest_rate_wins_a_tie(
    pretended, files, tmp_path, monkeypatch
):
    monkeypatch.setenv("BEST", "0")  # all scores alike
    flags = {"methods": "lora", "seeds": 3, "tune-learning-rates": 3, "tuning-seeds": 2}
    assert main(compare_flags(files, tmp_path / "out", **flags)) == 0
    rates = ("0.001", "0.003", "0.009")
    tried = [f"lora {seed} at {rate}" for seed in range(2) for rate in rates]
    assert pretended() == [*tried, "lora 2 at 0.003"]
    monkeypatch.setenv("FAILS_AT", "0.003")
    assert main(compare_flags(files, tmp_path / "other", **flags)) == 0
    assert pretended() == [*tried, "lora 2 at 0.001"]  # the smaller of two as near


def test_rates_beyond_the_end_are_tried_while_it_is_the_best(pretended, files, tmp_path, capsys):
    output = tmp_path / "out"
    flags = {"methods": "full,lora", "seeds": 2, "tune-learning-rates": 3}
    assert main(compare_flags(files, output, **flags)) == 0
    assert len(pretended()) == 8
    further = flags | {"tune-beyond": 2}
    assert main(compare_flags(files, output, **further)) == 0
    # full improves up to its second further rate; lora gets worse below 0.001, which is kept.
    tried = ["full 0 at 0.00045", "lora 0 at 0.000333", "full 0 at 0.00135"]
    assert pretended() == [*tried, "full 1 at 0.00135"]
    assert "2 further runs choose the learning rates" in capsys.readouterr().out
    report = (output / "report.md").read_text()
    assert "the best of 3 and up to 2 beyond their ends by the validation score" in report
    assert "0.00045: 0.4601 | **0.00135: 0.4850**\\* |" in report
    assert (
        "| `lora` | 0.000333: 0.4450 | **0.001: 0.5000** | 0.003: 0.4451 | 0.009: 0.3901 |"
        in report
    )
    assert main(compare_flags(files, output, **further)) == 0
    assert pretended() == []
    # A finished run at a rate that only --tune-beyond reaches is not replaced unasked.
    assert main(compare_flags(files, output, **further | {"batch-size": 7})) == 2
    assert "and 11 more hold finished runs with other settings" in capsys.readouterr().err


def test_a_rate_beyond_the_end_that_fails_ends_the_search(
    pretended, files, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FAILS_AT", "0.00045")
    flags = {"methods": "full", "seeds": 1, "tune-learning-rates": 3, "tune-beyond": 3}
    assert main(compare_flags(files, tmp_path / "out", **flags)) == 0
    assert pretended()[-1] == "full 0 at 0.00045"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| **0.00015: 0.4051** | 0.00045: failed |" in report
    alone = flags | {"tune-learning-rates": 1}
    assert main(compare_flags(files, tmp_path / "other", **alone)) == 2
    assert "tune_beyond=3 must be at least 0, and 0 without" in capsys.readouterr().err


def test_a_rate_that_fails_is_not_taken(pretended, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAILS_AT", "0.001")
    flags = {"methods": "lora", "seeds": 1, "tune-learning-rates": 3}
    assert main(compare_flags(files, tmp_path / "out", **flags)) == 0
    assert pretended() == ["lora 0 at 0.001", "lora 0 at 0.003", "lora 0 at 0.009"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| `lora` | 0.001: failed | **0.003: 0.4451** | 0.009: 0.3901 |" in report
    monkeypatch.setenv("FAILS", "lora")  # at every rate
    assert main(compare_flags(files, tmp_path / "other", **flags)) == 1
    error = capsys.readouterr().err
    assert "own, lora, learning rate 0.003, seed 0: it cannot work" in error
    assert "3 of 3 runs failed" in error


def test_differences_to_a_reference(pretended, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PREDICTS", "1")
    flags = {"methods": "ia3,lora,full", "seeds": 2}
    assert main(compare_flags(files, tmp_path / "out", **flags)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {row["method"]: row for row in results["differences"]}
    assert set(rows) == {"ia3", "lora"}
    assert {row["reference"] for row in rows.values()} == {"full"}
    # The pretended scores are alike; the predictions are those of the same examples.
    assert (rows["ia3"]["low"], rows["ia3"]["high"], rows["ia3"]["verdict"]) == (0, 0, "on par")
    assert 0 <= rows["lora"]["low"] < rows["lora"]["high"] < 0.4
    assert rows["lora"]["over_examples"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "paired bootstrap over the seeds and the test examples." in report
    assert "The part of 2 seeds is about 0.71 times as wide as it should be." in report
    assert "| `ia3` | +0.0000 | +0.0000 to +0.0000 | 2 | on par |" in report
    (tmp_path / "out/runs/own/all/ia3/seed-1/test_predictions.jsonl").unlink()
    assert main(compare_flags(files, tmp_path / "out", **flags)) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "the seeds and the test examples (the seeds alone for `ia3`)" in report
    flags |= {"reference": "lora"}
    assert main(compare_flags(files, tmp_path / "out", **flags)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["method"] for row in results["differences"]] == ["ia3", "full"]
    error = refusal(capsys, *compare_flags(files, tmp_path / "b", **{**flags, "reference": "phm"}))
    assert (
        "--reference 'phm' must be one of the methods that are compared: ia3, lora, full" in error
    )


def test_what_the_intervals_are_over(pretended, files, tmp_path, monkeypatch):
    """One seed is no seeds, and the choice of a learning rate is told where there was one."""
    monkeypatch.setenv("PREDICTS", "1")
    flags = {"methods": "full,lora", "seeds": 1, "tune-learning-rates": 3}
    assert main(compare_flags(files, tmp_path / "out", **flags)) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "of a paired bootstrap over the test examples. On par" in report
    assert "With one seed the interval says nothing of others. It leaves out how the le" in report
    rows = [
        {"method": method, "over_examples": examples, "seeds": seeds}
        for method, examples, seeds in (("a", True, 1), ("b", True, 3), ("c", False, 3))
    ]
    wanted = "the seeds and the test examples (the test examples alone for `a`; the seeds alone "
    assert compare_report._resampled(rows) == wanted + "for `c`)"
    assert compare_report._resampled(rows[2:]) == "the seeds"


def test_settings_that_a_configuration_varies_by_task(pretended, files, tmp_path, capsys):
    config = tmp_path / "a.toml"
    config.write_text("epochs = 3\n[tasks.one]\nepochs = 20\ntrain_size = '20'\n")
    flags = {"task": "one,two", "methods": "full", "seeds": 1, "config": config}
    assert main(compare_flags(files, tmp_path / "out", **flags)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["epochs"] == {"one": 20, "two": 3}
    assert results["settings"]["train_size"] == {"one": "20", "two": None}
    assert (results["settings"]["task"], results["settings"]["seeds"]) == ("one,two", "1")
    report = (tmp_path / "out" / "report.md").read_text()
    assert "epochs: 20 (one), 3 (two); batch size: 32." in report
    assert "| train_size | `20 (one), - (two)` |" in report
    config.write_text("[tasks.one]\nheads = 'as_published'\n")
    error = refusal(capsys, *compare_flags(files, tmp_path / "b", **flags))
    assert "heads is one for all tasks, and the configuration has as_published, alike" in error


# --- tables and figures -------------------------------------------------------------------------


def records(scores, *, size=100, trained=None, task="movie", **more):
    """`scores`: method -> one for each seed."""
    return [
        {
            "task": task,
            "train_size": size,
            "train_examples": size,
            "method": method,
            "seed": seed,
            "metric": "accuracy",
            "learning_rate": 3e-3,
            "steps": 6,
            "best_epoch": 1,
            "trained_parameters": (trained or {}).get(method, 17_946),
            "total_parameters": 22_721_178,
            "adapter_bytes": 79_882 + seed,
            "validation": {"accuracy": 0.9},
            "test": {"accuracy": value, "loss": 0.1},
            "step_seconds": (0.5, 0.25, 0.75)[seed],
            "seconds": 60.0,
            "peak_memory_bytes": 10**9 + 10**8 * (seed == 1),
            **more,
        }
        for method, values in scores.items()
        for seed, value in enumerate(values)
    ]


def test_the_table_of_methods():
    # Mean 2.4884 / 3; deviations 0.00063.., -0.00406.., 0.00343.. -> 0.00378..
    scores = {"compacter++": (0.8301, 0.8254, 0.8329), "full": (0.5,)}
    found = summaries(records(scores, trained={"full": 22_713_986}))
    assert compare_report.method_table(found).splitlines() == [
        "| method | trained | of all | learning rate | accuracy | step | memory | on disk |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `compacter++` | 17,946 | 0.079 % | 0.003 | 0.8295 ± 0.0038 (3) | 500 ms | 1,100 MB "
        "| 80 kB |",
        "| `full` | 22,713,986 | 99.968 % | 0.003 | 0.5000 (1) | 500 ms | 1,000 MB | 80 kB |",
    ]
    (timed,) = summaries(records({"full": (0.5,)}, step_seconds=None))
    assert "| - |" in compare_report.method_table([timed])
    on_device = records({"full": (0.5,)}, peak_device_memory_bytes=3 * 10**9)
    table = compare_report.method_table(summaries(on_device))
    assert "| device memory | on disk |" in table
    assert "| 1,000 MB | 3,000 MB |" in table


def test_the_table_of_sizes():
    runs = records({"full": (0.6, 0.7), "lora": (0.5, 0.5)}, size=1000)
    runs += records({"full": (0.9,)}, size=4000)
    assert compare_report.size_table(summaries(runs)).splitlines() == [
        "| accuracy | 1,000 | 4,000 |",
        "| --- | --- | --- |",
        "| `full` | 0.6500 ± 0.0707 (2) | 0.9000 (1) |",
        "| `lora` | 0.5000 ± 0.0000 (2) | - |",
    ]


def spread_records():
    """All presets at sizes and scores as close together as they come."""
    trained = dict(
        zip(
            cj.presets(),
            np.geomspace(14_594, 22_713_986, len(cj.presets())).astype(int),
            strict=True,
        )
    )
    trained |= dict.fromkeys(["intrinsic", "intrinsic-said", "low-rank", "compacter"], 25_000)
    trained |= dict.fromkeys(["parallel", "scaled-parallel"], 888_962)
    generator = np.random.default_rng(0)
    scores = {name: 0.8 + 0.02 * generator.random(3) for name in cj.presets()}
    return records(scores, trained=trained), trained, scores


def test_the_figure_has_a_labelled_point_with_error_bars_for_each_method():
    runs, trained, scores = spread_records()
    figure = figures.comparison_figure(summaries(runs), "DIR")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert sorted(text.get_text() for text in axes.texts) == sorted(cj.presets())
    assert len(axes.containers) == len(cj.presets())
    points = {}
    for container in axes.containers:
        point, _, (bar,) = container
        place = point.get_xydata()[0]
        (name,) = (text.get_text() for text in axes.texts if tuple(text.xy) == tuple(place))
        points[name] = place
        mean, deviation = np.mean(scores[name]), np.std(scores[name], ddof=1)
        # Those of the same size are drawn side by side.
        np.testing.assert_allclose(points[name][0], 100 * trained[name] / 22_721_178, rtol=0.4)
        np.testing.assert_allclose(points[name][1], mean)
        (segment,) = bar.get_segments()
        np.testing.assert_allclose(segment[:, 1], [mean - deviation, mean + deviation])
    in_order = sorted(points, key=lambda name: points[name][0])
    assert [trained[name] for name in in_order] == sorted(trained.values())
    assert min(np.diff(np.log10([points[name][0] for name in in_order]))) > 0.03
    assert "bars: mean ± standard deviation" in axes.get_title()
    for text in axes.texts:
        np.testing.assert_array_equal(text.xy, points[text.get_text()])
    boxes = label_boxes(figure, axes)
    for (name, box), (other, its_box) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(its_box), (name, other)
    inside = axes.get_window_extent()
    assert all(inside.contains(*corner) for box in boxes.values() for corner in box.corners())


def test_bars_are_intervals_where_there_are_differences():
    """A bar is the interval of the difference, from the mean of the reference, which has none."""
    scores = {"full": (0.6, 0.7), "lora": (0.5, 0.6), "lora:rank=1": (0.5, 0.5), "ia3": (0.7, 0.8)}
    trained = {"full": 22_721_178, "ia3": 100_000}
    rows = [
        {"method": "lora", "reference": "full", "low": -0.2, "high": 0.05},
        {"method": "lora:rank=1", "reference": "full", "low": -0.3, "high": -0.1},
        {"method": "ia3", "reference": "full", "low": 0.15, "high": 0.2},
    ]
    found = summaries(records(scores, trained=trained))
    (axes,) = figures.comparison_figure(found, "DIR", "a head", rows).axes
    assert axes.get_title().split("\n") == [
        "movie, 100 training examples, DIR, a head",
        "2 seeds; bars: 95 % interval of the difference to full, dashed; small points: runs",
    ]
    drawn = [container[2][0].get_segments()[0] for container in axes.containers]
    # The last interval leaves out the mean: it then ends there.
    wanted = [(0.65, 0.65), (0.45, 0.7), (0.35, 0.55), (0.75, 0.85)]
    np.testing.assert_allclose([segment[:, 1] for segment in drawn], wanted)
    (dashed,) = (line for line in axes.get_lines() if line.get_linestyle() == "--")
    np.testing.assert_allclose(dashed.get_ydata(), 0.65)
    markers = [container[0] for container in axes.containers]
    assert markers[1].get_marker() == markers[2].get_marker()
    assert markers[1].get_markerfacecolor() != markers[2].get_markerfacecolor()


def test_heads_are_told_in_the_title():
    """Results from before the choice of heads were read through the pooler."""
    assert figures.head_of({"heads": "alike"}) == "the same head for all"
    assert figures.head_of({"heads": "as_published"}) == "heads as published"
    assert figures.head_of({}).startswith("through the pooler")
    runs = summaries(records({"full": (0.6,)}))
    (axes,) = figures.size_figure(runs, "DIR", figures.head_of({})).axes
    assert "movie, DIR, through the pooler" in axes.get_title()


def label_boxes(figure, axes):
    from matplotlib.text import Text

    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    return {text.get_text(): Text.get_window_extent(text, renderer) for text in axes.texts}


def test_the_figure_of_sizes_has_a_line_of_means_for_each_method():
    runs = records({"full": (0.6, 0.7), "lora": (0.5, 0.6)}, size=1000)
    runs += records({"lora": (0.5, 0.7), "full": (0.9,)}, size=100)
    figure = figures.size_figure(summaries(runs), "DIR")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["full", "lora"]
    means = {c.get_label(): c[0].get_ydata(orig=False) for c in axes.containers}
    np.testing.assert_allclose(means["full"], [0.9, 0.65])
    np.testing.assert_allclose(means["lora"], [0.6, 0.55])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["100", "1,000"]
    for container in axes.containers:
        np.testing.assert_allclose(container[0].get_xdata(orig=False), [100, 1000], rtol=0.02)


def test_the_title_names_the_backbone_as_it_was_given(tmp_path):
    """A link is told by its own name, a folder of another place or a name of a hub by its last."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "minilm").symlink_to(tmp_path / "blobs")
    runs = summaries(records({"full": (0.6,)}, size=100))
    for given in (str(tmp_path / "minilm"), f"{tmp_path}/minilm/.", "hub/minilm"):
        figure = figures.size_figure(runs, given)
        (axes,) = figure.axes
        assert axes.get_title().split("\n")[0].endswith(", minilm")


def test_shares_within_a_power_of_ten_have_labels_in_percent():
    for most, labelled in ((2_000_000, True), (20_000_000, False)):
        runs = records({"full": (0.6,), "lora": (0.5,)}, trained={"full": most, "lora": 1_500_000})
        figure = figures.comparison_figure(summaries(runs), "DIR")
        figure.draw_without_rendering()
        (axes,) = figure.axes
        low, high = axes.get_xlim()
        places = [*axes.get_xticks(), *axes.get_xticks(minor=True)]
        labels = [*axes.get_xticklabels(), *axes.get_xticklabels(minor=True)]
        shown = zip(places, (label.get_text() for label in labels), strict=True)
        told = [text for place, text in shown if low <= place <= high and text]
        assert len(told) >= (2 if labelled else 1)
        assert all(re.fullmatch(r"[\d.]+ %", text) for text in told)


def test_the_legend_of_all_methods_hides_and_loses_nothing():
    names = [*cj.presets(), "lora:rank=1", "lora:rank=2", "lora:rank=4"]
    runs = [run for size in (100, 200) for run in records(dict.fromkeys(names, (0.5,)), size=size)]
    figure = figures.size_figure(summaries(runs), "DIR")
    (axes,) = figure.axes
    figure.draw_without_rendering()
    legend = axes.get_legend().get_window_extent()
    assert all(figure.bbox.contains(*corner) for corner in legend.corners())
    assert not legend.overlaps(axes.bbox)
    looks = {
        (line.get_color(), line.get_marker(), line.get_linestyle())
        for line, *_ in axes.containers
        if str(line.get_linestyle()) != "None"
    }
    assert len(looks) == len(names)
    # The methods of one size stay apart from those of the next.
    places = np.array([container[0].get_xdata(orig=False) for container in axes.containers])
    assert places[:, 0].max() < 150 < places[:, 1].min()


def test_what_is_written(tmp_path):
    runs = records({"full": (0.6, 0.7), "lora": (0.5, 0.6)}, size=1000)
    runs += records({"full": (0.6,)}, size=100)
    runs += records({"full": (0.6,)}, size=100, task="my files")
    settings = {"backbone": "DIR", "steps": None, "epochs": 3, "batch_size": 32, "dtype": "float32"}
    settings |= {"heads": "alike", "tune_learning_rates": 1, "tuning_seeds": 1, "processes": 1}
    results = {"runs": runs, "settings": settings, "differences": [], "tried": []}
    settings["method_options"] = {"rank": 4}
    results["failed"] = [{"run": "movie, lora, seed 0", "reason": "a | b"}]
    compare_report.write(results, tmp_path)
    names = ["comparison-movie-100", "comparison-movie-1000", "comparison-my files-100"]
    names = [f"{name}.png" for name in [*names, "sizes-movie"]]
    assert {path.name for path in tmp_path.iterdir()} == {*names, "report.md"}
    report = (tmp_path / "report.md").read_text()
    links = re.findall(r"\((\S*\.png)\)", report)
    assert list(map(urllib.parse.unquote, links)) == [names[3], *names[:3]]
    assert "| method_options | `{'rank': 4}` |" in report
    assert "| movie, lora, seed 0 | a \\| b |" in report
    assert "Backbone `DIR`; epochs: 3; batch size: 32." in report
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        picture = image.imread(tmp_path / name)
        assert picture.shape[0] > 500
        assert picture.std() > 0.01


# --- for real -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_end_to_end(tiny_backbone, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XLA_FLAGS", QUICK)  # on one device
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # its own stands back before the user's
    flags = {"methods": "compacter++,adapterdrop,full", "seeds": 1, "backbone": tiny_backbone}
    flags |= {"train-size": 20, "steps": 4, "batch-size": 8, "eval-batch-size": 16}
    flags |= {"reduction-factor": 2, "max-length": 16}
    output = tmp_path / "out"
    # Of two layers, `adapterdrop` cannot leave out five.
    assert main(compare_flags(files, output, **flags)) == 1
    assert "1 of 3 runs failed: own, 20 examples, adapterdrop" in capsys.readouterr().err
    results = json.loads((output / "results.json").read_text())
    runs = {(run["method"], run["seed"]): run for run in results["runs"]}
    assert set(runs) == {("compacter++", 0), ("full", 0)}
    for run in runs.values():
        assert (run["steps"], run["train_examples"]) == (4, 20)
        assert run["step_seconds"] > 0
        assert run["seconds"] > 0
        assert 10**8 < run["peak_memory_bytes"] < 10**10
        rate = learning_rates.CLASSIFIER[run["method"]]
        assert run["learning_rate"] == rate
        assert run["test"]["accuracy"] * 16 == pytest.approx(round(run["test"]["accuracy"] * 16))
    # Two layers: rule 64, adapters 216, norms 240, head 50; see test_cli. The pooler, 24 x 24 + 24,
    # is part of the head that all methods train.
    assert runs["compacter++", 0]["trained_parameters"] == 64 + 216 + 240 + 50 + 600
    log = output / "runs" / "own" / "20" / "adapterdrop" / "seed-0" / "fit.log"
    assert "leave_out has [2, 3, 4]" in log.read_text()
    assert any((output / "compiled").iterdir())
    report = (output / "report.md").read_text()
    assert "| `compacter++` | 1,170 |" in report
    assert (output / "comparison-own-20.png").read_bytes().startswith(b"\x89PNG")

    flags |= {"methods": "compacter++", "seeds": 3, "at-once": 2}
    assert main(compare_flags(files, output, **flags)) == 0
    assert "1 of 3 runs are finished already" in capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    assert [run["seed"] for run in results["runs"]] == [0, 1, 2]
    assert len({run["test"]["loss"] for run in results["runs"]}) == 3
    assert [run.get("runs_at_once") for run in results["runs"]] == [None, 2, 2]
