"""The one exception that means: the user must change something."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A problem that the user can mend.

    The message is one sentence that names the file or field, what was found and what to do. The command line prints it
    without a traceback and exits with code 2. It may quote a stranger's file, so what a terminal would act on instead
    of showing it stands there as an escape sequence of Python's.
    """

    def __init__(self, message: str):
        super().__init__("".join(each if each.isprintable() else ascii(each)[1:-1] for each in message))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the known one that looks most like it, or else all of them."""
    names = sorted(known)
    if close := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {close[0]!r}?"
    return f"there are {', '.join(names)}" if names else "there are none"
