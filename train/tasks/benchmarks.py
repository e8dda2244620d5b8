"""The data sets of GLUE, SuperGLUE, SQuAD and WMT: how their rows are put to a backbone.

An encoder reads sentences or pairs of them; an encoder-decoder reads text as in appendix D of the
T5 paper, arXiv:1910.10683, and writes text. Rows have the columns of the hub.
"""

from __future__ import annotations

import abc
import itertools
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from train import metrics
from train.data import columns_of

if TYPE_CHECKING:
    from datasets import Dataset

# "choice" is of one of a row's own candidates, "span" of a part of the context.
Kind: TypeAlias = Literal[
    "classification", "regression", "choice", "span", "text", "span_corruption"
]
Rows: TypeAlias = "Dataset | Mapping[str, Sequence[Any]]"
Columns: TypeAlias = dict[str, Any]

_LANGUAGES = {
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
class Benchmark:
    """Sentences, or pairs of them, with a label or a score; what is otherwise is in subclasses.

    Attributes:
      name: of the task.
      repository: hub id of the data set.
      configuration: the part of it; the name of its folder.
      columns: column -> type of its values, of what inputs are made of. The first two are an
        encoder's first and second sentence.
      kind: what is predicted.
      metrics: those whose mean chooses the best epoch.
      validation: names of the hub's validation splits; the first chooses the best epoch.
    """

    name: str
    repository: str
    configuration: str
    columns: Mapping[str, type]
    kind: Kind = "classification"
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)

    @property
    def wanted(self) -> str:
        """The column of what is to be predicted."""
        return "label"

    @property
    def metric(self) -> str:
        """The metric, larger is better, that chooses the best epoch."""
        return "_and_".join(self.metrics)

    @property
    def prefix(self) -> str:
        """What the input of an encoder-decoder begins with."""
        return self.name

    def named(self, rows: Rows) -> Rows:
        """`rows`, or, where they have `sentence` and maybe `sentence2`, these under their names.

        Raises:
          ValueError: if there are neither all of these columns nor all of the hub's.
        """
        found = columns_of(rows)
        missing = [name for name in self.columns if name not in found]
        if not missing:
            return rows
        generic = ("sentence", "sentence2")[: len(self.columns)]
        if len(self.columns) > 2 or not set(generic) <= set(found):
            raise ValueError(
                f"rows of {self.name} need {', '.join(self.columns)}, and have no {missing[0]!r}; "
                f"their columns are {', '.join(found)}"
            )
        renamed = dict(zip(generic, self.columns, strict=True))
        return {renamed.get(name, name): rows[name] for name in found}

    def for_encoder(self, rows: Rows) -> Columns:
        """`sentence`, maybe `sentence2`, and, where there are any, `label` or `score`."""
        inputs = zip(("sentence", "sentence2"), self.columns, strict=False)
        return {column: rows[name][:] for column, name in inputs} | self.targets(rows)

    def for_decoder(self, rows: Rows) -> Columns:
        """`text` without the prefix, and, where there are any, `label`, `score` or `target`."""
        names = sorted(self.columns)
        parts = zip(*(rows[name][:] for name in names), strict=True)
        texts = [_keyed(dict(zip(names, values, strict=True))) for values in parts]
        return {"text": texts, **self.targets(rows)}

    def targets(self, rows: Rows) -> Columns:
        """The column `label` or `score`, if there is one."""
        column = "score" if self.kind == "regression" else "label"
        return {column: rows[column][:]} if column in columns_of(rows) else {}

    def questions(self, rows: Rows) -> list[Hashable] | None:
        """To which question each row belongs; None where every row is one."""
        return None

    def usable(self, rows: Rows) -> list[bool] | None:
        """Whether a row can be learned from; None where all can."""
        return None

    def check(self, rows: Rows) -> None:
        """Checks what the types of columns do not say of rows to learn from or to score by.

        Raises:
          ValueError: names the row, counted from 1.
        """
        return

    def unanswered(self, rows: Rows) -> int:
        """Returns how many rows have no answer, where that is one."""
        return 0

    def notices(self) -> list[str]:
        """Returns what the user should know of the metrics, a line each."""
        return []

    def scores(self, predictions: Sequence[Any], rows: Rows) -> dict[str, float]:
        """Metrics beside those of the kind; predictions are labels or texts, one for each row."""
        return {}

    def with_mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """`values` and, where several metrics choose the best epoch, their mean."""
        chosen = [values[name] for name in self.metrics]
        return {self.metric: sum(chosen) / len(chosen), **values}


