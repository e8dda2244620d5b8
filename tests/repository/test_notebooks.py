"""Tests the notebooks: both versions agree, outputs are present and readable, every cell runs."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import QUICK

jupytext = pytest.importorskip("jupytext")
pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[2] / "notebooks"
_spec = importlib.util.spec_from_file_location("notebooks_run", FOLDER / "run.py")
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)
LIMIT = 90 * len(run.NAMES)  # total seconds at small size; a notebook that hangs fails


@pytest.fixture(scope="module", params=run.NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def notebook(name):
    return jupytext.read(FOLDER / f"{name}.ipynb")


def test_no_notebook_is_forgotten():
    stems = {path.stem for path in FOLDER.glob("*.ipynb")}
    assert stems == set(run.NAMES)


def test_both_versions_are_alike(name, notebook):
    text = jupytext.read(FOLDER / f"{name}.py")
    cells = [
        [(cell.cell_type, cell.source) for cell in version.cells] for version in (text, notebook)
    ]
    assert cells[0] == cells[1], f"run `python notebooks/run.py {name}`, or `jupytext --sync`"
    formats = [version.metadata["jupytext"]["formats"] for version in (text, notebook)]
    assert formats == ["ipynb,py:percent"] * 2


def test_outputs_are_there_and_of_no_machine(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert run.machine_paths(notebook) == []


def test_first_cell_is_for_colab_alone(notebook):
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "google.colab" in first.source
    assert first.outputs == []


def test_in_colab_the_owner_of_the_repository_must_be_given(notebook, tmp_path, monkeypatch):
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "google.colab", None)
    with pytest.raises(AssertionError, match="give OWNER above"):
        exec(first.source.replace('OWNER = "', 'OWNER = ""  # "'), {})


def test_paths_of_a_machine_are_found():
    def of(text):
        output = {"output_type": "stream", "name": "stdout", "text": text}
        cell = jupytext.reads("# %%\n1", "py:percent").cells[0]
        cell.outputs = [output]
        return run.machine_paths(type("Notebook", (), {"cells": [cell]}))

    assert of("read /home/someone/model.safetensors") == ["/home/someone/model.safetensors"]
    assert of("layer/0/output and https://arxiv.org/home/x, 3/4") == []


@pytest.fixture(scope="module")
def deadline():
    return time.monotonic() + LIMIT


@pytest.mark.slow
def test_runs(name, deadline):
    if name == "adapterhub_interop":
        for oracle in ("torch", "adapters", "peft"):
            pytest.importorskip(oracle)
    # With the tests' cache, but without their four devices. transformers takes seconds to import
    # PyTorch, which one notebook needs.
    of_torch = "1" if name == "adapterhub_interop" else "0"
    environment = os.environ | {"XLA_FLAGS": QUICK, "USE_TORCH": of_torch}
    command = [sys.executable, str(FOLDER / "run.py"), "--check", name]
    left = max(deadline - time.monotonic(), 1)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=left
    )
    assert done.returncode == 0, done.stderr[-4000:]
