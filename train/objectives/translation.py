"""Objective of translation between many languages, each direction with or without its adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import Array

import compacter_jax as cj
from compacter_jax.messages import listing
from train.compute import step
from train.data import batching, languages, sampled
from train.data import tokens as data_tokens
from train.data.routes import Routes
from train.objectives.base import Predicted
from train.objectives.text_to_text import Seq2Seq, mean_token_loss, num_tokens
from train.tasks import metrics, parallel, text_format


@dataclasses.dataclass(frozen=True)
class Translation(Seq2Seq):
    """Sentences to translate, with the languages of each.

    Attributes:
      model: an encoder-decoder with logits; with a bank, each row uses the member of its direction.
      tokenizer: the tokenizer of the backbone, with a token for each language.
      config: the configuration of the module.
      max_length: the maximum input length in tokens, language and end of sequence included.
      directions: names of the directions that the adapters were trained on; for a model that one
        adapter serves, others can be tried as well.
      members: the member of each direction; None without a bank.
      is_open: True if other directions than `directions` are accepted.
      max_target_length: the maximum target length in tokens, as `max_length`.
      num_beams: the number of beams of generation.
      generates: True to generate translations for the metrics, which takes much longer.
      temperature: how often directions of different size are drawn, as `Sampled` has it.
      seed: the seed of this draw.
    """

    model: Any
    tokenizer: Any
    config: Any
    max_length: int
    directions: tuple[str, ...]
    members: tuple[int, ...] | None = None
    is_open: bool = False
    max_target_length: int = 64
    num_beams: int = 1
    generates: bool = False
    temperature: float = 1.0
    seed: int = 0

    @property
    def columns(self) -> Mapping[str, type]:
        """Columns of a file of sentences to translate."""
        return dict.fromkeys(("source", "source_language", "target_language"), str)

    def outputs(self, params: step.Params, batch: step.Batch) -> dict[str, Array]:
        """Computes `loss` and `correct` of each row, if there are targets, and generated `ids`."""
        found = self.teacher_forced(params, batch) if "decoder_input_ids" in batch else {}
        if not self.generates and found:
            return found
        ids = cj.generate(
            self.model,
            params,
            batch["input_ids"],
            batch["attention_mask"],
            max_new_tokens=self.max_target_length,
            num_beams=self.num_beams,
            eos_token_id=self.config.eos_token_id,
            pad_token_id=self.config.pad_token_id,
            decoder_start_token_id=self.config.decoder_start_token_id,
            forced_bos_token_id=batch.get("first_tokens"),
            adapter_ids=batch.get("adapter_ids"),
        )
        return {"ids": ids, **found}

    def encode(self, rows: Any) -> data_tokens.Encoded:
        """Tokenises sentences, with a token of their language before them.

        Raises:
          ValueError: for a direction without an adapter, or a language without a token; the message
            names the row.
        """
        from_each, to_each = (list(rows[name][:]) for name in parallel.PAIR[2:])
        names = [f"{a}-{b}" for a, b in zip(from_each, to_each, strict=True)]
        place = {name: i for i, name in enumerate(self.directions)}
        for row, name in enumerate(names, 1):
            if name not in place and not self.is_open:
                raise ValueError(
                    f"row {row}: there is no adapter for {name!r:.100}; there are those of "
                    f"{listing(self.directions)}"
                )
            place.setdefault(name, len(place))
        tokens = languages.language_tokens(dict.fromkeys([*from_each, *to_each]), self.tokenizer)
        directions = np.array([place[name] for name in names], np.int32)
        first = tokens.before_target(to_each)
        inputs = data_tokens.tokenize_texts(
            rows["source"][:], self.tokenizer, self.max_length - 1, what="source"
        )
        targets = data_tokens.targets_of(rows)
        texts = None
        if targets is not None:
            longest = self.max_target_length - (first is not None)
            texts = data_tokens.tokenize_texts(
                list(targets), self.tokenizer, longest, what="target"
            )
            texts = texts if first is None else languages.with_first(texts, first)
        encoded = self.encoded(
            languages.with_first(inputs, tokens.before_source(from_each, to_each)), texts, targets
        )
        members = None if self.members is None else np.array(self.members, np.int32)[directions]
        return dataclasses.replace(
            encoded, routes=Routes(directions, members, first), rows=(from_each, to_each)
        )

    def encode_all(self, splits: Mapping[str, Any]) -> dict[str, batching.Examples]:
        """Tokenises the splits of a run; training draws directions by the temperature."""
        encoded = super().encode_all(splits)
        train = encoded["train"].of_epoch(0)
        return {**encoded, "train": sampled.Sampled(train, self.temperature, self.seed)}

    def scores(
        self, outputs: dict[str, np.ndarray], encoded: data_tokens.Encoded
    ) -> dict[str, float]:
        """Returns `token_accuracy` and `loss`, and of generated text BLEU and chrF.

        These are `bleu` and `chrf`, the means over directions, and `bleu_en-de` and the like.
        """
        accuracy = outputs["correct"].sum() / num_tokens(encoded).sum()
        values = {"token_accuracy": float(accuracy), "loss": mean_token_loss(outputs, encoded)}
        if not self.generates:
            return values
        predictions = np.array(self._texts(outputs), object)
        each = self._by_direction(predictions, encoded)
        means = {
            name: float(np.mean([scores[name] for scores in each.values()]))
            for name in ("bleu", "chrf")
        }
        own = {
            f"{name}_{direction}": value
            for name in ("bleu", "chrf")
            for direction, scores in each.items()
            for value in [scores[name]]
        }
        return {**values, **means, **own}

    def _by_direction(
        self, predictions: np.ndarray, encoded: data_tokens.Encoded
    ) -> dict[str, dict[str, float]]:
        """Returns direction -> BLEU and chrF of its rows."""
        assert encoded.targets is not None
        names = np.array([f"{a}-{b}" for a, b in zip(*encoded.rows, strict=True)])
        targets_in = np.array(encoded.rows[1])
        found = {}
        for name in dict.fromkeys(names):
            chosen = np.flatnonzero(names == name)
            said, wanted = list(predictions[chosen]), list(encoded.targets[chosen])
            language = metrics.base_language(targets_in[chosen[0]])
            found[str(name)] = {
                "bleu": metrics.bleu(said, wanted, language),
                "chrf": metrics.chrf(said, wanted),
            }
        return found

    def predictions(
        self, outputs: dict[str, np.ndarray], encoded: data_tokens.Encoded
    ) -> Predicted:
        """Returns the translations."""
        del encoded
        return list(map(str, self._texts(outputs)))

    def _texts(self, outputs: Mapping[str, np.ndarray]) -> list[str]:
        return text_format.plain(text_format.decode(outputs["ids"], self.tokenizer))

    def predictions_and_targets(
        self, outputs: dict[str, np.ndarray], encoded: data_tokens.Encoded
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns translations and references, if translations were generated."""
        if "ids" not in outputs or encoded.targets is None:
            return None
        said = self._texts(outputs)
        wanted = text_format.as_said(said, list(encoded.targets))
        return np.array(list(map(str, said)), object), np.array(wanted, object)

    def check_predicts(self, *, logits: bool) -> None:
        """Raises ValueError for `logits`, which text does not have."""
        if logits:
            raise ValueError(
                "--logits needs a task with labels, but translations are generated text; leave it "
                "out"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that a saved adapter has."""
        names = ("max_target_length", "num_beams", "is_open")
        own = {name: getattr(self, name) for name in names}
        return {parallel.KIND: {"directions": list(self.directions), **own}}
