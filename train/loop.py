"""The command `fit`: data, steps, evaluation, checkpoints, report."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

import compacter_jax as cj
from compacter_jax.config import FullFineTuningConfig
from compacter_jax.params import Count
from train import data, inference, measure, prompts, report, step, tasks
from train.errors import InterruptedRunError, NonFiniteLossError
from train.objective import Objective, check_options, for_task, head_arguments
from train.options import FitOptions

RUN_NAME = "run.json"
# What may differ between an interrupted run and the one that resumes it.
_NOT_RUN = ("output_dir", "config", "resume", "overwrite", "checkpoint_steps")


@dataclasses.dataclass
class Progress:
    """Where a run stands; together with `step.TrainState` all that resuming needs.

    Attributes:
      epoch: the epoch under way.
      batch: its next batch.
      losses: of the steps since the last evaluation.
      seconds: spent on them.
      step_seconds: of single steps, the last ones.
      best_epoch: number of the best epoch that was evaluated, -1 before the first.
      best: its validation metric.
      history: a record of every evaluation.
    """

    epoch: int = 0
    batch: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    best_epoch: int = -1
    best: float = -math.inf
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything `fit` has read and checked before it writes anything."""

    options: FitOptions
    task: tasks.Task
    objective: Objective
    encoded: dict[str, data.Examples]
    backbone: cj.Backbone
    model: cj.Adapted
    params: Any
    labels: Any

    @property
    def learning_rate(self) -> float:
        """Peak of the schedule."""
        return self.options.peak_learning_rate(self.objective.learning_rates)

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one pass over the training data."""
        return data.num_batches(len(self.encoded["train"]), self.options.batch_size)

    @property
    def total_steps(self) -> int:
        """Updates in all."""
        steps = self.options.epochs * self.steps_per_epoch
        return min(steps, self.options.max_steps or steps)

    @property
    def epochs(self) -> int:
        """Passes over the training data, of which `max_steps` may end the last early."""
        return -(-self.total_steps // self.steps_per_epoch)

    def evaluates(self, epoch: int) -> bool:
        """Whether the model is evaluated after an epoch: evenly often, and after the last."""
        every = -(-self.epochs // (self.options.max_evaluations or self.epochs))
        return (epoch + 1) % every == 0 or epoch + 1 == self.epochs

    def steps_of(self, epoch: int) -> int:
        """Updates in an epoch."""
        return min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)

    def examples_before(self, batch: int) -> int:
        """Examples in the first batches of an epoch, but for what the last may lack."""
        return min(batch * self.options.batch_size, len(self.encoded["train"]))


def fit(options: FitOptions) -> dict[str, Any]:
    """Fine-tunes, keeps the best epoch's adapter, evaluates it, reports; returns `metrics.json`.

    Raises:
      ValueError, OSError: for input that does not fit, before anything is written.
      NonFiniteLossError: names the step; the last checkpoint stays.
      InterruptedRunError: after a signal; `resume` goes on from there, to the same bits.
    """
    started = time.perf_counter()
    options.check()
    check_run_folder(options)
    job = prepare(options)
    count = cj.count(job.params, job.labels)
    print(report.parameter_table(count, job.model.method), flush=True)
    open_run(options)
    trainer = Trainer(job)
    with trainer.checkpoints:
        progress = trainer.run()
    result = _final_result(trainer, progress, count)
    result["measured"] = measure.cost(progress.step_seconds, started)
    inference.write_json(options.output_dir / "metrics.json", result)
    if _makes_backbone(job):
        write_backbone(trainer)
    report.plot_curves(result, options.output_dir / "curves.png")
    report.write_report(result, options, job.model.method, count, options.output_dir / "report.md")
    print(report.result_text(result, options.output_dir))
    return result


def prepare(options: FitOptions) -> Job:
    """Reads and checks task, tokenizer, backbone and method."""
    method = options.method_config()
    _check_batch_size(options)
    task = tasks.load_task(
        options.task,
        regression=options.regression,
        train_file=options.train_file,
        validation_file=options.validation_file,
        test_file=options.test_file,
    )
    check_options(task, options)
    if options.train_size is not None:
        sample = tasks.subsample(task.splits["train"], options.train_size, options.seed)
        task = dataclasses.replace(task, splits={**task.splits, "train": sample})
    backbone = cj.load_backbone(
        options.backbone,
        **head_arguments(options.backbone, task.num_labels),
        dropout_rate=options.backbone_dropout,
        dtype=jnp.dtype(options.dtype),
        remat=options.remat,
        seed=options.seed,
    )
    tokenizer = inference.load_tokenizer(options.backbone, backbone, options.max_length)
    method = prompts.with_tokens(method, options.prompt_words, task, tokenizer)
    model = cj.Adapted(backbone.module, method)
    objective = for_task(task, options, model, tokenizer)
    params = cj.init_adapters(model, backbone, jax.random.key(options.seed))
    encoded = objective.encode_all(task.splits)
    for split, examples in encoded.items():
        for line in examples.notices(split):
            print(line)
    labels = cj.label_params(params, method)
    return Job(options, task, objective, encoded, backbone, model, params, labels)


def check_run_folder(options: FitOptions) -> None:
    """Looks at the output folder, and writes nothing.

    Raises:
      ValueError: if it holds a run already and neither `resume` nor `overwrite` is set, or the run
        to resume has other settings.
    """
    folder, settings = options.output_dir, _run_settings(options)
    run_file = folder / RUN_NAME
    if not run_file.exists() or options.overwrite:
        return
    if not options.resume:
        raise ValueError(
            f"{folder} already holds a run; go on with --resume, replace it with --overwrite, or "
            "choose another --output-dir"
        )
    saved = json.loads(run_file.read_text(encoding="utf-8"))
    changed = [
        f"{name} was {saved.get(name)!r}, now {settings.get(name)!r}"
        for name in sorted(saved.keys() | settings.keys())
        if saved.get(name) != settings.get(name)
    ]
    if changed:
        raise ValueError(
            f"the run in {folder} has other settings: {'; '.join(changed)}; resume with the same, "
            "or start anew with --overwrite"
        )


def open_run(options: FitOptions) -> None:
    """Makes the output folder this run's own; OSError if it cannot be written."""
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if options.resume and (folder / RUN_NAME).exists():
        return
    # Only what a run writes: the folder may hold other things of the user's.
    for name in ("adapter", "backbone", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.json", "curves.png", "report.md", RUN_NAME):
        (folder / name).unlink(missing_ok=True)
    inference.write_json(folder / RUN_NAME, _run_settings(options))


class Trainer:
    """Runs the epochs of a job; `run` may start anywhere, from a checkpoint."""

    def __init__(self, job: Job):
        self.job, self.options = job, job.options
        options = job.options
        self.schedule = step.linear_schedule(
            job.learning_rate, round(options.warmup_fraction * job.total_steps), job.total_steps
        )
        adamw = optax.adamw(self.schedule, weight_decay=options.weight_decay)
        if options.clip_norm:
            adamw = optax.chain(optax.clip_by_global_norm(options.clip_norm), adamw)
        trained, frozen = cj.partition(job.params, job.labels)
        self.compute = step.make_compute(
            job.objective.apply,
            job.objective.loss,
            cj.optimizer(adamw, job.labels),
            outputs=job.objective.outputs,
            seed=options.seed,
            accumulation_steps=options.accumulation_steps,
        )
        self.frozen = self.compute.place(frozen)
        self.state = self.compute.init_state(trained)
        self.progress = Progress()
        self.clock = measure.StepClock(self.progress.step_seconds)
        self.checkpoints = ocp.CheckpointManager(
            (options.output_dir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, enable_async_checkpointing=False, create=True
            ),
        )

    def run(self) -> Progress:
        """Trains until the last epoch is done; returns the history."""
        if self.options.resume:
            self._restore()
        with _stop_requested() as stop:
            while self.progress.epoch < self.job.epochs:
                self._train_epoch(stop)
                self._finish_epoch()
        return self.progress

    def _train_epoch(self, stop: list[str]) -> None:
        """The batches of this epoch from the next one on."""
        options, progress = self.options, self.progress
        started, seconds = time.perf_counter(), progress.seconds
        steps = self.job.steps_of(progress.epoch)
        batches = data.batches(
            self.job.encoded["train"].of_epoch(progress.epoch),
            options.batch_size,
            shuffle=True,
            seed=options.seed,
            epoch=progress.epoch,
            start=progress.batch,
        )
        pending: step.StepMetrics | None = None
        self.clock.start()
        with self._bar() as bar:
            for batch in itertools.islice(batches, steps - progress.batch):
                self.state, current = self.compute.step(self.state, self.frozen, batch)
                self.clock.dispatched(batch)
                # Reading a loss waits for it: read the last one, while this step computes.
                self._note(pending, bar)
                pending = current
                progress.batch += 1
                bar.update(int((batch["indices"] >= 0).sum()))
                if progress.batch < steps and (stop or self._checkpoint_due()):
                    self._note(pending, bar)
                    pending = None
                    progress.seconds = seconds + time.perf_counter() - started
                    self._save()
                    self.clock.start()
                    if stop:
                        raise InterruptedRunError(
                            f"{stop[0]} at step {self._step_number()}; the training state is in "
                            f"{options.output_dir / 'checkpoints'}, go on with --resume"
                        )
            self._note(pending, bar)
        progress.seconds = seconds + time.perf_counter() - started

    def _bar(self) -> Any:
        """The progress bar of this epoch."""
        progress, job = self.progress, self.job
        bar = tqdm(
            total=job.examples_before(job.steps_of(progress.epoch)),
            initial=job.examples_before(progress.batch),
            desc=f"epoch {progress.epoch + 1}/{job.epochs}",
            unit="ex",
            # A log file wants a line now and then, a person a bar that moves.
            mininterval=0.2 if sys.stderr.isatty() else 20,
        )
        if not progress.history:
            bar.set_postfix_str("compiling for each new length of input")
        return bar

    def _checkpoint_due(self) -> bool:
        every = self.options.checkpoint_steps
        return every > 0 and self._step_number() % every == 0

    def _step_number(self) -> int:
        number = self.progress.epoch * self.job.steps_per_epoch + self.progress.batch
        return min(number, self.job.total_steps)

    def _note(self, pending: step.StepMetrics | None, bar: Any) -> None:
        """Records the metrics of the step before; NonFiniteLossError if they are not numbers."""
        if pending is None:
            return
        loss, norm = float(pending.loss), float(pending.gradient_norm)
        self.clock.finished()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            latest = self.checkpoints.latest_step()
            kept = (
                "no checkpoint had been written"
                if latest is None
                else (f"the checkpoint of step {latest} is kept")
            )
            raise NonFiniteLossError(
                f"step {self._step_number()}: loss {loss}, gradient norm {norm}; {kept}. Try a "
                "smaller --learning-rate, more --warmup-fraction, or --dtype float32"
            )
        self.progress.losses.append(loss)
        bar.set_postfix(loss=f"{np.mean(self.progress.losses[-20:]):.4f}", refresh=False)

    def _finish_epoch(self) -> None:
        """Moves on to the next epoch, after an evaluation and a checkpoint where they are due."""
        progress = self.progress
        evaluates = self.job.evaluates(progress.epoch)
        if evaluates:
            self._evaluate()
        progress.epoch, progress.batch = progress.epoch + 1, 0
        if evaluates or self._checkpoint_due():
            self._save()

    def _evaluate(self) -> None:
        """Validates, and keeps the adapter if it is the best."""
        progress, job = self.progress, self.job
        since = progress.history[-1]["epoch"] if progress.history else 0
        examples = (progress.epoch - since) * len(job.encoded["train"])
        examples += job.examples_before(progress.batch)
        values = self.scores("validation", self.state.trained, self.frozen)
        validation_loss = values.pop("loss")
        progress.history.append(
            {
                "epoch": progress.epoch + 1,
                "train_loss": float(np.mean(progress.losses)),
                "validation_loss": validation_loss,
                **values,
                "examples_per_second": examples / progress.seconds,
                "step_losses": _thinned(progress.losses),
            }
        )
        name = job.task.metric
        invalid = f", {values['invalid']} invalid" if values.get("invalid") else ""
        tqdm.write(
            f"epoch {progress.epoch + 1}: train loss {np.mean(progress.losses):.4f}, "
            f"validation loss {validation_loss:.4f}, {name} {values[name]:.4f}{invalid}"
        )
        if values[name] > progress.best:
            progress.best, progress.best_epoch = values[name], progress.epoch + 1
            self._save_adapter()
        progress.losses, progress.seconds = [], 0.0

    def outputs(self, split: str, trained: Any, frozen: Any) -> Any:
        """Outputs of a split, `[examples, …]` arrays; both halves placed on the devices."""
        return inference.split_outputs(
            lambda batch: self.compute.outputs(trained, frozen, batch),
            self.job.encoded[split].of_epoch(0),
            self.options.eval_batch_size,
            description=split,
        )

    def scores(self, split: str, trained: Any, frozen: Any) -> dict[str, float]:
        """Metrics and loss of a split."""
        outputs = self.outputs(split, trained, frozen)
        return self.job.objective.scores(outputs, self.job.encoded[split].of_epoch(0))

    def _save_adapter(self) -> None:
        job, options = self.job, self.options
        trained = jax.device_get(self.compute.host_state(self.state).trained)
        _, frozen = cj.partition(job.params, job.labels)
        cj.save_adapter(
            options.output_dir / "adapter",
            job.model,
            jax.tree.map(jnp.asarray, cj.merge(trained, frozen)),
            metadata={
                "backbone": job.backbone.name,
                "dtype": options.dtype,
                "task": job.task.name,
                "kind": job.task.kind,
                "label_names": list(job.task.label_names),
                "max_length": options.max_length,
                **job.objective.settings,
            },
        )

    def _save(self) -> None:
        self.checkpoints.save(
            self._step_number(),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(self.compute.host_state(self.state)._asdict()),
                progress=ocp.args.JsonSave(dataclasses.asdict(self.progress)),
            ),
            force=True,
        )

    def _restore(self) -> None:
        """Takes up the latest checkpoint, if there is one."""
        latest = self.checkpoints.latest_step()
        if latest is None:
            print("no checkpoint to resume from; starting from the beginning")
            return
        host = self.compute.host_state(self.state)
        restored = self.checkpoints.restore(
            latest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(host._asdict()), progress=ocp.args.JsonRestore()
            ),
        )
        self.state = self.compute.place_state(step.TrainState(**restored.state))
        self.progress = Progress(**restored.progress)
        self.clock = measure.StepClock(self.progress.step_seconds)
        print(f"resumed at step {latest}, epoch {self.progress.epoch + 1}")


