"""Command `plan`: the cost of a run, without its data or weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pyarrow.parquet as pq

import compacter_jax as cj
from compacter_jax.methods.base import MethodConfig
from compacter_jax.models.families import family_of_module
from compacter_jax.models.family import DropoutRate
from compacter_jax.models.loading import known_pooling, module_from_name
from compacter_jax.models.pooling import Pooling
from train import tasks
from train.compute import flops as compute_flops
from train.compute import memory as compute_memory
from train.compute import mesh as compute_mesh
from train.compute import step
from train.compute.program import gradient_program
from train.data import batching
from train.estimate.options import PlanOptions
from train.objectives import with_classifier

# Task -> training examples on the hub, as GLUE (arXiv:1804.07461), SuperGLUE (arXiv:1905.00537),
# SQuAD (arXiv:1606.05250) and WMT publish them; ReCoRD has one for each answer, as for T5.
_EXAMPLES = {
    "cola": 8_551,
    "sst2": 67_349,
    "mrpc": 3_668,
    "qqp": 363_846,
    "stsb": 5_749,
    "mnli": 392_702,
    "qnli": 104_743,
    "rte": 2_490,
    "wnli": 635,
    "boolq": 9_427,
    "cb": 250,
    "copa": 400,
    "multirc": 27_243,
    "record": 138_854,
    "wic": 5_428,
    "wsc": 554,
    "squad": 87_599,
    "wmt16-ro-en": 610_320,
}
# Size from which on a data set is large, and the number of examples that --split-protocol paper
# holds out of a large one with a single validation split.
_LARGE, _HELD_OUT = 10_000, 1_000
_HALVED = ("mnli", "multirc")  # two validation splits; a small set of 5,100 questions
_LABELS = {"mnli": 3, "cb": 3, "stsb": 1}
# The longest label of a benchmark, not_entailment, has six tokens.
_LABEL_LENGTH = 8
PARTS = {
    "frozen": "frozen weights",
    "trained": "trained parameters",
    "optimizer": "optimizer",
    "batch": "batch",
    "gradients": "gradients",
    "activations": "activations",
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """Everything that determines the program of a step, except the values of its arrays.

    Attributes:
      backbone: the published name or the path of a configuration.
      method: the method to train.
      num_labels: the number of outputs of an encoder's head.
      rows: the number of rows on one device.
      length: the length of the longest inputs, in tokens, or in frames of speech.
      target_length: the length of the longest targets of a decoder.
      dtype: the dtype of the computation.
      backbone_dtype: the dtype of the frozen weights.
      remat: the recomputation, as for `fit`.
      mesh: axis -> number of devices, over which frozen weights are divided.
      accumulation_steps: the number of parts into which the rows are divided.
      dropout_rate: the dropout rate, in place of the configuration's.
      pooling: the pooling of an encoder's head.
    """

    backbone: str
    method: MethodConfig
    num_labels: int
    rows: int
    length: int
    target_length: int
    dtype: str
    backbone_dtype: str
    remat: str
    mesh: tuple[tuple[str, int], ...]
    accumulation_steps: int
    dropout_rate: DropoutRate | None
    pooling: Pooling = "first"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a step on one device, at the longest lengths.

    Attributes:
      trained: the number of trained parameters.
      total: the number of all parameters.
      adapter_bytes: the bytes of a saved adapter, without its names.
      flops: the floating-point operations.
      memory: the memory at its peak.
      cache_bytes: the bytes of keys and values in generation; 0 without a decoder.
    """

    trained: int
    total: int
    adapter_bytes: int
    flops: int
    memory: compute_memory.Memory
    cache_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Cost of a run on one task.

    Attributes:
      task: the name of the task.
      train_examples: the number of training examples.
      epochs: the number of passes over them.
      steps: the number of updates.
      input_lengths: the lengths that inputs are padded to.
      unit: what these lengths count, "tokens", or "frames" of speech.
      target_lengths: the lengths that targets are padded to; empty without a decoder.
      workload: the workload of a step.
      cost: the cost of a step.
      seconds: the time of all steps, if every batch had the longest length; None if the peak is not
        known.
    """

    task: str
    train_examples: int
    epochs: int
    steps: int
    input_lengths: tuple[int, ...]
    unit: str
    target_lengths: tuple[int, ...]
    workload: Workload
    cost: Cost
    seconds: float | None

    @property
    def programs(self) -> int:
        """Maximum number of steps with different shapes, each of which is compiled once."""
        return len(self.input_lengths) * max(1, len(self.target_lengths))

    @property
    def total_flops(self) -> int:
        """FLOPs of all steps on one device, if every batch had the longest length."""
        return self.steps * self.cost.flops


def plan(each: Sequence[PlanOptions]) -> None:
    """Runs the command `plan` for the options of each task.

    Raises:
      ValueError: for invalid options, or a task whose size is not known.
    """
    plans = [plan_of(options) for options in each]
    if each[0].json:
        print(json.dumps([_to_json(one) for one in plans], indent=2))
    else:
        print("\n".join(_text(plans, each[0])))


def plan_of(options: PlanOptions) -> Plan:
    """Returns the plan of a run on one task; raises the errors of `plan`."""
    options.check()
    if options.embedding_loss is not None:
        raise ValueError(
            "plan counts the steps of a classifier or of text to text, not those of embeddings; "
            "leave --embedding-loss out"
        )
    module = module_from_name(options.backbone)
    writes_text = family_of_module(module).writes_text
    workload = _workload(options, writes_text)
    cost = cost_of(workload)
    examples = train_examples(options, writes_text)
    steps = options.epochs * batching.num_batches(examples, options.batch_size)
    steps = min(steps, options.max_steps or steps)
    peak = peak_of(options)
    seconds = None if peak is None else steps * cost.flops / (peak * options.utilisation)
    longest = workload.target_length
    targets = batching.bucket_lengths(longest, batching.TARGETS) if writes_text else ()
    reads_frames = module.dummy_inputs()[0].ndim > 2
    multiple = batching.FRAMES if reads_frames else batching.TOKENS
    return Plan(
        task=options.task,
        train_examples=examples,
        epochs=options.epochs,
        steps=steps,
        input_lengths=batching.bucket_lengths(options.max_length, multiple),
        unit="frames" if reads_frames else "tokens",
        target_lengths=targets,
        workload=workload,
        cost=cost,
        seconds=seconds,
    )


def train_examples(options: PlanOptions, text_to_text: bool) -> int:
    """Returns the number of training examples: known, counted, or given by the options.

    Raises:
      ValueError: for other tasks if `train_size` is not given.
    """
    name, protocol = options.task, options.split_protocol
    if name in tasks.BUILT_IN:
        known = pq.read_metadata(tasks.SENTIMENT / name / "train.parquet").num_rows
    elif name in _EXAMPLES and (text_to_text or name != "record"):
        known = _EXAMPLES[name]
        if protocol == "paper" and known >= _LARGE and name not in _HALVED:
            known -= _HELD_OUT
        if name == "copa" and not text_to_text:
            known *= 2  # an encoder reads one of the two sentences at a time
    elif options.train_size is None:
        raise ValueError(
            f"the number of training examples of {name!r} is not known; give --train-size, or one "
            f"of the tasks {', '.join((*tasks.BUILT_IN, *_EXAMPLES))}"
        )
    else:
        return options.train_size
    return min(known, options.train_size or known)


def peak_of(options: PlanOptions) -> float | None:
    """Returns the FLOP/s of one device, as given or by its kind; None if neither is given.

    Raises:
      ValueError: for an unknown kind.
    """
    if options.peak_flops is not None or options.device_kind is None:
        return options.peak_flops
    peak = compute_flops.peak(options.device_kind, options.dtype)
    if peak is None:
        raise ValueError(
            f"the peak FLOP/s of {options.device_kind!r} in {options.dtype} are not known; give "
            f"--peak-flops, or one of {', '.join(compute_flops.known_devices())}"
        )
    return peak


def _workload(options: PlanOptions, text_to_text: bool) -> Workload:
    sizes = compute_mesh.parse(options.mesh) if options.mesh else {}
    rows_of_devices = sizes.get(compute_mesh.DATA, options.devices)
    parts = rows_of_devices * options.accumulation_steps
    if options.batch_size % parts:
        raise ValueError(
            f"batch_size={options.batch_size} must be a multiple of {parts} ({rows_of_devices} "
            f"devices that share it x {options.accumulation_steps} accumulation steps)"
        )
    benchmark = tasks.find(options.task)
    labelled = options.task in tasks.BUILT_IN or options.regression
    if benchmark is not None:
        labelled = benchmark.wanted == "label"
    longest = options.max_target_length
    return Workload(
        backbone=options.backbone,
        method=options.method_config(),
        num_labels=0 if text_to_text else 1 if options.regression else _LABELS.get(options.task, 2),
        rows=options.batch_size // rows_of_devices,
        length=options.max_length,
        target_length=(min(longest, _LABEL_LENGTH) if labelled else longest) * text_to_text,
        dtype=options.dtype,
        backbone_dtype=options.backbone_dtype,
        remat=options.remat,
        mesh=tuple(sizes.items()),
        accumulation_steps=options.accumulation_steps,
        dropout_rate=options.backbone_dropout,
        pooling=options.pooling or known_pooling(options.backbone) or "first",
    )


@functools.cache  # the tasks of a benchmark share a workload
def cost_of(workload: Workload) -> Cost:
    """Traces the step and returns its cost; raises the errors of `compacter_jax.Adapted`."""
    model = model_of(workload)
    family = family_of_module(model.backbone)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.backbone.dummy_inputs())["params"]
    labels = cj.label_params(shapes, model.method)
    trained, frozen = cj.partition(shapes, labels)
    frozen = jax.eval_shape(lambda half: cj.cast_frozen(half, workload.backbone_dtype), frozen)
    loss = step.loss_function("tokens" if family.writes_text else "classification")
    tx = cj.optimizer(optax.adamw(1e-3), labels)

    def traced(model: Any) -> Any:
        apply = step.apply_function(model, family.inputs)
        part = batch_of(workload, workload.rows // workload.accumulation_steps)
        return gradient_program(apply, loss, trained, frozen, part)

    program, unrepeated = traced(model), compute_flops.without_remat(model)
    repeats = unrepeated.backbone.remat != model.backbone.remat
    count = cj.count(shapes, labels)
    parts = compute_memory.of_step(
        program,
        trained,
        frozen,
        batch_of(workload, workload.rows),
        tx,
        accumulation_steps=workload.accumulation_steps,
    )
    if workload.mesh:
        parts = dataclasses.replace(
            parts, frozen=compute_mesh.bytes_of_part(frozen, dict(workload.mesh))
        )
    return Cost(
        trained=count.trained,
        total=count.total,
        adapter_bytes=compute_memory.size(trained),
        # Each product is divided over the devices along `model`.
        flops=workload.accumulation_steps
        * compute_flops.of_step(traced(unrepeated) if repeats else program)
        // dict(workload.mesh).get(compute_mesh.MODEL, 1),
        memory=parts,
        cache_bytes=compute_memory.of_cache(
            model, shapes, workload.rows, workload.length, workload.target_length
        ),
    )


def model_of(workload: Workload) -> cj.Adapted:
    """Returns the adapted module."""
    module = module_from_name(workload.backbone)
    attributes: dict[str, Any] = {"dtype": jnp.dtype(workload.dtype), "remat": workload.remat}
    family = family_of_module(module)
    if not family.writes_text:
        module = with_classifier(module, workload.num_labels, workload.pooling)
    if workload.dropout_rate is not None:
        module = family.with_dropout(module, workload.dropout_rate)
    return cj.Adapted(module.clone(**attributes), workload.method)


def batch_of(workload: Workload, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch of `train.data.batching.batches` with the longest lengths."""
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    batch = {"weights": jax.ShapeDtypeStruct((rows,), jnp.float32)}
    module = module_from_name(workload.backbone)
    source, mask = family_of_module(module).inputs[:2]
    batch[mask] = integers((rows, workload.length))
    # One row of `dummy_inputs` says what else a position of the source has, such as features.
    one = module.dummy_inputs()[0]
    batch[source] = jax.ShapeDtypeStruct((rows, workload.length, *one.shape[2:]), one.dtype)
    if workload.target_length:
        targets = ("decoder_input_ids", "labels")
        return batch | {name: integers((rows, workload.target_length)) for name in targets}
    return batch | {
        "token_type_ids": integers((rows, workload.length)),
        "labels": integers((rows,)),
    }


