"""Where in training the saving arises: by phases of the learning-rate schedule."""

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd

from harness.report.per_trial import over
from harness.suite.config import PLATEAU

MOST = 6  # phases; a schedule with more drops is a smooth one, and is cut into thirds


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRow:
    """One method in one phase; means over its seeds.

    `metric`: at the end of the phase; `gained`: since the end of the phase before (None in the
    first). `saved`: of the dense backward of the phase, the cost of deciding counted in; `share`:
    of the dense backward of the whole training, so that phases add up to the method's `saved`.
    `frozen`: mean share of the neurons.
    """

    label: str
    metric: float
    gained: float | None
    saved: float
    share: float
    frozen: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Epochs from `first` to `last`, both included; `lr` at its first epoch."""

    first: int
    last: int
    lr: float
    methods: list[PhaseRow]


def phases(done: pd.DataFrame, epochs: pd.DataFrame) -> list[Phase]:
    """The phases of training: between drops of the learning rate to half or less, or thirds where
    it falls otherwise; none where each trial has a learning rate of its own. `done`: finished
    trials (`per_trial`); `epochs`: their rows.
    """
    if done.empty or follows_loss(recipe_of(done)):
        return []
    mine = with_labels(done, epochs)
    mine = mine.assign(spent=mine["backward_flops_executed"] + mine["overhead_flops"])
    columns = ["lr", "test_metric", "frozen", "spent", "backward_flops_dense"]
    by_epoch = mine.groupby(["label", "epoch"])[columns]
    curves = by_epoch.mean().where(by_epoch.count().eq(by_epoch.size(), axis=0))
    labels = list(dict.fromkeys(done["label"]))
    plain = [*done.loc[done["baseline"], "label"], None][0]
    pruned = set(done.loc[done["size"].notna(), "label"])
    lr = curves.loc[labels[0], "lr"]
    found, before = [], dict[str, float]()
    for first, last in _bounds(list(lr)):
        rows = []
        for label in labels:
            dense = curves.loc[plain or label, "backward_flops_dense"]
            spent = curves.loc[label, "spent"] * (math.nan if label in pruned else 1)
            rows.append(_row(label, curves.loc[label], dense, spent, (first, last), before))
        before = {row.label: row.metric for row in rows}
        found.append(Phase(first=first, last=last, lr=float(lr.iloc[first]), methods=rows))
    return found


def recipe_of(trials: pd.DataFrame) -> dict[str, Any]:
    """The recipe of these trials, which are of one group."""
    recipe: dict[str, Any] = json.loads(trials["experiment"].iloc[0])["recipe"]
    return recipe


def follows_loss(recipe: dict[str, Any]) -> bool:
    """Whether the learning rate follows the validation loss, and so differs by method and seed."""
    return (recipe.get("scheduler") or {}).get("name") == PLATEAU


def with_labels(done: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """The epochs of the trials `done`, with `label` (of the method) and `frozen` (a share)."""
    mine = epochs.merge(done[["trial", "label"]], on="trial")
    return mine.assign(frozen=mine["frozen_neurons"] / mine["total_neurons"])


def drops(lr: list[float]) -> list[int]:
    """The epochs before which the learning rate falls to half or less; none where it falls
    otherwise.
    """
    found = [e for e in range(1, len(lr)) if lr[e] <= 0.5 * lr[e - 1]]
    falls = sum(after < before for before, after in pairwise(lr))
    return found if len(found) < MOST and falls <= 2 * len(found) else []


def _bounds(lr: list[float]) -> list[tuple[int, int]]:
    count, found = len(lr), drops(lr)
    starts = [0, *found] if found else sorted({0, count // 3, 2 * count // 3})
    return [(start, end - 1) for start, end in zip(starts, [*starts[1:], count], strict=True)]


def _row(
    label: str,
    curve: pd.DataFrame,
    dense: "pd.Series[float]",
    spent: "pd.Series[float]",
    ends: tuple[int, int],
    before: dict[str, float],
) -> PhaseRow:
    """`dense`, `spent`: FLOPs of each epoch; of a method that prunes, which saves none, NaN."""
    part = curve.loc[ends[0] : ends[1]]
    metric = float(part["test_metric"].iloc[-1])
    whole = float(dense.loc[ends[0] : ends[1]].sum())
    less = whole - float(spent.loc[ends[0] : ends[1]].sum(skipna=False))
    return PhaseRow(
        label=label,
        metric=metric,
        gained=metric - before[label] if label in before else None,
        saved=over(less, whole),
        share=over(less, float(dense.sum())),
        frozen=float(part["frozen"].mean()),
    )
