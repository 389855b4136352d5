"""What was removed for real: as a table, and in the first sentences."""

import math
from collections.abc import Iterator

from harness.report.method_row import MethodRow
from harness.report.model import GroupTable
from harness.report.pruned_parts import Removed, StuckRow
from harness.report.tables import TONES, Cell, Column, Table
from harness.report.words import NONE, counted, percent

REMOVED = (
    "What is left of the suite's dense model once dead neurons are really removed: params; "
    "forward, FLOPs of one sample's; file, bytes of the saved weights. Only whole neurons go, of "
    "which no weight is left: single zeros are stored and computed like any other number. stay: "
    "dead neurons that can't go, mean over seeds."
)
LATENCY = (
    "latency: of a forward of the smaller model over the dense one's, for one sample and for "
    "{batch}, taken by turns, alone on {device}; with its 95 % interval over seeds, of a single "
    "seed with the middle half of its pairs."
)
PROOF = "Outputs before and after differ by {single} at the most, in float64 by {double}."
BUSY = "† {why}: latency is no measurement, and is not shown."
FEWER = "{label}: latency of {n} of {of} seeds."
ELSEWHERE = "latency was not measured: trained on another kind of machine"
NOTHING = "{labels}: nothing was removed{where}: {reason}."
STAYS = "Can't be removed, {reason}: {where}."
LACKS = (
    "{labels}: of some trials it is not known what can be removed; run the suite again: it says "
    "why (removal needs `pip install 'neqbench[pruning]'`)."
)
AS_MANY = "Fewer parameters are hardly fewer FLOPs here: {why}."
ZEROS = "single zeros are computed like any other number, only whole neurons go"
DEAD = "dead neurons stay"
SLOW = "Fewer FLOPs are {how} less time on this device."
REASONS, LAYERS = 6, 3  # lines, and layers of each, that notes name
FEW, MOST = 0.9, 0.97  # of the dense model: what is well below it, and what is hardly
NEAR = 0.03  # of the dense forward: by which removal may miss what whole neurons hold


def removed(table: GroupTable) -> Table:
    """The table of what was removed for real, of the methods of a group that prune."""
    rows = [row for row in table.methods if row.removed.removed_n]
    sizes = {row.removed.latency_batch_size for row in rows} - {None}
    batch = ", ".join(map(str, sorted(size for size in sizes if size))) or "a batch"
    return Table(
        title="Removed",
        columns=[
            Column("method", text=True),
            Column("n", wide=True),
            Column("params", "% left"),
            Column("forward", "% left"),
            Column("file", "% left", wide=True),
            Column("latency of 1", "× dense"),
            Column(f"latency of {batch}", "× dense"),
            Column("removed", "neurons", wide=True),
            Column("stay", "dead"),
        ],
        rows=[_row(row) for row in rows],
        notes=[REMOVED, *_on_latency(rows, batch), *_proof(rows), *_left_out(rows, table)],
    )


def _row(row: MethodRow) -> list[Cell]:
    found = row.removed
    return [
        Cell(row.label),
        Cell(str(found.removed_n), found.removed_n),
        _share(found.removed_parameters_share),
        _share(found.removed_forward_share),
        _share(found.removed_file_share),
        _latency(found, "latency_one"),
        _latency(found, "latency_batch"),
        _count(found.neurons_removed),
        _count(found.neurons_stuck),
    ]


def _latency(found: Removed, name: str) -> Cell:
    mean = getattr(found, name)
    if mean is None:
        return Cell(f"{NONE} †" if found.latency_withheld else NONE)
    ends = _ends(found, name)
    within = "" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]"
    return Cell(f"{mean:.2f}{within}", mean, TONES.get(getattr(found, f"{name}_verdict") or "", ""))


def _ends(found: Removed, name: str) -> tuple[float, float] | None:
    low, high = getattr(found, f"{name}_low"), getattr(found, f"{name}_high")
    return None if low is None or high is None else (low, high)


