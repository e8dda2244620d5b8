"""Answers as parts of a context: windows that an encoder can read, and the best span in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from train.data.tokens import Encoded, check_fast, columns_of, count_unknown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Maximum length of an answer in tokens, as in BERT's own evaluation of SQuAD.
_LONGEST = 30
_TOKENIZED_AT_ONCE = 1024


def encode(
    rows: Dataset | Mapping[str, Sequence[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Encoded:
    """Tokenises questions with their contexts; a long context becomes several windows.

    Neighbouring windows share a third of their tokens, and a question is truncated to a third. With
    384 tokens this is BERT's overlap of 128.

    Args:
      rows: columns `question`, `context` and, where they are known, `answers`.
      tokenizer: a fast tokenizer.
      max_length: the length of a window, with the question and the special tokens.

    Returns:
      An example for each window. Its targets are the first and the last token of the first answer.
      If the window does not contain the whole answer, or there is no answer, they are 0 and 0, the
      token [CLS].

    Raises:
      ValueError: if `max_length` leaves no room, an answer is not where `answer_start` says, or
        the tokenizer is a slow one.
    """
    check_fast(tokenizer)
    part = (max_length - tokenizer.num_special_tokens_to_add(pair=True)) // 3
    if part < 2:
        raise ValueError(f"max_length={max_length} leaves no room for windows; use 16 or more")
    questions, num_truncated = _cut(rows["question"][:], tokenizer, part)
    contexts = rows["context"][:]
    answers = _answer_spans(rows) if "answers" in columns_of(rows) else None
    ids, types, spans, groups, targets = [], [], [], [], []
    for start in range(0, len(questions), _TOKENIZED_AT_ONCE):
        chunk = slice(start, start + _TOKENIZED_AT_ONCE)
        encodings = tokenizer(
            questions[chunk],
            contexts[chunk],
            truncation="only_second",
            max_length=max_length,
            stride=part,
            return_overflowing_tokens=True,
        )
        of_row = encodings["overflow_to_sample_mapping"]
        for encoding, row in zip(encodings.encodings, of_row, strict=True):
            of_context = np.array([x == 1 for x in encoding.sequence_ids])
            window = np.where(of_context[:, None], np.array(encoding.offsets), -1).astype(np.int32)
            ids.append(np.array(encoding.ids, np.int32))
            types.append(np.array(encoding.type_ids, np.int32))
            spans.append(window)
            groups.append(start + row)
            if answers is not None:
                span = answers[start + row]
                targets.append((0, 0) if span is None else _tokens_of(window, *span))
    flat = np.concatenate(ids or [np.zeros(0, np.int32)])
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return Encoded(
        input_ids=flat,
        token_type_ids=np.concatenate(types or [np.zeros(0, np.int32)]),
        offsets=offsets,
        unknown=count_unknown(flat, offsets, tokenizer),
        targets=np.array(targets, np.int32).reshape(-1, 2) if answers is not None else None,
        max_length=max_length,
        pad_token_id=tokenizer.pad_token_id,
        num_truncated=num_truncated,
        rows=rows,
        groups=np.array(groups, np.int64),
        spans=np.concatenate(spans or [np.zeros((0, 2), np.int32)]),
    )


def answers(logits: np.ndarray, encoded: Encoded, *, may_be_none: bool = False) -> list[str]:
    """Returns the likeliest part of each context over its windows; "" if it has no token.

    Args:
      logits: `[windows, length, 2]` of first and last tokens.
      encoded: the examples of `encode`.
      may_be_none: whether "" is also returned if every window predicts no answer by [CLS]: if the
        least of the windows' [CLS] sums exceeds the sum of the likeliest part, as in BERT's
        evaluation of SQuAD v2 with a threshold of 0.
    """
    assert encoded.spans is not None
    assert encoded.groups is not None
    contexts = encoded.rows["context"][:]
    texts, best = [""] * len(contexts), np.full(len(contexts), -np.inf)
    none = np.full(len(contexts), np.inf)
    for window, row in enumerate(encoded.groups):
        tokens = slice(*encoded.offsets[window : window + 2])
        spans = encoded.spans[tokens]
        first, last, score = best_span(logits[window, : len(spans)], spans[:, 0] >= 0)
        if score > best[row]:
            best[row], texts[row] = score, contexts[row][spans[first, 0] : spans[last, 1]]
        none[row] = min(none[row], float(logits[window, 0, 0] + logits[window, 0, 1]))
    if may_be_none:
        texts = ["" if none[row] > best[row] else text for row, text in enumerate(texts)]
    return texts


def best_span(
    logits: np.ndarray, allowed: np.ndarray, longest: int = _LONGEST
) -> tuple[int, int, float]:
    """Returns first and last token of the span with the greatest sum of logits, and that sum.

    Args:
      logits: `[length, 2]` of first and last tokens.
      allowed: `[length]`, whether a token may be part of a span.
      longest: the maximum number of tokens of a span.

    Returns:
      The first of equally good spans; the sum is -inf if no token is allowed.
    """
    start, end = np.where(allowed[:, None], logits, -np.inf).T
    ends = np.pad(end, (0, longest - 1), constant_values=-np.inf)
    sums = start[:, None] + np.lib.stride_tricks.sliding_window_view(ends, longest)
    first, more = divmod(int(sums.argmax()), longest)
    return first, first + more, float(sums[first, more])


def _cut(
    questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, most: int
) -> tuple[list[str], int]:
    """Truncates questions to at most `most` tokens; returns them and the number truncated."""
    # Some tokenizers treat leading blanks as part of a context's first token.
    kept = [question.strip() for question in questions]
    num_cut = 0
    for start in range(0, len(kept), _TOKENIZED_AT_ONCE):
        encodings = tokenizer(kept[start : start + _TOKENIZED_AT_ONCE], add_special_tokens=False)
        for row, encoding in enumerate(encodings.encodings, start):
            if len(encoding.ids) > most:
                kept[row] = kept[row][: encoding.offsets[most - 1][1]]
                num_cut += 1
    return kept, num_cut


def _answer_spans(rows: Any) -> list[tuple[int, int] | None]:
    """Returns the span in characters of each row's first answer, None without one."""
    spans: list[tuple[int, int] | None] = []
    for row, (context, answer) in enumerate(
        zip(rows["context"][:], rows["answers"][:], strict=True), 1
    ):
        places = (answer or {}).get("answer_start") or ()
        pairs = zip((answer or {}).get("text") or (), places, strict=False)
        text, start = next((pair for pair in pairs if pair[0].strip()), ("", 0))
        if not text:
            spans.append(None)
            continue
        if start < 0 or context[start : start + len(text)] != text:
            raise ValueError(
                f"row {row}: the answer {text[:80]!r} is not at character {start} of its context"
            )
        spans.append((start, start + len(text)))
    return spans


def _tokens_of(window: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """Returns first and last token of a span of characters; 0 and 0 if the window lacks some.

    Args:
      window: `[tokens, 2]`, the span of each token in the context, -1 for other tokens.
      start: the first character.
      end: the position after the last character.
    """
    inside = np.flatnonzero((window[:, 0] >= 0) & (window[:, 0] < end) & (window[:, 1] > start))
    if not len(inside) or window[inside[0], 0] > start or window[inside[-1], 1] < end:
        return 0, 0
    return int(inside[0]), int(inside[-1])
