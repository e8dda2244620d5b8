"""Data sets of GLUE, SuperGLUE, SQuAD and WMT, and how their rows are put to a backbone.

An encoder reads sentences or pairs of them. An encoder-decoder reads text as in appendix D of the
T5 paper, arXiv:1910.10683, and writes text. Rows have the columns of the hub.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from train.tasks.benchmark import Benchmark
from train.tasks.squad import Squad
from train.tasks.super_glue import (
    ANSWER_METRICS,
    Copa,
    MultiRC,
    Record,
    Winograd,
    WordInContext,
    super_glue,
)
from train.tasks.translation import LANGUAGES, Translation


def find(name: str) -> Benchmark | None:
    """Returns the benchmark with a name such as mnli or wmt16-en-de; None if there is none.

    Raises:
      ValueError: for a translation between languages that WMT does not have.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    match = re.fullmatch(r"(wmt1[4-9])-([a-z]{2})-([a-z]{2})", name)
    if match is None:
        return None
    year, source, to = match.groups()
    if unknown := [code for code in (source, to) if code not in LANGUAGES]:
        raise ValueError(f"{name}: unknown language {unknown[0]!r}; use {', '.join(LANGUAGES)}")
    return Translation(
        name=name,
        repository=f"wmt/{year}",
        # English is second in the names of the hub, whatever the direction of the translation.
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


_SENTENCES = ("sentence1", "sentence2")


_ACCURACY_AND_F1 = ("accuracy", "f1")


_ALL = (
    _glue("cola", "sentence", metrics=("matthews_correlation",)),
    _glue("sst2", "sentence"),
    _glue("mrpc", *_SENTENCES, metrics=_ACCURACY_AND_F1),
    _glue("qqp", "question1", "question2", metrics=_ACCURACY_AND_F1),
    _glue(
        "stsb",
        *_SENTENCES,
        kind="regression",
        metrics=("pearson", "spearman"),
        highest_score=5.0,
    ),
    _glue(
        "mnli", "premise", "hypothesis", validation=("validation_matched", "validation_mismatched")
    ),
    _glue("qnli", "question", "sentence"),
    _glue("rte", *_SENTENCES),
    _glue("wnli", *_SENTENCES),
    super_glue(Benchmark, "boolq", "question", "passage"),
    super_glue(Benchmark, "cb", "premise", "hypothesis", metrics=("accuracy", "macro_f1")),
    super_glue(Copa, "copa", "premise", "question", "choice1", "choice2"),
    super_glue(MultiRC, "multirc", "paragraph", "question", "answer", metrics=ANSWER_METRICS),
    super_glue(
        Record,
        "record",
        columns={"passage": str, "query": str, "entities": list},
        kind="choice",
        metrics=ANSWER_METRICS,
    ),
    super_glue(WordInContext, "wic", *_SENTENCES, "word"),
    super_glue(
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
        metrics=ANSWER_METRICS,
    ),
)


BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}


"""Name -> benchmark; translations, one for each pair of languages, are made by `find`."""