def _on_latency(rows: list[MethodRow], batch: str) -> Iterator[str]:
    devices = {row.removed.latency_device for row in rows if row.removed.latency_batch is not None}
    if devices:
        yield LATENCY.format(batch=batch, device="; ".join(sorted(d for d in devices if d)))
    why = [row.removed.latency_withheld for row in rows if row.removed.latency_withheld]
    yield from (BUSY.format(why=text[0].upper() + text[1:]) for text in dict.fromkeys(why))
    for row in rows:
        n, of = row.removed.latency_n, row.removed.removed_n
        if n is not None and of is not None and n < of:
            yield FEWER.format(label=row.label, n=n, of=of)
    elsewhere = [row.label for row in rows if row.removed.latency_n is None]
    if elsewhere:
        yield f"{', '.join(elsewhere)}: {ELSEWHERE}."


def _proof(rows: list[MethodRow]) -> Iterator[str]:
    singles, doubles = (
        [value for row in rows if (value := getattr(row.removed, name)) is not None]
        for name in ("removed_difference", "removed_difference_float64")
    )
    if singles and doubles:
        yield PROOF.format(single=_tiny(max(singles)), double=_tiny(max(doubles)))


def _left_out(rows: list[MethodRow], table: GroupTable) -> Iterator[str]:
    """What was not removed, and why; and of what that is not known."""
    nothing: dict[tuple[str, str], list[str]] = {}
    places: dict[str, list[str]] = {}
    for row in rows:
        if row.removed.removed_reason:
            why = _in_some(row.removed.removed_nothing_n, row.removed), row.removed.removed_reason
            nothing.setdefault(why, []).append(row.label)
        for reason, text in _stuck(row.removed).items():
            places.setdefault(reason, []).append(f"{row.label} {text}")
    for (seeds, reason), labels in nothing.items():
        yield NOTHING.format(labels=", ".join(labels), where=seeds, reason=reason)
    listed = list(places.items())
    for reason, where in listed[:REASONS]:
        yield STAYS.format(reason=reason, where="; ".join(where))
    if len(listed) > REASONS:
        yield f"And {counted(len(listed) - REASONS, 'more reason')} (--format json has all)."
    lacking = [r.label for r in table.methods if r.prunes and (r.removed.removed_n or 0) < r.n]
    if lacking:
        yield LACKS.format(labels=", ".join(lacking))


def _stuck(found: Removed) -> dict[str, str]:
    """By reason, how many neurons stay, in which layers, and in how many seeds."""
    told = {}
    for reason, rows in _by_reason(found).items():
        some = ", ".join(row.layer for row in rows[:LAYERS])
        more = f" and {len(rows) - LAYERS} more" if len(rows) > LAYERS else ""
        seeds = _in_some(rows[0].reason_seeds, found)
        told[reason] = f"{_neurons(_sum(rows))} ({some}{more}{seeds and f';{seeds}'})"
    return told


def _by_reason(found: Removed) -> dict[str, list[StuckRow]]:
    """What stays, but for what is said to be why nothing was removed."""
    by_reason: dict[str, list[StuckRow]] = {}
    for row in found.stuck:
        if row.reason not in (found.removed_reason or ""):
            by_reason.setdefault(row.reason, []).append(row)
    return by_reason


def _sum(rows: list[StuckRow]) -> float:
    return math.fsum(row.neurons for row in rows)


def _in_some(seeds: int | None, found: Removed) -> str:
    """ " in 1 of 3 seeds"; empty where it is all of them."""
    return "" if seeds == found.removed_n else f" in {seeds} of {found.removed_n} seeds"


def _all_whole(found: Removed) -> bool:
    """Whether nothing was removed in any seed."""
    return bool(found.removed_n) and found.removed_nothing_n == found.removed_n


def removed_answer(row: MethodRow) -> str:
    """What is left of a method's model and its latency, in a few sentences; empty: not known."""
    found = row.removed
    if _all_whole(found):
        said = [f"Nothing of it can be removed: {found.removed_reason}."]
    elif found.removed_forward_share is None:
        return ""
    else:
        said = [f"{_has(found)}{_takes(found)}{_agrees(found)}."]
        if found.removed_reason:
            seeds = _in_some(found.removed_nothing_n, found)
            said.append(f"Nothing was removed{seeds}: {found.removed_reason}.")
    return " ".join(part for part in (*said, _no_faster(row), *_stays(found)) if part)


