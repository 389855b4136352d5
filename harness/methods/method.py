"""What a trial asks of a training method: hooks, what it costs, what it records.

A method is a class of this kind; one of a user's own is named by import string in a suite's file.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from harness.methods.training import Training
from neq import LayerPlan

# Measure name, or (measure name, layer name) → value.
Measures = Mapping[str | tuple[str, str], float]


class Method:
    """A training method at work in one trial. Every hook does nothing here: override some.

    A trial calls, in this order: `start` before epoch 0; in each step `after_forward` for each of
    its microbatches, `after_backward`, and `after_step` where a step was made; at the end of an
    epoch `end_epoch`. Then, and as often as it likes, it asks what the epoch was like and what is
    to be kept: `flops`, `readings`, `measures`, `state_dict`, `size`. A trial that goes on after a
    break calls `load_state_dict` instead of `start`. In several processes every worker calls the
    hooks, and their states must be equal after every epoch.
    """

    def __init__(self, training: Training) -> None:
        """`training`: what the method works on. A suite's arguments come after it, by name."""
        self.training = training

    @property
    def frozen(self) -> Tensor | None:
        """Who stands still now: bool [neurons of `training.costs.neurons`]; None: nobody."""
        return None

    @property
    def plan(self) -> Mapping[str, LayerPlan] | None:
        """How the backward of each layer is computed now, by name; None: all rows of every layer.

        With a NeuronFreezer it is that one's `plan`.
        """
        return None

    @property
    def size(self) -> int | None:
        """Parameters that are left in the model, of a method that prunes; None: all.

        What prunes is never said to save: it is smaller afterwards, and no cheaper in training.
        """
        return None

    @property
    def kept_weights(self) -> Mapping[str, Tensor]:
        """By layer name, bool of its weight's shape: the weights that are left, of a method that
        prunes; of layers that are not named, all.
        """
        return {}

    def start(self) -> None:
        """Called once, before epoch 0."""

    def after_forward(
        self, inputs: Tensor, targets: Any, outputs: Any, *, weight: float, last: bool
    ) -> None:
        """Called with each microbatch, before its backward, while the autograd graph is alive.

        `inputs` [samples, …], `targets` and `outputs`: as the task's loss has them. `weight`: by
        which this microbatch's mean loss is multiplied; `last`: whether the step ends with it. For
        derivatives of the method's own take `torch.autograd.grad`: a second `backward` would be
        unscaled where `recipe.precision` is fp16, and fail on several workers.
        """

    def after_backward(self) -> None:
        """Called once in a step, before the optimizer's: gradients are unscaled, not clipped, and
        averaged over workers.
        """

    def after_step(self) -> None:
        """Called when the optimizer has moved the parameters; not after a step that a GradScaler
        has skipped.
        """

    def end_epoch(self, epoch: int) -> None:
        """Called after the training of `epoch`, before the test: what is tested, and kept, is the
        model as this leaves it.
        """

    def flops(self, usual: Mapping[str, int]) -> Mapping[str, int | None]:
        """FLOPs of the epoch, of all workers, by name, where they are not the `usual` ones.

        Names: "forward", "backward_dense", "backward_paper", "backward_required",
        "backward_executed" (None: it can't be told), and "overhead", in which evaluations that the
        method asked for are counted already.
        """
        return {}

    def measures(self) -> Measures:
        """What the method records of the epoch, as rows of the table `measures`.

        Keys are names, or (name, layer) for one layer; no name may be a column of `epochs`.
        """
        return {}

    def readings(self) -> Mapping[str, Tensor]:
        """Readings of neurons after the epoch, float [neurons]: "phi", "delta_phi", "velocity"."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed trial needs, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
