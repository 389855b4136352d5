"""Pairs of times that are taken by turns, and what follows from them for a trial's epochs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 3  # pairs of each plan, at least
PAIRS = 24  # of a method, at least: where plans are few, each is measured more often
RESAMPLES = 1000
ENDS = (2.5, 97.5)  # per cent

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Turns:
    """Times of epochs under plans over those of plain epochs, pair by pair.

    `ratios` [plans, pairs]; `plain`: seconds of a plain epoch, median over all pairs.
    """

    ratios: Values
    plain: float

    @staticmethod
    def affordable(plans: int, seconds: float, pair: float) -> tuple[int, int]:
        """(rounds, plans) that fit into so many seconds, where a pair takes `pair` of them.

        At least two plans are measured, and each three times.
        """
        most = max(int(seconds / pair / ROUNDS), 2)
        if plans >= most:
            return ROUNDS, most
        wanted = max(ROUNDS, -(-PAIRS // plans))
        return max(min(wanted, int(seconds / pair / plans)), ROUNDS), plans

    def ratio(self, weights: Values, decisions: Sequence[float]) -> tuple[float, float, float]:
        """A trial's seconds over plain ones, and the ends of a bootstrap over pairs.

        `weights` [plans]: of its epochs, as of `epoch_weights`; `decisions`: seconds of deciding
        after an epoch over those of a plain epoch.
        """
        decided = np.array([decisions], dtype=float)
        found = weights @ np.median(self.ratios, axis=1) + np.median(decided)
        random = np.random.default_rng(0)
        again = _resampled(self.ratios, random) @ weights + _resampled(decided, random)[:, 0]
        low, high = np.percentile(again, ENDS)
        return float(found), float(low), float(high)


def _resampled(values: Values, random: np.random.Generator) -> Values:
    """Medians of rows [plans, pairs], of pairs drawn with replacement: [resamples, plans]."""
    plans, pairs = values.shape
    drawn = random.integers(pairs, size=(RESAMPLES, plans, pairs))
    medians: Values = np.median(values[np.arange(plans)[:, None], drawn], axis=2)
    return medians


def by_turns(
    pairs: Sequence[Callable[[int], tuple[float, float]]],
    rounds: int,
    progress: Callable[[int, int], None],
) -> Turns:
    """Time plan after plan, round after round: `pairs[plan](round)` gives seconds of an epoch under
    the plan, and of a plain one.
    """
    times = np.empty((len(pairs), rounds, 2))
    for number in range(rounds):
        for plan, pair in enumerate(pairs):
            times[plan, number] = pair(number)
            progress(number * len(pairs) + plan + 1, rounds * len(pairs))
    return Turns(times[..., 0] / times[..., 1], float(np.median(times[..., 1])))


def chosen_plans(executed: Sequence[int], most: int) -> list[int]:
    """Numbers of at most so many plans, two or more, at equal quantiles of their executed FLOPs.

    The least and the most are among them.
    """
    order = np.argsort(np.array(executed), kind="stable")
    places = np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int)
    return [int(plan) for plan in order[np.unique(places)]]


def epoch_weights(epochs: Sequence[int], executed: Sequence[int], chosen: Sequence[int]) -> Values:
    """By what the values of `chosen` plans are multiplied for their mean over epochs: [chosen].

    `epochs`: the plan of each. One that is not among the chosen ones lies between the two that are
    nearest to it by executed FLOPs.
    """
    known = np.array([executed[plan] for plan in chosen], dtype=float)
    order = np.argsort(known, kind="stable")
    weights, place = np.zeros(len(chosen)), {plan: i for i, plan in enumerate(chosen)}
    for plan in epochs:
        if plan in place:
            weights[place[plan]] += 1
            continue
        above = int(np.clip(np.searchsorted(known[order], executed[plan]), 1, len(order) - 1))
        low, high = order[above - 1], order[above]
        width = known[high] - known[low]
        share = (executed[plan] - known[low]) / width if width else 0.5
        weights[low] += 1 - share
        weights[high] += share
    return weights / len(epochs)
