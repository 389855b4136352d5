"""The report's figures: courses over epochs, what is kept against what is saved, sweeps."""

import math
from collections.abc import Callable, Iterator

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from harness.report.curves import curves, every_sweep
from harness.report.group_figures import group_pictures
from harness.report.layers import layer_pictures
from harness.report.method_row import MethodRow
from harness.report.model import GroupTable, Report
from harness.report.phases import follows_loss, with_labels
from harness.report.pruning_figures import pruning_pictures
from harness.report.style import (
    BASELINE,
    WIDTH,
    GroupLabel,
    Look,
    Picture,
    from_zero,
    legend,
    look_closer,
    looks,
    plain_name,
    style,
)
from harness.report.sweep_courses import course_pictures
from harness.report.sweep_figures import sweep_picture
from harness.report.words import flops_unit

DRAWN, DETAILED = 12, 4  # groups with figures, and with those of single layers: more take long


def pictures(report: Report) -> Iterator[Picture]:
    """The figures of the first groups of a report, then those of all sweeps."""
    with mpl.rc_context(style()):
        shown = [table for table in report.groups if _shown(table)]
        for position, table in enumerate(shown[:DRAWN]):
            yield from _of_group(table, report, detailed=position < DETAILED)
        for sweep in every_sweep(report.groups):
            yield from course_pictures(sweep, report)
        for curve in curves(report.groups):
            yield sweep_picture(curve)


def _of_group(table: GroupTable, report: Report, *, detailed: bool) -> Iterator[Picture]:
    epochs = report.results.epochs
    rows, done = epochs[epochs["group"] == table.group], report.done[table.group]
    of = GroupLabel(table.group, _name(table), " ".join(filter(None, [table.suite, table.point])))
    yield _courses(table, done, rows, of)
    if _traded(table):
        yield _tradeoff(table, of)
    if _left(table):
        yield _sparsity(table, of)
    if _timed(table):
        yield _latency(table, of)
    if any(row.measured.seconds_train is not None for row in _shown(table)):
        yield _times(table, done, of)
    labels = [row.label for row in _shown(table)]
    if detailed:
        yield from layer_pictures(done, labels, report.results, of)
    if detailed and table.grouped:
        yield from group_pictures(done, _looks(_shown(table)), report.results, of)
    if detailed and (_left(table) or any(row.minima.sharpness_n for row in table.methods)):
        yield from pruning_pictures(done, _looks(table.methods), report.results, of)


def _name(table: GroupTable) -> str:
    words = [table.suite, table.point, table.group[:6]]
    return plain_name(" ".join(word for word in words if word))


def _looks(rows: list[MethodRow]) -> dict[str, Look]:
    return looks([row.label for row in rows], {row.label for row in rows if row.plain})


def _shown(table: GroupTable) -> list[MethodRow]:
    """Those of which a trial is finished."""
    return [row for row in table.methods if row.n]


def _courses(
    table: GroupTable, done: pd.DataFrame, epochs: pd.DataFrame, of: GroupLabel
) -> Picture:
    """Neurons updated, FLOPs, metric and learning rate, epoch by epoch."""
    unit, scale = flops_unit(table.dense)
    joined = with_labels(done, epochs)
    joined = joined.assign(
        updated=1 - joined["frozen"],
        flops=joined["backward_flops_executed"] / joined["samples"] / scale,
    )
    figure = Figure(figsize=(WIDTH, 7.0))
    axes = figure.subplots(4, 1, sharex=True, height_ratios=[3, 3, 3, 1.6])
    panels = ("updated", "flops", "test_metric")
    look = _looks(table.methods)
    spread = joined.groupby(["label", "epoch"])[list(panels)].agg(["mean", "min", "max"])
    for row in _shown(table):
        course = spread.loc[row.label]
        mine = look[row.label]
        for axis, panel in zip(axes, panels, strict=False):
            part = course[panel]
            axis.plot(
                part.index,
                part["mean"],
                label=row.label,
                color=mine.colour,
                linestyle=mine.line,
                marker=mine.marker if table.epochs == 1 else None,
            )
            axis.fill_between(part.index, part["min"], part["max"], color=mine.colour, alpha=0.12)
    _rates(axes[3], table, joined)
    for axis, label in zip(
        axes,
        (
            "neurons updated",
            f"backward executed\n{unit}FLOPs per sample",
            table.metric,
            f"learning rate\n{table.recipe['optimizer']['name']}",
        ),
        strict=True,
    ):
        axis.set_ylabel(label)
    for axis in (axes[0], axes[2]):
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes[0].set_ylim(-0.03, 1.05)
    from_zero(axes[1], spread["flops", "max"])
    look_closer(axes[2], joined)
    axes[3].set_xlabel("epoch")
    legend(figure, axes[0])
    figure.align_ylabels()
    caption = (
        f"neurons updated, backward FLOPs, {table.metric} and learning rate by epoch; "
        "means over seeds, bands from the lowest to the highest."
    )
    return of.picture("epochs", caption, figure)


