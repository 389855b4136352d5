"""Training methods that a suite may name, with their parameters."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import neq

Keep = Annotated[float, Field(ge=0, le=1, strict=True)]
Mu = Annotated[float, Field(ge=0, lt=1, strict=True)]
Recursion = Literal["paper", "reference"]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FreezingSpec(_Spec):
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


class BaselineSpec(_Spec):
    """Plain training: what every other method is compared with."""

    kind: Literal["baseline"]

    def policy(self, seed: int) -> "neq.Policy":
        """The policy under which every neuron trains."""
        import neq

        return neq.Everyone()


class NeqSpec(VelocitySpec):
    """NEq (NeurIPS 2022): neurons whose |velocity| is below `eps` stand still."""

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


MethodSpec = Annotated[
    BaselineSpec | NeqSpec | RandomSpec | SmallestVelocitySpec | FreezeAfterSpec,
    Field(discriminator="kind"),
]
KINDS: dict[str, type[BaseModel]] = {
    "baseline": BaselineSpec,
    "neq": NeqSpec,
    "random": RandomSpec,
    "smallest_velocity": SmallestVelocitySpec,
    "freeze_after": FreezeAfterSpec,
}


def with_kinds(suite: Any) -> Any:
    """The suite's values, with each method's `kind` filled in: its name unless it says
    otherwise.
    """
    methods = suite.get("methods") if isinstance(suite, dict) else None
    if not isinstance(methods, dict):
        return suite
    named = {
        name: {"kind": name} | method if isinstance(method, dict) else method
        for name, method in methods.items()
    }
    return suite | {"methods": named}
