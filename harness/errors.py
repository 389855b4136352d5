"""The one error that users cause, and how other errors are said in a line."""

import traceback
from pathlib import Path


class UserError(Exception):
    """The user's input is wrong: the message says what, where and how to mend it.

    The command line shows it as one line and exits with 2.
    """


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def with_origin(error: Exception) -> str:
    """An error's type and text, with the file and line that raised it: for parts of a suite."""
    frames = traceback.extract_tb(error.__traceback__)
    origin = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{origin}"
