"""Gradual beside one-shot pruning: what Tartaglione et al. (ICANN 2020, arXiv 2004.14765) found.

At equal sparsity gradual pruning is more accurate, its minima are narrow and generalise well, and
its features are less specific to classes, which may make them transfer better.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from harness.report.intervals import Interval, difference, direction, ratio
from harness.report.method_row import MethodRow
from harness.report.per_trial import MINIMA, by_seed
from harness.report.pruned_parts import BesideOneShot, LayerEntropy, Minima

ONE_SHOT, GRADUAL = "one-shot", "gradual"
ALIKE = 0.02  # of what is left, by which it may differ at equal sparsity
SAME = 0.01  # of the FLOPs of a training, by which it may differ and be called equal
UNEQUAL = "not of equal sparsity"
SEVERAL = (
    "{labels} are both of that sparsity: run one of them, named by --methods, into results of its "
    "own"
)
RECORDED, SHARES = MINIMA[:3], MINIMA[3:]
# By field: what it is made of, how, on which side of no difference the paper has it, in which field
# the verdict stands.
CLAIMS: dict[str, tuple[str, Callable[..., Interval | None], str, str]] = {
    "metric_more": ("value", difference, "above", "more_accurate"),
    "sharpness_ratio": ("sharpness", ratio, "above", "narrower"),
    "gap_more": ("generalisation_gap", difference, "below", "better_generalising"),
    "entropy_more": ("psp_entropy", difference, "above", "less_specific"),
    "probe_more": ("probe_metric", difference, "above", "better_transferring"),
}


def minima_of(rows: pd.DataFrame) -> Minima:
    """What kind of minimum these trials (of `per_trial`) of one method have found."""
    known = _above_zero(rows["sharpness"]).dropna()
    asked = rows[RECORDED].notna().any(axis=1)
    shares = rows[SHARES].astype(float).mean(skipna=False)
    ends = rows["sharpness_low"].min(), rows["sharpness_high"].max()
    return Minima(
        sharpness=float(np.exp(np.log(known).mean())) if len(known) else None,
        sharpness_n=len(known) if asked.any() else None,
        sharpness_unknown=int(asked.sum()) - len(known) if asked.any() else None,
        sharpness_from=_known(ends[0]),
        sharpness_to=_known(ends[1]),
        **{str(name): _known(share) for name, share in shares.items()},
    )


def _above_zero(sharpness: "pd.Series[Any]") -> "pd.Series[Any]":
    """Without what has no logarithm, and no ratio."""
    return sharpness.where(sharpness > 0)


def same_cost(ratio: float | None) -> bool:
    """Whether one training takes as many FLOPs as the other, by their ratio; None: not known."""
    return ratio is not None and abs(ratio - 1) <= SAME


def beside_one_shot(rows: list[MethodRow], done: pd.DataFrame, *, noise: bool) -> list[MethodRow]:
    """The rows with what sets each apart from one-shot pruning, where the group has gradual
    pruning, too.

    `done`: the group's finished trials (`per_trial`); `noise`: whether they were trained on that.
    """
    one_shots, graduals = (
        [row for row in rows if row.parameters["kind"] == kind and _sized(row)]
        for kind in (ONE_SHOT, GRADUAL)
    )
    if not one_shots or not graduals:
        return rows
    return [replace(row, beside=_beside(row, one_shots, done, noise=noise)) for row in rows]


def _sized(row: MethodRow) -> bool:
    """Whether a trial is finished, and tells what it leaves."""
    return row.n > 0 and row.pruned.parameters_left_share is not None


def _beside(
    row: MethodRow, one_shots: list[MethodRow], done: pd.DataFrame, *, noise: bool
) -> BesideOneShot:
    if row.parameters["kind"] == ONE_SHOT or not row.n:
        return BesideOneShot()
    asked = "sparsity" in row.parameters and row.parameters["sparsity"] is not None
    fitting = [o for o in one_shots if _same(row, o)] if asked else one_shots
    gradual = row.parameters["kind"] == GRADUAL
    if asked and not fitting:
        if not gradual:
            return BesideOneShot()
        return BesideOneShot(one_shot=one_shots[0].label, one_shot_unlike=_asked(row, one_shots[0]))
    if len(fitting) > 1:
        labels = " and ".join(other.label for other in fitting)
        return BesideOneShot(one_shot_unlike=SEVERAL.format(labels=labels) if gradual else None)
    other = fitting[0]
    size = None if row.plain else _left(row, other)
    if gradual and size:
        return BesideOneShot(one_shot=other.label, one_shot_unlike=f"{UNEQUAL} ({size})")
    mine, theirs = (done[done["label"] == label] for label in (row.label, other.label))
    cost = _over(row.pruned.training_cost, other.pruned.training_cost)
    sound = not noise and not row.failed and not other.failed
    return BesideOneShot(
        one_shot=other.label,
        one_shot_size=size,
        one_shot_cost=cost,
        **_differences(mine, theirs, judged=gradual and sound and same_cost(cost)),
    )


def _same(row: MethodRow, other: MethodRow) -> bool:
    names = ("sparsity", "units")
    return all(row.parameters.get(name) == other.parameters.get(name) for name in names)


def _asked(row: MethodRow, other: MethodRow) -> str:
    """That they were asked for another sparsity, and in what."""
    parts = [
        f"{name} {row.parameters[name]} | {other.parameters.get(name)}"
        for name in ("sparsity", "units")
        if row.parameters.get(name) != other.parameters.get(name)
    ]
    return f"{UNEQUAL} ({', '.join(parts)})"


def _left(row: MethodRow, other: MethodRow) -> str | None:
    """In what they have left another share of their units; None: in nothing."""
    units = "neurons" if row.parameters.get("units") == "neurons" else "parameters"
    shares = [
        getattr(each.pruned, f"{units}_left_share") if each.prunes else 1.0 for each in (row, other)
    ]
    if None in shares:
        return f"it is not known how many {units} are left"
    if math.isclose(*shares, rel_tol=ALIKE):
        return None
    return f"{units} left {' | '.join(f'{100 * share:.1f} %' for share in shares)}"


def _differences(mine: pd.DataFrame, theirs: pd.DataFrame, *, judged: bool) -> dict[str, Any]:
    """The fields of BesideOneShot that hold intervals and verdicts."""
    fields: dict[str, Any] = {}
    for name, (column, differ, side, verdict) in CLAIMS.items():
        found = differ(*(_by_seed(side, column, differ) for side in (mine, theirs)))
        if found is None:
            continue
        fields |= {
            name: found.mean,
            f"{name}_low": found.low,
            f"{name}_high": found.high,
            f"{name}_n": found.n,
        }
        if judged:
            towards = direction(found, 1.0 if differ is ratio else 0.0)
            answers = {side: "yes", "unclear": "unclear", None: "unclear"}
            fields[verdict] = answers.get(towards, "no")
    return fields


def _by_seed(rows: pd.DataFrame, column: str, differ: Callable[..., Any]) -> dict[int, float]:
    positive = rows.assign(**{column: _above_zero(rows[column])}) if differ is ratio else rows
    return by_seed(positive, column)


def entropies(
    rows: list[MethodRow], done: pd.DataFrame, measures: pd.DataFrame
) -> list[LayerEntropy]:
    """By layer, for each gradual pruning that stands beside a one-shot pruning.

    `rows`: of the group, as `beside_one_shot` gives them; `measures`: rows of that table.
    """
    pairs = [
        (row.label, row.beside.one_shot)
        for row in rows
        if row.parameters["kind"] == GRADUAL and row.beside.metric_more is not None
    ]
    named = measures[(measures["name"] == "psp_entropy") & measures["layer"].notna()]
    known = named.merge(done[["trial", "label"]], on="trial")
    last = known[known["epoch"] == known.groupby("trial")["epoch"].transform("max")]
    return [
        found
        for gradual, one_shot in pairs
        if one_shot is not None
        for found in _by_layer(last, gradual, one_shot)
    ]


def _by_layer(last: pd.DataFrame, gradual: str, one_shot: str) -> Iterator[LayerEntropy]:
    sides = [last[last["label"] == label] for label in (gradual, one_shot)]
    for layer in dict.fromkeys(sides[0]["layer"]):
        values = [by_seed(side[side["layer"] == layer], "value") for side in sides]
        found = difference(*values)
        if found is None:
            continue
        if found.paired:
            seeds = values[0].keys() & values[1].keys()
            values = [{seed: each[seed] for seed in seeds} for each in values]
        bits = [sum(each.values()) / len(each) for each in values]
        yield LayerEntropy(
            gradual=gradual,
            one_shot=one_shot,
            layer=str(layer),
            bits=bits[0],
            bits_one_shot=bits[1],
            more=found.mean,
            more_low=found.low,
            more_high=found.high,
            n=found.n,
        )


def _over(value: float | None, whole: float | None) -> float | None:
    return value / whole if value is not None and whole else None


def _known(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
