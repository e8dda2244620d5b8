"""Translation models of the quality experiment: their data, training and scores."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
import pyarrow.parquet as pq

import compacter_jax as cj
from train.compute import flops, program, step
from train.data.batching import shift_right
from train.data.tokens import IGNORED
from train.exchange.create_backbone import random_params, train_tokenizer, write_tokenizer
from train.tasks import metrics

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LANGUAGES = ("de", "fr")
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")
PAD, END = 0, 1  # of `train_tokenizer`


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Sentences and their translations, as tokens.

    Attributes:
      source: tokens of the English sentences.
      target: tokens of the translations, the token of the language first.
      texts: the translations.
      languages: the language of each.
    """

    source: tuple[tuple[int, ...], ...]
    target: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    languages: tuple[str, ...]

    def of_language(self, language: str) -> Pairs:
        """Returns the pairs of one language."""
        kept = [i for i, own in enumerate(self.languages) if own == language]
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Pairs(*(tuple(values[i] for i in kept) for values in fields))


def read_texts(folder: Path, split: str, limit: int | None = None) -> list[tuple[str, str, str]]:
    """Reads English sentences with their translations and the language of each.

    Args:
      folder: folder of Parquet files with the columns en, de and fr.
      split: name of a file without its ending.
      limit: largest number of pairs, of a fixed random order; None for all.

    Raises:
      ValueError: if the file lacks a column, or has no pair.
    """
    path = folder / f"{split}.parquet"
    names = ("en", *LANGUAGES)
    if missing := [name for name in names if name not in pq.read_schema(path).names]:
        raise ValueError(f"{path} has no column {missing[0]!r}; it needs {', '.join(names)}")
    columns = pq.read_table(path, columns=list(names)).to_pydict()
    rows = [
        (source, target, language)
        for language in LANGUAGES
        for source, target in zip(columns["en"], columns[language], strict=True)
        if source and target
    ]
    if not rows:
        raise ValueError(f"{path} has no translation to {' or '.join(LANGUAGES)}")
    order = np.random.default_rng(0).permutation(len(rows))[:limit]
    return [rows[i] for i in order]


def tokenizer_of(folder: Path, rows: Sequence[tuple[str, str, str]], vocabulary: int) -> Tokenizer:
    """Returns the tokenizer in a folder, which is trained on the rows if it is not there yet."""
    from tokenizers import Tokenizer  # noqa: PLC0415 - slow to import

    path = folder / "tokenizer.json"
    languages = tuple(f"<{language}>" for language in ("en", *LANGUAGES))
    if not path.exists():
        text = folder / "text.txt"
        sentences = dict.fromkeys(sentence for row in rows for sentence in row[:2])
        text.write_text("\n\n".join(sentences), encoding="utf-8")
        write_tokenizer(train_tokenizer((text,), vocabulary, languages), folder, languages)
        text.unlink()
    return Tokenizer.from_file(str(path))


def encode(tokenizer: Tokenizer, rows: Sequence[tuple[str, str, str]], longest: int) -> Pairs:
    """Returns the pairs as tokens; those of more than `longest` tokens are left out."""

    def tokens(texts: list[str]) -> list[tuple[int, ...]]:
        return [tuple(encoded.ids) for encoded in tokenizer.encode_batch(texts)]

    sources = tokens([f"<en> {source}" for source, _, _ in rows])
    targets = tokens([f"<{language}> {target}" for _, target, language in rows])
    kept = [
        i
        for i, pair in enumerate(zip(sources, targets, strict=True))
        if max(map(len, pair)) <= longest
    ]
    return Pairs(
        tuple(sources[i] for i in kept),
        tuple(targets[i] for i in kept),
        tuple(rows[i][1] for i in kept),
        tuple(rows[i][2] for i in kept),
    )


def bucket(pairs: Pairs, index: int) -> int:
    """Returns the length that a pair is padded to: a multiple of 16."""
    return -(-max(len(pairs.source[index]), len(pairs.target[index])) // 16) * 16


def batch_of(pairs: Pairs, indices: Sequence[int], rows: int, length: int) -> dict[str, np.ndarray]:
    """Returns a batch of `rows` rows; rows beyond the indices have no weight."""

    def padded(tokens: Sequence[Sequence[int]], filler: int) -> np.ndarray:
        array = np.full((rows, length), filler, np.int32)
        for i, own in enumerate(tokens):
            array[i, : len(own)] = own
        return array

    ids = padded([pairs.source[i] for i in indices], PAD)
    labels = padded([pairs.target[i] for i in indices], IGNORED)
    mask = (ids != PAD).astype(np.int32)
    mask[len(indices) :, 0] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": shift_right(labels, PAD, END),
        "labels": labels,
        "weights": (np.arange(rows) < len(indices)).astype(np.float32),
    }


