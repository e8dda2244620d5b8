"""What ends a run other than bad input, which is a ValueError or an OSError."""


class EndedRunError(RuntimeError):
    """A run that cannot go on; the command line prints the message and exits with `exit_code`."""

    exit_code = 1


class NonFiniteLossError(EndedRunError):
    """The loss or the gradient of a step is not finite."""


class FailedRunsError(EndedRunError):
    """Some runs of a comparison failed; the others were done."""


class StoppedRunError(KeyboardInterrupt):
    """A run that a signal stopped; the command line prints the message and exits with `exit_code`.

    A signal can arrive anywhere, in code of others, too. Hence no Exception: code that tries
    something, and goes on where it fails, must not take the signal for the failure.
    """

    exit_code = 130


class PreemptedRunError(StoppedRunError):
    """The system asked the run to stop, and it did as it should."""

    exit_code = 0


class InterruptedRunError(StoppedRunError):
    """The user asked the run to stop."""
