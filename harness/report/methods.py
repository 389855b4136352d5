"""From the trials of a group to one row for each method."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import pandas as pd

from harness.report.beside import beside_one_shot, minima_of
from harness.report.intervals import (
    FEWEST,
    Interval,
    difference,
    direction,
    interval,
    more_seeds,
    ratio,
    verdict,
)
from harness.report.measures import recorded
from harness.report.method_row import (
    Measured,
    MethodRow,
    Pruned,
    Quality,
    Replays,
    Savings,
    ShorterBaseline,
)
from harness.report.noticed import one_run
from harness.report.per_trial import COUNTS, Labels, by_seed, over
from harness.report.removed import removed_of
from harness.report.replayed import TIMING, replays_of
from harness.suite.method_specs import KINDS, kind_of, told

SAVED = ["saved", "saved_required", "saved_paper"]
MEANS = [*COUNTS, "overhead", "paper_dense", "frozen", "fixed", "size", *SAVED]


def method_rows(
    done: pd.DataFrame,
    failures: Counter[tuple[str, str]],
    labels: Labels,
    margin: float,
    measures: pd.DataFrame,
    replays: pd.DataFrame,
    removals: pd.DataFrame,
    *,
    noise: bool,
    timed: bool,
    shared: bool,
) -> list[MethodRow]:
    """One row for each method: baselines first, then kind by kind, of one kind by parameters.

    `done`: the finished trials of a group (`per_trial`); `failures`: trials that failed, by method;
    `margin`: of verdicts, as a share; `measures`, `replays`, `removals`: rows of these tables.
    `noise`: whether they were trained on that; `timed`: whether all ran on one kind of device,
    `shared`: whether it had other work. Trials that repeat another seed's count once, with it.
    """
    whole, done = done, done[~done["repeats"]]
    baseline = done[done["baseline"]].drop_duplicates("seed")
    lost = sum(n for key, n in failures.items() if kind_of(json.loads(key[1])).is_baseline)
    known = {(str(m), str(p)): rows for (m, p), rows in done.groupby(["method", "parameters"])}
    found = []
    for key in dict.fromkeys([*known, *failures]):
        rows, failed = known.get(key, done.iloc[:0]), failures[key]
        reasons = {"noise": noise, f"{failed} failed": failed, "a baseline failed": lost}
        withheld = next((reason for reason, holds in reasons.items() if holds), None)
        parameters = json.loads(key[1])
        is_baseline = kind_of(parameters).is_baseline
        others = baseline.iloc[:0] if is_baseline else baseline
        quality = _quality(rows, others, margin, judged=withheld is None)
        compared = not is_baseline and quality.difference is not None
        if (quality.difference_n or FEWEST) < FEWEST:
            mine = (whole["method"] == key[0]) & (whole["parameters"] == key[1])
            withheld = withheld or _no_seeds(whole[mine], whole[whole["baseline"]])
        found.append(
            MethodRow(
                method=key[0],
                label=labels[key],
                parameters=told(parameters),
                n=len(rows),
                failed=failed,
                withheld=withheld if compared else None,
                seeds=[int(seed) for seed in rows["seed"]],
                quality=quality,
                savings=_savings(rows),
                measured=_measurements(rows, others, timed=timed, shared=shared),
                replays=replays_of(rows, replays) if timed else Replays(),
                shorter_baseline=_shorter_baseline(rows, others),
                pruned=_pruned(rows),
                removed=removed_of(rows, removals),
                minima=minima_of(rows),
                measures=recorded(measures, rows),
            )
        )
    found.sort(key=_order)
    return beside_one_shot(found, done, noise=noise)


def _no_seeds(rows: pd.DataFrame, others: pd.DataFrame) -> str | None:
    """Why few runs are left of the seeds of a method, or of the baseline's `others`."""
    mine, theirs = one_run(rows), one_run(others)
    same = mine or (f"the baseline's {theirs}" if theirs else "")
    return f"{same} gave the same numbers" if same else None


def _order(row: MethodRow) -> tuple[Any, ...]:
    at, family = list(KINDS).index(row.parameters["kind"]), row.method.partition(" ")[0]
    numbers = {k: v for k, v in row.parameters.items() if isinstance(v, (int, float))}
    return at, family, sorted(numbers.items()), row.method


def labels(pairs: Iterable[tuple[str, str]]) -> Labels:
    """What each method, by name and parameters (JSON), is called beside the others."""
    known = {pair: told(json.loads(pair[1])) for pair in dict.fromkeys(pairs)}
    return {pair: _label(pair, known) for pair in known}


