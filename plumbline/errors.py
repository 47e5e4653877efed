"""The one exception that means "the user's input is wrong"; the command line turns it into one line and exit code 2."""


class InputError(ValueError):
    """Bad input, with a message that says what was wrong, where, and what to do about it."""
