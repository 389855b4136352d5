"""Policies that hold the backward to a share of its FLOPs, by what freezing saves."""

from dataclasses import dataclass
from statistics import median
from typing import ClassVar

import torch
from torch import Tensor

from neq.alignment import Rounding
from neq.equilibrium import Recursion
from neq.groups import GroupEquilibrium, members
from neq.neurons import NeuronIndex
from neq.policies import AtEquilibrium, NoVelocity, check_mu, generator_of
from neq.required import RequiredFlops


@dataclass(frozen=True, slots=True)
class Budget:
    """Freezes whom `policy` freezes, and more until the backward keeps to a budget.

    Once velocities exist, the least exact backward has at most the share `flops` of the dense
    one's FLOPs: those whose |velocity| is smallest for what they save stand still, input gradients
    included that nothing upstream needs any more. They are single neurons, or the groups of a
    GroupEquilibrium. Neurons without a velocity train.
    """

    policy: AtEquilibrium | GroupEquilibrium
    flops: float
    needs_velocity: ClassVar[bool] = True
    needs_flops: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_share(self.flops)
        if self.align > 1 and self.rounding == "up":
            raise ValueError("rounding 'up' lets more train than the budget allows; take 'down'")

    @property
    def mu(self) -> float:
        """See Policy."""
        return self.policy.mu

    @property
    def recursion(self) -> Recursion:
        """See Policy."""
        return self.policy.recursion

    @property
    def align(self) -> int:
        """Of `policy`."""
        return self.policy.align

    @property
    def rounding(self) -> Rounding:
        """Of `policy`."""
        return self.policy.rounding

    @property
    def reading(self) -> str:
        """Of `policy`."""
        return getattr(self.policy, "reading", "phi")

    @property
    def width(self) -> int:
        """Of `policy`."""
        return getattr(self.policy, "width", 0)

    def check(self, neurons: NeuronIndex) -> None:
        """Raises ValueError where the groups do not fit, or the budget is out of reach."""
        if isinstance(self.policy, GroupEquilibrium):
            self.policy.check(neurons)
        _check_reach(self.flops, neurons)

    def frozen(self, epoch: int, neurons: NeuronIndex, velocity: Tensor) -> Tensor:
        """Those at equilibrium, and as many more as the budget takes."""
        # What has been fixed since the count costs as little as what is frozen.
        frozen = self.policy.frozen(epoch, neurons, velocity) & neurons.freezable | neurons.fixed
        return self._filled(frozen, neurons, velocity) & neurons.freezable

    def _filled(self, frozen: Tensor, neurons: NeuronIndex, velocity: Tensor) -> Tensor:
        assert neurons.flops is not None
        speed = velocity.abs().nan_to_num(torch.inf)
        if not isinstance(self.policy, GroupEquilibrium):
            return _fill_by_rows(frozen, speed, neurons, self.flops * neurons.flops.dense)
        groups = []
        for group, value in self.policy.speeds(neurons, velocity):
            speed[group] = value
            groups.append(group)
        return _fill_by_groups(frozen, speed, groups, neurons, self.flops * neurons.flops.dense)


@dataclass(frozen=True, slots=True)
class _Move:
    """Neurons that may stand still together. `score`: their |velocity| over what that saves."""

    neurons: Tensor
    score: float
    saved: int


def _moves(
    frozen: Tensor, speed: Tensor, bundles: list[Tensor], flops: RequiredFlops
) -> list[_Move]:
    """What is left to freeze of each bundle, the slowest for what it saves first.

    A bundle may end input gradients; of those that save nothing as yet the slowest come last.
    """
    now, found = flops(frozen), []
    for bundle in bundles:
        left = bundle[~frozen[bundle] & speed[bundle].isfinite()]
        if len(left):
            saved = now - flops(frozen.index_fill(0, left, True))
            found.append(_Move(left, float(speed[left].sum()) / max(saved, 1e-9), saved))
    return sorted(found, key=lambda move: move.score)


