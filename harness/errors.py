"""The one error that users cause: shown as a single line, exit code 2."""


class UserError(Exception):
    """The user's input is wrong: the message says what, where and how to mend it."""


def line(error: BaseException) -> str:
    """What an error says, in one line of a readable length."""
    return " ".join(str(error).split())[:200] or type(error).__name__
