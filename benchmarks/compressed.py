"""Compressed decoders beside standard ones: quality of translation, and speed of generation.

    python -m benchmarks.compressed quality --data DIR --domain DIR --json FILE [--plan]
    python -m benchmarks.compressed speed --json FILE

`quality` trains translation models from English to German and to French: one encoder, one set of
subwords, one order of batches, and decoders of standard or compressed layers. It reports the loss
per token, BLEU and chrF of a test split, then the same of another domain, before and after
Compacter adapters were trained for it. It first counts FLOPs in the traced steps and predicts the
minutes; `--plan` stops there. DIR has Parquet files with the columns en, de and fr.

`speed` generates with random weights, greedily and with beams; no sequence ends early. Runs of all
decoders alternate, and a speed is relative to the standard decoder in the same round. The encoder
is shallow, for only the decoders differ.

Both write their file after every cell, and go on where it ends if it exists.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from benchmarks import compressed_quality as quality
from benchmarks import compressed_speed as speed
from benchmarks import record
from benchmarks.contest import write
from benchmarks.turns import processor
from train.figures import BLUE, GREEN, ORANGE, PURPLE, new_figure, save

_COLOURS = (ORANGE, PURPLE, BLUE, GREEN)


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one part, prints tables, and writes JSON and a figure if requested.

    Raises:
      SystemExit: with code 2 if a flag or a file does not fit; the message is one line.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        {"quality": _quality, "speed": _speed}[options.part](options)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


def _quality(options: argparse.Namespace) -> None:
    module = {decoder: quality.module_of(decoder, options) for decoder in options.decoders}
    report = quality.open_report(options)
    data = quality.read(options)
    prediction = quality.predicted(options, data)
    for decoder, one in prediction["decoders"].items():
        counted = ", ".join(f"{value:.3g} {name}" for name, value in one["flops"].items())
        print(f"{decoder}: FLOPs {counted}; {one['minutes']:.1f} minutes a seed")
    print(f"all {len(module) * len(options.seeds)} cells: {prediction['minutes']:.0f} minutes")
    if options.plan:
        return
    report |= {"prediction": prediction, "processor": processor()}
    for name, cell in quality.measured(options, data, report["cells"]):
        report["cells"][name] = cell
        print(f"{name}: {cell['minutes']:.1f} minutes; {json.dumps(cell['scores'])}", flush=True)
        write(options.json, report)
    found = quality.summary(report["cells"])
    print("\n".join(["", *quality.table(found), "", *quality.on_par(found)]))
    if options.figure is not None:
        plot(report["cells"], Path(options.figure), options.d)
        print(options.figure)


def _speed(options: argparse.Namespace) -> None:
    report = _speed_report(options)
    done = {tuple(case[name] for name in _OF_CELL) for case in report["cells"]}
    print("\n".join(speed.heading(speed.decoders(options))))
    for case in report["cells"]:
        print(speed.row(case))
    for cell in speed.cells(options):
        if tuple(getattr(cell, name) for name in _OF_CELL) in done:
            continue
        case = speed.measured(cell, options)
        report["cells"].append(case)
        print(speed.row(case), flush=True)
        write(options.json, report)


_OF_CELL = ("d", "batch", "source", "beams")


def _speed_report(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the report in the file of results, or a new one; ValueError for other settings."""
    free = (*_OF_CELL, "json", "part", "rounds")
    settings = {name: value for name, value in vars(options).items() if name not in free}
    device = {"device": jax.devices()[0].device_kind, "processor": processor()}
    empty = {"settings": settings, **device, "cells": []}
    if options.json is None:
        return empty
    return record.opened(Path(options.json), settings, (), empty)


