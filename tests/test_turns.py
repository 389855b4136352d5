"""Pairs of times, and what they say of a trial: against hand-worked figures and naive loops."""

import random
from statistics import median

import numpy as np
import pytest

from harness.train.turns import Turns, by_turns, chosen_plans, epoch_weights


def test_a_trial_is_the_mean_of_its_epochs_and_a_decision():
    """Plans 0 to 2 take 1.0, 0.8 and 0.5 of a plain epoch; a decision 0.05 of one."""
    ratios = np.array([[1.0, 1.2, 0.9], [0.8, 0.7, 0.9], [0.5, 0.5, 0.6]])
    weights = epoch_weights([0, 0, 1, 2], [100, 70, 40], [0, 1, 2])
    found, low, high = Turns(ratios, 3.0).ratio(weights, [0.05, 0.04, 0.2])
    assert found == pytest.approx((1.0 + 1.0 + 0.8 + 0.5) / 4 + 0.05)
    assert low < found < high


def test_what_was_not_measured_lies_between_its_neighbours():
    executed = [100, 90, 60, 20]
    # Plan 1 is a quarter of the way from plan 0 to plan 2: 0.75 and 0.25 of them.
    assert epoch_weights([1], executed, [0, 2, 3]) == pytest.approx([0.75, 0.25, 0])
    assert epoch_weights([1, 1, 3, 3], executed, [3, 2, 0]) == pytest.approx([0.5, 0.125, 0.375])
    # A plan with as many FLOPs as a measured one, between two such: half of each.
    assert epoch_weights([1], [5, 5, 5], [0, 2]) == pytest.approx([0.5, 0.5])


def test_interpolation_agrees_with_numpy():
    numbers = random.Random(1)
    executed = numbers.sample(range(10**6), 40)
    chosen = chosen_plans(executed, 7)
    times = [numbers.random() for _ in chosen]
    known = sorted(zip([executed[plan] for plan in chosen], times, strict=True))
    wanted = np.interp(executed, *zip(*known, strict=True))
    for plan in range(40):
        assert epoch_weights([plan], executed, chosen) @ times == pytest.approx(wanted[plan])


def test_chosen_plans_lie_at_equal_quantiles_and_at_the_ends():
    executed = [50, 10, 40, 20, 30]
    assert [executed[p] for p in chosen_plans(executed, 3)] == [10, 30, 50]
    assert (
        sorted(chosen_plans(executed, 5)) == sorted(chosen_plans(executed, 99)) == [0, 1, 2, 3, 4]
    )
    assert chosen_plans([7], 2) == [0]


def test_the_bootstrap_is_that_of_a_naive_loop():
    numbers = random.Random(3)
    ratios = [[numbers.gauss(1, 0.2) for _ in range(9)] for _ in range(4)]
    decisions = [0.1, 0.3, 0.2]
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    again = []
    for _ in range(4000):
        total = median(numbers.choices(decisions, k=3))
        for weight, pairs in zip(weights, ratios, strict=True):
            total += weight * median(numbers.choices(pairs, k=9))
        again.append(total)
    _, low, high = Turns(np.array(ratios), 1.0).ratio(weights, decisions)
    assert [low, high] == pytest.approx(np.percentile(again, [2.5, 97.5]), abs=0.02)


def test_plans_are_taken_round_after_round():
    seen = []

    def pair(plan):
        def times(number):
            seen.append((plan, number))
            return 2.0 + plan, 4.0 + number

        return times

    told = []
    turns = by_turns([pair(0), pair(1)], 3, lambda done, of: told.append((done, of)))
    assert seen == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert told == [(n, 6) for n in range(1, 7)]
    assert turns.ratios == pytest.approx(np.array([[2 / 4, 2 / 5, 2 / 6], [3 / 4, 3 / 5, 3 / 6]]))
    assert turns.plain == 5.0


@pytest.mark.parametrize(
    "plans, seconds, rounds, of",
    [
        (10, 1000, 3, 10),  # there is time for more, and three each are 30 pairs
        (2, 1000, 12, 2),  # few plans: 24 pairs in all
        (2, 10, 5, 2),  # as many as fit
        (100, 60, 3, 20),  # a fifth of them
        (100, 0.001, 3, 2),  # never fewer than the two ends
        (1, 0.001, 3, 1),
    ],
)
def test_how_much_fits(plans, seconds, rounds, of):
    assert Turns.affordable(plans, seconds, pair=1.0) == (rounds, of)
