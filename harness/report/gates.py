"""Gates: bounds on what may change from one run to another."""

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from harness.errors import UserError

if TYPE_CHECKING:
    from harness.report.compare import Compared

# What a gate can look at: points of a difference, or per cent of a ratio.
POINTS = ("metric", "saved", "saved_required", "saved_paper")
REMOVED = ("parameters", "forward", "latency")  # of what prunes, once dead neurons are removed
PERCENT = ("seconds", "memory", "energy", *REMOVED)
GATE = re.compile(r"\s*([a-z_]+)\s*([<>])\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*(pp|%)\s*")
MORE_IS_BETTER = dict.fromkeys(POINTS, True) | dict.fromkeys(PERCENT, False)


@dataclass(frozen=True, slots=True)
class Gate:
    """A bound on the change of a method's mean, beyond which a comparison fails.

    `text`: as the user wrote it; `bound`: in percentage points, or per cent of a ratio.
    """

    text: str
    quantity: str
    sign: str
    bound: float

    def missed(self, change: float) -> bool:
        """Whether a change, in points or per cent, is beyond the bound."""
        beyond: Callable[[float, float], bool] = {"<": operator.lt, ">": operator.gt}[self.sign]
        return beyond(change, self.bound)


def gates(texts: Iterable[str]) -> list[Gate]:
    """The gates that `--fail-on` names ("metric<-0.5pp"); raises UserError for anything else."""
    return [_gate(text) for text in texts]


def _gate(text: str) -> Gate:
    found = GATE.fullmatch(text)
    quantity, sign, bound, unit = found.groups() if found else ("", "", "", "")
    if quantity not in MORE_IS_BETTER or unit != ("pp" if quantity in POINTS else "%"):
        known = f"{', '.join(POINTS)} in pp, {', '.join(PERCENT)} in %"
        raise UserError(f'--fail-on {text!r}: write it as "metric<-0.5pp"; there are {known}')
    return Gate(text.strip(), quantity, sign, float(bound))


def missed(bounds: list[Gate], methods: "list[Compared]") -> list[str]:
    """Gates that were, or can't be checked; what is only in B has nothing to be held against, and
    what does not prune has nothing removed.
    """
    if all(method.new for method in methods):
        return [f"{gate.text}: can't be checked (A has no finished trial)" for gate in bounds]
    found = [
        f"{gate.text}: can't be checked ({_no_pruner(methods)})"
        for gate in bounds
        if gate.quantity in REMOVED and not any(m.prunes and not m.new for m in methods)
    ]
    for gate, method in product(bounds, methods):
        if gate.quantity in REMOVED and not method.prunes:
            continue
        where = " ".join(filter(None, [method.suite, method.point, method.method]))
        change = next((c for c in method.changes if c.quantity == gate.quantity), None)
        if method.new:
            continue
        if method.lacking:
            why = f"B lacks seeds {_listed(method.lacking)}"
            found.append(f"{gate.text}: {where}: can't be checked ({why})")
        elif change is None or change.change is None:
            why = "not comparable" if method.why else f"no {gate.quantity} to compare"
            found.append(f"{gate.text}: {where}: can't be checked ({why})")
        elif change.lacking:
            why = f"B lacks {gate.quantity} of seeds {_listed(change.lacking)}"
            found.append(f"{gate.text}: {where}: can't be checked ({why})")
        elif gate.missed(round(change.change, 9)):
            unit = "pp" if gate.quantity in POINTS else "%"
            found.append(f"{gate.text}: {where}: {change.change:+.2f} {unit}")
    return found


def _no_pruner(methods: "list[Compared]") -> str:
    """Who has nothing that prunes."""
    new = [method.method for method in methods if method.prunes]
    if new:
        return f"nothing that prunes is in A; {', '.join(new)} is only in B"
    return "nothing that prunes is in A or B"


def _listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds))
