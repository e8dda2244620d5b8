"""Tells whether a classifier reads what that of transformers reads, which others expect."""

from __future__ import annotations

from typing import Any


def reads_as_first(module: Any) -> bool:
    """Returns True if a backbone's classifier computes the same as with `pooling="first"`.

    With "cls" a classifier without a pooler does, as those of RoBERTa, ELECTRA and DistilBERT; of a
    ModernBERT, a classifier with the pooling of its configuration.

    Args:
      module: the backbone's; one without a pooling counts as "first".
    """
    if getattr(module, "pooling", "first") == "first":
        return True
    first = module.clone(pooling="first")
    has_pooler = (getattr(each, "has_pooler", False) for each in (module, first))
    return len(set(has_pooler)) == 1 and module.takes_mean == first.takes_mean
