"""Output folder of a run: its record, its contents, and who may write to it.

`run.json` identifies the run in the folder: it has the settings, a random id that every checkpoint
repeats, hashes of the input files, and the names of the outputs. Nothing but these outputs is ever
removed or replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax

from compacter_jax.files import expanded, is_there, read_json
from compacter_jax.messages import listing, quote
from train import report
from train.fingerprints import Fingerprints, Inputs, changes, files_read, fingerprints
from train.fit.options import FitOptions
from train.folders import LOCK_NAME, alone
from train.tasks import SPAN_CORRUPTION

RUN_NAME, GRID_NAME = "run.json", "grid.json"
FORMAT_VERSION = 1
# Files that `compare` writes into the folder of a run before the run begins.
FLAGS_NAME, OUTPUT_NAME = "flags.json", "fit.log"
# Names of the files that a run writes into each of its subfolders, and into the folder itself.
# Other files there belong to somebody else.
_IN_FOLDERS = {
    # Removed first, since a half-removed run must not be resumed.
    "checkpoints": re.compile(r"\d+(\.(orbax-checkpoint-tmp|unreadable).*)?"),
    "adapter": re.compile(
        r"adapter_config\.json|adapter(-[0-9a-f]{16})?\.safetensors|\.adapter.*\.tmp"
        r"|\.adapter_saving\.json"
    ),
    "backbone": re.compile(
        r"(config|generation_config|special_tokens_map|added_tokens)\.json|model.*\.safetensors"
        r"|model\.safetensors\.index\.json|tokenizer.*|vocab.*|merges\.txt|.*\.model|.*\.jinja"
    ),
    "tensorboard": re.compile(r"events\.out\.tfevents\..*"),
    "profile": re.compile(r"plugins"),
}
_FILES = ("metrics.json", "report.md", "curves.png", "log.png", "log.csv", "evaluations.csv")
# Files that a folder may hold and still counts as empty: locks, remnants of a process that was
# killed before it wrote the record, files of `compare`, and files of the operating system.
_NOTHING = re.compile(
    rf"{re.escape(LOCK_NAME)}|\.runs\.lock|\.(run|grid|compare)\.json\..*\.tmp"
    rf"|{FLAGS_NAME}|{OUTPUT_NAME}|\.DS_Store|lost\+found"
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


class RunFolder:
    """Output folder of a run, locked against other processes; a context manager.

    On entry the folder is checked, and locked if it holds a run. `open` then makes it the folder of
    this run.

    Args:
      options: the options of the run.

    Raises:
      ValueError: on entry, as `check_run_folder`, or if another process works in the folder.
    """

    def __init__(self, options: FitOptions):
        self._options = options
        self._held = contextlib.ExitStack()
        self._locked = False

    def __enter__(self) -> Self:
        with self._held:
            if read_record(self._options.output_dir) is not None:
                self._lock()
            check_run_folder(self._options)
            self._held = self._held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def open(self) -> None:
        """Makes the folder this run's own, as `open_run`, after a second check.

        Raises:
          ValueError, OSError: as on entry, or if the folder cannot be written.
        """
        self._options.output_dir.mkdir(parents=True, exist_ok=True)
        if not self._locked:
            self._lock()
        check_run_folder(self._options, inputs_are_whole=True)
        open_run(self._options)

    def _lock(self) -> None:
        self._held.enter_context(alone(self._options.output_dir))
        self._locked = True


def check_run_folder(options: FitOptions, *, inputs_are_whole: bool = False) -> None:
    """Checks the output folder without writing anything.

    Args:
      options: the options of the run.
      inputs_are_whole: whether the inputs from the hub have been downloaded.

    Raises:
      ValueError: if the folder holds a run and neither `resume` nor `overwrite` is set; if it is
        not empty and holds no run; if the run to resume has other settings or other input files; or
        if an output of the run already exists that no run has written.
      OSError: if the folder cannot be read.
    """
    folder = options.output_dir
    record = read_record(folder)
    if record is None:
        _check_empty(options)
        return
    if not (options.resume or options.overwrite):
        raise ValueError(
            f"{folder} already holds a run; go on with --resume, replace it with --overwrite, or "
            "choose another --output-dir"
        )
    settings, inputs = _run_settings(options), files_read(options)
    writes = _written(settings, options)
    if options.resume:
        _check_settings(folder, record, settings)
        _check_inputs(folder, record, inputs, whole=inputs_are_whole or _is_local(options))
    for name in writes:
        path = folder / name
        if name == "profile" and record.run_id is None:  # an old record does not list it
            continue
        if name not in record.writes and (path.exists() or path.is_symlink()):
            raise ValueError(
                f"{path} is in the way: the run in {folder} did not write it; move it, or choose "
                "another --output-dir"
            )
    _check_kinds(folder, {*record.writes, *writes}, links=options.resume)
    owned = [] if options.resume else list(_owned(folder, record.writes))
    check_apart([*owned, *(folder / name for name in writes)], inputs)


def open_run(options: FitOptions) -> None:
    """Makes the output folder this run's own: removes the previous run and writes `run.json`.

    Raises:
      OSError: if something cannot be removed or written; the message names it.
    """
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    settings = _run_settings(options)
    writes = _written(settings, options)
    before = read_record(folder)
    if options.resume and before is not None:
        added = [name for name in writes if name not in before.writes]
        if added and before.run_id is not None:
            _write_record(folder, dataclasses.replace(before, writes=(*before.writes, *added)))
        return
    _remove_grid(folder)
    if before is not None:
        clear(folder, before.writes)
    inputs = fingerprints(files_read(options))
    _write_record(folder, Record(settings, secrets.token_hex(16), inputs, writes))


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
    possible = _written(settings, None)
    version = found.get("format_version")
    if version is None:
        if len(settings.keys() & _defaults().keys()) < len(_defaults()) // 3:
            raise ValueError(f"{path} is not the record of a run: it lacks most settings")
        return Record(settings, None, {}, possible)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} is of format_version {quote(version)}, and this version of the package reads "
            f"{FORMAT_VERSION}"
        )
    if missing := [name for name in _OF_RECORD if name not in found]:
        raise ValueError(f"{path} is not the record of a run: it has no {listing(missing)}")
    # --overwrite removes these names, so that names which no run writes are ignored.
    extra = {"profile", *(f"{prefix}backbone" for prefix in _task_prefixes(settings))}
    writes = tuple(name for name in found["writes"] if name in {*possible, *extra})
    return Record(settings, found["run_id"], found["inputs"], writes)


def _write_record(folder: Path, record: Record) -> None:
    own = {
        "format_version": FORMAT_VERSION,
        "run_id": record.run_id,
        "inputs": record.inputs,
        "writes": list(record.writes),
    }
    report.write_json(folder / RUN_NAME, {**record.settings, **own})


def _task_prefixes(settings: Mapping[str, Any]) -> list[str]:
    """Returns, for each task of a run, the prefix of the names of its outputs."""
    names = [name.strip() for name in str(settings["task"]).split(",")]
    plain = [name for name in names if re.fullmatch(r"\w[\w.-]*", name)]
    return [f"{name}/" for name in plain] if len(names) > 1 else [""]


def _written(settings: Mapping[str, Any], options: FitOptions | None) -> tuple[str, ...]:
    """Returns the names of the outputs of a run.

    Args:
      settings: the settings in its record.
      options: the options of the command line; None if they are unknown, for all names that the run
        may have written.
    """
    prefixes = _task_prefixes(settings)
    names = ["checkpoints", *_FILES]
    if options is None or options.log == "tensorboard":
        names.append("tensorboard")
    if options is not None and options.profile:
        names.append("profile")
    of_task = ["adapter", "metrics.json", "report.md", "curves.png"]
    if settings["method"] == "full" and settings["task"] == SPAN_CORRUPTION:
        of_task.append("backbone")
    names += [f"{prefix}{name}" for prefix in prefixes for name in of_task]
    return tuple(dict.fromkeys(names))


def _run_settings(options: FitOptions) -> dict[str, Any]:
    """Returns the settings that a resumed run must share with the run it resumes, JSON-ready."""
    values = dataclasses.asdict(options)
    method_options = values.pop("method_options")
    values = {key: value for key, value in values.items() if key not in _NOT_RUN}
    values |= {f"method_{key}": v for key, v in method_options.items() if v is not None}
    values["num_devices"] = jax.device_count()
    return json.loads(json.dumps(values, default=str))


@functools.cache
def _defaults() -> dict[str, Any]:
    """Returns field -> default, for the options that have a default."""
    fields = dataclasses.fields(FitOptions)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


# --- checks -------------------------------------------------------------------------------------


def _check_empty(options: FitOptions) -> None:
    """Raises ValueError if a folder without a run has files, except for a grid to be replaced."""
    folder = options.output_dir
    _check_place(folder)
    others = entries(folder)
    if not others:
        return
    if holds_grid(folder):
        if not options.overwrite:
            raise ValueError(
                f"{folder} holds the metrics.json of several runs, which that of a single run "
                "would replace; choose another --output-dir, or replace it with --overwrite"
            )
        names = {name.split("/")[0] for name in _written(_run_settings(options), options)}
        others = [name for name in others if name in names and name not in _OF_GRID]
    if others:
        raise ValueError(
            f"{folder} is not empty and holds no run of fit ({listing(others, 3)}); nothing there "
            "is touched, with --overwrite or --resume neither: choose another --output-dir, or "
            "move the files away"
        )


def _check_place(folder: Path) -> None:
    """Checks that a folder exists or can presumably be created.

    Raises:
      ValueError: if a file is in its place.
      OSError: if the folder, or its nearest existing parent, cannot be written.
    """
    place = next((path for path in (folder, *folder.parents) if path.exists()), Path())
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder; choose another --output-dir")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "cannot be written to", str(place))


def entries(folder: Path) -> list[str]:
    """Returns the sorted names in a folder, except for files that do not count.

    Raises:
      ValueError: if it is not a folder. A folder that does not exist is empty.
    """
    if not folder.exists() and not folder.is_symlink():
        return []
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; choose another --output-dir")
    return sorted(p.name for p in folder.iterdir() if not _NOTHING.fullmatch(p.name))


def _check_settings(folder: Path, record: Record, settings: Mapping[str, Any]) -> None:
    # A run from before an option existed behaved as the default of the option.
    before = {**_defaults(), **record.settings}
    before.setdefault("num_devices", settings["num_devices"])
    ours = settings.keys() | record.settings.keys()
    changed = [
        f"{name} was {quote(before.get(name), 60)}, now {quote(settings.get(name), 60)}"
        for name in sorted(ours)
        if not _equal(before.get(name), settings.get(name))
    ]
    if changed:
        raise ValueError(
            f"the run in {folder} has other settings: {listing(changed, 3, 150)}; resume with the "
            "same, or start anew with --overwrite"
        )


def _equal(before: Any, now: Any) -> bool:
    """Returns True if two values of a setting are the same; True and 1 are different."""
    return before == now and isinstance(before, bool) == isinstance(now, bool)


def _is_local(options: FitOptions) -> bool:
    folder = expanded(options.backbone)
    return is_there(folder) and folder.is_dir()


def _check_inputs(folder: Path, record: Record, inputs: Inputs, *, whole: bool) -> None:
    if changed := changes(record.inputs, fingerprints(inputs), whole=whole):
        raise ValueError(
            f"the run in {folder} was begun with other data, or another backbone: "
            f"{listing(changed, 2, 120)}; put back what it began with, or start anew with "
            "--overwrite"
        )


def _check_kinds(folder: Path, writes: Iterable[str], *, links: bool) -> None:
    """Raises ValueError if a file is in the place of a folder of the run, or the reverse.

    Args:
      folder: the folder of the run.
      writes: the names of its outputs.
      links: whether a folder may be a link to one; the target of a link is never removed.
    """
    for name in writes:
        path = folder / name
        # The backbone folder is replaced as a whole.
        followed = links and path.is_dir() and path.name in _IN_FOLDERS and path.name != "backbone"
        if path.is_symlink() and not followed:
            raise _is_link(path)
        if path.parent != folder and path.parent.is_symlink() and not links:
            raise _is_link(path.parent)
        wants_folder = path.name in _IN_FOLDERS
        if path.exists() and path.is_dir() != wants_folder:
            kind = "a file, not a folder" if wants_folder else "a folder, not a file"
            raise ValueError(f"{path} is {kind}; move it, or choose another --output-dir")


def check_apart(written: Sequence[Path], inputs: Inputs) -> None:
    """Checks that no input file lies where something is written or removed.

    Raises:
      ValueError: if one does; the message names both paths.
    """
    places = {path.resolve() for path in written}
    for flag, files in inputs.items():
        for file in files.values():
            resolved = file.resolve()
            if found := places & {resolved, *resolved.parents}:
                raise ValueError(
                    f"{flag}: {file} lies in {found.pop()}, which the run writes; move it, or "
                    "choose another --output-dir"
                )


# --- removing -----------------------------------------------------------------------------------


def clear(folder: Path, writes: Iterable[str]) -> None:
    """Removes the outputs of a run, checkpoints first, and nothing else; keeps the record.

    Args:
      folder: the folder of the run.
      writes: the names of the outputs, as in `Record`.

    Raises:
      ValueError: if an output is a link, whose target is never removed; then nothing is removed.
      OSError: if something cannot be removed.
    """
    writes = list(writes)
    _check_kinds(folder, writes, links=False)
    for path in list(_owned(folder, writes)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    places = [folder / name for name in writes]
    for place in (*places, *(place.parent for place in places)):
        if place != folder and place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def bytes_removed(options: FitOptions) -> int:
    """Returns the number of bytes of the previous run that `open_run` is going to remove."""
    record = read_record(options.output_dir) if options.overwrite else None
    owned = _owned(options.output_dir, record.writes) if record is not None else ()
    files = (file for path in owned for file in (path, *path.rglob("*")))
    return sum(file.stat().st_size for file in files if file.is_file())


def possibly_written(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the outputs that a run with these `task` and `method` may have."""
    return _written(settings, None)


