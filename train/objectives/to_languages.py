"""Base of the objectives that write several languages, each with or without its adapter."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

import compacter_jax as cj
from compacter_jax.messages import listing
from train.compute import step
from train.data import batching, languages, sampled
from train.data import rows as data_rows
from train.data import tokens as data_tokens
from train.objectives.base import Predicted
from train.objectives.text_to_text import Seq2Seq, mean_token_loss, num_tokens
from train.tasks import metrics, text_format


@dataclasses.dataclass(frozen=True)
class ToLanguages(Seq2Seq):
    """Inputs to write in other words, with the direction of each.

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

    def outputs(self, params: step.Params, batch: step.Batch) -> dict[str, Array]:
        """Computes `loss` and `correct` of each row, if there are targets, and generated `ids`."""
        found = self.teacher_forced(params, batch) if "decoder_input_ids" in batch else {}
        if not self.generates and found:
            return found
        ids = cj.generate(
            self.model,
            params,
            batch[self.inputs[0]],
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

    @abc.abstractmethod
    def names_of(self, columns: Mapping[str, Sequence[str]]) -> list[str]:
        """Returns the name of each row's direction."""

    def of_file(self, path: Path, folder: Path) -> ToLanguages:
        """Returns the objective for a file of inputs, after a look at all its rows.

        Args:
          path: the file.
          folder: folder that names in it are relative to.

        Raises:
          ValueError: for a direction without an adapter, or as `read_rows`; the message names the
            file and the row.
        """
        first = 1
        for rows in data_rows.read_rows(path, columns=self.columns):
            columns = {name: data_rows.column_values(rows, name) for name in self.columns}
            self.places(self.names_of(columns), f"{path}, ", first)
            first += len(rows)
        return self

    def places(self, names: Sequence[str], where: str = "", first: int = 1) -> np.ndarray:
        """Returns the place of each row's direction, `[rows]` int32; new ones follow the known.

        Args:
          names: the names of the rows' directions.
          where: what an error says before the number of the row.
          first: the number of the first row.

        Raises:
          ValueError: for a direction without an adapter; the message names the row.
        """
        place = {name: i for i, name in enumerate(self.directions)}
        for row, name in enumerate(names, first):
            if name not in place and not self.is_open:
                raise ValueError(
                    f"{where}row {row}: there is no adapter for {name!r:.100}; there are those of "
                    f"{listing(self.directions)}"
                )
            place.setdefault(name, len(place))
        return np.array([place[name] for name in names], np.int32)

    def members_of(self, directions: np.ndarray) -> np.ndarray | None:
        """Returns the member of each row, `[rows]` int32, from its direction; None without a
        bank.
        """
        return None if self.members is None else np.array(self.members, np.int32)[directions]

    def target_texts(self, targets: Any, first: np.ndarray | None) -> data_tokens.Texts:
        """Tokenises targets.

        Args:
          targets: `[rows]` texts.
          first: `[rows]` int32, a token before each, which counts for the maximum length, but not
            for the loss, as it is forced in generation; or None.
        """
        longest = self.max_target_length - (first is not None)
        texts = data_tokens.tokenize_texts(list(targets), self.tokenizer, longest, what="target")
        if first is None:
            return texts
        return dataclasses.replace(languages.with_first(texts, first), given=1)

    def encode_all(self, splits: Mapping[str, Any]) -> dict[str, batching.Examples]:
        """Tokenises the splits of a run; training draws directions by the temperature."""
        encoded = super().encode_all(splits)
        train = encoded["train"].of_epoch(0)
        return {**encoded, "train": sampled.Sampled(train, self.temperature, self.seed)}

    def scores(
        self, outputs: dict[str, np.ndarray], encoded: data_tokens.Encoded
    ) -> dict[str, float]:
        """Returns `token_accuracy` and `loss`, and of generated text those of `compared`.

        These are means over directions, `bleu` for example, and of each, `bleu_en-de` and the like.
        """
        accuracy = outputs["correct"].sum() / num_tokens(encoded).sum()
        values = {"token_accuracy": float(accuracy), "loss": mean_token_loss(outputs, encoded)}
        if not self.generates:
            return values
        predictions = np.array(self._texts(outputs), object)
        each = self._by_direction(predictions, encoded)
        names = list(next(iter(each.values())))
        means = {name: float(np.mean([found[name] for found in each.values()])) for name in names}
        own = {
            f"{name}_{direction}": found[name]
            for name in names
            for direction, found in each.items()
        }
        return {**values, **means, **own}

    def compared(
        self, said: Sequence[str], wanted: Sequence[str], language: str
    ) -> dict[str, float]:
        """Returns metrics of the texts of one direction: BLEU and chrF.

        Args:
          said: `[rows]` generated texts.
          wanted: `[rows]` references.
          language: language of the texts.
        """
        return {
            "bleu": metrics.bleu(said, wanted, language),
            "chrf": metrics.chrf(said, wanted),
        }

    def _by_direction(
        self, predictions: np.ndarray, encoded: data_tokens.Encoded
    ) -> dict[str, dict[str, float]]:
        """Returns direction -> metrics of its rows."""
        assert encoded.targets is not None
        names, targets_in = map(np.array, encoded.rows)
        found = {}
        for name in dict.fromkeys(names):
            chosen = np.flatnonzero(names == name)
            language = metrics.base_language(targets_in[chosen[0]])
            said, wanted = list(predictions[chosen]), list(encoded.targets[chosen])
            found[str(name)] = self.compared(said, wanted, language)
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

    def own_settings(self) -> dict[str, Any]:
        """Returns the settings that a saved adapter has beside those of all objectives."""
        names = ("max_target_length", "num_beams", "is_open")
        own = {name: getattr(self, name) for name in names}
        return {"directions": list(self.directions), **own}
