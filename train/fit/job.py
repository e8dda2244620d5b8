"""Preparation of a run: reads and checks tasks and models before anything is written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.methods.base import MethodConfig
from compacter_jax.models.families import family_of
from compacter_jax.models.loading import module_from_config, read_config
from compacter_jax.models.pooling import DEFAULT as FIRST
from compacter_jax.models.pooling import pooling_of_module
from compacter_jax.params import FREEZE, TRAIN, group_of
from train import tasks
from train.compute import distributed, mesh
from train.data import batching
from train.fit import members, mixture
from train.fit.options import FitOptions
from train.inference import adapter, compositions
from train.objectives import (
    Objective,
    check_options,
    for_task,
    head_arguments,
    masked_words,
    prompt_init,
    shapes,
)
from train.tasks import multilingual


@dataclasses.dataclass(frozen=True)
class TaskRun:
    """One task of a run, and the model as this task sees it.

    Attributes:
      task: the task to learn.
      objective: the objective that puts the task to the model.
      encoded: split -> examples.
      backbone: the backbone with the head of the task.
      model: the backbone with the layers of the method.
      params: the parameters of `model`.
      labels: tree like `params` of `compacter_jax.label_params`, which says what is trained.
    """

    task: tasks.Task
    objective: Objective
    encoded: dict[str, batching.Examples]
    backbone: cj.Backbone
    model: cj.Adapted
    params: Any
    labels: Any

    @property
    def name(self) -> str:
        """Name of the task."""
        return self.task.name


@dataclasses.dataclass(frozen=True)
class Learner:
    """Parameters that one optimizer trains, and the tasks that they are trained on.

    Attributes:
      name: the name of the only task, or the names of several joined by `+`.
      task_indices: the positions of the tasks in `Job.task_runs`.
      params: the parameters of all the tasks; with several, `classifier/NAME/kernel` is the head of
        the task NAME.
      labels: tree like `params` that says what is trained.
      views: for each task, a function from a tree like `params`, or like one of its halves, to the
        part that belongs to the task.
    """

    name: str
    task_indices: tuple[int, ...]
    params: Any
    labels: Any
    views: tuple[Callable[[Any], Any], ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that defines a run, except its state.

    Attributes:
      options: the options of the command line.
      task_runs: the tasks.
      learners: one learner for all tasks, or one for each.
    """

    options: FitOptions
    task_runs: tuple[TaskRun, ...]
    learners: tuple[Learner, ...]

    @property
    def method(self) -> MethodConfig:
        """Method that the run inserts; with several tasks, the method of the first task."""
        return self.task_runs[0].model.method

    @property
    def is_mixture(self) -> bool:
        """True if the run has several tasks."""
        return len(self.task_runs) > 1

    @property
    def learning_rate(self) -> float:
        """Peak of the learning rate schedule."""
        return self.options.peak_learning_rate(self.task_runs[0].objective.learning_rates)

    @property
    def sizes(self) -> list[int]:
        """Numbers of training examples, one for each task."""
        return [len(task_run.encoded["train"]) for task_run in self.task_runs]

    @property
    def steps_per_epoch(self) -> int:
        """Number of updates in an epoch: the sum over the tasks of the batches in one pass."""
        return sum(batching.num_batches(size, self.options.batch_size) for size in self.sizes)

    @property
    def total_steps(self) -> int:
        """Number of updates in the whole run."""
        steps = self.options.epochs * self.steps_per_epoch
        return min(steps, self.options.max_steps or steps)

    @property
    def epochs(self) -> int:
        """Number of passes over the training data; `max_steps` may end the last pass early."""
        return -(-self.total_steps // self.steps_per_epoch)

    @functools.cached_property
    def order(self) -> np.ndarray:
        """`[total_steps]` integers: the task of each step, as an index into `task_runs`."""
        mix = mixture.parse(self.options.mixture)
        seed, steps = self.options.seed, self.steps_per_epoch
        epochs = [
            mix.order(self.sizes, steps, seed=seed, epoch=epoch) for epoch in range(self.epochs)
        ]
        return np.concatenate(epochs)[: self.total_steps]

    def evaluates(self, epoch: int) -> bool:
        """Returns True if the model is evaluated after an epoch.

        Evaluations are evenly spaced, and there is always one after the last epoch.
        """
        every = -(-self.epochs // (self.options.max_evaluations or self.epochs))
        return (epoch + 1) % every == 0 or epoch + 1 == self.epochs

    def steps_of(self, epoch: int) -> int:
        """Returns the number of updates in an epoch."""
        return min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)

    def examples_before(self, batch: int) -> int:
        """Returns the number of examples in the first `batch` batches of an epoch.

        The number ignores that the last batch of a task may be smaller than the others.
        """
        return min(batch * self.options.batch_size, sum(self.sizes))

    def steps_of_learner(self, learner: Learner) -> int:
        """Returns the number of updates of one learner in the whole run."""
        return int(np.isin(self.order, learner.task_indices).sum())

    def folder(self, task_run: TaskRun) -> Path:
        """Returns the folder for the results of a task."""
        return (
            self.options.output_dir / task_run.name if self.is_mixture else self.options.output_dir
        )


def prepare(options: FitOptions, *, like: Job | None = None, num_devices: int | None = None) -> Job:
    """Reads and checks the tasks, the tokenizer, the backbone and the method.

    Args:
      options: the options of the command line.
      like: a run of the same task on the same backbone; the new run shares its backbone arrays.
      num_devices: the number of devices that share a batch; by default all of this process.

    Raises:
      ValueError, OSError: if the input is invalid; nothing has been written.
    """
    _check_batch_size(options, num_devices or jax.local_device_count())
    mixture.parse(options.mixture)
    names = options.task_names()
    if like is None:
        _check_fit(options)
    task_runs: list[TaskRun] = []
    for name in names:
        known = like.task_runs[0].backbone if like else task_runs[0].backbone if task_runs else None
        task_runs.append(
            _task_run(name, options, task_runs[0] if task_runs else None, known, say=like is None)
        )
    if options.adapters == "per_task" or len(task_runs) == 1:
        learners = [
            Learner(task_run.name, (i,), task_run.params, task_run.labels, (lambda tree: tree,))
            for i, task_run in enumerate(task_runs)
        ]
    else:
        learners = [_joined(task_runs)]
    return Job(options, tuple(task_runs), tuple(learners))


def _check_fit(options: FitOptions) -> None:
    """Raises ValueError if the method does not fit the backbone; reads neither data nor weights."""
    config = read_config(options.backbone)
    # The result does not depend on the number of labels, which only the data says, nor on the
    # pooling of an encoder, which for embeddings is not that of a head.
    pooling = options.pooling if family_of(config).writes_text else FIRST
    head = head_arguments(options.backbone, 2, pooling=pooling)
    module = module_from_config(config, **head, **options.computation())
    shapes.check_fit(module, options.method_config(), config, options.max_length)


def _task_run(
    name: str,
    options: FitOptions,
    first: TaskRun | None,
    known: cj.Backbone | None,
    *,
    say: bool,
) -> TaskRun:
    """Loads one task.

    The arrays of `first`, and of the backbone `known`, are shared where they are given.
    """
    if options.directions is not None:
        task = multilingual.load_task(options)
    else:
        task = tasks.load_task(
            name,
            regression=options.regression,
            embedding=options.embedding_loss is not None,
            **tasks.sources(options),
        )
    check_options(task, options)
    if options.train_size is not None:
        sample = tasks.subsample(task.splits["train"], options.train_size, options.seed)
        task = dataclasses.replace(task, splits={**task.splits, "train": sample})
    if say:
        say_all(task.user_messages())
    # On the host: arrays on the devices may be divided among them, and may have another dtype.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        task_run = _loaded_task_run(task, options, first, known)
    if say:
        say_all(task_run.objective.user_messages())
    return task_run


def _loaded_task_run(
    task: tasks.Task, options: FitOptions, first: TaskRun | None, known: cj.Backbone | None
) -> TaskRun:
    load = functools.partial(
        cj.load_backbone,
        options.backbone,
        **head_arguments(options.backbone, task.num_labels, task.kind, options.pooling),
        **options.computation(),
    )
    backbone = load(seed=options.seed)
    if known is not None:
        backbone = dataclasses.replace(backbone, params=_shared(backbone.params, known.params))
    tokenizer = adapter.load_tokenizer(options.backbone, backbone, options.max_length)
    method = _method(options, task, tokenizer)
    method = members.banked(method, task, options)
    model = masked_words.adapted(task, backbone.module, method)
    objective = members.checked(for_task(task, options, model, tokenizer), task, options)
    params = cj.init_adapters(model, backbone, jax.random.key(options.seed))
    if options.composition is not None:
        params = compositions.with_saved(
            options.composition, model, params, backbone, options.backbone
        )
    options.peak_learning_rate(objective.learning_rates)  # raises if there is none
    if first is not None:
        params = _shared(params, first.params)
    encoded = objective.encode_all(task.splits)
    for split, examples in encoded.items():
        say_all(examples.user_messages(split))
    labels = cj.label_params(params, method, groups=model.groups)
    if TRAIN not in flatten_dict(labels).values():
        raise ValueError(
            f"--method {options.method} trains no parameter of {backbone.name}, which has no head "
            "of the task; choose another method"
        )
    if frozen := _new_paths(backbone, labels, FREEZE):
        masked_words.check_head(task, backbone.name, frozen)
        # Drawn again as a loader of the adapter draws them: these parameters are not saved, but
        # the hash by which an adapter recognises its backbone includes them.
        drawn = load().params
        params = _with_leaves(params, drawn, frozen)
        own = _with_leaves(backbone.params, drawn, frozen)
        backbone = dataclasses.replace(backbone, params=own)
    if known is None:
        _say_new(backbone, labels)
        _say_pooling(backbone)
    return TaskRun(task, objective, encoded, backbone, model, params, labels)


def say_all(lines: Sequence[str]) -> None:
    """Prints lines, on the first host only."""
    if lines and distributed.is_first():
        print("\n".join(lines), flush=True)


def _new_paths(backbone: cj.Backbone, labels: Any, label: str) -> list[str]:
    """Returns the paths that the backbone's checkpoint lacks and that have the given label."""
    label_of = flatten_dict(labels, sep="/")
    return [path for path in backbone.new_parameters if label_of.get(path) == label]


def _with_leaves(params: Any, others: Any, paths: Sequence[str]) -> Any:
    """Returns `params` with the leaves of `others` at the given paths."""
    flat, other = flatten_dict(params, sep="/"), flatten_dict(others, sep="/")
    return unflatten_dict(flat | {path: other[path] for path in paths}, sep="/")


def _say_new(backbone: cj.Backbone, labels: Any) -> None:
    """Prints the parameters that the backbone's checkpoint lacks, as a rule a head to train."""
    labels_in_words = {TRAIN: "new, and trained here", FREEZE: "drawn at random, and not trained"}
    for label, words in labels_in_words.items():
        paths = _new_paths(backbone, labels, label)
        if paths and distributed.is_first():
            print(f"{backbone.name} does not have {', '.join(paths)}: {words}")


def _say_pooling(backbone: cj.Backbone) -> None:
    """Prints what a classifier reads where that is not what transformers' reads."""
    pooling = pooling_of_module(backbone.module)
    told = {"mean": "the mean of the tokens", "cls": "the first token"}
    # A ModernBERT has the same dense layer before the classifier whatever it reads.
    has_same = hasattr(backbone.module.config, "classifier_pooling")
    if pooling in told:
        rest = "" if has_same else ", without a pooler"
        say_all([f"the classifier reads {told[pooling]}{rest} (--pooling {pooling})"])


def _method(options: FitOptions, task: tasks.Task, tokenizer: Any) -> MethodConfig:
    method = options.method_config()
    if options.backbone_dtype == "int8" and (method.trains_backbone or method.moves_backbone):
        raise ValueError(
            f"--backbone-dtype int8 is for weights that stay as they are, and --method "
            f"{options.method} changes all of them; use bfloat16"
        )
    shared = len(options.task_names()) > 1 and options.adapters == "shared"
    if shared and method.needs_token_ids() and options.prompt_words is None:
        raise ValueError(
            "prompts that several tasks share start from words for all of them; give "
            "--prompt-words, or --adapters per_task"
        )
    return prompt_init.with_tokens(method, options.prompt_words, task, tokenizer)


def _shared(params: Any, first: Any) -> Any:
    """Returns `params` with the arrays of `first` where both trees have them, except the head."""
    known = flatten_dict(first, sep="/")

    def choose(path: str, leaf: Any) -> Any:
        own = group_of(path) == "head" or known.get(path, leaf).shape != leaf.shape
        return leaf if own else known.get(path, leaf)

    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: choose(path, leaf) for path, leaf in flat.items()}, sep="/")


