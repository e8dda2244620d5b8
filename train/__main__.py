"""Command line: `python -m train COMMAND`, with the commands that `USAGE` lists."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from compacter_jax.messages import LONGEST, shorten
from train.cli import huge_pages
from train.errors import EndedRunError, InterruptedRunError, StoppedRunError

if TYPE_CHECKING:
    from train.compare.options import CompareOptions
    from train.estimate.options import ParamsOptions, PlanOptions
    from train.exchange.options import (
        ConvertOptions,
        CreateOptions,
        MergeOptions,
        TrimOptions,
    )
    from train.fit.options import FitOptions
    from train.inference.options import EvaluateOptions, PredictOptions

USAGE = """usage: python -m train COMMAND [OPTIONS]

Fine-tune a pre-trained transformer by training a few thousand numbers.

to train:
  fit              fine-tune on a task and save the adapter of the best epoch
  compare          train several methods with several seeds; tables and figures

to use a trained adapter:
  evaluate         metrics of a saved adapter on a split
  predict          predictions of a saved adapter for every row of a file

to plan ahead:
  plan             cost of a run of fit: steps, memory, time
  params           number of parameters that a method, or every method, trains on a backbone

to exchange:
  convert          convert adapters from and to the formats of AdapterHub and PEFT
  merge            write a backbone with LoRA, IA3 and the like merged into its weights
  create-backbone  make a small random T5 with a tokenizer, to be pre-trained with fit
  trim-vocabulary  write a backbone with the pieces of its vocabulary that some texts need

`python -m train COMMAND --help` shows examples of a command and its options. To get started:

  python -m train params --backbone-config t5-base --method all
  python -m train fit --backbone DIR --task movie --output-dir runs/movie
  python -m train evaluate --adapter runs/movie/adapter --task movie
  python -m train predict --adapter runs/movie/adapter --input new.csv --output labelled.csv

DIR is a folder with config.json, model.safetensors and tokenizer.json, or an id on the Hugging Face
hub, such as bert-base-uncased. Without a network, give folders, and --data-dir for benchmarks. The
tasks movie, product, tweet and editorial are part of this repository.
"""


def fit(arguments: FitOptions) -> None:
    """Runs the command `fit`."""
    from train.fit import grid, run  # noqa: PLC0415 - help and bad flags should not wait for it

    (grid if arguments.is_grid else run).fit(arguments)


def evaluate(arguments: EvaluateOptions) -> None:
    """Runs the command `evaluate`."""
    from train.inference import commands  # noqa: PLC0415

    commands.evaluate(arguments)


def predict(arguments: PredictOptions) -> None:
    """Runs the command `predict`."""
    from train.inference import adapter, banked, commands, folders  # noqa: PLC0415

    members = folders.members_of(arguments.adapter)
    if members and not adapter.translation_members(arguments.adapter):
        banked.predict(arguments, members)
    else:
        commands.predict(arguments)


def plan(each: Sequence[PlanOptions]) -> None:
    """Runs the command `plan`."""
    from train.estimate import plan as estimate_plan  # noqa: PLC0415

    estimate_plan.plan(each)


def params(arguments: ParamsOptions) -> None:
    """Runs the command `params`."""
    from train.estimate import params as estimate_params  # noqa: PLC0415

    estimate_params.params(arguments)


def compare(each: Sequence[CompareOptions]) -> None:
    """Runs the command `compare`."""
    from train.compare import runs  # noqa: PLC0415

    runs.compare(each)


def convert(arguments: ConvertOptions) -> None:
    """Runs the command `convert`."""
    from train.exchange import convert as exchange_convert  # noqa: PLC0415

    exchange_convert.convert(arguments)


def merge(arguments: MergeOptions) -> None:
    """Runs the command `merge`."""
    from train.exchange import merge as exchange_merge  # noqa: PLC0415

    exchange_merge.merge(arguments)


def create_backbone(arguments: CreateOptions) -> None:
    """Runs the command `create-backbone`."""
    from train.exchange import create_backbone as exchange_create_backbone  # noqa: PLC0415

    exchange_create_backbone.create_backbone(arguments)


def trim_vocabulary(arguments: TrimOptions) -> None:
    """Runs the command `trim-vocabulary`."""
    from train.exchange import trim_vocabulary as exchange_trim_vocabulary  # noqa: PLC0415

    exchange_trim_vocabulary.trim_vocabulary(arguments)


# Command -> the function that runs it, and the class of its options, which is imported when needed:
# neither the page of all commands nor the start of a process with huge pages waits for JAX.
COMMANDS: dict[str, tuple[Callable[[Any], None], str]] = {
    "fit": (fit, "train.fit.options:FitOptions"),
    "evaluate": (evaluate, "train.inference.options:EvaluateOptions"),
    "predict": (predict, "train.inference.options:PredictOptions"),
    "plan": (plan, "train.estimate.options:PlanOptions"),
    "params": (params, "train.estimate.options:ParamsOptions"),
    "compare": (compare, "train.compare.options:CompareOptions"),
    "convert": (convert, "train.exchange.options:ConvertOptions"),
    "merge": (merge, "train.exchange.options:MergeOptions"),
    "create-backbone": (create_backbone, "train.exchange.options:CreateOptions"),
    "trim-vocabulary": (trim_vocabulary, "train.exchange.options:TrimOptions"),
}
# Commands that read `--config FILE.toml`, and commands that receive the options of each task.
_CONFIGURED, _OF_EACH_TASK = ("fit", "plan", "compare"), ("plan", "compare")
# Commands that compute long enough for huge pages to pay off.
_LONG = {"fit", "compare", "evaluate", "predict"}
_HELP = {"-h", "--help"}


def options_class_of(name: str) -> type:
    """Returns the class of a command's options."""
    module, _, cls = COMMANDS[name][1].partition(":")
    return getattr(importlib.import_module(module), cls)


