"""Objective of pre-training by masked words."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import compacter_jax as cj
from compacter_jax.messages import listing
from compacter_jax.methods.base import MethodConfig
from compacter_jax.models.families import family_of_module
from train import tasks
from train.compute import step
from train.data import corpus, tokens
from train.data.words import WordCounts, Words
from train.objectives import learning_rates as objectives_learning_rates
from train.objectives.on_text import OnText

# Of the chosen tokens: fraction that becomes the mask, and fraction that becomes a random token.
_MASKED, _RANDOM = 0.8, 0.1


@dataclasses.dataclass(frozen=True)
class MaskedWords(OnText):
    """Masked words, the pre-training of BERT; the splits are paths of text files.

    A segment is as many tokens of the text as `max_length` leaves room for, between the special
    tokens. Of its tokens `noise_density` are chosen, one at least: 80 % of them become the mask, 10
    % a random token, and 10 % stay. The loss is over the chosen tokens.

    Attributes:
      model: an encoder with logits of the vocabulary.
      tokenizer: the tokenizer of the backbone, with a mask.
      max_length: the number of tokens of an input.
      noise_density: the fraction of the tokens that are chosen.
      seed: the seed of the noise in training.

    Raises:
      ValueError: if the tokenizer has no mask, `noise_density` is not within 0 and 1, or
        `max_length` leaves no room.

    References:
      Devlin et al., BERT, NAACL 2019, arXiv:1810.04805, section 3.1.
    """

    learning_rates: ClassVar[Mapping[str, float]] = objectives_learning_rates.CLASSIFIER
    has_row_labels: ClassVar[bool] = False
    name: ClassVar[str] = tasks.MASKED_LM
    model: Any
    tokenizer: Any
    max_length: int
    noise_density: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokenizer.mask_token_id is None:
            raise ValueError(f"the tokenizer has no mask, which {self.name} needs")
        if not 0 < self.noise_density < 1:
            raise ValueError(f"noise_density={self.noise_density} must be above 0 and below 1")
        if self._room < 2:
            raise ValueError(f"max_length={self.max_length} leaves no room for two tokens")

    @property
    def apply(self) -> step.ApplyFunction:
        """Function of the parameters that returns the logits of chosen tokens alone."""
        apply = step.apply_function(self.model, self.inputs, ["word_positions"])

        def of_chosen(params: step.Params, batch: step.Batch, key: Array | None) -> Array:
            return apply(params, {**batch, "word_positions": self._chosen(batch["labels"])}, key)

        return of_chosen

    @property
    def loss(self) -> step.LossFunction:
        """Mean cross-entropy over the chosen tokens of a row."""
        loss = step.loss_function("tokens")
        return lambda logits, labels: loss(logits, self._labels_of_chosen(labels))

    def outputs(self, params: step.Params, batch: step.Batch) -> dict[str, Array]:
        """Computes the sums over chosen tokens: of the losses, and of those that are right."""
        logits, labels = self.apply(params, batch, None), self._labels_of_chosen(batch["labels"])
        right = (logits.argmax(-1) == labels) & (labels != tokens.IGNORED)
        losses = -step.token_log_likelihoods(logits, labels)
        return {"loss": losses.sum(-1), "correct": right.sum(-1)}

    def scores(self, outputs: dict[str, np.ndarray], encoded: tokens.Encoded) -> dict[str, float]:
        """Returns `token_accuracy` and `loss`, the means over the chosen tokens."""
        assert encoded.words is not None
        chosen = float(encoded.words.lengths.sum())
        sums = {name: float(values.astype(np.float64).sum()) for name, values in outputs.items()}
        return {"token_accuracy": sums["correct"] / chosen, "loss": sums["loss"] / chosen}

    def read(self, path: Path) -> corpus.Segments:
        """Tokenises a text file and divides it into segments."""
        return corpus.read_segments(path, self.tokenizer, self._room, with_sentinels=False)

    def noised(self, segments: corpus.Segments, seed: int, epoch: int) -> tokens.Encoded:
        """Returns the segments with the noise of an epoch, and the tokens that were chosen.

        The noise of a segment depends on `seed`, `epoch` and the segment's index alone.
        """
        before, after = self._around
        inputs, labels = [], []
        for i in range(len(segments)):
            noisy, right = self._masked(segments[i], np.random.default_rng([seed, epoch, i]))
            inputs.append(np.concatenate([before, noisy, after]).astype(np.int32))
            ignored = [np.full(len(ids), tokens.IGNORED, np.int32) for ids in (before, after)]
            labels.append(np.concatenate([ignored[0], right, ignored[1]]))
        flat, tags = corpus.joined(tuple(inputs)), corpus.joined(tuple(labels)).tokens
        chosen = [int((right != tokens.IGNORED).sum()) for right in labels]
        return tokens.Encoded(
            input_ids=flat.tokens,
            token_type_ids=np.zeros_like(flat.tokens),
            offsets=flat.offsets,
            targets=None,
            max_length=self.max_length,
            pad_token_id=self.tokenizer.pad_token_id,
            num_truncated=0,
            words=Words(
                lengths=np.array(chosen, np.int64),
                indices=np.where(tags == tokens.IGNORED, -1, 0).astype(np.int32),
                tags=tags.astype(np.int32),
                counts=WordCounts(words=sum(chosen)),
            ),
        )

    def _chosen(self, labels: Array) -> Array:
        """Returns the positions of the chosen tokens of rows, as many as a row has at most.

        Rows with fewer have other positions as well, whose labels are `IGNORED`.
        """
        most = min(self._chosen_of(self._room), labels.shape[1])
        return jax.lax.top_k((labels != tokens.IGNORED).astype(jnp.int32), most)[1]

    def _labels_of_chosen(self, labels: Array) -> Array:
        return jnp.take_along_axis(labels, self._chosen(labels), axis=1)

    def _chosen_of(self, length: int) -> int:
        """Returns the number of chosen tokens of a segment."""
        return max(1, round(self.noise_density * length))

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the noise."""
        return {self.name: {"noise_density": self.noise_density}}

    @functools.cached_property
    def _around(self) -> tuple[np.ndarray, np.ndarray]:
        """The special tokens before and after a segment."""
        encoded = self.tokenizer("a", return_special_tokens_mask=True)
        ids = np.array(encoded["input_ids"], np.int32)
        (inside,) = np.nonzero(np.array(encoded["special_tokens_mask"]) == 0)
        return ids[: inside[0]], ids[inside[-1] + 1 :]

    @property
    def _room(self) -> int:
        return self.max_length - sum(map(len, self._around))

    @functools.cached_property
    def _ordinary(self) -> np.ndarray:
        """The ids that a random token is drawn from."""
        ids = set(self.tokenizer.get_vocab().values()) - set(self.tokenizer.all_special_ids)
        return np.array(sorted(ids), np.int32)

    def _masked(
        self, ids: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens with noise, and the right tokens where they were chosen."""
        count = self._chosen_of(len(ids))
        chosen = generator.permutation(len(ids))[:count]
        fate = generator.random(count)
        drawn = generator.choice(self._ordinary, count)
        kept = np.where(fate < _MASKED + _RANDOM, drawn, ids[chosen])
        noisy, right = ids.copy(), np.full(len(ids), tokens.IGNORED, np.int32)
        noisy[chosen] = np.where(fate < _MASKED, self.tokenizer.mask_token_id, kept)
        right[chosen] = ids[chosen]
        return noisy, right


def adapted(task: tasks.Task, module: Any, method: MethodConfig) -> cj.Adapted:
    """Returns the adapted module of a run.

    A head for masked words that is trained alone is named as the head; other methods leave it as
    it is, since it belongs to the pre-training.
    """
    names = family_of_module(module).names.frozen_heads if trains_head(task, method) else ()
    return cj.Adapted(module, method, groups={"head": "|".join(names)} if names else None)


def trains_head(task: tasks.Task, method: MethodConfig) -> bool:
    """Returns True if a run trains a head for masked words alone."""
    return task.kind == tasks.MASKED_LM and not method.trained_inserted_groups()


def check_head(task: tasks.Task, name: str, frozen: Sequence[str]) -> None:
    """Raises ValueError for masked words with a head that is neither pre-trained nor trained.

    Args:
      task: the task of the run.
      name: name of the backbone.
      frozen: paths of parameters that the checkpoint lacks and the run does not train.
    """
    if task.kind == tasks.MASKED_LM:
        raise ValueError(
            f"{name} has no head for masked words ({listing(frozen, 2)}); train one first with "
            "--method head-only, and give the folder backbone/ of that run"
        )
