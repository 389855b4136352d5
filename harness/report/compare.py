"""`neqbench compare A B`: what changed from one run to another, by method and by trial."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import pandas as pd

from harness.errors import UserError
from harness.report.gates import MORE_IS_BETTER, PERCENT, POINTS, REMOVED, Gate, missed
from harness.report.groups import conditions
from harness.report.intervals import Interval, difference, direction, ratio
from harness.report.model import GroupTable, load_report, plain
from harness.report.notes import commits, versions
from harness.report.per_trial import by_seed, devices, seconds_withheld
from harness.storage.store import Store

COLUMNS = {name: name for name in (*POINTS, *PERCENT)} | {"metric": "value"}  # of `per_trial`
COLUMNS |= {name: f"removed_{name}" for name in REMOVED}
CALLED = {"data.fingerprint": "other data:", "numerics": "other code: numerics"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How one quantity changed from A to B.

    `change` is in percentage points, of `seconds`, `memory` and `energy` in per cent, and has the
    95 % interval of the mean over seeds; in per cent, too, what is left after removal:
    `parameters`, `forward` (FLOPs) and `latency` (of a batch, over the dense model's). `mark`:
    "same" (equal in every pair), "better", "worse" or "unclear". `lacking`: seeds of which it is
    known in A, and not in B.
    """

    quantity: str
    a: float | None
    b: float | None
    change: float | None
    low: float | None
    high: float | None
    n: int
    mark: str
    lacking: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One method of a suite in both runs (`seed` is None), or one of its trials.

    `why`: why they are not comparable, where there are no changes. `new`: whether it is only in B;
    `prunes`: whether it leaves a smaller model; `lacking`: seeds of A that are not finished in B.
    """

    suite: str
    point: str
    method: str
    seed: int | None = None
    why: str = ""
    new: bool = False
    prunes: bool = False
    lacking: list[int] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """What changed from run A to run B, by method and by trial.

    `metrics`: by suite, what its metric is called; `missed`: the gates that were missed, each with
    where; one that can't be checked is missed, too.
    """

    a: str
    b: str
    metrics: dict[str, str]
    methods: list[Compared]
    trials: list[Compared]
    notes: list[str]
    missed: list[str]

    def to_json(self) -> dict[str, Any]:
        """The documented JSON, as plain values."""
        found: dict[str, Any] = plain(asdict(self))
        return found


def compare(a: list[Store], b: list[Store], bounds: list[Gate]) -> RunComparison:
    """Compare the results in the stores `a` with those in `b`, under the gates `bounds`.

    Raises UserError where no trial is finished in either.
    """
    sides = [_side(found) for found in (a, b)]
    names = [", ".join(store.location.uri for store in found) for found in (a, b)]
    methods, trials = [], []
    for key in dict.fromkeys(key for side in sides for key in side.parts):
        for first, second in _pairs(*(side.parts.get(key, {}) for side in sides)):
            method, of_it = _compared(first, second, names, new=key not in sides[0].asked)
            methods.append(method)
            trials += of_it
    if not methods:
        raise UserError(
            f"{' and '.join(names)}: no trial is finished in either; finish some with "
            "`neqbench run`"
        )
    return RunComparison(
        a=names[0],
        b=names[1],
        metrics={suite: m for side in sides for suite, m in side.metrics.items()},
        methods=methods,
        trials=trials,
        notes=_notes(sides, methods),
        missed=missed(bounds, methods),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The finished trials of one method of one group, with one choice of its parameters; `values`:
    by quantity and seed; `repeats`: seeds that gave the numbers of another.
    """

    suite: str
    group: str
    point: str
    method: str
    parameters: str
    conditions: dict[str, Any]
    values: dict[str, dict[int, float]]
    repeats: set[int]
    devices: set[str]
    untimed: bool
    prunes: bool
    removed_on: set[str]  # where latencies were measured
    removed_busy: bool


Key = tuple[str, str]  # suite and method


