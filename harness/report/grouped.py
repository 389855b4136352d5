"""What groups at equilibrium find that single neurons don't: as numbers, a table and a sentence."""

import json
import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.report.intervals import Interval, difference, direction, interval
from harness.report.per_trial import by_seed
from harness.report.tables import Cell, Column, Table
from harness.report.words import NONE, percent, signed, signed_interval

MEASURES = ("still_by_group_alone", "still_by_neuron_alone")
ALIKE = ("eps", "mu", "recursion", "gradient", "align", "rounding")
NOTE = (
    "Of all neurons that may freeze, mean over epochs. with group: those that stood still because "
    "their group did, while their own velocity was above eps; on their own: those below eps whose "
    "group trained. Δ: to freezing single neurons by the same eps (method {single}), with its "
    "95 % interval: of the backward saved, deciding counted in, and of {metric}."
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
    means = known.groupby(["trial", "name"])["value"].mean().unstack("name")
    rows = []
    for label, mine in done[done["trial"].isin(means.index)].groupby("label", sort=False):
        shares = [interval(means.loc[mine["trial"], name].tolist()) for name in MEASURES]
        other = _single(done, json.loads(mine["parameters"].iloc[0]))
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
            Column("on their own", "% neurons"),
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
        Cell(percent(row.by_group.mean), row.by_group.mean),
        Cell(percent(row.by_neuron.mean), row.by_neuron.mean),
        *_difference(row.saved_more),
        *_difference(row.metric_more),
    ]


def _difference(found: Interval | None) -> list[Cell]:
    if found is None:
        return [Cell(NONE), Cell(NONE)]
    text = signed_interval(found.low, found.high)
    return [Cell(signed(found.mean), found.mean), Cell(text, found.low)]


def groups_answer(rows: list[GroupedRow]) -> list[str]:
    """The answer to whether groups are at equilibrium where single neurons are not, in a sentence
    for the method that differs most from single neurons; none where nothing is compared.
    """
    compared = [row for row in rows if row.saved_more and math.isfinite(row.saved_more.mean)]
    if not compared:
        return []
    row = max(compared, key=lambda each: each.saved_more.mean if each.saved_more else 0.0)
    assert row.saved_more is not None
    words = {
        "above": f"Groups find what single neurons don't: {row.label}",
        "below": f"Groups find less than single neurons: {row.label}",
    }
    start = words.get(
        direction(row.saved_more, 0.0) or "",
        f"Whether groups find what single neurons don't is not clear: {row.label}",
    )
    return [
        f"{start} saves {signed(row.saved_more.mean, 1)} points of the backward beside {row.single}"
        f"{_between(row.saved_more)}, and {_share(row.by_group)} of the neurons stand still "
        "with their group that would train on their own, against "
        f"{_share(row.by_neuron)} the other way round (n = {row.saved_more.n})."
    ]


def _between(found: Interval) -> str:
    if found.low is None or found.high is None:
        return ""
    return f", between {signed(found.low, 1)} and {signed(found.high, 1)}"


def _share(found: Interval) -> str:
    if found.low is None or found.high is None:
        return f"{percent(found.mean)} %"
    return f"{percent(found.mean)} % ({percent(max(found.low, 0.0))} to {percent(found.high)} %)"
