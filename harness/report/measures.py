"""What methods have recorded themselves: the table `measures`, over seeds."""

import math
from statistics import fmean, stdev

import pandas as pd

from harness.report.method_row import MeasureRow


def recorded(measures: pd.DataFrame, trials: pd.DataFrame) -> list[MeasureRow]:
    """A row for each name that these trials have recorded, with what was recorded last.

    `measures`: rows of that table; `trials`: of one method, finished. What is recorded for layers
    and for the whole model has two rows.
    """
    mine = measures[measures["trial"].isin(trials["trial"])]
    if mine.empty:
        return []
    mine = mine.assign(of_layer=mine["layer"].notna())
    newest = mine.groupby(["trial", "name", "of_layer"])["epoch"].transform("max")
    last = mine[mine["epoch"] == newest].groupby(["name", "of_layer"], sort=False)
    return [_row(str(name), rows) for (name, _), rows in last]


def of_model(measures: pd.DataFrame, trials: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """What each of these trials has recorded last of the whole model, a column for each of `names`.

    Rows are those of `trials`; NaN: it is not known, or was not recorded.
    """
    whole = measures[measures["layer"].isna() & measures["trial"].isin(trials["trial"])]
    last = whole.sort_values("epoch", kind="stable").drop_duplicates(["trial", "name"], keep="last")
    found = last.pivot(index="trial", columns="name", values="value")
    return found.reindex(index=trials["trial"], columns=names).set_axis(trials.index).astype(float)


def _row(name: str, rows: pd.DataFrame) -> MeasureRow:
    layers = rows["layer"].nunique()
    by_trial = rows.groupby("trial")["value"].agg(lambda values: values.mean(skipna=False))
    values = [float(value) for value in by_trial if math.isfinite(value)]
    spread = rows.groupby("layer" if layers else "trial")["value"].mean()
    known = spread[spread.notna()]
    return MeasureRow(
        name=name,
        layers=int(layers),
        n=len(values),
        mean=fmean(values) if values else None,
        std=stdev(values) if len(values) > 1 else None,
        low=float(known.min()) if len(known) else None,
        high=float(known.max()) if len(known) else None,
    )
