"""The report's numbers, computed once from the stored rows; every form shows these."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from harness.errors import UserError
from harness.report import groups, notes
from harness.report.beside import entropies
from harness.report.grouped import GroupedRow, grouped
from harness.report.method_row import MethodRow
from harness.report.methods import labels, method_rows
from harness.report.noticed import noticed
from harness.report.per_trial import Labels, device_shared, devices, per_trial, seconds_withheld
from harness.report.phases import Phase, phases
from harness.report.pruned_parts import LayerEntropy
from harness.report.published import PaperComparison, against_published
from harness.report.removed import with_removals
from harness.storage.frames import Results, read_results
from harness.storage.requests import Request
from harness.storage.schema import REWRITTEN, reported
from harness.storage.store import Store
from harness.suite.config import MARGIN
from harness.suite.method_specs import KINDS
from harness.suite.sweep import point_label

TEXTS = ("group", "suite", "method", "metric", "title", "data", "versions")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTable:
    """One group: the trials that share recipe, model, data and numerics, and may be compared.

    `point`: of a sweep, which experiment; `axes`: of each sweep that it is in, what was chosen by
    path; `apart`: in what the experiment differs from the suite's other groups here. `synthetic`:
    trained on noise. `margin`: in percentage points, by which verdicts are made. `devices_alike`:
    all trials ran on one kind of device, a CPU with as many threads; `timing_shared`: they shared
    it; `timing_withheld`: why their seconds are no measurement, for that or another reason.
    `missing`, `unfinished` and `failed` name what the rows leave out, `commits` which methods come
    from which code, where that is several, `notes` what a reader has to know.
    """

    suite: str
    group: str
    title: str
    point: str
    axes: list[dict[str, Any]]
    apart: dict[str, Any]
    metric: str
    data: str
    synthetic: bool
    recipe: dict[str, Any]
    epochs: int
    margin: float
    devices: list[str]
    devices_alike: bool
    timing_shared: bool
    timing_withheld: str | None
    dense: float
    paper_dense: float
    methods: list[MethodRow]
    grouped: list[GroupedRow]
    entropies: list[LayerEntropy]
    phases: list[Phase]
    published: list[PaperComparison]
    missing: list[str]
    unfinished: list[str]
    failed: list[str]
    commits: list[str]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """The documented keys of a group."""
        return asdict(self) | {"methods": [row.to_json() for row in self.methods]}


@dataclass(frozen=True, slots=True, kw_only=True)
class NotBegun:
    """A group that runs were asked for, and of which nothing has been begun."""

    suite: str
    group: str
    point: str
    missing: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The tables of all groups, and the rows that they were made of.

    `not_begun`: groups that were asked for and have no trial; `done`: by group, a row for each
    trial that counts (`per_trial`).
    """

    groups: list[GroupTable]
    not_begun: list[NotBegun]
    done: dict[str, pd.DataFrame]
    results: Results

    def to_json(self) -> str:
        """The documented JSON: {"groups": [GroupTable, …], "not_begun": [NotBegun, …]}."""
        value = {
            "groups": [plain(table.to_json()) for table in self.groups],
            "not_begun": [asdict(group) for group in self.not_begun],
        }
        return json.dumps(value, indent=2)


def load_report(found: Iterable[Store], only: set[str] | None = None) -> Report:
    """The report of the results in these stores, or of `only` some groups.

    Raises UserError where nothing is stored, and for rows that make no sense.
    """
    found = list(found)
    results = checked(read_results(found, reported("trials"), reported("epochs")), found)
    trials = results.trials
    chosen = trials if only is None else trials[trials["group"].isin(only)]
    apart = groups.apart(chosen)
    of_groups = results.epochs.groupby("group", observed=True)
    epochs = {str(group): rows for group, rows in of_groups}
    none, keys = results.epochs.iloc[:0], set(chosen["trial"])
    measures, replays = results.measures_of(keys), results.replays_of(keys)
    removals = results.removals_of(keys)
    tables: list[GroupTable] = []
    done: dict[str, pd.DataFrame] = {}
    for name, rows in chosen.groupby("group", sort=False):
        group = str(name)
        mine = epochs.get(group, none)
        requests = [request for request in results.requests if request.group == group]
        state = groups.group_trials(rows, mine, requests)
        pairs = zip(state.done["method"], state.done["parameters"], strict=True)
        called = labels([*pairs, *state.failures])
        done[group] = with_removals(per_trial(state.done, mine, called, measures), removals)
        tables.append(
            _group(
                *(rows, state, done[group], mine, requests, called, apart),
                *(results.twice, measures, replays, removals),
            )
        )
    tables.sort(key=lambda table: table.suite)
    not_begun = [] if only is not None else _not_begun(results)
    return Report(groups=tables, not_begun=not_begun, done=done, results=results)


