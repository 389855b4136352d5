"""The numbers of a group as tables."""

import math
from collections.abc import Callable

from harness.report.curves import Sweep
from harness.report.method_row import MethodRow
from harness.report.model import GroupTable
from harness.report.phases import Phase, PhaseRow, follows_loss
from harness.report.tables import TONES, Cell, Column, Table
from harness.report.words import (
    NONE,
    counted,
    flops_text,
    flops_unit,
    interval_text,
    percent,
    signed,
    signed_interval,
    spread,
)
from harness.suite.sweep import point_label

SAVED = (
    "FLOPs: executed by the backward of one sample, mean over epochs; {dense} with nothing frozen. "
    "decide: what deciding takes, of the dense backward. saved, of the dense backward, with "
    "deciding counted in: by what the kernels executed, and by the least that was required; by the "
    "paper's count ({paper} with nothing frozen), which leaves deciding out and credits a frozen "
    "neuron with its whole share."
)
TIMES = "time: of training and deciding{mark}, and over the baseline's with its 95 % interval."
LEFT = "left: parameters that are left by a method that prunes; in training that saves nothing."
WITHHELD = "* {why}: these seconds are no measurement and have no verdict."
MIXED = "Trials ran on different devices, or with other threads: nothing measured is compared."
CUT = "gradient cut: an approximation; no gradient flowed through frozen neurons."
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


def savings(table: GroupTable) -> Table:
    """The table of what was saved, by which count, and what the clock says."""
    unit, scale = flops_unit(table.dense)
    mark = "*" if table.timing_withheld else ""
    optional: list[tuple[Column, Callable[[MethodRow], Cell]]] = []
    if any(row.measured.memory_bytes is not None for row in table.methods):
        optional += [
            (Column("memory", "MiB", wide=True), lambda r: _scaled(r.measured.memory_bytes, 2**20)),
            (Column("memory", "× base", wide=True), lambda r: _times(r.measured.memory_ratio)),
        ]
    if any(row.measured.energy_joules is not None for row in table.methods):
        optional += [
            (Column("energy", "kJ", wide=True), lambda r: _scaled(r.measured.energy_joules, 1e3)),
            (Column("energy", "× base", wide=True), lambda r: _times(r.measured.energy_ratio)),
        ]
    pruned = any(row.savings.effective_parameters is not None for row in table.methods)
    if pruned:
        left = Column("left", "k params", wide=True)
        optional.append((left, lambda r: _scaled(r.savings.effective_parameters, 1e3)))
    rows = [
        [
            Cell(row.label),
            _share(row.savings.frozen),
            _scaled(row.savings.executed, scale, 2),
            _share(row.savings.overhead_share),
            _share(row.savings.saved),
            _share(row.savings.saved_required),
            _share(row.savings.saved_paper),
            _seconds(row),
            _ratio(row, shared=bool(table.timing_withheld)),
            *(cell(row) for _, cell in optional),
        ]
        for row in table.methods
    ]
    notes = [SAVED.format(dense=flops_text(table.dense), paper=flops_text(table.paper_dense))]
    if any(row.parameters.get("gradient") == "cut" for row in table.methods):
        notes.append(CUT)
    notes += [LEFT] if pruned else []
    if not table.devices_alike:
        notes.append(MIXED)
    else:
        notes.append(TIMES.format(mark=mark))
        if why := table.timing_withheld:
            notes.append(WITHHELD.format(why=why[0].upper() + why[1:]))
    return Table(
        title="Savings",
        columns=[
            Column("method", text=True),
            Column("frozen at end", "%", wide=True),
            Column("FLOPs", unit),
            Column("decide", "%"),
            Column("executed", "% saved"),
            Column("required", "% saved"),
            Column("paper", "% saved"),
            Column("time", f"s{mark}"),
            Column("time", "× base"),
            *(column for column, _ in optional),
        ],
        rows=rows,
        notes=notes,
    )


def _ratio(row: MethodRow, *, shared: bool) -> Cell:
    measured = row.measured
    if measured.seconds_ratio is None or shared:
        return Cell(NONE)
    low, high = measured.seconds_ratio_low, measured.seconds_ratio_high
    within = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    tone = TONES.get(measured.seconds_verdict or "", "")
    return Cell(f"{measured.seconds_ratio:.2f}{within}", measured.seconds_ratio, tone)


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
        _share(found.spent_share or math.nan),
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
            _share(row.savings.saved),
            _share(row.savings.saved_paper),
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


def _share(value: float) -> Cell:
    return Cell(percent(value), value)


def _scaled(value: float | None, scale: float, digits: int = 1) -> Cell:
    known = value is not None and value == value
    return Cell(f"{value / scale:,.{digits}f}" if known and value is not None else NONE, value)


def _times(value: float | None) -> Cell:
    return Cell(NONE if value is None else f"{value:.2f}", value)


def _seconds(row: MethodRow) -> Cell:
    measured = row.measured
    if measured.seconds_train is None or measured.seconds_decide is None:
        return Cell(NONE)
    seconds = measured.seconds_train + measured.seconds_decide
    return Cell(f"{seconds:,.0f}" if seconds >= 1000 else f"{seconds:.1f}", seconds)
