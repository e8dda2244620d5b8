"""Signals during a run: SIGINT and SIGTERM stop it at once, or between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from train.compute import distributed
from train.errors import InterruptedRunError, PreemptedRunError, StoppedRunError

# Several hosts must stop at the same step, and communication between them takes time.
_STEPS_BETWEEN_QUESTIONS = 10
_NOTHING_LOST = "between two checkpoints; nothing is lost, go on with --resume"


class Stopping:
    """Requests to stop, received by this process or by another that trains with it.

    Attributes:
      caught: the first signal received; None before it.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._delayed = self._raised = False
        self._calls = 0

    def asked(self, *, now: bool = False) -> bool:
        """Returns True if the run should stop.

        The answer is the same in every process, provided that all processes call this equally
        often.

        Args:
          now: ask the other processes at this call; otherwise they are asked every few calls.
        """
        self._calls += 1
        if distributed.number() > 1:
            if self._calls % _STEPS_BETWEEN_QUESTIONS and not now:
                return False
            return distributed.any_of(self.caught is not None)
        return self.caught is not None

    def error(self, message: str) -> StoppedRunError:
        """Returns the error that ends the run after its signal; `message` says where it ends."""
        if self.caught == signal.SIGINT:
            return InterruptedRunError(f"interrupted {message}")
        return PreemptedRunError(f"terminated {message}")

    def check(self) -> None:
        """Raises the error of a signal again if it was raised outside of `delayed`.

        The handler raises the error in the middle of any code. That code may have caught every
        exception and continued, or may have raised another exception instead.
        """
        if self._raised:
            raise self.error(_NOTHING_LOST)

    @contextmanager
    def delayed(self) -> Iterator[None]:
        """Delays signals inside the block until `asked` is called, except for a second SIGINT."""
        self._delayed = True
        try:
            yield
        finally:
            self._delayed = False

    def note(self, number: int, _: object) -> None:
        """Handles a signal."""
        again = self.caught is not None
        self.caught = self.caught or number
        if not self._delayed:
            self._raised = True
            raise self.error(_NOTHING_LOST)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        tqdm.write("stopping after this step")


# The active handlers, the innermost last.
_handling: list[Stopping] = []


def check() -> None:
    """Raises the error of a received signal, for callers that continue after a foreign exception.

    The exception may have replaced the error of the signal.
    """
    if _handling:
        _handling[-1].check()


@contextmanager
def handled() -> Iterator[Stopping]:
    """Handles both signals inside the block.

    After a signal, its error is raised in place of any other exception.
    """
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
