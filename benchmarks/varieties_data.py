"""Texts and tagged sentences of `benchmarks.varieties`, written as files for the commands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

# Names of languages in NTREX, where they are other than the first letters of these.
_NTREX = {
    "nb": "nob",
    "nn": "nno",
    "da": "dan",
    "sv": "swe",
    "is": "isl",
    "en": "eng",
    "hr": "hrv",
    "sr": "srp_Latn",
    "sk": "slk",
    "ru": "rus",
    "be": "bel",
}


@dataclasses.dataclass(frozen=True)
class Group:
    """Languages with adapters, and varieties without.

    Attributes:
      languages: languages with an adapter of their own; the task is trained on the first.
      varieties: varieties that no adapter is for.
      untagged: languages without sentences of the task.
    """

    languages: tuple[str, ...]
    varieties: tuple[str, ...]
    untagged: tuple[str, ...] = ()

    @property
    def left_out(self) -> tuple[str, ...]:
        """Languages that are tagged once without their own adapter: all but the task's."""
        return tuple(each for each in self.languages[1:] if each not in self.untagged)

    def tagged_in(self, folder: Path) -> Group:
        """Returns the group without the varieties of which a folder has no tagged sentences.

        A language without them keeps its adapter, and is not tagged itself.

        Args:
          folder: the folder of a task, with a table for each variety.

        Raises:
          ValueError: if it has no table of the first language.
        """

        def has(name: str) -> bool:
            return (folder / f"{name}.parquet").exists()

        if not has(self.languages[0]):
            raise ValueError(
                f"{folder} has no {self.languages[0]}.parquet, whose sentences the task learns "
                "from; give a folder with the tables of varieties as --tagging"
            )
        untagged = tuple(each for each in self.languages if not has(each))
        return Group(self.languages, tuple(filter(has, self.varieties)), untagged)


GROUPS = {
    "1": Group(("nb", "da", "sv", "is"), ("nn", "nn_spoken", "fo", "fo_bible")),
    "1+en": Group(("nb", "da", "sv", "is", "en"), ("nn", "nn_spoken", "fo", "fo_bible")),
    "2": Group(("hr", "sr", "sk", "ru"), ("be",)),
}


def emea_of(condition: str) -> tuple[int, float] | None:
    """Returns steps and learning rate of a condition of EMEA; None for another."""
    _, mark, setting = condition.rpartition("entropy-")
    if not mark:
        return None
    steps, rate = setting.split("-")
    return int(steps), float(rate)


@dataclasses.dataclass(frozen=True)
class Files:
    """Files that `write` makes, below one folder.

    Attributes:
      folder: the folder.
    """

    folder: Path

    def text(self, language: str) -> Path:
        """Returns the plain text of a language; of all for "all"."""
        return self.folder / f"{language}.txt"

    def tagged(self, variety: str, split: str) -> Path:
        """Returns the sentences with tags of a variety."""
        return self.folder / f"{variety}-{split}.jsonl"

    def tags(self) -> list[str]:
        """Returns all tags, sorted."""
        found: list[str] = json.loads((self.folder / "tags.json").read_text(encoding="utf-8"))
        return found


def write(
    folder: Path,
    group: Group,
    task: str,
    *,
    tagging: Path,
    ntrex: Path | None,
    sizes: dict[str, int],
) -> Files:
    """Writes the texts of the languages and the tagged sentences of all, unless they are there.

    Args:
      folder: the folder of the files.
      group: the languages and varieties.
      task: `pos` or `ner`, a folder of `tagging` with a table for each variety.
      tagging: the folder of tagged sentences, with the columns `tokens`, `tags` and `split`.
      ntrex: a table with a column of sentences for each language; None without.
      sizes: `text`, the number of sentences of a language's text; `train`, `validation` and
        `test`, the numbers of tagged sentences.

    Raises:
      ValueError: if a variety has no sentences of a split.
    """
    files = Files(folder)
    if (folder / "done").exists():
        return files
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    for language in group.languages:
        texts[language] = _text(language, task, tagging, ntrex, sizes["text"])
        files.text(language).write_text("\n".join(texts[language]) + "\n", encoding="utf-8")
    joined = [line for lines in zip(*texts.values(), strict=False) for line in lines]
    files.text("all").write_text("\n".join(joined) + "\n", encoding="utf-8")
    tags: set[str] = set()
    for variety in (group.languages[0], *group.left_out, *group.varieties):
        splits = ("train", "validation", "test") if variety == group.languages[0] else ()
        for split in splits or ("validation", "test"):
            rows = _rows(tagging / task / f"{variety}.parquet", split, sizes[split])
            tags.update(tag for row in rows for tag in row["tags"])
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            files.tagged(variety, split).write_text("".join(lines), encoding="utf-8")
    (folder / "tags.json").write_text(json.dumps(sorted(tags)), encoding="utf-8")
    (folder / "done").touch()
    return files


def _text(language: str, task: str, tagging: Path, ntrex: Path | None, count: int) -> Sequence[str]:
    """Returns sentences of a language without tags, half of them news where there are some."""
    sentences = [" ".join(row["tokens"]) for row in _train_rows(tagging, task, language)]
    news: list[str] = []
    if ntrex is not None and _NTREX.get(language) in pq.read_schema(ntrex).names:
        column = pq.read_table(ntrex, columns=[_NTREX[language]]).column(0).to_pylist()
        news = [" ".join(text.split()) for text in column if text]
    generator = np.random.default_rng(0)
    drawn = [list(generator.permutation(each)) if each else [] for each in (sentences, news)]
    least = min(len(drawn[1]), count // 2)
    chosen = [*drawn[0][: count - least], *drawn[1][:least]]
    return [str(chosen[at]) for at in generator.permutation(len(chosen))]


def _train_rows(tagging: Path, task: str, language: str) -> list[dict[str, list[str]]]:
    """Returns the training sentences of a language, of parts of speech where the task has none."""
    path = tagging / task / f"{language}.parquet"
    splits = pq.read_table(path, columns=["split"])["split"].to_pylist() if path.exists() else []
    return _rows(path if "train" in splits else tagging / "pos" / path.name, "train")


def _rows(path: Path, split: str, count: int | None = None) -> list[dict[str, list[str]]]:
    """Returns random rows of a split with `tokens` and `tags`; the same ones in every call."""
    table = pq.read_table(path, columns=["tokens", "tags", "split"])
    rows = [row for row in table.to_pylist() if row.pop("split") == split]
    if not rows:
        raise ValueError(f"{path} has no rows of the split {split}")
    order = np.random.default_rng(0).permutation(len(rows))[:count]
    return [rows[at] for at in order]
