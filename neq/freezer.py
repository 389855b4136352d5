"""NeuronFreezer: ties index, readings, policy and gradients to a model and its optimizer."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq.alignment import aligned
from neq.batches import Forward, check_batches, few
from neq.cka import CkaSums
from neq.equilibrium import Reading, Similarity, phi, snapshot
from neq.evaluation import evaluation
from neq.gradients import Gradient, LayerPlan, SelectiveGradients
from neq.momentum import complete_momentum
from neq.moved import Record, listed
from neq.neurons import NeuronIndex, unwrapped
from neq.optimizers import given, parameters_of, then
from neq.parallel import broadcast, broadcast_buffers, first_given
from neq.plain import plain
from neq.policies import AtEquilibrium, Policy, check_policy
from neq.required import RequiredFlops
from neq.same import Structure, check_whole
from neq.timings import Timings

# Names under which torch's optimizers keep their first moment (SGD, RMSprop; the Adam family).
FIRST_MOMENTS = ("momentum_buffer", "exp_avg")
NESTED = 3  # steps of one optimizer, each of which calls the next


class NeuronFreezer:
    """Freezes the neurons of `model` that `policy` names; the training loop stays as it is.

    Call `update(validation_batches)` once before epoch 0 (nothing freezes yet) and after every
    epoch. A frozen row is bit-identical at the end of the epoch under any torch optimizer but
    LBFGS (no gradient, weight decay or momentum); its first moment is zero when it trains again.
    Layers under `exclude` (module names or dotted prefixes) are read but never frozen. With
    everything that one optimizer holds frozen none of it has a gradient, and a GradScaler refuses
    such a step: skip it.
    `optimizer`: the one that steps the model, or a list where several do; the one inside of a
    wrapper that steps it by itself (SAM) is one of them. Layers without a parameter that needs a
    gradient are the user's (`neurons.fixed`), and never freeze. Running statistics of frozen
    neurons move on with every forward in train mode, unless `hold_statistics` holds them.
    `flops`: what a backward costs, for a policy with a budget; by default it is counted on the
    shape of the first validation sample.

    `reading`: phi and its velocity; `cka`: the same of a policy that decides by CKA, by the block
    of each neuron. `moved`: bool [neurons], whom the policy's alignment froze or let train.

    Raises TypeError for what is no optimizer, ValueError for an unknown exclude, LBFGS, a model
    without a supported layer, with one whose size is not known yet or with sharded parameters, or
    a policy that does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        policy: Policy | None = None,
        *,
        exclude: Iterable[str] = (),
        similarity: Similarity = "dataset",
        gradient: Gradient = "exact",
        timings: Timings | None = None,
        flops: RequiredFlops | None = None,
        hold_statistics: bool = False,
    ) -> None:
        if similarity not in ("dataset", "sample"):
            raise ValueError(f"similarity must be 'dataset' or 'sample', got {similarity!r}")
        if gradient not in ("exact", "cut"):
            raise ValueError(f"gradient must be 'exact' or 'cut', got {gradient!r}")
        if isinstance(exclude, str):
            raise ValueError(f"exclude must be a list of names; write [{exclude!r}]")
        check_policy(policy)
        self._optimizers = given(optimizer)
        self.policy: Policy = AtEquilibrium() if policy is None else policy
        self.similarity: Similarity = similarity
        self._model = unwrapped(model)
        check_whole(self._model)
        self.neurons = NeuronIndex(self._model)
        if not self.neurons:
            raise ValueError("the model has no convolution, linear or normalisation layer")
        self.neurons.excluded = self.neurons.select(exclude)
        if flops is not None and len(flops.rows) != len(self.neurons):
            raise ValueError("flops were counted for another model")
        self.neurons.flops = flops
        self._check_policy()
        self.timings = timings or Timings()
        self._gradients = SelectiveGradients(model, self.neurons, gradient, hold_statistics)
        self._structure = Structure(self._model, self.neurons)
        self._record = Record(self._model, self.neurons, self._optimizers)
        # Of each step that is under way, by its optimizer: one may call another's, or its own.
        self._kept: dict[int, list[list[tuple[Tensor, Tensor, Tensor]]]] = {}
        # In a compiled step they would be compiled, too, and anew for each mask.
        hooks: tuple[Any, ...] = (self._before_step, self._after_step, self._clear)
        before, after, self._clear_again = map(torch.compiler.disable, hooks)
        self._hooks = [o.register_step_pre_hook(before) for o in self._optimizers]
        self._hooks += [o.register_step_post_hook(after) for o in self._optimizers]
        self.epoch = 0
        self.frozen = torch.zeros(len(self.neurons), dtype=torch.bool)
        self.moved = torch.zeros_like(self.frozen)
        self.reading = Reading.undefined(len(self.neurons))
        self.cka: Reading | None = None
        self._cka_flops = 0
        self._fixed: Tensor | None = None  # when FLOPs were counted here
        self._warned = False
        if self._option("reading", "phi") == "cka":
            self.cka = Reading.undefined(len(self.neurons))
        self._before: dict[str, Tensor] | None = None
        self._gradients.freeze(self.frozen, self.timings)  # nobody yet: the plan is dense

    def update(
        self, validation_batches: Iterable[Any] = (), forward: Forward | None = None
    ) -> None:
        """Read phi, delta-phi and velocity, then freeze and unfreeze for the coming epoch.

        `validation_batches`: input tensors [samples, …], mappings of the model's arguments, or
        tuples that begin with one of these, as a DataLoader yields them: the model is called with
        the tensor, or with the mapping's items by name. Positions that an `attention_mask` or
        `key_padding_mask` [samples, positions] leaves out don't count, whichever way the model is
        given it; masks of the same samples and positions are combined. `forward(model, batch)`
        calls the model with batches of any other kind, which lie on its device. Batches are not
        looked at by a policy that needs no velocity, but for the first sample where it counts
        FLOPs; that is done on the CPU, in train mode. Where torch.distributed has several processes
        all of them call this, each with its share of the samples (no padding, no repeats): they get
        rank 0's buffers, one reading and one mask.

        Raises ValueError, on all ranks alike, where layers are not those that the freezer was made
        for, where rows have moved while they were frozen (other than by `load_state_dict`, and by
        swapping averaged weights in and back), and where some would freeze that no given optimizer
        holds.
        """
        check_batches(validation_batches)
        self._gradients.check_at_work()
        self._structure.check(by_name=self.policy.needs_velocity)
        self._record.check(self._gradients.trained)
        if self._option("needs_flops", False) and self._is_uncounted():
            validation_batches = self._count(validation_batches, forward)
        readings = self.reading, self.cka, self._cka_flops
        if self.policy.needs_velocity:
            broadcast_buffers(self._model)
            if self._before is not None:
                self._read(self._before, validation_batches, forward)
        try:
            wanted, mask = self._decide().unbind()
            self._freeze(mask)
        except ValueError:  # once it is mended, this epoch is read again
            self.reading, self.cka, self._cka_flops = readings
            raise
        if self.policy.needs_velocity:
            self._before = None  # let go of the old copy first: one at a time is enough memory
            self._before = snapshot(self._model)
        self.moved = (wanted ^ mask).cpu()
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

    def _read(
        self, before: dict[str, Tensor], batches: Iterable[Any], forward: Forward | None
    ) -> None:
        """Take phi, and CKA where the policy asks for it, after an epoch."""
        how: dict[str, Any] = {"mu": self.policy.mu, "recursion": self.policy.recursion}
        sums = None if self.cka is None else CkaSums(self.neurons, self._option("width", 0))
        values = phi(self._model, before, batches, self.neurons, self.similarity, sums, forward)
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

    def _is_uncounted(self) -> bool:
        """Whether no FLOPs were counted, or not those of layers that were fixed then."""
        then = self._fixed
        freed = then is not None and bool((then & ~self.neurons.fixed).any())
        return self.neurons.flops is None or freed

    def _count(self, batches: Iterable[Any], forward: Forward | None) -> Iterable[Any]:
        """Count what a backward costs; returns the batches, of which one has been looked at."""
        device = next(self._model.parameters()).device
        mine = first = failed = None
        rest: Iterable[Any] = ()
        try:
            with evaluation(self._model, device):  # a DataLoader draws on the global random stream
                rest = iter(batches)
                for first in rest:
                    mine = few(first, 1, forward)
                    if mine is not None:
                        break
        except Exception as error:  # the other ranks wait for this one: they are told of it
            failed = error
        # A rank may have no sample of its own: all take that of the first one that has.
        sample = first_given(mine, device, failed)
        if sample is None:
            raise ValueError(
                "the policy counts FLOPs, and needs one validation batch for its shape"
            )
        self.neurons.flops = RequiredFlops.count(self._model, sample, self.neurons, forward)
        self._fixed = self.neurons.fixed
        self._check_policy()
        return rest if mine is None else chain([first], rest)

    def _option(self, name: str, default: Any) -> Any:
        """What the policy has to say beyond what each has to (see Policy)."""
        return getattr(self.policy, name, default)

    def _check_policy(self) -> None:
        check = self._option("check", None)
        if check is not None:
            check(self.neurons)

    @property
    def model(self) -> nn.Module:
        """The model whose neurons freeze, without what DistributedDataParallel or torch.compile has
        put around it.
        """
        return self._model

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers that step it, without their wrappers."""
        return [*self._optimizers]

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside, steps are tried: whoever tries them takes them back before the end. Afterwards
        the freezer knows nothing of them. Raises ValueError where rows have moved while they were
        frozen, as `update` does.
        """
        self._gradients.check_at_work()
        trained = self._gradients.trained
        with self._record.rehearsal():
            self._record.check(trained)
            yield
        self._gradients.trained = trained

    @property
    def cka_flops(self) -> int:
        """FLOPs of the products that the last `update` took for CKA, of all ranks."""
        return self._cka_flops

    @property
    def plan(self) -> dict[str, LayerPlan]:
        """How the backward of each layer is computed now: layer name → LayerPlan."""
        return self._gradients.plan

    def freeze(self, mask: Tensor) -> None:
        """Freeze the neurons of `mask` (bool [neurons]) that are neither excluded nor fixed, and no
        others.

        Raises ValueError for a mask of another type or shape, where layers are not those that the
        freezer was made for, and where rows would freeze that no given optimizer holds.
        """
        self._gradients.check_at_work()
        self._structure.check(by_name=False)
        self._freeze(mask)

    def _freeze(self, mask: Tensor) -> None:
        frozen = self._checked(mask) & self.neurons.freezable
        self._check_held(frozen)
        self._set(frozen)

    def _check_held(self, frozen: Tensor) -> None:
        """Raises ValueError where a step of a row that would freeze could not be undone."""
        held = {id(p): p.requires_grad for p in parameters_of(self._optimizers)}
        if not any(held.values()):  # they step nothing: it is only for reading
            return
        missing = [
            layer.name
            for layer in self.neurons.layers
            if bool(frozen[layer.neurons].any())
            and any(p.requires_grad and id(p) not in held for p in layer.parameters)
        ]
        if missing:
            raise ValueError(
                f"rows of {listed(missing)} would freeze, and no given optimizer holds all of "
                "their parameters: give NeuronFreezer every optimizer that steps, as a list, or "
                "exclude what nobody steps"
            )

    @torch.no_grad()
    def _set(self, frozen: Tensor) -> None:
        before = self.frozen
        self._go_on(frozen)
        self._reset_first_moments(before | self.frozen)

    @torch.no_grad()
    def _go_on(self, frozen: Tensor) -> None:
        """Freeze the rows of `frozen`, and leave the optimizers' state as it is."""
        self.frozen = frozen
        self._gradients.freeze(self.frozen, self.timings)
        self._gradients.apply()
        self._record.freeze(self.frozen)
        self._kept.clear()

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
                for state in (o.state.get(parameter, {}) for o in self._optimizers):
                    for moment in map(state.get, FIRST_MOMENTS):
                        if moment is not None and len(moment) == layer.size:
                            moment.index_fill_(0, rows.to(moment.device), 0)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> Any:
        self._record.before_step(optimizer)
        held = set(parameters_of([optimizer]))
        self._clear(optimizer)
        partly = self._gradients.partly_frozen()
        kept = [(p, rows, p.index_select(0, rows)) for p, rows in partly if p in held]
        steps = self._kept.setdefault(id(optimizer), [])
        del steps[: max(len(steps) - NESTED, 0)]  # of steps that have failed
        steps.append(kept)
        return then(arguments, keywords, partial(self._clear_again, optimizer))

    @torch.no_grad()
    def _clear(self, optimizer: Optimizer) -> None:
        """Leave no gradient to frozen rows that `optimizer` is about to step."""
        held = set(parameters_of([optimizer]))
        self._gradients.apply(held)
        self._gradients.complete(held)
        complete_momentum(optimizer)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        # Weight decay and second moments move rows whose gradient is zero: put them back.
        steps = self._kept.get(id(optimizer))
        for parameter, rows, values in steps.pop() if steps else ():
            parameter.index_copy_(0, rows, values)
        self._record.after_step(optimizer)

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
        self._gradients.check_at_work()
        layers = {name: part.stop - part.start for name, part in self.neurons.items()}
        if state["layers"] != layers:
            raise ValueError("the state belongs to a model with other layers or sizes")
        if (self.cka is None) != ("cka" not in state):
            raise ValueError(
                "the state belongs to a policy that reads something else than this one"
            )
        self._structure.check(by_name=False)
        frozen = self._checked(state["frozen"]) & self.neurons.freezable
        self._check_held(frozen)
        device = next(self._model.parameters()).device
        self.epoch = state["epoch"]
        self.reading = Reading.of(state)
        if self.cka is not None:
            self.cka = Reading.of(state["cka"])
        self.timings = Timings.from_json(state["timings"])
        self._go_on(frozen)  # the optimizer's state is its own to load
        before = {name: t.to(device, copy=True) for name, t in state["before"].items()}
        self._before = before or None

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Inside `with freezer.plain():` the model is the one that it is without freezers: for
        evaluation, export and profilers.

        Layers have the classes that they were made with, and no hook or attribute of a freezer's.
        A backward inside gives each row its gradient; frozen rows stand still all the same, since
        a step clears their gradients and puts them back. Running statistics that are held move in
        a forward in training mode, and weights that are written inside count as loaded. Afterwards
        everything is as before, what torch.compile has compiled included. `update`, `freeze`,
        `load_state_dict`, `remove` and another freezer for the model raise RuntimeError inside.
        """
        differing = self._record.layers_that_differ()
        try:
            with plain(self._model):
                yield
        finally:  # weights that were loaded inside have not been moved
            self._record.forget(self._record.layers_that_differ() - differing)

    def remove(self) -> None:
        """Let go of model and optimizer: from here on training is plain."""
        self._gradients.check_at_work()
        self._set(torch.zeros_like(self.frozen))
        self._gradients.remove()
        self._record.remove()
        for hook in self._hooks:
            hook.remove()