def _label(pair: tuple[str, str], known: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The method's name, with what tells it from others of that name."""
    name, mine = pair[0], known[pair]
    others = [parameters for (other, _), parameters in known.items() if other == name]
    differing = [key for key in mine if any(other.get(key) != mine[key] for other in others)]
    unnamed = mine.get("gradient") == "cut" and "cut" not in name and "gradient" not in differing
    cut = ["gradient=cut"] if unnamed else []
    return " ".join([name, *(f"{key}={mine[key]}" for key in differing), *cut])


def _quality(rows: pd.DataFrame, others: pd.DataFrame, margin: float, *, judged: bool) -> Quality:
    """`others`: the baseline's trials; `judged`: whether there may be a verdict."""
    metric = interval(list(rows["value"]))
    found = difference(by_seed(rows, "value"), by_seed(others, "value"))
    decided = verdict(found, margin) if judged else None
    return Quality(
        metric_mean=metric.mean,
        metric_std=metric.std,
        metric_low=metric.low,
        metric_high=metric.high,
        **_ends("difference", found),
        difference_n=found.n if found else None,
        paired=found.paired if found else None,
        verdict=decided,
        more_seeds=more_seeds(found, margin) if decided == "undecided" else None,
    )


def _savings(rows: pd.DataFrame) -> Savings:
    means = {str(name): float(mean) for name, mean in rows[MEANS].mean(skipna=False).items()}
    paper_dense, left, fixed = (means.pop(name) for name in ("paper_dense", "size", "fixed"))
    return Savings(
        effective_parameters=left if math.isfinite(left) else None,
        fixed=fixed if math.isfinite(fixed) else None,
        **means,
        paper_share=over(means["paper"], paper_dense),
        required_share=over(means["required"], means["dense"]),
        executed_share=over(means["executed"], means["dense"]),
        overhead_share=over(means["overhead"], means["dense"]),
    )


def _pruned(rows: pd.DataFrame) -> Pruned:
    means = rows[[part.name for part in fields(Pruned)]].mean(skipna=False).items()
    return Pruned(**{str(name): float(mean) for name, mean in means if math.isfinite(mean)})


def _ends(name: str, found: Interval | None) -> dict[str, Any]:
    ends = (None, None, None) if found is None else (found.mean, found.low, found.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def _measurements(
    rows: pd.DataFrame, others: pd.DataFrame, *, timed: bool, shared: bool
) -> Measured:
    """What clocks and counters say: nothing where devices differ."""

    def mean(column: str) -> float | None:
        known = by_seed(rows, column)
        whole = timed and 0 < len(known) == len(rows)
        return sum(known.values()) / len(known) if whole else None

    def against(column: str) -> Interval | None:
        return ratio(by_seed(rows, column), by_seed(others, column)) if timed else None

    seconds, memory, energy = map(against, ("seconds", "memory", "energy"))
    towards = None if shared else direction(seconds, 1.0)
    return Measured(
        seconds_train=mean("seconds_train"),
        seconds_decide=mean("seconds_decide"),
        **_ends("seconds_ratio", seconds),
        seconds_verdict=towards and TIMING[towards],
        memory_bytes=mean("memory"),
        memory_ratio=None if memory is None else memory.mean,
        energy_joules=mean("energy"),
        energy_ratio=None if energy is None else energy.mean,
    )


def _shorter_baseline(rows: pd.DataFrame, others: pd.DataFrame) -> ShorterBaseline:
    """The baseline, stopped when it has spent as much as the method."""
    share = float(rows["spent"].mean(skipna=False)) if len(rows) else math.nan
    if others.empty or not math.isfinite(share):
        return ShorterBaseline()
    epochs = len(others["curve"].iloc[0])
    afforded = int(epochs * share + 1e-9)
    if not 1 <= afforded < epochs:
        return ShorterBaseline(spent_share=share)
    stopped = by_seed(others.assign(by_then=[c[afforded - 1] for c in others["curve"]]), "by_then")
    if not stopped:
        return ShorterBaseline(spent_share=share)
    found = difference(by_seed(rows, "value"), stopped)
    return ShorterBaseline(
        spent_share=share,
        stopped_epochs=afforded,
        stopped_metric=sum(stopped.values()) / len(stopped),
        **_ends("stopped_difference", found),
    )
