"""The training state on disk: written while training goes on, the best and the last few kept."""

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

# In the progress of a checkpoint, beside what the caller gives.
_BEST, _RUN_ID = "best_step", "run_id"
# In the folder of a checkpoint: what its files were when it had been written.
_CHECKSUMS = "checksums.json"


class Restored(NamedTuple):
    """What was saved at `step`."""

    step: int
    state: Any
    progress: Any


@dataclasses.dataclass
class _Kept(checkpoint_managers.PreservationPolicy):
    """The last checkpoints, and the best. That of orbax forgets what was best when it restarts."""

    last: int
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """As orbax calls it, in the order of steps."""
        first = len(checkpoints) - self.last
        return [i >= first or found.step == self.best for i, found in enumerate(checkpoints)]


class Checkpoints:
    """Checkpoints of one run in one folder; a context manager, which waits for the last of them.

    Several hosts write one folder, which all of them must see.

    Attributes:
      folder: where they are, each in a folder named by its step.
    """

    def __init__(self, folder: Path, keep: int, *, run_id: str | None = None):
        """Makes the folder, if need be.

        Args:
          folder: where checkpoints go.
          keep: how many of the last to keep, beside the best.
          run_id: of the run, that each of them repeats; None of a run from before there were ids.
        """
        self.folder = folder.absolute()
        self._run_id = run_id
        # Orbax would tell of failures, at length, that are told here.
        logging.set_verbosity(logging.FATAL)
        self._kept = _Kept(keep)
        self._written: int | None = None  # the step under way
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                # What a killed run had not finished to write.
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
            with contextlib.suppress(Exception):  # what failed has been said
                self._manager.close()
            sys.unraisablehook = self._hook

    def _without_echoes(self, unraisable: Any) -> None:
        """Where one array cannot be written, orbax hears of the others when it listens no more."""
        if "Event loop is closed" not in str(unraisable.exc_value):
            self._hook(unraisable)

    def latest(self) -> int | None:
        """The last step that has been written."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: dict[str, Any], *, best: bool = False) -> None:
        """Begins to write; returns once the state may change again.

        Args:
          step: updates done; a checkpoint of as many is replaced.
          state: tree of arrays on the host.
          progress: JSON-ready.
          best: keep it until a better one comes, however many do.

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
            # The one before must be whole before it can be dropped for this one.
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
        except Exception as error:  # the kinds differ between file systems and versions
            raise self._unwritten(error) from error
        self._written = step

    def finish(self) -> None:
        """Returns when the last checkpoint has been written.

        Raises:
          OSError: if it could not be.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error
        if self._written is not None and distributed.is_first():
            checkpoint = self.folder / str(self._written)
            # Before there is a temporary file among those that are listed.
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
        """The latest checkpoint that can be read; those after it are set aside, not removed.

        Args:
          template: tree of arrays of the shapes and dtypes wanted.
          note: told of every checkpoint that cannot be read.
          progress_of: makes of the JSON that was saved what it means; ValueError if it cannot.

        Raises:
          ValueError: if there are checkpoints, and none can be read, or one is of another run.
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
                    f"{self.folder / str(step)} is a checkpoint of another run than the one in "
                    f"{self.folder.parent}; remove it, or start anew with --overwrite"
                )
            self._kept.best = best
            for broken, reason in reasons.items():
                place = self._set_aside(broken)
                note(
                    f"the checkpoint of step {broken}: {reason}; taking the one before, this one "
                    f"is now {place.name}"
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
        """State and progress as they were saved."""
        checkpoint = self.folder / str(step)
        listed = checkpoint / _CHECKSUMS
        # A run that was killed may not have come to it; what orbax has renamed is whole.
        if listed.exists() and read_json(listed) != _checksums(checkpoint):
            raise ValueError("its files are not what was written")
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(template), progress=ocp.args.JsonRestore()
            ),
        )
        return found.state, dict(found.progress)

    def _set_aside(self, step: int) -> Path:
        """Gives a checkpoint a name that no checkpoint has; returns its path."""
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
        """Not by orbax, which reads a checkpoint before it deletes it."""
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
    """CRC-32 of every file in a folder, the list of them aside."""
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
    """What went wrong: the beginning and, where the reason of the system stands, the end."""
    text = reason_of(error, 100_000)
    return text if len(text) <= 400 else f"{text[:150]} ... {text[-250:]}"
