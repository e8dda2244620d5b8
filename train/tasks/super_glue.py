"""Tasks of SuperGLUE."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from train.data.tokens import columns_of
from train.tasks import metrics
from train.tasks.benchmark import Benchmark, Choice, Columns, Rows, keyed


class MultiRC(Benchmark):
    """Answers to questions on a paragraph, each true or false by itself."""

    def for_encoder(self, rows: Rows) -> Columns:
        """Returns pairs of the paragraph and the question with an answer."""
        pairs = zip(rows["question"][:], rows["answer"][:], strict=True)
        return {
            "sentence": [_without_tags(text) for text in rows["paragraph"][:]],
            "sentence2": [f"{question} {answer}" for question, answer in pairs],
            **self.targets(rows),
        }

    def for_decoder(self, rows: Rows) -> Columns:
        """Returns texts that end with the paragraph, which is therefore what is truncated."""
        parts = zip(rows["question"][:], rows["answer"][:], rows["paragraph"][:], strict=True)
        texts = [
            keyed({"question": question, "answer": answer, "paragraph": _without_tags(paragraph)})
            for question, answer, paragraph in parts
        ]
        return {"text": texts, **self.targets(rows)}

    def questions(self, rows: Rows) -> list[Hashable]:
        """Returns the question of each row with its paragraph."""
        return list(zip(rows["paragraph"][:], rows["question"][:], strict=True))

    def scores(self, predictions: Sequence[Any], rows: Rows) -> dict[str, float]:
        """Returns `exact_match`: the fraction of questions with all answers judged correctly.

        The official F1a, over all answers, is `f1`.
        """
        right = [a == b for a, b in zip(predictions, rows["label"][:], strict=True)]
        return {"exact_match": metrics.all_of_group(right, self.questions(rows))}


class WordInContext(Benchmark):
    """WiC: pairs of sentences, and a word that has the same meaning in both or not."""

    def for_encoder(self, rows: Rows) -> Columns:
        """Returns pairs of sentences, with the word before the first."""
        pairs = zip(rows["word"][:], rows["sentence1"][:], strict=True)
        return {
            "sentence": [f"{word}: {sentence}" for word, sentence in pairs],
            "sentence2": rows["sentence2"][:],
            **self.targets(rows),
        }

    def for_decoder(self, rows: Rows) -> Columns:
        """Returns texts with the empty `pos:` of the paper's example."""
        columns = super().for_decoder(rows)
        return {**columns, "text": [f"pos: {text}" for text in columns["text"]]}


class Winograd(Benchmark):
    """WSC: texts with a marked pronoun, and a marked noun that it refers to or not.

    T5's own models were trained to write the noun. Here, as in the Compacter paper's code, both
    words are also marked for an encoder-decoder.
    """

    def for_encoder(self, rows: Rows) -> Columns:
        """Returns the marked text as a single sentence."""
        return {"sentence": self._marked(rows), **self.targets(rows)}

    def for_decoder(self, rows: Rows) -> Columns:
        """Returns the marked text."""
        return {"text": [keyed({"text": text}) for text in self._marked(rows)]} | self.targets(rows)

    def _marked(self, rows: Rows) -> list[str]:
        names = ("text", "span1_index", "span1_text", "span2_index", "span2_text")
        marked = []
        for row, values in enumerate(zip(*(rows[name][:] for name in names), strict=True), 1):
            text, index1, span1, index2, span2 = values
            try:
                marked.append(_marked(text, {"*": (int(index1), span1), "#": (int(index2), span2)}))
            except ValueError as error:
                raise ValueError(f"row {row} of {self.name}: {error}") from error
        return marked


class Copa(Choice):
    """Choice of the sentence that is the cause or the effect of a premise; a label for T5."""

    def candidates(self, rows: Rows) -> list[list[str]]:
        """Returns the two sentences of each row."""
        return [list(two) for two in zip(rows["choice1"][:], rows["choice2"][:], strict=True)]

    def pairs(self, rows: Rows) -> list[list[tuple[str, str]]]:
        """Returns the premise, with the question in words, and a sentence."""
        words = {"cause": "What was the cause?", "effect": "What was the effect?"}
        premises = zip(rows["premise"][:], rows["question"][:], strict=True)
        asked = [f"{premise} {words.get(question, question)}" for premise, question in premises]
        rows_of = zip(asked, self.candidates(rows), strict=True)
        return [[(first, second) for second in choices] for first, choices in rows_of]

    def right(self, rows: Rows) -> list[list[bool]] | None:
        """Returns whether each candidate is right, by the label."""
        if "label" not in columns_of(rows):
            return None
        return [[label == 0, label == 1] for label in rows["label"][:]]


