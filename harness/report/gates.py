"""Gates: bounds on what may change from one run to another."""

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from harness.errors import UserError

# What a gate can look at: points of a difference, or per cent of a ratio.
POINTS = ("metric", "saved", "saved_required", "saved_paper")
PERCENT = ("seconds", "memory", "energy")
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
    known = f"{', '.join(POINTS)} in pp, {', '.join(PERCENT)} in %"
    if found is None:
        raise UserError(f'--fail-on {text!r}: write it as "metric<-0.5pp"; there are {known}')
    quantity, sign, bound, unit = found.groups()
    if unit != ("pp" if quantity in POINTS else "%") or quantity not in MORE_IS_BETTER:
        raise UserError(f"--fail-on {text!r}: there are {known}")
    return Gate(text.strip(), quantity, sign, float(bound))
