"""Training with neurons that stand still: a NeuronFreezer at work in a trial."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

import neq
from harness.methods.method import Method
from harness.methods.training import Training
from harness.suite.method_specs import FreezingSpec, PolicySpec, VelocitySpec
from neq.equilibrium import Similarity


def by_policy(training: Training, spec: PolicySpec) -> "Freezing":
    """The method that a suite's `spec` describes.

    Raises ValueError where it does not fit the model or the optimizer.
    """
    return Freezing(
        training,
        spec.policy(training.seed),
        similarity=spec.similarity if isinstance(spec, VelocitySpec) else "dataset",
        gradient=spec.gradient if isinstance(spec, FreezingSpec) else "exact",
    )


class Freezing(Method):
    """Freezes neurons by a policy of neq; `freezer` is the NeuronFreezer that does it.

    A method of one's own may set the mask in `end_epoch` instead, by `self.freezer.freeze(mask)`.
    """

    def __init__(
        self,
        training: Training,
        policy: neq.Policy | None = None,
        *,
        similarity: Similarity = "dataset",
        gradient: neq.Gradient = "exact",
    ) -> None:
        """`policy`: who stands still (default: nobody); the others as of neq.NeuronFreezer."""
        super().__init__(training)
        self.freezer = neq.NeuronFreezer(
            training.model,
            training.optimizer,
            policy or neq.Everyone(),
            exclude=training.exclude,
            similarity=similarity,
            gradient=gradient,
            timings=training.timings,
        )

    @property
    def frozen(self) -> Tensor:
        """See Method."""
        return self.freezer.frozen

    @property
    def plan(self) -> dict[str, neq.LayerPlan]:
        """See Method."""
        return self.freezer.plan

    def start(self) -> None:
        """See Method: nothing freezes yet."""
        self.freezer.update(self.training.validation_batches())

    def end_epoch(self, epoch: int) -> None:
        """See Method: decide who trains next."""
        self.freezer.update(self.training.validation_batches())

    def flops(self, usual: Mapping[str, int]) -> dict[str, int | None]:
        """See Method: deciding by velocity takes forwards of last epoch's model and of this."""
        if not self.freezer.policy.needs_velocity:
            return {}
        deciding = self.training.costs.overhead(self.training.samples["validation"])
        return {"overhead": usual["overhead"] + deciding}

    def readings(self) -> dict[str, Tensor]:
        """See Method."""
        reading = self.freezer.reading
        return {
            "phi": reading.phi,
            "delta_phi": reading.delta_phi,
            "velocity": reading.velocity,
        }

    def state_dict(self) -> dict[str, Any]:
        """See Method."""
        return self.freezer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Method."""
        self.freezer.load_state_dict(state)
