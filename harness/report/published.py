"""Whether what was measured agrees with what has been published."""

import json
import math
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from harness.report.intervals import FEWEST, Interval, from_summary
from harness.report.words import as_text, points
from harness.suite.config import Published, PublishedValue

EXACT = 1e-9  # what rounding may add to a difference that is none
MODEL = "model."  # conditions on which the dense count depends alone


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperComparison:
    """One published figure beside the measured one, in the units of `what`.

    `what`, `certainty`: of suite.config.PublishedValue. `verdict`: "agrees", where the 95 %
    interval of the difference holds zero and is no wider than the margin (of FLOPs and shares: than
    a tenth) either way; "differs", where it leaves zero out; "undecided" or "not comparable", with
    the reason in `why`.
    """

    method: str
    what: str
    epochs: tuple[int, int] | None
    measured: float | None
    measured_std: float | None
    n: int
    published: float
    published_std: float | None
    published_n: int | None
    certainty: str
    source: str
    remark: str
    verdict: str
    why: str


def against_published(
    published: Published, done: pd.DataFrame, trials: pd.DataFrame, margin: float
) -> list[PaperComparison]:
    """Each published figure of the suite beside what was measured.

    `done`: finished trials (`per_trial`) of a group, `trials`: all of its trials; `margin`: within
    which a metric agrees, as a share.
    """
    first = trials.iloc[0]
    mine = json.loads(first["experiment"]) | {"data name": first["data"]}
    return [
        _compare(value, method, published, rows, mine, margin)
        for value in published.values
        for method in value.methods
        if _meant(value, mine)
        for rows in _runs(done, method)
    ]


def _runs(done: pd.DataFrame, method: str) -> list[pd.DataFrame]:
    """Of each choice of the method's parameters; nothing where it was not run."""
    mine = done[done["method"] == method]
    return [rows for _, rows in mine.groupby("parameters")]


def _meant(value: PublishedValue, mine: dict[str, Any]) -> bool:
    """Its own conditions tell points of a sweep from each other."""
    return all(_at(mine, path) == wanted for path, wanted in value.conditions.items())


def _at(experiment: dict[str, Any], path: str) -> Any:
    """The value there; "data" is the name of the data."""
    found: Any = experiment
    for key in ["data name"] if path == "data" else path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return "all" if found is None else found


def _compare(
    value: PublishedValue,
    method: str,
    published: Published,
    rows: pd.DataFrame,
    mine: dict[str, Any],
    margin: float,
) -> PaperComparison:
    values = _values(value, rows)
    exact = value.what == "paper_dense"
    parameters = json.loads(rows["parameters"].iloc[0])
    verdict, why = "not comparable", _obstacle(value, published, mine, parameters)
    known = all(map(math.isfinite, values))
    if not why and not known:
        why = "not measured"
    elif not why and exact:
        verdict = "agrees" if round(values[0]) == value.value else "differs"
    elif not why:
        width = margin if value.what == "metric" else 0.1 * abs(value.value)
        verdict, why = _judged(value, values, width)
    return PaperComparison(
        method=str(rows["label"].iloc[0]),
        what=value.what,
        epochs=value.epochs,
        measured=fmean(values) if known else None,
        measured_std=stdev(values) if known and len(values) > 1 and not exact else None,
        n=len(values),
        published=value.value,
        published_std=value.std,
        published_n=value.n,
        certainty=value.certainty,
        source=published.source,
        remark=published.remark,
        verdict=verdict,
        why=why,
    )


def _values(value: PublishedValue, rows: pd.DataFrame) -> list[float]:
    if value.epochs is not None:
        first, last = value.epochs
        return [fmean(curve[first : last + 1] or [math.nan]) for curve in rows["paper_curve"]]
    return [float(v) for v in rows["value" if value.what == "metric" else value.what]]


def _obstacle(
    value: PublishedValue, published: Published, mine: dict[str, Any], parameters: dict[str, Any]
) -> str:
    """Why the figures can't be held against each other; empty where they can."""
    if value.doubt:
        return value.doubt
    if value.certainty == "unconfirmed":
        return "unconfirmed: no source at hand"
    wanted = published.conditions
    if value.what == "paper_dense":
        wanted = {path: v for path, v in wanted.items() if path.startswith(MODEL)}
    elif _at(mine, "data.synthetic") is True:
        return "trained on noise"
    elif parameters.get("gradient") == "cut":
        return "gradient cut"
    others = [key for key, v in value.parameters.items() if parameters.get(key) != v]
    if others:
        listed = (
            f"{k} {as_text(parameters.get(k))}, published with {value.parameters[k]}"
            for k in others
        )
        return "; ".join(listed)
    differing = [path for path, v in wanted.items() if v != "any" and _at(mine, path) != v]
    return "; ".join(
        f"{p} {as_text(_at(mine, p))}, published with {as_text(wanted[p])}" for p in differing
    )


def _judged(value: PublishedValue, values: list[float], width: float) -> tuple[str, str]:
    if len(values) < FEWEST:
        return "undecided", f"fewer than {FEWEST} seeds"
    found = from_summary(values, value.value, value.std, value.n, value.error * abs(value.value))
    assert found.low is not None
    assert found.high is not None
    if not found.low - EXACT <= 0 <= found.high + EXACT:
        return "differs", _by(value, found)
    if max(found.high, -found.low) > width:
        return "undecided", "the interval is too wide: more seeds"
    return "agrees", ""


def _by(value: PublishedValue, found: Interval) -> str:
    scale, unit = (100.0, " points") if value.what in ("metric", "frozen") else (1e-6, " MFLOPs")
    mean, low, high = (
        points(None if e is None else scale * e) for e in (found.mean, found.low, found.high)
    )
    return f"by {mean}{unit}, between {low} and {high}"
