"""The plan of a comparison: which runs of `fit` there are, with which flags."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from compacter_jax.catalogue import PRESETS, preset, presets
from compacter_jax.messages import listing, quote
from compacter_jax.methods.base import MethodConfig
from train import tasks
from train.cli.config_files import flag
from train.cli.method_flags import ALL, given_options, is_composition, options_of, variant
from train.cli.options import TrainingOptions
from train.compare.options import CompareOptions
from train.compare.single_run import Run
from train.fit.options import FitOptions
from train.objectives import is_text_to_text
from train.objectives.learning_rates import CLASSIFIER, TEXT_TO_TEXT

# The meaning of a flag's numbers, if fit's flag of the same name has another meaning.
_MEANINGS = {"seeds": ": how many seeds, which are then 0, 1, and so on"}
# A method's text names a folder of its runs.
_NAME_OF_FOLDER = re.compile(r"[\w.+:=-]+", re.ASCII)
# Options of the comparison as a whole, which a configuration cannot vary by task.
_OF_ALL_TASKS = (
    *("backbone", "output_dir", "heads", "tune_learning_rates", "tune_beyond"),
    *("tuning_seeds", "reference", "at_once", "processes", "keep_adapters", "overwrite"),
)
# Factor between neighbouring learning rates of a grid.
RATE_FACTOR = 3.0


@dataclasses.dataclass(frozen=True)
class Point:
    """A method on one task with one training set size, to be trained with several seeds.

    Attributes:
      options: the options of the task.
      size: the number of training examples; None is all.
      method: the preset, or a variant of it as `train.cli.method_flags.variant` reads it.
      num_seeds: the number of seeds.
      steps: the number of updates; None for epochs.
      writes_text: True for an encoder-decoder.
      has_head: False for an encoder-decoder and for embeddings, which have no head of the task.
    """

    options: CompareOptions
    size: int | None
    method: str
    num_seeds: int
    steps: int | None
    writes_text: bool
    has_head: bool

    @property
    def preset(self) -> str:
        """Name of the preset, without the changes of a variant."""
        return variant(self.method)[0]

    @functools.cached_property
    def rates(self) -> tuple[float, ...]:
        """Learning rates to choose from, in ascending order; none if there is nothing to choose."""
        count = self.options.tune_learning_rates
        if count == 1:
            return ()
        return self._grid(count // 2)

    @property
    def reachable_rates(self) -> tuple[float, ...]:
        """`rates` and those beyond both ends that `tune_beyond` may reach."""
        return self.rates and self._grid(len(self.rates) // 2 + self.options.tune_beyond)

    def _grid(self, side: int) -> tuple[float, ...]:
        """Returns the method's own rate and `side` others on each side, in ascending order."""
        defaults = TEXT_TO_TEXT if self.writes_text else CLASSIFIER
        middle = self.options.learning_rate or defaults[self.preset]
        # Three digits, so that folders and reports have short names.
        return tuple(
            float(f"{middle * RATE_FACTOR**power:.3g}") for power in range(-side, side + 1)
        )

    def tried(self, rates: Iterable[float]) -> list[Run]:
        """Returns the runs that try some learning rates."""
        seeds = range(min(self.options.tuning_seeds, self.num_seeds))
        return [self.run(seed, rate) for seed in seeds for rate in sorted(rates)]

    def runs(self, rate: float | None) -> list[Run]:
        """Returns the runs of all seeds at one learning rate."""
        return [self.run(seed, rate) for seed in range(self.num_seeds)]

    def run(self, seed: int, rate: float | None) -> Run:
        """Returns one run; its flags are those that differ from the defaults of `fit`."""
        options = self.options
        shared = [field.name for field in dataclasses.fields(TrainingOptions)]
        values = {name: getattr(options, name) for name in shared}
        values |= {"train_size": self.size, "method": self.preset, "seed": seed}
        values |= {"checkpoint_steps": 0}
        if rate is not None:
            values["learning_rate"] = rate
        if self.steps is not None:
            # The steps need at most this number of epochs.
            values |= {"max_steps": self.steps, "epochs": self.steps}
        defaults = {field.name: field.default for field in dataclasses.fields(FitOptions)}
        flags = []
        for name, value in values.items():
            if value != defaults[name] and value is not None:
                flags += flag(name, value, toggle=True)
        for name, value in self._method_options().items():
            flags += flag(name, value, toggle=False)
        folder = options.output_dir / "runs" / options.task / str(self.size or "all") / self.method
        if rate is not None:
            folder /= f"learning-rate-{rate:g}"
        return Run(
            options.task,
            self.size,
            self.method,
            seed,
            folder / f"seed-{seed}",
            tuple(flags),
            rate,
        )

    def _method_options(self) -> dict[str, Any]:
        """Returns the changes to the preset; with `heads="alike"` all train the same head."""
        name, changes = variant(self.method)
        given = given_options(options_of(name, self.options.method_options)) | changes
        if self.options.heads == "as_published" or not self.has_head:
            return given
        return {"train_head": True, "train_pooler": True} | given