class MultiRC(Benchmark):
    """Answers to questions on a paragraph, each true or false by itself."""

    def for_encoder(self, rows: Rows) -> Columns:
        """Pairs of the paragraph and the question with an answer."""
        pairs = zip(rows["question"][:], rows["answer"][:], strict=True)
        return {
            "sentence": [_without_tags(text) for text in rows["paragraph"][:]],
            "sentence2": [f"{question} {answer}" for question, answer in pairs],
            **self.targets(rows),
        }

    def for_decoder(self, rows: Rows) -> Columns:
        """The paragraph comes last, so that it is what is cut."""
        parts = zip(rows["question"][:], rows["answer"][:], rows["paragraph"][:], strict=True)
        texts = [
            _keyed({"question": question, "answer": answer, "paragraph": _without_tags(paragraph)})
            for question, answer, paragraph in parts
        ]
        return {"text": texts, **self.targets(rows)}

    def questions(self, rows: Rows) -> list[Hashable]:
        """The question and its paragraph."""
        return list(zip(rows["paragraph"][:], rows["question"][:], strict=True))

    def scores(self, predictions: Sequence[Any], rows: Rows) -> dict[str, float]:
        """`exact_match`: the part of the questions all of whose answers are judged right.

        The official F1a, over all answers, is `f1`.
        """
        right = [a == b for a, b in zip(predictions, rows["label"][:], strict=True)]
        return {"exact_match": metrics.all_of_group(right, self.questions(rows))}


class WordInContext(Benchmark):
    """WiC: whether a word means the same in two sentences."""

    def for_encoder(self, rows: Rows) -> Columns:
        """Pairs of sentences, the word before the first."""
        pairs = zip(rows["word"][:], rows["sentence1"][:], strict=True)
        return {
            "sentence": [f"{word}: {sentence}" for word, sentence in pairs],
            "sentence2": rows["sentence2"][:],
            **self.targets(rows),
        }

    def for_decoder(self, rows: Rows) -> Columns:
        """With the empty `pos:` of the paper's example."""
        columns = super().for_decoder(rows)
        return {**columns, "text": [f"pos: {text}" for text in columns["text"]]}


class Winograd(Benchmark):
    """WSC: whether a pronoun stands for a noun, both marked in the text.

    T5's own models were trained to write the noun instead; here as in the Compacter paper's code
    both are marked for an encoder-decoder, too.
    """

    def for_encoder(self, rows: Rows) -> Columns:
        """The marked text alone."""
        return {"sentence": self._marked(rows), **self.targets(rows)}

    def for_decoder(self, rows: Rows) -> Columns:
        """The marked text."""
        return {"text": [_keyed({"text": text}) for text in self._marked(rows)]} | self.targets(
            rows
        )

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


class Choice(Benchmark, abc.ABC):
    """One of several candidates; an encoder judges each by itself, and the likeliest is taken."""

    @abc.abstractmethod
    def candidates(self, rows: Rows) -> list[list[str]]:
        """What may be chosen, for each row."""

    @abc.abstractmethod
    def pairs(self, rows: Rows) -> list[list[tuple[str, str]]]:
        """Sentence and second sentence of each candidate, for each row."""

    @abc.abstractmethod
    def right(self, rows: Rows) -> list[list[bool]] | None:
        """Whether each candidate is right, for each row; None where that is unknown."""

    def for_encoder(self, rows: Rows) -> Columns:
        """A pair for each candidate with label 1 where it is right; `row` is whose it is."""
        pairs, right = self.pairs(rows), self.right(rows)
        flat = list(itertools.chain.from_iterable(pairs))
        columns: Columns = {
            "sentence": [first for first, _ in flat],
            "sentence2": [second for _, second in flat],
            "row": [row for row, of_row in enumerate(pairs) for _ in of_row],
        }
        if right is not None:
            columns["label"] = [int(value) for of_row in right for value in of_row]
        return columns


