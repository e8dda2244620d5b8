"""How Sphinx builds the documentation; `make docs` runs it, and warnings are errors."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import compacter_jax
from train.__main__ import USAGE, options_class_of
from train.cli import manual

project = "compacter_jax"
copyright = "the authors of compacter_jax"
version = release = compacter_jax.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"compacter_jax {release}"

# Docstrings write code between single backticks, as Markdown does.
default_role = "code"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has the types
python_maximum_signature_line_length = 88
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3

_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_SEVERAL_NAMES = re.compile(r"^(\s+\w+), (\w+):")
# Flax gives every module these two, and nobody passes them.
_OF_EVERY_MODULE = re.compile(r",\s*parent: .*?name: str \| None = None(?=\))", re.DOTALL)


def setup(app: Any) -> None:
    """Registers what changes docstrings and signatures for the page."""
    # Before Napoleon, which comes at 500.
    app.connect("autodoc-process-docstring", _prepare_docstring, priority=400)
    app.connect("autodoc-process-signature", _shorten_signature)
    app.add_directive("manual", Manual)


class Manual(SphinxDirective):
    """The help of a command of `python -m train`, or without an argument that of all."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """What the command prints, as it prints it."""
        text = USAGE.strip()
        if self.arguments:
            text = manual.page(self.arguments[0], options_class_of(self.arguments[0]), width=96)
        return [nodes.literal_block(text, text, language="none")]


def _prepare_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: Any) -> None:
    lines[:] = [_ARXIV.sub(_arxiv_link, line) for line in _with_list_tables(lines)]
    # Napoleon would take the first of several names for a type.
    lines[:] = [_SEVERAL_NAMES.sub(r"\1/\2:", line) for line in lines]


def _arxiv_link(found: re.Match[str]) -> str:
    return f"`{found[0]} <https://arxiv.org/abs/{found[1]}>`__"


def _with_list_tables(lines: list[str]) -> list[str]:
    """The lines with each Markdown table as a list-table, which reStructuredText knows."""
    made: list[str] = []
    table: list[str] = []
    for line in [*lines, ""]:
        # A row may go on in the next line, which is then indented.
        if table and line.startswith("  "):
            table[-1] += " " + line.strip()
        elif line.startswith("|"):
            table.append(line)
        else:
            made += _list_table(table)
            table = []
            made.append(line)
    return made[:-1]


def _list_table(rows: list[str]) -> list[str]:
    if not rows:
        return []
    made = [".. list-table::", "   :header-rows: 1", ""]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if set("".join(cells)) <= set("-: "):
            continue
        made += [f"   {'  -' if i else '* -'} {cell}" for i, cell in enumerate(cells)]
    return [*made, ""]


def _shorten_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    if signature is None:
        return None
    return _without_addresses(_OF_EVERY_MODULE.sub("", signature)), returns


def _without_addresses(signature: str) -> str:
    """Defaults that are functions or classes, by name, and types without their modules."""
    signature = re.sub(r"<function (\w+)\.<locals>[^>]*>", r"\1(...)", signature)
    signature = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", signature)
    return signature.replace("~collections.abc.", "").replace("~typing.", "").replace("~", "")
