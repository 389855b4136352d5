"""Gradual beside one-shot pruning: a table for each claim, with its verdicts in the notes."""

import math
from collections.abc import Iterator

from harness.report.beside import GRADUAL, ONE_SHOT
from harness.report.beside_words import (
    ACCURATE,
    GAP,
    NARROW,
    SPECIFIC,
    TRANSFER,
    bits_range,
    held_against_one_shot,
    ratio_range,
    verdicts,
)
from harness.report.grouped import MOST
from harness.report.intervals import FEWEST
from harness.report.method_row import MethodRow
from harness.report.model import GroupTable
from harness.report.pruned_parts import LayerEntropy
from harness.report.tables import Cell, Column, Table
from harness.report.words import NONE, percent, points, signed, signed_interval, spread

TITLE = "One-shot against gradual"
DELTA = (
    "Δ: to {to}, with its 95 % interval over seeds, paired where these match: further comparisons, "
    "not corrected for their number either."
)
SIZES = "Of another size than one-shot pruning, which Δ compares, too: {labels}."
COST = "cost: FLOPs of the training, over those of one-shot pruning."
MINIMA = (
    "sharpness: the largest eigenvalue of the Hessian of the mean loss, on the same training "
    "samples for all, geometric mean over seeds; eigenvalue in: in the interval of a seed's power "
    "iteration there is an eigenvalue, not surely the largest; its ends over all seeds. gap: "
    "{metric} on these samples less that of the test."
)
UNKNOWN = (
    "{labels}: the power iteration did not converge, or found nothing above zero; those seeds have "
    "no sharpness."
)
ENTROPY = "entropy: PSP-entropy in bits, high where neurons are not specific to classes."
PROBE = "probe: test accuracy of a linear probe on the frozen features, on other data."
UNLIKE = "{gradual} is not compared with {one_shot}: {why}."


def beside_tables(table: GroupTable) -> list[Table]:
    """A table for each claim that anything is known of, with its verdicts in its notes."""
    if not held_against_one_shot(table):
        return []
    known = [row for row in table.methods if row.n]
    found = [_accuracy(table, [row for row in known if row.prunes or row.plain])]
    sharp = [r for r in known if r.minima.sharpness_n is not None or _gap(r) is not None]
    found += [_minima(table, sharp)] if any(map(_of_pair, sharp)) else []
    features = [r for r in known if r.pruned.psp_entropy is not None or _probe(r) is not None]
    found += [_features(table, features)] if any(map(_of_pair, features)) else []
    pairs = {(each.gradual, each.one_shot) for each in table.entropies}
    return found + ([_layers(table.entropies)] if 0 < len(pairs) <= MOST else [])


def _of_pair(row: MethodRow) -> bool:
    return row.parameters["kind"] in (ONE_SHOT, GRADUAL)


def _gap(row: MethodRow) -> float | None:
    return row.minima.generalisation_gap


def _probe(row: MethodRow) -> float | None:
    return row.minima.probe_metric


def _accuracy(table: GroupTable, rows: list[MethodRow]) -> Table:
    cells = [
        [
            Cell(row.label),
            Cell(str(row.n), row.n),
            Cell(percent(_or_nan(row.pruned.parameters_left_share))),
            _number(row.beside.one_shot_cost),
            Cell(spread(row.quality.metric_mean, None), row.quality.metric_mean),
            *_points_cells(row, "metric_more"),
        ]
        for row in rows
    ]
    columns = [
        Column("params", "% left"),
        Column("cost", "× one-shot"),
        Column(table.metric, "%"),
        Column("Δ", "pp"),
        Column("95 %", "pp"),
    ]
    unlike = [
        UNLIKE.format(
            gradual=r.label,
            one_shot=r.beside.one_shot or "one-shot pruning",
            why=r.beside.one_shot_unlike,
        )
        for r in rows
        if r.beside.one_shot_unlike
    ]
    notes = [*unlike, *verdicts(table, (ACCURATE,)), *_delta(table, rows), COST]
    return _made(TITLE, columns, cells, notes)


def _minima(table: GroupTable, rows: list[MethodRow]) -> Table:
    cells = [
        [
            Cell(row.label),
            Cell(str(row.n), row.n),
            _number(row.minima.sharpness, digits=3),
            Cell(_eigenvalue_in(row)),
            _number(row.beside.sharpness_ratio),
            Cell(ratio_range(row)),
            Cell(spread(row.minima.train_metric, None), row.minima.train_metric),
            Cell(signed(_gap(row)), _gap(row)),
            *_points_cells(row, "gap_more"),
        ]
        for row in rows
    ]
    columns = [
        Column("sharpness"),
        Column("eigenvalue in", wide=True),
        Column("sharpness", "× one-shot"),
        Column("95 %", "×"),
        Column("train", "%", wide=True),
        Column("gap", "pp"),
        Column("Δ", "pp"),
        Column("95 %", "pp", wide=True),
    ]
    lost = [
        f"{row.label}, {row.minima.sharpness_unknown} of {row.n} seeds"
        for row in rows
        if row.minima.sharpness_unknown
    ]
    unknown = [UNKNOWN.format(labels="; ".join(lost))] if lost else []
    notes = [*verdicts(table, (NARROW, GAP)), *unknown, *_delta(table, rows)]
    return _made(f"{TITLE}: minima", columns, cells, [*notes, MINIMA.format(metric=table.metric)])


