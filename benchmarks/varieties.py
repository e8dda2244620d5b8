r"""Varieties that nobody trained on: language adapters alone, mixed, and mixed by entropy (EMEA).

    python -m benchmarks.varieties --backbone runs/e5 --tagging tagging --ntrex ntrex.parquet \
        --group 1 --layers 4 --output-dir runs/varieties

A task adapter is trained on one language, on top of the adapter of this language. It then tags
varieties without an adapter of their own, and each other language without its own adapter:

| condition | what it is |
|---|---|
| `none`, `only-NAME` | no language adapter, and the adapter of one language |
| `equal` | the outputs of all adapters, with equal weights |
| `entropy-T-G` | EMEA: T steps of the learning rate G for each sentence |
| `probabilities` | the mean of the probabilities that the adapters give one by one |
| `labels` | weights by site fitted on labels of the variety: what mixing can reach |
| `joint` | one adapter trained on all languages together, as wide as all |
| `compacter-equal`, `compacter-entropy-T-G` | with Compacter's projections; the first T alone |

Every cell (a seed, a variety, a split, a condition) is written to the JSON file when it is done,
and the same command goes on after an interruption; nothing is trained for a seed with all its
cells. `--plan` counts the operations and predicts the minutes without training. Steps and learning
rate of EMEA are chosen on the validation split of languages that are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import commands, record, varieties_data, varieties_plan, varieties_report
from benchmarks.varieties_data import GROUPS, Files, Group
from benchmarks.varieties_tagging import Tagging
from train.report import write_json

JOINT, DENSE, COMPACTER = "joint", "dense", "compacter"
SPLITS = ("validation", "test")
# The reduction factor of both parts of the preset.
_WIDTH_OF_MAD_X = 2


@dataclasses.dataclass(frozen=True)
class Cell:
    """One condition on one variety.

    Attributes:
      seed: the seed of language and task adapters.
      variety: the variety or the language that is left out.
      split: `validation` or `test`.
      condition: the condition.
      members: the languages whose adapters there are.
    """

    seed: int
    variety: str
    split: str
    condition: str
    members: tuple[str, ...]

    @property
    def key(self) -> str:
        """The name of the cell in the JSON file."""
        return f"{self.seed}/{self.variety}/{self.split}/{self.condition}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment, or predicts its time, and writes the report.

    Raises:
      SystemExit: with code 2 if the file of results is of other settings, the task has no
        sentences to learn from, or adapters in all layers are to have another width.
    """
    flags, options = parsed(arguments)
    root = options.output_dir
    settings = commands.settings_of(options)
    del settings["plan"]
    output = options.json or root / "varieties.json"
    try:
        group = GROUPS[options.group].tagged_in(options.tagging / options.task)
        report = record.opened(output, settings, _FREE, {"cells": {}, "adapters": {}})
    except ValueError as error:
        flags.exit(2, f"error: {error}\n")
    files = varieties_data.write(
        root / "files",
        group,
        options.task,
        tagging=options.tagging,
        ntrex=options.ntrex,
        sizes={
            "text": options.sentences,
            "train": options.train_sentences,
            "validation": options.validation_sentences,
            "test": options.test_sentences,
        },
    )
    trimmed = root / "trimmed"
    if not trimmed.exists():
        texts = [files.text(each) for each in group.languages]
        commands.run(
            "trim-vocabulary",
            ["--backbone", options.backbone, "--text-files", *texts, "--output-dir", trimmed],
        )
    planned = _planned(options, settings, group, files, trimmed)
    print(varieties_report.predicted_text(planned), flush=True)
    if options.plan:
        return
    report |= {
        "settings": settings,
        "languages": list(group.languages),
        "left_out": list(group.left_out),
        "varieties": list(group.varieties),
        "predicted": planned,
    }
    left = [
        seed
        for seed in options.seeds
        if any(cell.key not in report["cells"] for cell in cells(options, group, seed))
    ]
    backbone = _head(options, files, trimmed) if left else trimmed
    for seed in left:
        trained = _train(options, group, files, backbone, seed)
        # A seed may have got adapters of another kind from an earlier command.
        report["adapters"].setdefault(str(seed), {}).update(trained)
        write_json(output, report)
        _compute(options, group, files, backbone, seed, report, output)
    if "test" in options.splits:
        record.describe(report, output, varieties_report)


