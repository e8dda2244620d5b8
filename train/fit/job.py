"""What `fit` reads and checks before it writes anything: tasks, models, and what is trained."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import compacter_jax as cj
from compacter_jax.methods.base import MethodConfig
from compacter_jax.models.loading import module_from_config, read_config
from compacter_jax.params import FREEZE, TRAIN, group_of
from train import tasks
from train.compute import distributed, mesh
from train.data import batching
from train.fit import mixture
from train.fit.options import FitOptions
from train.inference import adapter, compositions
from train.objectives import Objective, check_options, for_task, head_arguments, prompt_init, shapes


@dataclasses.dataclass(frozen=True)
class TaskRun:
    """One task of a run, and the model as this task sees it.

    Attributes:
      task: what is learned.
      objective: how it is put to the model.
      encoded: split -> examples.
      backbone: with the head of the task.
      model: the backbone with the method's layers.
      params: of the model.
      labels: what of them is trained.
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
        """Of the task."""
        return self.task.name


@dataclasses.dataclass(frozen=True)
class Learner:
    """What is trained as one: an adapter with its optimizer, and the tasks that it learns.

    Attributes:
      name: of its only task, or of several with `+` between them.
      lanes: indices of its tasks in the job.
      params: of all its lanes; of several, `classifier/NAME/kernel` is the head of one.
      labels: what of them is trained.
      views: for each lane, a tree like `params`, or one half of it -> the lane's part of it.
    """

    name: str
    lanes: tuple[int, ...]
    params: Any
    labels: Any
    views: tuple[Callable[[Any], Any], ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything of a run but its state.

    Attributes:
      options: of the command line.
      lanes: the tasks.
      learners: one for all tasks, or one for each.
    """

    options: FitOptions
    lanes: tuple[TaskRun, ...]
    learners: tuple[Learner, ...]

    @property
    def method(self) -> MethodConfig:
        """What is inserted; of several tasks, for the first."""
        return self.lanes[0].model.method

    @property
    def is_mixture(self) -> bool:
        """Whether there are several tasks."""
        return len(self.lanes) > 1

    @property
    def learning_rate(self) -> float:
        """Peak of the schedule."""
        return self.options.peak_learning_rate(self.lanes[0].objective.learning_rates)

    @property
    def sizes(self) -> list[int]:
        """Training examples of every task."""
        return [len(lane.encoded["train"]) for lane in self.lanes]

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one pass over the training data; of a mixture, in as many batches."""
        return sum(batching.num_batches(size, self.options.batch_size) for size in self.sizes)

    @property
    def total_steps(self) -> int:
        """Updates in all."""
        steps = self.options.epochs * self.steps_per_epoch
        return min(steps, self.options.max_steps or steps)

    @property
    def epochs(self) -> int:
        """Passes over the training data, of which `max_steps` may end the last early."""
        return -(-self.total_steps // self.steps_per_epoch)

    @functools.cached_property
    def order(self) -> np.ndarray:
        """`[total_steps]`: the lane of each step."""
        mix = mixture.parse(self.options.mixture)
        seed, steps = self.options.seed, self.steps_per_epoch
        epochs = [
            mix.order(self.sizes, steps, seed=seed, epoch=epoch) for epoch in range(self.epochs)
        ]
        return np.concatenate(epochs)[: self.total_steps]

    def evaluates(self, epoch: int) -> bool:
        """Whether the model is evaluated after an epoch: evenly often, and after the last."""
        every = -(-self.epochs // (self.options.max_evaluations or self.epochs))
        return (epoch + 1) % every == 0 or epoch + 1 == self.epochs

    def steps_of(self, epoch: int) -> int:
        """Updates in an epoch."""
        return min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)

    def examples_before(self, batch: int) -> int:
        """Examples in the first batches of an epoch, but for what the last of a task may lack."""
        return min(batch * self.options.batch_size, sum(self.sizes))

    def steps_of_learner(self, learner: Learner) -> int:
        """Updates of one learner in all."""
        return int(np.isin(self.order, learner.lanes).sum())

    def folder(self, lane: TaskRun) -> Path:
        """Where the results of a task go."""
        return self.options.output_dir / lane.name if self.is_mixture else self.options.output_dir


def prepare(options: FitOptions, *, like: Job | None = None, num_devices: int | None = None) -> Job:
    """Reads and checks task, tokenizer, backbone and method.

    Args:
      options: of the command line.
      like: a run of the same task on the same backbone, whose arrays of the backbone it shares.
      num_devices: over which a batch is divided; by default all of them.

    Raises:
      ValueError, OSError: for input that does not fit; nothing has been written.
    """
    _check_batch_size(options, num_devices or jax.local_device_count())
    mixture.parse(options.mixture)
    names = task_names(options)
    if like is None:
        _check_fit(options)
    lanes: list[TaskRun] = []
    for name in names:
        known = like.lanes[0].backbone if like else lanes[0].backbone if lanes else None
        lanes.append(_lane(name, options, lanes[0] if lanes else None, known, say=like is None))
    if options.adapters == "per_task" or len(lanes) == 1:
        learners = [
            Learner(lane.name, (i,), lane.params, lane.labels, (lambda tree: tree,))
            for i, lane in enumerate(lanes)
        ]
    else:
        learners = [_joined(lanes)]
    return Job(options, tuple(lanes), tuple(learners))


def _check_fit(options: FitOptions) -> None:
    """ValueError if the method does not fit the backbone; neither data nor weights are read."""
    config = read_config(options.backbone)
    # Nothing of it depends on the number of labels, which the data tells.
    module = module_from_config(config, **head_arguments(options.backbone, 2))
    shapes.check_fit(module, options.method_config(), config, options.max_length)


def task_names(options: FitOptions) -> list[str]:
    """The tasks of a run; ValueError if their names, or the files given, do not go together."""
    names = [name.strip() for name in options.task.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(
            f"--task {options.task!r} must be different names with commas between them"
        )
    files = (options.train_file, options.validation_file, options.test_file)
    if len(names) > 1 and any(files):
        raise ValueError("files are those of one task; leave --train-file and the like out")
    return names


def _lane(
    name: str,
    options: FitOptions,
    first: TaskRun | None,
    known: cj.Backbone | None,
    *,
    say: bool,
) -> TaskRun:
    """One task; its arrays are those of the first, its backbone's those known, where they are."""
    task = tasks.load_task(
        name,
        regression=options.regression,
        **tasks.sources(options),
    )
    check_options(task, options)
    if options.train_size is not None:
        sample = tasks.subsample(task.splits["train"], options.train_size, options.seed)
        task = dataclasses.replace(task, splits={**task.splits, "train": sample})
    if say:
        say_all(task.notices())
    # On the host: what goes to the devices may be divided among them, and of another dtype.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        lane = _loaded_lane(task, options, first, known)
    if say:
        say_all(lane.objective.notices())
    return lane


def _loaded_lane(
    task: tasks.Task, options: FitOptions, first: TaskRun | None, known: cj.Backbone | None
) -> TaskRun:
    load = functools.partial(
        cj.load_backbone,
        options.backbone,
        **head_arguments(options.backbone, task.num_labels, task.kind),
        dropout_rate=options.backbone_dropout,
        dtype=jnp.dtype(options.dtype),
        remat=options.remat,
    )
    backbone = load(seed=options.seed)
    if known is not None:
        backbone = dataclasses.replace(backbone, params=_shared(backbone.params, known.params))
    tokenizer = adapter.load_tokenizer(options.backbone, backbone, options.max_length)
    method = _method(options, task, tokenizer)
    model = cj.Adapted(backbone.module, method)
    objective = for_task(task, options, model, tokenizer)
    params = cj.init_adapters(model, backbone, jax.random.key(options.seed))
    if options.composition is not None:
        params = compositions.with_saved(
            options.composition, model, params, backbone, options.backbone
        )
    options.peak_learning_rate(objective.learning_rates)  # which must be there
    if first is not None:
        params = _shared(params, first.params)
    encoded = objective.encode_all(task.splits)
    for split, examples in encoded.items():
        say_all(examples.notices(split))
    labels = cj.label_params(params, method)
    if frozen := _new_paths(backbone, labels, FREEZE):
        # As whoever loads the adapter draws them: they are not saved, but in the hash by which it
        # knows its backbone.
        drawn = load().params
        params = _with_leaves(params, drawn, frozen)
        own = _with_leaves(backbone.params, drawn, frozen)
        backbone = dataclasses.replace(backbone, params=own)
    if known is None:
        _say_new(backbone, labels)
    return TaskRun(task, objective, encoded, backbone, model, params, labels)


def say_all(lines: Sequence[str]) -> None:
    """Prints lines, on the first host alone."""
    if lines and distributed.is_first():
        print("\n".join(lines), flush=True)


def _new_paths(backbone: cj.Backbone, labels: Any, label: str) -> list[str]:
    """What the backbone's checkpoint lacks and has this label."""
    label_of = flatten_dict(labels, sep="/")
    return [path for path in backbone.new_parameters if label_of.get(path) == label]


def _with_leaves(params: Any, others: Any, paths: Sequence[str]) -> Any:
    """`params` with the leaves of others at these paths."""
    flat, other = flatten_dict(params, sep="/"), flatten_dict(others, sep="/")
    return unflatten_dict(flat | {path: other[path] for path in paths}, sep="/")


def _say_new(backbone: cj.Backbone, labels: Any) -> None:
    """Prints what the backbone's checkpoint lacks and is made here: as a rule a head to train."""
    labels_in_words = {TRAIN: "new, and trained here", FREEZE: "drawn at random, and not trained"}
    for label, words in labels_in_words.items():
        paths = _new_paths(backbone, labels, label)
        if paths and distributed.is_first():
            print(f"{backbone.name} does not have {', '.join(paths)}: {words}")


def _method(options: FitOptions, task: tasks.Task, tokenizer: Any) -> MethodConfig:
    method = options.method_config()
    if options.backbone_dtype == "int8" and (method.trains_backbone or method.moves_backbone):
        raise ValueError(
            f"--backbone-dtype int8 is for weights that stay as they are, and --method "
            f"{options.method} changes all of them; use bfloat16"
        )
    shared = len(task_names(options)) > 1 and options.adapters == "shared"
    if shared and method.needs_token_ids() and options.prompt_words is None:
        raise ValueError(
            "prompts that several tasks share start from words for all of them; give "
            "--prompt-words, or --adapters per_task"
        )
    return prompt_init.with_tokens(method, options.prompt_words, task, tokenizer)


def _shared(params: Any, first: Any) -> Any:
    """`params` with the arrays of `first` where both have them, but for the head."""
    known = flatten_dict(first, sep="/")

    def choose(path: str, leaf: Any) -> Any:
        own = group_of(path) == "head" or known.get(path, leaf).shape != leaf.shape
        return leaf if own else known.get(path, leaf)

    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: choose(path, leaf) for path, leaf in flat.items()}, sep="/")


def _joined(lanes: Sequence[TaskRun]) -> Learner:
    """One adapter for several tasks, each with a head of its own."""
    params: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    views = []
    for lane in lanes:
        own_labels = flatten_dict(lane.labels, sep="/")
        places = {}
        for path, leaf in flatten_dict(lane.params, sep="/").items():
            place = _own(path, lane.name) if group_of(path) == "head" else path
            if place in params and params[place].shape != leaf.shape:
                raise ValueError(
                    f"the tasks {lanes[0].name} and {lane.name} cannot share an adapter: {path} is "
                    f"{params[place].shape} of one and {leaf.shape} of the other; use --adapters "
                    "per_task"
                )
            params.setdefault(place, leaf)
            labels.setdefault(place, own_labels[path])
            places[path] = place
        views.append(functools.partial(_view, places))
    return Learner(
        "+".join(lane.name for lane in lanes),
        tuple(range(len(lanes))),
        unflatten_dict(params, sep="/"),
        unflatten_dict(labels, sep="/"),
        tuple(views),
    )


def _own(path: str, task: str) -> str:
    """Where a mixture keeps a parameter that the task has of its own; it stays in its group."""
    top, _, rest = path.partition("/")
    return f"{top}/{task}/{rest}"


def _view(places: Mapping[str, str], tree: Any) -> Any:
    """Of a tree the leaves at `places`, path -> where it is."""
    flat = flatten_dict(tree, sep="/")
    return unflatten_dict({path: flat[place] for path, place in places.items()}, sep="/")


def _check_batch_size(options: FitOptions, per_host: int) -> None:
    """Batches are divided among hosts, their devices, or the rows of the mesh, and parts."""
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
