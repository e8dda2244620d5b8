"""Errors that end a run, other than invalid input, which is a ValueError or an OSError."""


class EndedRunError(RuntimeError):
    """A run that cannot continue.

    The command line prints the message and exits with `exit_code`.
    """

    exit_code = 1


class NonFiniteLossError(EndedRunError):
    """A step whose loss or gradient is not finite."""


class FailedRunsError(EndedRunError):
    """A comparison or grid in which some runs failed and the others finished."""


class StoppedRunError(KeyboardInterrupt):
    """A run that a signal stopped.

    The command line prints the message and exits with `exit_code`. The class is no Exception, since
    a signal can arrive in the middle of any code: code that continues after a failure must not
    mistake the signal for the failure.
    """

    exit_code = 130


class PreemptedRunError(StoppedRunError):
    """A run that the system asked to stop, and that stopped as intended."""

    exit_code = 0


class InterruptedRunError(StoppedRunError):
    """A run that the user asked to stop."""
