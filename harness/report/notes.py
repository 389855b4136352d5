"""What a reader has to know before believing a table."""

import json
from collections import Counter
from typing import Any

import pandas as pd

from harness.report.intervals import FEWEST
from harness.report.method_row import MethodRow
from harness.report.phases import follows_loss, recipe_of
from harness.report.words import counted
from harness.storage.provenance import is_commit
from harness.suite.config import MARGIN, PLATEAU

FOLLOWS = (
    f"The learning rate follows the validation loss ({PLATEAU}): it differs by method and seed, so "
    "training is not cut into phases."
)
FEW = 6  # seeds, below which intervals say little about rare failures


def notes(
    trials: pd.DataFrame,
    rows: list[MethodRow],
    synthetic: bool,
    twice: dict[str, list[str]],
    *,
    stated: bool,
) -> list[str]:
    """A line for each thing that a reader of a group's tables has to know.

    `synthetic`: whether it was trained on noise; `twice`: trials that lie in several folders;
    `stated`: whether the suite's margin is known.
    """
    doubled = [trial for trial in trials["trial"] if trial in twice]
    return [
        *(["Trained on noise: the metric means nothing."] if synthetic else []),
        *_compared(rows),
        *([FOLLOWS] if follows_loss(recipe_of(trials)) else []),
        *(
            []
            if stated
            else [f"The suite's margin is not known here; {MARGIN:g} points are assumed."]
        ),
        f"Code: {', '.join(commits(trials))}.",
        *versions(trials),
        *(
            [f"{counted(len(doubled), 'trial')} in several of these folders; each counts once."]
            if doubled
            else []
        ),
    ]


def _compared(rows: list[MethodRow]) -> list[str]:
    if not rows:
        return []
    if not any(row.plain and row.n for row in rows):
        return ["No baseline is finished: there is nothing to compare with."]
    counts = [row.quality.difference_n for row in rows if row.quality.difference_n is not None]
    if not counts:
        return []
    fewest = min(counts)
    found = []
    if fewest < FEWEST:
        found.append(f"No verdict from fewer than {FEWEST} seeds.")
    elif fewest < FEW:
        paired = any(row.quality.paired for row in rows)
        freedom = f"{fewest - 1} degrees of freedom" if paired else "few values"
        found.append(f"A small sample: intervals rest on {fewest} seeds ({freedom}).")
    if len(counts) > 1:
        found.append(f"Intervals are of one comparison each, not corrected for {len(counts)}.")
    if any(row.quality.paired is False for row in rows):
        found.append("Where seeds do not match the baseline's, intervals are Welch's (unpaired).")
    return found


def commits(trials: pd.DataFrame) -> list[str]:
    """The commits of these trials' code; where they are several, with the number of trials each."""
    pairs = zip(trials["git_sha"], trials["git_dirty"], strict=True)
    counts = Counter((_sha(sha), not pd.isna(dirty) and bool(dirty)) for sha, dirty in pairs)
    return [
        _short(sha) + " with uncommitted changes" * dirty + f" ({n})" * (len(counts) > 1)
        for (sha, dirty), n in counts.items()
    ]


def _sha(value: Any) -> str:
    return value if isinstance(value, str) else "unknown"


def _short(codes: str) -> str:
    """Commits, with "; " between, by their first digits; versions as they are."""
    return "; ".join(one[:7] if is_commit(one) else one for one in codes.split("; "))


def commits_by_method(trials: pd.DataFrame) -> list[str]:
    """A line for each method with its commits, where there are several in all."""
    if len(commits(trials)) == 1:
        return []
    groups = trials.groupby("method", sort=False)
    return [f"{method}: {', '.join(commits(rows))}" for method, rows in groups]


def versions(trials: pd.DataFrame) -> list[str]:
    """A line on the packages in whose versions these trials differ, if there are any."""
    known = [json.loads(text) for text in trials["versions"].dropna().unique()]
    names = [n for n in dict.fromkeys(n for v in known for n in v) if n != "neqbench"]
    differing = {name: {str(v.get(name)) for v in known} for name in names}
    mixed = [f"{name} {' | '.join(sorted(v))}" for name, v in differing.items() if len(v) > 1]
    return [f"Trials of several versions: {', '.join(mixed)}."] if mixed else []
