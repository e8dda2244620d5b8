"""Initialisation of prompts: the tokens whose embeddings they start from."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from train.data import corpus
from train.data.tokens import columns_of
from train.tasks import ON_TEXT, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_tokens(method: Any, words: str | None, task: Task, tokenizer: Any) -> Any:
    """Returns `method` with the tokens of `words`, or with the training texts' most common tokens.

    Raises:
      ValueError: if `words` have more tokens than the prompt, or none.
    """
    if not method.needs_token_ids():
        return method
    if words is None:
        ids = most_common_tokens(training_texts(task), tokenizer, method.prompt_length)
    else:
        ids = tuple(tokenizer(words, add_special_tokens=False)["input_ids"])
        if not 0 < len(ids) <= method.prompt_length:
            raise ValueError(
                f"--prompt-words has {len(ids)} tokens, which cannot start a prompt of "
                f"prompt_length={method.prompt_length}; give 1 to {method.prompt_length} tokens"
            )
    return method.replace(prompt_token_ids=ids)


def most_common_tokens(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, number: int
) -> tuple[int, ...]:
    """Returns the ids of the most common tokens of `texts`, in descending order of frequency.

    Special tokens are left out. Of equally common tokens, the one with the lower id comes first.

    Args:
      texts: the texts.
      tokenizer: a fast tokenizer.
      number: the number of tokens; fewer are returned if the texts have fewer different ones.

    Raises:
      ValueError: if there are no tokens.
    """
    found: collections.Counter[int] = collections.Counter()
    for text in texts:
        found.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    for special in tokenizer.all_special_ids:
        found.pop(special, None)
    if not found:
        raise ValueError("the training texts have no tokens to initialise prompts from")
    order = sorted(found, key=lambda token: (-found[token], token))
    return tuple(order[:number])


def training_texts(task: Task) -> Iterator[str]:
    """Yields the texts of the training split: sentences, inputs of a benchmark, or documents."""
    rows = task.splits["train"]
    if task.kind in ON_TEXT:
        yield from corpus.read_documents(rows)
        return
    if task.benchmark is not None:
        rows = task.benchmark.for_decoder(rows)
    if "tokens" in columns_of(rows):
        yield from map(" ".join, rows["tokens"][:])
    for column in ("text", "sentence", "sentence1", "sentence2", "negative", "source"):
        if column in columns_of(rows):
            yield from rows[column][:]
