"""What groups at equilibrium find that single neurons don't: as numbers, a table and a sentence."""

import json
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.report.intervals import Interval, difference, direction, interval, verdict
from harness.report.per_trial import by_seed
from harness.report.tables import Cell, Column, Table
from harness.report.words import NONE, percent, signed, signed_interval

MEASURES = ("still_by_group_alone", "still_by_neuron_alone")
ALIKE = ("eps", "mu", "recursion", "similarity", "gradient", "align", "rounding")
MOST = 3  # methods that sentences are said of; of more, the tables tell
NOTE = (
    "Of all neurons that may freeze, mean over all epochs. with group: those that stood still "
    "because their group did, while their own velocity was above eps; on their own: those below "
    "eps whose group trained. Δ: to freezing single neurons by the same parameters ({single}): of "
    "the backward saved, deciding counted in, and of {metric}. All with 95 % intervals over seeds."
)
ALONE = "No method freezes single neurons by the same parameters: there is no Δ."


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedRow:
    """One method that decides by groups; shares, with their 95 % intervals over seeds.

    `by_group` and `by_neuron`: of the neurons that may freeze, those that only their group and
    those that only their own velocity lets stand still, mean over epochs. `saved_more` and
    `metric_more`: to the method `single`, which freezes single neurons by the same parameters;
    None where there is none.
    """

    label: str
    by_group: Interval
    by_neuron: Interval
    single: str | None
    saved_more: Interval | None
    metric_more: Interval | None


def grouped(done: pd.DataFrame, measures: pd.DataFrame) -> list[GroupedRow]:
    """A row for each method that has recorded what only its groups let stand still.

    `done`: finished trials of a group (`per_trial`); `measures`: rows of that table.
    """
    known = measures[measures["name"].isin(MEASURES) & measures["trial"].isin(done["trial"])]
    last = known.groupby("trial")["epoch"].transform("max")
    in_force = known["value"].where(known["epoch"] < last, 0.0)  # the last mask never was
    shifted = known.assign(value=in_force)  # and nobody stood still in epoch 0
    means = shifted.groupby(["trial", "name"])["value"].mean().unstack("name")
    rows = []
    for label, mine in done[done["trial"].isin(means.index)].groupby("label", sort=False):
        shares = [interval(means.loc[mine["trial"], name].tolist()) for name in MEASURES]
        other = _single(done, json.loads(mine["parameters"].iloc[0]))
        other = other[other["label"] == other["label"].min()]
        rows.append(
            GroupedRow(
                label=str(label),
                by_group=shares[0],
                by_neuron=shares[1],
                single=None if other.empty else str(other["label"].iloc[0]),
                saved_more=difference(by_seed(mine, "saved"), by_seed(other, "saved")),
                metric_more=difference(by_seed(mine, "value"), by_seed(other, "value")),
            )
        )
    return rows


def _single(done: pd.DataFrame, parameters: dict[str, Any]) -> pd.DataFrame:
    """The trials that freeze single neurons by the same parameters."""

    def alike(text: str) -> bool:
        other = json.loads(text)
        same = all(other.get(name) == parameters.get(name) for name in ALIKE)
        return bool(other["kind"] == "neq" and same)

    return done[[alike(text) for text in done["parameters"]]]


def groups_table(rows: list[GroupedRow], metric: str) -> Table:
    """The table of the methods that decide by groups."""
    singles = sorted({row.single for row in rows if row.single})
    note = NOTE.format(single=", ".join(singles), metric=metric) if singles else None
    return Table(
        title="Groups beside single neurons",
        columns=[
            Column("method", text=True),
            Column("n", wide=True),
            Column("with group", "% neurons"),
            Column("95 %", "%", wide=True),
            Column("on their own", "% neurons"),
            Column("95 %", "%", wide=True),
            Column("Δ saved", "pp"),
            Column("95 %", "pp", wide=True),
            Column(f"Δ {metric}", "pp"),
            Column("95 %", "pp", wide=True),
        ],
        rows=[_row(row) for row in rows],
        notes=[note or f"{NOTE.partition(' Δ:')[0]} {ALONE}"],
    )


def _row(row: GroupedRow) -> list[Cell]:
    return [
        Cell(row.label),
        Cell(str(row.by_group.n), row.by_group.n),
        *_share_cells(row.by_group),
        *_share_cells(row.by_neuron),
        *_difference(row.saved_more),
        *_difference(row.metric_more),
    ]


def _share_cells(found: Interval) -> list[Cell]:
    return [Cell(percent(found.mean), found.mean), Cell(_ends(found), found.low)]


def _ends(found: Interval) -> str:
    """A share's interval, which lies between 0 and 1, in per cent."""
    if found.low is None or found.high is None:
        return NONE
    return f"[{percent(max(found.low, 0.0))}, {percent(min(found.high, 1.0))}]"


def _difference(found: Interval | None) -> list[Cell]:
    if found is None:
        return [Cell(NONE), Cell(NONE)]
    text = signed_interval(found.low, found.high)
    return [Cell(signed(found.mean), found.mean), Cell(text, found.low)]


def groups_answer(rows: list[GroupedRow], metric: str, margin: float) -> list[str]:
    """Whether groups are at equilibrium where single neurons are not: a sentence for each method
    that can be compared, none where they are many. `margin`: in points of the metric.
    """
    compared = [row for row in rows if row.saved_more and row.metric_more]
    return [_answer(row, metric, margin) for row in compared] if len(compared) <= MOST else []


def _answer(row: GroupedRow, metric: str, margin: float) -> str:
    saved, kept = row.saved_more, row.metric_more
    assert saved is not None
    assert kept is not None
    more = f"{100 * abs(saved.mean):.1f} points {'more' if saved.mean >= 0 else 'less'}"
    return (
        f"{row.label} beside {row.single}, which freezes single neurons by the same parameters: "
        f"{more} of the backward saved{_between(saved)}, {metric} {signed(kept.mean)} points"
        f"{_between(kept)} (n = {saved.n}). With their group {_share(row.by_group)} of the neurons "
        "stand still whose own velocity is above eps; the other way round it is "
        f"{_share(row.by_neuron)}. {_conclusion(saved, kept, margin)}"
    )


def _share(found: Interval) -> str:
    ends = _ends(found)
    return f"{percent(found.mean)} %" + ("" if ends == NONE else f" {ends}")


def _conclusion(saved: Interval, kept: Interval, margin: float) -> str:
    where = direction(saved, 0.0)
    if where == "below":
        return "Groups save less than single neurons."
    judged = verdict(kept, margin / 100)
    if where == "above" and judged == "keeps":
        return (
            f"Groups save more than single neurons, and lose no more than {margin:g} points by it."
        )
    if where == "above" and judged == "loses":
        return f"Groups save more, and lose more than {margin:g} points by it."
    return "Whether groups save more than single neurons, at no loss, is not clear from this."


def _between(found: Interval) -> str:
    ends = signed_interval(found.low, found.high)
    return "" if ends == NONE else f" {ends}"
