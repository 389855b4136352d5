"""What is claimed of gradual beside one-shot pruning, and what comes of it, in words."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from harness.report.beside import CLAIMS, GRADUAL, same_cost
from harness.report.grouped import MOST
from harness.report.intervals import FEWEST
from harness.report.method_row import MethodRow
from harness.report.model import GroupTable
from harness.report.words import NONE, points, signed, signed_interval
from harness.suite.method_specs import kind_of

PAPER = "arXiv 2004.14765"
NO_VERDICT = "no verdict, {why}"


@dataclass(frozen=True, slots=True)
class Claim:
    """What the paper has of gradual pruning; `field`, `verdict`: of BesideOneShot; `told`: a
    difference as text.
    """

    field: str
    says: str
    told: Callable[[float], str]

    @property
    def verdict(self) -> str:
        """The field that holds it."""
        return CLAIMS[self.field][3]


def _points(value: float) -> str:
    return f"{signed(value)} points"


ACCURATE = Claim("metric_more", "more accurate", _points)
NARROW = Claim("sharpness_ratio", "narrower minima", lambda ratio: f"sharpness × {ratio:.2f}")
GAP = Claim("gap_more", "a smaller generalisation gap", _points)
SPECIFIC = Claim(
    "entropy_more",
    "features less specific to classes",
    lambda bits: f"entropy {points(bits)} bits",
)
TRANSFER = Claim("probe_more", "features that transfer better", lambda x: f"probe {_points(x)}")
ALL = (ACCURATE, NARROW, GAP, SPECIFIC, TRANSFER)


def held_against_one_shot(table: GroupTable) -> bool:
    """Whether the group has one-shot and gradual pruning, and so these tables."""
    besides = [row.beside for row in table.methods]
    return any(beside.one_shot or beside.one_shot_unlike for beside in besides)


def verdicts(table: GroupTable, claims: tuple[Claim, ...]) -> Iterator[str]:
    """A sentence for each gradual pruning and claim that something is known of."""
    for row in _graduals(table):
        for claim in claims:
            if getattr(row.beside, claim.field) is not None:
                yield _sentence(row, claim, table)


def _graduals(table: GroupTable) -> list[MethodRow]:
    rows = [row for row in table.methods if row.parameters["kind"] == GRADUAL]
    return [row for row in rows if row.beside.metric_more is not None]


def _sentence(row: MethodRow, claim: Claim, table: GroupTable) -> str:
    beside = row.beside
    start = f"{row.label} beside {beside.one_shot}, {claim.says} as {PAPER} has it"
    n = getattr(beside, f"{claim.field}_n")
    few = ", too few for a verdict" if n < FEWEST else ""
    alike = _with_controls(row, claim, table)
    also = f" So is it {alike}." if alike else ""
    cost = f", {_cost(beside.one_shot_cost)}" if claim is ACCURATE else ""
    return f"{start}: {_verdict(row, claim)}. {_change(row, claim)} (n = {n}{few}){cost}.{also}"


def _verdict(row: MethodRow, claim: Claim) -> str:
    found: str | None = getattr(row.beside, claim.verdict)
    cost = row.beside.one_shot_cost
    if found:
        return found
    if same_cost(cost):
        return NO_VERDICT.format(why=row.withheld or "trials failed or were of noise")
    why = "are not known" if cost is None else f"differ (× {cost:.2f})"
    return NO_VERDICT.format(why=f"training FLOPs {why}")


def _change(row: MethodRow, claim: Claim) -> str:
    """The difference with its interval: "+0.40 points [+0.10, +0.70]"."""
    mean = getattr(row.beside, claim.field)
    ends = _range(row, claim)
    text = claim.told(mean)
    return f"{text[:1].upper()}{text[1:]}{'' if ends == NONE else f' {ends}'}"


def _range(row: MethodRow, claim: Claim) -> str:
    if claim is NARROW:
        return ratio_range(row)
    low, high = (getattr(row.beside, f"{claim.field}_{end}") for end in ("low", "high"))
    return bits_range(low, high) if claim is SPECIFIC else signed_interval(low, high)


def _cost(ratio: float | None) -> str:
    if ratio is None:
        return "at equal sparsity"
    equal = "equal" if same_cost(ratio) else "other"
    return f"at equal sparsity and {equal} training FLOPs (× {ratio:.2f})"


def _with_controls(row: MethodRow, claim: Claim, table: GroupTable) -> str:
    """The controls that do as well: "with smaller, a control"; empty: there is none."""
    alike = _controls(row, claim, table)
    if len(alike) > 1:
        return f"with the controls {', '.join(alike)}"
    return f"with {alike[0]}, a control" if alike else ""


def _controls(row: MethodRow, claim: Claim, table: GroupTable) -> list[str]:
    """The controls of one-shot pruning's size that differ from it as clearly, where gradual
    does.
    """
    if getattr(row.beside, claim.verdict) != "yes":
        return []
    neutral = 1.0 if claim is NARROW else 0.0
    above = CLAIMS[claim.field][2] == "above"

    def clearly(other: Any) -> bool:
        low, high = (getattr(other, f"{claim.field}_{end}") for end in ("low", "high"))
        if low is None or high is None or getattr(other, f"{claim.field}_n") < FEWEST:
            return False
        return bool(low > neutral if above else high < neutral)

    return [
        other.label
        for other in table.methods
        if other.beside.one_shot == row.beside.one_shot
        and not other.beside.one_shot_size
        and not other.plain
        and not kind_of(other.parameters).in_question
        and clearly(other.beside)
    ]


def beside_answers(table: GroupTable) -> list[str]:
    """A sentence for each gradual pruning on all that is claimed of it; none where they are
    many.
    """
    rows = _graduals(table)
    return [_answer(row, table) for row in rows] if len(rows) <= MOST else []


def _answer(row: MethodRow, table: GroupTable) -> str:
    parts, seeds = [], row.beside.metric_more_n or 0
    for claim in ALL:
        if getattr(row.beside, claim.field) is not None:
            change, n = _change(row, claim), getattr(row.beside, f"{claim.field}_n")
            of = "" if n == seeds else f", n = {n}"
            change = f"{change[:1].lower()}{change[1:]}{of}"
            alike = _with_controls(row, claim, table)
            also = f", and so {alike}" if alike else ""
            parts.append(f"{claim.says}: {_verdict(row, claim)} ({change}){also}")
    n = f"n = {seeds}{', too few for a verdict' if seeds < FEWEST else ''}"
    return (
        f"{row.label} beside {row.beside.one_shot} {_cost(row.beside.one_shot_cost)}, as {PAPER} "
        f"has it ({n}): {'; '.join(parts)}."
    )


def bits_range(low: float | None, high: float | None) -> str:
    """An interval of differences in bits: "[−0.21, +0.21]"."""
    return NONE if low is None or high is None else f"[{points(low)}, {points(high)}]"


def ratio_range(row: MethodRow) -> str:
    """The interval of the ratio of sharpness: "[0.9, 1.2]"."""
    low, high = row.beside.sharpness_ratio_low, row.beside.sharpness_ratio_high
    return NONE if low is None or high is None else f"[{low:.2f}, {high:.2f}]"
