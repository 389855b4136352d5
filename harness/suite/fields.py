"""Fields that several parts of a suite's file have."""

from typing import Annotated, Any

from pydantic import Field

ImportString = Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]


def added(default: Any) -> Any:
    """A field that comes to a part of which results are stored already.

    While it has its `default` it is left out of what identifies a trial: a suite that does not
    mention it keeps its keys.
    """
    return Field(default, exclude_if=lambda value: value == default)
