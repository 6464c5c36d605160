"""The one exception that the command line prints as a single line instead of a traceback."""


class TrapoError(ValueError):
    """Bad input from the user: the message names the argument, what was got and what is accepted."""
