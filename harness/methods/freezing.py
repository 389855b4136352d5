"""Training with neurons that stand still: a NeuronFreezer at work in a trial."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

import neq
from harness.methods.method import Measures, Method
from harness.methods.training import Training
from harness.suite.freezing_specs import FreezingSpec, PolicySpec, VelocitySpec
from neq.cka import POSITIONS
from neq.equilibrium import Similarity


def by_policy(training: Training, spec: PolicySpec) -> "Freezing":
    """The method that a suite's `spec` describes.

    Raises ValueError where it does not fit the model, the optimizer or the validation samples.
    """
    policy = spec.policy(training.seed)
    if getattr(policy, "reading", "phi") == "cka":
        _check_rows(training, getattr(policy, "width", 0))
    return Freezing(
        training,
        policy,
        similarity=spec.similarity if isinstance(spec, VelocitySpec) else "dataset",
        gradient=spec.gradient if isinstance(spec, FreezingSpec) else "exact",
        hold_statistics=isinstance(spec, FreezingSpec) and spec.hold_statistics,
    )


def _check_rows(training: Training, width: int) -> None:
    """Raises ValueError where the CKA of no layer will ever be defined."""
    samples, neurons = training.samples["validation"], training.costs.neurons
    freezable = ~(neurons.select(training.exclude) | neurons.fixed)
    most = 0.0
    for layer, calls in training.costs.positions().items():
        if bool(freezable[neurons[layer]].any()):
            size = min(neurons[layer].stop - neurons[layer].start, width)
            most = max(most, samples * sum(min(each, POSITIONS) for each in calls) / size)
    if most < 2:
        raise ValueError(
            f"CKA needs two rows for each neuron of a layer, and {samples} validation samples give "
            f"{most:.1f} at the most; raise data.validation_size"
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
        hold_statistics: bool = False,
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
            flops=training.costs.required() if getattr(policy, "needs_flops", False) else None,
            hold_statistics=hold_statistics,
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
        return {"overhead": usual["overhead"] + deciding + self.freezer.cka_flops}

    def measures(self) -> Measures:
        """See Method: what alignment moved, the CKA of layers, and what groups find."""
        found: dict[str | tuple[str, str], float] = {}
        policy, freezer = self.freezer.policy, self.freezer
        if getattr(policy, "align", 1) > 1:
            found["neurons_moved_by_alignment"] = int(freezer.moved.sum())
        if freezer.cka is not None:
            for name, part in freezer.neurons.items():
                found["cka", name] = float(freezer.cka.phi[part].mean())
        if isinstance(policy, neq.GroupEquilibrium) and policy.reading == "phi":
            found.update(_beside_neurons(policy, freezer))
        return found

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


def _beside_neurons(policy: neq.GroupEquilibrium, freezer: neq.NeuronFreezer) -> dict[str, float]:
    """Shares of the neurons that may freeze: those that stand still with their group, and would
    not alone by the same eps; and those that would alone, while their group trains.
    """
    single = neq.AtEquilibrium(policy.eps, policy.mu, policy.recursion)
    freezable = freezer.neurons.freezable
    alone = single.frozen(freezer.epoch, freezer.neurons, freezer.reading.velocity) & freezable
    count = max(int(freezable.sum()), 1)
    return {
        "still_by_group_alone": int((freezer.frozen & ~alone).sum()) / count,
        "still_by_neuron_alone": int((alone & ~freezer.frozen).sum()) / count,
    }