class Copa(Choice):
    """Which of two sentences is the cause or the effect of a premise; a label for T5."""

    def candidates(self, rows: Rows) -> list[list[str]]:
        """The two sentences."""
        return [list(two) for two in zip(rows["choice1"][:], rows["choice2"][:], strict=True)]

    def pairs(self, rows: Rows) -> list[list[tuple[str, str]]]:
        """The premise with the question in words, and a sentence."""
        words = {"cause": "What was the cause?", "effect": "What was the effect?"}
        premises = zip(rows["premise"][:], rows["question"][:], strict=True)
        asked = [f"{premise} {words.get(question, question)}" for premise, question in premises]
        rows_of = zip(asked, self.candidates(rows), strict=True)
        return [[(first, second) for second in choices] for first, choices in rows_of]

    def right(self, rows: Rows) -> list[list[bool]] | None:
        """By the label."""
        if "label" not in columns_of(rows):
            return None
        return [[label == 0, label == 1] for label in rows["label"][:]]


class Record(Choice):
    """ReCoRD: which of a passage's entities a query leaves out; T5 writes its name."""

    @property
    def wanted(self) -> str:
        """The names that are right; an entity may have several."""
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
        """Returns how many rows have no name that is right."""
        return sum(not names for names in rows["answers"][:])

    def candidates(self, rows: Rows) -> list[list[str]]:
        """The names of entities, each once."""
        found = [list(dict.fromkeys(names)) for names in rows["entities"][:]]
        for row, names in enumerate(found, 1):
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"row {row} of {self.name} has no entities to choose from")
        return found

    def pairs(self, rows: Rows) -> list[list[tuple[str, str]]]:
        """The passage, and the query with a name filled in."""
        # One string for all candidates of a passage: there are a million of them.
        passages = map(_without_highlights, rows["passage"][:])
        parts = zip(passages, rows["query"][:], self.candidates(rows), strict=True)
        return [
            [(passage, query.replace("@placeholder", name)) for name in names]
            for passage, query, names in parts
        ]

    def right(self, rows: Rows) -> list[list[bool]] | None:
        """By the answers."""
        if "answers" not in columns_of(rows):
            return None
        both = zip(self.candidates(rows), rows["answers"][:], strict=True)
        return [[name in answers for name in names] for names, answers in both]

    def for_decoder(self, rows: Rows) -> Columns:
        """An example for each answer; `row` is whose it is."""
        passages = map(_without_highlights, rows["passage"][:])
        parts = zip(rows["query"][:], self.candidates(rows), passages, strict=True)
        texts = [
            _keyed({"query": query, "entities": ", ".join(names), "passage": passage})
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
        """`exact_match` and `f1`, as the official script has them."""
        return metrics.answer_metrics(predictions, rows["answers"][:])


class Squad(Benchmark):
    """Questions whose answers are parts of a context; T5 writes them.

    A question may have no answer, as in SQuAD v2: no text, an empty one or null. An encoder then
    learns to say so, and T5 to write nothing.
    """

    @property
    def wanted(self) -> str:
        """`text` and `answer_start` of every answer that is right."""
        return "answers"

    @property
    def prefix(self) -> str:
        """None: the paper's input begins with the question."""
        return ""

    def answers(self, rows: Rows) -> list[list[str]]:
        """Returns the texts of the answers to each question, none where there is none.

        Raises:
          ValueError: names the row whose `answers` are no texts.
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
        """Checks that every answer has a place, and is there."""
        for row, (texts, answer) in enumerate(
            zip(self.answers(rows), rows["answers"][:], strict=True), 1
        ):
            starts = (answer or {}).get("answer_start") or []
            if texts and len(starts) != len(answer["text"]):
                raise ValueError(
                    f"row {row} of {self.name}: {len(answer['text'])} answers and {len(starts)} "
                    "places (answer_start); give as many of both"
                )

    def unanswered(self, rows: Rows) -> int:
        """Returns how many questions have no answer."""
        return sum(not texts for texts in self.answers(rows))

    def for_decoder(self, rows: Rows) -> Columns:
        """The first answer is the target, an empty text where there is none."""
        parts = zip(rows["question"][:], rows["context"][:], strict=True)
        texts = [_keyed({"question": question, "context": context}) for question, context in parts]
        if "answers" not in columns_of(rows):
            return {"text": texts}
        return {"text": texts, "target": [next(iter(found), "") for found in self.answers(rows)]}

    def scores(self, predictions: Sequence[Any], rows: Rows) -> dict[str, float]:
        """`exact_match` and `f1`, as the official script has them."""
        return metrics.answer_metrics(predictions, self.answers(rows))


@dataclass(frozen=True, kw_only=True)
class Translation(Benchmark):
    """Sentences to translate, in rows `translation: {"en": …, "ro": …}`; needs a decoder.

    Attributes:
      source: code of the language to translate from.
      to: code of the language to translate into.
    """

    source: str
    to: str

    @property
    def wanted(self) -> str:
        """One column holds both languages."""
        return "translation"

    @property
    def prefix(self) -> str:
        """In words, as in the T5 paper."""
        return f"translate {_LANGUAGES[self.source]} to {_LANGUAGES[self.to]}"

    def usable(self, rows: Rows) -> list[bool]:
        """Some sentences of WMT's training sets are aligned with nothing."""
        usable = []
        for row, pair in enumerate(rows["translation"][:], 1):
            if missing := [code for code in (self.source, self.to) if code not in pair]:
                raise ValueError(
                    f"row {row} of {self.name} has no {missing[0]!r}; it has {', '.join(pair):.200}"
                )
            usable.append(all((pair[code] or "").strip() for code in (self.source, self.to)))
        return usable

    def notices(self) -> list[str]:
        """Returns by which words BLEU is, where they are not those of others' BLEU."""
        _, told = metrics.bleu_tokenizer(self.to)
        return [told] if told else []

    def named(self, rows: Rows) -> Rows:
        """Also of sentences without their translation."""
        return rows if "sentence" in columns_of(rows) else super().named(rows)

    def for_decoder(self, rows: Rows) -> Columns:
        """A column `sentence`, which follows the prefix and a colon."""
        if "sentence" in columns_of(rows):
            columns = {"sentence": rows["sentence"][:]}
            if "target" in columns_of(rows):
                columns["target"] = rows["target"][:]
            return columns
        pairs = rows["translation"][:]
        for row, pair in enumerate(pairs, 1):
            if not pair.get(self.source):
                raise ValueError(f"row {row} of {self.name} has nothing in {self.source!r}")
        columns = {"sentence": [pair[self.source] for pair in pairs]}
        translated = [bool(pair.get(self.to)) for pair in pairs]
        if all(translated):
            columns["target"] = [pair[self.to] for pair in pairs]
        elif any(translated):
            raise ValueError(
                f"row {1 + translated.index(False)} of {self.name} has nothing in {self.to!r}, and "
                "others have; fill it, or leave all of them out"
            )
        return columns

    def scores(self, predictions: Sequence[Any], rows: Rows) -> dict[str, float]:
        """Returns `bleu`, from 0 to 100, by the words of the target language."""
        return {"bleu": metrics.bleu(predictions, self.for_decoder(rows)["target"], self.to)}


def find(name: str) -> Benchmark | None:
    """The benchmark of this name, such as mnli or wmt16-en-de; None if there is none.

    Raises:
      ValueError: for a translation of languages that WMT does not have.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    match = re.fullmatch(r"(wmt1[4-9])-([a-z]{2})-([a-z]{2})", name)
    if match is None:
        return None
    year, source, to = match.groups()
    if unknown := [code for code in (source, to) if code not in _LANGUAGES]:
        raise ValueError(f"{name}: unknown language {unknown[0]!r}; use {', '.join(_LANGUAGES)}")
    return Translation(
        name=name,
        repository=f"wmt/{year}",
        # English is second in the names of the hub, whatever is translated into what.
        configuration=f"{to}-{source}" if source == "en" else f"{source}-{to}",
        columns={"translation": dict},
        kind="text",
        metrics=("bleu",),
        source=source,
        to=to,
    )


def _glue(name: str, *columns: str, **fields: Any) -> Benchmark:
    return Benchmark(
        name=name,
        repository="nyu-mll/glue",
        configuration=name,
        columns=dict.fromkeys(columns, str),
        **fields,
    )


def _super_glue(made: type[Benchmark], name: str, *columns: str, **fields: Any) -> Benchmark:
    fields = {"configuration": name, "columns": dict.fromkeys(columns, str), **fields}
    return made(name=name, repository="aps/super_glue", **fields)


_SENTENCES = ("sentence1", "sentence2")
_ACCURACY_AND_F1 = ("accuracy", "f1")
_ANSWER_METRICS = ("exact_match", "f1")
_ALL = (
    _glue("cola", "sentence", metrics=("matthews_correlation",)),
    _glue("sst2", "sentence"),
    _glue("mrpc", *_SENTENCES, metrics=_ACCURACY_AND_F1),
    _glue("qqp", "question1", "question2", metrics=_ACCURACY_AND_F1),
    _glue("stsb", *_SENTENCES, kind="regression", metrics=("pearson", "spearman")),
    _glue(
        "mnli", "premise", "hypothesis", validation=("validation_matched", "validation_mismatched")
    ),
    _glue("qnli", "question", "sentence"),
    _glue("rte", *_SENTENCES),
    _glue("wnli", *_SENTENCES),
    _super_glue(Benchmark, "boolq", "question", "passage"),
    _super_glue(Benchmark, "cb", "premise", "hypothesis", metrics=("accuracy", "macro_f1")),
    _super_glue(Copa, "copa", "premise", "question", "choice1", "choice2"),
    _super_glue(MultiRC, "multirc", "paragraph", "question", "answer", metrics=_ANSWER_METRICS),
    _super_glue(
        Record,
        "record",
        columns={"passage": str, "query": str, "entities": list},
        kind="choice",
        metrics=_ANSWER_METRICS,
    ),
    _super_glue(WordInContext, "wic", *_SENTENCES, "word"),
    _super_glue(
        Winograd,
        "wsc",
        configuration="wsc.fixed",
        columns={
            **dict.fromkeys(("text", "span1_text", "span2_text"), str),
            **dict.fromkeys(("span1_index", "span2_index"), int),
        },
    ),
    Squad(
        name="squad",
        repository="rajpurkar/squad",
        configuration="plain_text",
        columns={"question": str, "context": str},
        kind="span",
        metrics=_ANSWER_METRICS,
    ),
)
BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
"""Those with a name of their own; translations have as many as there are languages."""


def _keyed(parts: Mapping[str, str]) -> str:
    """`{"premise": "a", "hypothesis": "b"}` -> `premise: a hypothesis: b`."""
    return " ".join(f"{name}: {text}" for name, text in parts.items())


def _without_tags(paragraph: str) -> str:
    """MultiRC's paragraphs without the HTML around the numbers of their sentences."""
    return re.sub(r"</?b>", "", paragraph.replace("<br>", " "))


def _without_highlights(passage: str) -> str:
    """ReCoRD's passages with their summary's points as sentences."""
    return re.sub(r"(?<=[.?!\"'])\n@highlight\n", " ", passage).replace("\n@highlight\n", ". ")


def _marked(text: str, marks: Mapping[str, tuple[int, str]]) -> str:
    """`text` with a sign on both sides of each span.

    Args:
      text: any.
      marks: sign -> number of the span's first word, and the span.

    Raises:
      ValueError: if `text` has not as many words.
    """
    words = list(re.finditer(r"\S+", text))
    starts, ends = [word.start() for word in words], [word.end() for word in words]
    spans = []
    for sign, (index, span) in marks.items():
        if not 0 <= index < len(starts):
            raise ValueError(f"there is no word {index} in the {len(starts)} words of {text!r:.80}")
        start = starts[index]
        end = start + len(span)
        if text[start:end].lower() != span.lower():  # some spans leave out a mark or an apostrophe
            end = ends[min(index + len(span.split()), len(ends)) - 1]
        spans.append((start, end, sign))
    for start, end, sign in sorted(spans, reverse=True):
        text = f"{text[:start]}{sign}{text[start:end]}{sign}{text[end:]}"
    return text
