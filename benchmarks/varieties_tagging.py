"""Tags of a variety under one condition of `benchmarks.varieties`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import compacter_jax as cj
from benchmarks.varieties_data import emea_of
from train.cli.options import ENTROPY
from train.compute import step
from train.compute.outputs import split_outputs
from train.data import batching, tokens
from train.inference import adapter as inference_adapter
from train.inference import mix_files
from train.inference.mixing import EntropyMixer
from train.inference.options import PredictOptions
from train.objectives import Objective
from train.objectives.base import LabelLogits
from train.tasks import entities

# Learning rate of Adam for weights that are fitted on labels.
_LABELS_RATE = 0.3


class Tagging:
    """Tagger of varieties, which compiles one program for mixtures of as many members.

    Args:
      backbone: the backbone, with a head for masked words.
      options: the options of `benchmarks.varieties`.
    """

    def __init__(self, backbone: Path, options: argparse.Namespace):
        self._backbone, self._options = backbone, options
        # Number of members and kind -> objective, so that all mixtures share their programs.
        self._objectives: dict[tuple[int, str], tuple[Objective, LabelLogits]] = {}
        self._programs: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._load = functools.lru_cache(maxsize=2)(self._loaded)

    def computed(
        self,
        condition: str,
        members: tuple[str, ...],
        path: Path,
        validation: Path,
        root: Path,
        seed: int,
        most: int | None = None,
    ) -> dict[str, Any]:
        """Returns the results of one cell.

        Args:
          condition: the condition.
          members: the languages whose adapters there are.
          path: the sentences with tags.
          validation: sentences for weights that are fitted on labels.
          root: the folder of the adapters.
          seed: the seed of the adapters.
          most: the number of sentences to take; None for all.

        Returns:
          `score`, the accuracy, or the F1 of entities; `counts`, numbers of each sentence from
          which the score follows; `seconds`; and what a mixture found.
        """
        _, is_compacter, name = condition.rpartition("compacter-")
        kind = "compacter" if is_compacter else "dense"
        started = time.perf_counter()
        if condition == "joint":
            folder = root / "joint" / f"seed-{seed}" / "task"
            loaded = inference_adapter.load(self._given(str(folder)))
            encoded = _encoded(loaded.objective, _rows(path, most))
            objective = loaded.objective
            outputs = loaded.compute(encoded, self._options.eval_batch_size).outputs
            more: dict[str, Any] = {}
        else:
            mixer = self._load(kind, members, root, seed)
            objective = mixer.objective
            encoded = _encoded(objective, _rows(path, most))
            outputs, more = self._outputs(name, mixer, encoded, validation)
        counts = _counts(objective, outputs, encoded, self._options.task)
        return {
            "score": score(counts),
            "sentences": len(counts),
            "seconds": time.perf_counter() - started,
            **more,
            "counts": counts.tolist(),
        }

    def _given(self, adapter: str, **mix: Any) -> PredictOptions:
        unused = Path("unused.jsonl")
        return PredictOptions(
            adapter=Path(adapter), backbone=str(self._backbone), input=unused, output=unused, **mix
        )

    def _loaded(self, kind: str, members: tuple[str, ...], root: Path, seed: int) -> EntropyMixer:
        """Loads a mixture, as `evaluate` does."""
        folder = root / kind / f"seed-{seed}"
        mixture = ",".join(f"{name}={folder / name}" for name in members)
        expression = f"stack(language=mix({mixture}),task={folder / 'task'}#task)"
        mixer = inference_adapter.load(self._given(expression, mix=ENTROPY)).mixer
        assert mixer is not None
        key = (len(members), kind)
        own = mixer.objective, mixer.labels
        objective, labels = self._objectives.setdefault(key, own)
        return dataclasses.replace(mixer, objective=objective, labels=labels)

    def _outputs(
        self, name: str, mixer: EntropyMixer, encoded: tokens.Encoded, validation: Path
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the outputs of a condition on a mixture, and what there is to say of it."""
        count, size = len(mixer.members), self._options.eval_batch_size
        if (setting := emea_of(name)) is not None:
            steps, rate = setting
            options = dataclasses.replace(mixer.options, mix_steps=steps, mix_learning_rate=rate)
            finding = dataclasses.replace(mixer, options=options)
            outputs, found = finding.compute(encoded, size)
            assert found is not None
            return outputs, mix_files.summary(found, finding.members, finding.sites)
        program = self._program("probabilities" if name == "probabilities" else "mix", mixer)
        mix: Any = np.full(count, 1 / count, np.float32)
        more: dict[str, Any] = {}
        if name == "none":
            mix = np.zeros(count, np.float32)
        elif name.startswith("only-"):
            mix = np.eye(count, dtype=np.float32)[mixer.members.index(name.removeprefix("only-"))]
        elif name == "labels":
            mix, losses = self._fitted(mixer, _encoded(mixer.objective, _rows(validation)))
            own = {site: at for at, site in enumerate(cj.mixing_sites(mixer.params))}
            more["mean_weights"] = {
                site: dict(zip(mixer.members, map(float, mix[0, own[site]]), strict=True))
                for site in mixer.sites
            }
            more["losses"] = losses

        def outputs_of(batch: Mapping[str, Any]) -> Any:
            return jax.device_get(program(mixer.params, {**batch, "mix": mix}))

        return split_outputs(outputs_of, encoded, size, description=None), more

    def _program(self, name: str, mixer: EntropyMixer) -> Callable[..., Any]:
        """Returns a compiled function of parameters and a batch with `mix`."""
        objective, labels, count = mixer.objective, mixer.labels, len(mixer.members)
        makers: dict[str, Callable[[], Callable[..., Any]]] = {
            "mix": lambda: objective.outputs,
            "probabilities": lambda: functools.partial(_mean_probabilities, labels, count),
            "labels": lambda: jax.value_and_grad(functools.partial(_loss, labels)),
        }
        key = (name, id(objective))
        if key not in self._programs:
            self._programs[key] = jax.jit(makers[name]())
        return self._programs[key]

    def _fitted(
        self, mixer: EntropyMixer, encoded: tokens.Encoded
    ) -> tuple[np.ndarray, list[float]]:
        """Fits weights `[1, sites, members]` on labels by Adam; returns them and the losses."""
        program = self._program("labels", mixer)
        scores = jnp.zeros((1, len(cj.mixing_sites(mixer.params)), len(mixer.members)))
        tx = optax.adam(_LABELS_RATE)
        state, losses = tx.init(scores), []
        for _ in range(self._options.fit_steps):
            total, slopes, words = 0.0, jnp.zeros_like(scores), 0.0
            for batch in batching.batches(encoded, self._options.eval_batch_size, shuffle=False):
                value, slope = program(scores, mixer.params, batch)
                total, slopes = total + float(value), slopes + slope
                words += float((batch["labels"] != tokens.IGNORED).sum())
            updates, state = tx.update(slopes / words, state)
            scores = optax.apply_updates(scores, updates)
            losses.append(total / words)
        return np.asarray(jax.nn.softmax(scores)), losses


