"""What one supported layer costs, forward and backward."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from neq import Layer
from neq.autograd_graph import Call

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one supported layer that was called costs, over a batch of `BATCH`.

    `flops`: of its forward; `operations`: what the paper's convention counts of that; `bits`: its
    trainable parameters, `learns`: whether its weight is one of them.
    """

    layer: Layer
    flops: int
    operations: int
    calls: tuple[Call, ...]
    bits: int
    learns: bool

    def dense(self) -> int:
        """Weight gradient, and input gradient wherever a parameter lies upstream."""
        return sum(
            share * (self.learns + bool(call.upstream)) for share, call in self._shares(self.calls)
        )

    def paper(self, trainable: int) -> int:
        """By the published rule, with so many of its neurons training."""
        return 2 * self.operations * trainable // self.layer.size

    def computed(self, rows: int, calls: Iterable[Call], live: int, through: int) -> int:
        """With `rows` of the weight gradient and an input gradient through `through` of the rows,
        where a parameter that trains lies upstream: bit i of `live` for parameter i.
        """
        return sum(
            share * (rows * self.learns + through * bool(call.upstream & live)) // self.layer.size
            for share, call in self._shares(calls)
        )

    def passed(self, bits: int) -> Iterator[int]:
        """FLOPs of the input gradient of each call whose input depends on a parameter of `bits`."""
        return (share for share, call in self._shares(self.calls) if call.upstream & bits)

    def _shares(self, calls: Iterable[Call]) -> Iterator[tuple[int, Call]]:
        """(FLOPs of its forward, call) for each of the calls that a backward visits."""
        elements = sum(call.elements for call in self.calls)
        for call in calls if self.flops else ():
            if call.reached:
                yield self.flops * call.elements // elements, call
