"""What the masks of finished trials cost: their steps taken once more, by turns with plain ones.

What a step costs depends on the mask in force, on shapes, precision, optimizer and device, and
hardly on the weights. So one training of the method takes a few steps under each mask that its
trials had, one of the baseline as many beside them, and the epochs of each trial are added up: the
first step after freezing, the other steps, and a decision, which freezes. No weight moves. Tests,
checkpoints and tuning are left out, and the learning rate's schedule, which costs next to nothing.
Compilations are left out, too, of both: a training pays for one once, however long it goes on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

import neq
from harness.compilations import compilations, room
from harness.data.dataset import Microbatch
from harness.storage.locations import Location
from harness.storage.masks import EpochMask, UnknownMaskError
from harness.suite.config import TrialSpec
from harness.train.assembly import Assembly, assemble
from harness.train.kept import kept_for_backward, state_bytes
from harness.train.loop import Loop
from harness.train.turns import Turns, by_turns, chosen_plans, epoch_weights

STEPS = 3  # that are timed in a row, at least
ROW = 0.05  # seconds that such a row takes, at least
WARM = 3  # pairs that are not counted
DECISIONS = 3
SETTLED = 10  # epochs under a plan, of which one at least must compile nothing

Progress = Callable[[int, int], None]  # pairs that were taken, of how many


class UnreplayableError(Exception):
    """Why the masks of a trial can't be replayed here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What a trial, by its key, did in its epochs: masks, and FLOPs that its backwards executed."""

    trial: str
    masks: Sequence[EpochMask]
    executed: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where steps are taken: on which device, where the suite's results lie, and the tuning with
    which the trials were (None: that of this kind of machine, kept there or measured).
    """

    device: torch.device
    location: Location
    tuning: Mapping[str, Any] | None

    def assemble(self, spec: TrialSpec) -> Assembly:
        """All that the trial trains with."""
        state = None if self.tuning is None else {"tuning": self.tuning}
        return assemble(spec, self.device, self.location, state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A row of `replays`, but for what it was measured on."""

    trial: str
    seconds: float
    seconds_plain: float
    ratio: float
    ratio_low: float
    ratio_high: float
    plans: int
    plans_measured: int
    activation_bytes: float
    activation_bytes_plain: float
    optimizer_bytes: float
    optimizer_bytes_plain: float


def replay(
    method: TrialSpec,
    plain: TrialSpec,
    courses: Sequence[Course],
    place: Place,
    seconds: float,
    progress: Progress,
) -> list[Replayed]:
    """The trials of one method, replayed within about so many seconds, without compiling.

    `method`, `plain`: a trial of the method, and one of the baseline. Raises UnreplayableError
    where the method has no freezer, or its masks can't be had back, and UserError as a trial would.
    """
    with room():  # plans come by turns: each is compiled for once, as in a trial
        return _replay(method, plain, courses, place, seconds, progress)


def _replay(
    method: TrialSpec,
    plain: TrialSpec,
    courses: Sequence[Course],
    place: Place,
    seconds: float,
    progress: Progress,
) -> list[Replayed]:
    if not all(len(course.masks) == len(course.executed) for course in courses):
        raise UnreplayableError("its results don't hold the masks of all epochs")
    sides = Sides(method, plain, place)
    plans = list(dict.fromkeys(mask for course in courses for mask in course.masks))
    masks = [sides.mask(plan) for plan in plans]
    executed = [sides.executed(mask) for mask in masks]
    at = {plan: number for number, plan in enumerate(plans)}
    for course in courses:
        if [executed[at[mask]] for mask in course.masks] != list(course.executed):
            raise UnreplayableError("here its backwards would not execute what they did execute")
    sides.warm_up()
    rounds, most = sides.affordable(len(plans), seconds)
    chosen = chosen_plans(executed, most)
    turns = by_turns([partial(sides.pair, masks[p]) for p in chosen], rounds, progress)
    bytes_kept = np.array([sides.kept(masks[p]) for p in chosen], dtype=float)
    kept_plain = sides.kept_plain()
    decisions = sides.decisions()
    found = []
    for course in courses:
        epochs = [at[mask] for mask in course.masks]
        weights = epoch_weights(epochs, executed, chosen)
        ratio, low, high = turns.ratio(weights, decisions)
        whole = len(epochs) * turns.plain
        found.append(
            Replayed(
                trial=course.trial,
                seconds=whole * ratio,
                seconds_plain=whole,
                ratio=ratio,
                ratio_low=low,
                ratio_high=high,
                plans=len(set(epochs)),
                plans_measured=len(set(epochs) & set(chosen)),
                activation_bytes=float(weights @ bytes_kept),
                activation_bytes_plain=kept_plain,
                optimizer_bytes=sides.state([masks[epoch] for epoch in epochs]),
                optimizer_bytes_plain=state_bytes(sides.plain.work.optimizer),
            )
        )
    return found


