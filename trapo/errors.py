"""This file has the one exception that the command line prints as a single line instead of a traceback, and says how
others become one."""


class TrapoError(ValueError):
    """Says that the user's input is bad: the message names the argument, what was got and what is accepted."""


def words_of(error: BaseException, longest: int | None = None) -> str:
    """Returns all of an error's text in one line, cut to so many characters; its type where it says nothing."""
    return " ".join(str(error).split())[:longest] or type(error).__name__
