"""The table model: what every renderer shows, computed once from the stored rows."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from harness.errors import UserError
from harness.methods import KINDS
from harness.records import SCHEMAS
from harness.storage import Store

_LEFT_OUT = {"traceback", "versions", "data_fingerprint", "git_sha", "git_dirty", "driver"}
TRIALS = [name for name in SCHEMAS["trials"].names if name not in _LEFT_OUT]
EPOCHS = ["trial", "group", "epoch", "samples", "test_metric", "overhead_flops"]
EPOCHS += [f"backward_flops_{name}" for name in ("dense", "paper", "required", "executed")]
EPOCHS += ["seconds_train", "seconds_equilibrium"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """One method over its finished seeds; None where it can't be said.

    FLOPs are of one backward of one sample, averaged over epochs and seeds; shares are of the
    dense backward (for `paper`: of the paper's count with nothing frozen). `saved` counts the cost
    of deciding in: 1 − (executed + overhead) / dense; `saved_paper` is the published way.
    `difference` is to the baseline, over the seeds that both have, in units of the metric.
    `label` is the method with the parameters in which it differs from another of its name.
    `seconds_train` and `seconds_decide` of a trial: None where trials of the group ran on
    different devices.
    """

    method: str
    label: str
    parameters: dict[str, Any]
    n: int
    seeds: list[int]
    metric_mean: float
    metric_std: float | None
    difference: float | None
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
    saved_paper: float
    seconds_train: float | None
    seconds_decide: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTable:
    """All that may be compared: trials that share recipe, model, data and code numerics.

    `timing_shared`: trials shared a CPU or GPU, so that their seconds are no measurement.
    `unfinished` and `failed` name what the rows leave out.
    """

    suite: str
    group: str
    title: str
    metric: str
    data: str
    recipe: dict[str, Any]
    epochs: int
    devices: list[str]
    timing_shared: bool
    dense: float
    paper_dense: float
    methods: list[MethodRow]
    unfinished: list[str]
    failed: list[str]


def load(found: Iterable[Store]) -> list[GroupTable]:
    """The tables of all groups in these results; raises UserError where nothing is stored."""
    tables, looked = [], []
    for store in found:
        looked.append(store.place.uri)
        trials = store.read("trials", TRIALS).to_pandas().sort_values("started")
        _check(trials, store.place.uri)
        epochs = store.read("epochs", EPOCHS).to_pandas(categories=["trial", "group"])
        for group, rows in trials.groupby("group", sort=False):
            tables.append(_group(str(group), rows, epochs[epochs["group"] == group]))
    if not tables:
        raise UserError(f"{', '.join(looked)}: no trial has been started yet")
    return tables


def _check(trials: pd.DataFrame, where: str) -> None:
    """Raises UserError for a row that no neqbench wrote."""
    for row in trials.to_dict("records"):
        try:
            experiment, parameters = json.loads(row["experiment"]), json.loads(row["parameters"])
            whole = {"recipe", "data", "world_size"} <= set(experiment)
            whole &= parameters["kind"] in KINDS
            whole &= not pd.isna([row["seed"], row["epochs"], row["epochs_done"]]).any()
        except (ValueError, TypeError, KeyError):
            whole = False
        if not whole:
            raise UserError(
                f"{where}/trials/{row['trial']}.parquet makes no sense; delete it and run the "
                "suite again: it is rewritten from its checkpoint"
            )


def to_json(tables: list[GroupTable]) -> str:
    """The documented JSON: {"groups": [GroupTable, …]}."""
    return json.dumps({"groups": [_plain(asdict(table)) for table in tables]}, indent=2)


def _plain(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _group(group: str, trials: pd.DataFrame, epochs: pd.DataFrame) -> GroupTable:
    first = trials.iloc[0]
    experiment = json.loads(first["experiment"])
    stored = trials["trial"].isin(set(epochs["trial"].unique()))
    done = trials[(trials["state"] == "done") & stored]
    per_trial = _per_trial(epochs[epochs["trial"].isin(done["trial"])])
    devices = sorted(trials["gpu"].fillna(trials["cpu"]).dropna().unique())
    rows = _methods(done, per_trial, timed=len(devices) == 1)
    return GroupTable(
        suite=first["suite"],
        group=group,
        title=first["title"],
        metric=first["metric"],
        data=first["data"],
        recipe=experiment["recipe"]
        | {"train_size": experiment["data"]["train_size"], "workers": experiment["world_size"]},
        epochs=int(first["epochs"]),
        devices=devices,
        timing_shared=bool((done["trials_on_device"] > 1).any()),
        dense=rows[0].dense if rows else math.nan,
        paper_dense=float(per_trial["paper_dense"].mean()) if rows else math.nan,
        methods=rows,
        unfinished=[
            f"{t.method} seed {t.seed}: {t.epochs_done} of {t.epochs} epochs"
            for t in trials[trials["state"] == "running"].itertuples()
        ]
        + [
            f"{t.method} seed {t.seed}: its rows are missing; run the suite again"
            for t in trials[(trials["state"] == "done") & ~stored].itertuples()
        ],
        failed=[
            f"{t.method} seed {t.seed}: {t.reason}"
            for t in trials[trials["state"] == "failed"].itertuples()
        ],
    )


def _per_trial(epochs: pd.DataFrame) -> pd.DataFrame:
    """One row a trial: last metric, mean FLOPs per sample, seconds."""
    epochs = epochs.sort_values("epoch")
    for name in ("dense", "paper", "required", "executed"):
        epochs[name] = epochs[f"backward_flops_{name}"] / epochs["samples"]
    epochs["overhead"] = epochs["overhead_flops"] / epochs["samples"]
    return epochs.groupby("trial", observed=True).agg(
        value=("test_metric", "last"),
        dense=("dense", "mean"),
        paper=("paper", "mean"),
        required=("required", "mean"),
        executed=("executed", "mean"),
        overhead=("overhead", "mean"),
        paper_dense=("paper", "first"),  # everything trains in epoch 0
        seconds_train=("seconds_train", "sum"),
        seconds_decide=("seconds_equilibrium", "sum"),
    )


def _methods(done: pd.DataFrame, per_trial: pd.DataFrame, timed: bool) -> list[MethodRow]:
    joined = done.join(per_trial, on="trial").sort_values("seed")
    joined["kind"] = [json.loads(parameters)["kind"] for parameters in joined["parameters"]]
    baseline = joined[joined["kind"] == "baseline"].groupby("seed")["value"].mean()
    groups = [rows for _, rows in joined.groupby(["method", "parameters"])]
    groups.sort(key=lambda rows: (list(KINDS).index(rows["kind"].iloc[0]), rows["method"].iloc[0]))
    return [_method(rows, _label(rows, joined), baseline, timed) for rows in groups]


def _label(rows: pd.DataFrame, everything: pd.DataFrame) -> str:
    """The method's name, with what tells it from others of that name."""
    name, mine = rows["method"].iloc[0], json.loads(rows["parameters"].iloc[0])
    namesakes = everything[everything["method"] == name]["parameters"].unique()
    others = [json.loads(parameters) for parameters in namesakes]
    differing = [key for key in mine if any(other.get(key) != mine[key] for other in others)]
    unnamed = mine.get("gradient") == "cut" and "cut" not in name and "gradient" not in differing
    cut = ["gradient=cut"] if unnamed else []
    return " ".join([name, *(f"{key}={mine[key]}" for key in differing), *cut])


def _method(rows: pd.DataFrame, label: str, baseline: "pd.Series[float]", timed: bool) -> MethodRow:
    parameters = json.loads(rows["parameters"].iloc[0])
    columns = ["value", "dense", "paper", "required", "executed", "overhead", "paper_dense"]
    means = rows[columns].mean()
    difference = (rows.set_index("seed")["value"] - baseline).dropna()
    plain = parameters["kind"] == "baseline"
    return MethodRow(
        method=rows["method"].iloc[0],
        label=label,
        parameters=parameters,
        n=len(rows),
        seeds=[int(seed) for seed in rows["seed"]],
        metric_mean=float(means["value"]),
        metric_std=float(rows["value"].std(ddof=1)) if len(rows) > 1 else None,
        difference=None if plain or difference.empty else float(difference.mean()),
        dense=float(means["dense"]),
        paper=float(means["paper"]),
        paper_share=float(means["paper"] / means["paper_dense"]),
        required=float(means["required"]),
        required_share=float(means["required"] / means["dense"]),
        executed=float(means["executed"]),
        executed_share=float(means["executed"] / means["dense"]),
        overhead=float(means["overhead"]),
        overhead_share=float(means["overhead"] / means["dense"]),
        saved=float(1 - (means["executed"] + means["overhead"]) / means["dense"]),
        saved_paper=float(1 - means["paper"] / means["paper_dense"]),
        seconds_train=float(rows["seconds_train"].mean()) if timed else None,
        seconds_decide=float(rows["seconds_decide"].mean()) if timed else None,
    )