@dataclass(frozen=True, slots=True)
class _Side:
    """One run, and what it lacks."""

    parts: dict[Key, dict[tuple[str, str], _Part]]  # by group and parameters
    asked: set[Key]
    trials: pd.DataFrame
    metrics: dict[str, str]
    lacking: list[str]


def _side(found: list[Store]) -> _Side:
    report = load_report(found)
    parts: dict[Key, dict[tuple[str, str], _Part]] = {}
    lacking = []
    for table in report.groups:
        of = " ".join(filter(None, [table.suite, table.point]))
        lacking += [f"{of} {s}" for s in (*table.missing, *table.unfinished, *table.failed)]
        done = report.done[table.group]
        for (method, parameters), rows in done.groupby(["method", "parameters"], sort=False):
            part = _part(table, str(method), str(parameters), rows)
            parts.setdefault((table.suite, part.method), {})[table.group, part.parameters] = part
    for group in report.not_begun:
        lacking += [f"{group.suite} {group.point} {line}" for line in group.missing]
    trials = report.results.trials
    asked = set(zip(trials["suite"], trials["method"], strict=True))
    asked |= {(p.suite, method) for p in report.results.requests for _, method, _ in p.trials}
    return _Side(
        parts, asked, trials, dict(zip(trials["suite"], trials["metric"], strict=True)), lacking
    )


def _part(table: GroupTable, method: str, parameters: str, rows: pd.DataFrame) -> _Part:
    removed = rows[rows["removed_latency"].notna()]
    return _Part(
        suite=table.suite,
        group=table.group,
        point=table.point,
        method=method,
        parameters=parameters,
        conditions=conditions(rows.iloc[0].to_dict()) | json.loads(parameters),
        values={name: by_seed(rows, column) for name, column in COLUMNS.items()},
        repeats=set(rows.loc[rows["repeats"], "seed"].astype(int)),
        devices=devices(rows),
        untimed=seconds_withheld(rows) is not None,
        prunes=bool(rows["size"].notna().any()),
        removed_on=set(removed["removed_on"]),
        removed_busy=bool(removed["removed_busy"].any()),
    )


def _pairs(
    a: dict[tuple[str, str], _Part], b: dict[tuple[str, str], _Part]
) -> Iterator[tuple[_Part | None, _Part | None]]:
    """Those of the same experiment, then those of the same point of a sweep, then the others."""
    for identity in a:
        if identity in b:
            yield a[identity], b[identity]
    left = [part for identity, part in a.items() if identity not in b]
    right = [part for identity, part in b.items() if identity not in a]
    for part in left:
        other = next((p for p in right if p.point == part.point), None)
        if other is not None:
            right.remove(other)
        yield part, other
    for part in right:
        yield None, part


def _compared(
    first: _Part | None, second: _Part | None, names: list[str], *, new: bool
) -> tuple[Compared, list[Compared]]:
    part = first or second
    assert part is not None
    of: dict[str, Any] = {
        "suite": part.suite,
        "point": part.point,
        "method": part.method,
        "new": first is None and new,
        "prunes": any(side is not None and side.prunes for side in (first, second)),
    }
    if first is None or second is None:
        why = f"only in {names[0] if second is None else names[1]}"
        return Compared(**of, why=why), []
    why = _unlike(first, second)
    if why:
        return Compared(**of, why=why), []
    before, after = set(first.values["metric"]), set(second.values["metric"])
    quantities = [*POINTS, *_measurements(first, second)]
    again = first.repeats | second.repeats  # each run counts once, whatever its seeds
    runs = [{q: _without(p.values[q], again) for q in quantities} for p in (first, second)]
    found = [_change(runs[0][q], runs[1][q], q) for q in quantities]
    changes = [change for change in found if change is not None]
    return Compared(**of, lacking=sorted(before - after), changes=changes), [
        Compared(**of, seed=seed, changes=_of_seed(first, second, seed, quantities))
        for seed in sorted(before & after)
    ]