def plot(cells: dict[str, Any], path: Path, width: int) -> None:
    """Writes a figure of BLEU: a point for each seed, a panel for each stage and language.

    Args:
      cells: the results of the report.
      path: the file.
      width: width of the hidden states of all models.
    """
    names = list(dict.fromkeys(name.rpartition("/")[0] for name in cells))
    stages, languages = quality.STAGES, quality.LANGUAGES
    size = (3.4 * len(stages), 3 * len(languages))
    figure, axes = new_figure(size, len(languages), len(stages), squeeze=False)
    for row, language in enumerate(languages):
        for column, stage in enumerate(stages):
            axis = axes[row][column]
            for name, cell in cells.items():
                place = names.index(name.rpartition("/")[0])
                value = cell["scores"][stage].get(language)
                if value is not None:
                    axis.plot(place, value["bleu"], "o", color=_COLOURS[place % 4], alpha=0.7)
            axis.set_xticks(range(len(names)), names, rotation=20)
            axis.set_title(f"{stage}, English to {language}")
            axis.set_ylabel("BLEU")
    seeds = len({name.rpartition("/")[2] for name in cells})
    figure.suptitle(f"Translation by decoders of d = {width}: a point for each of {seeds} seeds")
    save(figure, path)


def _numbers(low: int) -> Callable[[str], list[int]]:
    """Returns a reader of whole numbers with commas between them, each at least `low`."""

    def read(text: str) -> list[int]:
        try:
            values = [int(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} should be whole numbers with commas between them"
            ) from None
        if min(values) < low:
            raise argparse.ArgumentTypeError(f"{min(values)} should be at least {low}")
        return values

    return read


def _decoders(text: str) -> list[str]:
    for name in (names := text.split(",")):
        layer, _, layers = name.partition("-")
        if layer not in ("standard", "compressed") or not layers.isdigit() or not int(layers):
            raise argparse.ArgumentTypeError(f"{name!r} should be such as standard-6")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m benchmarks.compressed", description=__doc__.split("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("quality", help="train, translate and adapt")
    add = one.add_argument
    add("--data", required=True, help="folder with train.parquet and the test split")
    add("--domain", required=True, help="folder with train.parquet and test.parquet")
    add("--test-split", default="test_2016_flickr", help="of --data")
    add("--folder", default="runs/compressed", help="folder of the tokenizer")
    add("--json", required=True, help="file of results, written after every cell")
    add("--figure", help="file of a figure, PNG")
    add("--plan", action="store_true", help="print FLOPs and minutes, and stop")
    decoders = ["standard-6", "standard-2", "compressed-2", "compressed-6"]
    add("--decoders", type=_decoders, default=decoders, help="kinds and layers, such as standard-6")
    add("--seeds", type=_numbers(0), default=[0, 1, 2])
    add("--utilisation", type=float, default=0.5, help="assumed share of the rate of a product")
    for name, default in {
        **{"--vocabulary": 4000, "--d": 128, "--heads": 4, "--encoder-layers": 3},
        **{"--steps": 4000, "--adapter-steps": 1000, "--rows": 64, "--warmup": 400},
        **{"--longest": 32, "--beams": 4, "--reduction-factor": 8, "--phm-dim": 4},
    }.items():
        add(name, type=lambda text: _numbers(1)(text)[0], default=default)
    add("--dropout", type=float, default=0.1)
    add("--learning-rate", type=float, default=1e-3)
    add("--adapter-rate", type=float, default=3e-3)
    for name in ("--train-pairs", "--test-pairs"):
        add(name, type=lambda text: _numbers(1)(text)[0], help="largest number; all by default")

    two = parts.add_parser("speed", help="time generation")
    add = two.add_argument
    add("--d", type=_numbers(4), default=[128, 256, 512], help="widths")
    add("--batch", type=_numbers(1), default=[1, 8, 32], help="numbers of rows")
    add("--source", type=_numbers(1), default=[16, 64], help="lengths of the inputs in tokens")
    add("--beams", type=_numbers(1), default=[1, 4], help="numbers of beams; 1 is greedy")
    for name, number in {
        **{"--tokens": 32, "--layers": 6, "--few": 2, "--encoder-layers": 1, "--heads": 4},
        **{"--vocabulary": 8000, "--rounds": 7},
    }.items():
        add(name, type=lambda text: _numbers(1)(text)[0], default=number)
    add("--json", help="file of results, written after every cell")
    return parser


if __name__ == "__main__":
    main()
