"""Invalid input of the command line gives one short line before any work begins."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import compacter_jax as cj
from compacter_jax.adapter_files import CONFIG_NAME
from compacter_jax.messages import LONGEST
from train import __main__ as command_line
from train import tasks
from train.__main__ import main
from train.cli import toml
from train.cli.config_files import expand_config
from train.compare.options import CompareOptions
from train.data import rows
from train.fit.options import FitOptions
from train.inference import commands, prediction_files, saved

ROOT = Path(command_line.__file__).parents[1]


def refused(capsys, *arguments):
    """Returns the line of a command that must fail with exit code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert len(line) <= LONGEST
    return line


# --- TOML ---


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base = 5", "base=5 must be text"),
        ("base = ['a.toml']", "base=['a.toml'] must be text"),
        ("task = []", "task=[] must be text"),
        ("[task]\nx = 1", "task={'x': 1} must be text"),
        ("epochs = 1.5", "epochs=1.5 must be a whole number"),
        ("epochs = true", "epochs=True must be a whole number"),
        ("learning_rate = '1e-3'", "learning_rate='1e-3' must be a number or null"),
        ("resume = 1", "resume=1 must be a boolean"),
        ("dtype = 'float12'", "dtype='float12' must be one of 'float32', 'bfloat16'"),
        ("leave_out = ['0']", "leave_out=['0'] must be a list, each item a whole number"),
        ("output_dir = 1979-05-27", "output_dir=datetime.date(1979, 5, 27) must be text"),
        ("[tasks.rte]\nseed = []", "seed=[] must be a whole number"),
        ("sites = ['feed_forward', '--json']", "sites has the item '--json', which is a flag"),
        ("sites = ['-h']", "sites has the item '-h', which is a flag"),
        (f"sites = {'[' * 2000}{']' * 2000}", "its brackets are nested too deep"),
        (f"x = {'{a=' * 2000}1{'}' * 2000}", "its brackets are nested too deep"),
        (f"seed = {'9' * 5000}", "is not valid TOML: Exceeds the limit"),
        (f"{'k' * 10_000} = 1", "unknown key 'kkk"),
        (f'prefix = "{"a" * 10_000_000}', "more than the limit of 65,536"),
        (f'prefix = """{"a" * 60_000}', "is not valid TOML"),
    ],
    ids=lambda text: text[:30],
)
def test_a_configuration_that_is_none(text, told, tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text(text)
    line = refused(capsys, "fit", "--config", path)
    assert str(path) in line
    assert told in line


def test_a_value_is_no_flag(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("prefix = '--json'\nseeds = 3\nepochs = 2\nlearning_rate = 1\n")
    expanded = expand_config(["--config", str(path)], FitOptions)
    assert expanded[:-2] == [
        *("--prefix=--json", "--seeds", "3", "--epochs", "2", "--learning-rate", "1")
    ]
    parsed = command_line._parsed(
        "fit", ["--backbone", "x", "--output-dir", "y", "--config", str(path)]
    )
    assert (parsed.prefix, parsed.seeds, parsed.learning_rate) == ("--json", "3", 1.0)
    path.write_text("method = 5")
    assert expand_config(["--config", str(path)], CompareOptions)[0] == "--methods"
    with pytest.raises(ValueError, match="is not a file"):
        toml.read_toml(tmp_path)


# --- what a saved adapter says ---


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_backbone):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    backbone = cj.load_backbone(tiny_backbone, head="sequence_classification", num_labels=2)
    model = cj.Adapted(backbone.module, cj.preset("bitfit"))
    params = {"classifier": backbone.params["classifier"], **backbone.params}
    metadata = {"backbone": str(tiny_backbone), "dtype": "float32", "backbone_dtype": "float32"}
    metadata |= {"task": "custom", "kind": "classification", "label_names": ["no", "yes"]}
    cj.save_adapter(folder, model, params, metadata=metadata | {"max_length": 32})
    return folder


T5 = {"head": "conditional_generation", "num_labels": None}


def changed(adapter, folder, changes):
    shutil.copytree(adapter, folder)
    settings = json.loads((folder / CONFIG_NAME).read_text()) | changes
    (folder / CONFIG_NAME).write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_labels": "3"}, "num_labels='3' must be a whole number or null"),
        ({"num_labels": 10**9}, "num_labels=1000000000 does not match the head"),
        ({"dtype": "float12"}, "dtype='float12' must be one of"),
        ({"dtype": ["float32"]}, "dtype=['float32'] must be one of"),
        ({"backbone_dtype": "float12"}, "backbone_dtype='float12' must be one of"),
        ({"max_length": "32"}, "max_length='32' must be a whole number"),
        ({"max_length": None}, "max_length=None must be a whole number"),
        ({"max_length": -1}, "max_length=-1 must be at least 3"),
        ({"label_names": 5}, "label_names=5 must be a list"),
        ({"label_names": [1, 2]}, "label_names=[1, 2] must be a list, each item text"),
        ({"label_names": ["a"]}, "num_labels=2 must be 1"),
        ({"label_names": ["a", "a"]}, "label_names: a occurs twice"),
        ({"label_names": []}, "label_names=[] must be names"),
        ({"backbone": ["x"]}, "backbone=['x'] must be text"),
        ({"benchmark": "x"}, "benchmark='x' must be an object"),
        ({"benchmark": {"name": 5}}, "benchmark: name=5 must be text"),
        ({"benchmark": {}}, "benchmark has no name"),
        ({"text_to_text": {"x": 1}}, "text_to_text cannot be combined with kind='classification'"),
        ({"kind": "nonsense"}, "kind='nonsense' must be one of"),
        ({"kind": ["classification"]}, "kind=['classification'] must be one of"),
        ({"kind": "span"}, "kind='span' cannot be combined with head='sequence_classification'"),
        ({"kind": "choice", "label_names": []}, "kind='choice' needs the field benchmark"),
        ({"task": {}}, "task={} must be text or null"),
        ({"head": 5}, "head=5 must be text or null"),
        ({**T5, "text_to_text": {"x": 1}}, "text_to_text has no prefix"),
        ({**T5, "text_to_text": {"prefix": "", "x": 1}}, "text_to_text has the unknown fields x"),
        ({**T5, "text_to_text": {"prefix": 5}}, "text_to_text: prefix=5 must be text"),
        (
            {**T5, "text_to_text": {"prefix": "", "max_new_tokens": 10**9}},
            "max_new_tokens=1000000000 must be from 1 to 65,536",
        ),
        ({**T5, "kind": "span_corruption", "label_names": []}, "span_corruption has no noise"),
    ],
    ids=str,
)
def test_an_adapter_of_wrong_settings(changes, told, adapter, tmp_path):
    folder = changed(adapter, tmp_path / "changed", changes)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - what it says is compared below
        saved.settings_of(folder)
    assert told in str(error.value)
    assert str(folder) in str(error.value)


