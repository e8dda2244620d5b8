"""The tokens whose embeddings prompts start from."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from train.data import corpus
from train.data.tokens import columns_of
from train.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_tokens(method: Any, words: str | None, task: Task, tokenizer: Any) -> Any:
    """`method` with the tokens of `words`, or else the commonest of the task's training texts.

    Raises:
      ValueError: if `words` are more tokens than the prompt, or none.
    """
    if not method.needs_token_ids():
        return method
    if words is None:
        ids = most_common_tokens(training_texts(task), tokenizer, method.prompt_length)
    else:
        ids = tuple(tokenizer(words, add_special_tokens=False)["input_ids"])
        if not 0 < len(ids) <= method.prompt_length:
            raise ValueError(
                f"--prompt-words are {len(ids)} tokens, which start a prompt of "
                f"prompt_length={method.prompt_length}; give 1 to {method.prompt_length} tokens"
            )
    return method.replace(prompt_token_ids=ids)


def most_common_tokens(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, number: int
) -> tuple[int, ...]:
    """Ids of the commonest tokens of `texts`, the commonest first, special tokens left out.

    Of tokens that are as common the one with the lower id comes first.

    Args:
      texts: any.
      tokenizer: a fast tokenizer.
      number: how many; there may be fewer different ones.

    Raises:
      ValueError: if there are none.
    """
    found: collections.Counter[int] = collections.Counter()
    for text in texts:
        found.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    for special in tokenizer.all_special_ids:
        found.pop(special, None)
    if not found:
        raise ValueError("the training texts have no tokens for prompts to start from")
    order = sorted(found, key=lambda token: (-found[token], token))
    return tuple(order[:number])


def training_texts(task: Task) -> Iterator[str]:
    """Every sentence of the training split; of a benchmark, every input; of a file, its texts."""
    rows = task.splits["train"]
    if task.kind == "span_corruption":
        yield from corpus.read_documents(rows)
        return
    if task.benchmark is not None:
        rows = task.benchmark.for_decoder(rows)
    for column in ("text", "sentence", "sentence2"):
        if column in columns_of(rows):
            yield from rows[column][:]