def batches(pairs: Pairs, rows: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields shuffled batches without end; a batch has pairs of one length."""
    rng = np.random.default_rng(seed)
    while True:
        order: dict[int, list[int]] = {}
        for index in rng.permutation(len(pairs.source)):
            order.setdefault(bucket(pairs, index), []).append(int(index))
        parts = [
            (length, indices[i : i + rows])
            for length, indices in order.items()
            for i in range(0, len(indices), rows)
        ]
        for i in rng.permutation(len(parts)):
            length, indices = parts[i]
            yield batch_of(pairs, indices, rows, length)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Numbers of a training.

    Attributes:
      steps: number of updates.
      rows: rows of a batch.
      learning_rate: largest learning rate, from which it falls to zero.
      warmup: number of steps in which the learning rate rises.
    """

    steps: int
    rows: int
    learning_rate: float
    warmup: int


def train(model: cj.Adapted, params: Any, pairs: Pairs, schedule: Schedule, seed: int) -> Any:
    """Returns the trained parameters: the same order of batches for every model and seed."""
    labels = cj.label_params(params, model.method)
    rates = optax.schedules.warmup_cosine_decay_schedule(
        0.0, schedule.learning_rate, schedule.warmup, max(schedule.steps, schedule.warmup + 1)
    )
    tx = cj.optimizer(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rates, 0.9, 0.98)), labels
    )
    trained, frozen = cj.partition(params, labels)
    state = step.TrainState(jax.numpy.int32(0), trained, tx.init(trained))
    update = jax.jit(
        functools.partial(
            step.loss_and_update,
            apply=step.apply_function(model, INPUTS),
            loss=step.loss_function("tokens"),
            tx=tx,
        ),
        donate_argnums=0,
    )
    key = jax.random.key(seed)
    for _, batch in zip(range(schedule.steps), batches(pairs, schedule.rows, seed), strict=False):
        state, _ = update(state, frozen, batch, key)
    return cj.merge(state.trained, frozen)


def scores(
    model: Any, params: Any, pairs: Pairs, tokenizer: Tokenizer, *, rows: int, beams: int
) -> dict[str, dict[str, float]]:
    """Returns loss per token, BLEU and chrF of each language.

    Args:
      model: module of a translation model.
      params: its parameters.
      pairs: pairs to translate.
      tokenizer: their tokenizer.
      rows: rows of a batch.
      beams: number of beams.
    """
    import sacrebleu  # noqa: PLC0415 - slow to import

    found = {}
    for language in LANGUAGES:
        own = pairs.of_language(language)
        if not own.source:
            continue
        total, count, texts = 0.0, 0, [""] * len(own.source)
        for indices, batch in _in_order(own, rows):
            total -= float(_likelihood(model, params, batch))
            count += int((batch["labels"] != IGNORED).sum())
            tokens = cj.generate(
                model,
                params,
                batch["input_ids"],
                batch["attention_mask"],
                max_new_tokens=batch["input_ids"].shape[1] + 16,
                num_beams=beams,
                forced_bos_token_id=tokenizer.token_to_id(f"<{language}>"),
            )
            for i, text in zip(indices, tokenizer.decode_batch(np.asarray(tokens)), strict=False):
                texts[i] = text
        found[language] = {
            "loss": total / count,
            "bleu": metrics.bleu(texts, own.texts, language),
            "chrf": sacrebleu.corpus_chrf(texts, [list(own.texts)]).score,
        }
    return found


@functools.partial(jax.jit, static_argnames="model")
def _likelihood(model: Any, params: Any, batch: Any) -> jax.Array:
    """Returns the sum of the log-likelihoods of a batch's labels."""
    logits = step.apply_function(model, INPUTS)(params, batch, None)
    return step.token_log_likelihoods(logits, batch["labels"]).sum()


def _in_order(pairs: Pairs, rows: int) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """Yields batches of pairs of similar lengths, with the indices of the pairs."""
    order = sorted(range(len(pairs.source)), key=lambda i: bucket(pairs, i))
    for start in range(0, len(order), rows):
        indices = order[start : start + rows]
        yield indices, batch_of(pairs, indices, rows, bucket(pairs, indices[-1]))


# --- what it costs ------------------------------------------------------------------------------


def training_flops(model: cj.Adapted, pairs: Pairs, schedule: Schedule) -> int:
    """Returns the FLOPs of the products of a training, counted in the traced steps."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.backbone.dummy_inputs())["params"]  # type: ignore[attr-defined]
    halves = cj.partition(shapes, cj.label_params(shapes, model.method))
    apply, loss = step.apply_function(model, INPUTS), step.loss_function("tokens")
    total = 0.0
    for length, share in _shares(pairs).items():
        batch = batch_of(pairs, [], schedule.rows, length)
        traced = program.gradient_program(apply, loss, *halves, batch)
        total += share * schedule.steps * flops.of_step(traced)
    return round(total)


def scoring_flops(model: Any, pairs: Pairs, *, rows: int, beams: int) -> int:
    """Returns the FLOPs of the products of `scores`, where every translation is as long as may be.

    A decoded token costs what it costs in a whole target; the encoder runs once for all beams.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.dummy_inputs())["params"]
    total = 0.0
    for length, share in _shares(pairs).items():
        batch = batch_of(pairs, [], rows, length)

        def run(params: Any, batch: Any) -> Any:
            return step.apply_function(model, INPUTS)(params, batch, None)

        once = flops.of_step(program.traced(run, shapes, batch))
        total += share * len(pairs.source) / rows * once * (1 + beams * (length + 16) / length)
    return round(total)


def _shares(pairs: Pairs) -> Mapping[int, float]:
    """Returns the share of each padded length."""
    lengths = np.array([bucket(pairs, i) for i in range(len(pairs.source))])
    values, counts = np.unique(lengths, return_counts=True)
    return {int(v): c / len(lengths) for v, c in zip(values, counts, strict=True)}


def machine_rate(rows: int, d: int) -> float:
    """Returns the FLOP/s of a product of `[rows, d]` and `[d, 4 d]` on this machine."""
    x, w = np.ones((rows, d), np.float32), np.ones((d, 4 * d), np.float32)
    product = jax.jit(lambda x, w: x @ w)
    product(x, w).block_until_ready()
    x, w = map(jax.device_put, (x, w))
    count, start = 0, time.perf_counter()
    while count < 3 or time.perf_counter() - start < 0.2:
        product(x, w).block_until_ready()
        count += 1
    return 2 * rows * d * 4 * d * count / (time.perf_counter() - start)


def new_params(module: cj.Seq2Seq, seed: int) -> Any:
    """Returns the initial parameters of a model."""
    return random_params(module, jax.random.key(seed))