def _to_json(one: Plan) -> dict[str, Any]:
    values = dataclasses.asdict(one)
    values["workload"].pop("method")
    values["cost"]["memory"]["total"] = one.cost.memory.total
    return values | {"programs": one.programs, "total_flops": one.total_flops}


def _text(plans: Sequence[Plan], options: PlanOptions) -> list[str]:
    """Returns the lines for the console: a table of tasks, then each workload of a step."""
    lines = [f"{options.method} on {options.backbone}", "", *_task_table(plans)]
    for workload in dict.fromkeys(one.workload for one in plans):
        lines += [
            "",
            *_workload_lines(workload, [one for one in plans if one.workload == workload]),
        ]
    lines.append("")
    if (peak := peak_of(options)) is None:
        lines.append("time: unknown; give --device-kind or --peak-flops")
    else:
        seconds = sum(one.seconds or 0 for one in plans)
        lines.append(
            f"time: {_duration(seconds)} in total, if every batch had the maximum length and the "
            f"run reached {options.utilisation:.0%} of {peak:.3g} FLOP/s (--utilisation); "
            "evaluation and compilation are not included"
        )
    return lines


def _task_table(plans: Sequence[Plan]) -> list[str]:
    header = ["task", "training examples", "epochs", "steps", "FLOPs of a device", "time"]
    rows = [
        [
            one.task,
            f"{one.train_examples:,}",
            f"{one.epochs}",
            f"{one.steps:,}",
            f"{one.total_flops:.3g}",
            "" if one.seconds is None else _duration(one.seconds),
        ]
        for one in plans
    ]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in (header, *rows)
    ]


