"""Extracts code blocks and rows of tables from Markdown pages."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def code_blocks(page, kind=""):
    """Returns the code blocks of a page in one language, such as python."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for its_kind, block in found if its_kind == kind]


def cells(line):
    """Returns the cells of a row of a table."""
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def rows_of_tables(page):
    """Returns every row of every table of a page as a list of cells."""
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = [cells(line) for line in lines if line.startswith("|")]
    return [row for row in rows if any(row) and row[0]]
