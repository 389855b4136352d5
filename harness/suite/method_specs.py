"""Training methods that a trial can use: their parameters, and the hooks that the trial calls."""

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
    """Methods that freeze. `gradient="cut"`: none flows through frozen ones (approximate)."""

    gradient: Literal["exact", "cut"] = "exact"


class VelocitySpec(FreezingSpec):
    """Methods that decide by velocity. `recursion="reference"`: the authors' code."""

    mu: Mu = 0.5
    recursion: Recursion = "paper"
    similarity: Literal["dataset", "sample"] = "dataset"


class Baseline(_Spec):
    """Plain training."""

    kind: Literal["baseline"]

    def policy(self, seed: int) -> "neq.Policy":
        """Everyone trains."""
        import neq

        return neq.Everyone()


class Neq(VelocitySpec):
    """NEq: neurons at equilibrium stand still."""

    kind: Literal["neq"]
    eps: Annotated[float, Field(ge=0, strict=True)] = 1e-3

    def policy(self, seed: int) -> "neq.Policy":
        """Those with |velocity| below eps."""
        import neq

        return neq.AtEquilibrium(eps=self.eps, mu=self.mu, recursion=self.recursion)


class RandomShare(FreezingSpec):
    """Control: a random share of each layer trains, drawn anew each epoch."""

    kind: Literal["random"]
    keep: Keep

    def policy(self, seed: int) -> "neq.Policy":
        """Draws that depend on (seed, epoch)."""
        import neq
        from harness.seeds import derive

        return neq.Random(self.keep, seed=derive(seed, "masks"))


class SmallestVelocity(VelocitySpec):
    """Control: in each layer the share with the smallest |velocity| stands still."""

    kind: Literal["smallest_velocity"]
    keep: Keep

    def policy(self, seed: int) -> "neq.Policy":
        """By rank instead of by threshold."""
        import neq

        return neq.SmallestVelocity(self.keep, mu=self.mu, recursion=self.recursion)


class FreezeAfter(FreezingSpec):
    """Control: everything but the head stands still from an epoch on."""

    kind: Literal["freeze_after"]
    epoch: Annotated[int, Field(ge=1, strict=True)]

    def policy(self, seed: int) -> "neq.Policy":
        """What the late epochs are worth."""
        import neq

        return neq.FreezeAfter(self.epoch)


MethodSpec = Annotated[
    Baseline | Neq | RandomShare | SmallestVelocity | FreezeAfter, Field(discriminator="kind")
]
KINDS: dict[str, type[BaseModel]] = {
    "baseline": Baseline,
    "neq": Neq,
    "random": RandomShare,
    "smallest_velocity": SmallestVelocity,
    "freeze_after": FreezeAfter,
}


def with_kinds(suite: Any) -> Any:
    """A method's kind is its name unless it says otherwise."""
    methods = suite.get("methods") if isinstance(suite, dict) else None
    if not isinstance(methods, dict):
        return suite
    named = {
        name: {"kind": name} | method if isinstance(method, dict) else method
        for name, method in methods.items()
    }
    return suite | {"methods": named}
