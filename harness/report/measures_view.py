"""What methods have recorded themselves, as a table."""

from harness.report.beside_words import held_against_one_shot
from harness.report.grouped import MEASURES as GROUPED
from harness.report.method_row import MeasureRow, MethodRow
from harness.report.model import GroupTable
from harness.report.per_trial import MINIMA
from harness.report.tables import Cell, Column, Table
from harness.report.words import NONE, counted

NOTE = (
    "What methods record of themselves, as they did last: mean ± standard deviation over seeds. Of "
    "layers: their mean, and the least and the greatest of them."
)
PRUNED = {  # of a whole model, by measure: what the table of pruning shows it as
    "parameters": "parameters_left_share",
    "parameters_left": "parameters_left_share",
    "neurons": "neurons_left_share",
    "neurons_left": "neurons_left_share",
    "forward_flops_effective": "forward_effective_share",
    "psp_entropy": "psp_entropy",
}


def shown(row: MethodRow, table: GroupTable) -> list[MeasureRow]:
    """The measures of a method that no other table of its group shows."""
    claimed = held_against_one_shot(table)
    return [measure for measure in row.measures if not _elsewhere(measure, row, claimed=claimed)]


def _elsewhere(measure: MeasureRow, row: MethodRow, *, claimed: bool) -> bool:
    """`claimed`: whether there are tables of what is claimed of gradual pruning."""
    if measure.name in GROUPED:
        return True
    if claimed and measure.name in MINIMA and not measure.layers:
        return True
    part = None if measure.layers else PRUNED.get(measure.name)
    return part is not None and getattr(row.pruned, part) is not None


def measures(table: GroupTable) -> Table:
    """The table of measures of a group's methods."""
    return Table(
        title="Recorded by the methods",
        columns=[
            Column("method", text=True),
            Column("measure", text=True),
            Column("of", text=True),
            Column("n", wide=True),
            Column("last"),
            Column("from … to"),
        ],
        rows=[_row(row.label, measure) for row in table.methods for measure in shown(row, table)],
        notes=[NOTE],
    )


def _row(label: str, found: MeasureRow) -> list[Cell]:
    spread = f" ± {_number(found.std)}" if found.std is not None else ""
    ends = f"{_number(found.low)} … {_number(found.high)}" if found.low is not None else NONE
    return [
        Cell(label),
        Cell(found.name),
        Cell(counted(found.layers, "layer") if found.layers else "model"),
        Cell(str(found.n), found.n),
        Cell(_number(found.mean) + spread, found.mean),
        Cell(ends, found.low),
    ]


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}".replace("-", "−")