def _features(table: GroupTable, rows: list[MethodRow]) -> Table:
    probed = any(_probe(row) is not None for row in rows)
    cells = [
        [
            Cell(row.label),
            Cell(str(row.n), row.n),
            _number(row.pruned.psp_entropy),
            Cell(points(row.beside.entropy_more), row.beside.entropy_more),
            Cell(bits_range(row.beside.entropy_more_low, row.beside.entropy_more_high)),
            *(_probe_cells(row) if probed else []),
        ]
        for row in rows
    ]
    columns = [Column("entropy", "bits"), Column("Δ", "bits"), Column("95 %", "bits")]
    if probed:
        columns += [Column("probe", "%"), Column("Δ", "pp"), Column("95 %", "pp", wide=True)]
    said = [ENTROPY, *([PROBE] if probed else [])]
    notes = [*verdicts(table, (SPECIFIC, TRANSFER)), *_delta(table, rows), *said]
    return _made(f"{TITLE}: features", columns, cells, notes)


def _probe_cells(row: MethodRow) -> list[Cell]:
    return [Cell(spread(_probe(row), None), _probe(row)), *_points_cells(row, "probe_more")]


def _made(title: str, columns: list[Column], cells: list[list[Cell]], notes: list[str]) -> Table:
    first = [Column("method", text=True), Column("n", wide=True)]
    return Table(title=title, columns=[*first, *columns], rows=cells, notes=notes)


def _layers(found: list[LayerEntropy]) -> Table:
    several = len({(each.gradual, each.one_shot) for each in found}) > 1
    rows = [
        [
            Cell(f"{each.layer}, {each.gradual}" if several else each.layer),
            Cell(f"{each.bits_one_shot:.2f}", each.bits_one_shot),
            Cell(f"{each.bits:.2f}", each.bits),
            Cell(points(each.more), each.more),
            Cell(bits_range(each.more_low, each.more_high), each.more_low),
        ]
        for each in found
    ]
    higher = sum(each.more > 0 for each in found)
    clearly = sum(each.n >= FEWEST and (each.more_low or 0.0) > 0 for each in found)
    note = (
        f"PSP-entropy of the neurons that are left: of {len(found)} layers gradual pruning's is "
        f"higher in {higher}, in {clearly} with an interval above zero; intervals are of one layer "
        "each, not corrected for so many."
    )
    columns = [
        Column("layer", text=True),
        Column("one-shot", "bits"),
        Column("gradual", "bits"),
        Column("Δ", "bits"),
        Column("95 %", "bits"),
    ]
    return Table(title=f"{TITLE}: entropy by layer", columns=columns, rows=rows, notes=[note])


def _delta(table: GroupTable, rows: list[MethodRow]) -> Iterator[str]:
    """What Δ is to; and of which of the `rows` it is of another size."""
    others = dict.fromkeys(row.beside.one_shot for row in table.methods if row.beside.one_shot)
    to = next(iter(others)) if len(others) == 1 else "one-shot pruning of the same sparsity"
    yield DELTA.format(to=to)
    sizes = [f"{r.label}, {r.beside.one_shot_size}" for r in rows if r.beside.one_shot_size]
    if sizes:
        yield SIZES.format(labels="; ".join(sizes))


def _points_cells(row: MethodRow, name: str) -> list[Cell]:
    """A difference in points, and its interval."""
    mean, low, high = (getattr(row.beside, f"{name}{end}") for end in ("", "_low", "_high"))
    return [Cell(signed(mean), mean), Cell(signed_interval(low, high), low)]


def _eigenvalue_in(row: MethodRow) -> str:
    low, high = row.minima.sharpness_from, row.minima.sharpness_to
    if low is None or high is None:
        return NONE
    return f"[{low:.3g}, {high:.3g}]".replace("-", "−")


def _number(value: float | None, digits: int | None = None) -> Cell:
    """With two decimals, or as many significant `digits`."""
    if value is None:
        return Cell(NONE)
    small = f"{value:.2f}" if digits is None else f"{value:#.{digits}g}".replace("-", "−")
    return Cell(small if abs(value) < 100 else f"{value:,.0f}", value)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
