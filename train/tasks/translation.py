"""Translation tasks of WMT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train.data.tokens import columns_of
from train.tasks import metrics
from train.tasks.benchmark import Benchmark, Columns, Rows

LANGUAGES = {
    "cs": "Czech",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "fi": "Finnish",
    "fr": "French",
    "gu": "Gujarati",
    "hi": "Hindi",
    "kk": "Kazakh",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "ro": "Romanian",
    "ru": "Russian",
    "tr": "Turkish",
    "zh": "Chinese",
}


@dataclass(frozen=True, kw_only=True)
class Translation(Benchmark):
    """Sentences to translate, in rows `translation: {"en": …, "ro": …}`; needs a decoder.

    Attributes:
      source: the code of the source language.
      to: the code of the target language.
    """

    source: str
    to: str

    @property
    def wanted(self) -> str:
        """Column with both languages."""
        return "translation"

    @property
    def prefix(self) -> str:
        """Instruction in words, as in the T5 paper."""
        return f"translate {LANGUAGES[self.source]} to {LANGUAGES[self.to]}"

    def usable(self, rows: Rows) -> list[bool]:
        """Returns, for each row, whether both sides have text, which some rows of WMT lack."""
        usable = []
        for row, pair in enumerate(rows["translation"][:], 1):
            if missing := [code for code in (self.source, self.to) if code not in pair]:
                raise ValueError(
                    f"row {row} of {self.name} has no {missing[0]!r}; it has {', '.join(pair):.200}"
                )
            usable.append(all((pair[code] or "").strip() for code in (self.source, self.to)))
        return usable

    def user_messages(self) -> list[str]:
        """Returns a line if BLEU counts other words than common implementations."""
        _, told = metrics.bleu_tokenizer(self.to)
        return [told] if told else []

    def named(self, rows: Rows) -> Rows:
        """Returns `rows`; a column `sentence` may lack translations."""
        return rows if "sentence" in columns_of(rows) else super().named(rows)

    def for_decoder(self, rows: Rows) -> Columns:
        """Returns a column `sentence`, which follows the prefix and a colon."""
        if "sentence" in columns_of(rows):
            columns = {"sentence": rows["sentence"][:]}
            if "target" in columns_of(rows):
                columns["target"] = rows["target"][:]
            return columns
        pairs = rows["translation"][:]
        for row, pair in enumerate(pairs, 1):
            if not pair.get(self.source):
                raise ValueError(f"row {row} of {self.name} has no text in {self.source!r}")
        columns = {"sentence": [pair[self.source] for pair in pairs]}
        translated = [bool(pair.get(self.to)) for pair in pairs]
        if all(translated):
            columns["target"] = [pair[self.to] for pair in pairs]
        elif any(translated):
            raise ValueError(
                f"row {1 + translated.index(False)} of {self.name} has no text in {self.to!r}, "
                "but other rows have; fill it, or leave out the translations of all rows"
            )
        return columns

    def scores(self, predictions: Sequence[Any], rows: Rows) -> dict[str, float]:
        """Returns `bleu`, from 0 to 100, by the words of the target language."""
        return {"bleu": metrics.bleu(predictions, self.for_decoder(rows)["target"], self.to)}
