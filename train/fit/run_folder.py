"""Output folder of a run: its record, its contents, and who may write to it.

`run.json` identifies the run in the folder: it has the settings, a random id that every checkpoint
repeats, hashes of the input files, and the names of the outputs. Nothing but these outputs is ever
removed or replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from compacter_jax.files import expanded, is_there
from compacter_jax.messages import listing, quote
from train.fingerprints import Inputs, changes, files_read, fingerprints
from train.fit.grid_folder import OF_GRID, holds_grid, remove_grid
from train.fit.options import FitOptions
from train.fit.run_record import (
    FILES,
    IN_FOLDERS,
    Record,
    defaults,
    entries,
    read_record,
    run_settings,
    write_record,
    written,
)
from train.folders import alone


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
    settings, inputs = run_settings(options), files_read(options)
    writes = written(settings, options)
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
    settings = run_settings(options)
    writes = written(settings, options)
    before = read_record(folder)
    if options.resume and before is not None:
        added = [name for name in writes if name not in before.writes]
        if added and before.run_id is not None:
            write_record(folder, dataclasses.replace(before, writes=(*before.writes, *added)))
        return
    remove_grid(folder)
    if before is not None:
        clear(folder, before.writes)
    inputs = fingerprints(files_read(options))
    write_record(folder, Record(settings, secrets.token_hex(16), inputs, writes))


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
                f"{folder} holds the metrics.json of several runs, which a single run would "
                "replace; choose another --output-dir, or replace it with --overwrite"
            )
        names = {name.split("/")[0] for name in written(run_settings(options), options)}
        others = [name for name in others if name in names and name not in OF_GRID]
    if others:
        raise ValueError(
            f"{folder} is not empty and holds no run of fit ({listing(others, 3)}); its files are "
            "never touched, not even with --overwrite or --resume; choose another --output-dir, "
            "or move the files away"
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


def _check_settings(folder: Path, record: Record, settings: Mapping[str, Any]) -> None:
    # A run from before an option existed behaved as the default of the option.
    before = {**defaults(), **record.settings}
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
            "same settings, or start anew with --overwrite"
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
            f"the run in {folder} was started with other data or another backbone: "
            f"{listing(changed, 2, 120)}; put back the data and the backbone that it began with, "
            "or start anew with --overwrite"
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
        followed = links and path.is_dir() and path.name in IN_FOLDERS and path.name != "backbone"
        if path.is_symlink() and not followed:
            raise _is_link(path)
        if path.parent != folder and path.parent.is_symlink() and not links:
            raise _is_link(path.parent)
        wants_folder = path.name in IN_FOLDERS
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


def _owned(folder: Path, writes: Iterable[str]) -> Iterator[Path]:
    """Yields the existing files of a run, and the folders of its checkpoints.

    Raises:
      ValueError: if one of them is a link.
    """
    order = [*IN_FOLDERS, *FILES]
    for name in sorted(writes, key=lambda name: order.index(Path(name).name)):
        path = folder / name
        if path.name in IN_FOLDERS:
            children = sorted(path.iterdir()) if path.is_dir() else []
            found = [child for child in children if IN_FOLDERS[path.name].fullmatch(child.name)]
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
        f"{path} is a symbolic link, and its target is never removed or replaced; remove the link "
        "and its target yourself, or choose another --output-dir"
    )


def check_only_ours(folder: Path) -> None:
    """Checks that a folder that a run replaces as a whole has only files that runs write there.

    Raises:
      ValueError: if it has another file; the message names it.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    foreign = [name for name in names if not IN_FOLDERS[folder.name].fullmatch(name)]
    if foreign:
        raise ValueError(
            f"{folder} holds {listing(foreign, 3)}, which the run did not write; move it away, "
            "then go on with --resume"
        )
