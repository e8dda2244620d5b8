"""SQuAD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train.data.tokens import columns_of
from train.tasks import metrics
from train.tasks.benchmark import Benchmark, Columns, Rows, keyed


class Squad(Benchmark):
    """Questions whose answers are parts of a context; T5 writes the answers.

    A question may have no answer, as in SQuAD v2: no text, an empty one or null. An encoder then
    learns to predict that there is none, and T5 to write nothing.
    """

    @property
    def wanted(self) -> str:
        """Column with `text` and `answer_start` of every right answer."""
        return "answers"

    @property
    def prefix(self) -> str:
        """Empty: the paper's input begins with the question."""
        return ""

    def answers(self, rows: Rows) -> list[list[str]]:
        """Returns the texts of the answers to each question; empty if there is none.

        Raises:
          ValueError: if the `answers` of a row are no texts; the message names the row.
        """
        found = []
        for row, answer in enumerate(rows["answers"][:], 1):
            is_none = answer is None or isinstance(answer, dict)
            texts = (answer or {}).get("text") or [] if is_none else None
            if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
                raise ValueError(
                    f"row {row} of {self.name}: answers are {str(answer)[:80]!r}, not an object "
                    "with the lists text and answer_start"
                )
            found.append([text for text in texts if text.strip()])
        return found

    def check(self, rows: Rows) -> None:
        """Checks that every answer has a position, and that `answers` are valid."""
        for row, (texts, answer) in enumerate(
            zip(self.answers(rows), rows["answers"][:], strict=True), 1
        ):
            starts = (answer or {}).get("answer_start") or []
            if texts and len(starts) != len(answer["text"]):
                raise ValueError(
                    f"row {row} of {self.name}: {len(answer['text'])} answers, but {len(starts)} "
                    "positions in answer_start; give the same number of both"
                )

    def unanswered(self, rows: Rows) -> int:
        """Returns the number of questions without an answer."""
        return sum(not texts for texts in self.answers(rows))

    def for_decoder(self, rows: Rows) -> Columns:
        """Returns inputs with the first answer as the target, an empty text if there is none."""
        parts = zip(rows["question"][:], rows["context"][:], strict=True)
        texts = [keyed({"question": question, "context": context}) for question, context in parts]
        if "answers" not in columns_of(rows):
            return {"text": texts}
        return {"text": texts, "target": [next(iter(found), "") for found in self.answers(rows)]}

    def scores(self, predictions: Sequence[Any], rows: Rows) -> dict[str, float]:
        """Returns `exact_match` and `f1`, as the official script computes them."""
        return metrics.answer_metrics(predictions, self.answers(rows))
