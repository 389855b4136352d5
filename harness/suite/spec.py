"""What the harness asks of a training method's parameters."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """The parameters of a method.

    `is_baseline`: all others are compared with it. `in_question`: the report answers for it, as it
    does not for controls. `foreign`: it comes from a user's own code, which is tried out before the
    first trial. `may_freeze`: its masks are replayed after its trials; `may_prune`: what it leaves
    dead is removed after them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    is_baseline: ClassVar[bool] = False
    in_question: ClassVar[bool] = False
    foreign: ClassVar[bool] = False
    may_freeze: ClassVar[bool] = False
    may_prune: ClassVar[bool] = False

    @property
    def needs_validation(self) -> bool:
        """Whether it decides on validation images."""
        return False

    @property
    def work(self) -> tuple[str, dict[str, Any]]:
        """The method at work: import string of a `harness.methods.Method`, and its arguments."""
        raise NotImplementedError

    @property
    def model_changes(self) -> dict[str, Any]:
        """Arguments of the model that the method wants otherwise than the suite."""
        return {}