def _thinned(losses: list[float], most: int = 50) -> list[float]:
    """Means of consecutive losses, at most `most` of them: what a curve can show."""
    parts = np.array_split(np.array(losses), min(most, len(losses)))
    return [float(part.mean()) for part in parts]


@contextmanager
def _stop_requested() -> Iterator[list[str]]:
    """Collects SIGINT and SIGTERM, to be answered between steps; a second SIGINT is at once."""
    caught: list[str] = []

    def note(number: int, _: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append("interrupted" if number == signal.SIGINT else "terminated")
        tqdm.write("stopping after this step")

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _check_batch_size(options: FitOptions) -> None:
    devices = jax.local_device_count()
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


def _run_settings(options: FitOptions) -> dict[str, Any]:
    """What a resumed run must share with the run it resumes, as JSON-ready values."""
    values = dataclasses.asdict(options)
    method_options = values.pop("method_options")
    values = {key: value for key, value in values.items() if key not in _NOT_RUN}
    values |= {f"method_{key}": v for key, v in method_options.items() if v is not None}
    values["num_devices"] = jax.local_device_count()
    return json.loads(json.dumps(values, default=str))


def write_backbone(trainer: Trainer) -> None:
    """Writes the best epoch of full fine-tuning as a checkpoint that `--backbone` takes."""
    job, folder = trainer.job, trainer.options.output_dir
    _, params = cj.load_adapter(folder / "adapter", job.backbone)
    target, temporary = folder / "backbone", folder / ".backbone.tmp"
    for path in (target, temporary):
        shutil.rmtree(path, ignore_errors=True)
    cj.save_backbone(temporary, job.backbone.module, params, job.backbone.config)
    job.objective.tokenizer.save_pretrained(temporary)
    temporary.rename(target)


def _makes_backbone(job: Job) -> bool:
    """Whether what was trained is a backbone for other tasks: pre-training of all of it."""
    full = isinstance(job.model.method, FullFineTuningConfig)
    return full and job.task.kind == "span_corruption"


def _final_result(trainer: Trainer, progress: Progress, count: Count) -> dict[str, Any]:
    """Evaluates the best adapter as it was written to disk."""
    job, options = trainer.job, trainer.options
    folder = options.output_dir / "adapter"
    _, params = cj.load_adapter(folder, job.backbone)
    trained, frozen = map(trainer.compute.place, cj.partition(params, job.labels))
    scores: dict[str, dict[str, float]] = {}
    for split in ("validation", "test"):
        if split in job.encoded:
            scores[split] = trainer.scores(split, trained, frozen)
    return {
        "task": job.task.name,
        "kind": job.task.kind,
        "metric": job.task.metric,
        "method": options.method,
        "objective": job.objective.settings,
        "learning_rate": job.learning_rate,
        "seed": options.seed,
        "train_examples": len(job.encoded["train"]),
        "steps": job.total_steps,
        "best_epoch": progress.best_epoch,
        **scores,
        "trained_parameters": count.trained,
        "total_parameters": count.total,
        "trained_groups": {group: trained for group, (trained, _) in count.groups.items()},
        "adapter_bytes": sum(f.stat().st_size for f in Path(folder).iterdir()),
        "history": progress.history,
    }
