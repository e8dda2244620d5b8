r"""Adapters for directions of translation, compared with what else the same steps could do.

    python -m benchmarks.translation --train train.parquet --validation validation.parquet \
        --languages en de fr cs --output-dir runs/translation

The data are tables with a column for each language. A backbone is created and trained on all
directions (the first stage); from it each condition trains the same number of further steps:

| condition | what it is |
|---|---|
| `longer` | the shared model, trained further |
| `shared` | one `ciat` for all directions, as wide as all members together |
| `ciat` | `ciat` for each direction |
| `without-embeddings` | `ciat` for each direction, without adapters at the embeddings |
| `serial-ciat`, `compacter-ciat` | these for each direction |
| `full` | full fine-tuning for each direction |
| `bilingual` | a model for each direction, from random weights, without the first stage |

The last two train a direction for its share of the steps, by the rows that the others draw of it;
`bilingual` has that of the first stage as well. Every result is written to the JSON file when its
run is done, and a run with a result is not repeated: the same command goes on after an
interruption, and one with other seeds or conditions adds to the file. `--most-rows` scores a part
of large tables. `--predict-only` counts the operations and predicts the minutes without training.
The report says for every direction BLEU and chrF, with mean and spread over seeds, and how often
`ciat` is better than each other condition (in x of n, by more than 0.5 BLEU in y).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import commands, record, translation_data, translation_flops, translation_report
from train.tasks import parallel

BESIDE = ["--sites", "parallel_attention", "parallel_feed_forward", "--w-init", "glorot-uniform"]
# Condition -> method and its flags; `{members}` is the number of directions.
SHARED: dict[str, list[str]] = {
    "longer": ["full"],
    "shared": ["ciat", "--expansion-factor", "{members}"],
}
BANKS: dict[str, list[str]] = {
    "ciat": ["ciat"],
    "without-embeddings": ["parallel", *BESIDE, "--w-init-up", "zeros"],
    "serial-ciat": ["serial-ciat"],
    "compacter-ciat": ["compacter-ciat"],
}
SINGLE: dict[str, list[str]] = {"full": ["full"], "bilingual": ["full"]}
CONDITIONS = (*SHARED, *BANKS, *SINGLE)
FIRST = "first"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of `fit`.

    Attributes:
      condition: the condition that it belongs to, or `first` for the first stage.
      seed: the seed.
      directions: the directions that it trains.
      backbone: the backbone that it starts from.
      method: the method and its flags.
      adapters: `shared` or `per_direction`.
      steps: the number of updates.
      folder: the folder of its results.
    """

    condition: str
    seed: int
    directions: tuple[str, ...]
    backbone: Path
    method: tuple[str, ...]
    adapters: str
    steps: int
    folder: Path

    @property
    def is_first(self) -> bool:
        """True for the run that makes the backbone of the conditions."""
        return self.condition == FIRST


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment, or predicts its time, and writes the report.

    Raises:
      SystemExit: with code 2 if the file of results is of other settings, or a table cannot be
        read or lacks a language or the rows of a direction.
    """
    flags = _parser()
    options = flags.parse_args(arguments)
    settings = commands.settings_of(options)
    del settings["predict_only"]
    output = options.json or options.output_dir / "translation.json"
    try:
        report = record.opened(output, settings, record.FREE, {"first": [], "runs": []})
        directions = _directions(options)
        translation_data.check(options, directions)
    except (OSError, ValueError) as error:
        flags.exit(2, f"error: {error}\n")
    _sample(options)
    created = options.output_dir / "random"
    if not (created / "config.json").exists():
        _create(options, created)
    planned = list(runs_of(options, directions, created))
    left = record.missing(report, planned, options.output_dir)
    predicted = translation_flops.predict(options, left, created) if left else []
    print(translation_report.predicted_text(predicted), flush=True)
    if options.predict_only:
        return
    report |= {
        "settings": settings,
        "directions": list(directions),
        "predicted": record.merged_plan(report.get("predicted", ()), predicted),
    }
    record.run_all(
        report,
        output,
        planned,
        options.output_dir,
        functools.partial(_flags_of, options),
        functools.partial(_evaluated, options),
    )
    record.describe(report, output, translation_report)


def runs_of(
    options: argparse.Namespace, directions: tuple[str, ...], created: Path
) -> Iterator[Run]:
    """Yields the runs in an order in which each finds the backbone that it starts from."""
    root, count = options.output_dir, len(directions)
    share = translation_data.steps_of(options, directions, options.steps)
    first_share = translation_data.steps_of(options, directions, options.first_steps)
    first = Run(
        FIRST, 0, directions, created, ("full",), "shared", options.first_steps, root / FIRST
    )
    yield first
    trained = first.folder / "backbone"
    for seed in options.seeds:
        for condition in options.conditions:
            folder = root / condition / f"seed-{seed}"
            if condition in SINGLE:
                alone = condition == "bilingual"
                for name in directions:
                    yield Run(
                        condition,
                        seed,
                        (name,),
                        created if alone else trained,
                        tuple(SINGLE[condition]),
                        "shared",
                        share[name] + first_share[name] * alone,
                        folder / name,
                    )
                continue
            method = {**SHARED, **BANKS}[condition]
            yield Run(
                condition,
                seed,
                directions,
                trained,
                tuple(part.format(members=count) for part in method),
                "shared" if condition in SHARED else "per_direction",
                options.steps,
                folder,
            )


def _directions(options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the names of the directions: those asked for, or all between the languages."""
    if options.directions != parallel.ALL:
        return tuple(each.name for each in parallel.parse(options.directions, options.languages))
    languages = options.languages
    return tuple(f"{a}-{b}" for a in languages for b in languages if a != b)


