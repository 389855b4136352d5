"""Groups of neurons that stand still together: layers, modules, or blocks of rows.

Hardware saves in blocks and layers, so that decisions for whole ones cost no more than they save.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import ClassVar, Literal

import torch
from torch import Tensor

from neq.alignment import Rounding, check_alignment
from neq.equilibrium import Recursion
from neq.neurons import NeuronIndex
from neq.policies import below, check_eps, check_mu

Groups = Literal["layers"] | int | Sequence[str]
WIDEST = 1024  # neurons whose outputs are compared at once: products grow with the square


def members(groups: Groups, neurons: NeuronIndex) -> list[Tensor]:
    """The neurons of each group that may freeze, as places in the index, int64; none is empty.

    `groups`: "layers"; a number k for blocks of k consecutive rows of a layer, of which the last
    may be smaller; or names of modules, each with all layers below it. Neurons of no group train.
    Raises ValueError for names that match no layer, or none that may freeze, or overlap; a group
    that is fixed is left out.
    """
    if not isinstance(groups, str | int):
        return [group for group in _named(groups, neurons) if len(group)]
    width = groups if isinstance(groups, int) else len(neurons)
    freezable, found = neurons.freezable, []
    for _, part in neurons.items():
        layer = torch.arange(part.start, part.stop)
        found += list(torch.split(layer[freezable[part]], width))
    return [group for group in found if len(group)]


def _named(names: Sequence[str], neurons: NeuronIndex) -> list[Tensor]:
    taken = torch.zeros(len(neurons), dtype=torch.bool)
    freezable, found = neurons.freezable, []
    for name in names:
        mask = neurons.select([name])
        if bool((mask & taken).any()):
            raise ValueError(f"groups: {name!r} overlaps with another group")
        taken |= mask
        found.append((mask & freezable).nonzero().squeeze(1))
        if not bool((mask & ~neurons.excluded).any()):
            raise ValueError(f"groups: {name!r} has no neuron that may freeze")
    return found


def quantile(values: Tensor, q: float) -> float:
    """The quantile q of `values` [n], which may be infinite, by linear interpolation."""
    place = Fraction(str(q)) * (len(values) - 1)  # in decimal arithmetic: 0.9 of 10 is 9
    ordered = values.sort().values
    low, high = ordered[floor(place)].item(), ordered[ceil(place)].item()
    between = float(place - floor(place))
    return low if not between else low + between * (high - low)


@dataclass(frozen=True, slots=True)
class GroupEquilibrium:
    """Freezes whole groups: those whose members' |velocity| has its `quantile` below `eps`.

    The quantile is over the members that may freeze; an undefined velocity counts as infinite.
    `groups`: "layers", a number k for blocks of k rows, or names of modules. `reading="cka"`: the
    velocity is that of the linear CKA between a layer's outputs now and one epoch ago
    (neq.cka), which a rotation within the layer leaves alone, read in blocks of at most
    1,024 rows; a group then stands still when all its blocks do, whatever the `quantile`.
    """

    eps: float = 1e-3
    mu: float = 0.5
    recursion: Recursion = "paper"
    groups: Groups = "layers"
    quantile: float = 0.5
    reading: Literal["phi", "cka"] = "phi"
    align: int = 1
    rounding: Rounding = "down"
    needs_velocity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_mu(self.mu, self.recursion)
        check_alignment(self.align, self.rounding)
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must be between 0 and 1, got {self.quantile}")
        if isinstance(self.groups, int) and (self.groups is True or self.groups < 1):
            raise ValueError(f"groups: blocks must have at least 1 row, got {self.groups}")
        if not self.groups:
            raise ValueError("groups: an empty list; name at least one module")
        if isinstance(self.groups, str) and self.groups != "layers":
            raise ValueError(f"groups: write a list of names, [{self.groups!r}], or 'layers'")
        if self.reading not in ("phi", "cka"):
            raise ValueError(f"reading must be 'phi' or 'cka', got {self.reading!r}")

    @property
    def width(self) -> int:
        """Rows of a layer that CKA reads at once."""
        return min(self.groups, WIDEST) if isinstance(self.groups, int) else WIDEST

    def check(self, neurons: NeuronIndex) -> None:
        """Raises ValueError where the groups do not fit the model."""
        members(self.groups, neurons)

    def speeds(self, neurons: NeuronIndex, velocity: Tensor) -> list[tuple[Tensor, float]]:
        """Each group with the number that is compared with `eps`."""
        speed, q = velocity.abs().nan_to_num(torch.inf), self.quantile
        q = 1.0 if self.reading == "cka" else q
        groups = members(self.groups, neurons)
        return [(group, quantile(speed[group], q)) for group in groups]

    def frozen(self, epoch: int, neurons: NeuronIndex, velocity: Tensor) -> Tensor:
        """The members of all groups at equilibrium."""
        mask = torch.zeros(len(neurons), dtype=torch.bool)
        for group, speed in self.speeds(neurons, velocity):
            mask[group] = below(torch.tensor(speed, dtype=torch.float64), self.eps, self.recursion)
        return mask