def _loss(labels: LabelLogits, scores: Any, params: Any, batch: step.Batch) -> Any:
    """Returns the sum of the losses of words with the weights softmax(scores)."""
    logits = labels.compute(params, {**batch, "mix": jax.nn.softmax(scores)})
    return -step.token_log_likelihoods(logits, batch["labels"]).sum()


def _mean_probabilities(labels: LabelLogits, count: int, params: Any, batch: step.Batch) -> Any:
    """Returns the outputs of the mean of the probabilities that members give one by one."""

    def probabilities(mix: Any) -> Any:
        return jax.nn.softmax(labels.compute(params, {**batch, "mix": mix}))

    mean = jax.lax.map(probabilities, jnp.eye(count)).mean(0)
    return labels.outputs(jnp.log(jnp.maximum(mean, 1e-30)), batch)


def _rows(path: Path, most: int | None = None) -> list[dict[str, list[str]]]:
    lines = path.read_text(encoding="utf-8").splitlines()[:most]
    return [json.loads(line) for line in lines]


def _encoded(objective: Any, rows: list[dict[str, list[str]]]) -> tokens.Encoded:
    """Tokenises sentences with their tags."""
    number = {tag: at for at, tag in enumerate(objective.label_names)}
    encoded: tokens.Encoded = objective.encode(
        {
            "tokens": [row["tokens"] for row in rows],
            "tags": [[number[tag] for tag in row["tags"]] for row in rows],
        }
    )
    return encoded


def _counts(objective: Objective, outputs: Any, encoded: tokens.Encoded, task: str) -> np.ndarray:
    """Returns `[sentences, 2]` right and all words, or `[sentences, 3]` numbers of entities."""
    both = objective.predictions_and_targets(outputs, encoded)
    assert both is not None
    if task == "ner":
        predictions, targets = (each.tolist() for each in both)
        return np.asarray(entities.entity_counts(predictions, targets), np.int64)
    pairs = zip(*both, strict=True)
    return np.array([(sum(map(str.__eq__, a, b)), len(b)) for a, b in pairs])


def score(counts: np.ndarray) -> float:
    """Returns the accuracy of `[…, 2]` counts, or the F1 of `[…, 3]`, summed over the first axis.

    The counts are right and all words, or right, predicted and wanted entities.
    """
    sums = counts.sum(0)
    if counts.shape[-1] == 2:
        return float(sums[0] / max(sums[1], 1))
    return float(2 * sums[0] / max(sums[1] + sums[2], 1))
