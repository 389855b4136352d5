"""The numbers of a group as tables."""

import math

from harness.report.curves import Sweep
from harness.report.method_row import MethodRow
from harness.report.model import GroupTable
from harness.report.phases import Phase, PhaseRow, follows_loss
from harness.report.savings_view import share_cell
from harness.report.tables import TONES, Cell, Column, Table
from harness.report.words import (
    NONE,
    counted,
    interval_text,
    signed,
    signed_interval,
    spread,
)
from harness.suite.sweep import point_label

ACCURACY = (
    "Mean ± standard deviation over seeds; Δ to the baseline{paired} in percentage points, with "
    "its 95 % interval. keeps: the interval lies above −{margin}, the margin; loses: below it."
)
PHASES = (
    "saved: in points of the whole training's backward, deciding counted in; a row adds up to what "
    "the method saves. {metric}: at the end of the phase, with its change since the phase before."
)
STOPPED = (
    "FLOPs: all that a method spends (forward, executed backward, deciding), of what plain "
    "training does. The baseline as it was after as many epochs as that pays for; Δ: the method at "
    "its end minus that, in percentage points. "
)
SHORTENED = (
    "Its schedule was not shortened: one that was would do better, above all where the last phase "
    "was not reached (†)."
)
FOLLOWED = "Its learning rate followed the validation loss: a schedule for that end may do better."


def accuracy(table: GroupTable) -> Table:
    """The table of what was reached, and whether it is as good as the baseline."""
    several = any(row.failed for row in table.methods)
    rows = [
        [
            Cell(row.label),
            _count(row, several=several),
            _reached(row),
            _interval(row),
            *_against_baseline(row),
            _verdict(row),
        ]
        for row in table.methods
    ]
    paired = ", paired by seed," if any(row.quality.paired for row in table.methods) else ""
    return Table(
        title=table.metric[:1].upper() + table.metric[1:],
        columns=[
            Column("method", text=True),
            Column("n"),
            Column(table.metric, "%"),
            Column("95 %", "%", wide=True),
            Column("Δ", "pp"),
            Column("95 %", "pp"),
            Column("verdict", text=True),
        ],
        rows=rows,
        notes=[ACCURACY.format(paired=paired, margin=f"{table.margin:g}")],
    )


def _count(row: MethodRow, *, several: bool) -> Cell:
    return Cell(f"{row.n} of {row.n + row.failed}" if several else str(row.n), row.n)


def _reached(row: MethodRow) -> Cell:
    quality = row.quality
    return Cell(spread(quality.metric_mean, quality.metric_std), quality.metric_mean)


def _interval(row: MethodRow) -> Cell:
    low, high = row.quality.metric_low, row.quality.metric_high
    return Cell(interval_text(low, high), low)


def _against_baseline(row: MethodRow) -> list[Cell]:
    """The difference, and its interval."""
    quality = row.quality
    low, high = quality.difference_low, quality.difference_high
    fewer = quality.difference_n is not None and quality.difference_n < row.n
    of = f" (n = {quality.difference_n})" if fewer else ""
    difference = Cell(signed(quality.difference) + of, quality.difference)
    return [difference, Cell(signed_interval(low, high), low)]


def _verdict(row: MethodRow) -> Cell:
    verdict, more = row.quality.verdict, row.quality.more_seeds
    if row.withheld:
        return Cell(f"none: {row.withheld}", "none", "bad")
    if verdict == "undecided":
        seeds = f"about {counted(more, 'more seed')}" if more else "> 1000 more seeds"
        return Cell(f"undecided, {seeds}", verdict, TONES[verdict])
    return Cell(verdict or NONE, verdict, TONES.get(verdict or "", ""))


def by_phase(table: GroupTable) -> Table:
    """The table of metric and saving by phase of the learning-rate schedule."""
    columns = [Column("method", text=True), Column("", text=True)]
    columns += [Column(_epochs(p), f"lr {p.lr:.2g}") for p in table.phases]
    rows = []
    for row in filter(lambda row: row.n, table.methods):
        parts = [_at(phase, row.label) for phase in table.phases]
        rows.append([Cell(row.label), Cell(table.metric), *map(_phase_end, parts)])
        saved = [Cell(signed(part.share, 1), part.share) for part in parts]
        if not row.plain:
            rows.append([Cell(""), Cell("saved"), *saved])
    return Table(
        title="Where in training",
        columns=columns,
        rows=rows,
        notes=[PHASES.format(metric=table.metric)],
        sortable=False,
    )


def _at(phase: Phase, label: str) -> PhaseRow:
    return next(row for row in phase.methods if row.label == label)


def _phase_end(part: PhaseRow) -> Cell:
    gained = "" if part.gained is None else f" ({signed(part.gained, 1)})"
    return Cell(spread(part.metric, None) + gained, part.metric)


def _epochs(phase: Phase) -> str:
    if phase.first == phase.last:
        return f"epoch {phase.first}"
    return f"epochs {phase.first}–{phase.last}"


def shorter_baseline(table: GroupTable) -> Table:
    """The table of what fewer epochs of the baseline reach with the same FLOPs."""
    return Table(
        title="Against a shorter baseline",
        columns=[
            Column("method", text=True),
            Column("FLOPs", "% of plain"),
            Column("baseline stopped", "epochs"),
            Column(f"its {table.metric}", "%"),
            Column("Δ", "pp"),
            Column("95 %", "pp"),
        ],
        rows=[_shorter(row, table) for row in table.methods if row.shorter_baseline.stopped_epochs],
        notes=[STOPPED + (FOLLOWED if follows_loss(table.recipe) else SHORTENED)],
    )


def _shorter(row: MethodRow, table: GroupTable) -> list[Cell]:
    found = row.shorter_baseline
    low, high = found.stopped_difference_low, found.stopped_difference_high
    epochs = f"{found.stopped_epochs} of {table.epochs}{_early(row, table)}"
    return [
        Cell(row.label),
        share_cell(found.spent_share or math.nan),
        Cell(epochs, found.stopped_epochs),
        Cell(spread(found.stopped_metric, None), found.stopped_metric),
        Cell(signed(found.stopped_difference), found.stopped_difference),
        Cell(signed_interval(low, high), low),
    ]


def _early(row: MethodRow, table: GroupTable) -> str:
    """A mark, where the learning rate had not yet begun its last phase, if it has phases."""
    last = table.phases[-1].first if table.phases else -1
    return " †" if (row.shorter_baseline.stopped_epochs or 0) <= last else ""


def sweep(swept: Sweep) -> Table:
    """The table of all points of a sweep."""
    several = any(row.failed for _, table in swept for row in table.methods)
    rows = [
        [
            Cell(point_label(point)),
            Cell(row.label, row.label),
            _count(row, several=several),
            _reached(row),
            *_against_baseline(row),
            share_cell(row.savings.saved),
            share_cell(row.savings.saved_paper),
            _verdict(row),
        ]
        for point, table in swept
        for row in table.methods
    ]
    return Table(
        title="Sweep",
        columns=[
            Column("point", text=True),
            Column("method", text=True),
            Column("n", wide=True),
            Column(swept[0][1].metric, "%"),
            Column("Δ", "pp"),
            Column("95 %", "pp", wide=True),
            Column("executed", "% saved"),
            Column("paper", "% saved", wide=True),
            Column("verdict", text=True),
        ],
        rows=rows,
        notes=["Each point has a baseline of its own; Δ is to that."],
    )
