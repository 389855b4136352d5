"""What the stored rows of a group give away: seeds that are one run, models that did other work."""

import json
from typing import Any

import numpy as np
import pandas as pd

from harness.report.groups import seeds_text
from harness.report.words import flops_text
from harness.suite.method_specs import kind_of

NEAR = 1e-9  # of each other, dense FLOPs are the same


def noticed(done: pd.DataFrame) -> list[str]:
    """A line for each thing; `done`: the finished trials of a group (`per_trial`), also those that
    repeat another seed's.
    """
    return [*_one_run(done), *_other_work(done), *_fixed(done)]


def repeated(trials: pd.DataFrame) -> "pd.Series[bool]":
    """Whether a trial has the losses of another seed of its method, which comes before it, to the
    last bit in every epoch.

    `trials`: with `method`, `parameters`, `seed` and `losses` (of all epochs, a tuple; with NaN
    where they are not known), sorted by seed.
    """
    known = np.array([bool(np.isfinite(losses).all()) for losses in trials["losses"]], dtype=bool)
    again = trials.duplicated(["method", "parameters", "losses"])
    return again & known & ~trials.duplicated(["method", "parameters", "seed"])


def one_run(rows: pd.DataFrame) -> str:
    """The seeds of one method that gave the same numbers ("seeds 0-2"); empty where none did."""
    found = [part for _, part in rows.groupby("losses", sort=False) if part["repeats"].any()]
    return "; ".join(seeds_text({int(seed) for seed in part["seed"]}) for part in found)


def _one_run(done: pd.DataFrame) -> list[str]:
    lines = []
    for label, rows in done.groupby("label", sort=False):
        seeds, runs = one_run(rows), len(rows) - int(rows["repeats"].sum())
        if seeds:
            whole = "one run" if runs == 1 else f"{runs} runs in all"
            lines.append(
                f"{label}: {seeds} gave the same numbers, to the last bit in every epoch: they "
                f"are {whole}, not {len(rows)}, and count so{'; no interval' * (runs == 1)}."
            )
    return lines


def _other_work(done: pd.DataFrame) -> list[str]:
    """Of trials of the suite's own model; of a method that may train another, among its own."""
    own = done[done["parameters"].map(_of_the_suite).astype(bool)]
    found = _unequal(own, "trials of the same model")
    for label, rows in done.groupby("label", sort=False):
        found = found or _unequal(rows, f"trials of {label}")
    return found


def _of_the_suite(text: str) -> bool:
    """Whether a method of such parameters trains the suite's own model, and counts as usual."""
    parameters: dict[str, Any] = json.loads(text)
    kind = kind_of(parameters)
    try:
        return not kind.foreign and not kind.model_validate(parameters).model_changes
    except ValueError:  # of another version
        return False


def _unequal(rows: pd.DataFrame, whose: str) -> list[str]:
    rows = rows.sort_values("own_dense", kind="stable")
    if rows.empty or np.isclose(rows["own_dense"].iloc[0], rows["own_dense"].iloc[-1], rtol=NEAR):
        return []
    ends = [
        f"{flops_text(float(row['own_dense']))} ({row['label']} seed {row['seed']})"
        for row in (rows.iloc[0], rows.iloc[-1])
    ]
    return [
        f"Dense FLOPs differ between {whose}, from {ends[0]} to {ends[1]}: layers were left out at "
        "random when they were counted, routes followed the weights, or different versions of "
        "neqbench counted them; shares here are not of equal work."
    ]


def _fixed(done: pd.DataFrame) -> list[str]:
    counts: dict[str, list[str]] = {}
    for row in done[done["fixed"] > 0].to_dict("records"):
        said = f"{row['fixed'] * row['total_neurons']:.0f} of {row['total_neurons']:.0f} neurons"
        counts.setdefault(said, []).append(str(row["label"]))
    if not counts:
        return []
    whole = len(counts) == 1 and len(done) == sum(map(len, counts.values()))
    listed = [
        said if whole else f"{said} ({', '.join(dict.fromkeys(labels))})"
        for said, labels in counts.items()
    ]
    fixed = "Fixed by the model (requires_grad=False), and never counted as frozen"
    return [f"{fixed}: {'; '.join(listed)}."]
