"""Splits of utterances as files: the base of the data sets of `benchmarks.speech`."""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from compacter_jax.files import replace_file


@dataclasses.dataclass(frozen=True)
class SpeechData(abc.ABC):
    """Utterances of English, and what to write for them in each language.

    Attributes:
      source: the folder of what the utterances are made of.
      title: what is heard and written, a line for reports.
      languages: the languages to write.
      tests: split of a test -> what is new in it; the claim is tested on the first.
      metrics: metric -> its name in reports; the claim is tested by the first.
    """

    source: Path
    title: ClassVar[str]
    languages: ClassVar[tuple[str, ...]]
    tests: ClassVar[Mapping[str, str]]
    metrics: ClassVar[Mapping[str, str]]

    @abc.abstractmethod
    def utterances(
        self, split: str, count: int, folder: Path
    ) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
        """Yields rows of utterances without their targets, and language -> target.

        Args:
          split: "train", "validation", or a test.
          count: the number of utterances.
          folder: the folder that the names of sound files in rows are relative to. The files are
            there when their row is yielded.

        Raises:
          OSError, ValueError: if the source cannot be read or has too few utterances.
        """

    @property
    def described(self) -> dict[str, Any]:
        """Description of the data for the report, JSON-ready."""
        return {
            "title": self.title,
            "languages": list(self.languages),
            "tests": dict(self.tests),
            "metrics": dict(self.metrics),
        }

    def write_splits(self, folder: Path, counts: Mapping[str, int]) -> dict[str, Path]:
        """Writes sounds, and for each split a file with a row for each utterance and language.

        Args:
          folder: the folder to write; what it has is used again.
          counts: split -> number of utterances.

        Returns:
          Split -> its file.

        Raises:
          OSError, ValueError: as `utterances`; or if the folder has another number of utterances.
        """
        paths = {}
        for split, count in counts.items():
            paths[split] = path = folder / f"{split}.jsonl"
            if path.exists():
                self._check_count(path, count)
                continue
            (folder / split).mkdir(parents=True, exist_ok=True)
            lines = [
                json.dumps(
                    {**row, "target": target, "target_language": language}, ensure_ascii=False
                )
                for row, targets in self.utterances(split, count, folder)
                for language, target in targets.items()
            ]
            # Written last, under its name at once: a folder without it is not finished.
            with replace_file(path) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return paths

    def _check_count(self, path: Path, count: int) -> None:
        rows = len(path.read_text(encoding="utf-8").splitlines())
        found = rows // len(self.languages)
        if found != count:
            raise ValueError(
                f"{path} has {found:,} utterances, not {count:,}; give the same numbers as before, "
                "or another --output-dir"
            )
