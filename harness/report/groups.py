"""The trials of a group: which count, which are missing; and what sets it apart from others."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from harness.storage.requests import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTrials:
    """The trials of a group, sorted.

    `done`: those that count; `missing`, `unfinished`, `failed`: a line for each of the others;
    `failures`: how many failed, by name and parameters (JSON) of the method.
    """

    done: pd.DataFrame
    missing: list[str]
    unfinished: list[str]
    failed: list[str]
    failures: Counter[tuple[str, str]]


def group_trials(
    trials: pd.DataFrame, epochs: pd.DataFrame, requests: list[Request]
) -> GroupTrials:
    """Sort the trials of a group, by their rows, their epochs, and what runs were asked for."""
    whole = _whole(trials, epochs)
    last = epochs.loc[epochs.groupby("trial", observed=True)["epoch"].idxmax()]
    finite = set(last.loc[np.isfinite(last["test_metric"]), "trial"])
    done = trials["state"] == "done"
    undefined = done & whole & ~trials["trial"].isin(finite)
    failed = trials[(trials["state"] == "failed") | undefined]
    known = failed["reason"].fillna("no reason is known")
    reasons = np.where(undefined[failed.index], "its metric is no finite number", known)
    names = list(zip(failed["method"], failed["parameters"], strict=True))
    return GroupTrials(
        done=trials[done & whole & ~undefined],
        missing=missing(set(trials["trial"]), requests),
        unfinished=[
            f"{t.method} seed {t.seed}: {t.epochs_done} of {t.epochs} epochs"
            for t in trials[trials["state"] == "running"].itertuples()
        ]
        + [
            f"{t.method} seed {t.seed}: its rows of epochs are not whole; delete "
            f"epochs/{t.trial}.parquet and run the suite again"
            for t in trials[done & ~whole].itertuples()
        ],
        failed=[
            f"{t.method} seed {t.seed}: {reason}"
            for t, reason in zip(failed.itertuples(), reasons, strict=True)
        ],
        failures=Counter(names),
    )


def _whole(trials: pd.DataFrame, epochs: pd.DataFrame) -> "pd.Series[bool]":
    """Whether each epoch of a trial is there once."""
    ordered = epochs.sort_values(["trial", "epoch"]).groupby("trial", observed=True)["epoch"]
    found = {str(trial): list(rows) for trial, rows in ordered}
    wanted = zip(trials["trial"], trials["epochs"], strict=True)
    return pd.Series([found.get(t) == list(range(n)) for t, n in wanted], index=trials.index)


def missing(known: set[str], requests: list[Request]) -> list[str]:
    """A line for each method with the seeds that were asked for and are not among `known`
    trials.
    """
    wanted: dict[str, set[int]] = {}
    for request in requests:
        for key, method, seed in request.trials:
            if key not in known:
                wanted.setdefault(method, set()).add(seed)
    return [f"{method}: {seeds_text(numbers)}" for method, numbers in wanted.items()]


def seeds_text(numbers: set[int] | list[int]) -> str:
    """Seeds as a reader wants them: "seed 3", "seeds 0-4, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    listed = ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
    return f"{'seeds' if len(numbers) > 1 else 'seed'} {listed}"


def apart(trials: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """For each group the conditions, by path, in which it differs from others of its suite."""
    found: dict[str, dict[str, Any]] = {}
    for _, rows in trials.groupby("suite"):
        firsts = rows.drop_duplicates("group")
        facts = {str(row["group"]): conditions(row) for row in firsts.to_dict("records")}
        found |= {group: _own(mine, facts) for group, mine in facts.items()}
    return found


def _own(mine: dict[str, Any], facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    others = [other for other in facts.values() if other is not mine]
    paths = [p for p in mine if any(other.get(p) != mine[p] for other in others)]
    paths += [p for other in others for p in other if p not in mine and p not in paths]
    return {path: mine.get(path) for path in dict.fromkeys(paths)} or (
        {"code": "the suite's own code or starting weights"} if others else {}
    )


def conditions(trial: dict[Any, Any]) -> dict[str, Any]:
    """The conditions of a trial, a row of `trials`: its experiment by path ("recipe.epochs"), the
    name of its data under "data", their fingerprint under "data.fingerprint".
    """
    return _flat(json.loads(trial["experiment"])) | {
        "data": trial["data"],
        "data.fingerprint": trial["data_fingerprint"],
    }


def _flat(value: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = item
    return flat
