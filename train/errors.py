"""What stops a run other than bad input, which is a ValueError or an OSError."""


class StoppedRunError(RuntimeError):
    """A run that ends early; the command line prints the message and exits with `exit_code`."""

    exit_code = 1


class NonFiniteLossError(StoppedRunError):
    """The loss or the gradient of a step is not finite."""


class FailedRunsError(StoppedRunError):
    """Some runs of a comparison failed; the others were done."""


class PreemptedRunError(StoppedRunError):
    """The system asked the run to stop, and it did as it should; a checkpoint has been written."""

    exit_code = 0


class InterruptedRunError(StoppedRunError):
    """The user asked the run to stop; a checkpoint has been written."""

    exit_code = 130
