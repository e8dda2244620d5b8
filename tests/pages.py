"""What Markdown pages hold: blocks of code, and rows of tables."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def code_blocks(page, kind=""):
    """The blocks of code of a page that are of a kind, such as python."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for its_kind, block in found if its_kind == kind]


def cells(line):
    """Those of a row of a table."""
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def rows_of_tables(page):
    """Every row of every table of a page, cell by cell."""
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = [cells(line) for line in lines if line.startswith("|")]
    return [row for row in rows if any(row) and row[0]]