def _rates(axis: Axes, table: GroupTable, joined: pd.DataFrame) -> None:
    """The learning rate of all; or the mean one of each method, where it is each trial's own."""
    if follows_loss(table.recipe):
        look = _looks(table.methods)
        lr = joined.groupby(["label", "epoch"])["lr"].mean()
        for row in _shown(table):
            mine, course = look[row.label], lr.loc[row.label]
            axis.step(course.index, course, where="post", color=mine.colour, linestyle=mine.line)
    else:
        lr = joined.groupby("epoch")["lr"].first()
        axis.step(lr.index, lr, where="post", color=BASELINE)
    if (lr > 0).all() and lr.max() > 5 * lr.min():
        axis.set_yscale("log")


def _traded(table: GroupTable) -> list[MethodRow]:
    """Those to compare by what they save: no pruners, and no baseline that is alone with them."""
    if not any(row.prunes for row in table.methods):
        return _shown(table)
    rows = [row for row in _shown(table) if math.isfinite(row.savings.saved)]
    return [] if all(row.plain for row in rows) else rows


def _tradeoff(table: GroupTable, of: GroupLabel) -> Picture:
    """What is kept against what is saved."""
    figure = Figure(figsize=(WIDTH, 3.8))
    axis: Axes = figure.subplots()
    margin = _marks(axis, table, [(row, 100 * row.savings.saved) for row in _traded(table)])
    axis.set_xlabel("backward FLOPs saved, deciding counted in, %")
    axis.set_ylabel(f"{table.metric}, %")
    legend(figure, axis)
    caption = f"{table.metric} against what is saved; bars are 95 % intervals{margin}."
    return of.picture("tradeoff", caption, figure)


def _left(table: GroupTable) -> list[tuple[MethodRow, float]]:
    """Those that prune, with the parameters that they leave, in per cent."""
    found = [(row, 100 * (row.pruned.parameters_left_share or 0)) for row in _shown(table)]
    return [(row, left) for row, left in found if left > 0]


def _sparsity(table: GroupTable, of: GroupLabel) -> Picture:
    """What is kept against what pruning leaves."""
    figure = Figure(figsize=(WIDTH, 3.8))
    axis: Axes = figure.subplots()
    marks = _left(table)
    margin = _marks(axis, table, marks, name=_without_sparsity)
    axis.set_xscale("log")
    places = [left for _, left in marks]
    axis.set_xlim(min(places) / 3, 1.25 * max(places))  # wide enough for two labels, mostly
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("parameters left, %")
    axis.set_ylabel(f"{table.metric}, %")
    legend(figure, axis)
    line = "; line: the baseline's" if margin else ""
    caption = (
        f"{table.metric} against the parameters that pruning leaves; bars are 95 % intervals"
        f"{line}{margin}."
    )
    return of.picture("sparsity", caption, figure)


def _timed(table: GroupTable) -> list[tuple[MethodRow, float]]:
    """Those whose smaller model was timed, with what of the dense one's time it takes."""
    found = [(row, row.removed.latency_batch) for row in _shown(table)]
    return [(row, latency) for row, latency in found if latency is not None]