def test_settings_are_what_was_saved(adapter):
    assert saved.settings_of(adapter)["label_names"] == ["no", "yes"]


# --- before weights and data are read ---


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--method phm --reduction-factor 2 --phm-dim 5", "phm_dim=5 does not divide"),
        ("--method lora --sites nowhere", "unknown site 'nowhere'"),
        ("--method adapterdrop --reduction-factor 2 --leave-out 77", "77"),
        ("--method lora --max-length 1000", "max_length=1000 exceeds the backbone's"),
        ("--method lora --rank 2000000000", "GB; choose smaller widths"),
        ("--method prompt-tuning-random --prompt-length 600", "use a prompt_length of"),
    ],
)
def test_a_method_that_does_not_fit(flags, told, tiny_backbone, tmp_path, capsys, monkeypatch):
    def read(*arguments, **named):
        raise AssertionError("read too early")

    monkeypatch.setattr(tasks, "load_task", read)
    monkeypatch.setattr(cj, "load_backbone", read)
    files = [f"--{split}-file" for split in ("train", "validation")]
    files = [part for flag in files for part in (flag, tmp_path / "none.csv")]
    own = ["--backbone", tiny_backbone, "--output-dir", tmp_path / "run", "--max-length", 32]
    assert told in refused(capsys, "fit", *own, *files, *flags.split())
    assert not (tmp_path / "run").exists()


def test_a_saved_method_that_does_not_fit(adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cj, "load_backbone", None)
    method = {"kind": "lora", "rank": 2, "leave_out": [50]}
    folder = changed(adapter, tmp_path / "changed", {"method": method})
    (tmp_path / "in.csv").write_text("sentence\na\n")
    flags = ["--adapter", folder, "--input", tmp_path / "in.csv", "--output", tmp_path / "out.csv"]
    assert "50" in refused(capsys, "predict", *flags)


# --- what is written ---


