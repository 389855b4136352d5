"""Training methods that a suite may name, with their parameters.

What the rest of the harness has to know of a method it asks its spec; nothing tests for a name.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from harness.suite.fields import ImportString, added
from harness.suite.pruning_specs import PRUNING, PruningMethodSpec
from harness.suite.spec import Spec

if TYPE_CHECKING:
    import neq

Keep = Annotated[float, Field(ge=0, le=1, strict=True)]
Mu = Annotated[float, Field(ge=0, lt=1, strict=True)]
Recursion = Literal["paper", "reference"]


class PolicySpec(Spec):
    """A method that freezes by a policy of neq."""

    @property
    def work(self) -> tuple[str, dict[str, Any]]:
        """See Spec."""
        return "harness.methods.freezing:by_policy", {"spec": self}

    def policy(self, seed: int) -> "neq.Policy":
        """The policy that says who stands still, in a trial with this seed."""
        raise NotImplementedError


class FreezingSpec(PolicySpec):
    """A method that freezes. `gradient="cut"`: no gradient flows through frozen neurons, an
    approximation.
    """

    gradient: Literal["exact", "cut"] = "exact"


class VelocitySpec(FreezingSpec):
    """A method that decides by velocity, with momentum `mu`. `recursion="reference"` and
    `similarity="sample"` follow the authors' code where it departs from the paper.
    """

    mu: Mu = 0.5
    recursion: Recursion = "paper"
    similarity: Literal["dataset", "sample"] = "dataset"

    @property
    def needs_validation(self) -> bool:
        """See Spec."""
        return True


class BaselineSpec(PolicySpec):
    """Plain training: what every other method is compared with."""

    is_baseline: ClassVar[bool] = True
    kind: Literal["baseline"]

    def policy(self, seed: int) -> "neq.Policy":
        """The policy under which every neuron trains."""
        import neq

        return neq.Everyone()


class NeqSpec(VelocitySpec):
    """NEq (NeurIPS 2022): neurons whose |velocity| is below `eps` stand still."""

    in_question: ClassVar[bool] = True
    kind: Literal["neq"]
    eps: Annotated[float, Field(ge=0, strict=True)] = 1e-3

    def policy(self, seed: int) -> "neq.Policy":
        """The policy that freezes neurons at equilibrium."""
        import neq

        return neq.AtEquilibrium(eps=self.eps, mu=self.mu, recursion=self.recursion)


class RandomSpec(FreezingSpec):
    """Control: in each layer the share `keep` trains, drawn at random anew each epoch."""

    kind: Literal["random"]
    keep: Keep

    def policy(self, seed: int) -> "neq.Policy":
        """The policy whose draws depend on (`seed`, epoch) alone."""
        import neq
        from harness.seeds import derive

        return neq.Random(self.keep, seed=derive(seed, "masks"))


class SmallestVelocitySpec(VelocitySpec):
    """Control: in each layer the share `keep` with the largest |velocity| trains."""

    kind: Literal["smallest_velocity"]
    keep: Keep

    def policy(self, seed: int) -> "neq.Policy":
        """The policy that freezes by rank instead of by a threshold."""
        import neq

        return neq.SmallestVelocity(self.keep, mu=self.mu, recursion=self.recursion)


class FreezeAfterSpec(FreezingSpec):
    """Control: from `epoch` on everything stands still but the excluded layers.

    It shows what the remaining epochs are worth.
    """

    kind: Literal["freeze_after"]
    epoch: Annotated[int, Field(ge=1, strict=True)]

    def policy(self, seed: int) -> "neq.Policy":
        """The policy that freezes everything from that epoch on."""
        import neq

        return neq.FreezeAfter(self.epoch)


class OwnSpec(Spec):
    """A method of the user's own.

    `build(training, **arguments)`, in a module beside the suite's file or in an installed one,
    returns the `harness.methods.Method`. `model_arguments`: those of the model that it wants
    otherwise than the suite.
    """

    in_question: ClassVar[bool] = True
    foreign: ClassVar[bool] = True
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
    BaselineSpec
    | NeqSpec
    | RandomSpec
    | SmallestVelocitySpec
    | FreezeAfterSpec
    | PruningMethodSpec
    | OwnSpec,
    Field(discriminator="kind"),
]
KINDS: dict[str, type[Spec]] = {
    "baseline": BaselineSpec,
    "neq": NeqSpec,
    "random": RandomSpec,
    "smallest_velocity": SmallestVelocitySpec,
    "freeze_after": FreezeAfterSpec,
    **PRUNING,
    "own": OwnSpec,
}


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