def _owned(folder: Path, writes: Iterable[str]) -> Iterator[Path]:
    """Yields the existing files of a run, and the folders of its checkpoints.

    Raises:
      ValueError: if one of them is a link.
    """
    order = [*_IN_FOLDERS, *_FILES]
    for name in sorted(writes, key=lambda name: order.index(Path(name).name)):
        path = folder / name
        if path.name in _IN_FOLDERS:
            children = sorted(path.iterdir()) if path.is_dir() else []
            found = [child for child in children if _IN_FOLDERS[path.name].fullmatch(child.name)]
        else:
            found = [path] if path.exists() else []
        # Temporary files that a killed process had not renamed.
        found += sorted(path.parent.glob(f".{path.name}.*.tmp"))
        for each in found:
            if each.is_symlink():
                raise _is_link(each)
        yield from found


def _is_link(path: Path) -> ValueError:
    return ValueError(
        f"{path} is a link, and nothing behind a link is removed or replaced; remove the link, and "
        "what it points to, yourself, or choose another --output-dir"
    )


def check_only_ours(folder: Path) -> None:
    """Checks that a folder that a run replaces as a whole has only files that runs write there.

    Raises:
      ValueError: if it has another file; the message names it.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    foreign = [name for name in names if not _IN_FOLDERS[folder.name].fullmatch(name)]
    if foreign:
        raise ValueError(
            f"{folder} holds {listing(foreign, 3)}, which no run has written; move it, then go on "
            "with --resume"
        )


# --- several runs -------------------------------------------------------------------------------

_OF_GRID = ("metrics.json", "report.md", GRID_NAME)


def check_grid_folder(folder: Path, runs: Iterable[str]) -> None:
    """Checks the folder of several runs without writing anything; each run checks its own folder.

    Args:
      folder: the folder of the grid.
      runs: the names of the runs.

    Raises:
      ValueError: if the folder holds a single run, or is not empty and holds no runs.
    """
    if (folder / RUN_NAME).exists():
        raise ValueError(
            f"{folder} holds a single run, whose results those of several would replace; choose "
            "another --output-dir"
        )
    there = entries(folder)
    if holds_grid(folder) or not there:
        return
    runs = set(runs)
    known = [name for name in there if (folder / name / RUN_NAME).is_file() or name in runs]
    # A grid of a version that recorded no grids may have no results yet.
    if known and not set(_OF_GRID) & set(there):
        return
    raise ValueError(
        f"{folder} is not empty and holds no runs of fit ({listing(there, 3)}); nothing there is "
        "touched, with --overwrite or --resume neither: choose another --output-dir"
    )


def open_grid(folder: Path) -> None:
    """Records that a folder holds several runs, so that its results may be replaced."""
    report.write_json(folder / GRID_NAME, {"format_version": FORMAT_VERSION})


def holds_grid(folder: Path) -> bool:
    """Returns True if the metrics.json and report.md of a folder belong to several runs.

    Raises:
      ValueError, OSError: if the file that records this is damaged or cannot be read.
    """
    if (folder / GRID_NAME).is_file():
        read_json(folder / GRID_NAME, {"format_version": int}, required=["format_version"])
        return True
    results = folder / "metrics.json"
    if not results.is_file():
        return False
    try:
        found = read_json(results)
    except ValueError:
        return False
    return {"runs", "summary", "failed"} <= found.keys()


def _remove_grid(folder: Path) -> None:
    """Removes the results of several runs, but not the runs themselves."""
    if holds_grid(folder):
        for name in _OF_GRID:
            (folder / name).unlink(missing_ok=True)
