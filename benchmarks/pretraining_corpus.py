"""English text for pre-training a small T5, from the sentiment sets and unpacked Debian packages.

    apt-get download fortunes debian-handbook dict-gcide
    for package in *.deb; do dpkg -x $package unpacked; done
    python -m benchmarks.pretraining_corpus --output corpus.txt unpacked

Only the training sentences of the sentiment sets are used. Paragraphs are documents, separated by
blank lines, each once, in an order that depends on the text alone.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html.parser
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from compacter_jax.files import replace_file

SENTIMENT = Path(__file__).parent.parent / "train" / "sentiment"
BLOCKS = {"p", "li", "td", "dd", "dt", "pre", "h1", "h2", "h3", "h4", "div", "title"}
# Languages of the handbook other than English, and files that are no prose.
SKIPPED = re.compile(
    r"/html/(?!en-US)[a-z]{2}-[A-Z]{2}/|/(copyright|changelog|NEWS|README)|offensive"
)
# Pronunciation, sources and cross-references in the entries of a dictionary.
DICTIONARY_MARKUP = re.compile(r"\\[^\\]*\\,?|\[[^\]]*\]|[{}]")
SENTENCES_PER_DOCUMENT = 8
SHORTEST = 40


class _Paragraphs(html.parser.HTMLParser):
    """Parser that collects the text between the tags of `BLOCKS`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag in BLOCKS:
            self.found.append("".join(self.text))
            self.text = []

    def handle_endtag(self, tag: str) -> None:
        self.handle_starttag(tag, ())

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def sentiment_documents() -> Iterator[str]:
    """Yields documents of several training sentences of one sentiment set."""
    for path in sorted(SENTIMENT.glob("*/train.parquet")):
        sentences = pq.read_table(path, columns=["sentence"])["sentence"].to_pylist()
        for start in range(0, len(sentences), SENTENCES_PER_DOCUMENT):
            yield " ".join(sentences[start : start + SENTENCES_PER_DOCUMENT])


def file_paragraphs(path: Path) -> Iterator[str]:
    """Yields the paragraphs of an HTML page, a dictionary of dictd, or a file of fortunes."""
    if path.suffix == ".html":
        parser = _Paragraphs()
        parser.feed(path.read_text(encoding="utf-8", errors="replace"))
        yield from parser.found
    elif path.name.endswith(".dict.dz"):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
        for entry in re.split(r"\n(?=\S)", text):
            yield DICTIONARY_MARKUP.sub(" ", entry)
    elif path.parent.name == "fortunes" and not path.suffix:
        yield from re.split(r"\n%\n", path.read_text(encoding="utf-8", errors="replace"))


def is_prose(paragraph: str) -> bool:
    """Returns True if a paragraph is long enough and mostly English letters and spaces."""
    letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in paragraph)
    return len(paragraph) >= SHORTEST and letters >= 0.85 * len(paragraph)


def documents(folders: list[Path]) -> Iterator[str]:
    """Yields all documents once, with single spaces for white space."""
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    paragraphs = (
        p for path in files if not SKIPPED.search(str(path)) for p in file_paragraphs(path)
    )
    seen = set()
    for paragraph in itertools.chain(sentiment_documents(), paragraphs):
        text = " ".join(paragraph.replace("\ufffd", " ").split())
        if text not in seen and is_prose(text):
            seen.add(text)
            yield text


def main() -> None:
    """Writes the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="unpacked packages")
    parser.add_argument("--output", type=Path, required=True, help="text file to write")
    arguments = parser.parse_args()
    found = sorted(documents(arguments.folders), key=lambda t: hashlib.sha256(t.encode()).digest())
    with replace_file(arguments.output) as temporary:
        temporary.write_text("\n\n".join(found) + "\n", encoding="utf-8")
    characters = sum(map(len, found))
    print(f"{len(found):,} documents, {characters:,} characters in {arguments.output}")


if __name__ == "__main__":
    main()
