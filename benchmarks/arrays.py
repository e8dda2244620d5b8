"""Directions of arrival: alternating low-rank decomposition beside established methods.

    python -m benchmarks.arrays --sensors 40 --snapshots 20,40,80 --snr 0,5,15 --separation 1.5,3 \
      --correlation 0,0.9,1 --trials 200 --json arrays.json --figures DIR

Two sources near broadside, and optionally strong interferers outside the searched sector. ALRD-RLS
and MARLD-RLS are reconstructions after the abstract of Qiu, Cai, de Lamare and Zhao
(arXiv:1604.04321), JIO-RLS is one after that of Wang, de Lamare and Haardt (arXiv:1402.2710).

For every method the settings (windows, smoothing, forgetting, loading) are chosen on trials of
another seed, at the middle one of the signal-to-noise ratios. Then the share of trials is reported
in which both sources have a direction within half the separation, the root mean square error of
these trials in degrees, and the milliseconds of a trial. Every case also has the Cramer-Rao bound.
Cases are written to the file of `--json` as they are measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from benchmarks import arrays_figures
from benchmarks.arrays_trials import METHODS, Case, Programs, bound, choose, draw, score
from benchmarks.contest import write
from benchmarks.turns import processor

# Seeds of the trials on which settings are chosen differ from the measured ones by this number.
_OTHER_SEED = 1_000_003


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the trials, prints tables, and writes JSON and figures if requested.

    Raises:
      SystemExit: with code 2 if a flag does not fit; the message is one line.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.dtype == "complex128":
        jax.config.update("jax_enable_x64", True)
    report: dict[str, Any] = {
        "settings": vars(options),
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cases": [],
    }
    try:
        grid = _grid(options.grid)
        _check(options, grid)
        for case in measured(options, grid):
            report["cases"].append(case)
            print("\n".join(rows(case)), flush=True)
            write(options.json, report)
        print("\n".join(["", *table(report["cases"])]))
        if options.figures is not None:
            for path in arrays_figures.plot(report, grid, Path(options.figures)):
                print(path)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


def measured(options: argparse.Namespace, grid: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields the result of each case, JSON-ready.

    Args:
      options: the options of the command line.
      grid: the angles at which spectra are computed.
    """
    programs = Programs(grid, options.chunk)
    chosen: dict[Case, dict[str, Any]] = {}
    middle = sorted(options.snr)[len(options.snr) // 2]
    for case in cases(options):
        at = dataclasses.replace(case, snr=middle)
        if at not in chosen:
            drawn = draw(at, options.choosing_trials, options.seed + _OTHER_SEED)
            chosen[at] = {
                name: choose(programs, name, at, options.loadings, drawn)
                for name in options.methods
            }
        angles, x = draw(case, options.trials, options.seed)
        methods = {}
        for name, (setting, tried) in chosen[at].items():
            found, seconds = programs.estimates(name, case, setting, x)
            methods[name] = {
                **score(found, angles, case.separation),
                "milliseconds": 1e3 * seconds,
                "setting": setting,
                "tried": tried,
            }
        yield {
            **dataclasses.asdict(case),
            "trials": options.trials,
            "cramer_rao": bound(case, angles),
            "methods": methods,
        }


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yields the cases of the options, all of one signal-to-noise ratio before the next."""
    fields = ("snr", "sensors", "interferers", "correlation", "separation", "snapshots")
    for values in itertools.product(*(getattr(options, name) for name in fields)):
        yield Case(**dict(zip(fields, values, strict=True)), interferer_snr=options.interferer_snr)


def rows(case: dict[str, Any]) -> list[str]:
    """Returns the rows of a Markdown table for a case, with a heading."""
    more = f", {case['interferers']} interferers" if case["interferers"] else ""
    lines = [
        "",
        f"{case['sensors']} sensors, {case['snapshots']} snapshots, {case['snr']:g} dB, "
        f"{case['separation']:g} degrees, correlation {case['correlation']:g}{more}; "
        f"Cramer-Rao bound {_degrees(case['cramer_rao'])}",
        "",
        "| method | resolved | RMSE | ms | setting |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in case["methods"].items():
        setting = ", ".join(f"{k} {v}" for k, v in found["setting"].items() if k != "modified")
        lines.append(
            f"| {name} | {found['resolved']:.3f} | {_degrees(found['rmse'])} | "
            f"{found['milliseconds']:.1f} | {setting} |"
        )
    return lines


def table(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a Markdown table of all cases: the share resolved and the RMSE of every method.

    Args:
      cases: the cases of a report, all with the same methods.
    """
    names = list(cases[0]["methods"])
    several = [name for name in _FIELDS if len({case[name] for case in cases}) > 1]
    lines = [
        f"| {' | '.join([*(_FIELDS[name] for name in several), *names, 'bound'])} |",
        f"|{' --- |' * (len(several) + len(names) + 1)}",
    ]
    for case in cases:
        found = [case["methods"][name] for name in names]
        cells = [f"{case[name]:g}" for name in several]
        cells += [f"{each['resolved']:.3f} ({_degrees(each['rmse'])})" for each in found]
        lines.append(f"| {' | '.join([*cells, _degrees(case['cramer_rao'])])} |")
    return lines


# Fields of a case -> headings of the table.
_FIELDS = {
    "sensors": "sensors",
    "interferers": "interferers",
    "snr": "dB",
    "correlation": "correlation",
    "separation": "degrees",
    "snapshots": "snapshots",
}


def _degrees(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _check(options: argparse.Namespace, grid: np.ndarray) -> None:
    """Checks what flags have to do with each other, before the trials start."""
    widest = 1.5 * max(options.separation)
    if not grid[0] < 90 - widest <= 90 + widest < grid[-1]:
        raise ValueError(
            f"--grid {grid[0]:g},{grid[-1]:g},… should reach {widest:g} degrees to both sides of "
            f"90, since --separation has {max(options.separation):g}"
        )
    if options.json is not None and not Path(options.json).parent.is_dir():
        raise ValueError(f"--json {options.json}: there is no folder {Path(options.json).parent}")
    few = min(options.snapshots)
    if few < 2 + max(options.interferers):
        raise ValueError(
            f"--snapshots {few} is fewer than the {2 + max(options.interferers)} sources, of which "
            "MUSIC and ESPRIT then have no subspace"
        )
    if min(options.sensors) < 12:
        raise ValueError(
            f"--sensors {min(options.sensors)} should be at least 12: the shortest windows have a "
            "quarter of them"
        )


def _grid(numbers: Sequence[float]) -> np.ndarray:
    if len(numbers) != 3 or not (0 <= numbers[0] < numbers[1] <= 180 and numbers[2] > 0):
        raise ValueError(
            f"--grid {','.join(f'{n:g}' for n in numbers)} should be FIRST,LAST,STEP in degrees, "
            "such as 84,96,0.15"
        )
    first, last, step = numbers
    return np.linspace(first, last, round((last - first) / step) + 1)


def _numbers(
    kind: type, low: float, high: float = math.inf
) -> Callable[[str], list[float] | list[int]]:
    """Returns a reader of numbers with commas between them, each from `low` to `high`."""

    def read(text: str) -> Any:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            noun = "whole numbers" if kind is int else "numbers"
            raise argparse.ArgumentTypeError(
                f"{text!r} should be {noun} with commas between them"
            ) from None
        for value in values:
            if not low <= value <= high or math.isinf(value):
                wanted = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
                raise argparse.ArgumentTypeError(f"{value} should be {wanted}")
        return values

    return read


def _number(low: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        values = _numbers(int, low)(text)
        if len(values) != 1:
            raise argparse.ArgumentTypeError(f"{text!r} should be one whole number")
        return int(values[0])

    return read


def _methods(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} should be one of {', '.join(METHODS)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="benchmarks.arrays", description=__doc__.split("\n")[0])
    add = parser.add_argument
    counts, degrees = _numbers(int, 1), _numbers(float, 1e-3, 30)
    add("--sensors", type=counts, default=[40], help="numbers of sensors")
    add("--snapshots", type=counts, default=[20, 40, 80], help="numbers of snapshots")
    decibels = _numbers(float, -100, 100)
    add("--snr", type=decibels, default=[0.0, 5.0, 15.0], help="of each source, in decibels")
    add("--separation", type=degrees, default=[1.5, 3.0], help="degrees between the sources")
    add("--correlation", type=_numbers(float, 0, 1), default=[0.0, 0.9, 1.0], help="of the sources")
    add("--interferers", type=_numbers(int, 0, 4), default=[0], help="numbers of interferers")
    add("--interferer-snr", type=float, default=30.0, help="of each interferer, in decibels")
    add("--loadings", type=_numbers(float, 1e-9), default=[1.0, 10.0], help="to choose from")
    add(
        "--grid", type=_numbers(float, 0, 180), default=[84.0, 96.0, 0.15], help="first, last, step"
    )
    add("--methods", type=_methods, default=list(METHODS), help="names, commas between them")
    add("--trials", type=_number(1), default=200, help="measured trials of a case")
    add("--choosing-trials", type=_number(1), default=24, help="trials to choose settings on")
    add("--seed", type=_number(0), default=0, help="seed of the measured trials")
    add("--chunk", type=_number(1), default=2, help="trials that are computed at once")
    add("--dtype", choices=("complex64", "complex128"), default="complex64", help="precision")
    add("--json", help="file to write results to")
    add("--figures", help="folder to write two figures to")
    return parser


if __name__ == "__main__":
    main()
