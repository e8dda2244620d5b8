"""SIGINT and SIGTERM during a run: at once where nothing is lost, else between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from train.compute import distributed
from train.errors import InterruptedRunError, PreemptedRunError, StoppedRunError

# Several hosts must stop at the same step, and asking each other takes time.
_STEPS_BETWEEN_QUESTIONS = 10
_NOTHING_LOST = "between two checkpoints; nothing is lost, go on with --resume"


class Stopping:
    """What has been asked for, of this process or of another that trains with it.

    Attributes:
      caught: the signal that came first; None until one does.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._delayed = self._raised = False
        self._calls = 0

    def asked(self, *, now: bool = False) -> bool:
        """Whether to stop; the same in every process, where all call it equally often.

        Args:
          now: ask the other processes, too, not only every so many calls.
        """
        self._calls += 1
        if distributed.number() > 1:
            if self._calls % _STEPS_BETWEEN_QUESTIONS and not now:
                return False
            return distributed.any_of(self.caught is not None)
        return self.caught is not None

    def error(self, message: str) -> StoppedRunError:
        """Returns the error that the run ends with after its signal; `message` says where."""
        if self.caught == signal.SIGINT:
            return InterruptedRunError(f"interrupted {message}")
        return PreemptedRunError(f"terminated {message}")

    def check(self) -> None:
        """Raises the error of a signal again that did not wait.

        The handler raised it in the middle of something, whose code may have caught everything and
        gone on, or made another exception of it.
        """
        if self._raised:
            raise self.error(_NOTHING_LOST)

    @contextmanager
    def delayed(self) -> Iterator[None]:
        """Within it a signal waits for `asked`, but for a second SIGINT."""
        self._delayed = True
        try:
            yield
        finally:
            self._delayed = False

    def note(self, number: int, _: object) -> None:
        """As a signal handler."""
        again = self.caught is not None
        self.caught = self.caught or number
        if not self._delayed:
            self._raised = True
            raise self.error(_NOTHING_LOST)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        tqdm.write("stopping after this step")


# Those that handle signals now, the innermost last.
_handling: list[Stopping] = []


def check() -> None:
    """Raises the error of a signal that came; for whoever goes on after an exception of others.

    The exception may be what they made of the signal's.
    """
    if _handling:
        _handling[-1].check()


@contextmanager
def handled() -> Iterator[Stopping]:
    """Handles both signals within it; after one, no exception of others takes its error's place."""
    stopping = Stopping()
    previous = {s: signal.signal(s, stopping.note) for s in (signal.SIGINT, signal.SIGTERM)}
    _handling.append(stopping)
    try:
        yield stopping
    except Exception:
        stopping.check()
        raise
    finally:
        _handling.remove(stopping)
        for number, handler in previous.items():
            signal.signal(number, handler)
