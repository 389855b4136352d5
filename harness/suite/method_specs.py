"""Training methods that a suite may name, with their parameters.

What the rest of the harness has to know of a method it asks its spec; nothing tests for a name.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from harness.suite.fields import ImportString, added
from harness.suite.freezing_specs import FREEZING, FreezingMethodSpec
from harness.suite.pruning_specs import PRUNING, PruningMethodSpec
from harness.suite.spec import Spec


class OwnSpec(Spec):
    """A method of the user's own.

    `build(training, **arguments)`, in a module beside the suite's file or in an installed one,
    returns the `harness.methods.Method`. `model_arguments`: those of the model that it wants
    otherwise than the suite.
    """

    in_question: ClassVar[bool] = True
    foreign: ClassVar[bool] = True
    may_freeze: ClassVar[bool] = True
    may_prune: ClassVar[bool] = True
    kind: Literal["own"]
    build: ImportString
    arguments: dict[str, Any] = Field(default_factory=dict)
    model_arguments: dict[str, Any] = added({})

    @property
    def work(self) -> tuple[str, dict[str, Any]]:
        """See Spec."""
        return self.build, self.arguments

    @property
    def model_changes(self) -> dict[str, Any]:
        """See Spec."""
        return self.model_arguments


MethodSpec = Annotated[
    FreezingMethodSpec | PruningMethodSpec | OwnSpec, Field(discriminator="kind")
]
KINDS: dict[str, type[Spec]] = {**FREEZING, **PRUNING, "own": OwnSpec}


def with_kinds(suite: Any) -> Any:
    """The suite's values, with each method's `kind` filled in: its name unless it says otherwise,
    "own" where it names what builds it.
    """
    methods = suite.get("methods") if isinstance(suite, dict) else None
    if not isinstance(methods, dict):
        return suite
    named = {
        name: with_kind(name, method) if isinstance(method, dict) else method
        for name, method in methods.items()
    }
    return suite | {"methods": named}


def with_kind(name: str, method: dict[str, Any]) -> dict[str, Any]:
    """The table of the method called `name`, with its `kind`."""
    return {"kind": "own" if "build" in method else name} | method


def kind_of(parameters: Mapping[str, Any]) -> type[Spec]:
    """The class of stored parameters."""
    return KINDS[parameters["kind"]]


def told(parameters: dict[str, Any]) -> dict[str, Any]:
    """Stored parameters as a reader wants them: arguments of a user's method stand flat, as
    "arguments.x" where x is taken.
    """
    given = parameters.get("arguments")
    flat = {k: v for k, v in parameters.items() if k not in ("arguments", "model_arguments") or v}
    if not isinstance(given, dict):
        return flat
    flat.pop("arguments", None)
    return {f"arguments.{k}" if k in flat else k: v for k, v in given.items()} | flat
