r"""Adapters for the languages that speech is written in, compared with other uses of the steps.

    python -m benchmarks.speech --data DIGITS --output-dir runs/speech --plan
    python -m benchmarks.speech --data DIGITS --output-dir runs/speech --json speech.json
    python -m benchmarks.speech --captions MULTI30K --output-dir runs/captions --vocab-size 4000

With `--data`, utterances are spoken English digits, joined to numbers, and the targets are the
names of the numbers in eight languages (`benchmarks.speech_numbers`). Numbers of validation and
test never occur in training, and neither does the speaker of the split `new`. With `--captions`,
the program espeak-ng speaks English captions, and the targets are their translations into three
languages (`benchmarks.speech_captions`): the speech is synthetic, and every report says so. Neither
captions nor voices of the test occur in training. A random backbone is trained on all
languages, and another to write the English words; from the first each condition trains the same
number of further steps, and from the second those of the lower part of the table do:

| condition | what it is |
|---|---|
| `longer` | the translator of all languages, trained further |
| `st-2`, `st-8` | `st` for each language, reduction factor 2 or 8 |
| `compacter-st` | `compacter-st` for each language |
| `shared` | one `st` for all languages, as wide as those of `st-2` together |
| `decoder` | the linear layers of the decoder for each language |
| `full` | full fine-tuning for each language, with its share of the steps |
| `recogniser-adapters` | `st-2` on the recogniser |
| `recogniser-cross` | `st-2` and cross-attention on the recogniser |
| `recogniser-full` | full fine-tuning of the recogniser for each language |

Every result is written to the JSON file when its run is done, and a run with a result is not
repeated: the same command goes on after an interruption, and one with other seeds or conditions
adds to the file. `--plan` counts operations and predicts minutes without training. The report has
exact matches and chrF of numbers, BLEU and chrF of captions, for each language and test, with mean
and spread over seeds, trained weights, and the bytes of a language.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import commands, record, speech_numbers, speech_plan, speech_report
from benchmarks.speech_captions import Captions
from benchmarks.speech_data import SpeechData
from benchmarks.speech_numbers import Digits

_ST = ["st", "--reduction-factor"]
# Condition -> method and its flags.
SHARED: dict[str, list[str]] = {
    "longer": ["full"],
    "shared": [*_ST, "2"],
}
BANKS: dict[str, list[str]] = {
    "st-2": [*_ST, "2"],
    "st-8": [*_ST, "8"],
    "compacter-st": ["compacter-st"],
    "decoder": ["head-only", "--trained-sites", "decoder_linear"],
    "recogniser-adapters": [*_ST, "2"],
    "recogniser-cross": [*_ST, "2", "--trained-sites", "cross_attention"],
}
SINGLE: dict[str, list[str]] = {"full": ["full"], "recogniser-full": ["full"]}
CONDITIONS = (
    *("longer", "st-2", "st-8", "compacter-st", "shared", "decoder", "full"),
    *("recogniser-adapters", "recogniser-cross", "recogniser-full"),
)
FIRST, RECOGNISER = "translator", "recogniser"
METRICS = ("exact_match", "bleu", "chrf", "word_error_rate")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of `fit`.

    Attributes:
      condition: the condition that it belongs to, or the name of a first stage.
      seed: the seed.
      languages: the languages that it trains; none for the recogniser.
      backbone: the backbone that it starts from.
      method: the method and its flags.
      adapters: `shared` or `per_target`.
      steps: the number of updates.
      folder: the folder of its results.
    """

    condition: str
    seed: int
    languages: tuple[str, ...]
    backbone: Path
    method: tuple[str, ...]
    adapters: str
    steps: int
    folder: Path

    @property
    def is_first(self) -> bool:
        """True for a run that makes a backbone for the conditions."""
        return self.condition in (FIRST, RECOGNISER)