def _fill_by_groups(
    frozen: Tensor, speed: Tensor, groups: list[Tensor], neurons: NeuronIndex, budget: float
) -> Tensor:
    """`frozen`, and whole groups until the budget is kept.

    What each saves is weighed anew when a layer has come to stand still.
    """
    assert neurons.flops is not None
    frozen = frozen.clone()
    while neurons.flops(frozen) > budget:
        moves, still = _moves(frozen, speed, groups, neurons.flops), _still(frozen, neurons)
        for move in moves:
            frozen[move.neurons] = True
            if neurons.flops(frozen) <= budget or _still(frozen, neurons) > still:
                break
        if not moves:
            break
    return frozen


def _fill_by_rows(frozen: Tensor, speed: Tensor, neurons: NeuronIndex, budget: float) -> Tensor:
    """`frozen`, and single neurons until the budget is kept.

    They come one by one, by what the weight gradient of their row costs; or all that are left of a
    layer, where that ends input gradients and is cheaper so.
    """
    assert neurons.flops is not None
    flops, frozen, layers = neurons.flops, frozen.clone(), members("layers", neurons)
    while flops(frozen) > budget:
        moves = _moves(frozen, speed, layers, flops)
        if not moves:
            break
        ends = [m for m in moves if m.saved > float(flops.rows[m.neurons].sum()) or not m.saved]
        taken = _rows_below(ends[0].score if ends else torch.inf, frozen, speed, neurons)
        if not len(taken):
            taken = ends[0].neurons
            taken = taken[speed[taken].argsort(stable=True)]
        frozen[taken[: _fewest(frozen, taken, budget, flops)]] = True
    return frozen


def _rows_below(score: float, frozen: Tensor, speed: Tensor, neurons: NeuronIndex) -> Tensor:
    """Neurons whose |velocity| over what their row saves is at most `score`, the least first, up to
    the first that is the last of its layer.
    """
    assert neurons.flops is not None
    ratio = (speed / neurons.flops.rows).masked_fill(frozen | ~neurons.freezable, torch.inf)
    order = ratio.nan_to_num(torch.inf).argsort(stable=True)
    order = order[(ratio[order] <= score) & ratio[order].isfinite()]
    place = torch.full(frozen.shape, len(order)).index_copy(0, order, torch.arange(len(order)))
    ends = [
        int(place[part][~frozen[part]].max())
        for _, part in neurons.items()
        if not bool(frozen[part].all())
    ]
    return order[: min([*ends, len(order) - 1]) + 1]


def _still(frozen: Tensor, neurons: NeuronIndex) -> int:
    """How many layers stand still as a whole."""
    return sum(bool(frozen[part].all()) for _, part in neurons.items())


def _fewest(frozen: Tensor, order: Tensor, budget: float, flops: RequiredFlops) -> int:
    """How many of `order` must freeze, in this order, to keep the budget; all if that is too few.

    The FLOPs never grow with the mask, so that halving finds it.
    """
    low, high = 1, len(order)
    while low < high:
        middle = (low + high) // 2
        if flops(frozen.index_fill(0, order[:middle], True)) <= budget:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(frozen=True, slots=True)
class _LayersInOrder:
    """Freezes whole layers in an order, as far as that leaves the share `flops` of a backward."""

    flops: float
    needs_flops: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_share(self.flops)

    def check(self, neurons: NeuronIndex) -> None:
        """Raises ValueError where that share is out of reach."""
        _check_reach(self.flops, neurons)

    def _fitting(self, units: list[Tensor], neurons: NeuronIndex, *, skip: bool) -> Tensor:
        """The `units` that fit, in their order; at one that does not, end, or `skip` it."""
        assert neurons.flops is not None
        fixed, freezable = neurons.fixed, neurons.freezable
        mask = fixed
        for unit in units:
            further = mask.index_fill(0, unit, True) & freezable | fixed
            if neurons.flops(further) >= self.flops * neurons.flops.dense:
                mask = further
            elif not skip:
                break
        return mask & freezable


