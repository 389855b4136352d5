"""The table of what was saved: by count, by the clock, and in bytes."""

from collections.abc import Callable

from harness.report.method_row import MethodRow, Replays
from harness.report.model import GroupTable
from harness.report.tables import TONES, Cell, Column, Table
from harness.report.words import NONE, flops_text, flops_unit, percent

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
REPLAYED = (
    "replayed: steps under each epoch's mask, timed alone on the device by turns with plain ones, "
    "and added up over the epochs with deciding; over as many plain steps, with the wider of its "
    "95 % intervals, over seeds and over pairs of steps. Steps whose shapes or routes follow the "
    "data, or that a GradScaler skips, and data that loaders can't bring in time may cost "
    "otherwise. "
    "kept: bytes of a forward's outputs that its backward needs, mean over epochs; while nothing "
    "is frozen, as in the first one, as many as in plain training."
)
FEWER = "Replayed were {measured} of {masks} masks; others lie between two of them by their FLOPs."
BUSY = "† {why} during the replay: no measurement, and no verdict."
CUT = "gradient cut: an approximation; no gradient flowed through frozen neurons."


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
    replayed = [row.replays for row in table.methods if row.replays.seconds_replayed_ratio]
    if replayed:
        optional += [
            (Column("replayed", "× base"), _replayed),
            (Column("kept", "× base", wide=True), lambda r: _times(r.replays.activation_ratio)),
            (Column("optimizer", "× base", wide=True), lambda r: _times(r.replays.optimizer_ratio)),
        ]
    pruned = any(row.savings.effective_parameters is not None for row in table.methods)
    if pruned:
        left = Column("left", "k params", wide=True)
        optional.append((left, lambda r: _scaled(r.savings.effective_parameters, 1e3)))
    rows = [
        [
            Cell(row.label),
            share_cell(row.savings.frozen),
            _scaled(row.savings.executed, scale, 2),
            share_cell(row.savings.overhead_share),
            share_cell(row.savings.saved),
            share_cell(row.savings.saved_required),
            share_cell(row.savings.saved_paper),
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
    notes += _about_replays(replayed)
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
            Column("time", f"s{mark}", wide=bool(replayed)),
            Column("time", "× base", wide=bool(replayed)),
            *(column for column, _ in optional),
        ],
        rows=rows,
        notes=notes,
    )


def _ratio(row: MethodRow, *, shared: bool) -> Cell:
    measured = row.measured
    if measured.seconds_ratio is None or shared:
        return Cell(NONE)
    ends = measured.seconds_ratio_low, measured.seconds_ratio_high
    return _with_ends(measured.seconds_ratio, *ends, measured.seconds_verdict)


def _replayed(row: MethodRow) -> Cell:
    found = row.replays
    if found.seconds_replayed_ratio is None:
        return Cell(NONE)
    low, high = found.ends or (None, None)
    mark = " †" if found.seconds_replayed_withheld else ""
    verdict = found.seconds_replayed_verdict
    return _with_ends(found.seconds_replayed_ratio, low, high, verdict, mark)


def _with_ends(
    ratio: float, low: float | None, high: float | None, verdict: str | None, mark: str = ""
) -> Cell:
    within = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    return Cell(f"{ratio:.2f}{within}{mark}", ratio, TONES.get(verdict or "", ""))


def _about_replays(replayed: list[Replays]) -> list[str]:
    """Notes on the columns of replays, where there are any."""
    if not replayed:
        return []
    masks = sum(r.masks or 0 for r in replayed)
    measured = sum(r.masks_measured or 0 for r in replayed)
    why = [r.seconds_replayed_withheld for r in replayed if r.seconds_replayed_withheld]
    return [
        REPLAYED,
        *([FEWER.format(measured=measured, masks=masks)] if measured < masks else []),
        *(BUSY.format(why=each[0].upper() + each[1:]) for each in dict.fromkeys(why)),
    ]


def _seconds(row: MethodRow) -> Cell:
    measured = row.measured
    if measured.seconds_train is None or measured.seconds_decide is None:
        return Cell(NONE)
    seconds = measured.seconds_train + measured.seconds_decide
    return Cell(f"{seconds:,.0f}" if seconds >= 1000 else f"{seconds:.1f}", seconds)


def share_cell(value: float) -> Cell:
    """A share, in per cent."""
    return Cell(percent(value), value)


def _scaled(value: float | None, scale: float, digits: int = 1) -> Cell:
    known = value is not None and value == value
    return Cell(f"{value / scale:,.{digits}f}" if known and value is not None else NONE, value)


def _times(value: float | None) -> Cell:
    return Cell(NONE if value is None else f"{value:.2f}", value)
