"""Quality of compressed and standard decoders: the cells of the experiment, one after another."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import compacter_jax as cj
from benchmarks import compressed_training as training
from benchmarks import record
from benchmarks.compressed_training import LANGUAGES, Pairs, Schedule

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Settings that do not change a cell's result.
_FREE = ("json", "figure", "seeds", "decoders", "plan", "part", "utilisation", "folder")
# Folders, which are recorded by their names alone.
_FOLDERS = ("data", "domain")
STAGES = ("multi30k", "before adapting", "adapted")


@dataclasses.dataclass(frozen=True)
class Data:
    """Pairs of both domains, and their tokenizer."""

    tokenizer: Tokenizer
    train: Pairs
    test: Pairs
    domain_train: Pairs
    domain_test: Pairs


def read(options: argparse.Namespace) -> Data:
    """Reads both domains; the tokenizer is trained on the first and stays in the folder."""
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = training.read_texts(Path(options.data), "train", options.train_pairs)
    tokenizer = training.tokenizer_of(folder, rows, options.vocabulary)

    def encoded(rows: list[tuple[str, str, str]]) -> Pairs:
        return training.encode(tokenizer, rows, options.longest)

    data, domain = Path(options.data), Path(options.domain)
    return Data(
        tokenizer,
        encoded(rows),
        encoded(training.read_texts(data, options.test_split, options.test_pairs)),
        encoded(training.read_texts(domain, "train", options.train_pairs)),
        encoded(training.read_texts(domain, "test", options.test_pairs)),
    )


def module_of(decoder: str, options: argparse.Namespace) -> cj.Seq2Seq:
    """Returns the model with a decoder such as "compressed-2"."""
    return cj.Seq2Seq(cj.Seq2SeqConfig(**_fields(decoder, options)))


def _fields(decoder: str, options: argparse.Namespace) -> dict[str, Any]:
    layer, layers = decoder.split("-")
    sizes = {
        f"{stack}_{name}": value
        for stack in ("encoder", "decoder")
        for name, value in (("attention_heads", options.heads), ("ffn_dim", 4 * options.d))
    }
    return {
        **sizes,
        "vocab_size": options.vocabulary,
        "d_model": options.d,
        "encoder_layers": options.encoder_layers,
        "decoder_layers": int(layers),
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "decoder_layer": layer,
        "dropout": options.dropout,
        "attention_dropout": options.dropout,
        "activation_dropout": 0.0,
        "pad_token_id": training.PAD,
        "eos_token_id": training.END,
        "decoder_start_token_id": training.END,
    }


def schedules(options: argparse.Namespace) -> tuple[Schedule, Schedule]:
    """Returns the numbers of both trainings: of the whole model, then of the adapters."""
    return (
        Schedule(options.steps, options.rows, options.learning_rate, options.warmup),
        Schedule(options.adapter_steps, options.rows, options.adapter_rate, options.warmup),
    )


def adapted(module: cj.Seq2Seq, options: argparse.Namespace) -> cj.Adapted:
    """Returns the model with Compacter adapters."""
    method = cj.preset(
        "compacter", reduction_factor=options.reduction_factor, phm_dim=options.phm_dim
    )
    return cj.Adapted(module, method)


def predicted(options: argparse.Namespace, data: Data) -> dict[str, Any]:
    """Returns FLOPs and minutes of a cell of each decoder, and minutes of all."""
    rate = training.machine_rate(options.rows * 16, options.d) * options.utilisation
    whole, small = schedules(options)
    settings = {"rows": options.rows, "beams": options.beams}
    of_decoders = {}
    for decoder in options.decoders:
        module = module_of(decoder, options)
        full = cj.Adapted(module, cj.preset("full"))
        counted = {
            "training": training.training_flops(full, data.train, whole),
            "adapters": training.training_flops(adapted(module, options), data.domain_train, small),
            "scores": training.scoring_flops(module, data.test, **settings)
            + 2 * training.scoring_flops(module, data.domain_test, **settings),
        }
        of_decoders[decoder] = {"flops": counted, "minutes": sum(counted.values()) / rate / 60}
    minutes = len(options.seeds) * sum(one["minutes"] for one in of_decoders.values())
    return {"flops_per_second": rate, "decoders": of_decoders, "minutes": minutes}


def open_report(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the report in the file of results, or a new one.

    Raises:
      ValueError: if the file is of other settings, or is no file of results.
    """
    settings = {
        name: Path(value).resolve().name if name in _FOLDERS else value
        for name, value in vars(options).items()
        if name not in _FREE
    }
    return record.opened(Path(options.json), settings, (), {"settings": settings, "cells": {}})


