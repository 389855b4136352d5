"""The figure of a sweep: what is kept, and what is left, against a parameter."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report.curves import Curve, CurvePoint
from harness.report.method_row import MethodRow
from harness.report.style import (
    BASELINE,
    WIDTH,
    Look,
    Picture,
    from_zero,
    legend,
    looks,
    plain_name,
)


def sweep_picture(curve: Curve) -> Picture:
    """Metric and FLOPs against a parameter."""
    figure = Figure(figsize=(WIDTH, 4.8))
    above, below = figure.subplots(2, 1, sharex=True)
    look = looks(list(curve.lines), {n for n, points in curve.lines.items() if points[0].row.plain})
    for position, (label, points) in enumerate(curve.lines.items()):
        _line(above, below, points, label, look[label], curve, position)
    if curve.baseline is not None:
        above.axhline(100 * curve.baseline, color=BASELINE, linestyle="--", label="baseline")
    above.set_ylabel(f"{curve.metric}, %")
    rows = [point.row for points in curve.lines.values() for point in points]
    pruned = all(row.prunes or row.plain for row in rows) and any(row.prunes for row in rows)
    below.set_ylabel("parameters left, %" if pruned else "backward FLOPs left, %")
    below.set_xlabel(curve.parameter)
    from_zero(below, [_remaining(row) for row in rows])
    if curve.ticks is not None:
        below.set_xticks(range(len(curve.ticks)), curve.ticks)
    elif curve.scale == "symlog":
        below.set_xscale("symlog", linthresh=curve.threshold)
        most = max(point.x for points in curve.lines.values() for point in points)
        below.set_xlim(-curve.threshold / 3, 1.5 * most)
    else:
        below.set_xscale(curve.scale)
    legend(figure, above)
    mark = "dotted" if curve.ticks is None else "dashes"
    caption = f"{curve.suite}: {curve.metric} with 95 % intervals, and what is left of the " + (
        f"parameters, against {curve.parameter}."
        if pruned
        else f"dense backward, deciding counted in, against {curve.parameter}; {mark}: by the "
        "paper's count, of its own."
    )
    words = [curve.suite, curve.family, curve.parameter, curve.first[:6]]
    name = f"{plain_name(' '.join(filter(None, words)))}-sweep"
    return Picture(name=name, group=curve.group, caption=caption, figure=figure)


def _line(
    above: Axes,
    below: Axes,
    points: list[CurvePoint],
    label: str,
    look: Look,
    curve: Curve,
    position: int,
) -> None:
    """One method's; of values that are no numbers, marks beside each other."""
    words = curve.ticks is not None
    at = [point.x + 0.06 * position * words for point in points]
    style: dict[str, Any] = {"color": look.colour, "marker": look.marker}
    style["linestyle"] = "" if words else look.line
    rows = [point.row for point in points]
    above.plot(at, [100 * row.quality.metric_mean for row in rows], label=label, **style)
    for x, row in zip(at, rows, strict=True):
        if row.quality.metric_low is not None and row.quality.metric_high is not None:
            ends = [100 * row.quality.metric_low, 100 * row.quality.metric_high]
            above.plot([x, x], ends, color=look.colour, linewidth=1)
    below.plot(at, [_remaining(row) for row in rows], label=label, **style)
    if any(row.prunes for row in rows):
        return
    paper = [100 * row.savings.paper_share for row in rows]
    below.plot(at, paper, "_" if words else ":", color=look.colour)


def _remaining(row: MethodRow) -> float:
    """What a method leaves, in per cent: of the parameters where it prunes, else of the dense
    backward.
    """
    if row.prunes:
        share = row.pruned.parameters_left_share
        return math.nan if share is None else 100 * share
    return 100 * (1 - row.savings.saved)
