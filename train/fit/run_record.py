"""The record of a run, run.json: settings, hashes of inputs, and what the run writes."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from compacter_jax.files import read_json
from compacter_jax.messages import listing, quote
from train import report
from train.fingerprints import Fingerprints
from train.fit.options import FitOptions
from train.folders import LOCK_NAME
from train.tasks import ON_TEXT

RUN_NAME, GRID_NAME = "run.json", "grid.json"


FORMAT_VERSION = 1


# Files that `compare` writes into the folder of a run before the run begins.
FLAGS_NAME, OUTPUT_NAME = "flags.json", "fit.log"


# Names of the files that a run writes into each of its subfolders, and into the folder itself.
# Other files there belong to somebody else.
IN_FOLDERS = {
    # Removed first, since a half-removed run must not be resumed.
    "checkpoints": re.compile(r"\d+(\.(orbax-checkpoint-tmp|unreadable).*)?"),
    "adapter": re.compile(
        r"adapter_config\.json|adapter(-[0-9a-f]{16})?\.safetensors|\.adapter.*\.tmp"
        r"|\.adapter_saving\.json"
    ),
    "backbone": re.compile(
        r"(config|generation_config|special_tokens_map|added_tokens|preprocessor_config)\.json|model.*\.safetensors"
        r"|model\.safetensors\.index\.json|tokenizer.*|vocab.*|merges\.txt|.*\.model|.*\.jinja"
    ),
    "tensorboard": re.compile(r"events\.out\.tfevents\..*"),
    "profile": re.compile(r"plugins"),
}


# The predictions on the test split.
PREDICTIONS_NAME = "test_predictions.jsonl"


FILES = (
    *("metrics.json", PREDICTIONS_NAME),
    *("report.md", "curves.png", "log.png", "log.csv", "evaluations.csv"),
)


# Settings that may differ between an interrupted run and the run that resumes it.
_NOT_RUN = (
    *("output_dir", "config", "resume", "overwrite", "checkpoint_steps", "keep_checkpoints"),
    *("log", "profile", "peak_flops"),
    # The number of devices matters, and is checked; their division among processes does not.
    *("distributed", "coordinator_address", "num_processes", "process_id"),
)


# Fields of run.json beside the settings. Runs from before versions were recorded have none.
_OF_RECORD = {
    "format_version": int,
    "run_id": str,
    "inputs": dict[str, dict[str, dict[str, Any]]],
    "writes": list[str],
}


# Settings by which a record without a version is recognised as that of a run.
_ALWAYS_THERE = ("backbone", "task", "method", "seed", "epochs", "batch_size")
# Files that a folder may hold and still counts as empty: locks, remnants of a process that was
# killed before it wrote the record, files of `compare`, and files of the operating system.
NOTHING = re.compile(
    rf"{re.escape(LOCK_NAME)}|\.runs\.lock|\.(run|grid|compare)\.json\..*\.tmp"
    rf"|{FLAGS_NAME}|{OUTPUT_NAME}|\.DS_Store|lost\+found"
)


@dataclasses.dataclass(frozen=True)
class Record:
    """Content of a `run.json`.

    Attributes:
      settings: setting -> value, for the settings that a resumed run must share.
      run_id: the id that every checkpoint of the run repeats; None for a run of a version without
        ids.
      inputs: the hashes of the input files, as `train.fingerprints` computes them.
      writes: the names of the run's outputs, relative to its folder.
    """

    settings: dict[str, Any]
    run_id: str | None
    inputs: Fingerprints
    writes: tuple[str, ...]


def read_record(folder: Path) -> Record | None:
    """Reads the `run.json` of a folder; returns None if there is none.

    Raises:
      ValueError: if the file is damaged, is not the record of a run, or has a newer version.
      OSError: if it cannot be read.
    """
    path = folder / RUN_NAME
    if not path.exists() and not path.is_symlink():
        return None
    try:
        found = read_json(path, _OF_RECORD, required=_ALWAYS_THERE, what="the record of a run")
        return _record_of(path, found)
    except ValueError as error:
        raise ValueError(
            f"{error}; choose another --output-dir, or remove {folder} yourself"
        ) from None


def _record_of(path: Path, found: dict[str, Any]) -> Record:
    settings = {name: value for name, value in found.items() if name not in _OF_RECORD}
    possible = written(settings, None)
    version = found.get("format_version")
    if version is None:
        if len(settings.keys() & defaults().keys()) < len(defaults()) // 3:
            raise ValueError(f"{path} is not the record of a run: it lacks most settings")
        return Record(settings, None, {}, possible)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {quote(version)}, but this version of the package reads "
            f"{FORMAT_VERSION}; use the version that wrote it"
        )
    if missing := [name for name in _OF_RECORD if name not in found]:
        raise ValueError(f"{path} is not the record of a run: it has no {listing(missing)}")
    # --overwrite removes these names, so that names which no run writes are ignored.
    extra = {"profile", *(f"{prefix}backbone" for prefix in _task_prefixes(settings))}
    writes = tuple(name for name in found["writes"] if name in {*possible, *extra})
    return Record(settings, found["run_id"], found["inputs"], writes)


def write_record(folder: Path, record: Record) -> None:
    """Writes the record of a run, beside what the run itself says of its settings."""
    own = {
        "format_version": FORMAT_VERSION,
        "run_id": record.run_id,
        "inputs": record.inputs,
        "writes": list(record.writes),
    }
    report.write_json(folder / RUN_NAME, {**record.settings, **own})


def _task_prefixes(settings: Mapping[str, Any]) -> list[str]:
    """Returns, for each task of a run, the prefix of the names of its outputs."""
    if settings.get("adapters") in ("per_direction", "per_target"):
        return ["", *(f"{name}/" for name in _member_names(settings))]
    names = [name.strip() for name in str(settings["task"]).split(",")]
    plain = [name for name in names if re.fullmatch(r"\w[\w.-]*", name)]
    return [f"{name}/" for name in plain] if len(names) > 1 else [""]


def _member_names(settings: Mapping[str, Any]) -> list[str]:
    """Returns the names of the folders of adapters, that of each target also for a direction."""
    if settings.get("add_to") is not None:
        return []
    names = str(settings.get("directions") or "").split(",")
    if settings["adapters"] == "per_target":
        # A hyphen may be in the name of a language; the names that no run writes do no harm.
        # Of speech, a direction is a language.
        ends = [name[i + 1 :] for name in names for i, c in enumerate(name) if c == "-"]
        names = [*names, *ends]
    plain = (name for name in dict.fromkeys(names) if re.fullmatch(r"\w[\w.-]*", name))
    return list(plain)


def written(settings: Mapping[str, Any], options: FitOptions | None) -> tuple[str, ...]:
    """Returns the names of the outputs of a run.

    Args:
      settings: the settings in its record.
      options: the options of the command line; None if they are unknown, for all names that the run
        may have written.
    """
    prefixes = _task_prefixes(settings)
    names = ["checkpoints", *FILES]
    if options is None or options.log == "tensorboard":
        names.append("tensorboard")
    if options is not None and options.profile:
        names.append("profile")
    of_task = ["adapter", "metrics.json", PREDICTIONS_NAME, "report.md", "curves.png"]
    makes_backbone = settings["task"] in ON_TEXT or settings.get("directions")
    if settings["method"] in ("full", "head-only") and makes_backbone:
        of_task.append("backbone")
    names += [f"{prefix}{name}" for prefix in prefixes for name in of_task]
    return tuple(dict.fromkeys(names))


def run_settings(options: FitOptions) -> dict[str, Any]:
    """Returns the settings that a resumed run must share with the run it resumes, JSON-ready."""
    values = dataclasses.asdict(options)
    method_options = values.pop("method_options")
    values = {key: value for key, value in values.items() if key not in _NOT_RUN}
    values |= {f"method_{key}": v for key, v in method_options.items() if v is not None}
    values["num_devices"] = jax.device_count()
    return json.loads(json.dumps(values, default=str))


@functools.cache
def defaults() -> dict[str, Any]:
    """Returns field -> default as in JSON, for the options that have a default."""
    fields = dataclasses.fields(FitOptions)
    found = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return json.loads(json.dumps(found, default=str))


def possibly_written(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the outputs that a run with these `task` and `method` may have."""
    return written(settings, None)


def entries(folder: Path) -> list[str]:
    """Returns the sorted names in a folder, except for files that do not count.

    Raises:
      ValueError: if it is not a folder. A folder that does not exist is empty.
    """
    if not folder.exists() and not folder.is_symlink():
        return []
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; choose another --output-dir")
    return sorted(p.name for p in folder.iterdir() if not NOTHING.fullmatch(p.name))
