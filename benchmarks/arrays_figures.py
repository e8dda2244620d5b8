"""Figures of `benchmarks.arrays`: resolution and error against snapshots, and spectra of a trial.

python -m benchmarks.arrays_figures RESULTS.json DIR
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.arrays_trials import METHODS, Case, draw
from train.figures import BLUE, BROWN, GREEN, GREY, ORANGE, PURPLE, TEAL, new_figure, save

# Method -> colour and marker, the same in both figures.
_LOOKS = {
    "ALRD-RLS": (BLUE, "o"),
    "MARLD-RLS": (TEAL, "s"),
    "JIO-RLS": (PURPLE, "^"),
    "Capon": (ORANGE, "D"),
    "MUSIC": (GREEN, "v"),
    "ESPRIT": (BROWN, "<"),
}
_RECONSTRUCTED = "ALRD and MARLD after the abstract of Qiu, Cai, de Lamare and Zhao"


def plot(report: Mapping[str, Any], grid: np.ndarray, folder: Path) -> list[Path]:
    """Writes both figures and returns their paths.

    Args:
      report: what `benchmarks.arrays --json` writes.
      grid: the angles of the spectra, in degrees.
      folder: folder to write to; it is made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "arrays_resolution.png", folder / "arrays_spectra.png"]
    shown = _shown(report["cases"])
    plot_resolution(shown, paths[0])
    most = max(case["snapshots"] for case in shown)
    plot_spectra([case for case in shown if case["snapshots"] == most], grid, report, paths[1])
    return paths


def _shown(cases: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the cases of the middle SNR, the smallest separation and the first array."""
    snrs = sorted({case["snr"] for case in cases})
    wanted = {
        "sensors": cases[0]["sensors"],
        "interferers": cases[0]["interferers"],
        "snr": snrs[len(snrs) // 2],
        "separation": min(case["separation"] for case in cases),
    }
    return [case for case in cases if all(case[name] == value for name, value in wanted.items())]


def plot_resolution(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots the share resolved and the error against snapshots, a column for each correlation."""
    correlations = list(dict.fromkeys(case["correlation"] for case in cases))
    figure, panels = new_figure(
        (9.0, 5.6), rows=2, columns=len(correlations), sharex=True, sharey="row", squeeze=False
    )
    for (above, below), correlation in zip(panels.T, correlations, strict=True):
        of_column = [case for case in cases if case["correlation"] == correlation]
        counts = [case["snapshots"] for case in of_column]
        for name in of_column[0]["methods"]:
            colour, marker = _LOOKS[name]
            look = {"color": colour, "marker": marker, "markersize": 5, "label": name}
            found = [case["methods"][name] for case in of_column]
            above.plot(counts, [each["resolved"] for each in found], **look)
            below.plot(counts, np.array([each["rmse"] for each in found], float), **look)
        bounds = [case["cramer_rao"] for case in of_column]
        below.plot(counts, bounds, color=GREY, linestyle="--", label="Cramer-Rao bound")
        above.set_title(f"correlation {correlation:g}")
        below.set_xlabel("snapshots")
        below.set_xticks(counts)
        below.set_yscale("log")
    panels[0, 0].set_ylabel("share of trials resolved")
    panels[0, 0].set_ylim(-0.03, 1.03)
    panels[1, 0].set_ylabel("RMSE of these, degrees")
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    title = f"{_title(cases[0])}; {cases[0]['trials']} trials\n{_RECONSTRUCTED}"
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def plot_spectra(
    cases: Sequence[Mapping[str, Any]],
    grid: np.ndarray,
    report: Mapping[str, Any],
    path: Path,
) -> None:
    """Plots the spectra of the first measured trial, a panel for each correlation.

    A spectrum is drawn relative to its maximum; lines mark the true directions.
    """
    figure, panels = new_figure(
        (9.0, 3.8), columns=len(cases), sharex=True, sharey=True, squeeze=False
    )
    fields = [field.name for field in dataclasses.fields(Case)]
    for axes, case in zip(panels[0], cases, strict=True):
        shape = Case(**{name: case[name] for name in fields})
        angles, x = draw(shape, case["trials"], report["settings"]["seed"])
        for name, found in case["methods"].items():
            spectrum = METHODS[name].spectrum
            if spectrum is not None:
                values = np.asarray(spectrum(x[0], grid, shape, found["setting"]))
                colour = _LOOKS[name][0]
                axes.plot(grid, 10 * np.log10(values / values.max()), color=colour, label=name)
        for angle in angles[0, :2]:
            axes.axvline(angle, color=GREY, linestyle=":", label="sources")
        axes.set_title(f"correlation {case['correlation']:g}")
        axes.set_xlabel("degrees")
    panels[0, 0].set_ylabel("dB below the maximum")
    handles = dict(zip(*panels[0, 0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    title = f"One trial, {_title(cases[0])}, {cases[0]['snapshots']} snapshots\n{_RECONSTRUCTED}"
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def _title(case: Mapping[str, Any]) -> str:
    return f"{case['sensors']} sensors, {case['snr']:g} dB, {case['separation']:g} degrees apart"


if __name__ == "__main__":
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    first, last, step = results["settings"]["grid"]
    if results["settings"]["dtype"] == "complex128":
        jax.config.update("jax_enable_x64", True)
    angles = np.linspace(first, last, round((last - first) / step) + 1)
    for written in plot(results, angles, Path(sys.argv[2])):
        print(written)
