"""Seconds and bytes of methods by the replays of their trials."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from harness.report.intervals import direction, ratio
from harness.report.method_row import Replays
from harness.report.per_trial import by_seed, timing_withheld

TIMING = {"below": "less", "above": "more", "unclear": "unclear"}


def replays_of(rows: pd.DataFrame, replays: pd.DataFrame) -> Replays:
    """What is known of the trials `rows` (of `per_trial`) of one method; `replays`: rows of that
    table, of these trials among others.
    """
    mine = rows[["trial", "seed", "gpu"]].merge(replays.drop(columns="seed"), on="trial")
    if mine.empty:
        return Replays()
    found = ratio(by_seed(mine, "ratio"), dict.fromkeys(mine["seed"].astype(int), 1.0))
    withheld, pairs = timing_withheld(mine), _of_pairs(mine)
    activation, optimizer = (
        (float(mine[f"{what}_bytes"].mean()), float(mine[f"{what}_bytes_plain"].mean()))
        for what in ("activation", "optimizer")
    )
    made = Replays(
        seconds_replayed_ratio=found.mean if found else None,
        seconds_replayed_ratio_low=found.low if found else None,
        seconds_replayed_ratio_high=found.high if found else None,
        seconds_replayed_pairs_low=pairs[0],
        seconds_replayed_pairs_high=pairs[1],
        seconds_replayed_n=len(mine),
        seconds_replayed_withheld=withheld,
        masks=int(mine["plans"].sum()),
        masks_measured=int(mine["plans_measured"].sum()),
        activation_bytes=activation[0],
        activation_ratio=activation[0] / activation[1] if activation[1] else None,
        optimizer_bytes=optimizer[0],
        optimizer_ratio=optimizer[0] / optimizer[1] if optimizer[1] else None,
    )
    if withheld or found is None or made.ends is None:
        return made
    low, high = made.ends
    towards = direction(replace(found, low=low, high=high), 1.0)
    return replace(made, seconds_replayed_verdict=towards and TIMING[towards])


def _of_pairs(mine: pd.DataFrame) -> tuple[float, float]:
    """Ends of the geometric mean over seeds by the trials' own bootstraps.

    Trials of a method are measured together, by the same pairs: their errors don't average out.
    """
    low, high = (float(np.log(mine[f"ratio_{end}"]).mean()) for end in ("low", "high"))
    return math.exp(low), math.exp(high)
