"""The curves of sweeps.

A curve goes through methods of a group that differ in a number, or through groups that differ in
one condition.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from harness.report.method_row import MethodRow
from harness.report.model import GroupTable
from harness.suite.sweep import Point, point_label


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One method at one value; `x`: the value, or its position among values that are no numbers."""

    x: float
    row: MethodRow


Sweep = list[tuple[Point, GroupTable]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What a figure of a sweep shows: a line for each method, of one `family` or of all.

    `group`: the section in which it stands; `first`: the first group that it shows; `ticks`: the
    values that are no numbers; `baseline`: the metric of the baseline that all share; `scale`: of
    the axis, linear below `threshold` where it is "symlog".
    """

    suite: str
    group: str
    first: str
    family: str
    metric: str
    parameter: str
    lines: dict[str, list[CurvePoint]]
    ticks: list[str] | None = None
    baseline: float | None = None
    scale: str = "linear"
    threshold: float = 1.0


def curves(tables: list[GroupTable]) -> Iterator[Curve]:
    """All curves that there are in these groups."""
    for table in tables:
        yield from _within(table)
    for swept in every_sweep(tables):
        yield from _across(swept)


def _within(table: GroupTable) -> Iterator[Curve]:
    families: dict[str, list[MethodRow]] = {}
    for row in filter(lambda row: row.n, table.methods):
        families.setdefault(row.method.partition(" ")[0], []).append(row)
    for family, rows in families.items():
        for parameter in _swept([row.parameters for row in rows]):
            lines = _lines(family, rows, parameter)
            if all(len(points) > 1 for points in lines.values()):
                yield _curve(table, table.group, parameter, lines, family=family)


def _swept(parameters: list[dict[str, Any]]) -> list[str]:
    return [
        key
        for key in parameters[0]
        if all(is_number(p.get(key)) for p in parameters) and len({p[key] for p in parameters}) > 1
    ]


def is_number(value: Any) -> bool:
    """Whether an axis can have the value in its place; True and False are words."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _lines(family: str, rows: list[MethodRow], parameter: str) -> dict[str, list[CurvePoint]]:
    """One for each choice of the other parameters."""
    lines: dict[str, list[CurvePoint]] = {}
    others = [
        key
        for key in rows[0].parameters
        if key != parameter and len({str(row.parameters.get(key)) for row in rows}) > 1
    ]
    for row in sorted(rows, key=lambda row: float(row.parameters[parameter])):
        label = " ".join([family, *(f"{key}={row.parameters[key]}" for key in others)])
        lines.setdefault(label, []).append(CurvePoint(float(row.parameters[parameter]), row))
    return lines


def every_sweep(tables: list[GroupTable]) -> Iterator[Sweep]:
    """The sweeps of all suites that these groups are of."""
    for _, groups in groupby(tables, key=lambda table: table.suite):
        yield from sweeps(list(groups))


def sweeps(tables: list[GroupTable]) -> Iterator[Sweep]:
    """For each sweep the groups of one suite that differ in its axes, and in nothing else."""
    alike: dict[tuple[Any, ...], Sweep] = {}
    for table in tables:
        for point in table.axes if any(row.n for row in table.methods) else []:
            alike.setdefault(_rest(table, point), []).append((point, table))
    yield from (found for found in alike.values() if len(found) > 1)


def _rest(table: GroupTable, point: Point) -> tuple[Any, ...]:
    """The axes of the point, and the conditions beside them that set the group apart."""
    data = ("data", "data.fingerprint") if any(path.startswith("data.") for path in point) else ()
    beside = {
        path: str(value)
        for path, value in table.apart.items()
        if path not in data and not any(f"{path}.".startswith(f"{axis}.") for axis in point)
    }
    return (*point, *sorted(beside.items()))


def sweep_of(sweep: Sweep) -> str:
    """The name of the section for all points of a sweep, unlike that of any group."""
    point, table = sweep[0]
    return "-".join([table.suite, table.group[:6], *point])


def _across(sweep: Sweep) -> Iterator[Curve]:
    """A curve for each axis of a sweep over experiments."""
    for axis in sweep[0][0]:
        values = list(dict.fromkeys(point[axis] for point, _ in sweep))
        numeric = all(map(is_number, values))
        positions = {value: value if numeric else position for position, value in enumerate(values)}
        lines: dict[str, list[CurvePoint]] = {}
        for point, table in sorted(sweep, key=lambda pair: float(positions[pair[0][axis]])):
            others = {path: value for path, value in point.items() if path != axis}
            for row in filter(lambda row: row.n, table.methods):
                label = " ".join(filter(None, [row.label, point_label(others)]))
                lines.setdefault(label, []).append(CurvePoint(float(positions[point[axis]]), row))
        if len(values) > 1:
            ticks = None if numeric else [str(value).replace(" ", "\n") for value in values]
            yield _curve(sweep[0][1], sweep_of(sweep), axis, lines, ticks)


def _curve(
    table: GroupTable,
    group: str,
    parameter: str,
    lines: dict[str, list[CurvePoint]],
    ticks: list[str] | None = None,
    family: str = "",
) -> Curve:
    at = [point.x for points in lines.values() for point in points]
    positive = [x for x in at if x > 0]
    wide = ticks is None and bool(positive) and max(positive) >= 20 * min(positive)
    scale = "linear" if not wide else "log" if min(at) > 0 else "symlog"
    plain = next((row for row in table.methods if row.plain and row.n), None)
    return Curve(
        suite=table.suite,
        group=group,
        first=table.group,
        family=family,
        metric=table.metric,
        parameter=parameter,
        lines=lines,
        ticks=ticks,
        baseline=plain.quality.metric_mean if family and plain is not None else None,
        scale=scale,
        threshold=min(positive, default=1.0),
    )
