"""A group's figures as tables."""

import math
from collections.abc import Callable

from harness.report.curves import Sweep
from harness.report.methods import MethodRow
from harness.report.model import GroupTable
from harness.report.phases import Phase, PhaseRow
from harness.report.published import Comparison
from harness.report.tables import TONES, Cell, Column, Table
from harness.report.words import (
    NONE,
    flops,
    flops_unit,
    interval,
    percent,
    signed,
    signed_interval,
    spread,
)
from harness.suite.sweep import named

SAVED = (
    "FLOPs: executed by the backward of one sample, mean over epochs; {dense} with nothing frozen. "
    "decide: forward passes that decide, of the dense backward. saved, of the dense backward, with "
    "deciding counted in: by what the kernels executed, and by the least that was required; by the "
    "paper's count ({paper} with nothing frozen), which leaves deciding out and credits a frozen "
    "neuron with its whole share."
)
TIMES = "time: of training and deciding{mark}, and over the baseline's with its 95 % interval."
SHARED = "* Trials shared a device: these seconds are no measurement and have no verdict."
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
    "The baseline as it was after as many epochs as the method's FLOPs would have paid for; Δ: the "
    "method at its end minus that, in percentage points. Its schedule was not shortened: one that "
    "was would do better, above all where the last phase was not reached (†)."
)
PUBLISHED = (
    "agrees: the 95 % interval of the difference holds zero and is within the margin (of FLOPs and "
    "shares: a tenth); differs: it leaves zero out."
)
CERTAINTY = {
    "paper": "",
    "runs": " ᵃ",
    "computed": " ᵇ",
    "digitised": " ᵈ",
    "unconfirmed": " ?",
}
SURE = {
    "runs": "ᵃ the authors' run tables",
    "computed": "ᵇ computed by the paper's rule",
    "digitised": "ᵈ digitised from a figure, about 1 % error",
    "unconfirmed": "? unconfirmed, not to be quoted as the paper's",
}


def accuracy(table: GroupTable) -> Table:
    """What was reached, and whether it is as good as the baseline."""
    several = any(row.failed for row in table.methods)
    rows = [
        [
            Cell(row.label),
            _count(row, several=several),
            Cell(spread(row.metric_mean, row.metric_std), row.metric_mean),
            Cell(interval(row.metric_low, row.metric_high), row.metric_low),
            Cell(_difference(row), row.difference),
            Cell(signed_interval(row.difference_low, row.difference_high), row.difference_low),
            _verdict(row),
        ]
        for row in table.methods
    ]
    paired = ", paired by seed," if any(row.paired for row in table.methods) else ""
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


def _difference(row: MethodRow) -> str:
    fewer = row.difference_n is not None and row.difference_n < row.n
    return signed(row.difference) + (f" (n = {row.difference_n})" if fewer else "")


def _verdict(row: MethodRow) -> Cell:
    tone = TONES.get(row.verdict or "", "")
    if row.withheld:
        return Cell(f"none: {row.withheld}", "none", "bad")
    if row.verdict == "undecided":
        seeds = f"seed{'s' * (row.more_seeds != 1)}"
        more = f"about {row.more_seeds} more {seeds}" if row.more_seeds else "> 1000 more seeds"
        return Cell(f"undecided, {more}", row.verdict, tone)
    return Cell(row.verdict or NONE, row.verdict, tone)


def savings(table: GroupTable) -> Table:
    """What was saved, by which count, and what the clock says."""
    unit, scale = flops_unit(table.dense)
    mark = "*" if table.timing_shared else ""
    optional: list[tuple[Column, Callable[[MethodRow], Cell]]] = []
    if any(row.memory_bytes is not None for row in table.methods):
        optional += [
            (Column("memory", "MiB", wide=True), lambda r: _scaled(r.memory_bytes, 2**20)),
            (Column("memory", "× base", wide=True), lambda r: _times(r.memory_ratio)),
        ]
    if any(row.energy_joules is not None for row in table.methods):
        optional += [
            (Column("energy", "kJ", wide=True), lambda r: _scaled(r.energy_joules, 1e3)),
            (Column("energy", "× base", wide=True), lambda r: _times(r.energy_ratio)),
        ]
    rows = [
        [
            Cell(row.label),
            _share(row.frozen),
            _scaled(row.executed, scale, 2),
            _share(row.overhead_share),
            _share(row.saved),
            _share(row.saved_required),
            _share(row.saved_paper),
            _seconds(row),
            _ratio(row, shared=table.timing_shared),
            *(cell(row) for _, cell in optional),
        ]
        for row in table.methods
    ]
    notes = [SAVED.format(dense=flops(table.dense), paper=flops(table.paper_dense))]
    if any(row.parameters.get("gradient") == "cut" for row in table.methods):
        notes.append(CUT)
    if not table.devices_alike:
        notes.append(MIXED)
    else:
        notes += [TIMES.format(mark=mark), *([SHARED] if table.timing_shared else [])]
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
    if row.seconds_ratio is None or shared:
        return Cell(NONE)
    within = (
        ""
        if row.seconds_ratio_low is None
        else (f" [{row.seconds_ratio_low:.2f}, {row.seconds_ratio_high:.2f}]")
    )
    tone = TONES.get(row.seconds_verdict or "", "")
    return Cell(f"{row.seconds_ratio:.2f}{within}", row.seconds_ratio, tone)