def main(arguments: Sequence[str] | None = None, *, spell: Any = speech_numbers.spell) -> None:
    """Runs the experiment, or predicts its time, and writes the report.

    Args:
      arguments: the command line.
      spell: the names of numbers, as for `speech_numbers.Digits`.

    Raises:
      SystemExit: with code 2 if the data cannot be read or made, or the file of results is of
        other settings; the message is one line.
    """
    flags = parser()
    options = flags.parse_args(arguments)
    settings = commands.settings_of(options)
    del settings["plan"]
    output = options.json or options.output_dir / "speech.json"
    data = Captions(options.captions) if options.captions else Digits(options.data, spell)
    counts = {
        "train": options.train_utterances,
        **dict.fromkeys(("validation", *data.tests), options.test_utterances),
    }
    try:
        report = record.opened(output, settings, record.FREE, {"first": [], "runs": []})
        files = data.write_splits(options.output_dir / "data", counts)
    except (ValueError, OSError) as error:
        flags.exit(2, f"error: {' '.join(str(error).split())}\n")
    created = options.output_dir / "random"
    if not (created / "config.json").exists():
        _create(options, data.languages, files["train"], created)
    planned = list(runs_of(options, data.languages, created))
    left = record.missing(report, planned, options.output_dir)
    predicted = speech_plan.predict(options, left, created, files) if left else []
    print(f"{data.title}\n\n{speech_report.predicted_text(predicted)}", flush=True)
    if options.plan:
        return
    report |= {
        "settings": settings,
        **data.described,
        "predicted": record.merged_plan(report.get("predicted", ()), predicted),
    }
    record.run_all(
        report,
        output,
        planned,
        options.output_dir,
        lambda run: flags_of(options, run, files),
        lambda run: _evaluated(options, data, run, files),
    )
    record.describe(report, output, speech_report)


