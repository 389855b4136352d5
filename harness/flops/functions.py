"""What the backward of a custom autograd.Function multiplies: measured, by who needs a gradient."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from harness.flops.executed import Products

MOST_OPERANDS = 6  # a backward is tried for each set of them
Subset = tuple[int, ...]


class Functions:
    """Measures backwards of custom autograd.Functions, on a copy of the model.

    `names`: of those that can't be; `opened`: foreign operators in them whose bodies were counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self.names: set[str] = set()
        self.opened: set[Any] = set()

    def __call__(self, node: Any) -> list[tuple[list[Node], int]]:
        """(operands, FLOPs) for parts of its backward; see `neq.products.Opaque`."""
        function: type = type(node)._forward_cls
        if function is torch.utils.checkpoint.CheckpointFunction:
            self.names.add("torch.utils.checkpoint with use_reentrant=True")
            return []
        try:
            return self._parts(node)
        except Exception:
            name = function.__qualname__.rpartition(">.")[2]
            self.names.add(f"{name} (a custom autograd.Function: its backward is its own)")
            return []

    def _parts(self, node: Any) -> list[tuple[list[Node], int]]:
        operands = [source for source, _ in node.next_functions if source is not None]
        places = [place for place, needed in enumerate(node.needs_input_grad) if needed]
        everyone = tuple(range(len(operands)))
        if len(places) != len(operands):
            raise ValueError("its operands can't be told apart")
        flops: dict[Subset, int] = {(): 0}
        if not self._flops(node, places, everyone):
            return []
        if len(operands) > MOST_OPERANDS:
            raise ValueError("it has too many operands")
        for subset in _subsets(everyone):
            flops[subset] = self._flops(node, places, subset)
        return [([operands[i] for i in part], n) for part, n in _by_any_of(everyone, flops)]

    def _flops(self, node: Any, places: list[int], subset: Subset) -> int:
        """FLOPs of its backward where the operands of `subset` need a gradient."""
        before = node.needs_input_grad
        wanted = {places[i] for i in subset}
        node.needs_input_grad = tuple(place in wanted for place in range(len(before)))
        gradients = [torch.ones(m.shape, dtype=m.dtype) for m in node._input_metadata]
        try:
            with torch.no_grad(), Products() as products:
                node.apply(*gradients)
        finally:
            node.needs_input_grad = before
            trained = self._trained()
        self.names |= products.names
        self.opened |= products.opened
        if trained:
            raise ValueError("it trains parameters that are no operands")
        flops: int = products.flops
        return flops

    def _trained(self) -> bool:
        """Whether a parameter has been given a gradient, which is let go."""
        found: list[Tensor] = [p for p in self._parameters if p.grad is not None]
        for parameter in found:
            parameter.grad = None
        return bool(found)


def _subsets(of: Subset) -> Iterator[Subset]:
    """All but the empty one."""
    for size in range(len(of)):
        yield from combinations(of, size + 1)


def _by_any_of(everyone: Subset, flops: dict[Subset, int]) -> Iterator[tuple[Subset, int]]:
    """(set, FLOPs) such that `flops` of any set is the sum over those with a member in it."""
    # What is saved without a set's members is the sum over the sets inside of it.
    saved = {some: flops[everyone] - flops[_without(everyone, some)] for some in _subsets(everyone)}
    for some in saved:
        share = sum((-1) ** (len(some) - len(part)) * saved[part] for part in _subsets(some))
        if share:
            yield some, share


def _without(everyone: Subset, some: Subset) -> Subset:
    return tuple(place for place in everyone if place not in some)
