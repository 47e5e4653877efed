"""The one exception that means "the user's input is wrong"; the command line turns it into one line and exit code 2."""


class InputError(ValueError):
    """Bad input, with a message that says what was wrong, where, and what to do about it."""


class RewardsUnsound(RuntimeError):
    """The rewards of a run passed a threshold at which it must stop; the command line ends with one line and exit code 1."""
