"""Held against scipy's tests, and against many draws of known truths."""

import math

import numpy
import pytest
from scipy import stats

from harness.report import intervals
from harness.report.intervals import Interval

A = {0: 0.9262, 1: 0.9304, 2: 0.9291, 3: 0.9319, 4: 0.9275}
B = {0: 0.9270, 1: 0.9287, 2: 0.9321, 3: 0.9304, 4: 0.9301}
DRAWS = 1000


def ends(found):
    return pytest.approx((found.low, found.high), abs=1e-12)


def test_the_interval_of_a_mean_is_that_of_students_t():
    values = list(A.values())
    found = intervals.interval(values)
    error = stats.sem(values)
    assert stats.t.interval(0.95, 4, loc=numpy.mean(values), scale=error) == ends(found)
    assert found.std == pytest.approx(numpy.std(values, ddof=1))
    assert intervals.interval([0.5]) == Interval(0.5, None, None, None, 1)


def test_common_seeds_are_paired():
    found = intervals.difference(A, B)
    test = stats.ttest_rel(list(A.values()), list(B.values()))
    assert tuple(test.confidence_interval()) == ends(found)
    assert (found.paired, found.n) == (True, 5)
    more = intervals.difference(A | {9: 0.1}, B | dict.fromkeys(range(10, 20), 0.2))
    assert more == found


MOVED = [
    {10 + s: v for s, v in B.items()},
    {1: 0.93, 8: 0.94, 9: 0.92},
    {3: 0.93, 4: 0.94, 5: 0.92, 6: 0.95, 7: 0.93},  # two of five match
]


@pytest.mark.parametrize("moved", MOVED)
def test_other_seeds_are_compared_by_welch(moved):
    found = intervals.difference(A, moved)
    test = stats.ttest_ind(list(A.values()), list(moved.values()), equal_var=False)
    assert tuple(test.confidence_interval()) == ends(found)
    assert (found.paired, found.n) == (False, min(len(A), len(moved)))


def test_ratios_are_compared_by_their_logarithms():
    found = intervals.ratio(A, B)
    logs = [numpy.log(list(side.values())) for side in (A, B)]
    low, high = stats.ttest_rel(*logs).confidence_interval()
    assert (math.exp(low), math.exp(high)) == ends(found)
    assert found.mean == pytest.approx(stats.gmean(numpy.array([*A.values()]) / [*B.values()]))
    assert intervals.ratio({0: 0.0}, {0: 1.0}) is None


def test_published_summaries_are_compared_by_welch():
    values = list(A.values())
    found = intervals.from_summary(values, 0.9296, 0.0021, 4, error=0.0)
    mine = numpy.mean(values), numpy.std(values, ddof=1), 5
    test = stats.ttest_ind_from_stats(*mine, 0.9296, 0.0021, 4, equal_var=False)
    assert found.mean / ((found.high - found.low) / 2) == pytest.approx(
        test.statistic / stats.t.ppf(0.975, welch(mine[1], 5, 0.0021, 4))
    )
    wider = intervals.from_summary(values, 0.9296, 0.0021, 4, error=0.001)
    assert (wider.low, wider.high) == pytest.approx((found.low - 0.001, found.high + 0.001))
    unknown = intervals.from_summary(values, 0.9296, None, None, error=0.0)
    assumed = intervals.from_summary(values, 0.9296, mine[1], 4, error=0.0)
    assert (unknown.low, unknown.high) == pytest.approx((assumed.low, assumed.high))


def welch(s1, n1, s2, n2):
    a, b = s1**2 / n1, s2**2 / n2
    return (a + b) ** 2 / (a**2 / (n1 - 1) + b**2 / (n2 - 1))


@pytest.mark.parametrize(
    ("low", "high", "n", "expected"),
    [
        (-0.4, 0.3, 3, "keeps"),
        (-0.4, -0.1, 3, "keeps"),  # a loss, and surely one within the margin
        (-0.9, -0.6, 3, "loses"),
        (-0.9, -0.4, 3, "undecided"),
        (-0.5, 0.3, 3, "undecided"),  # at the margin is not above it
        (-0.4, 0.3, 2, None),
        (None, None, 1, None),
    ],
)
def test_the_margin_decides(low, high, n, expected):
    assert intervals.verdict(Interval(-0.2, low, high, 1.0, n), 0.5) == expected
    assert intervals.verdict(None, 0.5) is None


def verdicts(truth, n, paired):
    """Of draws with a spread of 0.3 points between seeds, half of it the seeds' own."""
    draw = numpy.random.default_rng(n + paired)
    found = []
    for _ in range(DRAWS):
        seeds = draw.normal(0, 0.2, n)
        baseline = seeds + draw.normal(93, 0.2, n)
        method = (seeds if paired else draw.normal(0, 0.2, n)) + draw.normal(93 + truth, 0.2, n)
        a, b = (dict(enumerate(map(float, side))) for side in (method, baseline))
        shifted = a if paired else {100 + seed: value for seed, value in a.items()}
        found.append(intervals.verdict(intervals.difference(shifted, b), 0.5))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("n", [3, 5, 10])
def test_verdicts_are_seldom_wrong(n, paired):
    """At most 5 % of 1000 and its sampling error."""
    assert verdicts(0.0, n, paired).count("loses") <= 65
    assert verdicts(-0.5, n, paired).count("keeps") <= 65
    assert verdicts(-0.5, n, paired).count("loses") <= 65
    assert verdicts(0.0, 10, paired).count("keeps") >= 700  # and not for want of a verdict


def test_the_seeds_that_are_needed_are_enough():
    """With as many, four of five experiments of that mean and spread are decided."""
    draw = numpy.random.default_rng(0)
    found = intervals.interval([-0.35, 0.05, 0.1, -0.1])
    needed = found.n + intervals.more_seeds(found, 0.35)
    samples = draw.normal(found.mean, found.std, (DRAWS, needed))
    decided = [intervals.verdict(intervals.interval(list(s)), 0.35) == "keeps" for s in samples]
    assert 0.75 <= numpy.mean(decided) <= 0.87
    fewer = draw.normal(found.mean, found.std, (DRAWS, needed - 3))
    less = [intervals.verdict(intervals.interval(list(s)), 0.35) == "keeps" for s in fewer]
    assert numpy.mean(less) < 0.8


def test_no_number_of_seeds_decides_what_lies_at_the_margin():
    at = intervals.interval([-0.5, -0.6, -0.4])
    assert intervals.verdict(at, 0.5) == "undecided"
    assert intervals.more_seeds(at, 0.5) is None
    assert intervals.more_seeds(intervals.interval([0.0, 0.1, 0.05]), 0.5) is None  # decided


def test_values_without_spread_have_an_interval_of_no_width():
    found = intervals.difference({0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0})
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)
    assert intervals.verdict(found, 0.005) == "keeps"
    assert intervals.direction(found, 0.0) == "unclear"
    apart = intervals.difference({5: 1.0, 6: 1.0, 7: 1.0}, {0: 0.5, 1: 0.5, 2: 0.5})
    assert (apart.low, apart.high) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("low", "high", "n", "expected"),
    [(0.1, 0.2, 3, "above"), (-0.2, -0.1, 3, "below"), (-0.1, 0.1, 3, "unclear"), (1, 2, 2, None)],
)
def test_direction(low, high, n, expected):
    assert intervals.direction(Interval(0.0, low, high, 1.0, n), 0.0) == expected