def _not_begun(results: Results) -> list[NotBegun]:
    begun = set(results.trials["group"])
    waiting: dict[str, list[Request]] = {}
    for request in results.requests:
        if request.group not in begun:
            waiting.setdefault(request.group, []).append(request)
    return [
        NotBegun(
            suite=requests[-1].suite,
            group=group,
            point=point_label(requests[-1].point),
            missing=groups.missing(set(), requests),
        )
        for group, requests in waiting.items()
    ]


def plain(value: Any) -> Any:
    """The value for JSON, which knows no NaN: None in its place."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def checked(results: Results, found: Iterable[Store]) -> Results:
    """The results themselves; raises UserError where there are none, and for a row that no neqbench
    wrote.
    """
    if results.trials.empty:
        where = ", ".join(store.location.uri for store in found)
        raise UserError(f"{where}: no trial has been started yet; start one with `neqbench run`")
    for row in results.trials.to_dict("records"):
        try:
            experiment, parameters = json.loads(row["experiment"]), json.loads(row["parameters"])
            whole = {"recipe", "data", "world_size"} <= set(experiment)
            whole &= {"train_size"} <= set(experiment["data"]) and parameters["kind"] in KINDS
            whole &= row["state"] in ("running", "done", "failed")
            whole &= all(isinstance(row[name], str) for name in TEXTS)
            whole &= isinstance(json.loads(row["versions"]), dict)
            whole &= not pd.isna([row["seed"], row["epochs"], row["epochs_done"]]).any()
        except (ValueError, TypeError, KeyError):
            whole = False
        if not whole:
            path = f"{row['results']}/trials/{row['trial']}.parquet"
            raise UserError(f"{path} is not as a run writes it; {REWRITTEN}")
    return results


def _group(
    trials: pd.DataFrame,
    state: groups.GroupTrials,
    done: pd.DataFrame,
    epochs: pd.DataFrame,
    requests: list[Request],
    called: Labels,
    apart: dict[str, dict[str, Any]],
    twice: dict[str, list[str]],
    measures: pd.DataFrame,
    replays: pd.DataFrame,
    removals: pd.DataFrame,
) -> GroupTable:
    first, group = trials.iloc[0], str(trials["group"].iloc[0])
    request = requests[-1] if requests else Request(group=group, trials=[])
    axes: list[dict[str, Any]] = []
    for point in (each.point for each in requests if each.point):
        axes += [point] if point not in axes else []
    experiment = json.loads(first["experiment"])
    synthetic = bool(experiment["data"].get("synthetic"))
    margin = MARGIN if request.margin is None else request.margin
    alike, withheld = len(devices(state.done)) == 1, seconds_withheld(done)
    told = noticed(done)
    rows = method_rows(
        done,
        state.failures,
        called,
        margin / 100,
        measures,
        replays,
        removals,
        noise=synthetic,
        timed=alike,
        shared=withheld is not None,
    )
    done = done[~done["repeats"]]
    return GroupTable(
        suite=first["suite"],
        group=group,
        title=first["title"],
        point=point_label(axes[-1]) if axes else "",
        axes=axes,
        apart=apart[group],
        metric=first["metric"],
        data=first["data"],
        synthetic=synthetic,
        recipe=experiment["recipe"]
        | {"train_size": experiment["data"]["train_size"], "workers": experiment["world_size"]},
        epochs=int(first["epochs"]),
        margin=margin,
        devices=sorted(trials["gpu"].fillna(trials["cpu"]).dropna().unique()),
        devices_alike=alike,
        timing_shared=device_shared(state.done),
        timing_withheld=withheld,
        dense=float(done["dense"].mean()),
        paper_dense=float(done["paper_dense"].mean()),
        methods=rows,
        grouped=grouped(done, measures),
        entropies=entropies(rows, done, measures),
        phases=phases(done, epochs),
        published=against_published(request.published, done, trials, margin / 100),
        missing=state.missing,
        unfinished=state.unfinished,
        failed=state.failed,
        commits=notes.commits_by_method(trials),
        notes=notes.notes(trials, rows, synthetic, twice, stated=request.margin is not None) + told,
    )
