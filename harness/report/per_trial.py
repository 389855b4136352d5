"""One row for each finished trial: its metric, its FLOPs per sample, its seconds."""

import json
import math

import numpy as np
import pandas as pd

from harness.report.measures import of_model
from harness.report.noticed import repeated
from harness.storage.provenance import OTHER_LOAD
from harness.suite.config import Probe, Sharpness
from harness.suite.method_specs import kind_of

COUNTS = ["dense", "paper", "required", "executed"]
Labels = dict[tuple[str, str], str]  # by name and parameters (JSON) of a method
LOSSES = ["train_loss", "test_loss"]
MEASURED = ["seconds_train", "seconds_equilibrium", "energy_joules"]
SIZES = ["parameters", "neurons"]  # measures of a whole model; what is left of each: `…_left`
# Measures of a whole model, on the minimum that training has found.
MINIMA = [*Sharpness.measures, *Probe.measures]


def per_trial(
    done: pd.DataFrame, epochs: pd.DataFrame, labels: Labels, measures: pd.DataFrame
) -> pd.DataFrame:
    """The finished trials `done` of a group, a row each, with what their `epochs` say.

    `labels`: what each method, by name and parameters (JSON), is called; `measures`: rows of that
    table, of these trials among others. New columns: `value` and `curve` (the last metric, that of
    every epoch); `forward`, `dense`, `paper`, `required`, `executed` and `overhead` (FLOPs per
    sample, mean over epochs), `paper_curve`, `paper_dense`; `saved…`, `spent` (of all FLOPs of
    plain training), `frozen` and `fixed` (shares); `own_dense`, of the trial's own model;
    `losses` of every epoch, in training and test, and `repeats`, whether another seed has had
    them; `seconds…`, `memory` (bytes), `energy` (joules), `other_load`; `size` (parameters that are
    left, of what prunes) and, of what prunes, the fields of `method_row.Pruned`; MINIMA, as
    recorded last; `baseline`, `in_question` and `label`. Shares are of the baseline's model, where
    there is one.
    """
    mine = epochs[epochs["trial"].isin(done["trial"])].sort_values("epoch", kind="stable")
    by_sample = {
        name: mine[f"backward_flops_{name}"].astype(float) / mine["samples"] for name in COUNTS
    }
    mine = mine.assign(
        **by_sample,
        overhead=mine["overhead_flops"] / mine["samples"],
        forward=mine["forward_flops"] / mine["samples"],
        frozen=mine["frozen_neurons"] / mine["total_neurons"],
        fixed=mine["fixed_neurons"].astype(float) / mine["total_neurons"],
    )
    trials = mine.groupby("trial", observed=True)
    known = trials[[*MEASURED, *COUNTS]].count().eq(trials.size(), axis=0)  # in every epoch
    lists = trials[["test_metric", "paper", *LOSSES]].agg(list)
    sums = trials[MEASURED].sum().where(known[MEASURED])
    always = ["overhead", "forward", "other_load"]
    whole = known[COUNTS].assign(**dict.fromkeys(always, True))
    found = trials[[*COUNTS, *always]].mean().where(whole)
    found = found.assign(
        curve=lists["test_metric"],
        value=[curve[-1] for curve in lists["test_metric"]],
        paper_curve=lists["paper"],
        paper_dense=[curve[0] for curve in lists["paper"]],  # everything trains in epoch 0
        frozen=trials["frozen"].last(),
        fixed=trials["fixed"].last(),
        total_neurons=trials["total_neurons"].last(),
        losses=(lists["train_loss"] + lists["test_loss"]).map(
            lambda losses: (*map(float, losses),)
        ),
        seconds_train=sums["seconds_train"],
        seconds_decide=sums["seconds_equilibrium"],
        memory=trials["peak_memory_bytes"].max(),
        energy=sums["energy_joules"],
        size=trials["effective_parameters"].last(),
        most_load=trials["other_load"].max(),
    )
    joined = done.join(found, on="trial").sort_values(["seed", "started"], kind="stable")
    kinds = [kind_of(json.loads(parameters)) for parameters in joined["parameters"]]
    joined = joined.assign(
        baseline=np.array([kind.is_baseline for kind in kinds], dtype=bool),
        in_question=np.array([kind.in_question for kind in kinds], dtype=bool),
        repeats=repeated(joined),
        own_dense=joined["dense"],
        label=[labels[pair] for pair in zip(joined["method"], joined["parameters"], strict=True)],
        seconds=joined["seconds_train"] + joined["seconds_decide"],
        # A process that comes to a GPU for an epoch is too many; a CPU may be busy for a moment.
        other_load=joined["other_load"].where(joined["gpu"].isna(), joined["most_load"]),
    )
    joined[MINIMA] = of_model(measures, joined, MINIMA)
    return _with_pruned(_with_shares(joined), measures)


