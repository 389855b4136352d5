"""What was removed for real, and how long a forward takes then: the table `removals`."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pandas as pd

from harness.report.intervals import Interval, direction, ratio
from harness.report.per_trial import by_seed, timing_withheld
from harness.report.pruned_parts import Removed, StuckRow
from harness.report.words import counted

FASTER = {"below": "less", "above": "more", "unclear": "unclear"}
SIZES = ("parameters", "forward_flops", "file_bytes")
SEVERAL = "it was measured on different devices"
AMOUNT = re.compile(r" by (?:\d[\d.e+-]*|inf|nan)\b")  # in a reason, of which each seed has its own
AFTER = {  # what `compare` holds against each other, by its column here
    "removed_parameters": "parameters",
    "removed_forward": "forward_flops",
    "removed_latency": "latency_batch",
    "removed_on": "device",
}


def removed_of(rows: pd.DataFrame, removals: pd.DataFrame) -> Removed:
    """What is known of the trials `rows` (of `per_trial`) of one method; `removals`: rows of that
    table, of these trials among others.
    """
    mine = _of_trials(rows, removals)
    if mine.empty:
        return Removed()
    reasons = [_alike(text) for text in mine["reason"] if isinstance(text, str)]
    shares = {name: mine[name].astype(float) / mine[f"{name}_dense"] for name in SIZES}
    parameters, forward, file = (_mean(share) for share in shares.values())
    stuck = stuck_rows(mine["stuck"], len(mine))
    dead = _mean(mine["neurons_dead"])
    return Removed(
        removed_n=len(mine),
        removed_nothing_n=len(reasons),
        removed_reason=_told(reasons),
        removed_parameters_share=parameters,
        removed_forward_share=forward,
        removed_file_share=file,
        neurons_dead=dead,
        neurons_removed=_mean(mine["neurons_removed"]),
        neurons_stuck=None if dead is None else math.fsum(row.neurons for row in stuck),
        removed_difference=_largest(mine["difference"]),
        removed_difference_float64=_largest(mine["difference_float64"]),
        stuck=stuck,
        **_latencies(mine),
    )


def with_removals(done: pd.DataFrame, removals: pd.DataFrame) -> pd.DataFrame:
    """The trials `done` (of `per_trial`) with columns on what is left of each after removal.

    `removed_parameters`, `removed_forward` (FLOPs of one sample's forward), `removed_latency` (of
    a batch, over the dense model's), `removed_on` (the device) and `removed_busy`: whether that
    had other work.
    """
    mine = _of_trials(done, removals)
    busy = [timing_withheld(mine.iloc[[place]]) is not None for place in range(len(mine))]
    found = mine.reindex(columns=["trial", *AFTER.values()])
    renamed = found.rename(columns={column: name for name, column in AFTER.items()})
    joined = done.merge(renamed.assign(removed_busy=busy), on="trial", how="left")
    return joined.set_axis(done.index)


def stuck_rows(texts: Iterable[Any], n: int) -> list[StuckRow]:
    """What could not be removed, by layer and reason, of the JSON of `n` seeds."""
    found: dict[tuple[str, str], Counter[int]] = {}
    for seed, text in enumerate(texts):
        for one in json.loads(text) if isinstance(text, str) else []:
            key = str(one["layer"]), _alike(str(one["reason"]))
            found.setdefault(key, Counter())[seed] += int(one["neurons"])
    seeds: dict[str, set[int]] = {}
    for (_, reason), counts in found.items():
        seeds.setdefault(reason, set()).update(counts)
    return [
        StuckRow(
            layer=layer,
            neurons=counts.total() / n,
            reason=reason,
            seeds=len(counts),
            reason_seeds=len(seeds[reason]),
        )
        for (layer, reason), counts in found.items()
    ]


def _alike(reason: str) -> str:
    """A reason without the amount that it names, which tells seeds apart that are alike."""
    return AMOUNT.sub("", reason)


def _told(reasons: list[str]) -> str | None:
    """All of them; where they are several, in how many seeds each holds."""
    counts = Counter(reasons)
    if len(counts) == 1:
        return reasons[0]
    return "; ".join(f"{reason} ({counted(n, 'seed')})" for reason, n in counts.items()) or None


def _of_trials(rows: pd.DataFrame, removals: pd.DataFrame) -> pd.DataFrame:
    """The rows of `removals` of these trials, with their seeds and what they were trained on."""
    known = rows[["trial", "seed", "gpu"]]
    if removals.empty:
        return known.iloc[:0]
    return known.merge(removals.drop(columns="seed"), on="trial")


def _latencies(mine: pd.DataFrame) -> dict[str, Any]:
    """The fields on latency, of the seeds that it was measured of."""
    timed = mine[mine["latency_batch"].notna() | mine["latency_one"].notna()]
    if timed.empty:
        return {}
    why = SEVERAL if timed["device"].nunique() > 1 else timing_withheld(timed)
    known = {
        "latency_batch_size": int(timed["batch"].iloc[0]),
        "latency_n": len(timed),
        "latency_device": "; ".join(sorted(timed["device"].unique())),
    }
    if why:
        return known | {"latency_withheld": why}
    return known | _latency(timed, "latency_one") | _latency(timed, "latency_batch")


def _latency(timed: pd.DataFrame, name: str) -> dict[str, Any]:
    known = by_seed(timed, name)
    found = ratio(known, dict.fromkeys(known, 1.0))
    if found is None:
        return {}
    low, high = _ends(timed, name, found)
    towards = direction(found, 1.0)
    return {
        name: found.mean,
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_verdict": towards and FASTER[towards],
    }


def _ends(timed: pd.DataFrame, name: str, found: Interval) -> tuple[float | None, float | None]:
    """Over seeds; of a single one the quartiles of its pairs."""
    if found.n > 1:
        return found.low, found.high
    row = timed[timed[name].notna()].iloc[0]
    low, high = (float(row[f"{name}_{end}"]) for end in ("low", "high"))
    return (low, high) if math.isfinite(low + high) else (None, None)


def _mean(values: "pd.Series[Any]") -> float | None:
    """None where a seed does not tell."""
    mean = float(values.astype(float).mean(skipna=False))
    return mean if math.isfinite(mean) else None


def _largest(values: "pd.Series[Any]") -> float | None:
    known = values.astype(float).dropna()
    return float(known.max()) if len(known) else None