def phases(table: GroupTable) -> Table:
    """Metric and saving by phase of the learning-rate schedule."""
    columns = [Column("method", text=True), Column("", text=True)]
    columns += [Column(_epochs(p), f"lr {p.lr:.2g}") for p in table.phases]
    rows = []
    for row in filter(lambda row: row.n, table.methods):
        parts = [_at(phase, row.label) for phase in table.phases]
        rows.append([Cell(row.label), Cell(table.metric), *map(_reached, parts)])
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


def _reached(part: PhaseRow) -> Cell:
    gained = "" if part.gained is None else f" ({signed(part.gained, 1)})"
    return Cell(spread(part.metric, None) + gained, part.metric)


def _epochs(phase: Phase) -> str:
    if phase.first == phase.last:
        return f"epoch {phase.first}"
    return f"epochs {phase.first}–{phase.last}"


def stopped(table: GroupTable) -> Table:
    """The same FLOPs spent on fewer epochs of the baseline."""
    rows = [
        [
            Cell(row.label),
            _share(1 - row.saved),
            Cell(f"{row.stopped_epochs} of {table.epochs}{_early(row, table)}", row.stopped_epochs),
            Cell(spread(row.stopped_metric, None), row.stopped_metric),
            Cell(signed(row.stopped_difference), row.stopped_difference),
            Cell(
                signed_interval(row.stopped_difference_low, row.stopped_difference_high),
                row.stopped_difference_low,
            ),
        ]
        for row in table.methods
        if row.stopped_epochs
    ]
    return Table(
        title="Against a shorter baseline",
        columns=[
            Column("method", text=True),
            Column("FLOPs", "% of dense"),
            Column("baseline stopped", "epochs"),
            Column(f"its {table.metric}", "%"),
            Column("Δ", "pp"),
            Column("95 %", "pp"),
        ],
        rows=rows,
        notes=[STOPPED],
    )


def _early(row: MethodRow, table: GroupTable) -> str:
    """A mark, where the learning rate had not yet begun its last phase."""
    return " †" if (row.stopped_epochs or 0) <= table.phases[-1].first else ""


def sweep(swept: Sweep) -> Table:
    """All points of a sweep under each other."""
    several = any(row.failed for _, table in swept for row in table.methods)
    rows = [
        [
            Cell(named(point)),
            Cell(row.label, row.label),
            _count(row, several=several),
            Cell(spread(row.metric_mean, row.metric_std), row.metric_mean),
            Cell(_difference(row), row.difference),
            Cell(signed_interval(row.difference_low, row.difference_high), row.difference_low),
            _share(row.saved),
            _share(row.saved_paper),
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


def published(table: GroupTable) -> Table:
    """Measured beside published."""
    found = table.published
    sure = [text for kind, text in SURE.items() if any(c.certainty == kind for c in found)]
    said = dict.fromkeys([*(f"Published: {c.source}." for c in found), *(c.remark for c in found)])
    whys = list(dict.fromkeys(c.why for c in found if c.why))
    return Table(
        title="Against the paper",
        columns=[
            Column("method", text=True),
            Column("what", text=True),
            Column("measured"),
            Column("published"),
            Column("verdict", text=True),
        ],
        rows=[_comparison(c, table.metric, whys) for c in found],
        notes=[
            PUBLISHED,
            *(f"{_raised(place)} {why}" for place, why in enumerate(whys, 1)),
            *filter(None, said),
            "; ".join(sure) + "." * bool(sure),
        ],
    )


def _raised(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _comparison(found: Comparison, metric: str, whys: list[str]) -> list[Cell]:
    what = {
        "metric": f"{metric}, %",
        "paper": "paper's count",
        "paper_dense": "paper's count, dense",
        "frozen": "frozen at end, %",
    }[found.what]
    if found.epochs is not None:
        what += f", epochs {found.epochs[0]}–{found.epochs[1]}"
    why = f" {_raised(whys.index(found.why) + 1)}" if found.why else ""
    tone = TONES.get(found.verdict, "")
    published = _figure(found.what, found.published, found.published_std)
    return [
        Cell(found.method),
        Cell(what, what),
        Cell(_figure(found.what, found.measured, found.measured_std), found.measured),
        Cell(published + CERTAINTY[found.certainty], found.published),
        Cell(found.verdict + why, found.verdict, tone),
    ]


def _figure(what: str, mean: float | None, std: float | None) -> str:
    if mean is None:
        return NONE
    if what == "paper_dense" and math.isfinite(mean):
        return f"{mean:,.0f}"
    return flops(mean) if what == "paper" else spread(mean, std)


def _share(value: float) -> Cell:
    return Cell(percent(value), value)


def _scaled(value: float | None, scale: float, digits: int = 1) -> Cell:
    known = value is not None and value == value
    return Cell(f"{value / scale:,.{digits}f}" if known and value is not None else NONE, value)


def _times(value: float | None) -> Cell:
    return Cell(NONE if value is None else f"{value:.2f}", value)


def _seconds(row: MethodRow) -> Cell:
    if row.seconds_train is None or row.seconds_decide is None:
        return Cell(NONE)
    seconds = row.seconds_train + row.seconds_decide
    return Cell(f"{seconds:,.0f}" if seconds >= 1000 else f"{seconds:.1f}", seconds)
