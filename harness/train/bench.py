"""Steps under masks and dense ones by turns: what a mask saves of a step's time, and of memory."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import fmean, median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

import neq
from harness.flops.drawing import Granularity
from harness.train.kept import kept_for_backward
from harness.train.watched import Watched
from neq.neurons import unwrapped
from neq.selective import TRACED

LEAST, MOST = 2, 60  # rounds
FIRST = 4  # rounds from which on the first one, in which memory and kernels were new, is left out
NEAR = 5  # masks between two dense visits
TIGHT = 0.01  # a mask is done where its medians are known so well: quartiles' distance over √pairs
ENOUGH = 6  # rounds before which none is
SHORT = 0.4  # seconds of a step: shorter ones feel that they find the memory of another mask
VISIT = 0.05  # seconds that are timed in one visit, at least

Times = tuple[float, float]  # of the backward and of the whole step


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles; NaN where nothing was seen."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of values among which there may be NaN."""
        seen = [value for value in values if not math.isnan(value)]
        if len(seen) < 2:
            return cls(*(seen or [math.nan]) * 3)
        low, middle, high = quantiles(seen, n=4, method="inclusive")
        return cls(low, middle, high)


@dataclass(slots=True)
class Case:
    """A mask, bool [neurons], how it came about, and what was seen under it.

    `floor`: every input gradient is computed, whatever is frozen. `ratios`: times over those of the
    dense steps nearest to them, by round; `kept`: bytes for a backward; `plan`: of the backward.
    """

    mask: Tensor
    granularity: Granularity = "neuron"
    gradient: neq.Gradient = "exact"
    share: float = 1.0
    floor: bool = False
    ratios: list[Times] = field(default_factory=list)
    kept: int = 0
    plan: Mapping[str, neq.LayerPlan] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.floor:
            return "the floor"
        return f"{self.share:.0%} of {self.granularity}s frozen, {self.gradient} gradient"

    @property
    def pairs(self) -> list[Times]:
        """The ratios, without the first one as soon as enough are left."""
        return self.ratios[1:] if len(self.ratios) >= FIRST else self.ratios

    def backward(self) -> Spread:
        """The backward's seconds over a dense one's."""
        return Spread.of([backward for backward, _ in self.pairs])

    def step(self) -> Spread:
        """The whole step's seconds over a dense one's."""
        return Spread.of([step for _, step in self.pairs])

    def tight(self) -> bool:
        """Whether more rounds would hardly tell more."""
        widest = TIGHT * math.sqrt(len(self.pairs))
        wide = any(s.high - s.low > widest for s in (self.backward(), self.step()))
        return len(self.ratios) >= ENOUGH and not wide


class Bench:
    """Takes the steps. `entrances`: layers whose input needs no gradient, for the floor.

    `kept`: bytes for the backward of a dense step; `compile_seconds`: what compiling it has taken,
    None where nothing was compiled.
    """

    def __init__(self, watched: Watched, timings: neq.Timings, entrances: Sequence[str]) -> None:
        self._watched, self._timings, self._entrances = watched, timings, entrances
        self.kept, _ = self._look()
        self._plain = [watched.take()]
        seconds = self._plain[0][1]
        self.compile_seconds = watched.compile_seconds(seconds)
        self._warm = int(seconds < SHORT)
        self._steps = math.ceil(VISIT / max(seconds, 1e-6))

    def _look(self) -> tuple[int, Times]:
        """Bytes that a step keeps for its backward, and its seconds."""
        for _ in range(2):
            before = len(self._watched.compiling)
            with kept_for_backward(self._watched.model) as kept:
                times = self._watched.take()
            if len(self._watched.compiling) == before:
                break  # else bytes of steps that were taken again are among them
        return kept.total, times

    def plain(self) -> Times:
        """Median seconds of dense steps."""
        return median(b for b, _ in self._plain), median(s for _, s in self._plain)

    def run(self, cases: Sequence[Case], ends: float, progress: Callable[[str], None]) -> None:
        """Visit each case once in a round, until its quartiles are tight or no round fits in any
        more before the clock says `ends` (time.perf_counter), to which compiling does not count;
        two rounds at least.
        """
        left, rounds, lasted = list(cases), 0, 0.0
        while left and rounds < MOST:
            began = time.perf_counter()
            if rounds >= LEAST and began + lasted > ends + sum(self._watched.compiling):
                return
            rounds += 1
            for case in self._round(left[:: 1 if rounds % 2 else -1]):
                progress(f"round {rounds}: {case}")
            lasted = time.perf_counter() - began
            left = [case for case in left if not case.tight()]

    def _round(self, cases: Sequence[Case]) -> Iterator[Case]:
        """Visit each, and tell which one comes next."""
        before = self._plain[-1]
        for start in range(0, len(cases), NEAR):
            group, times = cases[start : start + NEAR], []
            for case in group:
                yield case
                times.append(self._under(case))
            after = self._dense()
            near = fmean([before[0], after[0]]), fmean([before[1], after[1]])
            for case, (backward, step) in zip(group, times, strict=True):
                case.ratios.append((backward / near[0], step / near[1]))
            before = after

    def _dense(self) -> Times:
        times = self._visit()
        self._plain.append(times)
        return times

    def _under(self, case: Case) -> Times:
        """Mean seconds under the mask; the first time its bytes are counted, too."""
        with self._frozen(case) as freezer:
            if case.ratios:
                return self._visit()
            case.plan = dict(freezer.plan)
            case.kept, times = self._look()
            return self._visit() if self._warm else times

    def _visit(self) -> Times:
        """Mean seconds of some steps, after one to find the memory again where steps are short."""
        for _ in range(self._warm):
            self._watched.take()
        backward, step = zip(*[self._watched.take() for _ in range(self._steps)], strict=True)
        return fmean(backward), fmean(step)

    @contextmanager
    def _frozen(self, case: Case) -> Iterator[neq.NeuronFreezer]:
        watched = self._watched
        freezer = neq.NeuronFreezer(
            watched.model,
            watched.optimizer,
            neq.Everyone(),
            gradient=case.gradient,
            timings=self._timings,
        )
        modules = dict(unwrapped(watched.model).named_modules())
        try:
            freezer.freeze(case.mask)
            with ExitStack() as stack:
                for name in self._entrances if case.floor else ():
                    handle = modules[name].register_forward_hook(_require_gradient)
                    stack.callback(handle.remove)
                    modules[name].__dict__[TRACED].whole = False  # the same in compiled code
                yield freezer
        finally:
            freezer.remove()


def _require_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    if output.requires_grad or torch.compiler.is_compiling():
        return output
    return output.requires_grad_().clone()
