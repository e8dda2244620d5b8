"""The command line: `python -m train fit|evaluate|predict|params|create-backbone`."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from train import options
from train.errors import InterruptedRunError, StoppedRunError

USAGE = """usage: python -m train COMMAND [OPTIONS]

Fine-tune a pre-trained transformer by training a few thousand numbers.

commands:
  fit              fine-tune on a task and save the adapter of the best epoch
  evaluate         metrics of a saved adapter on a split
  predict          predictions of a saved adapter for every row of a file
  params           what a method would train on a backbone
  create-backbone  make a small random T5 with a tokenizer, to be pre-trained with fit

`python -m train COMMAND --help` lists the options of a command. For example:

  python -m train fit --backbone DIR --method compacter++ --task movie --output-dir runs/movie
  python -m train predict --adapter runs/movie/adapter --input new.csv --output labelled.csv
  python -m train params --backbone-config t5-base --method compacter
"""


def fit(arguments: options.FitOptions) -> None:
    """Runs the command `fit`."""
    from train import loop  # noqa: PLC0415 - help and bad flags should not wait for JAX

    loop.fit(arguments)


def evaluate(arguments: options.EvaluateOptions) -> None:
    """Runs the command `evaluate`."""
    from train import inference  # noqa: PLC0415

    inference.evaluate(arguments)


def predict(arguments: options.PredictOptions) -> None:
    """Runs the command `predict`."""
    from train import inference  # noqa: PLC0415

    inference.predict(arguments)


def params(arguments: options.ParamsOptions) -> None:
    """Runs the command `params`."""
    import compacter_jax as cj  # noqa: PLC0415
    from train import report  # noqa: PLC0415
    from train.objective import adapted_shapes  # noqa: PLC0415

    method = options.method_of(arguments.method, arguments.method_options)
    shapes = adapted_shapes(arguments, method)
    count = cj.count(shapes, cj.label_params(shapes, method))
    alone = report.backbone_total(count)
    if not arguments.json:
        print(f"backbone alone: {alone:,}; trained: {100 * count.trained / alone:.4f} % of it")
        print(report.parameter_table(count, method))
        return
    groups = {name: {"trained": t, "total": n} for name, (t, n) in count.groups.items()}
    sums = {"trained": count.trained, "total": count.total, "backbone_total": alone}
    print(json.dumps({**sums, "groups": groups}, indent=2))


def create_backbone(arguments: Any) -> None:
    """Runs the command `create-backbone`."""
    from train import create  # noqa: PLC0415

    create.create_backbone(arguments)


def _create_options() -> type:
    from train.create import CreateOptions  # noqa: PLC0415

    return CreateOptions


# Command -> what runs it, and what makes the class of its options.
COMMANDS: dict[str, tuple[Callable[[Any], None], Callable[[], type]]] = {
    "fit": (fit, lambda: options.FitOptions),
    "evaluate": (evaluate, lambda: options.EvaluateOptions),
    "predict": (predict, lambda: options.PredictOptions),
    "params": (params, lambda: options.ParamsOptions),
    "create-backbone": (create_backbone, _create_options),
}


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit code: 0, 2 for bad input, 130 if interrupted, else 1."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}; use one of {', '.join(COMMANDS)}", 2)
    run, options_class = COMMANDS[name]
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        flags = options.expand_config(rest) if name == "fit" else rest
        run(tyro.cli(options_class(), args=flags, prog=f"python -m train {name}"))
    except (ValueError, OSError) as error:
        return _fail(str(error), 2)
    except StoppedRunError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", InterruptedRunError.exit_code)
    return 0


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