def _workload_lines(workload: Workload, plans: Sequence[Plan]) -> list[str]:
    cost, one = plans[0].cost, plans[0]
    of_cache = f"  keys and values in generation take {cost.cache_bytes:,} bytes for these rows"
    cached = [of_cache] if cost.cache_bytes else []
    targets = f", targets to {_listed(one.target_lengths)} tokens" if one.target_lengths else ""
    lines = [
        f"{', '.join(plan.task for plan in plans)}: {workload.rows} rows on each device, computed "
        f"in {workload.dtype}, remat {workload.remat}, {cost.flops:.3g} FLOPs for a step of the "
        "maximum length",
        f"  compiled for inputs padded to {_listed(one.input_lengths)} {one.unit}{targets}: "
        f"{one.programs} programs at most, and further programs for evaluation",
        f"  trained {cost.trained:,} of {cost.total:,} parameters "
        f"({100 * cost.trained / cost.total:.3f} %); the adapter takes about "
        f"{cost.adapter_bytes:,} bytes",
        *cached,
        "  memory of a device, in MB"
        + (
            ", with activations counted as if `model` did not divide them:"
            if workload.mesh
            else ":"
        ),
    ]
    values = {**dataclasses.asdict(cost.memory), "total": cost.memory.total}
    for name, value in values.items():
        lines.append(f"    {PARTS.get(name, name):<20}{value / 1e6:>12,.1f}")
    return lines


def _listed(lengths: Sequence[int]) -> str:
    return ", ".join(map(str, lengths))


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
