"""One row for each finished trial: its metric, its FLOPs per sample, its seconds."""

import json
import math

import pandas as pd

COUNTS = ["dense", "paper", "required", "executed"]
Labels = dict[tuple[str, str], str]  # by name and parameters (JSON) of a method
MEASURED = ["seconds_train", "seconds_equilibrium", "energy_joules"]


def per_trial(done: pd.DataFrame, epochs: pd.DataFrame, labels: Labels) -> pd.DataFrame:
    """The finished trials `done` of a group, a row each, with what their `epochs` say.

    `labels`: what each method, by name and parameters (JSON), is called. New columns: `value` and
    `curve` (the last metric, that of every epoch); `dense`, `paper`, `required`, `executed` and
    `overhead` (FLOPs per sample, mean over epochs), `paper_curve`, `paper_dense`; `saved…`,
    `frozen` (shares); `seconds…`, `memory` (bytes), `energy` (joules); `kind` and `label`.
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


def device_shared(done: pd.DataFrame) -> bool:
    """Whether any of these trials shared its device, or may have."""
    return bool((done["trials_on_device"] != 1).any())


def by_seed(rows: pd.DataFrame, column: str) -> dict[int, float]:
    """Seed → value of a column of `per_trial`, where it is known and finite."""
    pairs = zip(rows["seed"].astype(int), rows[column].astype(float), strict=True)
    return {seed: value for seed, value in pairs if math.isfinite(value)}
