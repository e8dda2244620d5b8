"""Writes small benchmarks to disk in the schema and layout of their repositories on the hub."""

import datasets
import numpy as np
import pyarrow.parquet as pq
from conftest import WORDS
from datasets import ClassLabel, List, Value

TEXT = Value("string")
TRUE_FALSE = ClassLabel(names=["False", "True"])
ENTAILMENT = ClassLabel(names=["entailment", "not_entailment"])
SENTENCES = {"sentence1": TEXT, "sentence2": TEXT}
PREMISE = {"premise": TEXT, "hypothesis": TEXT}


def glue(columns, label):
    return {**columns, "label": label, "idx": Value("int32")}


FEATURES = {
    "cola": glue({"sentence": TEXT}, ClassLabel(names=["unacceptable", "acceptable"])),
    "sst2": glue({"sentence": TEXT}, ClassLabel(names=["negative", "positive"])),
    "mrpc": glue(SENTENCES, ClassLabel(names=["not_equivalent", "equivalent"])),
    "qqp": glue(
        {"question1": TEXT, "question2": TEXT}, ClassLabel(names=["not_duplicate", "duplicate"])
    ),
    "stsb": glue(SENTENCES, Value("float32")),
    "mnli": glue(PREMISE, ClassLabel(names=["entailment", "neutral", "contradiction"])),
    "qnli": glue({"question": TEXT, "sentence": TEXT}, ENTAILMENT),
    "rte": glue(SENTENCES, ENTAILMENT),
    "wnli": glue(SENTENCES, ClassLabel(names=["not_entailment", "entailment"])),
    "boolq": glue({"question": TEXT, "passage": TEXT}, TRUE_FALSE),
    "cb": glue(PREMISE, ClassLabel(names=["entailment", "contradiction", "neutral"])),
    "copa": glue(
        {"premise": TEXT, "choice1": TEXT, "choice2": TEXT, "question": TEXT},
        ClassLabel(names=["choice1", "choice2"]),
    ),
    "multirc": {
        "paragraph": TEXT,
        "question": TEXT,
        "answer": TEXT,
        "idx": {name: Value("int32") for name in ("paragraph", "question", "answer")},
        "label": TRUE_FALSE,
    },
    "record": {
        "passage": TEXT,
        "query": TEXT,
        "entities": List(TEXT),
        "entity_spans": {
            "text": List(TEXT),
            "start": List(Value("int32")),
            "end": List(Value("int32")),
        },
        "answers": List(TEXT),
        "idx": {"passage": Value("int32"), "query": Value("int32")},
    },
    "wic": {
        "word": TEXT,
        **SENTENCES,
        **{name: Value("int32") for name in ("start1", "start2", "end1", "end2", "idx")},
        "label": TRUE_FALSE,
    },
    "wsc": {
        "text": TEXT,
        "span1_index": Value("int32"),
        "span2_index": Value("int32"),
        "span1_text": TEXT,
        "span2_text": TEXT,
        "idx": Value("int32"),
        "label": TRUE_FALSE,
    },
    "squad": {
        "id": TEXT,
        "title": TEXT,
        "context": TEXT,
        "question": TEXT,
        "answers": {"text": List(TEXT), "answer_start": List(Value("int32"))},
    },
    "wmt16-ro-en": {"translation": datasets.Translation(languages=["ro", "en"])},
    "wmt16-en-ro": {"translation": datasets.Translation(languages=["ro", "en"])},
}
CONFIGURATIONS = {
    "wsc": "wsc.fixed",
    "squad": "plain_text",
    "wmt16-ro-en": "ro-en",
    "wmt16-en-ro": "ro-en",
}
VALIDATION = {"mnli": ("validation_matched", "validation_mismatched")}
# Benchmarks without a test split on the hub, and those whose test labels are published.
NO_TEST, OPEN_TEST = ("squad",), ("mrpc", "wmt16-ro-en", "wmt16-en-ro")


def words(generator, least=3, most=6):
    return " ".join(generator.choice(WORDS, generator.integers(least, most + 1)))


