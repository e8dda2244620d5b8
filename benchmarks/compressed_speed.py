"""Speed of compressed and standard decoders: tokens per second in generation, in rounds."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import compacter_jax as cj
from benchmarks.turns import alternate, spread
from train.exchange.create_backbone import random_params

# Of one core of a CPU, for the prediction alone: bytes a second that a product with few rows reads,
# floating-point operations a second of one with many, and the seconds to start a product.
BANDWIDTH, RATE, START = 10e9, 40e9, 2e-6


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder under test.

    Attributes:
      layer: "standard" or "compressed".
      layers: number of layers.
      wide: width of the feed-forward network, or of the values, in units of d.
    """

    layer: str
    layers: int
    wide: int = 4

    @property
    def name(self) -> str:
        """Short description."""
        return f"{self.layer} {self.layers}, F = {self.wide}d"

    def products(self) -> int:
        """Returns the length of a layer's chain of products that wait for each other."""
        return 10 if self.layer == "standard" else 4

    def weights(self, d: int) -> int:
        """Returns the weights of a layer that a step reads."""
        if self.layer == "standard":
            return (6 + 2 * self.wide) * d * d
        return (2 + 3 * self.wide) * d * d

    def cached(self, d: int) -> int:
        """Returns the numbers of a layer's cache for a row and a position."""
        return 2 * d if self.layer == "standard" else (1 + self.wide) * d


@dataclasses.dataclass(frozen=True)
class Cell:
    """One case of the measurement.

    Attributes:
      d: width of the hidden states.
      batch: number of rows.
      source: length of the inputs in tokens.
      beams: number of beams; 1 is greedy search.
    """

    d: int
    batch: int
    source: int
    beams: int


def decoders(options: argparse.Namespace) -> list[Decoder]:
    """Returns the decoders: standard, compressed with F = 4d and F = d, and a shallow one."""
    return [
        Decoder("standard", options.layers),
        Decoder("compressed", options.layers),
        Decoder("compressed", options.layers, wide=1),
        Decoder("compressed", options.few),
    ]


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Yields the cases of the options."""
    for values in itertools.product(options.d, options.batch, options.source, options.beams):
        yield Cell(*values)


def predicted(decoder: Decoder, cell: Cell, tokens: int, vocabulary: int) -> float:
    """Returns the predicted seconds of a step of generation on one core.

    Weights are read once or multiplied with every row, whichever takes longer; the cache is read
    whole; beams copy the target's part of it; every product takes time to start.
    """
    rows = cell.batch * cell.beams
    weights = decoder.layers * decoder.weights(cell.d) + vocabulary * cell.d
    positions = decoder.layers * rows * decoder.cached(cell.d)
    moved = positions * (cell.source + tokens + 2 * tokens * (cell.beams > 1))
    return (
        max(4 * weights / BANDWIDTH, 2 * rows * weights / RATE)
        + 4 * moved / BANDWIDTH
        + START * decoder.layers * decoder.products()
    )


def measured(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Returns tokens per second of every decoder, and ratios to the first, JSON-ready.

    Runs of all decoders alternate, and a ratio is between runs of one round. Processor time leaves
    out what other programs on the machine take.
    """
    tested = decoders(options)
    runs = {
        one.name: functools.partial(_seconds, _generation(one, cell, options)) for one in tested
    }
    for run in runs.values():  # compiles
        run()
    rounds = alternate(runs, options.rounds)
    seconds = {name: np.array(times) for name, times in rounds.items()}  # [rounds, 2]
    first = tested[0].name
    tokens = cell.batch * options.tokens
    guess = {one.name: predicted(one, cell, options.tokens, options.vocabulary) for one in tested}
    return {
        **dataclasses.asdict(cell),
        "decoders": {
            name: {
                "tokens_per_second": spread(tokens / times[:, 0]),
                "speed": spread(seconds[first][:, 0] / times[:, 0]),
                "speed_by_processor_time": spread(seconds[first][:, 1] / times[:, 1]),
                "predicted_speed": guess[first] / guess[name],
            }
            for name, times in seconds.items()
        },
    }


def _seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Returns the seconds of a call by the clock, and those that this process computed."""
    start, computed = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - computed


def _generation(decoder: Decoder, cell: Cell, options: argparse.Namespace) -> Any:
    """Returns a function that generates the same number of tokens in every row."""
    module = module_of(decoder, cell.d, options)
    params = random_params(module, jax.random.key(0))
    ids = np.random.default_rng(0).integers(3, options.vocabulary, (cell.batch, cell.source))
    settings = {"max_new_tokens": options.tokens, "num_beams": cell.beams, "eos_token_id": ()}

    def run() -> Any:
        return cj.generate(module, params, ids, **settings).block_until_ready()

    return run


def module_of(decoder: Decoder, d: int, options: argparse.Namespace) -> cj.Seq2Seq:
    """Returns a model with this decoder and the options' encoder."""
    is_compressed = decoder.layer == "compressed"
    config = cj.Seq2SeqConfig(
        vocab_size=options.vocabulary,
        d_model=d,
        encoder_layers=options.encoder_layers,
        encoder_attention_heads=options.heads,
        encoder_ffn_dim=4 * d,
        decoder_layers=decoder.layers,
        decoder_attention_heads=options.heads,
        decoder_ffn_dim=4 * d,
        decoder_layer=decoder.layer,  # type: ignore[arg-type]
        decoder_value_dim=decoder.wide * d if is_compressed else None,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=1,
    )
    return cj.Seq2Seq(config)


def row(case: Mapping[str, Any]) -> str:
    """Returns the row of a Markdown table: tokens per second, then speeds with quartiles.

    A speed is in units of the first decoder's, by the clock, by processor time, and as predicted.
    """
    first, *others = case["decoders"].values()
    cells = [case["d"], case["batch"], case["source"], case["beams"]]
    cells += [f"{first['tokens_per_second']['median']:.0f}"]
    for one in others:
        by_clock, computed = (
            "{median:.2f} ({first_quartile:.2f} to {third_quartile:.2f})".format(**one[name])
            for name in ("speed", "speed_by_processor_time")
        )
        cells.append(f"{by_clock}; {computed}; {one['predicted_speed']:.2f}")
    return f"| {' | '.join(map(str, cells))} |"


def heading(tested: Sequence[Decoder]) -> list[str]:
    """Returns the head of the table of `row`."""
    first, *others = tested
    names = ["d", "batch", "source", "beams", f"tokens/s of {first.name}"]
    names += [f"{one.name}: by clock; by processor time; predicted" for one in others]
    return [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
