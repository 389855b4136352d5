"""Training methods that a trial can use: their parameters, and the hooks that the trial calls."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    import neq
    from harness.flops import Costs

Keep = Annotated[float, Field(ge=0, le=1, strict=True)]
Mu = Annotated[float, Field(ge=0, lt=1, strict=True)]
Recursion = Literal["paper", "reference"]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Freezing(_Spec):
    """Methods that freeze. `gradient="cut"`: none flows through frozen ones (approximate)."""

    gradient: Literal["exact", "cut"] = "exact"


class _Velocity(_Freezing):
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


class Neq(_Velocity):
    """NEq: neurons at equilibrium stand still."""

    kind: Literal["neq"]
    eps: Annotated[float, Field(ge=0, strict=True)] = 1e-3

    def policy(self, seed: int) -> "neq.Policy":
        """Those with |velocity| below eps."""
        import neq

        return neq.AtEquilibrium(eps=self.eps, mu=self.mu, recursion=self.recursion)


class RandomShare(_Freezing):
    """Control: a random share of each layer trains, drawn anew each epoch."""

    kind: Literal["random"]
    keep: Keep

    def policy(self, seed: int) -> "neq.Policy":
        """Draws that depend on (seed, epoch)."""
        import neq
        from harness.streams import derive

        return neq.Random(self.keep, seed=derive(seed, "masks"))


class SmallestVelocity(_Velocity):
    """Control: in each layer the share with the smallest |velocity| stands still."""

    kind: Literal["smallest_velocity"]
    keep: Keep

    def policy(self, seed: int) -> "neq.Policy":
        """By rank instead of by threshold."""
        import neq

        return neq.SmallestVelocity(self.keep, mu=self.mu, recursion=self.recursion)


class FreezeAfter(_Freezing):
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


class Method:
    """A method at work in a trial. The hooks that do nothing here are for methods that need them:
    regularisers look at logits and gradients, pruners at the weights after a step.
    """

    def __init__(
        self,
        spec: MethodSpec,
        model: "nn.Module",
        optimizer: "Optimizer",
        exclude: Iterable[str],
        seed: int,
        timings: "neq.Timings | None" = None,
    ) -> None:
        import neq

        self.freezer = neq.NeuronFreezer(
            model,
            optimizer,
            spec.policy(seed),
            exclude=exclude,
            similarity=spec.similarity if isinstance(spec, _Velocity) else "dataset",
            gradient=spec.gradient if isinstance(spec, _Freezing) else "exact",
            timings=timings,
        )

    def start(self, validation: Iterable[Any]) -> None:
        """Before epoch 0."""
        self.freezer.update(validation)

    def after_forward(self, inputs: "Tensor", outputs: Any) -> None:
        """The batch and its outputs, the graph alive."""

    def after_backward(self) -> None:
        """Gradients unscaled, before any clipping."""

    def after_step(self) -> None:
        """The optimizer has moved the parameters."""

    def end_epoch(self, validation: Iterable[Any]) -> None:
        """Decide who trains in the coming epoch."""
        self.freezer.update(validation)

    def overhead(self, costs: "Costs", validation_samples: int) -> int:
        """FLOPs of one `end_epoch`."""
        needed = self.freezer.policy.needs_velocity
        return costs.overhead(validation_samples) if needed else 0

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed trial needs."""
        return self.freezer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.freezer.load_state_dict(state)
