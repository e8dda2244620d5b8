"""Operations and minutes of `benchmarks.varieties`, before anything is trained."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import compacter_jax as cj
from benchmarks import varieties
from benchmarks.translation_flops import REACHED, measured_rate
from benchmarks.varieties_data import Files, Group, emea_of
from compacter_jax.models.loading import module_from_config, read_config
from train.__main__ import _parsed
from train.compute import flops, step
from train.compute.program import Program, gradient_program, traced
from train.data import batching
from train.objectives.masked_words import MaskedWords

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def predict(
    options: argparse.Namespace, group: Group, files: Files, trimmed: Path
) -> list[dict[str, Any]]:
    """Returns rows with `what`, `runs`, `flops` and predicted `minutes`.

    Rows of conditions also have `passes`, the operations of a sentence in forward passes with one
    language adapter.

    Args:
      options: the options of the command line.
      group: the languages and varieties.
      files: the files of texts and sentences.
      trimmed: the folder of the backbone.
    """
    rate = options.flops_per_second or measured_rate()
    rows = [
        *_of_training(options, group, files, trimmed),
        *_of_cells(options, group, files, trimmed),
    ]
    for row in rows:
        row["minutes"] = row["flops"] / (REACHED * rate) / 60
    return rows


def _of_training(
    options: argparse.Namespace, group: Group, files: Files, trimmed: Path
) -> list[dict[str, Any]]:
    count, seeds = len(group.languages), len(options.seeds)
    room, batch = options.max_length - 2, options.batch_size
    lengths = _tokens(trimmed, [files.text(each) for each in group.languages])
    masked = functools.partial(_masked_words, trimmed, batch, options.max_length)
    updates = sum(-(-int(each.sum()) // room) for each in lengths) / batch
    rows = [_row("head", 1, options.head_epochs * updates * masked(("head-only",)))]
    tagged = _tokens(trimmed, [files.tagged(group.languages[0], "train")])[0]
    padded = _padded(tagged, options.max_length)
    for kind in options.adapters:
        method = tuple(varieties.language_flags(options, kind, count))
        work = options.epochs * updates * masked(method)
        rows.append(_row(f"{kind} languages", seeds, seeds * work))
        labels = len(files.tags())
        one = _tagging(options, trimmed, batch, padded, 1, kind, labels)["train"]
        work = options.task_epochs * len(tagged) / batch * one
        rows.append(_row(f"{kind} task", seeds, seeds * work))
    return rows


def _of_cells(
    options: argparse.Namespace, group: Group, files: Files, trimmed: Path
) -> list[dict[str, Any]]:
    """Returns a row for each condition, single adapters in one."""
    found: dict[str, dict[str, Any]] = {}
    labels, size = len(files.tags()), options.eval_batch_size
    work_of = functools.cache(functools.partial(_tagging, options, trimmed, size))
    passes: dict[str, list[float]] = {}
    # One length for all, since each length is traced anew.
    others = group.left_out + group.varieties
    whole = np.concatenate(_tokens(trimmed, [files.tagged(each, "test") for each in others]))
    padded = _padded(whole, options.max_length)
    for seed in options.seeds:
        for cell in varieties.cells(options, group, seed):
            lengths = _tokens(trimmed, [files.tagged(cell.variety, cell.split)])[0]
            name = "only" if cell.condition.startswith("only-") else cell.condition
            kind = varieties.COMPACTER if name.startswith("compacter-") else varieties.DENSE
            work = work_of(padded, len(cell.members), kind, labels)
            one = work_of(padded, 1, kind, labels)["pass"] / size
            per_sentence = _per_sentence(name, work, len(cell.members)) / size
            total = per_sentence * min(len(lengths), varieties.most_of(options, name) or 10**9)
            if name == "labels":
                fitted = len(_tokens(trimmed, [files.tagged(cell.variety, "validation")])[0])
                total += options.fit_steps * fitted * work["step"] / size
            row = found.setdefault(name, _row(name, 0, 0))
            row["runs"] += 1
            row["flops"] += total
            passes.setdefault(name, []).append(per_sentence / one)
    for name, row in found.items():
        row["passes"] = float(np.mean(passes[name]))
    return list(found.values())


def _per_sentence(name: str, work: dict[str, float], members: int) -> float:
    """Returns the operations of a batch under a condition.

    EMEA's steps are one loop, out of which the compiler moves what does not depend on the weights.
    """
    if (setting := emea_of(name)) is not None:
        return setting[0] * (work["step"] - work["fixed"]) + work["pass"]
    return work["pass"] * (members if name == "probabilities" else 1)


def _row(what: str, runs: int, work: float) -> dict[str, Any]:
    return {"what": what, "runs": runs, "flops": work}


@functools.cache
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _tokens(trimmed: Path, paths: list[Path]) -> list[np.ndarray]:
    """Returns the numbers of tokens of the lines of files, special ones included."""
    return [_lengths(trimmed, path) for path in paths]


@functools.cache
def _lengths(trimmed: Path, path: Path) -> np.ndarray:
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        lines = [" ".join(json.loads(line)["tokens"]) for line in lines]
    return np.array([len(ids) for ids in _tokenizer(trimmed)(lines)["input_ids"]])


def _padded(lengths: np.ndarray, max_length: int) -> int:
    """Returns the mean length of sentences that are padded to their buckets."""
    buckets = np.array(batching.bucket_lengths(max_length))
    return round(float(buckets[np.searchsorted(buckets, np.minimum(lengths, max_length))].mean()))


def _masked_words(trimmed: Path, batch: int, length: int, flags: tuple[str, ...]) -> float:
    """Returns the operations of an update of masked words."""
    module = module_from_config(read_config(trimmed), head="masked_lm")
    model = cj.Adapted(module, _method(flags))
    objective = MaskedWords(model, _tokenizer(trimmed), length)
    return _gradient(model, _shapes(batch, length), objective.apply, objective.loss)


def _method(flags: tuple[str, ...]) -> Any:
    required = ["--backbone", "unused", "--output-dir", "unused"]
    return _parsed("fit", ["--method", *flags, *required]).method_config()


def _shapes(batch: int, length: int) -> dict[str, Any]:
    shape = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((batch,), jnp.float32)
    return {**dict.fromkeys((*INPUTS, "labels"), shape), "weights": weights}


def _params(model: cj.Adapted) -> Any:
    inputs = model.backbone.dummy_inputs()
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def _gradient(
    model: cj.Adapted,
    batch: dict[str, Any],
    apply: step.ApplyFunction,
    loss: step.LossFunction,
) -> float:
    params = _params(model)
    halves = cj.partition(params, cj.label_params(params, model.method))
    return flops.of_step(gradient_program(apply, loss, *halves, batch))


def _tagging(
    options: argparse.Namespace,
    trimmed: Path,
    size: int,
    length: int,
    members: int,
    kind: str,
    labels: int,
) -> dict[str, float]:
    """Returns the operations of a batch: an update of the task, a pass, and a step of EMEA.

    Of a pass, "fixed" does not depend on the weights of the members.
    """
    module = module_from_config(
        read_config(trimmed), head="token_classification", num_labels=labels
    )
    language = _method(tuple(varieties.language_flags(options, kind, members)))
    upper = varieties.layer_flags(options)
    task = _method(("pfeiffer-feed-forward", "--reduction-factor", "16", *upper))
    batch = _shapes(size, length)
    stack = cj.Stack(language, task, names=("language", "task"), frozen=("language",))
    bank = cj.Stack(cj.Bank(language, size=members), task, names=("language", "task"))
    model, trained = cj.Adapted(module, bank), cj.Adapted(module, stack)
    apply_trained = step.apply_function(trained, INPUTS)
    params = _params(model)
    sites = len(cj.mixing_sites(params))
    scores = jax.ShapeDtypeStruct((size, sites, members), jnp.float32)
    apply = step.apply_function(model, INPUTS)

    def logits(params: Any, batch: Any, scores: Any) -> Any:
        return apply(params, {**batch, "mix": jax.nn.softmax(scores)}, None)

    def entropies(params: Any, batch: Any, scores: Any) -> Any:
        found = jax.nn.log_softmax(logits(params, batch, scores))
        return (jnp.exp(found) * found).sum()

    forward = traced(logits, params, batch, scores)
    return {
        "train": _gradient(trained, batch, apply_trained, step.loss_function("tokens")),
        "pass": flops.of_step(forward),
        "fixed": flops.of_step(forward) - _of_last(forward),
        "step": flops.of_step(traced(jax.grad(entropies, argnums=2), params, batch, scores)),
    }


def _of_last(program: Program) -> int:
    """Returns the operations of a program that depend on its last input."""
    depending, found = {max(program.inputs)}, 0
    for operation in program.operations:
        if not depending.isdisjoint(operation.inputs):
            depending.update(operation.outputs)
            found += operation.flops
    return found