def parsed(
    arguments: Sequence[str] | None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Returns the parser and the options; ends with code 2 for a width that `mad-x` ignores."""
    flags = parser()
    options = flags.parse_args(arguments)
    if options.layers == 0 and options.reduction_factor != _WIDTH_OF_MAD_X:
        told = f"mad-x has reduction factor {_WIDTH_OF_MAD_X}; give --layers to choose another"
        flags.exit(2, f"error: --reduction-factor {options.reduction_factor}: {told}\n")
    return flags, options


# Settings that do not change what a cell is.
_FREE = record.FREE | {"adapters", "splits"}


def _planned(
    options: argparse.Namespace,
    settings: dict[str, str],
    group: Group,
    files: Files,
    trimmed: Path,
) -> list[dict[str, Any]]:
    """Returns the plan, which is counted once for the same settings."""
    path = options.output_dir / "plan.json"
    if path.exists():
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if before["settings"] == settings:
            return list(before["rows"])
    rows = varieties_plan.predict(options, group, files, trimmed)
    write_json(path, {"settings": settings, "rows": rows})
    return rows


def cells(options: argparse.Namespace, group: Group, seed: int) -> Iterator[Cell]:
    """Yields the cells of a seed: left-out languages on validation first, then all on test."""
    emea = [f"entropy-{t}-{g:g}" for t in options.steps for g in options.rates]
    fewest = emea[: len(options.rates)]
    for split, varieties in (
        ("validation", group.left_out),
        ("test", (*group.varieties, *group.left_out)),
    ):
        if split not in options.splits:
            continue
        for variety in varieties:
            members = tuple(each for each in group.languages if each != variety)
            names = ["equal", *emea]
            if split == "test":
                names = ["none", *(f"only-{each}" for each in members), *names]
                names += ["probabilities", "labels"]
                names += [JOINT] * (JOINT in options.adapters)
            if COMPACTER in options.adapters:
                names += [f"compacter-{each}" for each in ("equal", *fewest)]
            for name in names:
                yield Cell(seed, variety, split, name, members)


def most_of(options: argparse.Namespace, condition: str) -> int | None:
    """Returns the number of sentences of a condition, fewer for many steps; None for all."""
    steps, _ = varieties_data.emea_of(condition) or (0, 0.0)
    return options.many_step_sentences if steps > 1 else None


# --- training -------------------------------------------------------------------------------------


def language_flags(options: argparse.Namespace, kind: str, members: int = 1) -> list[str]:
    """Returns the method of language adapters and its flags.

    Args:
      options: the options of the command line.
      kind: `dense`, `compacter`, or `joint` for one adapter as wide as `members` dense ones.
      members: the number of languages of `joint`.
    """
    upper = layer_flags(options)
    width = ["--reduction-factor", str(options.reduction_factor)]
    if kind == COMPACTER:
        placed = ["--sites", "residual_feed_forward", "--original-ln-before", "True"]
        own = ["--non-linearity", "gelu", "--train-layer-norms", "False"]
        return ["compacter++-short", *placed, *own, *width, *upper]
    wide = ["--expansion-factor", str(members)] * (kind == JOINT)
    if options.layers == 0:
        return ["mad-x", *wide]
    return ["pfeiffer-feed-forward", "--non-linearity", "gelu", *width, *wide, *upper]


def adapters_of(options: argparse.Namespace) -> Path:
    """Returns the folder of the adapters of one width; text, head and files serve all widths."""
    folder: Path = options.output_dir / f"reduction-{options.reduction_factor}"
    return folder


def layer_flags(options: argparse.Namespace) -> list[str]:
    """Returns the flag for adapters in the upper layers alone; none for all layers."""
    config = json.loads((Path(options.backbone) / "config.json").read_text(encoding="utf-8"))
    lower = config["num_hidden_layers"] - options.layers
    if options.layers == 0 or lower <= 0:
        return []
    return ["--leave-out", *map(str, range(lower))]


def _head(options: argparse.Namespace, files: Files, trimmed: Path) -> Path:
    """Trains a head for masked words alone, and returns the backbone with it."""
    folder = options.output_dir / "head"
    flags = ["--task", "masked_lm", "--method", "head-only", "--train-file", files.text("all")]
    flags += ["--epochs", options.head_epochs, "--learning-rate", options.head_learning_rate]
    flags += ["--max-evaluations", 1]
    _fit(options, trimmed, flags, folder)
    return folder / "backbone"


def _train(
    options: argparse.Namespace, group: Group, files: Files, backbone: Path, seed: int
) -> dict[str, Any]:
    """Trains the adapters of a seed unless they are there; returns their sizes and seconds."""
    found = {}
    common = ["--seed", seed, "--max-evaluations", 1]
    for kind in options.adapters:
        root = adapters_of(options) / kind / f"seed-{seed}"
        rate = options.compacter_learning_rate if kind == COMPACTER else options.learning_rate
        method = language_flags(options, kind, len(group.languages))
        names = ("all",) if kind == JOINT else group.languages
        for name in names:
            flags = ["--task", "masked_lm", "--method", *method, "--train-file", files.text(name)]
            flags += ["--epochs", options.epochs, "--learning-rate", rate, *common]
            found[f"{kind}/{name}"] = _fit(options, backbone, flags, root / name)
        # The task's adapter learns on top of that of its own language.
        below = root / names[0] / "adapter"
        task = f"stack(language={below},task=pfeiffer-feed-forward)"
        flags = ["--method", task, "--reduction-factor", "16", *layer_flags(options), *common]
        flags += ["--train-file", files.tagged(group.languages[0], "train")]
        flags += ["--validation-file", files.tagged(group.languages[0], "validation")]
        flags += ["--label-names", *files.tags()]
        flags += ["--epochs", options.task_epochs, "--learning-rate", options.task_learning_rate]
        found[f"{kind}/task"] = _fit(options, backbone, flags, root / "task")
    return found


def _fit(
    options: argparse.Namespace, backbone: Path, flags: Sequence[Any], folder: Path
) -> dict[str, Any]:
    """Runs `fit` unless it is done; returns what it trained, bytes, validation and seconds."""
    sizes = ["--batch-size", options.batch_size, "--max-length", options.max_length]
    given = ["--backbone", backbone, *flags, *sizes, "--eval-batch-size", options.batch_size]
    seconds = commands.fit_once(folder, given)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {
        "trained_parameters": metrics["trained_parameters"],
        "bytes": metrics["adapter_bytes"],
        "validation": metrics["validation"],
        "seconds": seconds,
    }


# --- tagging --------------------------------------------------------------------------------------


def _compute(
    options: argparse.Namespace,
    group: Group,
    files: Files,
    backbone: Path,
    seed: int,
    report: dict[str, Any],
    output: Path,
) -> None:
    """Computes the cells of a seed that the report lacks; writes the report after each."""
    tagging = Tagging(backbone, options)
    for cell in cells(options, group, seed):
        if cell.key in report["cells"]:
            continue
        report["cells"][cell.key] = tagging.computed(
            cell.condition,
            cell.members,
            files.tagged(cell.variety, cell.split),
            files.tagged(cell.variety, "validation"),
            adapters_of(options),
            seed,
            most=most_of(options, cell.condition),
        )
        write_json(output, report)
        print(varieties_report.line(cell.key, report["cells"][cell.key]), flush=True)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    description = (__doc__ or "").partition("\n")[0]
    add = argparse.ArgumentParser(prog="python -m benchmarks.varieties", description=description)
    data = add.add_argument_group("data")
    data.add_argument("--backbone", type=Path, required=True)
    data.add_argument("--tagging", type=Path, required=True)
    data.add_argument("--ntrex", type=Path)
    data.add_argument("--task", choices=("pos", "ner"), default="pos")
    data.add_argument("--group", choices=tuple(GROUPS), default="1")
    sizes = {"sentences": 14_600, "train-sentences": 2596, "validation-sentences": 400}
    for name, number in {**sizes, "test-sentences": 1000}.items():
        data.add_argument(f"--{name}", type=int, default=number)
    data.add_argument(
        "--many-step-sentences", type=int, help="of EMEA with more than one step; all by default"
    )
    training = add.add_argument_group("training")
    training.add_argument("--layers", type=int, default=0, help="upper layers; 0 for all")
    training.add_argument("--reduction-factor", type=int, default=_WIDTH_OF_MAD_X)
    kinds = (DENSE, JOINT, COMPACTER)
    training.add_argument("--adapters", nargs="+", choices=kinds, default=list(kinds))
    epochs = {"epochs": 5, "head-epochs": 5, "task-epochs": 5}
    for name, number in {**epochs, "batch-size": 16, "max-length": 64}.items():
        training.add_argument(f"--{name}", type=int, default=number)
    rates = {"": 3e-4, "head-": 1e-3, "task-": 1e-3, "compacter-": 3e-3}
    for name, rate in rates.items():
        training.add_argument(f"--{name}learning-rate", type=float, default=rate)
    training.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    mixing = add.add_argument_group("mixing")
    mixing.add_argument("--steps", type=int, nargs="+", default=[1, 10])
    mixing.add_argument("--rates", type=float, nargs="+", default=[1.0, 10.0, 100.0])
    mixing.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    mixing.add_argument("--fit-steps", type=int, default=30, help="of weights fitted on labels")
    mixing.add_argument("--eval-batch-size", type=int, default=32)
    add.add_argument("--flops-per-second", type=float, help="measured by default")
    add.add_argument("--plan", action="store_true", help="predict the minutes, and stop")
    add.add_argument("--output-dir", type=Path, required=True)
    add.add_argument("--json", type=Path)
    return add


if __name__ == "__main__":
    main()