def _units(neurons: NeuronIndex) -> list[Tensor]:
    """The neurons of each layer with those of the normalisation layers behind it, in the order in
    which a forward calls them: by themselves those would save nothing, and always fit.
    """
    assert neurons.flops is not None
    units: list[list[Tensor]] = []
    for name in neurons.flops.order:
        part = neurons[name]
        multiplies = bool((neurons.flops.rows[part] > 0).any())
        if not units or (multiplies and any((neurons.flops.rows[p] > 0).any() for p in units[-1])):
            units.append([])
        units[-1].append(torch.arange(part.start, part.stop))
    return [torch.cat(unit) for unit in units]


@dataclass(frozen=True, slots=True)
class RandomLayers(_LayersInOrder, NoVelocity):
    """Control: whole layers stand still, each with the norms behind it, drawn at random anew every
    epoch, as many as leave the share `flops` of the dense backward's FLOPs, or a little more.
    """

    seed: int = 0

    def frozen(self, epoch: int, neurons: NeuronIndex, velocity: Tensor) -> Tensor:
        """A draw that depends on (seed, epoch) alone, so that resuming needs no state."""
        units = _units(neurons)
        drawn = torch.randperm(len(units), generator=generator_of(self.seed, epoch)).tolist()
        return self._fitting([units[place] for place in drawn], neurons, skip=True)


@dataclass(frozen=True, slots=True)
class FreezeFirst(_LayersInOrder, NoVelocity):
    """Control: from epoch 1 on the layers nearest to the input stand still, in the order in which
    a forward calls them, as many as leave the share `flops` of the dense backward's FLOPs, or a
    little more.
    """

    def frozen(self, epoch: int, neurons: NeuronIndex, velocity: Tensor) -> Tensor:
        """The first layers."""
        assert neurons.flops is not None
        parts = [neurons[name] for name in neurons.flops.order]
        layers = [torch.arange(part.start, part.stop) for part in parts]
        return self._fitting(layers, neurons, skip=False)


@dataclass(frozen=True, slots=True)
class SlowestLayers(_LayersInOrder):
    """Control: the layers of the smallest median |velocity| stand still, each with the norms behind
    it, by rank instead of by a threshold, as many as leave the share `flops` of the dense
    backward's FLOPs, or a little more.
    """

    mu: float = 0.5
    recursion: Recursion = "paper"
    needs_velocity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_share(self.flops)
        check_mu(self.mu, self.recursion)

    def frozen(self, epoch: int, neurons: NeuronIndex, velocity: Tensor) -> Tensor:
        """The slowest layers; one with an undefined median trains."""
        speed = velocity.abs().nan_to_num(torch.inf)
        ranked = [(median(speed[unit].tolist()), unit) for unit in _units(neurons)]
        ranked = sorted((pair for pair in ranked if pair[0] < torch.inf), key=lambda pair: pair[0])
        return self._fitting([unit for _, unit in ranked], neurons, skip=True)


def _check_share(flops: float) -> None:
    """Raises ValueError for a share outside (0, 1]."""
    if not 0 < flops <= 1:
        raise ValueError(f"flops must be a share above 0 and at most 1, got {flops}")


def _check_reach(flops: float, neurons: NeuronIndex) -> None:
    """Raises ValueError where the backward needs more even with all frozen that may freeze."""
    if neurons.flops is None:
        return
    least = neurons.flops(neurons.freezable | neurons.fixed) / max(neurons.flops.dense, 1)
    if least > flops:
        raise ValueError(
            f"flops = {flops:g} is out of reach: with every neuron that may freeze standing still "
            f"the backward still needs {least:.3g} of its FLOPs; ask for more, or exclude less"
        )
