"""Adapters of a run in their folders: one, or one for each member of a bank of directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compacter_jax as cj
from compacter_jax.catalogue import to_dict
from compacter_jax.compositions.bank import Bank
from compacter_jax.methods.base import MethodConfig
from train.inference.adapter import check_alike
from train.inference.folders import members_of as members_in
from train.objectives.to_languages import ToLanguages
from train.tasks import Task, multilingual, parallel

if TYPE_CHECKING:
    from train.fit.job import Job, TaskRun
    from train.fit.options import FitOptions
    from train.objectives import Objective


def banked(method: MethodConfig, task: Task, options: FitOptions) -> MethodConfig:
    """Returns the method, or the bank with a member for each direction or target language.

    Raises:
      ValueError: if a direction has no training row, or if the method cannot be in a bank, or does
        not fit the adapters of `add_to`.
    """
    _check_rows(task)
    names = parallel.members_of(task.directions, options.adapters)
    if names is None:
        return method
    if options.add_to is not None:
        wanted = {
            "method": to_dict(method),
            "kind": task.kind,
            "backbone": options.backbone,
            "max_length": options.max_length,
            "dtype": options.dtype,
            "backbone_dtype": options.backbone_dtype,
        }
        _check_beside(options.add_to, wanted, options, list(names))
    return Bank(method, size=len(names))


def _check_rows(task: Task) -> None:
    """Raises ValueError if a direction, which had a row in the file, has none left to train on."""
    if not task.directions:
        return
    there = set(multilingual.names_of(task.splits["train"]))
    if lacking := [each.name for each in task.directions if each.name not in there]:
        raise ValueError(
            f"no training row of {lacking[0]} is left; give a larger --train-size, or leave it out "
            "of --directions"
        )


def _check_beside(
    folder: Path, wanted: Mapping[str, Any], options: FitOptions, names: list[str]
) -> None:
    """Raises ValueError if members cannot be added to those in a folder.

    Args:
      folder: the folder.
      wanted: the settings that members must share.
      options: the options of the run.
      names: the names of the new members.
    """
    there = members_in(folder)
    if not there:
        raise ValueError(f"--add-to {folder} has no folders of adapters, such as en-de/adapter")
    for name in names:
        if name in there and not (options.resume or options.overwrite):
            raise ValueError(
                f"--add-to {folder} has an adapter {name} already, which is not replaced; leave "
                "it out of --directions, or give --overwrite"
            )
    for path in _others(there, names).values():
        saved = cj.read_adapter_config(path)
        for key, value in wanted.items():
            if saved.get(key) != value:
                raise ValueError(
                    f"adapters that are used together must share their {key}: {path} has "
                    f"{str(saved.get(key))!r:.200}, not {str(value)!r:.200}"
                )


def _others(there: Mapping[str, Path], names: Collection[str]) -> dict[str, Path]:
    """Returns name -> folder of the members that a run leaves as they are."""
    return {name: path for name, path in there.items() if name not in names}


def checked(objective: Objective, task: Task, options: FitOptions) -> Objective:
    """Returns an objective, after a check that it reads and writes as the members of `add_to` do.

    Raises:
      ValueError: if it does not, for all are loaded together.
    """
    if options.add_to is not None:
        ((kind, own),) = objective.settings.items()
        names = parallel.members_of(task.directions, options.adapters) or {}
        there = _others(members_in(options.add_to), names)
        saved = {name: cj.read_adapter_config(path)[kind] for name, path in there.items()}
        check_alike({**saved, "the new one": own})
    return objective


def folders(job: Job, task_run: TaskRun) -> dict[str, Path]:
    """Returns the name of each member -> the folder of its adapter; a shared one has no name."""
    names = parallel.members_of(task_run.task.directions, job.options.adapters)
    if names is None:
        return {"": job.folder(task_run) / "adapter"}
    base = job.options.add_to or job.folder(task_run)
    return {name: base / name / "adapter" for name in names}


def report(job: Job, task_run: TaskRun) -> dict[str, Any]:
    """Returns what results say of members: their names, and the folder that they were added to."""
    if not job.options.has_members:
        return {}
    there = job.options.add_to
    added = {} if there is None else {"added_to": str(there)}
    return {"adapters": list(folders(job, task_run)), **added}


def save(job: Job, task_run: TaskRun, params: Any) -> None:
    """Saves the adapter of a task; of a bank, each member as an adapter that loads alone.

    Args:
      job: the run.
      task_run: the task.
      params: the parameters of its model.
    """
    names = parallel.members_of(task_run.task.directions, job.options.adapters)
    for i, (name, folder) in enumerate(folders(job, task_run).items()):
        model, own, objective = task_run.model, params, task_run.objective
        if names is not None:
            model, own = cj.get_member(model, params, i)
            served = tuple(direction.name for direction in names[name])
            assert isinstance(objective, ToLanguages)
            objective = dataclasses.replace(objective, directions=served, members=None)
        metadata = {
            "backbone": task_run.backbone.name,
            "dtype": job.options.dtype,
            "backbone_dtype": job.options.backbone_dtype,
            "task": task_run.name,
            "kind": task_run.task.kind,
            "label_names": list(task_run.task.label_names),
            "max_length": job.options.max_length,
            **objective.settings,
        }
        folder.parent.mkdir(parents=True, exist_ok=True)
        cj.save_adapter(folder, model, own, metadata=metadata)


def load(job: Job, task_run: TaskRun) -> Any:
    """Returns the parameters of a task's model with the adapters that `save` wrote."""
    paths = list(folders(job, task_run).values())
    if isinstance(task_run.model.method, Bank):
        return cj.stack_adapters(paths, task_run.backbone)[1]
    return cj.load_adapter(paths[0], task_run.backbone)[1]


def bytes_on_disk(job: Job, task_run: TaskRun) -> int:
    """Returns the size of the adapters of a task."""
    files = (file for path in folders(job, task_run).values() for file in path.iterdir())
    return sum(file.stat().st_size for file in files)
