"""Metrics of tags: accuracy, and precision, recall and F1 of whole entities in IOB2 tags."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from typing import TypeAlias

# Kind of an entity, its first word, and the word after its last.
Entity: TypeAlias = tuple[str, int, int]

_IOB2 = re.compile(r"O|[BI](-.+)?", re.DOTALL)
# The kind of entities in files with the tags B and I alone, by the name that seqeval gives it.
_NO_KIND = "_"
_PARTS = ("right", "found", "wanted")


def is_iob2(names: Sequence[str]) -> bool:
    """Returns True if tags mark entities: every tag is O, B-KIND, I-KIND, B or I, and not all O."""
    return all(map(_IOB2.fullmatch, names)) and set(names) != {"O"} and bool(names)


def metric(names: Sequence[str]) -> str:
    """Returns the metric that selects the best epoch: `f1` for IOB2 tags, otherwise `accuracy`."""
    return "f1" if is_iob2(names) else "accuracy"


def entities(tags: Sequence[str]) -> list[Entity]:
    """Returns the entities of a sentence, in order.

    An entity begins at each B, and at an I that does not continue an entity of its kind: after O,
    at the beginning, or after another kind. It ends before the next B, O or other kind. So do
    `conlleval`, the script of the CoNLL-2000 and CoNLL-2003 shared tasks, and seqeval's default.

    Args:
      tags: `[words]` IOB2 tags of one sentence.
    """
    found: list[Entity] = []
    for place, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if prefix == "O":
            continue
        kind = kind or _NO_KIND
        goes_on = prefix == "I" and bool(found) and found[-1][0] == kind and found[-1][2] == place
        start = found.pop()[1] if goes_on else place
        found.append((kind, start, place + 1))
    return found


def opened_by_inside(tags: Sequence[str]) -> int:
    """Returns the number of entities of a sentence that begin with I instead of B."""
    return sum(tags[start].startswith("I") for _, start, _ in entities(tags))


def tag_metrics(
    predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]], names: Sequence[str]
) -> dict[str, float]:
    """Computes the metrics of the tags of a split.

    Args:
      predictions: `[sentences]` of `[words]` tags.
      targets: tags for the same words.
      names: the tags of the task, which say whether the tags are IOB2, and which kinds of entities
        there are.

    Returns:
      `accuracy`, the fraction of words with the right tag. For IOB2 tags also `precision`, `recall`
      and `f1` of whole entities, and the same for each kind, as `KIND/f1`. An entity is right if
      its kind and both ends are. A ratio without a denominator is 0.

    Raises:
      ValueError: if there are no words, or predictions and targets differ in length.

    References:
      Tjong Kim Sang and De Meulder, Introduction to the CoNLL-2003 Shared Task, CoNLL 2003, section
      2.3; Nakayama, seqeval, 2018.
    """
    pairs = list(zip(predictions, targets, strict=True))
    words = [pair for each in pairs for pair in zip(*each, strict=True)]
    if not words:
        raise ValueError("there are no words to evaluate on")
    values = {"accuracy": sum(found == wanted for found, wanted in words) / len(words)}
    if not is_iob2(names):
        return values
    kinds = sorted({kind for name in names for kind, _, _ in entities([name])})
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for predicted, target in pairs:
        found, wanted = entities(predicted), entities(target)
        parts = {"found": found, "wanted": wanted, "right": set(found) & set(wanted)}
        counts.update((kind, part) for part, each in parts.items() for kind, _, _ in each)
    numbers = {kind: [counts[kind, part] for part in _PARTS] for kind in kinds}
    values |= _ratios(*map(sum, zip(*numbers.values(), strict=True)))
    own = {kind: _ratios(*each) for kind, each in numbers.items()}
    return values | {f"{kind}/{name}": x for kind, of in own.items() for name, x in of.items()}


def entity_counts(
    predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]]
) -> list[tuple[int, int, int]]:
    """Returns, for each sentence, the numbers of right, of predicted and of wanted entities."""
    each = [(entities(a), entities(b)) for a, b in zip(predictions, targets, strict=True)]
    return [(len(set(found) & set(wanted)), len(found), len(wanted)) for found, wanted in each]


def _ratios(right: int, found: int, wanted: int) -> dict[str, float]:
    """Returns precision, recall and F1 from numbers of entities."""
    return {
        "precision": right / found if found else 0.0,
        "recall": right / wanted if wanted else 0.0,
        "f1": 2 * right / (found + wanted) if found + wanted else 0.0,
    }
