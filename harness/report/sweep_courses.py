"""Figures of a sweep over what is no number, such as the optimizer: all its points, by epoch."""

from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from harness.report.curves import Sweep, is_number, sweep_of
from harness.report.model import GroupTable, Report
from harness.report.phases import drops, follows_loss, with_labels
from harness.report.style import (
    BASELINE,
    INK,
    LINES,
    MARKERS,
    WIDTH,
    Look,
    Picture,
    columns_of,
    look_closer,
    looks,
    plain_name,
)
from harness.suite.sweep import point_label

POINTS = len(LINES)  # more can't be told apart
MOST = 12  # lines in a figure, or a baseline and one method at each point
MARKS = 8  # along a line
LONGEST = 70  # characters of a line of the legend


@dataclass(frozen=True, slots=True, kw_only=True)
class _Course:
    """A method at a point, the sweep's `place`-th; `line`: how the lines of that point look.

    `spread`: by epoch "mean", "min" and "max" over seeds of "updated" and of "test_metric".
    """

    method: str
    point: str
    place: int
    colour: Any
    line: dict[str, Any]
    freezes: bool
    spread: pd.DataFrame


def course_pictures(sweep: Sweep, report: Report) -> Iterator[Picture]:
    """Neurons updated, and the metric, by epoch, with a line for each method at each point.

    None of a sweep over numbers alone, which has a curve against them; none of neurons where no
    method freezes any.
    """
    points = {table.group: (point_label(point), table) for point, table in sweep}
    numbers = all(is_number(value) for point, _ in sweep for value in point.values())
    if numbers or len(points) < 2:
        return
    shown = list(points.values())[:POINTS]
    rows = [_rows(table, report) for _, table in shown]
    methods = {row.label: row.plain for _, table in shown for row in table.methods if row.n}
    named = list(methods)[: max(2, MOST // len(shown))]
    look = looks(named, {label for label, plain in methods.items() if plain})
    courses = list(_courses(shown, rows, look))
    falls = {_falls(table, mine) for (_, table), mine in zip(shown, rows, strict=True)}
    at = falls.pop() if len(falls) == 1 else ()
    said = "; dotted: drops of the learning rate." if at else "."
    said += _some(len(shown), len(points), "points") + _some(len(named), len(methods), "methods")
    freezing = [course for course in courses if course.freezes]
    if freezing:
        figure, axis = _drawn(freezing, "updated", at)
        axis.set_ylim(-0.03, 1.05)
        axis.set_ylabel("neurons updated")
        yield _picture(sweep, "neurons", "neurons updated", said, figure)
    metric = sweep[0][1].metric
    figure, axis = _drawn(courses, "test_metric", at)
    axis.set_ylabel(metric)
    look_closer(axis, pd.concat(rows))
    yield _picture(sweep, "metric", metric, said, figure)


def _rows(table: GroupTable, report: Report) -> pd.DataFrame:
    """The epochs of a group's finished trials."""
    epochs = report.results.epochs
    mine = with_labels(report.done[table.group], epochs[epochs["group"] == table.group])
    return mine.assign(updated=1 - mine["frozen"])


def _courses(
    shown: list[tuple[str, GroupTable]], rows: list[pd.DataFrame], look: dict[str, Look]
) -> Iterator[_Course]:
    """Of the methods that have a look; `rows`: of each point."""
    for place, ((point, table), mine) in enumerate(zip(shown, rows, strict=True)):
        for row in table.methods:
            if row.n and row.label in look:
                yield _Course(
                    method=row.label,
                    point=point,
                    place=place,
                    colour=look[row.label].colour,
                    line=_line(place, len(shown)),
                    freezes=not (row.plain or row.prunes),
                    spread=_spread(mine[mine["label"] == row.label]),
                )


def _spread(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.groupby("epoch")[["updated", "test_metric"]].agg(["mean", "min", "max"])


def _falls(table: GroupTable, rows: pd.DataFrame) -> tuple[int, ...]:
    """Where the learning rate drops for all trials of a group."""
    alike = not follows_loss(table.recipe)
    return tuple(drops(list(rows.groupby("epoch")["lr"].first()))) if alike else ()


def _some(shown: int, count: int, of: str) -> str:
    return f" The first {shown} of {count} {of}." if shown < count else ""


def _drawn(courses: list[_Course], column: str, at: tuple[int, ...]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 4.2))
    axis: Axes = figure.subplots()
    for course in courses:
        part, place = course.spread[column], course.place
        every = -(-len(part) // MARKS)
        axis.plot(
            part.index,
            part["mean"],
            label=f"{course.method} {course.point}",
            color=course.colour,
            markevery=(place * every // POINTS, every),
            **course.line,
        )
        low, high = part["min"], part["max"]
        axis.fill_between(part.index, low, high, color=course.colour, alpha=0.12, linewidth=0)
    for epoch in at:
        axis.axvline(epoch - 0.5, color=BASELINE, linewidth=0.8, linestyle=":")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axis.set_xlabel("epoch")
    _legend(figure, courses)
    return figure, axis


def _line(place: int, places: int) -> dict[str, Any]:
    """How the lines of a point look; fainter from point to point, as a course that jumps from epoch
    to epoch hides its dashes.
    """
    faint = 1 - 0.45 * place / max(1, places - 1)
    return {"linestyle": LINES[place], "marker": MARKERS[place], "markersize": 4, "alpha": faint}


def _legend(figure: Figure, courses: list[_Course]) -> None:
    """The methods' colours and the points' lines, beside each other where there is room."""
    colours = {course.method: Line2D([], [], color=course.colour) for course in courses}
    lines = {
        fill(course.point, LONGEST): Line2D([], [], color=INK, **course.line) for course in courses
    }
    empty = [("", Line2D([], [], linestyle=""))] * abs(len(colours) - len(lines))
    columns = min(2, columns_of([*colours, *lines]))
    first, second = list(colours.items()), list(lines.items())
    if columns == 2 and len(first) < len(second):
        first += empty
    elif columns == 2:
        second += empty
    labels, handles = zip(*first, *second, strict=True)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=3)


def _picture(sweep: Sweep, kind: str, what: str, said: str, figure: Figure) -> Picture:
    point, first = sweep[0]
    axes = ", ".join(path.rpartition(".")[2] for path in point)
    words = [first.suite, *point, first.group[:6]]
    return Picture(
        name=f"{plain_name(' '.join(words))}-{kind}",
        group=sweep_of(sweep),
        caption=f"{first.suite}: {what} by epoch at the points of {axes}, with a colour for "
        f"each method; means over seeds, bands from the lowest to the highest{said}",
        figure=figure,
    )