class _Training:
    """A trial's training that can be had step by step; no weight moves: the rate is zero."""

    def __init__(self, spec: TrialSpec, place: Place) -> None:
        self.work = replace(place.assemble(spec), scheduler=None)
        for group in self.work.optimizer.param_groups:
            group["lr"] = 0.0
        self._loop = Loop(self.work, spec.suite.recipe, spec.seed)
        self._steps = chain.from_iterable(map(self._loop.steps, count()))
        self._sample: Microbatch | None = None

    def take(self, steps: int) -> None:
        """So many steps, each with the next batch."""
        for _ in range(steps):
            next(self._steps)

    def kept(self) -> int:
        """Bytes that a forward keeps for its backward."""
        self._sample = self._sample or next(iter(self.work.batches.train(0)))
        with kept_for_backward(self.work.model) as kept:
            _held = self._loop.forward(self._sample)
        return kept.total


class Sides:
    """A method's training and a plain one, whose steps are taken by turns."""

    def __init__(self, method: TrialSpec, plain: TrialSpec, place: Place) -> None:
        self._device = place.device
        self.method = _Training(method, place)
        freezer = getattr(self.method.work.method, "freezer", None)
        if not isinstance(freezer, neq.NeuronFreezer):
            raise UnreplayableError("its method has no NeuronFreezer whose masks could be set")
        self._freezer = freezer
        self.plain = _Training(plain, place)
        self._length = self.method.work.batches.steps
        self._row, self._pair_seconds = STEPS, 0.0

    def mask(self, plan: EpochMask) -> Tensor:
        """The mask of an epoch, bool [neurons]; raises UnreplayableError where it is not known."""
        try:
            return plan.tensor(self._freezer.neurons) & ~self._freezer.neurons.fixed
        except UnknownMaskError as error:
            raise UnreplayableError(str(error)) from None

    def executed(self, mask: Tensor) -> int:
        """FLOPs that the backwards of an epoch execute here under the mask."""
        self._freezer.freeze(mask)
        work = self.method.work
        samples = work.training.samples["train"]
        return work.costs.backward(mask, samples, self._freezer.plan).executed

    def warm_up(self) -> None:
        """Take some steps that are not counted, and see how long they take."""
        nobody = torch.zeros_like(self._freezer.frozen)
        for _ in range(WARM):
            first, _ = self.pair(nobody, 0)
            step = first / self._length
        self._row = max(STEPS, ceil(ROW / step))
        self._pair_seconds = 2 * step * (1 + self._row)

    def affordable(self, plans: int, seconds: float) -> tuple[int, int]:
        """How often each plan is measured, and of how many plans, in about so many seconds."""
        return Turns.affordable(plans, seconds, self._pair_seconds)

    def pair(self, mask: Tensor, number: int) -> tuple[float, float]:
        """Seconds of an epoch under the mask, and of a plain one; that begins every other time."""
        sides = [self._frozen_epoch, self._plain_epoch][:: 1 if number % 2 else -1]
        seconds = {side: side(mask) for side in sides}
        return seconds[self._frozen_epoch], seconds[self._plain_epoch]

    def _frozen_epoch(self, mask: Tensor) -> float:
        return self._epoch(self.method, lambda: self._freezer.freeze(mask))

    def _plain_epoch(self, _mask: Tensor) -> float:
        return self._epoch(self.plain, lambda: None)

    def _epoch(self, side: _Training, begin: Callable[[], None]) -> float:
        """Seconds of an epoch: its first step, and the others as long as those of a row. Freezing,
        which `begin` does, is part of a decision.
        """
        for _ in range(SETTLED):
            begin()
            with compilations() as compiled:
                with neq.stopwatch(self._device) as first:
                    side.take(1)
                with neq.stopwatch(self._device) as row:
                    side.take(self._row)
            # A trial pays for a compilation once, however many of its epochs need what came of it.
            # Charged to a plan it would be multiplied by them, and it is shorter here than it was
            # there: torch keeps on disk what it has compiled. So such an epoch is taken again.
            if not compiled:
                return first[0] + (self._length - 1) * row[0] / self._row
        raise UnreplayableError(f"each of {SETTLED} epochs under one mask compiled something anew")

    def decisions(self) -> list[float]:
        """Seconds of deciding over those of a plain epoch, taken by turns."""
        method, ratios = self.method.work.method, []
        self.method.work.start()
        for epoch in range(DECISIONS):
            self.method.work.training.count()
            with neq.stopwatch(self._device) as seconds:
                method.end_epoch(epoch)
            ratios.append(seconds[0] / self._plain_epoch(self._freezer.frozen))
        return ratios

    def kept(self, mask: Tensor) -> int:
        """Bytes that a forward keeps for its backward under the mask."""
        self._freezer.freeze(mask)
        return self.method.kept()

    def state(self, masks: Sequence[Tensor]) -> int:
        """Bytes of the optimizer's state in a training with these masks: what never trains has
        none.
        """
        always = torch.stack(list(masks)).all(dim=0)
        return state_bytes(self.method.work.optimizer, self._freezer.neurons, always)

    def kept_plain(self) -> int:
        """The same of plain training."""
        return self.plain.kept()
