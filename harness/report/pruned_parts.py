"""Parts of a method's row on what pruning is good for: what goes for real, and what is found.

As in `method_row`, field names are the documented keys of the JSON, where parts stand flat.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class StuckRow:
    """Dead neurons of `layer` that could not be removed: how many in a seed, and why.

    `neurons`: mean over all seeds; `seeds`: in how many of them there were any, `reason_seeds`: in
    how many for that reason, in whatever layer.
    """

    layer: str
    neurons: float
    reason: str
    seeds: int
    reason_seeds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What is left once dead neurons are really removed, and how long a forward then takes.

    Means over `removed_n` seeds; None: it is not known. Shares are of the suite's dense model: of
    its parameters, of the FLOPs of its forward, and of the bytes of its file. `neurons_dead` have
    no weight, `neurons_stuck` of these stay, as `stuck` tells; `neurons_removed` are all that
    went. Differences: the largest of all seeds between outputs before and after.
    `removed_nothing_n`: seeds in which nothing was removed; `removed_reason`: why not.

    Latencies are those of the removed over the dense model, for one sample and for
    `latency_batch_size`: geometric means over `latency_n` seeds with their 95 % intervals, of a
    single seed the quartiles of its pairs. Verdicts: "less", "more" or "unclear".
    `latency_withheld`: why there is no measurement; `latency_device`: what it was made on.
    """

    removed_n: int | None = None
    removed_nothing_n: int | None = None
    removed_reason: str | None = None
    removed_parameters_share: float | None = None
    removed_forward_share: float | None = None
    removed_file_share: float | None = None
    neurons_dead: float | None = None
    neurons_removed: float | None = None
    neurons_stuck: float | None = None
    removed_difference: float | None = None
    removed_difference_float64: float | None = None
    latency_one: float | None = None
    latency_one_low: float | None = None
    latency_one_high: float | None = None
    latency_one_verdict: str | None = None
    latency_batch: float | None = None
    latency_batch_low: float | None = None
    latency_batch_high: float | None = None
    latency_batch_verdict: str | None = None
    latency_batch_size: int | None = None
    latency_n: int | None = None
    latency_withheld: str | None = None
    latency_device: str | None = None
    stuck: list[StuckRow] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Minima:
    """What kind of minimum a training has found, by what its trials recorded last.

    Means over seeds; None: it is not known. `sharpness`: the largest eigenvalue of the loss's
    Hessian, geometric mean over `sharpness_n` seeds; `sharpness_unknown`: seeds in which the power
    iteration did not converge, or found none above zero; `sharpness_from`, `sharpness_to`: the
    least and the greatest end of the intervals of all seeds. Shares: `train_metric` on the samples
    of the Hessian, `generalisation_gap` that less the test's, `probe_metric` of a linear probe on
    other data.
    """

    sharpness: float | None = None
    sharpness_n: int | None = None
    sharpness_unknown: int | None = None
    sharpness_from: float | None = None
    sharpness_to: float | None = None
    train_metric: float | None = None
    generalisation_gap: float | None = None
    probe_metric: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideOneShot:
    """A method beside one-shot pruning, where the group has that and gradual pruning.

    `one_shot`: the method that it is held against, by its label; `one_shot_unlike`: why it can't
    be; `one_shot_size`: how much else than that it leaves, where it is no gradual pruning.
    `one_shot_cost`: FLOPs of the method's training over those of one-shot pruning. Differences
    `…_more` (of the metric, the generalisation gap and the probe's metric in shares, of the
    entropy in bits) and `sharpness_ratio` have 95 % intervals over `…_n` seeds.

    Of gradual pruning, what arXiv 2004.14765 found: that it is `more_accurate`, its minima
    `narrower` and `better_generalising`, its features `less_specific` to classes, and
    `better_transferring`: "yes", "no" or "unclear"; None where that can't be told, or trainings
    took other FLOPs.
    """

    one_shot: str | None = None
    one_shot_unlike: str | None = None
    one_shot_size: str | None = None
    one_shot_cost: float | None = None
    metric_more: float | None = None
    metric_more_low: float | None = None
    metric_more_high: float | None = None
    metric_more_n: int | None = None
    sharpness_ratio: float | None = None
    sharpness_ratio_low: float | None = None
    sharpness_ratio_high: float | None = None
    sharpness_ratio_n: int | None = None
    gap_more: float | None = None
    gap_more_low: float | None = None
    gap_more_high: float | None = None
    gap_more_n: int | None = None
    entropy_more: float | None = None
    entropy_more_low: float | None = None
    entropy_more_high: float | None = None
    entropy_more_n: int | None = None
    probe_more: float | None = None
    probe_more_low: float | None = None
    probe_more_high: float | None = None
    probe_more_n: int | None = None
    more_accurate: str | None = None
    narrower: str | None = None
    better_generalising: str | None = None
    less_specific: str | None = None
    better_transferring: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEntropy:
    """The PSP-entropy of a layer, in bits, by gradual and by one-shot pruning.

    Means over seeds; `more`: of gradual pruning, with its 95 % interval over `n` seeds.
    """

    gradual: str
    one_shot: str
    layer: str
    bits: float
    bits_one_shot: float
    more: float
    more_low: float | None
    more_high: float | None
    n: int
