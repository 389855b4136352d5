"""NeuronFreezer: ties index, readings, policy and gradients to a model and its optimizer."""

import warnings
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq.alignment import aligned
from neq.cka import CkaSums
from neq.equilibrium import Reading, Similarity, phi, snapshot
from neq.evaluation import evaluation, inputs_of
from neq.gradients import Gradient, LayerPlan, SelectiveGradients
from neq.momentum import complete_momentum
from neq.neurons import NeuronIndex, unwrapped
from neq.parallel import broadcast, broadcast_buffers, largest
from neq.policies import AtEquilibrium, Policy
from neq.required import RequiredFlops
from neq.timings import Timings

# Names under which torch's optimizers keep their first moment (SGD, RMSprop; the Adam family).
FIRST_MOMENTS = ("momentum_buffer", "exp_avg")
MOST_AXES = 8  # with which ranks tell each other the shape of a sample


class NeuronFreezer:
    """Freezes the neurons of `model` that `policy` names; the training loop stays as it is.

    Call `update(validation_batches)` once before epoch 0 (nothing freezes yet) and after every
    epoch. A frozen row is bit-identical at the end of the epoch under any torch optimizer but
    LBFGS (no gradient, weight decay or momentum); its first moment is zero when it trains again.
    Layers under `exclude` (module names or dotted prefixes) are read but never frozen. With
    everything frozen no parameter has a gradient, and a GradScaler refuses such a step: skip it.
    `flops`: what a backward costs, for a policy with a budget; by default it is counted on the
    shape of the first validation sample.

    `reading`: phi and its velocity; `cka`: the same of a policy that decides by CKA, by the block
    of each neuron. `moved`: bool [neurons], whom the policy's alignment froze or let train.

    Raises ValueError for an unknown exclude, LBFGS, a model without a supported layer, or a policy
    that does not fit the model.
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
        flops: RequiredFlops | None = None,
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
        self.neurons.freezable = ~self.neurons.select(exclude)
        if flops is not None and len(flops.rows) != len(self.neurons):
            raise ValueError("flops were counted for another model")
        self.neurons.flops = flops
        self._check_policy()
        self._optimizer = optimizer
        self.timings = timings or Timings()
        self._gradients = SelectiveGradients(model, self.neurons, gradient)
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        # In a compiled step they would be compiled, too, and anew for each mask.
        before, after = map(torch.compiler.disable, (self._before_step, self._after_step))
        self._hooks = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]
        self.epoch = 0
        self.frozen = torch.zeros(len(self.neurons), dtype=torch.bool)
        self.moved = torch.zeros_like(self.frozen)
        self.reading = Reading.undefined(len(self.neurons))
        self.cka: Reading | None = None
        self._cka_flops = 0
        self._warned = False
        if self._option("reading", "phi") == "cka":
            self.cka = Reading.undefined(len(self.neurons))
        self._before: dict[str, Tensor] | None = None
        self._gradients.freeze(self.frozen, self.timings)  # nobody yet: the plan is dense

    def update(self, validation_batches: Iterable[Any] = ()) -> None:
        """Read phi, delta-phi and velocity, then freeze and unfreeze for the coming epoch.

        `validation_batches`: input tensors [samples, …], or tuples that begin with one, as a
        DataLoader yields them; not looked at by a policy that needs no velocity, but for the shape
        of the first where it counts FLOPs. Where torch.distributed has several processes all of
        them call this, each with its share of the samples (no padding, no repeats): they get rank
        0's buffers, one reading and one mask.
        """
        if self._option("needs_flops", False) and self.neurons.flops is None:
            validation_batches = self._count(validation_batches)
        if self.policy.needs_velocity:
            broadcast_buffers(self._model)
            if self._before is not None:
                self._read(self._before, validation_batches)
            self._before = None  # let go of the old copy first: one at a time is enough memory
            self._before = snapshot(self._model)
        wanted, mask = self._decide().unbind()
        self.moved = (wanted ^ mask).cpu()
        self.freeze(mask)
        self.epoch += 1

    def _decide(self) -> Tensor:
        """Rank 0's masks before and after alignment: bool [2, neurons]."""
        wanted = mask = torch.zeros_like(self.frozen)
        if self.epoch:
            velocity = (self.cka or self.reading).velocity
            chosen = self.policy.frozen(self.epoch, self.neurons, velocity)
            wanted = self._checked(chosen) & self.neurons.freezable
            multiple, rounding = self._option("align", 1), self._option("rounding", "down")
            mask = aligned(wanted, velocity, self.neurons, multiple, rounding)
        device = next(self._model.parameters()).device
        return broadcast(torch.stack([wanted, mask]).to(device))

    def _read(self, before: dict[str, Tensor], batches: Iterable[Any]) -> None:
        """Take phi, and CKA where the policy asks for it, after an epoch."""
        how: dict[str, Any] = {"mu": self.policy.mu, "recursion": self.policy.recursion}
        sums = None if self.cka is None else CkaSums(self.neurons, self._option("width", 0))
        values = phi(self._model, before, batches, self.neurons, self.similarity, sums)
        self.reading = self.reading.advance(values, **how)
        if sums is None or self.cka is None:
            return
        kappa = sums.result(next(self._model.parameters()).device)
        may_freeze = kappa[self.neurons.freezable]
        if len(may_freeze) and bool(may_freeze.isnan().all()) and not self._warned:
            self._warned = True
            warnings.warn(
                "CKA is undefined in every layer, so that nothing will freeze: each needs twice as "
                "many rows (samples × up to 256 positions) as neurons; validate on more samples",
                stacklevel=3,
            )
        self.cka = self.cka.advance(kappa, **how)
        self._cka_flops = sums.flops

    def _count(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Count what a backward costs; returns the batches, of which one has been looked at."""
        device = next(self._model.parameters()).device
        with evaluation(self._model, device):  # a DataLoader draws on the global random stream
            rest = iter(batches)
            first = next(rest, None)
            mine = None if first is None else inputs_of(first, device).shape[1:]
        # A rank may have no sample of its own: all take the shape of one that has.
        told = [0] if mine is None else [1 + len(mine), *mine]
        told += [0] * (MOST_AXES - len(told))
        axes, *sizes = largest(torch.tensor(told, device=device))
        if not axes:
            raise ValueError(
                "the policy counts FLOPs, and needs one validation batch for its shape"
            )
        shape = tuple(sizes[: axes - 1])
        self.neurons.flops = RequiredFlops.count(self._model, shape, self.neurons)
        self._check_policy()
        return rest if first is None else chain([first], rest)

    def _option(self, name: str, default: Any) -> Any:
        """What the policy has to say beyond what each has to (see Policy)."""
        return getattr(self.policy, name, default)

    def _check_policy(self) -> None:
        check = self._option("check", None)
        if check is not None:
            check(self.neurons)

    @property
    def cka_flops(self) -> int:
        """FLOPs of the products that the last `update` took for CKA, of all ranks."""
        return self._cka_flops

    @property
    def plan(self) -> dict[str, LayerPlan]:
        """How the backward of each layer is computed now: layer name → LayerPlan."""
        return self._gradients.plan

    @torch.no_grad()
    def freeze(self, mask: Tensor) -> None:
        """Freeze the neurons of `mask` (bool [neurons]) that are not excluded, and no others.

        Raises ValueError for a mask of another type or shape.
        """
        before, self.frozen = self.frozen, self._checked(mask) & self.neurons.freezable
        self._gradients.freeze(self.frozen, self.timings)
        self._gradients.apply()
        self._reset_first_moments(before | self.frozen)

    def _checked(self, mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool or mask.shape != self.frozen.shape:
            raise ValueError(
                f"mask must be bool [{len(self.neurons)}], got {mask.dtype} {list(mask.shape)}"
            )
        return mask.cpu()

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
        state = {
            "layers": {name: part.stop - part.start for name, part in self.neurons.items()},
            "epoch": self.epoch,
            "frozen": self.frozen.clone(),
            "timings": self.timings.to_json(),
            **self.reading.state_dict(),
            "before": {name: t.clone() for name, t in (self._before or {}).items()},
        }
        return state if self.cka is None else state | {"cka": self.cka.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; raises ValueError for the state of another model."""
        layers = {name: part.stop - part.start for name, part in self.neurons.items()}
        if state["layers"] != layers:
            raise ValueError("the state belongs to a model with other layers or sizes")
        if (self.cka is None) != ("cka" not in state):
            raise ValueError(
                "the state belongs to a policy that reads something else than this one"
            )
        device = next(self._model.parameters()).device
        self.epoch = state["epoch"]
        self.reading = Reading.of(state)
        if self.cka is not None:
            self.cka = Reading.of(state["cka"])
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