def row(name, number, generator, *, hidden=False):
    """Returns a row that differs from all others; labels alternate."""
    made = {}
    for column, feature in FEATURES[name].items():
        if isinstance(feature, ClassLabel):
            made[column] = -1 if hidden else number % feature.num_classes
        elif feature == TEXT:
            made[column] = words(generator)
        elif isinstance(feature, Value):
            made[column] = -1.0 if hidden else (number * 13) % 51 / 10
            made[column] = made[column] if feature.dtype == "float32" else number
    return made | _SPECIAL.get(name, lambda *_: {})(made, number, generator, hidden)


def _copa(made, number, generator, hidden):
    return {"question": ("cause", "effect")[number % 2]}


def _multirc(made, number, generator, hidden):
    question = number // 2  # two answers to each question
    return {
        "paragraph": f"<b>Sent 1: </b>the film was good<br><b>Sent 2: </b>plot {question}",
        "question": "was it good",
        "answer": ("yes", "no")[number % 2],
        "idx": {"paragraph": question, "question": 0, "answer": number % 2},
    }


def _record(made, number, generator, hidden):
    entities = ["film", "plot", "film", "very good film"][: 3 + number % 2]
    return {
        "passage": "it was good.\n@highlight\nfilm was loved\n@highlight\nplot was hated",
        "query": "we loved @placeholder",
        "entities": entities,
        "entity_spans": {
            "text": entities,
            "start": [0] * len(entities),
            "end": [1] * len(entities),
        },
        "answers": [] if hidden else ["film", "very good film"][: 1 + number % 2],
        "idx": {"passage": number, "query": 0},
    }


def _wic(made, number, generator, hidden):
    return {"word": "film", "sentence1": "the film was good", "sentence2": words(generator)}


def _wsc(made, number, generator, hidden):
    return {
        "text": f"the film was good, it was loved {number}",
        "span1_index": 0,
        "span1_text": "the film",
        "span2_index": 4,
        "span2_text": "it",
    }


def _squad(made, number, generator, hidden):
    # The word differs from every other word.
    answer = ("loved", "hated", "awful")[number % 3] * (1 + number // 3)
    before = " ".join(["plot was"] * generator.integers(10, 30))
    return {
        "context": f"{before} it was {answer} {words(generator)}",
        "question": "what was it",
        "answers": {
            "text": [f"it was {answer}", answer],
            "answer_start": [len(before) + 1, len(before) + 8],
        },
    }


def _translation(made, number, generator, hidden):
    english = words(generator)
    return {"translation": {"ro": " ".join(reversed(english.split())), "en": english}}


_SPECIAL = {
    "copa": _copa,
    "multirc": _multirc,
    "record": _record,
    "wic": _wic,
    "wsc": _wsc,
    "squad": _squad,
    "wmt16-ro-en": _translation,
    "wmt16-en-ro": _translation,
}


def rows(name, number, *, seed=0, hidden=False):
    generator = np.random.default_rng(seed)
    made = [row(name, i, generator, hidden=hidden) for i in range(number)]
    return datasets.Dataset.from_list(made, features=datasets.Features(FEATURES[name]))


def write(folder, name, *, train=8, validation=6, test=4):
    """Writes a benchmark into a folder that `--data-dir` can name."""
    sizes = {"train": train, **dict.fromkeys(VALIDATION.get(name, ("validation",)), validation)}
    if name not in NO_TEST:
        tests = ("test_matched", "test_mismatched") if name == "mnli" else ("test",)
        sizes |= dict.fromkeys(tests, test)
    target = folder / CONFIGURATIONS.get(name, name)
    target.mkdir(parents=True, exist_ok=True)
    for seed, (split, size) in enumerate(sizes.items()):
        hidden = split.startswith("test") and name not in OPEN_TEST
        made = rows(name, size, seed=seed, hidden=hidden)
        metadata = made.features.arrow_schema.metadata  # the names of labels
        table = made.with_format("arrow")[:].replace_schema_metadata(metadata)
        pq.write_table(table, target / f"{split}-00000-of-00001.parquet")
    return folder
