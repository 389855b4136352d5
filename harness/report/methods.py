"""One method over its seeds: metric, savings, time, memory and energy beside the baseline's."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.report.intervals import (
    Interval,
    difference,
    direction,
    interval,
    more_seeds,
    ratio,
    verdict,
)
from harness.suite.method_specs import KINDS

COUNTS = ["dense", "paper", "required", "executed"]
MEASURED = ["seconds_train", "seconds_equilibrium", "energy_joules"]
MEANS = [*COUNTS, "overhead", "paper_dense", "frozen", "saved", "saved_required", "saved_paper"]
TIMING = {"below": "less", "above": "more", "unclear": "unclear"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """One method over its finished seeds; None where it can't be said.

    `label`: the method with the parameters in which it differs from another of its name. `failed`:
    seeds that failed; `withheld`: why there is no verdict although there are seeds. Metric and
    differences are shares, with 95 % intervals; `difference` is to the baseline, `difference_n`
    over so many seeds of both where it is `paired`, else over the smaller sample. `verdict`:
    "keeps", "loses" or "undecided", when about `more_seeds` more are needed.

    FLOPs are of one backward of one sample, averaged over epochs and seeds; shares are of the
    dense backward (for `paper`: of the paper's count with nothing frozen). `saved` and
    `saved_required` count the cost of deciding in: 1 − (executed + overhead) / dense;
    `saved_paper` is the published way. `frozen`: share of the neurons in the last epoch.

    `seconds_train`, `seconds_decide`: of a trial; None where trials of the group ran on different
    devices. `memory_bytes`: peak of the GPU, mean over seeds; `energy_joules`: of training and
    deciding. Ratios are to the baseline, of sums of train and decide, geometric means with
    intervals; `seconds_verdict`: "less", "more" or "unclear", None where trials shared a device.
    `stopped_epochs`: what the baseline can train for the FLOPs of this method's backward and
    deciding; `stopped_metric`: its metric by then, `stopped_difference`: of this method to that.
    """

    method: str
    label: str
    parameters: dict[str, Any]
    n: int
    failed: int
    withheld: str | None
    seeds: list[int]
    metric_mean: float
    metric_std: float | None
    metric_low: float | None
    metric_high: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    difference_n: int | None
    paired: bool | None
    verdict: str | None
    more_seeds: int | None
    dense: float
    paper: float
    paper_share: float
    required: float
    required_share: float
    executed: float
    executed_share: float
    overhead: float
    overhead_share: float
    saved: float
    saved_required: float
    saved_paper: float
    frozen: float
    seconds_train: float | None
    seconds_decide: float | None
    seconds_ratio: float | None
    seconds_ratio_low: float | None
    seconds_ratio_high: float | None
    seconds_verdict: str | None
    memory_bytes: float | None
    memory_ratio: float | None
    energy_joules: float | None
    energy_ratio: float | None
    stopped_epochs: int | None
    stopped_metric: float | None
    stopped_difference: float | None
    stopped_difference_low: float | None
    stopped_difference_high: float | None

    @property
    def plain(self) -> bool:
        """Whether it is a baseline."""
        return bool(self.parameters["kind"] == "baseline")


def per_trial(
    done: pd.DataFrame, epochs: pd.DataFrame, labels: dict[tuple[str, str], str]
) -> pd.DataFrame:
    """One row a trial, with its own columns: last metric, mean FLOPs per sample, seconds; `curve`:
    the metric of every epoch. `labels`: of methods with their parameters.
    """
    mine = epochs[epochs["trial"].isin(done["trial"])].sort_values("epoch", kind="stable")
    by_sample = {
        name: mine[f"backward_flops_{name}"].astype(float) / mine["samples"] for name in COUNTS
    }
    mine = mine.assign(
        **by_sample,
        overhead=mine["overhead_flops"] / mine["samples"],
        frozen=mine["frozen_neurons"] / mine["total_neurons"],
    )
    trials = mine.groupby("trial", observed=True)
    known = trials[[*MEASURED, *COUNTS]].count().eq(trials.size(), axis=0)  # in every epoch
    lists = trials[["test_metric", "paper"]].agg(list)
    sums = trials[MEASURED].sum().where(known[MEASURED])
    found = trials[[*COUNTS, "overhead"]].mean().where(known[COUNTS].assign(overhead=True))
    found = found.assign(
        curve=lists["test_metric"],
        value=[curve[-1] for curve in lists["test_metric"]],
        paper_curve=lists["paper"],
        paper_dense=[curve[0] for curve in lists["paper"]],  # everything trains in epoch 0
        frozen=trials["frozen"].last(),
        seconds_train=sums["seconds_train"],
        seconds_decide=sums["seconds_equilibrium"],
        memory=trials["peak_memory_bytes"].max(),
        energy=sums["energy_joules"],
    )
    joined = done.join(found, on="trial").sort_values(["seed", "started"], kind="stable")
    joined["kind"] = [json.loads(parameters)["kind"] for parameters in joined["parameters"]]
    return joined.assign(
        label=[labels[pair] for pair in zip(joined["method"], joined["parameters"], strict=True)],
        seconds=joined["seconds_train"] + joined["seconds_decide"],
        saved=1 - (joined["executed"] + joined["overhead"]) / joined["dense"],
        saved_required=1 - (joined["required"] + joined["overhead"]) / joined["dense"],
        saved_paper=1 - joined["paper"] / joined["paper_dense"],
    )


def method_rows(
    done: pd.DataFrame,
    failures: Counter[tuple[str, str]],
    labels: dict[tuple[str, str], str],
    margin: float,
    *,
    noise: bool,
    timed: bool,
    shared: bool,
) -> list[MethodRow]:
    """Baselines first, then kind by kind; of one kind by parameters. `noise`: it was trained on
    that; `timed`: on one kind of device, `shared` by trials.
    """
    kinds = list(KINDS)
    baseline = done[done["kind"] == "baseline"].drop_duplicates("seed")
    lost = sum(n for key, n in failures.items() if json.loads(key[1])["kind"] == "baseline")
    known = {(str(m), str(p)): rows for (m, p), rows in done.groupby(["method", "parameters"])}
    found = []
    for key in dict.fromkeys([*known, *failures]):
        rows = known.get(key, done.iloc[:0])
        failed = failures[key]
        reasons = {"noise": noise, f"{failed} failed": failed, "a baseline failed": lost}
        withheld = next((reason for reason, holds in reasons.items() if holds), None)
        found.append(
            _method(
                key,
                labels[key],
                rows,
                baseline,
                failed,
                withheld,
                margin,
                timed=timed,
                shared=shared,
            )
        )
    found.sort(key=lambda row: (kinds.index(row.parameters["kind"]), _order(row)))
    return found


def _order(row: MethodRow) -> tuple[Any, ...]:
    family = row.method.partition(" ")[0]
    numbers = {k: v for k, v in row.parameters.items() if isinstance(v, (int, float))}
    return family, sorted(numbers.items()), row.method


def labels(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What a method with these parameters is called beside the others."""
    known = {pair: json.loads(pair[1]) for pair in dict.fromkeys(pairs)}
    return {pair: _label(pair, known) for pair in known}


def _label(pair: tuple[str, str], known: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The method's name, with what tells it from others of that name."""
    name, mine = pair[0], known[pair]
    others = [parameters for (other, _), parameters in known.items() if other == name]
    differing = [key for key in mine if any(other.get(key) != mine[key] for other in others)]
    unnamed = mine.get("gradient") == "cut" and "cut" not in name and "gradient" not in differing
    cut = ["gradient=cut"] if unnamed else []
    return " ".join([name, *(f"{key}={mine[key]}" for key in differing), *cut])


def _method(
    key: tuple[str, str],
    label: str,
    rows: pd.DataFrame,
    baseline: pd.DataFrame,
    failed: int,
    withheld: str | None,
    margin: float,
    *,
    timed: bool,
    shared: bool,
) -> MethodRow:
    parameters = json.loads(key[1])
    others = baseline.iloc[:0] if parameters["kind"] == "baseline" else baseline
    means = rows[MEANS].mean(skipna=False)
    metric = interval(list(rows["value"]))
    found = difference(by_seed(rows, "value"), by_seed(others, "value"))
    judged = None if withheld else verdict(found, margin)
    return MethodRow(
        method=key[0],
        label=label,
        parameters=parameters,
        n=len(rows),
        failed=failed,
        withheld=withheld if others is baseline and found is not None else None,
        seeds=[int(seed) for seed in rows["seed"]],
        metric_mean=metric.mean,
        metric_std=metric.std,
        metric_low=metric.low,
        metric_high=metric.high,
        **_ends("difference", found),
        difference_n=found.n if found else None,
        paired=found.paired if found else None,
        verdict=judged,
        more_seeds=more_seeds(found, margin) if judged == "undecided" else None,
        **_counts(means),
        paper_share=float(means["paper"] / means["paper_dense"]),
        required_share=float(means["required"] / means["dense"]),
        executed_share=float(means["executed"] / means["dense"]),
        overhead_share=float(means["overhead"] / means["dense"]),
        saved=float(means["saved"]),
        saved_required=float(means["saved_required"]),
        saved_paper=float(means["saved_paper"]),
        **_measured(rows, others, timed=timed, shared=shared),
        **_stopped(rows, others, 1 - float(means["saved"])),
    )


def devices(done: pd.DataFrame) -> set[str]:
    """The kinds of device that these trials ran on; a CPU with other threads is another."""
    named = done["gpu"].fillna(done["cpu"]).fillna("unknown")
    threads = done["threads"].where(done["gpu"].isna(), 0)
    pairs = zip(named, threads, strict=True)
    return {
        f"{part}, {'?' if count != count else int(count)}"
        for name, count in pairs
        for part in name.split("; ")
    }


def shared(done: pd.DataFrame) -> bool:
    """Whether any of these trials shared its device, or may have."""
    return bool((done["trials_on_device"] != 1).any())


def _counts(means: "pd.Series[float]") -> dict[str, Any]:
    return {name: float(means[name]) for name in (*COUNTS, "overhead", "frozen")}


def by_seed(rows: pd.DataFrame, column: str) -> dict[int, float]:
    """What is known, and finite, of a column of `per_trial`."""
    pairs = zip(rows["seed"].astype(int), rows[column].astype(float), strict=True)
    return {seed: value for seed, value in pairs if math.isfinite(value)}


def _ends(name: str, found: Interval | None) -> dict[str, Any]:
    ends = (None, None, None) if found is None else (found.mean, found.low, found.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def _measured(
    rows: pd.DataFrame, others: pd.DataFrame, *, timed: bool, shared: bool
) -> dict[str, Any]:
    """What clocks and counters say: nothing where devices differ."""

    def mean(column: str) -> float | None:
        known = by_seed(rows, column)
        whole = timed and 0 < len(known) == len(rows)
        return sum(known.values()) / len(known) if whole else None

    def against(column: str) -> Interval | None:
        return ratio(by_seed(rows, column), by_seed(others, column)) if timed else None

    seconds, memory, energy = map(against, ("seconds", "memory", "energy"))
    towards = None if shared else direction(seconds, 1.0)
    return {
        "seconds_train": mean("seconds_train"),
        "seconds_decide": mean("seconds_decide"),
        **_ends("seconds_ratio", seconds),
        "seconds_verdict": towards and TIMING[towards],
        "memory_bytes": mean("memory"),
        "memory_ratio": memory and memory.mean,
        "energy_joules": mean("energy"),
        "energy_ratio": energy and energy.mean,
    }


def _stopped(rows: pd.DataFrame, others: pd.DataFrame, share: float) -> dict[str, Any]:
    """The baseline, stopped when it has spent that share of what it spends."""
    nothing = {"stopped_epochs": None, "stopped_metric": None, **_ends("stopped_difference", None)}
    if others.empty or rows.empty or not math.isfinite(share):
        return nothing
    epochs = len(others["curve"].iloc[0])
    afforded = int(epochs * share + 1e-9)
    if not 1 <= afforded < epochs:
        return nothing
    stopped = by_seed(others.assign(by_then=[c[afforded - 1] for c in others["curve"]]), "by_then")
    if not stopped:
        return nothing
    found = difference(by_seed(rows, "value"), stopped)
    return {
        "stopped_epochs": afforded,
        "stopped_metric": sum(stopped.values()) / len(stopped),
        **_ends("stopped_difference", found),
    }