def _sample(options: argparse.Namespace) -> None:
    """Has scores computed of `--most-rows` rows of a direction, drawn the same in every command."""
    if options.most_rows is None:
        return
    for split in ("validation", "test"):
        if (table := getattr(options, split)) is not None:
            part = options.output_dir / f"{split}-{options.most_rows}.parquet"
            translation_data.write_part(table, options.languages, options.most_rows, part)
            setattr(options, split, part)


def _create(options: argparse.Namespace, folder: Path) -> None:
    """Writes the texts of the training table, and a random backbone with a tokenizer for them."""
    texts = folder.parent / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    table = parallel.read_table(options.train)
    paths = []
    for language in options.languages:
        lines = [" ".join(text.split()) for text in table[language] if isinstance(text, str)]
        lines = translation_data.drawn(lines, options.tokenizer_rows)
        paths.append(texts / f"{language}.txt")
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = {
        "--model-type": ["m2m_100"],
        "--languages": options.languages,
        "--text-files": paths,
        "--vocab-size": [options.vocab_size],
        "--d-model": [options.d_model],
        "--d-ff": [options.d_ff],
        "--num-layers": [options.layers],
        "--num-heads": [options.heads],
        "--output-dir": [folder],
    }
    given = [part for flag, values in flags.items() for part in (flag, *values)]
    commands.run("create-backbone", given)


def _flags_of(options: argparse.Namespace, run: Run) -> list[Any]:
    """Returns the flags of `fit` for a run, without those of its folder."""
    method, *more = run.method
    rates = {"full": options.full_learning_rate, "compacter-ciat": options.compacter_learning_rate}
    rate = rates.get(method, options.learning_rate)
    if run.condition in (FIRST, "bilingual"):
        rate = options.first_learning_rate
    epochs = translation_flops.epochs_of(options, run)
    flags: list[Any] = ["--parallel-files", options.train, options.validation]
    flags += ["--backbone", run.backbone, "--directions", ",".join(run.directions)]
    flags += ["--adapters", run.adapters, "--method", method, *more]
    flags += ["--temperature", options.temperature, "--seed", run.seed, "--learning-rate", rate]
    flags += ["--max-steps", run.steps, "--epochs", epochs]
    flags += ["--max-evaluations", options.max_evaluations, "--batch-size", options.batch_size]
    flags += ["--eval-batch-size", options.eval_batch_size, "--dtype", options.dtype]
    flags += ["--max-length", options.max_length, "--max-target-length", options.max_length]
    if run.condition in BANKS or run.condition == "shared":
        flags += ["--backbone-dropout", "inside"]
    return flags


def _evaluated(options: argparse.Namespace, run: Run) -> dict[str, Any]:
    """Returns the scores of a run by direction, its trained numbers, bytes and minutes."""
    # Beside the folder: a run's folder has nothing that the run did not write.
    output = run.folder.parent / f"{run.folder.name}.{options.split}.json"
    if not output.exists():
        table = {"validation": options.validation, "test": options.test}[options.split]
        flags = ["--adapter", run.folder, "--parallel-files", table]
        flags += ["--directions", ",".join(run.directions), "--split", options.split]
        commands.run(
            "evaluate", [*flags, "--eval-batch-size", options.eval_batch_size, "--output", output]
        )
    metrics = json.loads(output.read_text(encoding="utf-8"))["metrics"]
    fitted = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    return {
        "condition": run.condition,
        "seed": run.seed,
        "steps": run.steps,
        "scores": {
            name: {metric: metrics[f"{metric}_{name}"] for metric in ("bleu", "chrf")}
            for name in run.directions
        },
        "trained_parameters": fitted["trained_parameters"],
        "adapter_bytes": fitted["adapter_bytes"],
        "seconds": commands.seconds_of(run.folder),
    }


def _parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").partition("\n")[0]
    add = argparse.ArgumentParser(prog="python -m benchmarks.translation", description=description)
    files = add.add_argument_group("data")
    for split in ("train", "validation", "test"):
        files.add_argument(f"--{split}", type=Path, required=split != "test")
    files.add_argument("--languages", nargs="+", required=True)
    files.add_argument("--directions", default=parallel.ALL)
    files.add_argument("--most-rows", type=int, help="of a direction to score; all by default")
    few = "texts of a language to train the tokenizer on; all by default, which can take long"
    files.add_argument("--tokenizer-rows", type=int, help=few)
    files.add_argument("--split", choices=("validation", "test"), default="validation")
    model = add.add_argument_group("model")
    sizes = {"d-model": 192, "d-ff": 768, "layers": 4, "heads": 6, "vocab-size": 8000}
    for name, size in sizes.items():
        model.add_argument(f"--{name}", type=int, default=size)
    steps = add.add_argument_group("training")
    numbers = {"first-steps": 20000, "steps": 10000, "batch-size": 64, "eval-batch-size": 128}
    for name, number in {**numbers, "max-length": 64, "max-evaluations": 10}.items():
        steps.add_argument(f"--{name}", type=int, default=number)
    rates = {"first": 1e-3, "full": 3e-4, "compacter": 3e-3}
    for name, rate in rates.items():
        steps.add_argument(f"--{name}-learning-rate", type=float, default=rate)
    steps.add_argument("--learning-rate", type=float, default=1e-3, help="of dense adapters")
    steps.add_argument("--temperature", type=float, default=5.0)
    steps.add_argument("--dtype", default="float32")
    steps.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    steps.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    add.add_argument("--flops-per-second", type=float, help="measured by default")
    add.add_argument("--predict-only", action="store_true")
    add.add_argument("--output-dir", type=Path, required=True)
    add.add_argument("--json", type=Path)
    return add


if __name__ == "__main__":
    main()
