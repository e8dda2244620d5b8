"""Figure of docs/t5.md: `python -m benchmarks.plot_t5 RESULTS.json`.

The figure is written beside the file, with the suffix .png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from compacter_jax.files import replace_file


def plot(path: Path) -> Path:
    """Plots the loss of pre-training by step, and the accuracy of fine-tuning by epoch."""
    results = json.loads(path.read_text(encoding="utf-8"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    pretraining = results["pretraining"]
    left.plot(pretraining["steps"], pretraining["losses"], label="training, mean of 20 steps")
    left.axhline(
        pretraining["random_loss"], color="grey", linestyle=":", label="random weights, validation"
    )
    left.plot(
        pretraining["steps"][-1:],
        [pretraining["validation_loss"]],
        "s",
        color="C1",
        label="validation, at the end",
    )
    left.set(xlabel="step", ylabel="loss of a target token", title="Span corruption")
    for marker, run in zip("os^", results["runs"], strict=False):
        epochs = range(1, len(run["validation_accuracy"]) + 1)
        label = f"{run['method']} ({run['trained_parameters']:,} trained)"
        right.plot(epochs, run["validation_accuracy"], f"{marker}-", label=label)
    right.axhline(results["majority"], color="grey", linestyle=":", label="the commoner label")
    right.set(xlabel="epoch", ylabel="validation accuracy", title="movie, from that T5")
    right.set_xticks(list(epochs))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right" if axes is left else "center right", fontsize="small")
    output = path.with_suffix(".png")
    with replace_file(output) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return output


if __name__ == "__main__":
    print(plot(Path(sys.argv[1])))
