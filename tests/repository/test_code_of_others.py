"""Code in the folder of a model or a data set is never run, and the user is never asked to."""

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from train.data.tokens import load_tokenizer

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for folder in ("compacter_jax", "train", "benchmarks", "notebooks")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".ipynb")
]
# Functions of transformers and datasets that could run code from a folder or the hub.
READING = {"from_pretrained", "load_dataset", "load_dataset_builder", "pipeline"}
# PEFT has no such argument, since its folders hold no code.
OTHERS = {"PeftModel"}


def sources(path):
    """Yields the Python code in a file as syntax trees."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        return [ast.parse(text)]
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = [
        [line for line in "".join(cell["source"]).splitlines() if not line.startswith(("%", "!"))]
        for cell in cells
    ]
    return [ast.parse("\n".join(each)) for each in lines]


def calls(path):
    """Yields the calls that read models or data."""
    for tree in sources(path):
        for node in ast.walk(tree):
            function = node.func if isinstance(node, ast.Call) else None
            name = getattr(function, "attr", getattr(function, "id", None))
            owner = getattr(function, "value", None)
            if name in READING and getattr(owner, "attr", None) not in OTHERS:
                yield node


def test_every_call_says_that_code_is_not_trusted():
    names = set()
    for path in FILES:
        for call in calls(path):
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert given.get("trust_remote_code") == "False", f"{path}: {ast.unparse(call)}"
            names.add(path.name)
    assert {"tokens.py", "hub.py", "loading.py", "quickstart.py", "quickstart.ipynb"} <= names


@pytest.mark.contract
@pytest.mark.parametrize(
    "auto_map",
    [
        {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        {"AutoTokenizer": [None, "evil.Evil"]},
        ["evil.Evil", None],  # the format of transformers before 4.20
    ],
    ids=str,
)
def test_the_code_of_a_tokenizer_is_not_run(auto_map, tiny_backbone, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(tiny_backbone, tmp_path / "evil")
    settings = {"tokenizer_class": "Evil", "auto_map": auto_map, "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(ran)!r}, 'w')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Evil(PreTrainedTokenizerFast): pass\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    limits = {"vocab_size": 99, "max_position_embeddings": 64, "max_length": 8}
    with pytest.raises(ValueError, match=r"needs to run its own code, 'evil\.Evil'") as error:
        load_tokenizer(folder, **limits)
    assert len(str(error.value)) <= 500
    assert not ran.exists()
    assert capsys.readouterr().out == ""
