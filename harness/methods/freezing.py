"""Training with neurons that stand still: a NeuronFreezer at work in a trial."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

import neq
from harness.flops.costs import Costs
from harness.suite.method_specs import FreezingSpec, MethodSpec, VelocitySpec


class Freezing:
    """A method at work in a trial. The hooks that do nothing here are for methods that need them:
    regularisers look at logits and gradients, pruners at the weights after a step.
    """

    def __init__(
        self,
        spec: MethodSpec,
        model: nn.Module,
        optimizer: Optimizer,
        exclude: Iterable[str],
        seed: int,
        timings: neq.Timings | None = None,
    ) -> None:
        self.freezer = neq.NeuronFreezer(
            model,
            optimizer,
            spec.policy(seed),
            exclude=exclude,
            similarity=spec.similarity if isinstance(spec, VelocitySpec) else "dataset",
            gradient=spec.gradient if isinstance(spec, FreezingSpec) else "exact",
            timings=timings,
        )

    def start(self, validation: Iterable[Any]) -> None:
        """Before epoch 0."""
        self.freezer.update(validation)

    def after_forward(self, inputs: Tensor, outputs: Any) -> None:
        """The batch and its outputs, the graph alive."""

    def after_backward(self) -> None:
        """Gradients unscaled, before any clipping."""

    def after_step(self) -> None:
        """The optimizer has moved the parameters."""

    def end_epoch(self, validation: Iterable[Any]) -> None:
        """Decide who trains in the coming epoch."""
        self.freezer.update(validation)

    def overhead(self, costs: Costs, validation_samples: int) -> int:
        """FLOPs of one `end_epoch`."""
        needed = self.freezer.policy.needs_velocity
        return costs.overhead(validation_samples) if needed else 0

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed trial needs."""
        return self.freezer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.freezer.load_state_dict(state)
