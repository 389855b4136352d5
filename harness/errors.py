"""The one error that users cause: shown as a single line, exit code 2."""


class UserError(Exception):
    """The user's input is wrong: the message says what, where and how to mend it."""
