"""What the command line turns into one line: bad input (exit code 2), and runs that had to stop (exit code 1)."""


class InputError(ValueError):
    """Bad input, with a message that says what was wrong, where, and what to do about it."""


class RewardsUnsound(RuntimeError):
    """The rewards of a run passed a threshold at which it must stop; the command line ends with one line and exit code 1."""


class RunStopped(RuntimeError):
    """Something outside the settings ended a run before its last step: a dead process, a deadline, a full disk.

    The message names the cause. The run goes on with --resume; the command line ends with one line and exit code 1.
    """