def _with_shares(trials: pd.DataFrame) -> pd.DataFrame:
    """With what was saved and spent; what prunes saves nothing: it is smaller afterwards, and no
    cheaper in training. What that has spent is its `training_cost`.
    """
    plain = trials[trials["baseline"]]
    forward = trials["forward"]
    if len(plain):  # a method may train another model: it is held against the suite's
        first = plain.iloc[0]
        trials = trials.assign(dense=first["dense"], paper_dense=first["paper_dense"])
        forward = first["forward"]
    spent = trials["executed"] + trials["overhead"]
    required = trials["required"] + trials["overhead"]
    shares = {
        "saved": _saved(spent, trials["dense"]),
        "saved_required": _saved(required, trials["dense"]),
        "saved_paper": _saved(trials["paper"], trials["paper_dense"]),
        "spent": (trials["forward"] + spent) / (forward + trials["dense"]),
    }
    saves = trials["size"].isna()
    masked = {name: share.where(saves) for name, share in shares.items()}
    return trials.assign(training_cost=shares["spent"].where(~saves), **masked)


def _saved(spent: "pd.Series[float]", dense: "pd.Series[float]") -> "pd.Series[float]":
    """A share of `dense`; where that is 0, nothing."""
    return (1 - spent / dense).mask(dense.eq(0) & spent.notna(), 0.0)


def over(part: float, whole: float) -> float:
    """The share that the part is of the whole; where that is 0, so is the share."""
    return part / whole if whole else 0.0 * part  # what is unknown (NaN) remains so


def _with_pruned(trials: pd.DataFrame, measures: pd.DataFrame) -> pd.DataFrame:
    """With what is left of the model of each trial that prunes, by what it has recorded."""
    left = [f"{name}_left" for name in SIZES]
    recorded = of_model(measures, trials, [*SIZES, *left, "forward_flops_effective", "psp_entropy"])
    whole, forward = recorded[SIZES], trials["forward"]
    plain = trials[trials["baseline"]]
    if len(plain):  # another model is held against the baseline's, if anybody has told its size
        forward = plain["forward"].iloc[0]
        alike = np.isclose(trials["forward"], forward, rtol=1e-9)
        whole = whole[alike].reindex(trials.index).fillna(whole[alike].max())
    shares = {
        f"{part}_share": recorded[part] / whole[name]
        for name, part in zip(SIZES, left, strict=True)
    }
    pruned = trials["size"].notna()
    return trials.assign(
        **{name: share.where(pruned) for name, share in shares.items()},
        forward_effective_share=(recorded["forward_flops_effective"] / forward).where(pruned),
        psp_entropy=recorded["psp_entropy"].where(pruned),
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


def seconds_withheld(done: pd.DataFrame) -> str | None:
    """As timing_withheld, of the seconds of training alone: each new graph is compiled in them."""
    if any(json.loads(text)["recipe"].get("compile") for text in done["experiment"].unique()):
        return "the seconds of trials include compiling"
    return timing_withheld(done)


def timing_withheld(done: pd.DataFrame) -> str | None:
    """Why the seconds of these trials (of `per_trial`), or of their replays, are no measurement;
    None where they are.
    """
    if device_shared(done):
        return "trials shared a device"
    gpu = done["gpu"].notna()
    on_cpu, on_gpu = (done.loc[gpu == where, "other_load"].max() for where in (False, True))
    if on_cpu > OTHER_LOAD:
        return f"other processes kept {on_cpu:.1f} CPUs busy ({OTHER_LOAD:g} at most)"
    if on_gpu > OTHER_LOAD:
        return f"{on_gpu:.0f} other process{'es' * int(on_gpu > 1)} had memory on the GPU"
    return None


def by_seed(rows: pd.DataFrame, column: str) -> dict[int, float]:
    """Seed → value of a column of `per_trial`, where it is known and finite."""
    pairs = zip(rows["seed"].astype(int), rows[column].astype(float), strict=True)
    return {seed: value for seed, value in pairs if math.isfinite(value)}
