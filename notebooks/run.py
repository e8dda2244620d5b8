"""Runs notebooks: `python notebooks/run.py [NAME ...]` writes NAME.ipynb, with its outputs.

With --check they are run at small size, and nothing is written. The text version, NAME.py, is the
source: edit that, or edit in Jupyter with jupytext, which keeps both alike.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).parent
NAMES = (
    "quickstart",
    "functional_layers",
    "t5_text_to_text",
    "low_resource",
    "adapterhub_interop",
    "tpu_pmap",
    "embeddings",
    "varieties",
    "translation",
    "speech",
)
# What would say on whose machine a notebook was run.
_MACHINE = re.compile(r"(?<![\w:/.])/(home|root|work|tmp|Users|var|usr|opt)/[\w./-]+")


def executed(name: str, environment: Mapping[str, str], *, timeout: int = 3600) -> Any:
    """The notebook with its outputs, run from top to bottom by a new kernel.

    Args:
      name: one of `NAMES`.
      environment: of the kernel's process.
      timeout: seconds that one cell may take.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = jupytext.read(FOLDER / f"{name}.py")
    client = nbclient.NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    # adapters imports tqdm before the notebook's own helper can silence it; see demo.py.
    client.execute(env={**environment, "PYTHONWARNINGS": "ignore:IProgress not found"})
    # The same notebook again is then the same file.
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell["metadata"].pop("execution", None)
    notebook.metadata.pop("language_info", None)
    return notebook


def machine_paths(notebook: Any) -> list[str]:
    """Paths of the machine in the outputs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [json.dumps({**output, "data": _without_images(output)}) for output in outputs]
    return sorted({found[0] for text in texts for found in _MACHINE.finditer(text)})


def _without_images(output: Any) -> dict[str, Any]:
    data = output.get("data", {})
    return {kind: shown for kind, shown in data.items() if not kind.startswith("image/")}


def main(arguments: list[str]) -> None:
    """Runs the notebooks named, or all, and writes them or, with --check, does not."""
    check = "--check" in arguments
    names = [name for name in arguments if name != "--check"] or NAMES
    environment = {**os.environ, **({"NOTEBOOKS_SMALL": "1"} if check else {})}
    for name in names:
        print(f"running {name}", flush=True)
        notebook = executed(name, environment)
        if not check:
            nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        if found := machine_paths(notebook):
            sys.exit(f"{name} prints paths of this machine: {', '.join(found)}")


if __name__ == "__main__":
    main(sys.argv[1:])