def measured(
    options: argparse.Namespace, data: Data, done: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yields the name and the result of each cell that is not done yet."""
    for seed in options.seeds:
        for decoder in options.decoders:
            name = f"{decoder}/{seed}"
            if name not in done:
                yield name, _cell(decoder, seed, options, data)


def _cell(decoder: str, seed: int, options: argparse.Namespace, data: Data) -> dict[str, Any]:
    """Trains a model and adapters on top of it; returns scores after each and the minutes."""
    module, (whole, small) = module_of(decoder, options), schedules(options)
    settings = {"rows": options.rows, "beams": options.beams}
    start = time.perf_counter()
    full = cj.Adapted(module, cj.preset("full"))
    params = training.train(full, training.new_params(module, seed), data.train, whole, seed)

    def scored(model: Any, params: Any, pairs: Pairs) -> Any:
        return training.scores(model, params, pairs, data.tokenizer, **settings)

    found = {STAGES[0]: scored(module, params, data.test)}
    found[STAGES[1]] = scored(module, params, data.domain_test)
    model = adapted(module, options)
    started = cj.init_adapters(model, _Trained(module, params), jax.random.key(seed))
    params = training.train(model, started, data.domain_train, small, seed)
    found[STAGES[2]] = scored(model, params, data.domain_test)
    count = cj.count(params, cj.label_params(params, model.method))
    return {
        "scores": found,
        "parameters": {"all": count.total, "trained": count.trained},
        "minutes": (time.perf_counter() - start) / 60,
    }


@dataclasses.dataclass(frozen=True)
class _Trained:
    """A module with trained parameters."""

    module: Any
    params: Any


def summary(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Returns decoder -> stage -> language -> metric -> mean and deviation over the seeds."""
    found: dict[str, Any] = {}
    for name, cell in cells.items():
        decoder = name.rpartition("/")[0]
        for stage, of_stage in cell["scores"].items():
            for language, values in of_stage.items():
                for metric, value in values.items():
                    place = found.setdefault(decoder, {}).setdefault(stage, {})
                    place.setdefault(language, {}).setdefault(metric, []).append(value)
    for of_decoder in found.values():
        for of_stage in of_decoder.values():
            for values in of_stage.values():
                for metric, all_of in values.items():
                    values[metric] = {
                        "mean": float(np.mean(all_of)),
                        "deviation": float(np.std(all_of, ddof=1)) if len(all_of) > 1 else math.nan,
                        "seeds": len(all_of),
                    }
    return found


def table(found: Mapping[str, Any]) -> list[str]:
    """Returns the lines of a Markdown table of `summary`."""
    metrics = ("loss", "bleu", "chrf")
    names = ["decoder", "stage", *(f"{m} {lang}" for lang in LANGUAGES for m in metrics)]
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for decoder, of_decoder in found.items():
        for stage, of_stage in of_decoder.items():
            cells = [
                f"{v['mean']:.2f} ± {v['deviation']:.2f}"
                for language in LANGUAGES
                for v in (of_stage.get(language, {}).get(m) for m in metrics)
                if v is not None
            ]
            lines.append(f"| {' | '.join([decoder, stage, *cells])} |")
    return lines


def on_par(found: Mapping[str, Any]) -> list[str]:
    """Returns a line for each pair of a compressed and a standard decoder, stage and language.

    "On par" means a difference of the means within the larger deviation of the seeds.
    """
    lines = []
    compressed = [name for name in found if name.startswith("compressed")]
    for decoder, other in itertools.product(compressed, [n for n in found if n not in compressed]):
        for stage in found[decoder]:
            for language in found[decoder][stage]:
                one, two = (found[d][stage][language]["bleu"] for d in (decoder, other))
                gap, allowed = one["mean"] - two["mean"], max(one["deviation"], two["deviation"])
                verdict = "on par" if abs(gap) <= allowed else "not on par"
                lines.append(
                    f"{decoder} and {other}, {stage}, {language}: {gap:+.2f} BLEU, "
                    + (
                        "one seed"
                        if math.isnan(allowed)
                        else f"{verdict} (deviation of the seeds {allowed:.2f})"
                    )
                )
    return lines
