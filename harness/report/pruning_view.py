"""What pruning has left, and what it has cost, as a table."""

import math

from harness.report.method_row import MethodRow
from harness.report.model import GroupTable
from harness.report.tables import TONES, Cell, Column, Table
from harness.report.words import NONE, percent, signed, signed_interval, spread

LEFT = (
    "What the last epoch leaves, of the baseline's model where there is one: params, parameters "
    "that are not pruned; neurons, those with a weight that is not pruned; forward, effective "
    "FLOPs of it: the multiply-accumulates of rows and columns that still hold a weight, which is "
    "what dense kernels would do if the others were removed. The training itself executed "
    "everything."
)
ENTROPY = (
    "entropy: PSP-entropy, in bits, of whether a neuron is on for the validation samples of a "
    "class: low where that is sure; summed over classes, mean over the neurons that are left."
)
COST = (
    "cost: FLOPs of the training (forward, executed backward, and what the method adds), over "
    "those of plain training. Δ: of {metric} to the baseline, with its 95 % interval."
)
APART = (
    "Methods that prune are never ranked with those that freeze: the ones leave a smaller model, "
    "the others save in training."
)
NOTHING = (
    "{labels}: nothing was pruned; no plateau of the validation loss came, or no threshold was "
    "within the tolerance: lower pwe, raise twt, or train longer."
)
STOPPED = (
    "{labels}: pruned less than asked, since a layer would have been left without a weight "
    "(would_empty)."
)
UNKNOWN = "{labels}: no entropy, since a class had no validation samples."


def pruned(table: GroupTable) -> Table:
    """The table of the group's methods that prune."""
    rows = [row for row in table.methods if row.prunes]
    lacking = [row.label for row in rows if _lacks_entropy(row)]
    said = [UNKNOWN.format(labels=", ".join(lacking))] if lacking else []
    never = [row.label for row in rows if _pruned_nothing(row)]
    said += [NOTHING.format(labels=", ".join(never))] if never else []
    short = [row.label for row in rows if any(m.name == "would_empty" for m in row.measures)]
    said += [STOPPED.format(labels=", ".join(short))] if short else []
    return Table(
        title="Pruned",
        columns=[
            Column("method", text=True),
            Column("n", wide=True),
            Column("params", "% left"),
            Column("neurons", "% left"),
            Column("forward", "% left"),
            Column("entropy", "bits"),
            Column("cost", "× base"),
            Column(table.metric, "%", wide=True),
            Column("Δ", "pp"),
            Column("95 %", "pp", wide=True),
            Column("verdict", text=True),
        ],
        rows=[_row(row) for row in rows],
        notes=[LEFT, ENTROPY, *said, COST.format(metric=table.metric), APART],
    )


def _lacks_entropy(row: MethodRow) -> bool:
    """Whether it was recorded, and is not known."""
    told = any(found.name == "psp_entropy" and not found.layers for found in row.measures)
    return told and row.pruned.psp_entropy is None


def _pruned_nothing(row: MethodRow) -> bool:
    """Whether it has a threshold to find, and in no seed anything was below it."""
    found = {measure.name: measure.mean for measure in row.measures if not measure.layers}
    return "threshold" in found and found.get("parameters") == found.get("parameters_left")


def _row(row: MethodRow) -> list[Cell]:
    found, quality = row.pruned, row.quality
    low, high = quality.difference_low, quality.difference_high
    verdict = "none" if row.withheld else quality.verdict or NONE
    return [
        Cell(row.label),
        Cell(str(row.n), row.n),
        _share(found.parameters_left_share),
        _share(found.neurons_left_share),
        _share(found.forward_effective_share),
        _number(found.psp_entropy),
        _number(found.training_cost),
        Cell(spread(quality.metric_mean, None), quality.metric_mean),
        Cell(signed(quality.difference), quality.difference),
        Cell(signed_interval(low, high), low),
        Cell(verdict, verdict, "bad" if row.withheld else TONES.get(verdict, "")),
    ]


def _share(value: float | None) -> Cell:
    return Cell(percent(math.nan if value is None else value), value)


def _number(value: float | None) -> Cell:
    return Cell(NONE if value is None else f"{value:.2f}", value)
