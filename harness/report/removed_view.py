"""What was removed for real: as a table, and in the first sentences."""

import math
from collections.abc import Iterator

from harness.report.method_row import MethodRow
from harness.report.model import GroupTable
from harness.report.pruned_parts import Removed
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
NOTHING = "{labels}: nothing was removed: {reason}."
STAYS = "Can't be removed, {reason}: {where}."
LACKS = (
    "{labels}: of some trials it is not known what can be removed; run the suite again with "
    "`pip install 'neqbench[pruning]'`."
)
ZEROS = (
    "Fewer parameters are hardly fewer FLOPs here: single zeros are computed like any other "
    "number, only whole neurons go."
)
SLOW = "Fewer FLOPs are no less time on this device."
REASONS, LAYERS = 6, 3  # lines, and layers of each, that notes name
FEW, MOST = 0.9, 0.97  # of the dense model: what is well below it, and what is hardly


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


def _proof(rows: list[MethodRow]) -> Iterator[str]:
    singles, doubles = (
        [value for row in rows if (value := getattr(row.removed, name)) is not None]
        for name in ("removed_difference", "removed_difference_float64")
    )
    if singles and doubles:
        yield PROOF.format(single=_tiny(max(singles)), double=_tiny(max(doubles)))


def _left_out(rows: list[MethodRow], table: GroupTable) -> Iterator[str]:
    """What was not removed, and why; and of what that is not known."""
    nothing: dict[str, list[str]] = {}
    places: dict[str, list[str]] = {}
    for row in rows:
        if row.removed.removed_reason:
            nothing.setdefault(row.removed.removed_reason, []).append(row.label)
        for reason, text in _stuck(row.removed).items():
            places.setdefault(reason, []).append(f"{row.label} {text}")
    for reason, labels in nothing.items():
        yield NOTHING.format(labels=", ".join(labels), reason=reason)
    listed = list(places.items())
    for reason, where in listed[:REASONS]:
        yield STAYS.format(reason=reason, where="; ".join(where))
    if len(listed) > REASONS:
        yield f"And {counted(len(listed) - REASONS, 'more reason')} (--format json has all)."
    lacking = [r.label for r in table.methods if r.prunes and (r.removed.removed_n or 0) < r.n]
    if lacking:
        yield LACKS.format(labels=", ".join(lacking))


def _stuck(found: Removed) -> dict[str, str]:
    """By reason, how many neurons stay, and in which layers."""
    by_reason: dict[str, dict[str, float]] = {}
    for row in found.stuck:
        layers = by_reason.setdefault(row.reason, {})
        layers[row.layer] = layers.get(row.layer, 0.0) + row.neurons
    told = {}
    for reason, layers in by_reason.items():
        some = ", ".join(list(layers)[:LAYERS])
        more = f" and {len(layers) - LAYERS} more" if len(layers) > LAYERS else ""
        told[reason] = f"{_neurons(math.fsum(layers.values()))} ({some}{more})"
    return told


def removed_answer(row: MethodRow) -> str:
    """What is left of a method's model and its latency, in a few sentences; empty: not known."""
    found = row.removed
    forward, parameters = found.removed_forward_share, found.removed_parameters_share
    if found.removed_reason and not found.neurons_removed:
        said = f"Nothing of it can be removed: {found.removed_reason}."
    elif forward is None:
        return ""
    else:
        of = "" if parameters is None else f"{percent(parameters)} % of the parameters and "
        has = f"Removed for real, it has {of}{percent(forward)} % of the forward's FLOPs"
        said = f"{has}{_takes(found)}{_agrees(found)}."
    return " ".join(part for part in (said, _no_faster(row), *_stays(found)) if part)


def _takes(found: Removed) -> str:
    if found.latency_withheld:
        return f", whose time was not measured: {found.latency_withheld}"
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
    found = row.removed
    forward, left = found.removed_forward_share or 1.0, row.pruned.parameters_left_share
    ends = _ends(found, "latency_batch")
    timed = found.latency_batch is not None
    faster = timed and (found.latency_batch or 1.0) < MOST and (ends is None or ends[1] < 1)
    if faster or left is None or left > FEW:
        return ""
    if forward > FEW:  # of dead neurons that stay another sentence says why
        return "" if found.neurons_stuck else ZEROS
    return SLOW if timed else ""


def _stays(found: Removed) -> list[str]:
    stay = found.neurons_stuck
    if not stay or not found.stuck:
        return []
    sums: dict[str, float] = {}
    for row in found.stuck:
        sums[row.reason] = sums.get(row.reason, 0.0) + row.neurons
    reason = max(sums, key=lambda text: sums[text])
    most = "; most of them" if len(sums) > 1 else ""
    what = "dead neuron" if _neurons(stay) == "1" else "dead neurons"
    return [f"{_neurons(stay)} {what} can't be removed{most}: {reason}."]


def _tiny(value: float) -> str:
    """A difference, by its size: "2.3e-6"."""
    if value == 0:
        return "0"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def _neurons(value: float) -> str:
    return f"{value:,.0f}" if abs(value - round(value)) < 0.05 else f"{value:,.1f}"


def _count(value: float | None) -> Cell:
    return Cell(NONE if value is None else _neurons(value), value)


def _share(value: float | None) -> Cell:
    return Cell(percent(math.nan if value is None else value), value)