def _joined(task_runs: Sequence[TaskRun]) -> Learner:
    """Builds one learner for several tasks, each with its own head."""
    params: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    views = []
    for task_run in task_runs:
        own_labels = flatten_dict(task_run.labels, sep="/")
        places = {}
        for path, leaf in flatten_dict(task_run.params, sep="/").items():
            place = _own(path, task_run.name) if group_of(path) == "head" else path
            if place in params and params[place].shape != leaf.shape:
                raise ValueError(
                    f"the tasks {task_runs[0].name} and {task_run.name} cannot share an adapter: "
                    f"{path} is {params[place].shape} of one and {leaf.shape} of the other; use "
                    "--adapters per_task"
                )
            params.setdefault(place, leaf)
            labels.setdefault(place, own_labels[path])
            places[path] = place
        views.append(functools.partial(_view, places))
    return Learner(
        "+".join(task_run.name for task_run in task_runs),
        tuple(range(len(task_runs))),
        unflatten_dict(params, sep="/"),
        unflatten_dict(labels, sep="/"),
        tuple(views),
    )


def _own(path: str, task: str) -> str:
    """Returns the path in a mixture of a parameter that one task owns; its group is unchanged."""
    top, _, rest = path.partition("/")
    return f"{top}/{task}/{rest}"


def _view(places: Mapping[str, str], tree: Any) -> Any:
    """Returns the leaves of a tree at `places`, a mapping from new paths to paths in the tree."""
    flat = flatten_dict(tree, sep="/")
    return unflatten_dict({path: flat[place] for path, place in places.items()}, sep="/")


def _check_batch_size(options: FitOptions, per_host: int) -> None:
    """Raises ValueError if a batch does not divide evenly.

    A batch is divided among the hosts, their devices or the rows of the mesh, and the accumulation
    steps.
    """
    if options.mesh is not None:
        per_host = mesh.parse(options.mesh)["data"]
    devices = distributed.number() * per_host
    parts = devices * options.accumulation_steps
    if options.batch_size % parts:
        raise ValueError(
            f"batch_size={options.batch_size} must be a multiple of {parts} ({devices} devices x "
            f"{options.accumulation_steps} accumulation steps)"
        )
    if options.eval_batch_size % devices:
        raise ValueError(
            f"eval_batch_size={options.eval_batch_size} must be a multiple of the {devices} devices"
        )
