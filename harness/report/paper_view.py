"""What was measured beside what has been published, as a table."""

import math

from harness.report.model import GroupTable
from harness.report.published import PaperComparison
from harness.report.tables import TONES, Cell, Column, Table
from harness.report.words import NONE, flops_text, spread

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


def against_paper(table: GroupTable) -> Table:
    """The figures of a group beside the published ones."""
    found = table.published
    sure = [text for kind, text in SURE.items() if any(c.certainty == kind for c in found)]
    sources = dict.fromkeys(
        [*(f"Published: {c.source}." for c in found), *(c.remark for c in found)]
    )
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
            *(f"{_raised(position)} {why}" for position, why in enumerate(whys, 1)),
            *filter(None, dict.fromkeys(sources)),
            "; ".join(sure) + "." * bool(sure),
        ],
    )


def _raised(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _comparison(found: PaperComparison, metric: str, whys: list[str]) -> list[Cell]:
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
    return flops_text(mean) if what == "paper" else spread(mean, std)