def _without(values: dict[int, float], seeds: set[int]) -> dict[int, float]:
    return {seed: value for seed, value in values.items() if seed not in seeds}


def _of_seed(first: _Part, second: _Part, seed: int, quantities: list[str]) -> list[Change]:
    found = []
    for quantity in quantities:
        sides = [p.values[quantity] for p in (first, second)]
        if all(seed in side for side in sides):
            change = _change({seed: sides[0][seed]}, {seed: sides[1][seed]}, quantity)
            found += [] if change is None else [change]
    return found


def _unlike(a: _Part, b: _Part) -> str:
    """Why they are not comparable: other data, another recipe, other code; empty where they are."""
    if (a.group, a.parameters) == (b.group, b.parameters):
        return ""
    mine, other = a.conditions, b.conditions
    paths = [p for p in dict.fromkeys([*mine, *other]) if mine.get(p) != other.get(p)]
    paths.sort(key=lambda path: path not in CALLED)
    differing = [f"{CALLED.get(p, p)} {mine.get(p)} | {other.get(p)}" for p in paths]
    return ", ".join(differing) or "other code of the suite, or other starting weights"


def _measurements(a: _Part, b: _Part) -> list[str]:
    """What may be compared in per cent: nothing of clocks and counters where devices differ, and no
    times where they are no measurement.
    """
    alike = len(a.devices | b.devices) == 1
    barred = {
        "seconds": not alike or a.untimed or b.untimed,
        "memory": not alike,
        "energy": not alike,
        "latency": len(a.removed_on | b.removed_on) != 1 or a.removed_busy or b.removed_busy,
    }
    return [name for name in PERCENT if not barred.get(name)]


def _change(before: dict[int, float], after: dict[int, float], quantity: str) -> Change | None:
    relative = quantity in PERCENT
    found = (ratio if relative else difference)(after, before)
    if found is None:
        return None
    scaled, lacking = _scaled(found, relative=relative), sorted(before.keys() - after.keys())
    if found.paired:
        seeds = before.keys() & after.keys()
        before, after = ({s: side[s] for s in seeds} for side in (before, after))
    return Change(
        quantity=quantity,
        a=fmean(before.values()),
        b=fmean(after.values()),
        change=scaled.mean,
        low=scaled.low,
        high=scaled.high,
        n=found.n,
        mark="same" if before == after else _mark(scaled, quantity),
        lacking=lacking,
    )


def _scaled(found: Interval, *, relative: bool) -> Interval:
    """In points or per cent."""
    ends = (found.mean, found.low, found.high)
    mean, low, high = (
        None if end is None else 100 * (end - 1 if relative else end) for end in ends
    )
    assert mean is not None
    return Interval(mean, low, high, found.std, found.n, found.paired)


def _mark(change: Interval, quantity: str) -> str:
    towards = direction(change, 0.0)
    if towards in (None, "unclear"):
        return "unclear"
    return "better" if (towards == "above") == MORE_IS_BETTER[quantity] else "worse"


def _notes(sides: list[_Side], methods: list[Compared]) -> list[str]:
    notes = [f"{name}: {s}" for name, side in zip("AB", sides, strict=True) for s in side.lacking]
    if any(change.quantity == "seconds" for method in methods for change in method.changes):
        notes.append("A and B ran at different times: seconds compare the machine's moods, too.")
    elif any(method.changes for method in methods):
        notes.append(
            "Seconds are not compared: trials shared a device, other processes were busy, "
            "compiling was among them, or devices differ."
        )
    known = {change.quantity for method in methods for change in method.changes}
    if "parameters" in known and "latency" not in known:
        notes.append(
            "Latencies are not compared: none was measured, the device had other work, or devices "
            "differ."
        )
    a, b = (", ".join(commits(side.trials)) for side in sides)
    if a != b:
        notes.append(f"Code: A {a}; B {b}.")
    both = pd.concat([side.trials for side in sides])
    return notes + versions(both)