def runs_of(
    options: argparse.Namespace, languages: tuple[str, ...], created: Path
) -> Iterator[Run]:
    """Yields the runs in an order in which each finds the backbone that it starts from."""
    root, first = options.output_dir, options.first_steps
    needs = {RECOGNISER if name.startswith(RECOGNISER) else FIRST for name in options.conditions}
    for name in (FIRST, RECOGNISER):
        if name in needs:
            written = languages if name == FIRST else ()
            yield Run(name, 0, written, created, ("full",), "shared", first, root / name)
    share = -(-options.steps // len(languages))
    for seed in options.seeds:
        for condition in options.conditions:
            start = RECOGNISER if condition.startswith(RECOGNISER) else FIRST
            backbone, folder = root / start / "backbone", root / condition / f"seed-{seed}"
            method = tuple({**SHARED, **BANKS, **SINGLE}[condition])
            if condition == "shared":
                method += ("--expansion-factor", str(len(languages)))
            if condition in SINGLE:
                for language in languages:
                    yield Run(
                        *(condition, seed, (language,), backbone, method, "shared", share),
                        folder / language,
                    )
                continue
            adapters = "shared" if condition in SHARED else "per_target"
            yield Run(condition, seed, languages, backbone, method, adapters, options.steps, folder)


def _create(
    options: argparse.Namespace, languages: Sequence[str], train: Path, folder: Path
) -> None:
    """Writes the texts of training, and a random backbone with a tokenizer for them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    texts = folder.parent / "texts.txt"
    rows = [json.loads(line) for line in train.read_text(encoding="utf-8").splitlines()]
    lines = [row[name] for row in rows for name in ("target", "source")]
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = {
        "--model-type": ["speech_to_text"],
        "--languages": [*languages, "en"],
        "--text-files": [texts],
        "--vocab-size": [options.vocab_size],
        "--d-model": [options.d_model],
        "--d-ff": [4 * options.d_model],
        "--num-layers": [options.encoder_layers],
        "--num-decoder-layers": [options.decoder_layers],
        "--num-heads": [options.heads],
        "--output-dir": [folder],
    }
    given = [part for flag, values in flags.items() for part in (flag, *values)]
    commands.run("create-backbone", given)


def flags_of(options: argparse.Namespace, run: Run, files: dict[str, Path]) -> list[Any]:
    """Returns the flags of `fit` for a run, without those of its folder."""
    method, *more = run.method
    # Whole layers of the backbone are trained at the rate of all of it.
    of_backbone = dict.fromkeys(("full", "head-only"), options.full_learning_rate)
    rates = {**of_backbone, "compacter-st": options.compacter_learning_rate}
    rate = options.first_learning_rate if run.is_first else rates.get(method, options.learning_rate)
    flags: list[Any] = ["--train-file", files["train"], "--validation-file", files["validation"]]
    flags += ["--backbone", run.backbone, "--adapters", run.adapters, "--method", method, *more]
    if run.languages:
        flags += ["--directions", ",".join(run.languages)]
    else:
        flags += ["--transcribe", "en"]
    flags += ["--seed", run.seed, "--learning-rate", rate, "--max-steps", run.steps]
    flags += ["--epochs", speech_plan.epochs_of(options, run)]
    flags += ["--max-evaluations", options.max_evaluations, "--batch-size", options.batch_size]
    flags += ["--eval-batch-size", options.eval_batch_size, "--max-target-length", 64]
    return [*flags, *_cache(options)]


def _cache(options: argparse.Namespace) -> list[Any]:
    return ["--feature-cache", options.output_dir / "features"]


def _evaluated(
    options: argparse.Namespace, data: SpeechData, run: Run, files: dict[str, Path]
) -> dict[str, Any]:
    """Returns the scores of a run by split and language, its trained weights, bytes and minutes."""
    # Beside the folder: a run's folder has nothing that the run did not write.
    output = run.folder.parent / f"{run.folder.name}.scores.json"
    if not output.exists():
        tests = ",".join(f"{name}={files[name]}" for name in data.tests)
        flags = ["--adapter", run.folder, "--test-files", tests, "--output", output]
        flags += ["--eval-batch-size", options.eval_batch_size, *_cache(options)]
        flags += [] if run.languages else ["--transcribe", "en"]
        commands.run("evaluate", flags)
    found = json.loads(output.read_text(encoding="utf-8"))["files"]
    fitted = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    languages = run.languages or ("en",)
    return {
        "condition": run.condition,
        "seed": run.seed,
        "steps": run.steps,
        "scores": {
            split: {
                language: {
                    metric: found[split]["metrics"][f"{metric}_{language}"] for metric in METRICS
                }
                for language in languages
            }
            for split in data.tests
        },
        "trained_parameters": fitted["trained_parameters"],
        "bytes_of_a_language": fitted["adapter_bytes"] / len(languages),
        "seconds": commands.seconds_of(run.folder),
        "validation_losses": [each["validation_loss"] for each in fitted["history"]],
    }


def parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line."""
    description = (__doc__ or "").partition("\n")[0]
    add = argparse.ArgumentParser(prog="python -m benchmarks.speech", description=description)
    of_data = add.add_mutually_exclusive_group(required=True)
    of_data.add_argument("--data", type=Path, help="folder of the tables of digits")
    of_data.add_argument("--captions", type=Path, help="folder of the tables of captions")
    counts = {"train-utterances": 4000, "test-utterances": 250}
    sizes = {"d-model": 128, "encoder-layers": 4, "decoder-layers": 2, "heads": 4}
    steps = {"first-steps": 6000, "steps": 3000, "batch-size": 64, "eval-batch-size": 128}
    for name, number in {**counts, **sizes, "vocab-size": 512, **steps}.items():
        add.add_argument(f"--{name}", type=int, default=number)
    add.add_argument("--max-evaluations", type=int, default=6)
    for name, rate in {"first": 1e-3, "full": 3e-4, "compacter": 3e-3}.items():
        add.add_argument(f"--{name}-learning-rate", type=float, default=rate)
    add.add_argument("--learning-rate", type=float, default=1e-3, help="of dense adapters")
    add.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    add.add_argument("--flops-per-second", type=float, help="measured by default")
    add.add_argument("--plan", action="store_true", help="predict operations and minutes, and end")
    add.add_argument("--output-dir", type=Path, required=True)
    add.add_argument("--json", type=Path)
    return add


if __name__ == "__main__":
    main()
