"""When to prune: at a plateau of the validation loss, or by a schedule of epochs."""

import math
from dataclasses import dataclass
from typing import Any, Literal

Shape = Literal["cubic", "linear", "cycles"]
SHAPES = ("cubic", "linear", "cycles")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Prunings after `begin` epochs, up to `end` epochs, by when `sparsity` is reached.

    `sparsity`: the share of weights, or neurons, that is pruned in the end. `shape`, with t from 0
    to 1 over the prunings: "cubic" has s · (1 − (1 − t)³) (Zhu and Gupta, arXiv 1710.01878),
    "linear" s · t, "cycles" takes the same share of the survivors each time: 1 − (1 − s)^t.
    `prunings`: how many, evenly spread (default: one after each epoch); one is one-shot pruning, at
    `end`. Raises ValueError for a sparsity that is not between 0 and 1, for epochs out of order,
    and more prunings than epochs.
    """

    sparsity: float
    begin: int = 0
    end: int
    shape: Shape = "cubic"
    prunings: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity must be above 0 and below 1, got {self.sparsity}")
        if not 0 <= self.begin < self.end:
            raise ValueError(
                f"a schedule begins at epoch 0 or later, and ends after that; got {self.begin} "
                f"to {self.end}"
            )
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        if self.prunings is not None and not 1 <= self.prunings <= self.end - self.begin:
            raise ValueError(
                f"prunings must be 1 to {self.end - self.begin}, one for each epoch, got "
                f"{self.prunings}"
            )

    def target(self, done: int) -> float | None:
        """The sparsity to prune to after `done` epochs; None: not now."""
        epochs = self.end - self.begin
        count = epochs if self.prunings is None else self.prunings
        number = math.ceil((done - self.begin) * count / epochs)
        if not 1 <= number <= count or done != self.begin + number * epochs // count:
            return None
        t = number / count
        if number == count:
            return self.sparsity
        if self.shape == "cubic":
            return self.sparsity * (1 - (1 - t) ** 3)
        return self.sparsity * t if self.shape == "linear" else 1 - (1 - self.sparsity) ** t


class Plateau:
    """Tells when the validation loss does not fall any more (PWE, plateau waiting epochs).

    An epoch is bad where its loss is `tolerance` (relative) above the best, or more; `patience` bad
    ones in a row are a plateau. Then the best is forgotten. As the authors' code does it (SeReNe,
    LOBSTER): with 0 every epoch is one. Raises ValueError for negative arguments.
    """

    def __init__(self, patience: int, tolerance: float = 0.01) -> None:
        if not (patience >= 0 and tolerance >= 0):
            raise ValueError(
                f"patience and tolerance must be 0 or more, got {patience}, {tolerance}"
            )
        self.patience, self.tolerance = patience, tolerance
        self.best = math.inf
        self.bad = 0
        self.improved = False

    def step(self, loss: float) -> bool:
        """Take in an epoch's `loss`; returns whether it ends a plateau.

        Afterwards `improved` says whether it was the best so far: the time to keep a copy of the
        weights. At a plateau bring that copy back.
        """
        self.improved = loss < self.best
        known = math.isfinite(self.best)
        bound = self.best + self.tolerance * abs(self.best) if known else math.inf
        self.bad = 0 if loss < bound else self.bad + 1
        if self.improved:
            self.best = loss
        if self.bad < self.patience:
            return False
        self.best, self.bad = math.inf, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for `load_state_dict`."""
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.best, self.bad = state["best"], state["bad"]
