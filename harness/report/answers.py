"""The report in a sentence for each method in question."""

import math

from harness.report.methods import MethodRow
from harness.report.model import GroupTable
from harness.report.words import signed

MOST = 3  # methods; of more, the tables tell


def answers(table: GroupTable) -> list[str]:
    """For the methods that decide by equilibrium, unless they are many, as in a sweep, or were
    trained on noise.
    """
    rows = [row for row in table.methods if row.parameters["kind"] == "neq" and row.n]
    if table.synthetic:
        return []
    return [_answer(row, table) for row in rows] if len(rows) <= MOST else []


def _answer(row: MethodRow, table: GroupTable) -> str:
    executes = (
        f"It executes {_less(row.saved)} backward FLOPs, deciding counted in "
        f"({_less(row.saved_paper)} by the paper's count)."
    )
    known = [executes] if math.isfinite(row.saved + row.saved_paper) else []
    return " ".join([row.label, _kept(row, table), *known, _time(row, table)])


def _kept(row: MethodRow, table: GroupTable) -> str:
    if row.difference is None:
        return f"has {100 * row.metric_mean:.2f} % {table.metric}, and no baseline to compare with."
    found = f"{signed(row.difference)} points"
    if row.difference_low is not None:
        found += f", between {signed(row.difference_low)} and {signed(row.difference_high)}"
    margin = f"{table.margin:g} points"
    said = {
        "keeps": f"keeps the baseline's {table.metric} to within {margin}",
        "loses": f"loses more than {margin} of the baseline's {table.metric}",
        "undecided": f"may or may not lose {margin} of the baseline's {table.metric}",
    }.get(row.verdict or "", f"has no verdict on {table.metric}")
    why = f"; {row.withheld}" if row.withheld else ""
    return f"{said} ({found}; n = {row.difference_n}{why})."


def _less(saved: float) -> str:
    return f"{100 * abs(saved):.1f} % {'fewer' if saved >= 0 else 'more'}"


def _time(row: MethodRow, table: GroupTable) -> str:
    if not table.devices_alike:
        return "Time can't be compared: trials ran on different devices."
    if table.timing_shared:
        return "Time was not measured: trials shared a device."
    if row.seconds_ratio is None or row.seconds_ratio_low is None:
        return "Time can't be compared."
    within = (
        f"× {row.seconds_ratio:.2f}, {row.seconds_ratio_low:.2f} to {row.seconds_ratio_high:.2f}"
    )
    said = {"less": "less", "more": "more", "unclear": "no clearly different"}
    if row.seconds_verdict is None:
        return f"Its time: {within}."
    return f"It takes {said[row.seconds_verdict]} time ({within})."