def _has(found: Removed) -> str:
    forward, parameters = found.removed_forward_share, found.removed_parameters_share
    of = "" if parameters is None else f"{percent(parameters)} % of the parameters and "
    flops = f"{percent(forward or math.nan)} % of the forward's FLOPs (n = {found.removed_n})"
    return f"Removed for real, it has {'on average ' * _averaged(found)}{of}{flops}"


def _averaged(found: Removed) -> bool:
    return (found.removed_n or 0) > 1


def _takes(found: Removed) -> str:
    if found.latency_withheld:
        return f", whose time was not measured: {found.latency_withheld}"
    if found.latency_n is None:
        return f"; {ELSEWHERE}"
    if found.latency_batch is None:
        return ""
    ends = _ends(found, "latency_batch")
    within = "" if ends is None else f" ({ends[0]:.2f} to {ends[1]:.2f})"
    one = "" if found.latency_one is None else f", × {found.latency_one:.2f} at batch 1"
    return (
        f", and a forward takes × {found.latency_batch:.2f} of the dense one's time at batch "
        f"{found.latency_batch_size}{within}{one}"
    )


def _agrees(found: Removed) -> str:
    known = found.removed_difference if found.neurons_removed else None
    return "" if known is None else f"; outputs agree to {_tiny(known)}"


def _no_faster(row: MethodRow) -> str:
    """Why it is no faster although parameters are gone; empty: it is faster, or has them all."""
    found, left = row.removed, row.pruned.parameters_left_share
    forward, latency = found.removed_forward_share or 1.0, found.latency_batch
    ends = _ends(found, "latency_batch")
    faster = latency is not None and latency < MOST and (ends is None or ends[1] < 1)
    if faster or left is None or left > FEW:
        return ""
    if forward > FEW:
        why = "; and ".join(_why_as_many(row, forward))
        return AS_MANY.format(why=why) if why else ""
    if latency is None:
        return ""
    how = "no" if latency >= 1 else "hardly" if latency >= MOST else "not clearly"
    return SLOW.format(how=how)


def _why_as_many(row: MethodRow, forward: float) -> Iterator[str]:
    """Why most FLOPs of the forward are left: rows and columns that still hold a weight take
    them, or dead ones that stay.
    """
    effective, stay = row.pruned.forward_effective_share, row.removed.neurons_stuck
    near = forward - effective <= NEAR if effective is not None else not stay
    if near or (effective or 0.0) > FEW:
        yield ZEROS
    if stay and not near:  # another sentence says why
        yield DEAD


def _stays(found: Removed) -> Iterator[str]:
    """What stays although it is dead, unless that has been said."""
    reasons = _by_reason(found)
    stay = math.fsum(map(_sum, reasons.values()))
    if stay:
        reason, rows = max(reasons.items(), key=lambda item: _sum(item[1]))
        most = "; most of them" if len(reasons) > 1 else ""
        what = f"{_neurons(stay)} dead neuron{'s' * (_neurons(stay) != '1')}"
        stays = "stay" if _all_whole(found) else "can't be removed"
        seeds = _in_some(rows[0].reason_seeds, found)
        on_average = "On average " * _averaged(found)
        yield f"{on_average}{what} {stays}{most}{seeds and f',{seeds}'}: {reason}."


def _tiny(value: float) -> str:
    """A difference, by its size: "2.3e-6"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def _neurons(value: float) -> str:
    return f"{value:,.0f}" if abs(value - round(value)) < 0.05 else f"{value:,.1f}"


def _count(value: float | None) -> Cell:
    return Cell(NONE if value is None else _neurons(value), value)


def _share(value: float | None) -> Cell:
    return Cell(percent(math.nan if value is None else value), value)
