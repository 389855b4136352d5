"""Training with neurons that stand still: a NeuronFreezer at work in a trial."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

import neq
from harness.flops.costs import Costs
from harness.suite.method_specs import FreezingSpec, MethodSpec, VelocitySpec


class Freezing:
    """A method at work: the hooks that a trial calls, and what deciding costs.

    The hooks that do nothing here are for methods that need them: regularisers look at outputs and
    gradients, pruners at the weights after a step. `exclude`: layers that never freeze; `seed`: of
    the trial; `timings`: of backward kernels (default: none are known). Raises ValueError where the
    method does not fit the model or the optimizer.
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
        """Called before epoch 0, with the validation batches."""
        self.freezer.update(validation)

    def after_forward(self, inputs: Tensor, outputs: Any) -> None:
        """Called with a microbatch and the model's outputs, while the autograd graph is alive."""

    def after_backward(self) -> None:
        """Called before the optimizer's step: gradients are unscaled, and not clipped yet."""

    def after_step(self) -> None:
        """Called when the optimizer has moved the parameters."""

    def end_epoch(self, validation: Iterable[Any]) -> None:
        """Called after the test, with the validation batches: decide who trains next."""
        self.freezer.update(validation)

    def overhead(self, costs: Costs, validation_samples: int) -> int:
        """FLOPs of one `end_epoch` over so many validation samples."""
        needed = self.freezer.policy.needs_velocity
        return costs.overhead(validation_samples) if needed else 0

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed trial needs: tensors and plain values."""
        return self.freezer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.freezer.load_state_dict(state)
