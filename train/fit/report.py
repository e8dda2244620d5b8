"""Reports and figures of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compacter_jax.catalogue import to_dict
from compacter_jax.files import replace_file
from compacter_jax.messages import listing
from compacter_jax.methods.base import MethodConfig
from compacter_jax.params import Count
from train import figures
from train.fit import logs
from train.report import number, parameter_rows, table
from train.tasks import ON_TEXT


def result_text(result: dict[str, Any], folder: Path) -> str:
    """Returns the last lines that `fit` prints."""
    shown = [result["metric"], *(["invalid"] if "invalid" in result["validation"] else [])]
    lines = [
        f"{split} {name}: {number(result[split][name])}"
        for split in _splits(result)
        for name in shown
    ]
    return "\n".join(
        [
            f"best epoch: {result['best_epoch']} of {result['history'][-1]['epoch']}",
            *lines,
            f"trained parameters: {result['trained_parameters']:,} of "
            f"{result['total_parameters']:,} "
            f"({100 * result['trained_parameters'] / result['total_parameters']:.3f} %)",
            f"{_adapters(result, folder)} ({result['adapter_bytes']:,} bytes)",
            f"curves: {folder / 'curves.png'}",
            f"report: {folder / 'report.md'}",
            *([f"backbone: {folder / 'backbone'}"] if (folder / "backbone").exists() else []),
        ]
    )


def _adapters(result: dict[str, Any], folder: Path) -> str:
    """Returns the folder of the adapter, or the names of several and their folder."""
    if "adapters" not in result:
        return f"adapter: {folder / 'adapter'}"
    base, names = Path(result.get("added_to", folder)), result["adapters"]
    if len(names) == 1:
        return f"adapter: {base / names[0] / 'adapter'}"
    return f"{len(names)} adapters: {base}"


def _splits(result: dict[str, Any]) -> list[str]:
    """Returns the splits that were evaluated."""
    return [key for key, value in result.items() if isinstance(value, dict) and "loss" in value]


def plot_curves(result: dict[str, Any], path: Path) -> None:
    """Plots loss and validation metric by epoch, with the best epoch marked, as a PNG file."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - slow to import

    history, metric = result["history"], result["metric"]
    epochs = [record["epoch"] for record in history]
    figure, (left, right) = figures.new_figure((10, 4), columns=2)
    for before, record in zip([0, *epochs], history, strict=False):
        parts, length = len(record["step_losses"]), record["epoch"] - before
        within = [before + length * (i + 0.5) / parts for i in range(parts)]
        label = "train, by step" if record is history[0] else None
        left.plot(within, record["step_losses"], color=figures.TRAIN, alpha=0.4, label=label)
    train_losses = [record["train_loss"] for record in history]
    left.plot(epochs, train_losses, "o-", color=figures.TRAIN, label="train")
    left.plot(
        epochs,
        [record["validation_loss"] for record in history],
        "s--",
        color=figures.VALIDATION,
        label="validation",
    )
    left.set(xlabel="epoch", ylabel="loss", title="Loss")
    left.legend()
    scores = [record[metric] for record in history]
    right.plot(epochs, scores, "s-", color=figures.VALIDATION, label="validation")
    best = result["best_epoch"]
    right.axvline(best, color=figures.REFERENCE, linestyle=":", label=f"best epoch ({best})")
    if "test" in result:
        right.plot(
            [best],
            [result["test"][metric]],
            "*",
            color=figures.TEST,
            markersize=14,
            label="test, at best",
        )
    right.set(xlabel="epoch", ylabel=metric, title=metric.replace("_", " ").capitalize())
    right.legend()
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    percent = 100 * result["trained_parameters"] / result["total_parameters"]
    figure.suptitle(
        f"{result['method']} on {result['task']}, {Path(result['backbone']).name}, seed "
        f"{result['seed']}: {result['trained_parameters']:,} trained parameters ({percent:.3f} %)",
        fontsize=10,
    )
    figures.save(figure, path)


def plot_log(columns: Mapping[str, np.ndarray], path: Path) -> None:
    """Plots the quantities recorded at every step, one panel each, as a PNG file.

    Args:
      columns: the columns of `train.fit.logs.read_steps`; quantities that are never known are
        omitted.
      path: the file to write.
    """
    known = [name for name in columns if name != "step" and np.isfinite(columns[name]).any()]
    figure, panels = figures.new_figure((10, 2 * len(known)), rows=len(known), sharex=True)
    for axes, name in zip(panels, known, strict=True):
        axes.plot(columns["step"], columns[name], color=figures.TRAIN, linewidth=0.8)
        axes.set(ylabel=name.replace("_", " "))
    panels[-1].set(xlabel="step")
    figures.save(figure, path)


def write_report(
    result: dict[str, Any], options: Any, method: MethodConfig, count: Count, folder: Path
) -> None:
    """Writes the report of a run in Markdown.

    The report has the settings, the trained parameters, the results, the curves, and a command that
    uses the adapter.

    Args:
      result: the content of `metrics.json`.
      options: the options of the command line.
      method: the trained method.
      count: the parameter counts.
      folder: the folder of the results, in which report.md is written.
    """
    log = options.output_dir / "log.png"
    plot_log(logs.read_steps(options.output_dir), log)
    metric_names = list(result["validation"])
    epoch_names = [name for name in result["history"][0] if name != "step_losses"]
    splits = _splits(result)
    settings = {
        "backbone": options.backbone,
        "task": result["task"],
        **({"labels": listing(names, most=50)} if (names := result.get("label_names")) else {}),
        "training examples": result["train_examples"],
        "method": options.method,
        "epochs": options.epochs,
        "steps": result["steps"],
        "batch size": options.batch_size,
        "learning rate": result["learning_rate"],
        "seed": options.seed,
        "dtype": options.dtype,
        **{name: value for part in result["objective"].values() for name, value in part.items()},
    }
    settings |= {f"method: {k}": v for k, v in to_dict(method).items()}
    sections = [
        f"# {options.method} on {result['task']}",
        "![curves](curves.png)",
        "## Result",
        f"Best of {len(result['history'])} evaluations by validation {result['metric']}: after "
        f"epoch {result['best_epoch']}.",
        table(
            ["metric", *splits],
            [[name, *(number(result[s][name]) for s in splits)] for name in metric_names],
        ),
        "## What is trained",
        table(["group", "trained", "parameters", "of all"], parameter_rows(count)),
        f"The adapter takes {result['adapter_bytes']:,} bytes on disk.",
        "## Use it",
        f"```\npython -m train {_next_command(result, folder)}\n```",
        "## Settings",
        table(["setting", "value"], [[k, f"`{v}`"] for k, v in settings.items()]),
        "## Epochs",
        table(epoch_names, [[number(r[name]) for name in epoch_names] for r in result["history"]]),
        "## Steps",
        f"![loss, learning rate, norm of the gradient and speed]({os.path.relpath(log, folder)})",
    ]
    with replace_file(folder / "report.md") as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _next_command(result: dict[str, Any], folder: Path) -> str:
    if "adapters" in result:
        base = result.get("added_to", folder)
        return f"predict --adapter {base} --input FILE --output FILE"
    if result["kind"] not in ON_TEXT:
        return f"predict --adapter {folder / 'adapter'} --input FILE --output FILE"
    if (folder / "backbone").exists():
        return f"fit --backbone {folder / 'backbone'} --task movie --output-dir FOLDER"
    return f"evaluate --adapter {folder / 'adapter'} --task {result['kind']} --test-file FILE"
