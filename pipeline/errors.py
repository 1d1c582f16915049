"""The one exception that means: the user's input is wrong."""


class UserError(Exception):
    """Bad input. The message is one line that says what was found and what to do; the exit code is 2."""