def points(each: Sequence[CompareOptions]) -> list[Point]:
    """Returns the points of a comparison: by task, then by size, then by method.

    Args:
      each: the options of each task.

    Raises:
      ValueError: for an unknown method, a task named twice, a name that is no name of a folder, a
        list that is not of numbers, or lists of different lengths; and as `train.tasks.load_task`.
    """
    for task in names_of(joined(each).task):
        if {"/", "\\"} & set(task) or task in (".", ".."):
            raise ValueError(
                f"--task {quote(task, 100)} names a folder of the comparison; give your files a "
                "name without / and \\"
            )
    return [point for options in each for point in _points(options)]


def _points(options: CompareOptions) -> list[Point]:
    options.check()
    writes_text = is_text_to_text(options.backbone)
    task = _task(options)
    has_head = not writes_text and task.kind != "embedding"
    methods = _methods(options, has_head)
    sizes = [None] if options.train_size is None else _numbers("train-size", options.train_size)
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"--train-size {options.train_size!r} must be different numbers")
    seeds = _each("seeds", options.seeds, sizes)
    steps = _each("steps", options.steps, sizes) if options.steps else [None] * len(sizes)
    examples = len(task.splits["train"])
    found = []
    for size, num_seeds, num_steps in zip(sizes, seeds, steps, strict=True):
        if size is not None and size > examples:
            print(f"{options.task} has {examples:,} training examples: {size:,} are left out")
            continue
        found += [
            Point(options, size, method, num_seeds, num_steps, writes_text, has_head)
            for method in methods
        ]
    return found


def _methods(options: CompareOptions, has_head: bool) -> list[str]:
    """Returns the presets to compare; all of them means those that the backbone can be trained by.

    Raises:
      ValueError: for an unknown preset or an invalid value, for two names of one method, or if the
        reference is not compared.
    """
    if is_composition(options.methods):
        raise ValueError(
            f"--methods {quote(options.methods, 100)} must be presets or variants of them; fit "
            "trains compositions"
        )
    methods = list(presets()) if options.methods == ALL else names_of(options.methods)
    if options.methods == ALL and not has_head:
        methods = [name for name in methods if PRESETS[name].method.own_groups]
    _check_methods(methods, options, has_head)
    if options.reference is not None and options.reference not in methods:
        raise ValueError(
            f"--reference {options.reference!r} must be one of the methods that are compared: "
            f"{', '.join(methods)}"
        )
    return methods


def _check_methods(methods: Sequence[str], options: CompareOptions, has_head: bool) -> None:
    """Raises ValueError for a method that cannot be trained, or that has two names."""
    known: dict[tuple[str, MethodConfig], str] = {}
    for method in methods:
        name, changes = variant(method)
        given = given_options(options_of(name, options.method_options))
        config = preset(name, **(given | changes))  # raises for what the method does not have
        if not has_head and not config.trained_groups() - {"head", "pooler"}:
            raise ValueError(
                f"{method!r} trains nothing of {options.backbone}, which has no head of the task; "
                "leave it out"
            )
        if not _NAME_OF_FOLDER.fullmatch(method):
            raise ValueError(
                f"method {quote(method, 100)} names a folder; write its values with letters, "
                "digits and . _ + - alone"
            )
        if (first := known.setdefault((name, config), method)) != method:
            raise ValueError(f"{method!r} and {first!r} are the same method; name it once")


def in_order(runs: Iterable[Run]) -> list[Run]:
    """Returns runs by seed, so that the first seed of all methods comes before the second."""
    return sorted(runs, key=lambda run: run.seed)  # stable


def joined(each: Sequence[CompareOptions]) -> CompareOptions:
    """Returns the options of the comparison as a whole; those of the first task for the rest.

    Raises:
      ValueError: if an option of the whole has several values.
    """
    for name in _OF_ALL_TASKS:
        values = [getattr(options, name) for options in each]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"{name} is one for all tasks, and the configuration has "
                f"{listing(map(str, values))}"
            )
    return dataclasses.replace(each[0], task=",".join(options.task for options in each))


def names_of(text: str) -> list[str]:
    """Returns names from a list with commas; raises ValueError for an empty or repeated one."""
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{text!r} must be different names with commas between them")
    return names


def _numbers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        meaning = _MEANINGS.get(name, "")
        raise ValueError(
            f"--{name} {text!r} must be numbers from 1 on, with commas between them{meaning}"
        )
    return [int(part) for part in parts]


def _each(name: str, text: str, sizes: Sequence[int | None]) -> list[int]:
    """Returns a number for each size."""
    numbers = _numbers(name, text)
    if len(numbers) not in (1, len(sizes)):
        raise ValueError(
            f"--{name} has {len(numbers)} numbers for {len(sizes)} training sizes; give one, or as "
            "many as there are sizes"
        )
    return numbers * len(sizes) if len(numbers) == 1 else numbers


def _task(options: CompareOptions) -> tasks.Task:
    """Returns a task, which must have a test split."""
    task = tasks.load_task(
        options.task,
        regression=options.regression,
        embedding=options.embedding_loss is not None,
        **tasks.sources(options),
    )
    if task.kind in tasks.ON_TEXT or set(tasks.SPLITS) - task.splits.keys():
        hint = "; --split-protocol paper makes a test split" if task.benchmark is not None else ""
        raise ValueError(
            "compare needs a task with training, validation and test examples, and "
            f"{options.task!r} has {', '.join(task.splits)}{hint}"
        )
    return task
