"""Checkpoints of the training state, written in the background; the best and the last are kept."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from compacter_jax.files import read_json, replace_file
from compacter_jax.messages import reason_of, shorten
from train.compute import distributed
from train.fit import stopping

# Keys in the progress of a checkpoint, beside those of the caller.
_BEST, _RUN_ID = "best_step", "run_id"
# File in the folder of a checkpoint with the checksums of its files.
_CHECKSUMS = "checksums.json"


class Restored(NamedTuple):
    """State and progress that were saved at `step`."""

    step: int
    state: Any
    progress: Any


@dataclasses.dataclass
class _Kept(checkpoint_managers.PreservationPolicy):
    """Preservation policy for the last checkpoints and the best one.

    The policy of orbax forgets the best checkpoint when it is restarted.
    """

    last: int
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns True for each checkpoint to keep; orbax passes them in the order of steps."""
        first = len(checkpoints) - self.last
        return [i >= first or found.step == self.best for i, found in enumerate(checkpoints)]


class Checkpoints:
    """Checkpoints of one run in one folder; a context manager that waits for the last write.

    Several hosts write to the same folder, which must be visible to all of them.

    Attributes:
      folder: the folder, with a subfolder for every checkpoint named by its step.
    """

    def __init__(self, folder: Path, keep: int, *, run_id: str | None = None):
        """Creates the folder if it does not exist.

        Args:
          folder: the folder for the checkpoints.
          keep: the number of latest checkpoints to keep, in addition to the best.
          run_id: the id of the run, which every checkpoint repeats; None for a run of a version
            without ids.
        """
        self.folder = folder.absolute()
        self._run_id = run_id
        # Orbax would log at length the failures that are reported here.
        logging.set_verbosity(logging.FATAL)
        self._kept = _Kept(keep)
        self._written: int | None = None  # the step that is being written
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                # Checkpoints that a killed run had not finished.
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> Checkpoints:
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._without_echoes
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self.finish()
        except OSError:
            if kind is None:
                raise
        finally:
            with contextlib.suppress(Exception):  # failures have been reported
                self._manager.close()
            sys.unraisablehook = self._hook

    def _without_echoes(self, unraisable: Any) -> None:
        """Ignores errors that reach orbax's closed event loop after one array has failed."""
        if "Event loop is closed" not in str(unraisable.exc_value):
            self._hook(unraisable)

    def latest(self) -> int | None:
        """Returns the step of the last complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: dict[str, Any], *, best: bool = False) -> None:
        """Starts to write a checkpoint; returns as soon as the state may change again.

        Args:
          step: the number of updates done; a checkpoint of the same step is replaced.
          state: a tree of arrays on the host.
          progress: the progress, JSON-ready.
          best: keep this checkpoint until a better one is saved.

        Raises:
          OSError: if this checkpoint, or the one before, could not be written.
        """
        state = jax.tree.map(np.asarray, state)
        if best:
            self._kept.best = step
        progress = {**progress, _BEST: self._kept.best}
        if self._run_id is not None:
            progress[_RUN_ID] = self._run_id
        try:
            # The previous checkpoint must be complete before this one can replace it.
            self.finish()
            if step in self._manager.all_steps():
                self._remove(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
                ),
                force=True,
            )
        except OSError:
            raise
        except Exception as error:  # the types differ between file systems and versions
            raise self._unwritten(error) from error
        self._written = step

    def finish(self) -> None:
        """Waits until the last checkpoint has been written.

        Raises:
          OSError: if it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error
        if self._written is not None and distributed.is_first():
            checkpoint = self.folder / str(self._written)
            # Computed before the temporary file below exists, so that the list leaves it out.
            text = json.dumps(_checksums(checkpoint))
            with replace_file(checkpoint / _CHECKSUMS) as temporary:
                temporary.write_text(text, encoding="utf-8")
        self._written = None

    def restore(
        self,
        template: Any,
        note: Callable[[str], None],
        progress_of: Callable[[dict[str, Any]], Any] = dict,
    ) -> Restored | None:
        """Restores the latest readable checkpoint; sets newer ones aside, without removing them.

        Args:
          template: a tree of arrays with the wanted shapes and dtypes.
          note: called with a message for every checkpoint that cannot be read.
          progress_of: converts the saved JSON to a progress; raises ValueError if it cannot.

        Raises:
          ValueError: if there are checkpoints, and none of them can be read or one is of another
            run.
        """
        template = jax.tree.map(np.asarray, template)
        reasons: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found, progress = self._read(step, template)
                best = progress.pop(_BEST)
                run_id = progress.pop(_RUN_ID, None)
                restored = Restored(step, found, progress_of(progress))
            except Exception as error:  # anything may be wrong in a damaged file
                stopping.check()
                reasons[step] = shorten(_in_short(error), 200)
                continue
            if run_id != self._run_id:
                raise ValueError(
                    f"{self.folder / str(step)} is not a checkpoint of the run in "
                    f"{self.folder.parent}; remove it, or start anew with --overwrite"
                )
            self._kept.best = best
            for broken, reason in reasons.items():
                place = self._set_aside(broken)
                note(
                    f"the checkpoint of step {broken} cannot be read: {reason}; it was renamed to "
                    f"{place.name}, and the run goes on from the one before"
                )
            return restored
        if reasons:
            told = [shorten(f"step {step}: {why}", 130) for step, why in reasons.items()]
            more = f"; and {len(told) - 2} more" if len(told) > 2 else ""
            raise ValueError(
                f"no checkpoint in {self.folder} can be read ({'; '.join(told[:2])}{more}); start "
                "anew with --overwrite"
            )
        return None

    def _read(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
        """Returns state and progress as they were saved."""
        checkpoint = self.folder / str(step)
        listed = checkpoint / _CHECKSUMS
        # A killed run may lack the list; a checkpoint that orbax has renamed is complete.
        if listed.exists() and read_json(listed) != _checksums(checkpoint):
            raise ValueError("its files differ from what was written")
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(template), progress=ocp.args.JsonRestore()
            ),
        )
        return found.state, dict(found.progress)

    def _set_aside(self, step: int) -> Path:
        """Renames a checkpoint to a name that no checkpoint has; returns the new path."""
        checkpoint = self.folder / str(step)
        number = len(list(self.folder.glob(f"{step}.unreadable*")))
        place = self.folder / f"{step}.unreadable-{number}"
        distributed.wait("set a checkpoint aside")
        if distributed.is_first():
            checkpoint.rename(place)
        distributed.wait("a checkpoint is set aside")
        self._manager.reload()
        return place

    def _remove(self, step: int) -> None:
        """Removes a checkpoint without orbax, which would read it before deleting it."""
        distributed.wait("remove a checkpoint")
        if distributed.is_first():
            shutil.rmtree(self.folder / str(step))
        distributed.wait("a checkpoint is removed")
        self._manager.reload()

    def _unwritten(self, error: Exception) -> OSError:
        return OSError(
            f"a checkpoint could not be written to {self.folder}: {_in_short(error)}; make room, "
            "then go on with --resume"
        )


def _checksums(checkpoint: Path) -> dict[str, int]:
    """Returns path -> CRC-32 of every file in a folder, except the list of checksums."""
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != _CHECKSUMS:
            value = 0
            with path.open("rb") as file:
                while block := file.read(2**20):
                    value = zlib.crc32(block, value)
            found[str(path.relative_to(checkpoint))] = value
    return found


def _in_short(error: Exception) -> str:
    """Returns the beginning of an error message and its end, where the system's reason stands."""
    text = reason_of(error, 100_000)
    return text if len(text) <= 400 else f"{text[:150]} ... {text[-250:]}"
