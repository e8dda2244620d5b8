"""Tests the help of the command line: it is complete, readable, and its examples work."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from compacter_jax.catalogue import METHODS
from compacter_jax.methods import bottleneck, compacter, prompt_tuning
from compacter_jax.nn.activations import ACTIVATIONS
from train.__main__ import COMMANDS, _parsed, main, options_class_of
from train.cli import manual, method_flags

ROOT = Path(__file__).parents[3]


def page(name, width=100):
    return manual.page(name, options_class_of(name), width=width)


def listed_flags(text):
    """Returns the flags that have an entry, in argparse's spelling."""
    spelled = re.findall(r"^  --(\[no-\])?([\w-]+)", text, re.MULTILINE)
    return sorted("--" + name for _, name in spelled)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_one_entry(name, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(options_class_of(name), args=["--help"])
    text = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    known = re.findall(r"^\W*(?:-h, )?(--[a-z][\w-]+)", text, re.MULTILINE)
    assert listed_flags(page(name)) == sorted(set(known) - {"--help"})


@pytest.mark.parametrize("name", COMMANDS)
def test_every_entry_is_explained(name):
    # An entry ends at the next entry, the next heading or the end: first its flag, then its text.
    _, found, options = page(name).partition("\nof this command:\n")
    if not found:  # all are required
        options = page(name).partition("\nrequired:\n")[2]
    for entry in re.split(r"\n(?=  --)|\n\n\w.*:\n", options):
        assert re.match(r"  --\S+( \S+)*?(  +|\n +)\w", entry), entry


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("width", [80, 100])
def test_lines_fit_the_terminal(name, width):
    assert [line for line in page(name, width).splitlines() if len(line) > width] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert manual.EXAMPLES[name]
    for _, arguments in manual.EXAMPLES[name]:
        parsed = _parsed(name, shlex.split(arguments))
        if hasattr(parsed, "check"):
            parsed.check()


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_printed_as_one_shell_command(name):
    text = page(name, 80).replace("\\\n      ", "")
    for _, arguments in manual.EXAMPLES[name]:
        assert f"\n  python -m train {name} {arguments}\n" in text


def entry(flag):
    """Returns the text about a flag on the page of fit."""
    (text,) = re.findall(rf"^  {flag} (.*(?:\n {{10}}.*)*)", page("fit"), re.MULTILINE)
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--w-init", bottleneck.WEIGHT_INITS),
        ("--phm-c-init", compacter.RULE_INITS),
        ("--prompt-init", prompt_tuning.PROMPT_INITS),
        ("--non-linearity", ACTIVATIONS),
    ],
)
def test_what_is_to_choose_from_is_listed(flag, values):
    words = re.findall(r"[\w-]+", entry(flag))
    assert [value for value in values if value not in words] == []


def test_no_two_flags_are_explained_alike():
    of_flag = method_flags.documented(bottleneck.BottleneckConfig)
    assert len(set(of_flag.values())) == len(of_flag)
    wanted = "INT rank of each projection. Of lora: rank of each update."
    assert entry("--rank").startswith(wanted)  # a further method with ranks comes after
    assert "inputs are multiplied" in entry("--input-sites")


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        (["--learning-rate", "abc"], "Error parsing --learning-rate: 'abc' is not a number"),
        (["--max-steps", "1.5"], "Error parsing --max-steps: '1.5' is not a whole number"),
        (["--epochs", "x"], "Error parsing --epochs: 'x' is not a whole number"),
    ],
)
def test_what_is_no_number(flag, told, capsys):
    assert main(["fit", "--backbone", "DIR", "--output-dir", "run", *flag]) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")
    parsed = _parsed("fit", ["--backbone", "D", "--output-dir", "run", "--learning-rate", "None"])
    assert parsed.learning_rate is None


def test_headings_defaults_and_switches():
    text = page("fit")
    headings = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert headings[:3] == ["examples", "required", "of this command"]
    assert set(headings[3:]) >= {cls.heading for cls in METHODS.values()}
    assert "--batch-size INT          examples per update, over all devices. (default: 32)" in text
    assert (
        "--seed INT                seed of the initial values, the data order and dropout. "
        "(default: 0)" in text
    )
    assert "  --resume                  continue an interrupted run" in text
    assert "--[no-]tie-word-embeddings" in page("create-backbone")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_exits_with_zero(flag, capsys):
    assert main([flag]) == 0
    usage = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", usage, re.MULTILINE) for name in COMMANDS)
    assert main(["fit", "--task", "movie", flag]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m train fit --backbone STR")


def test_a_reader_that_has_gone_gets_no_traceback():
    """The output of `| head`, say, is closed early, and then the first write fails."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "train", "fit", "--help"]
    done = subprocess.run(
        command, check=False, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
