"""Figure of docs/t5.md: `python -m benchmarks.plot_t5 RESULTS.json`.

The figure is written beside the file, with the suffix .png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from train.figures import REFERENCE, TRAIN, VALIDATION, colour_of, marker_of, new_figure, save


def plot(path: Path) -> Path:
    """Plots the loss of pre-training by step, and the accuracy of fine-tuning by epoch."""
    results = json.loads(path.read_text(encoding="utf-8"))
    figure, (left, right) = new_figure((10, 4), columns=2)
    pretraining = results["pretraining"]
    steps, losses = pretraining["steps"], pretraining["losses"]
    left.plot(steps, losses, color=TRAIN, label="training, mean of 20 steps")
    random = {"color": REFERENCE, "linestyle": ":", "label": "random weights, validation"}
    left.axhline(pretraining["random_loss"], **random)
    left.plot(
        pretraining["steps"][-1:],
        [pretraining["validation_loss"]],
        "s",
        color=VALIDATION,
        label="validation, at the end",
    )
    left.set(xlabel="step", ylabel="loss of a target token")
    size = f"{results['parameters'] / 1e6:.1f} million parameters"
    left.set_title(f"Span corruption, a T5 from random weights\n{size}, 1 seed")
    for run in results["runs"]:
        epochs = range(1, len(run["validation_accuracy"]) + 1)
        label = f"{run['method']} ({run['trained_parameters']:,} trained)"
        colour, look = colour_of(run["method"]), f"{marker_of(run['method'])}-"
        right.plot(epochs, run["validation_accuracy"], look, color=colour, label=label)
    right.axhline(results["majority"], color=REFERENCE, linestyle=":", label="the commoner label")
    title = "movie, from that T5 after its pre-training\n1 seed for each method"
    right.set(xlabel="epoch", ylabel="validation accuracy", title=title)
    right.set_xticks(list(epochs))
    for axes in (left, right):
        axes.legend(loc="upper right" if axes is left else "center right", fontsize="small")
    output = path.with_suffix(".png")
    save(figure, output)
    return output


if __name__ == "__main__":
    print(plot(Path(sys.argv[1])))
