"""The training loop of one compiled step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Generator, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import compacter_jax as cj
from train import report
from train.compute import compilation_cache, distributed, flops, step
from train.compute import outputs as compute_outputs
from train.compute.compute import Compute
from train.data import batching
from train.errors import NonFiniteLossError, StoppedRunError
from train.fit import logs, members, stopping, timing
from train.fit.checkpoints import Checkpoints
from train.fit.job import Job, TaskRun
from train.fit.learners import Training, trainings_of
from train.fit.options import FitOptions
from train.fit.profiler import Profiler
from train.fit.progress import PendingStep, Progress, thinned
from train.fit.run_record import read_record

# (Task index and batch of an update) -> the metrics of the update.
Steps: TypeAlias = Generator[tuple[int, batching.Batch], step.StepMetrics | None, None]


class Trainer:
    """Training loop over the epochs of a job; `run` may start from a checkpoint. A context manager.

    Attributes:
      job: the job to run.
      learners: the trained parameters, on the devices.
      progress: the position of the run.
    """

    def __init__(
        self, job: Job, stop: stopping.Stopping, *, name: str = "", like: Trainer | None = None
    ):
        """Places the parameters on the devices.

        Args:
          job: the job to run.
          stop: the source of requests to stop early.
          name: the name of the run among several that train at once, all on the first device.
          like: another of these runs, whose compiled functions and frozen arrays this run shares.
        """
        self.job, self.options, self._stop, self._name = job, job.options, stop, name
        self._placed: dict[int, Any] = {} if like is None else like._placed
        devices = jax.local_devices()[:1] if name else None
        computes = None if like is None else like.learners[0].computes
        self.learners: list[Training] = trainings_of(job, self._placed, computes, devices)
        self.progress = Progress()
        self._clock = timing.StepClock(self.progress.step_seconds)
        self._meters = [_meter(job.options, task_run) for task_run in job.task_runs]
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Trainer:
        folder = self.options.output_dir
        kept = self.options.keep_checkpoints
        record = read_record(folder)
        run_id = None if record is None else record.run_id
        self._checkpoints = self._resources.enter_context(
            Checkpoints(folder / "checkpoints", kept, run_id=run_id)
        )
        try:
            resumed_step = self._restore() if self.options.resume else 0
            self._log = self._resources.enter_context(
                logs.Log(
                    folder,
                    tensorboard=self.options.log == "tensorboard",
                    resume_step=resumed_step,
                    # Within an epoch, the evaluation at the end of the epoch is still to come.
                    evaluated=self.progress.batch == 0,
                    evaluations=max(map(len, self.progress.history.values()), default=0),
                )
            )
            self._profiler = self._resources.enter_context(
                Profiler(folder if self.options.profile else None)
            )
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(self, *details: Any) -> None:
        self._resources.__exit__(*details)

    def run(self) -> Progress:
        """Trains until the last epoch is done; returns the progress with its history."""
        with self._stop.delayed():
            steps = self.steps()
            metrics: step.StepMetrics | None = None  # a generator is first sent None
            while True:
                try:
                    index, batch = steps.send(metrics)
                except StopIteration:
                    return self.progress
                training, compute = self.of_task(index)
                with self._profiler.step(self._step_number() + 1):
                    training.state, metrics = compute.step(
                        training.state, training.frozen, batch, self.numbers(training)
                    )

    def steps(self) -> Steps:
        """Runs the loop without the updates, as a generator.

        The generator yields a task index and a batch, and is sent the metrics of the update. The
        caller updates the state of the task's learner in between.
        """
        while self.progress.epoch < self.job.epochs:
            if distributed.is_first():
                compilation_cache.announce_compilation()
            yield from self._train_epoch()
            self._finish_epoch()
        self._checkpoints.finish()
        if self._stop.asked(now=True):
            raise self._stopped()

    def _train_epoch(self) -> Steps:
        """Runs the batches of the current epoch, starting at the next one."""
        progress = self.progress
        started, seconds = time.perf_counter(), progress.seconds
        steps = self.job.steps_of(progress.epoch)
        first = progress.epoch * self.job.steps_per_epoch
        streams = [
            self._stream(index, first + progress.batch) for index in range(len(self.job.task_runs))
        ]
        pending: PendingStep | None = None
        self._clock.start()
        with self._bar() as bar:
            while progress.batch < steps:
                index = int(self.job.order[first + progress.batch])
                batch, examples = next(streams[index])
                current = yield from self._dispatch(index, batch)
                # Reading a loss waits for its step: the previous one is read during this step.
                self._note(pending, bar)
                pending = current
                progress.batch += 1
                progress.examples += examples
                bar.update(examples)
                stop = self._stop.asked()
                if progress.batch < steps and (stop or self._checkpoint_due()):
                    self._note(pending, bar)
                    pending = None
                    progress.seconds = seconds + time.perf_counter() - started
                    self._save()
                    if stop:
                        raise self._stopped()
                    self._clock.start()
            self._note(pending, bar)
        progress.seconds = seconds + time.perf_counter() - started

    def _stream(self, index: int, start: int) -> Iterator[tuple[batching.Batch, int]]:
        """Yields the batches of a task from a step of the run on.

        Each item is the part of the batch on this host, and the number of examples over all hosts.
        """
        options = self.options
        examples = self.job.task_runs[index].encoded["train"]
        per_epoch = batching.num_batches(len(examples), options.batch_size)
        epoch, batch = divmod(int(np.sum(self.job.order[:start] == index)), per_epoch)
        while True:
            rest = batching.batches(
                examples.of_epoch(epoch),
                options.batch_size,
                shuffle=True,
                seed=options.seed,
                epoch=epoch,
                start=batch,
                part=(distributed.index(), distributed.number()),
            )
            for number, part in enumerate(rest, batch):
                done = number * options.batch_size
                yield part, min(options.batch_size, len(examples) - done)
            epoch, batch = epoch + 1, 0

    def _dispatch(
        self, index: int, batch: batching.Batch
    ) -> Generator[tuple[int, batching.Batch], step.StepMetrics | None, PendingStep]:
        """Hands a step to the devices through the generator's caller; returns the pending step."""
        training, _ = self.of_task(index)
        number = self._step_number() + 1
        metrics = yield index, batch
        assert metrics is not None
        self._clock.dispatched(batch, index)
        learning_rate = float(training.schedule(training.steps))
        training.steps += 1
        return PendingStep(metrics, index, batch, number, learning_rate)

    def of_task(self, index: int) -> tuple[Training, Compute]:
        """Returns the learner of a task, and the functions compiled for the task."""
        training = next(t for t in self.learners if index in t.learner.task_indices)
        return training, training.computes[training.learner.task_indices.index(index)]

    def numbers(self, training: Training) -> step.Hyperparameters:
        """Returns the optimizer's hyperparameters for the next step of a learner."""
        return step.Hyperparameters(
            training.schedule(training.steps), self.options.weight_decay, self.options.clip_norm
        )

    def _bar(self) -> Any:
        """Builds the progress bar of the current epoch."""
        progress, job = self.progress, self.job
        bar = tqdm(
            total=job.examples_before(job.steps_of(progress.epoch)),
            initial=job.examples_before(progress.batch),
            desc=f"epoch {progress.epoch + 1}/{job.epochs}",
            unit="ex",
            # A terminal shows a moving bar; a log file needs a line only now and then.
            mininterval=0.2 if sys.stderr.isatty() else 20,
            disable=bool(self._name) or not distributed.is_first(),
        )
        if not progress.history:
            bar.set_postfix_str("compiling")
        return bar

    def _checkpoint_due(self) -> bool:
        every = self.options.checkpoint_steps
        return every > 0 and self._step_number() % every == 0

    def _step_number(self) -> int:
        number = self.progress.epoch * self.job.steps_per_epoch + self.progress.batch
        return min(number, self.job.total_steps)

    def _note(self, pending: PendingStep | None, bar: Any) -> None:
        """Records the metrics of the previous step.

        Raises:
          NonFiniteLossError: if the loss or the gradient norm is not finite.
        """
        if pending is None:
            return
        loss, norm = float(pending.metrics.loss), float(pending.metrics.gradient_norm)
        seconds = self._clock.finished()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            latest = self._checkpoints.latest()
            kept = (
                "no checkpoint was written before"
                if latest is None
                else (f"the checkpoint of step {latest} is kept")
            )
            raise NonFiniteLossError(
                f"step {pending.number}: loss {loss}, gradient norm {norm}; {kept}. Try a "
                "smaller --learning-rate, more --warmup-fraction, or --dtype float32"
            )
        losses = self.progress.losses.setdefault(self.job.task_runs[pending.task_index].name, [])
        losses.append(loss)
        self._log.step(
            pending.number,
            loss=loss,
            learning_rate=pending.learning_rate,
            gradient_norm=norm,
            examples_per_second=self.options.batch_size / seconds if seconds else None,
            model_flops_utilisation=(
                self._meters[pending.task_index].utilisation(pending.batch, seconds)
                if seconds
                else None
            ),
        )
        bar.set_postfix(loss=f"{np.mean(losses[-20:]):.4f}", refresh=False)

    def _finish_epoch(self) -> None:
        """Moves on to the next epoch, after an evaluation and a checkpoint where they are due."""
        progress = self.progress
        evaluates = self.job.evaluates(progress.epoch)
        best = self._evaluate() if evaluates else False
        progress.epoch, progress.batch = progress.epoch + 1, 0
        if evaluates or self._checkpoint_due():
            self._save(best=best)

    def _evaluate(self) -> bool:
        """Validates, and saves the adapters with a new best score; returns True if there is one."""
        progress = self.progress
        indices = range(len(self.job.task_runs))
        # All tasks are scored before any is recorded: an interrupted evaluation starts again.
        found = [self.scores(index, "validation", stops=True) for index in indices]
        scores = [self._record(index, values) for index, values in enumerate(found)]
        better = False
        for training in self.learners:
            learner = training.learner
            score = float(np.mean([scores[index] for index in learner.task_indices]))
            if score > progress.best.get(learner.name, -math.inf):
                progress.best[learner.name] = score
                progress.best_epoch[learner.name] = progress.epoch + 1
                self._save_adapters(training)
                better = True
        progress.losses, progress.examples, progress.seconds = {}, 0, 0.0
        return better

    def _record(self, index: int, values: dict[str, float]) -> float:
        """Records the validation metrics of a task; returns the one that selects the best epoch."""
        progress, task_run = self.progress, self.job.task_runs[index]
        validation_loss = values.pop("loss")
        losses = progress.losses.get(task_run.name, [])
        # A mixture may not have drawn a task since the last evaluation.
        train_loss = float(np.mean(losses)) if losses else None
        progress.history.setdefault(task_run.name, []).append(
            {
                "epoch": progress.epoch + 1,
                "train_loss": train_loss,
                "validation_loss": validation_loss,
                **values,
                "examples_per_second": progress.examples / progress.seconds,
                "step_losses": thinned(losses),
            }
        )
        split = f"{task_run.name}_validation" if self.job.is_mixture else "validation"
        self._log.evaluation(self._step_number(), split, {"loss": validation_loss, **values})
        name = task_run.task.metric
        if distributed.is_first():
            name_of = task_run.name if self.job.is_mixture else self._name
            task = f"{name_of}: " if name_of else ""
            invalid = f", {values['invalid']} invalid" if values.get("invalid") else ""
            tqdm.write(
                f"epoch {progress.epoch + 1}: {task}train loss {report.number(train_loss)}, "
                f"validation loss {validation_loss:.4f}, {name} {values[name]:.4f}{invalid}"
            )
        return values[name]

    def outputs(self, index: int, split: str, trained: Any = None, *, stops: bool = False) -> Any:
        """Computes the outputs of a split, `[examples, …]` arrays.

        Args:
          index: the index of the task.
          split: the split of the task.
          trained: the trained half of the task's parameters, on the devices; by default the current
            one.
          stops: whether a request to stop ends the run here, after a checkpoint is written.
        """
        training, compute = self.of_task(index)
        view = training.learner.views[training.learner.task_indices.index(index)]
        trained = view(training.state.trained) if trained is None else trained
        frozen = view(training.frozen)
        return compute_outputs.split_outputs(
            lambda batch: compute.outputs(trained, frozen, batch),
            self.job.task_runs[index].encoded[split].of_epoch(0),
            self.options.eval_batch_size,
            description=split,
            before_batch=self._check_stop if stops else None,
        )

    def scores(
        self, index: int, split: str, trained: Any = None, *, stops: bool = False
    ) -> dict[str, float]:
        """Computes metrics and loss of a split; the arguments are those of `outputs`."""
        outputs = self.outputs(index, split, trained, stops=stops)
        task_run = self.job.task_runs[index]
        return task_run.objective.scores(outputs, task_run.encoded[split].of_epoch(0))

    def _check_stop(self) -> None:
        """Stops within an evaluation if a stop was requested; the next run evaluates again."""
        if self._stop.asked():
            self._save()
            raise self._stopped()

    def _stopped(self) -> StoppedRunError:
        self._checkpoints.finish()
        return self._stop.error(
            f"at step {self._step_number()}; the training state is in "
            f"{self.options.output_dir / 'checkpoints'}, go on with --resume"
        )

    def _save_adapters(self, training: Training) -> None:
        learner = training.learner
        trained = training.host_state()["trained"]
        if not distributed.is_first():
            return
        _, frozen = cj.partition(learner.params, learner.labels)
        whole = jax.tree.map(jnp.asarray, cj.merge(trained, frozen))
        for i, view in zip(learner.task_indices, learner.views, strict=True):
            members.save(self.job, self.job.task_runs[i], view(whole))

    def _save(self, *, best: bool = False) -> None:
        self._log.flush()
        self._checkpoints.save(
            self._step_number(),
            {training.learner.name: training.host_state() for training in self.learners},
            dataclasses.asdict(self.progress),
            best=best,
        )

    def _restore(self) -> int:
        """Restores the latest checkpoint, if there is one; returns its step, else 0."""
        template = {training.learner.name: training.host_state() for training in self.learners}
        restored = self._checkpoints.restore(template, tqdm.write, Progress.from_json)
        self._stop.check()
        if restored is None:
            if distributed.is_first():
                print("there is no checkpoint to resume from; the run starts from the beginning")
            return 0
        for training in self.learners:
            state = step.TrainState(**restored.state[training.learner.name])
            training.steps = int(state.step)
            training.state = training.compute.place_state(state)
        self.progress = restored.progress
        self._clock = timing.StepClock(self.progress.step_seconds)
        if distributed.is_first():
            print(f"resumed at step {restored.step}, epoch {self.progress.epoch + 1}")
        return restored.step


def _meter(options: FitOptions, task_run: TaskRun) -> flops.Meter:
    """Builds the meter of model FLOP/s utilisation for the steps of a task."""
    objective: Any = task_run.objective
    peak = options.peak_flops or flops.peak(jax.local_devices()[0].device_kind, options.dtype)
    return flops.Meter(
        task_run.model,
        lambda model: dataclasses.replace(objective, model=model).apply,
        objective.loss,
        task_run.params,
        task_run.labels,
        peak=peak,
        devices=jax.local_device_count(),
    )
