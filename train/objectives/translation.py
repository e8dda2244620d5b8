"""Objective of translation between many languages, each direction with or without its adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from train.data import languages
from train.data import tokens as data_tokens
from train.data.routes import Routes
from train.objectives.to_languages import ToLanguages
from train.tasks import parallel


@dataclasses.dataclass(frozen=True)
class Translation(ToLanguages):
    """Sentences to translate, with the languages of each."""

    @property
    def columns(self) -> Mapping[str, type]:
        """Columns of a file of sentences to translate."""
        return dict.fromkeys(("source", "source_language", "target_language"), str)

    def names_of(self, columns: Mapping[str, Sequence[str]]) -> list[str]:
        """Returns the name of each row's direction, source first."""
        return parallel.names_of(columns)

    def encode(self, rows: Any) -> data_tokens.Encoded:
        """Tokenises sentences, with a token of their language before them.

        Raises:
          ValueError: for a direction without an adapter, whose row the message names; or for a
            language without a token.
        """
        from_each, to_each = (list(rows[name][:]) for name in parallel.PAIR[2:])
        names = self.names_of(rows)
        directions = self.places(names)
        tokens = languages.language_tokens(dict.fromkeys([*from_each, *to_each]), self.tokenizer)
        first = tokens.before_target(to_each)
        inputs = data_tokens.tokenize_texts(
            rows["source"][:], self.tokenizer, self.max_length - 1, what="source"
        )
        targets = data_tokens.targets_of(rows)
        texts = None if targets is None else self.target_texts(targets, first)
        encoded = self.encoded(
            languages.with_first(inputs, tokens.before_source(from_each, to_each)), texts, targets
        )
        routes = Routes(directions, self.members_of(directions), first)
        return dataclasses.replace(encoded, routes=routes, rows=(names, to_each))

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that a saved adapter has."""
        return {parallel.KIND: self.own_settings()}