class Record(Choice):
    """ReCoRD: choice of the entity of a passage that a query leaves out; T5 writes its name."""

    @property
    def wanted(self) -> str:
        """Column with the right names; an entity may have several."""
        return "answers"

    def check(self, rows: Rows) -> None:
        """Checks that every row has entities, and answers that are texts."""
        self.candidates(rows)
        for row, names in enumerate(rows["answers"][:], 1):
            if not names or not all(isinstance(name, str) and name.strip() for name in names):
                raise ValueError(
                    f"row {row} of {self.name} has no answer, or an empty one; remove or fill it"
                )

    def unanswered(self, rows: Rows) -> int:
        """Returns the number of rows without a right name."""
        return sum(not names for names in rows["answers"][:])

    def candidates(self, rows: Rows) -> list[list[str]]:
        """Returns the names of the entities of each row, each once."""
        found = [list(dict.fromkeys(names)) for names in rows["entities"][:]]
        for row, names in enumerate(found, 1):
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"row {row} of {self.name} has no entities to choose from")
        return found

    def pairs(self, rows: Rows) -> list[list[tuple[str, str]]]:
        """Returns the passage, and the query with a name filled in."""
        # All candidates of a passage share one string: there are a million candidates.
        passages = map(_without_highlights, rows["passage"][:])
        parts = zip(passages, rows["query"][:], self.candidates(rows), strict=True)
        return [
            [(passage, query.replace("@placeholder", name)) for name in names]
            for passage, query, names in parts
        ]

    def right(self, rows: Rows) -> list[list[bool]] | None:
        """Returns whether each candidate is right, by the answers."""
        if "answers" not in columns_of(rows):
            return None
        both = zip(self.candidates(rows), rows["answers"][:], strict=True)
        return [[name in answers for name in names] for names, answers in both]

    def for_decoder(self, rows: Rows) -> Columns:
        """Returns an example for each answer; `row` is the row of the example."""
        passages = map(_without_highlights, rows["passage"][:])
        parts = zip(rows["query"][:], self.candidates(rows), passages, strict=True)
        texts = [
            keyed({"query": query, "entities": ", ".join(names), "passage": passage})
            for query, names, passage in parts
        ]
        if "answers" not in columns_of(rows):
            return {"text": texts}
        pairs = [
            (row, name)
            for row, names in enumerate(rows["answers"][:])
            for name in dict.fromkeys(names)
        ]
        return {
            "text": [texts[row] for row, _ in pairs],
            "target": [name for _, name in pairs],
            "row": [row for row, _ in pairs],
        }

    def scores(self, predictions: Sequence[Any], rows: Rows) -> dict[str, float]:
        """Returns `exact_match` and `f1`, as the official script computes them."""
        return metrics.answer_metrics(predictions, rows["answers"][:])


def super_glue(made: type[Benchmark], name: str, *columns: str, **fields: Any) -> Benchmark:
    """Builds a task of SuperGLUE, whose columns are text unless `fields` says otherwise."""
    fields = {"configuration": name, "columns": dict.fromkeys(columns, str), **fields}
    return made(name=name, repository="aps/super_glue", **fields)


ANSWER_METRICS = ("exact_match", "f1")


def _without_tags(paragraph: str) -> str:
    """Returns a paragraph of MultiRC without the HTML around its sentence numbers."""
    return re.sub(r"</?b>", "", paragraph.replace("<br>", " "))


def _without_highlights(passage: str) -> str:
    """Returns a passage of ReCoRD with the points of its summary as sentences."""
    return re.sub(r"(?<=[.?!\"'])\n@highlight\n", " ", passage).replace("\n@highlight\n", ". ")


def _marked(text: str, marks: Mapping[str, tuple[int, str]]) -> str:
    """Returns `text` with a sign on both sides of each span.

    Args:
      text: the text.
      marks: sign -> index of the span's first word, and the span.

    Raises:
      ValueError: if `text` has fewer words.
    """
    words = list(re.finditer(r"\S+", text))
    starts, ends = [word.start() for word in words], [word.end() for word in words]
    spans = []
    for sign, (index, span) in marks.items():
        if not 0 <= index < len(starts):
            raise ValueError(f"there is no word {index} in the {len(starts)} words of {text!r:.80}")
        start = starts[index]
        end = start + len(span)
        if (
            text[start:end].lower() != span.lower()
        ):  # some spans omit a punctuation mark or an apostrophe
            end = ends[min(index + len(span.split()), len(ends)) - 1]
        spans.append((start, end, sign))
    for start, end, sign in sorted(spans, reverse=True):
        text = f"{text[:start]}{sign}{text[start:end]}{sign}{text[end:]}"
    return text