def test_half_a_character_cannot_be_written_as_csv(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(
        '{"sentence": "a", "n\\u00e9": "x"}\n{"sentence": "b", "n\\u00e9": "\\ud800"}\n'
    )

    def predict(target):
        return prediction_files.predict_file(
            source, target, lambda columns: np.zeros((2, 2)), label_names=("no", "yes")
        )

    for suffix in ("csv", "tsv"):
        with pytest.raises(ValueError, match=r"row 2 of the input .* column 'né'; write \.jsonl"):
            predict(tmp_path / f"out.{suffix}")
    assert predict(tmp_path / "out.jsonl") == 2
    source.write_text('{"sentence": "a", "n\\udc80": 1}\n{"sentence": "b"}\n')
    with pytest.raises(ValueError, match="surrogate pair in its name"):
        predict(tmp_path / "out.csv")


def test_columns_by_the_thousand_are_not_all_listed(tmp_path, capsys):
    source = tmp_path / "in.csv"
    names = [f"column_{i}" for i in range(5000)]
    source.write_text(f"{','.join(names)}\n{','.join(names)}\n")
    with pytest.raises(ValueError, match="and 4992 more") as error:
        next(rows.read_rows(source))
    assert len(str(error.value)) < LONGEST


@pytest.mark.parametrize("name", ["there", "none/there.json", "n" * 300])
def test_an_evaluation_that_cannot_be_written_is_not_made(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "_evaluated", None)
    (tmp_path / "there").mkdir()
    refused(capsys, "evaluate", "--adapter", tmp_path, "--output", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_task_with_a_slash_has_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "_evaluated", lambda options: {"metrics": {}})
    assert main(["evaluate", "--adapter", str(tmp_path), "--task", "a/b"]) == 0
    assert (tmp_path / "evaluation_a_b_test.json").exists()


# --- any error, any terminal, no waiting ---


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RecursionError("maximum recursion depth"), "nested too deeply"),
        (MemoryError("Unable to allocate 96. GiB"), "not enough memory: Unable to allocate 96."),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "not enough memory: Out of memory"),
        (OverflowError("int too large"), "a number in the input is too large: int too large"),
        (ValueError("x" * 100_000), "xxx…xxx"),
        (OSError(28, "No space left on device", "a" * 5000), "no space left on device"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_on_the_way(error, told, capsys, monkeypatch):
    def run(arguments):
        raise error

    _, options = command_line.COMMANDS["merge"]
    monkeypatch.setitem(command_line.COMMANDS, "merge", (run, options))
    assert told in refused(capsys, "merge", "--adapter", "a", "--to", "b")


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    def run(arguments):
        raise RuntimeError("a fault")

    _, options = command_line.COMMANDS["merge"]
    monkeypatch.setitem(command_line.COMMANDS, "merge", (run, options))
    with pytest.raises(RuntimeError, match="a fault"):
        main(["merge", "--adapter", "a", "--to", "b"])


def test_ctrl_c_while_options_are_read(capsys, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.cli.config_files.expand_config", stop)
    assert main(["fit"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize(
    "flags",
    [
        "--epochs x",
        f"--epochs {'9' * 5000}",
        f"--dtype {'f' * 5000}",
        f"--{'x' * 5000} 1",
        "--seed",
        "--backbone a --backbone",
    ],
    ids=lambda flags: flags[:20],
)
def test_options_of_the_wrong_type(flags, capsys):
    refused(capsys, "fit", "--backbone", "x", "--output-dir", "y", *flags.split())


PROGRAM = """
import contextlib, runpy, sys
sys.argv[1:] = {arguments!r}
with contextlib.suppress(SystemExit):
    runpy.run_module("train", run_name="__main__")
slow = ("jax", "flax", "optax", "transformers", "datasets", "pyarrow")
print([name for name in slow if name in sys.modules])
"""


# The file of a method contains its layer, so the flags of methods and presets need JAX and Flax.
OF_METHODS = ["jax", "flax"]


@pytest.mark.parametrize(
    ("arguments", "told", "needed"),
    [
        (["--help"], "usage: python -m train COMMAND", []),
        (["create-backbone", "--nonsense"], "Unrecognized options: --nonsense", []),
        (["predict", "--help"], "usage: python -m train predict", OF_METHODS),
        (["fit", "--help"], "usage: python -m train fit", OF_METHODS),
        (
            ["params", "--method", "nonsensé", "--backbone-config", "t5-base"],
            "nonsens\\xe9",
            OF_METHODS,
        ),
    ],
    ids=("usage", "flag", "help", "help with methods", "preset"),
)
def test_an_answer_imports_what_it_needs_alone(arguments, told, needed):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(arguments=arguments)],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.stdout.splitlines()[-1] == str(needed)
    assert told in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
