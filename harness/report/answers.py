"""The report in a sentence or some for each method in question."""

import math

from harness.report.beside_words import beside_answers
from harness.report.grouped import MOST, groups_answer
from harness.report.method_row import MethodRow, Pruned, Replays
from harness.report.model import GroupTable
from harness.report.removed_view import removed_answer
from harness.report.words import percent, signed
from harness.suite.method_specs import kind_of

FEW = 6  # methods that prune, of which a short sentence is said


def answers(table: GroupTable) -> list[str]:
    """A sentence for each method in question, no baseline and no control, for each that decides by
    groups one beside single neurons, and for each gradual pruning one beside one-shot pruning.

    There are none where methods are many, as in a sweep, or were trained on noise. Of a few more
    that prune, each has what removal makes of it.
    """
    rows = [row for row in table.methods if kind_of(row.parameters).in_question and row.n]
    if table.synthetic:
        return []
    if len(rows) <= MOST:
        own = [_answer(row, table) for row in rows]
    else:
        known = [(row, removed_answer(row)) for row in rows]
        own = [_short(row, text) for row, text in known if text]
        own = own if len(own) <= FEW else []
    grouped = groups_answer(table.grouped, table.metric, table.margin)
    return own + beside_answers(table) + grouped


def _short(row: MethodRow, text: str) -> str:
    """Of one of many that prune: what it leaves, and what removal makes of that."""
    left = row.pruned.parameters_left_share
    leaves = "" if left is None else f"It leaves {percent(left)} % of the parameters. "
    return f"{row.label}: {leaves}{text}"


def _answer(row: MethodRow, table: GroupTable) -> str:
    executes = (
        f"It executes {_less(row.savings.saved)} backward FLOPs, deciding counted in "
        f"({_less(row.savings.saved_paper)} by the paper's count)."
    )
    known = [executes] if math.isfinite(row.savings.saved + row.savings.saved_paper) else []
    left, after = _left(row.pruned), removed_answer(row)
    parts = [row.label, _kept(row, table), *known, *left, _time(row, table), after]
    return " ".join(part for part in parts if part)


def _left(pruned: Pruned) -> list[str]:
    """A sentence on what pruning has left and cost, if any of that is known."""
    shares = {"parameters": pruned.parameters_left_share, "neurons": pruned.neurons_left_share}
    left = [
        f"{percent(share)} % of the {name}" for name, share in shares.items() if share is not None
    ]
    cost = pruned.training_cost
    price = None if cost is None else f"{cost:.2f} times the FLOPs of plain training"
    if not left:
        return [f"Its training takes {price}."] if price else []
    return [f"It leaves {' and '.join(left)}{f', for {price}' if price else ''}."]


def _kept(row: MethodRow, table: GroupTable) -> str:
    quality, metric, takes = row.quality, table.metric, _replayed(row.replays)
    if quality.difference is None:
        reached = f"{100 * quality.metric_mean:.2f} %"
        more = f" It {takes}." if takes else ""
        return f"has {reached} {metric}, and no baseline to compare with.{more}"
    found = f"{signed(quality.difference)} points"
    if quality.difference_low is not None:
        found += f", between {signed(quality.difference_low)} and {signed(quality.difference_high)}"
    margin = f"{table.margin:g} points"
    answer = {
        "keeps": f"keeps the baseline's {metric} to within {margin}",
        "loses": f"loses more than {margin} of the baseline's {metric}",
        "undecided": f"may or may not lose {margin} of the baseline's {metric}",
    }.get(quality.verdict or "", f"has no verdict on {metric}")
    why = f"; {row.withheld}" if row.withheld else ""
    return (
        f"{answer} ({found}; n = {quality.difference_n}{why}){f', and {takes}' if takes else ''}."
    )


def _replayed(found: Replays) -> str:
    """What it takes of plain training's seconds and bytes, by the replays; empty: not known."""
    ratio, kept = found.seconds_replayed_ratio, found.activation_ratio
    parts, whose = [], "the baseline's"
    if ratio is not None and found.ends and not found.seconds_replayed_withheld:
        low, high = found.ends
        parts = [f"× {ratio:.2f} of {whose} time (replayed; {low:.2f} to {high:.2f})"]
        whose = "its"
    if kept is not None:
        parts.append(f"× {kept:.2f} of {whose} activations' bytes")
    return f"takes {' and '.join(parts)}" if parts else ""


def _less(saved: float) -> str:
    return f"{100 * abs(saved):.1f} % {'fewer' if saved >= 0 else 'more'}"


def _time(row: MethodRow, table: GroupTable) -> str:
    if not table.devices_alike:
        return "Time can't be compared: trials ran on different devices."
    if table.timing_withheld:
        return _unmeasured(row, table.timing_withheld)
    measured = row.measured
    if measured.seconds_ratio is None or measured.seconds_ratio_low is None:
        return "Time can't be compared."
    ends = f"{measured.seconds_ratio_low:.2f} to {measured.seconds_ratio_high:.2f}"
    within = f"× {measured.seconds_ratio:.2f}, {ends}"
    words = {"less": "less", "more": "more", "unclear": "no clearly different"}
    if measured.seconds_verdict is None:
        return f"Its time: {within}."
    return f"It takes {words[measured.seconds_verdict]} time ({within})."


def _unmeasured(row: MethodRow, why: str) -> str:
    """What there is to say on time where the trials' own seconds are none."""
    replayed = row.replays
    if replayed.seconds_replayed_withheld:
        return f"Time was not measured: {replayed.seconds_replayed_withheld} during the replay."
    return f"Time was not measured: {why}." if replayed.seconds_replayed_ratio is None else ""
