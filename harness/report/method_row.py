"""One method over its seeds, as every form of the report shows it.

A row has a part for each question: what was reached, what was saved by count, what clocks and
counters say, what a shorter baseline would have done, and what pruning has left and is good for
(`pruned_parts`). Field names are the documented keys of the JSON, where the parts stand flat, one
after the other.
"""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from harness.report.pruned_parts import BesideOneShot, Minima, Removed
from harness.suite.method_specs import kind_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What a method reached, and whether that is as good as the baseline; None: it can't be said.

    Metric and differences are shares, with 95 % intervals from `low` to `high`. `difference` is to
    the baseline: over `difference_n` seeds of both where it is `paired`, else over the smaller
    sample. `verdict`: "keeps", "loses" or "undecided", when about `more_seeds` more are needed.
    """

    metric_mean: float
    metric_std: float | None
    metric_low: float | None
    metric_high: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    difference_n: int | None
    paired: bool | None
    verdict: str | None
    more_seeds: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Savings:
    """What a method saved by count: FLOPs of one backward of one sample, mean of epochs and seeds.

    Shares are of the dense backward (of `paper`: of the paper's count with nothing frozen). `saved`
    and `saved_required` count the cost of deciding in: 1 − (executed + overhead) / dense;
    `saved_paper` is the published way. `frozen`: share of the neurons in the last epoch; `fixed`:
    share of those that the model itself keeps from training, None where that is not known.
    `effective_parameters`: those that a method leaves that prunes; such a one has no `saved`.
    """

    dense: float
    paper: float
    paper_share: float
    required: float
    required_share: float
    executed: float
    executed_share: float
    overhead: float
    overhead_share: float
    saved: float
    saved_required: float
    saved_paper: float
    frozen: float
    fixed: float | None
    effective_parameters: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What clocks and counters say; None where it can't be said.

    `seconds_train`, `seconds_decide`: of a trial; None where trials of the group ran on different
    devices. `memory_bytes`: peak of the GPU, mean over seeds; `energy_joules`: of training and
    deciding. Ratios are to the baseline, geometric means over seeds. That of seconds compares the
    sums of training and deciding, and has a 95 % interval. `seconds_verdict`: "less", "more" or
    "unclear"; None where the seconds are no measurement.
    """

    seconds_train: float | None
    seconds_decide: float | None
    seconds_ratio: float | None
    seconds_ratio_low: float | None
    seconds_ratio_high: float | None
    seconds_verdict: str | None
    memory_bytes: float | None
    memory_ratio: float | None
    energy_joules: float | None
    energy_ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replays:
    """What the masks cost alone on the device, in steps by turns with plain ones; None: not known.

    `seconds_replayed_ratio`: over the same of plain steps, geometric mean over
    `seconds_replayed_n` seeds, with a 95 % interval; `…_pairs_low`, `…_pairs_high`: that mean's
    ends by a bootstrap over pairs of steps alone. `seconds_replayed_withheld`: why it is no
    measurement; else `seconds_replayed_verdict` is as that of seconds. `masks`, `masks_measured`:
    of these seeds; the others lie between two of them. Bytes that a forward keeps for its backward
    (mean over epochs) and of the optimizer's state, and both over those of plain training.
    """

    seconds_replayed_ratio: float | None = None
    seconds_replayed_ratio_low: float | None = None
    seconds_replayed_ratio_high: float | None = None
    seconds_replayed_pairs_low: float | None = None
    seconds_replayed_pairs_high: float | None = None
    seconds_replayed_n: int | None = None
    seconds_replayed_verdict: str | None = None
    seconds_replayed_withheld: str | None = None
    masks: int | None = None
    masks_measured: int | None = None
    activation_bytes: float | None = None
    activation_ratio: float | None = None
    optimizer_bytes: float | None = None
    optimizer_ratio: float | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """Of the ratio, by the wider of both intervals: seeds with equal masks differ in nothing,
        and a single seed has pairs alone.
        """
        low, high = self.seconds_replayed_pairs_low, self.seconds_replayed_pairs_high
        if low is None or high is None:
            return None
        over_seeds = self.seconds_replayed_ratio_low, self.seconds_replayed_ratio_high
        if over_seeds[0] is None or over_seeds[1] is None:
            return low, high
        return min(low, over_seeds[0]), max(high, over_seeds[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ShorterBaseline:
    """The baseline, stopped when it has spent the FLOPs that a method spends in all.

    `spent_share`: FLOPs of the method's steps (forward, executed backward, deciding) over those of
    plain training (forward and dense backward). `stopped_epochs`: how many epochs the baseline can
    train for that; `stopped_metric`: its metric by then; `stopped_difference`: of the method to
    that, with a 95 % interval. All but the share are None where it is no epoch less.
    """

    spent_share: float | None = None
    stopped_epochs: int | None = None
    stopped_metric: float | None = None
    stopped_difference: float | None = None
    stopped_difference_low: float | None = None
    stopped_difference_high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What a method that prunes has left after the last epoch, and what its training has cost.

    Means over seeds; None: a seed does not tell, or the method does not prune. Shares are of the
    baseline's model, or of the method's own where there is no baseline: of its parameters, of its
    neurons, and of the FLOPs of its forward. `forward_effective_share` counts the
    multiply-accumulates of rows and columns that still hold a weight. `psp_entropy`: bits, mean
    over the neurons that are left; None where a class has no validation sample. `training_cost`:
    FLOPs of the method's steps (forward, executed backward, whatever it adds) over those of plain
    training (forward and dense backward).
    """

    parameters_left_share: float | None = None
    neurons_left_share: float | None = None
    forward_effective_share: float | None = None
    psp_entropy: float | None = None
    training_cost: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureRow:
    """What a method has recorded under one name, as it did last, over seeds.

    `layers`: in how many layers it was recorded; 0: for the whole model. `mean`, `std`: over seeds,
    of layers of their mean; `low`, `high`: the least and the greatest layer, means over seeds, or
    seed.
    """

    name: str
    layers: int
    n: int
    mean: float | None
    std: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """One method with one choice of its parameters, over its finished seeds.

    `label`: the method with the parameters in which it differs from another of its name. `n`:
    finished seeds, `failed`: seeds that failed; `withheld`: why there is no verdict although there
    are seeds. `measures`: what the method has recorded itself.
    """

    method: str
    label: str
    parameters: dict[str, Any]
    n: int
    failed: int
    withheld: str | None
    seeds: list[int]
    quality: Quality
    savings: Savings
    measured: Measured
    replays: Replays
    shorter_baseline: ShorterBaseline
    pruned: Pruned
    removed: Removed = field(default_factory=Removed)
    minima: Minima = field(default_factory=Minima)
    beside: BesideOneShot = field(default_factory=BesideOneShot)
    measures: list[MeasureRow] = field(default_factory=list)

    @property
    def plain(self) -> bool:
        """Whether it is a baseline."""
        return kind_of(self.parameters).is_baseline

    @property
    def prunes(self) -> bool:
        """Whether it says how many parameters it leaves: such a one is never said to save."""
        return self.savings.effective_parameters is not None

    def to_json(self) -> dict[str, Any]:
        """The documented keys in their order, all parts flat."""
        value = asdict(self)
        parts = [value.pop(part.name) for part in _parts()]
        return value | {key: item for part in parts for key, item in part.items()}


def json_keys() -> list[str]:
    """The keys of `MethodRow.to_json`."""
    own = [field.name for field in fields(MethodRow) if field not in _parts()]
    return own + [field.name for part in _parts() for field in fields(part.type)]


def _parts() -> list[Any]:
    """The fields of a row that are parts of it."""
    return [field for field in fields(MethodRow) if is_dataclass(field.type)]
