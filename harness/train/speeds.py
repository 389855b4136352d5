"""What freezing saves of steps that were timed: rows, from which share on it pays, sentences."""

from dataclasses import asdict, dataclass, field
from typing import Any

import neq
from harness.flops.drawing import Granularity

Kind = tuple[Granularity, neq.Gradient]

KINDS: dict[Kind, str] = {
    ("neuron", "exact"): "neurons at random",
    ("neuron-aligned", "exact"): "neurons at random, a multiple of {align} training in each layer",
    ("layer", "exact"): "whole layers at random",
    ("neuron", "cut"): "neurons at random, gradient cut (an approximation)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One share of frozen neurons: times, FLOPs and bytes over those of the dense model.

    `frozen`: as asked for, `drawn`: of the neurons that may freeze, what the mask really freezes.
    `backward_ratio` (of all that torch's autograd engine is called for) and `step_ratio` are
    medians over `pairs` of a step and the dense ones nearest to it, low and high their quartiles.
    `activation_ratio`: what is kept for the backward;
    `optimizer_ratio`: the state of an optimizer that has never known another mask. `floor_ratio`:
    time of the backward with all weight gradients left out and all input gradients kept. None:
    not known, as the FLOPs of a model that fvcore can't count.
    """

    granularity: Granularity
    gradient: neq.Gradient
    frozen: float
    drawn: float
    backward_ratio: float | None
    backward_ratio_low: float | None
    backward_ratio_high: float | None
    step_ratio: float
    step_ratio_low: float
    step_ratio_high: float
    required_ratio: float | None
    executed_ratio: float | None
    floor_ratio: float | None
    activation_ratio: float | None
    optimizer_ratio: float | None
    pairs: int

    @property
    def faster(self) -> bool:
        """Whether a step is: the upper quartile lies below 1."""
        return self.drawn > 0 and self.step_ratio_high < 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """What a step costs with nothing frozen: median seconds, and bytes as of Row.

    `compile_seconds`: of the first step less a later one, None where it compiled nothing. Torch
    keeps on disk what it has compiled: another time it takes less.
    """

    step_seconds: float
    backward_seconds: float | None
    activation_bytes: int
    optimizer_bytes: int
    compile_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What was timed: rows of one model on one device; `align`: of "neuron-aligned"; `compiled`:
    whether steps were, frozen and dense ones alike.
    """

    name: str
    device: str
    batch: int | None
    precision: str
    channels_last: bool
    align: int
    dense: Dense
    compiled: bool = False
    rows: list[Row] = field(default_factory=list)

    def of(self, kind: Kind) -> list[Row]:
        """The rows of one granularity and gradient, in the order in which they were asked for."""
        return [row for row in self.rows if (row.granularity, row.gradient) == kind]

    @property
    def kinds(self) -> dict[Kind, str]:
        """The granularities and gradients that have rows, with a title for each."""
        return {
            kind: title.format(align=self.align) for kind, title in KINDS.items() if self.of(kind)
        }

    def pays_from(self, kind: Kind) -> float | None:
        """The smallest share that was timed from which on a step is faster at each, or None.

        Faster: the upper quartile of `step_ratio` is below 1.
        """
        least = None
        for row in sorted(self.of(kind), key=lambda row: -row.frozen):
            if not row.faster:
                break
            least = row.frozen
        return least

    @property
    def sentences(self) -> list[str]:
        """In words: from which share on it pays, and where the floor is."""
        said = [self._pays(kind, title) for kind, title in self.kinds.items()]
        floor = self.rows[0].floor_ratio if self.rows else None
        if floor is not None:
            said.append(
                "Floor: with every input gradient, but the weight gradients of what never freezes "
                f"alone, the backward takes {floor:.2f}."
            )
        return said

    @property
    def pairs(self) -> int:
        """The fewest pairs of steps of a row."""
        return min(row.pairs for row in self.rows)

    def _pays(self, kind: Kind, title: str) -> str:
        start, title = self.pays_from(kind), title[0].upper() + title[1:]
        if start is None:
            timed = max(row.frozen for row in self.of(kind))
            return f"{title}: it does not pay here, up to {timed:.0%} frozen."
        (row,) = [row for row in self.of(kind) if row.frozen == start][:1]
        return f"{title}: it pays from {start:.0%} on, where a step takes {row.step_ratio:.2f}."

    def json(self) -> dict[str, Any]:
        """The documented JSON, as plain values."""
        found: dict[str, dict[str, float | None]] = {}
        for kind in self.kinds:
            found.setdefault(kind[0], {})[kind[1]] = self.pays_from(kind)
        return asdict(self) | {"pays_from": found}
