"""The forwards of a model, in train mode and in eval mode: what is executed, and what is known."""

from typing import Any

from harness.flops.executed import Executed
from harness.flops.fvcore_counts import ForwardCounts


class Forward:
    """FLOPs of one forward over a whole batch.

    `flops`: of it as it is counted; `done`: with products that nothing depends on, which fvcore
    leaves out; `missing`: what fvcore sees and PyTorch was not seen to do.
    """

    def __init__(self, executed: Executed, traced: ForwardCounts) -> None:
        seen = 2 * traced.total
        self.done = executed.flops
        self.flops = max(executed.needed, min(seen, self.done))
        self.missing = max(seen - self.done, 0)


class Forwards:
    """One forward in train mode, and one in eval mode without gradients, as deciding does it.

    `names`: of what multiplies and can't be counted, in these or in a backward; `foreign`:
    operators whose bodies were counted.
    """

    def __init__(
        self,
        train: tuple[Executed, ForwardCounts],
        evaluation: tuple[Executed, ForwardCounts],
        names: set[str],
        foreign: set[Any],
    ) -> None:
        """`names`, `foreign`: of those that were met elsewhere."""
        self.train, self.evaluation = Forward(*train), Forward(*evaluation)
        self.names, self.foreign = set(names), set(foreign)
        for mode, forward in (("train", self.train), ("eval", self.evaluation)):
            if forward.missing:
                flops = f"{forward.missing:,} FLOPs of a batch of two in {mode} mode"
                self.names.add(f"{flops} that only fvcore sees")
        for executed, traced in (train, evaluation):
            self.names |= executed.names.union(traced.uncounted)
            self.foreign |= executed.opened
