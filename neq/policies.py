"""Who trains in the coming epoch: each policy turns readings into a mask of frozen neurons."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from neq.alignment import Rounding, check_alignment
from neq.equilibrium import Recursion
from neq.neurons import NeuronIndex


class Policy(Protocol):
    """What NeuronFreezer asks of a policy: who stands still in the coming epoch.

    A policy may have more, which is asked for where it is there: `align` and `rounding`
    (neq.alignment), `reading` and `width` (GroupEquilibrium), `needs_flops` (whether it asks
    `neurons.flops` what a backward costs) and `check(neurons)`, which raises ValueError where the
    policy does not fit the model.
    """

    @property
    def needs_velocity(self) -> bool:
        """Whether the policy looks at velocities; if not, no validation sample is evaluated."""
        ...

    @property
    def mu(self) -> float:
        """Momentum of the velocity (neq.Reading.advance)."""
        ...

    @property
    def recursion(self) -> Recursion:
        """Recursion of the velocity (neq.Reading.advance)."""
        ...

    def frozen(self, epoch: int, neurons: NeuronIndex, velocity: Tensor) -> Tensor:
        """The mask of who stands still in `epoch` (≥ 1): bool [neurons].

        `velocity`: float64 [neurons], NaN where it is not defined.
        """
        ...


def check_policy(policy: Policy | None) -> None:
    """Raises TypeError for what is no policy: a class of one, for example."""
    if policy is not None and (isinstance(policy, type) or not hasattr(policy, "frozen")):
        raise TypeError(f"policy must be one such as neq.AtEquilibrium(), not {policy!r}")


@dataclass(frozen=True, slots=True)
class NoVelocity:
    """What a policy has that looks at no velocity."""

    needs_velocity: ClassVar[bool] = False
    mu: ClassVar[float] = 0.0
    recursion: ClassVar[Recursion] = "paper"


@dataclass(frozen=True, slots=True)
class Everyone(NoVelocity):
    """All neurons train: plain training."""

    def frozen(self, epoch: int, neurons: NeuronIndex, velocity: Tensor) -> Tensor:
        """Nobody: a mask of False."""
        return torch.zeros(len(neurons), dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class FreezeAfter(NoVelocity):
    """All neurons stand still from the given epoch (counted from 0) on."""

    epoch: int

    def __post_init__(self) -> None:
        if self.epoch < 1:
            raise ValueError(f"epoch must be at least 1, got {self.epoch}: epoch 0 always trains")

    def frozen(self, epoch: int, neurons: NeuronIndex, velocity: Tensor) -> Tensor:
        """Everybody from `self.epoch` on, before that nobody."""
        return torch.full((len(neurons),), epoch >= self.epoch)


@dataclass(frozen=True, slots=True)
class Random(NoVelocity):
    """Freezes floor((1 − keep) · C) of the C neurons of each layer, drawn anew every epoch."""

    keep: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_keep(self.keep)

    def frozen(self, epoch: int, neurons: NeuronIndex, velocity: Tensor) -> Tensor:
        """A draw that depends on (seed, epoch) alone, so that resuming needs no state."""
        generator = generator_of(self.seed, epoch)
        mask = torch.zeros(len(neurons), dtype=torch.bool)
        for _, part in neurons.items():
            size = part.stop - part.start
            drawn = torch.randperm(size, generator=generator)
            mask[part.start + drawn[: _share(self.keep, size)]] = True
        return mask


@dataclass(frozen=True, slots=True)
class AtEquilibrium:
    """Freezes neurons whose |velocity| is below `eps` (NEq, section 3.2).

    `recursion="paper"` compares strictly; `"reference"`, the authors' code, with ≤. `align` and
    `rounding`: in each layer a multiple of `align` neurons trains (neq.alignment).
    """

    eps: float = 1e-3
    mu: float = 0.5
    recursion: Recursion = "paper"
    align: int = 1
    rounding: Rounding = "down"
    needs_velocity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_mu(self.mu, self.recursion)
        check_alignment(self.align, self.rounding)

    def frozen(self, epoch: int, neurons: NeuronIndex, velocity: Tensor) -> Tensor:
        """Those at equilibrium; a neuron whose velocity is NaN is not."""
        return below(velocity.abs(), self.eps, self.recursion)


@dataclass(frozen=True, slots=True)
class SmallestVelocity:
    """Freezes floor((1 − keep) · C) of the C neurons of each layer: those with the least
    |velocity|. `align` and `rounding`: as of AtEquilibrium.
    """

    keep: float
    mu: float = 0.5
    recursion: Recursion = "paper"
    align: int = 1
    rounding: Rounding = "down"
    needs_velocity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_keep(self.keep)
        check_mu(self.mu, self.recursion)
        check_alignment(self.align, self.rounding)

    def frozen(self, epoch: int, neurons: NeuronIndex, velocity: Tensor) -> Tensor:
        """The slowest of each layer, of equals the first; a neuron whose velocity is NaN trains."""
        mask = torch.zeros(len(neurons), dtype=torch.bool)
        speed = velocity.abs().nan_to_num(torch.inf)
        for _, part in neurons.items():
            slowest = torch.argsort(speed[part], stable=True)
            mask[part.start + slowest[: _share(self.keep, part.stop - part.start)]] = True
        return mask & ~velocity.isnan()


def generator_of(seed: int, epoch: int) -> torch.Generator:
    """The random stream of an epoch's draws, which follows from (seed, epoch) alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


def _share(keep: float, size: int) -> int:
    """floor((1 − keep) · size) in decimal arithmetic: keep 0.8 of 10 leaves 2, not 1."""
    return math.floor((1 - Fraction(str(keep))) * size)


def _check_keep(keep: float) -> None:
    if not 0 <= keep <= 1:
        raise ValueError(f"keep must be between 0 and 1, got {keep}")


def below(speed: Tensor, eps: float, recursion: Recursion) -> Tensor:
    """Where `speed` is below `eps`: strictly in the paper, or equal in the authors' code."""
    return speed < eps if recursion == "paper" else speed <= eps


def check_eps(eps: float) -> None:
    """Raises ValueError for a threshold below 0."""
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def check_mu(mu: float, recursion: str) -> None:
    """Raises ValueError for a momentum outside [0, 1), and for an unknown recursion."""
    if not 0 <= mu < 1:
        raise ValueError(f"mu must be in [0, 1), got {mu}")
    if recursion not in ("paper", "reference"):
        raise ValueError(f"recursion must be 'paper' or 'reference', got {recursion!r}")