def main(arguments: Sequence[str]) -> int:
    """Runs a command and returns the exit code.

    The code is 0 for success, 2 for invalid input, 130 after an interrupt and 1 for other errors.
    It is also 0 for a run that was terminated and stopped as intended.
    """
    if not arguments or _HELP & set(arguments):
        print(_help(arguments))
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}; use one of {', '.join(COMMANDS)}", 2)
    run, _ = COMMANDS[name]
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        parsed = _of_each_task(name, rest) if name in _OF_EACH_TASK else _parsed(name, rest)
        with _without_warnings_of_new_parameters():
            run(parsed)
    except BrokenPipeError:
        raise
    except (EndedRunError, StoppedRunError) as error:
        if error.exit_code:
            return _fail(str(error), error.exit_code)
        print(error)
    except (ValueError, OSError, MemoryError, OverflowError, RuntimeError) as error:
        if (told := _told(error)) is None:
            raise
        return _fail(told, 2)
    except KeyboardInterrupt:
        return _fail("interrupted", InterruptedRunError.exit_code)
    return 0


@contextlib.contextmanager
def _without_warnings_of_new_parameters() -> Iterator[None]:
    """Suppresses the library's warning about a backbone without a head, inside the block.

    A saved adapter has the head, `fit` trains it and says so, and `convert` reports its source.
    """

    def is_kept(record: logging.LogRecord) -> bool:
        return not hasattr(record, "new_parameters")

    logger = logging.getLogger("compacter_jax")
    logger.addFilter(is_kept)
    try:
        yield
    finally:
        logger.removeFilter(is_kept)


def _told(error: Exception) -> str | None:
    """Returns the line for the user; None for an error that the input did not cause.

    For an error of the system, the file comes first, and the error number is left out. JAX has its
    own class for memory that it cannot allocate, which is a RuntimeError, and so is RecursionError.
    """
    told = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    if isinstance(error, MemoryError) or told.startswith("RESOURCE_EXHAUSTED"):
        return f"there is not enough memory: {told.removeprefix('RESOURCE_EXHAUSTED: ')}"
    if isinstance(error, RecursionError):
        return "the input is nested too deeply to be read"
    if isinstance(error, OverflowError):
        return f"a number in the input is too large: {told}"
    return told if isinstance(error, ValueError | OSError) else None


def _help(arguments: Sequence[str]) -> str:
    """Returns the manual page of the command that is named first, or the list of commands."""
    if not arguments or arguments[0] not in COMMANDS:
        return USAGE.rstrip()
    from train.cli import manual  # noqa: PLC0415

    name = arguments[0]
    width = min(shutil.get_terminal_size().columns, 100)
    return manual.page(name, options_class_of(name), width=width)


def _parsed(name: str, arguments: Sequence[str]) -> Any:
    """Parses the options of a command."""
    import tyro  # noqa: PLC0415

    from train.cli.numbers import NUMBERS  # noqa: PLC0415

    options_class = options_class_of(name)
    if name in _CONFIGURED:
        from train.cli import config_files  # noqa: PLC0415

        arguments = config_files.expand_config(arguments, options_class)
    told = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    try:
        # tyro draws a box around an error if both streams are UTF-8.
        with (
            NUMBERS,
            contextlib.redirect_stdout(told),
            contextlib.redirect_stderr(told),
        ):
            parsed: Any = tyro.cli(options_class, args=arguments, prog=f"python -m train {name}")
    except SystemExit:
        told.seek(0)
        raise ValueError(_without_box(told.read())) from None
    if (check := getattr(parsed, "check_method", None)) is not None:
        check()
    return parsed


def _without_box(drawn: str) -> str:
    """Returns the text of tyro's boxes as one line: `;` for rules, without headings."""
    lines = re.sub(r"\x1b\[[\d;]*m|^[╭╰].*$", "", drawn, flags=re.MULTILINE).splitlines()
    text = " ".join(line.strip("│ ") for line in lines)
    return re.sub(r"\s*─+\s*", "; ", text).strip()


def _of_each_task(name: str, arguments: Sequence[str]) -> list[Any]:
    """Returns the options of a command for each task, since a configuration may vary them."""
    parsed = _parsed(name, arguments)
    tasks = [task.strip() for task in parsed.task.split(",")]
    if len(tasks) == 1:
        return [parsed]
    return [_parsed(name, [*arguments, "--task", task]) for task in tasks]


def _fail(message: str, code: int) -> int:
    print(shorten("error: " + " ".join(message.split()), LONGEST), file=sys.stderr)
    return code


def _prepare() -> None:
    """Sets variables that libraries read when they are imported, which happens in the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal cannot show is written as its number.
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Without a network the hub logs every attempt twice; our error says what to do.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Only configurations and tokenizers of transformers are used. It would otherwise load an
    # installed PyTorch, which takes 2 seconds and 250 MB.
    os.environ.setdefault("USE_TORCH", "0")
    from train.compute import compilation_cache  # noqa: PLC0415

    compilation_cache.enable(os.environ)
    # Importing and tracing create many permanent objects, and a short run spent seconds on
    # scanning them again and again.
    gc.set_threshold(100_000, 50, 100)


if __name__ == "__main__":
    if _LONG & set(sys.argv[1:2]) and not _HELP & set(sys.argv):
        huge_pages.use_huge_pages()
    try:
        _prepare()
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        code = _fail("interrupted", InterruptedRunError.exit_code)
    sys.exit(code)
