"""NeuronFreezer: ties index, readings, policy and gradients to a model and its optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq.equilibrium import Reading, Similarity, phi, snapshot
from neq.gradients import Gradient, LayerPlan, SelectiveGradients
from neq.momentum import complete_momentum
from neq.neurons import NeuronIndex, unwrapped
from neq.parallel import broadcast, broadcast_buffers
from neq.policies import AtEquilibrium, Policy
from neq.timings import Timings

# Names under which torch's optimizers keep their first moment (SGD, RMSprop; the Adam family).
FIRST_MOMENTS = ("momentum_buffer", "exp_avg")


class NeuronFreezer:
    """Freezes the neurons of `model` that `policy` names; the training loop stays as it is.

    Call `update(validation_batches)` once before epoch 0 (nothing freezes yet) and after every
    epoch. A frozen row is bit-identical at the end of the epoch under any torch optimizer but
    LBFGS (no gradient, weight decay or momentum); its first moment is zero when it trains again.
    Layers under `exclude` (module names or dotted prefixes) are read but never frozen. With
    everything frozen no parameter has a gradient, and a GradScaler refuses such a step: skip it.

    Raises ValueError for an unknown exclude, LBFGS, or a model without a supported layer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        policy: Policy | None = None,
        *,
        exclude: Iterable[str] = (),
        similarity: Similarity = "dataset",
        gradient: Gradient = "exact",
        timings: Timings | None = None,
    ) -> None:
        if similarity not in ("dataset", "sample"):
            raise ValueError(f"similarity must be 'dataset' or 'sample', got {similarity!r}")
        if gradient not in ("exact", "cut"):
            raise ValueError(f"gradient must be 'exact' or 'cut', got {gradient!r}")
        if isinstance(exclude, str):
            raise ValueError(f"exclude must be a list of names; write [{exclude!r}]")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS moves all parameters along one direction: rows can't freeze")
        self.policy: Policy = AtEquilibrium() if policy is None else policy
        self.similarity: Similarity = similarity
        self._model = unwrapped(model)
        self.neurons = NeuronIndex(self._model)
        if not self.neurons:
            raise ValueError("the model has no convolution, linear or normalisation layer")
        self._freezable = ~self.neurons.select(exclude)
        self._optimizer = optimizer
        self.timings = timings or Timings()
        compiled = any(hasattr(part, "_orig_mod") for part in model.modules())
        if compiled and gradient == "cut":
            raise ValueError("gradient 'cut' needs a model that is not compiled")
        self._gradients = SelectiveGradients(
            self._model, self.neurons, gradient, selective=not compiled
        )
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self.epoch = 0
        self.frozen = torch.zeros(len(self.neurons), dtype=torch.bool)
        self.reading = Reading.undefined(len(self.neurons))
        self._before: dict[str, Tensor] | None = None
        self._gradients.freeze(self.frozen, self.timings)  # nobody yet: the plan is dense

    def update(self, validation_batches: Iterable[Any] = ()) -> None:
        """Read phi, delta-phi and velocity, then freeze and unfreeze for the coming epoch.

        `validation_batches`: input tensors [samples, …], or tuples that begin with one, as a
        DataLoader yields them; not looked at by a policy that needs no velocity. Where
        torch.distributed has several processes all of them call this, each with its share of the
        samples (no padding, no repeats): they get rank 0's buffers, one reading and one mask.
        """
        if self.policy.needs_velocity:
            broadcast_buffers(self._model)
            if self._before is not None:
                values = phi(
                    self._model, self._before, validation_batches, self.neurons, self.similarity
                )
                self.reading = self.reading.advance(
                    values, mu=self.policy.mu, recursion=self.policy.recursion
                )
            self._before = None  # let go of the old copy first: one at a time is enough memory
            self._before = snapshot(self._model)
        mask = torch.zeros_like(self.frozen)
        if self.epoch:
            mask = self.policy.frozen(self.epoch, self.neurons, self.reading.velocity)
        self.freeze(broadcast(mask.to(next(self._model.parameters()).device)))
        self.epoch += 1

    @property
    def plan(self) -> dict[str, LayerPlan]:
        """How the backward of each layer is computed now: layer name → LayerPlan."""
        return self._gradients.plan

    @torch.no_grad()
    def freeze(self, mask: Tensor) -> None:
        """Freeze the neurons of `mask` (bool [neurons]) that are not excluded, and no others.

        Raises ValueError for a mask of another type or shape.
        """
        if mask.dtype != torch.bool or mask.shape != self.frozen.shape:
            raise ValueError(
                f"mask must be bool [{len(self.neurons)}], got {mask.dtype} {list(mask.shape)}"
            )
        before, self.frozen = self.frozen, mask.cpu() & self._freezable
        self._gradients.freeze(self.frozen, self.timings)
        self._gradients.apply()
        self._reset_first_moments(before | self.frozen)

    def _reset_first_moments(self, neurons: Tensor) -> None:
        for layer in self.neurons.layers:
            rows = neurons[layer.neurons].nonzero().squeeze(1)
            for parameter in layer.parameters if len(rows) else ():
                state = self._optimizer.state.get(parameter, {})
                for name in FIRST_MOMENTS:
                    moment = state.get(name)
                    if moment is not None:
                        moment.index_fill_(0, rows.to(moment.device), 0)

    @torch.no_grad()
    def _before_step(self, _optimizer: Any, arguments: Any, keywords: Any) -> None:
        self._gradients.apply()
        self._gradients.complete()
        complete_momentum(self._optimizer)
        frozen = [*self._gradients.partly_frozen()]
        if len(arguments) > 1 or keywords:
            # A closure runs the backward again inside the step, after this: even a parameter whose
            # gradient is None now may get one.
            frozen += self._gradients.wholly_frozen()
        self._kept = [(p, rows, p.index_select(0, rows)) for p, rows in frozen]

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        # Weight decay and second moments move rows whose gradient is zero: put them back.
        for parameter, rows, values in self._kept:
            parameter.index_copy_(0, rows, values)
        self._kept = []

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as copies: tensors and plain values."""
        return {
            "layers": {name: part.stop - part.start for name, part in self.neurons.items()},
            "epoch": self.epoch,
            "frozen": self.frozen.clone(),
            "timings": self.timings.to_json(),
            "phi": self.reading.phi.clone(),
            "delta_phi": self.reading.delta_phi.clone(),
            "velocity": self.reading.velocity.clone(),
            "before": {name: t.clone() for name, t in (self._before or {}).items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; raises ValueError for the state of another model."""
        layers = {name: part.stop - part.start for name, part in self.neurons.items()}
        if state["layers"] != layers:
            raise ValueError("the state belongs to a model with other layers or sizes")
        device = next(self._model.parameters()).device
        self.epoch = state["epoch"]
        self.reading = Reading(
            *(state[name].to("cpu", copy=True) for name in ("phi", "delta_phi", "velocity"))
        )
        self.timings = Timings.from_json(state["timings"])
        self.frozen = torch.zeros_like(self.frozen)  # the optimizer's state is its own to load
        self.freeze(state["frozen"])
        before = {name: t.to(device, copy=True) for name, t in state["before"].items()}
        self._before = before or None

    def remove(self) -> None:
        """Let go of model and optimizer: from here on training is plain."""
        self.freeze(torch.zeros_like(self.frozen))
        self._gradients.remove()
        for hook in self._hooks:
            hook.remove()