def _latency(table: GroupTable, of: GroupLabel) -> Picture:
    """What is kept against the time that a forward takes once dead neurons are removed."""
    figure = Figure(figsize=(WIDTH, 3.8))
    axis: Axes = figure.subplots()
    marks, look = _timed(table), _looks(table.methods)
    margin = _marks(axis, table, marks)
    for row, _ in marks:
        low, high = row.removed.latency_batch_low, row.removed.latency_batch_high
        if low is not None and high is not None:
            at = 2 * [100 * row.quality.metric_mean]
            axis.plot([low, high], at, color=look[row.label].colour, linewidth=1)
    axis.axvline(1, color=BASELINE, linewidth=0.8)
    size = max(row.removed.latency_batch_size or 0 for row, _ in marks)
    axis.set_xlabel(f"latency of {size} samples, × the dense model's")
    axis.set_ylabel(f"{table.metric}, %")
    legend(figure, axis)
    alone = any(row.removed.latency_n == 1 for row, _ in marks)
    single = ", across of one seed the middle half of its pairs" if alone else ""
    lines = "lines: the dense model's latency" + (", the baseline's metric" if margin else "")
    caption = (
        f"{table.metric} against the latency of a forward once dead neurons are removed; bars are "
        f"95 % intervals{single}; {lines}{margin}."
    )
    return of.picture("latency", caption, figure)


def _without_sparsity(row: MethodRow) -> str:
    """What a method is called at whatever sparsity: these make one line."""
    return " ".join(word for word in row.label.split(" ") if not word.startswith("sparsity="))


def _by_label(row: MethodRow) -> str:
    return row.label


def _marks(
    axis: Axes,
    table: GroupTable,
    rows: list[tuple[MethodRow, float]],
    name: Callable[[MethodRow], str] = _by_label,
) -> str:
    """Draw the metric of each row at its place, and the baseline's; what to say of the latter.

    Rows of one `name` look alike, and a line joins them.
    """
    plain = {name(row) for row in table.methods if row.plain}
    look = looks(list(dict.fromkeys(map(name, table.methods))), plain)
    lines: dict[str, list[tuple[float, float]]] = {}
    for row, at in rows:
        label = name(row)
        again = label in lines
        lines.setdefault(label, []).append((at, 100 * row.quality.metric_mean))
        low = row.quality.metric_mean if row.quality.metric_low is None else row.quality.metric_low
        high = (
            row.quality.metric_mean if row.quality.metric_high is None else row.quality.metric_high
        )
        axis.errorbar(
            at,
            100 * row.quality.metric_mean,
            yerr=[
                [100 * (row.quality.metric_mean - low)],
                [100 * (high - row.quality.metric_mean)],
            ],
            fmt=look[label].marker,
            color=look[label].colour,
            capsize=3,
            label="" if again else label,
        )
    for label, points in lines.items():
        if len(points) > 1:
            axis.plot(*zip(*sorted(points), strict=True), color=look[label].colour, linewidth=0.8)
    baseline = next((row for row in _shown(table) if row.plain), None)
    if baseline is None:
        return ""
    level = 100 * baseline.quality.metric_mean
    axis.axhline(level, color=BASELINE, linewidth=0.8)
    axis.axhline(level - table.margin, color=BASELINE, linewidth=0.8, linestyle=":")
    return f"; dotted: the baseline's less the margin of {table.margin:g} points"


def _times(table: GroupTable, done: pd.DataFrame, of: GroupLabel) -> Picture:
    """What the clock says of what the count says."""
    figure = Figure(figsize=(WIDTH, 3.4))
    axis: Axes = figure.subplots()
    look = _looks(table.methods)
    for row in _shown(table):
        rows = done[done["label"] == row.label]
        axis.scatter(
            100 * (rows["executed"] + rows["overhead"]) / rows["dense"],
            rows["seconds"],
            marker=look[row.label].marker,
            color=look[row.label].colour,
            label=row.label,
            alpha=0.8,
        )
    left = [100 * (1 - row.savings.saved) for row in _shown(table)]
    axis.set_xlim(0, 1.05 * max([100.0, *filter(math.isfinite, left)]))
    from_zero(axis, done["seconds"])
    axis.set_xlabel("backward FLOPs executed, deciding counted in, % of dense")
    axis.set_ylabel("training and deciding, s")
    legend(figure, axis)
    why = table.timing_withheld
    shared = f" No measurement: {why}." if why else ""
    caption = f"seconds against FLOPs, a mark for each trial.{shared}"
    return of.picture("seconds", caption, figure)
