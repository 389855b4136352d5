"""Intervals over seeds, differences from a baseline, and verdicts that a margin decides.

All intervals are two-sided 95 % intervals of Student's t. A verdict of non-inferiority reads the
interval of the difference (ICH E9 and E10; Piaggio et al., CONSORT extension, JAMA 2012): 2.5 % to
err on either side.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

from scipy.special import stdtrit

CONFIDENCE = 0.95
POWER = 0.8  # to expect of the seeds that are said to be needed
FEWEST = 3  # seeds, for a verdict
MOST = 1000  # seeds that are worth naming
RUNS = 4  # behind a published mean that does not say


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval from `low` to `high`, which are None for a single value.

    `std`: standard deviation of the values (ddof 1), of a difference that of its pairs; `n`: number
    of values, of pairs, or of the smaller of two samples; `paired`: whether by seed.
    """

    mean: float
    low: float | None
    high: float | None
    std: float | None
    n: int
    paired: bool = False


def interval(values: Sequence[float]) -> Interval:
    """The interval of the mean of `values`; its mean is NaN where there are none."""
    if not values:
        return Interval(math.nan, None, None, None, 0)
    mean, n = fmean(values), len(values)
    if n < 2:
        return Interval(mean, None, None, None, n)
    std = stdev(values)
    return _around(mean, std / math.sqrt(n), n - 1, std, n)


def difference(values: Mapping[int, float], others: Mapping[int, float]) -> Interval | None:
    """The interval of the mean of `values` minus that of `others`, both by seed.

    It is paired where most seeds of the smaller side match, or where there are too few for anything
    else, and Welch's otherwise. None where one side is empty.
    """
    common, counts = values.keys() & others.keys(), (len(values), len(others))
    few = min(counts) < FEWEST and len(common) == min(counts)
    if common and (few or (len(common) >= FEWEST and 2 * len(common) > min(counts))):
        pairs = interval([values[seed] - others[seed] for seed in sorted(common)])
        return Interval(pairs.mean, pairs.low, pairs.high, pairs.std, pairs.n, paired=True)
    if not values or not others:
        return None
    return _welch(list(values.values()), list(others.values()))


def ratio(values: Mapping[int, float], others: Mapping[int, float]) -> Interval | None:
    """The interval of the ratio of geometric means: `difference`, of logarithms.

    None where one side is empty, or a value is not positive.
    """
    if any(value <= 0 for value in [*values.values(), *others.values()]):
        return None
    logs = [{seed: math.log(v) for seed, v in side.items()} for side in (values, others)]
    found = difference(*logs)
    if found is None:
        return None
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Interval(math.exp(found.mean), low, high, found.std, found.n, found.paired)


def from_summary(
    values: Sequence[float], mean: float, std: float | None, n: int | None, error: float
) -> Interval:
    """The interval of the mean of `values` minus a published `mean`, by Welch.

    `std` and `n` are published, too: a spread that was not is taken to be that of `values`, a
    number of runs to be four. `error`: of reading the mean off, by which the interval is wider.
    """
    mine = interval(values)
    if mine.std is None:
        return Interval(mine.mean - mean, None, None, None, mine.n)
    theirs = mine.std if std is None else std
    found = _summaries(mine.mean, mine.std**2, mine.n, mean, theirs**2, max(n or RUNS, 2))
    assert found.low is not None
    assert found.high is not None
    return Interval(found.mean, found.low - error, found.high + error, mine.std, mine.n)


def verdict(found: Interval | None, margin: float) -> str | None:
    """Whether a method whose difference from the baseline is `found` is non-inferior.

    "keeps" where the interval lies above −margin, "loses" where it lies below, else "undecided";
    None below three seeds. `margin` is in units of the difference.
    """
    if found is None or found.low is None or found.high is None or found.n < FEWEST:
        return None
    if found.low > -margin:
        return "keeps"
    return "loses" if found.high < -margin else "undecided"


def more_seeds(found: Interval | None, margin: float) -> int | None:
    """How many more seeds an undecided verdict needs, should mean and spread stay.

    They are the fewest with which the interval leaves out −margin with a power of 80 %. None where
    the verdict is decided, or more than a thousand would be needed.
    """
    if verdict(found, margin) not in (None, "undecided") or found is None or not found.std:
        return None
    effect = abs(found.mean + margin) / found.std
    for n in range(max(found.n, 2), MOST):
        if n >= FEWEST and (_quantile(n - 1) + stdtrit(n - 1, POWER)) / math.sqrt(n) <= effect:
            return max(n - found.n, 1)
    return None


def direction(found: Interval | None, neutral: float) -> str | None:
    """Where the interval lies: "above" or "below" the neutral value, "unclear" where it holds it.

    None below three seeds.
    """
    if found is None or found.low is None or found.high is None or found.n < FEWEST:
        return None
    if found.low == found.high == neutral:
        return "unclear"
    return "above" if found.low > neutral else "below" if found.high < neutral else "unclear"


def _welch(values: list[float], others: list[float]) -> Interval:
    if min(len(values), len(others)) < 2:
        mean = fmean(values) - fmean(others)
        return Interval(mean, None, None, None, min(len(values), len(others)))
    return _summaries(
        fmean(values), variance(values), len(values), fmean(others), variance(others), len(others)
    )


def _summaries(m1: float, v1: float, n1: int, m2: float, v2: float, n2: int) -> Interval:
    """Welch's interval from means, variances and sizes (Welch 1947; Satterthwaite's degrees)."""
    a, b, n = v1 / n1, v2 / n2, min(n1, n2)
    std = math.sqrt((a + b) * n)
    freedom = (a + b) ** 2 / (a**2 / (n1 - 1) + b**2 / (n2 - 1)) if a + b else n1 + n2 - 2
    return _around(m1 - m2, math.sqrt(a + b), freedom, std, n)


def _around(mean: float, error: float, freedom: float, std: float, n: int) -> Interval:
    half = _quantile(freedom) * error
    return Interval(mean, mean - half, mean + half, std, n)


def _quantile(freedom: float) -> float:
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
