"""Activation checkpointing: what a backward computes of the forward once more, under a mask."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from harness.flops.executed import Products
from neq import Layer, LayerPlan, NeuronIndex
from neq.calls import Run, tensors
from neq.kernels import rows_for
from neq.selective import assign, geometry, prepare, release
from neq.work import Work

COMPILED = "activation checkpointing that is compiled, whose compiler chooses what to recompute"


class Recomputed:
    """FLOPs of what a backward recomputes, measured in one: they depend on what layers keep for it.

    A region is computed again where any of what it saved is asked for, and as far as the last of
    that. So it matters which layers are frozen whole, and which compute some rows; each such state
    is measured once.
    """

    def __init__(self, model: nn.Module, run: Run, neurons: NeuronIndex) -> None:
        """`model`: a copy that is nobody else's, and that `run` gives a forward; `neurons`: its."""
        self._model, self._run, self._neurons = model, run, neurons
        self._known: dict[tuple[tuple[bool, bool, bool], ...], int] = {}

    def __call__(self, frozen: Tensor, plan: Mapping[str, LayerPlan]) -> int:
        """While `frozen`, bool [neurons], stand still and `plan` says how layers are computed."""
        parts = [(frozen[layer.neurons], plan[layer.name]) for layer in self._neurons.layers]
        state = tuple((_is_plain(rows, p), p.kernel == "skip", p.cut) for rows, p in parts)
        if state not in self._known:
            self._known[state] = self._measured(frozen, plan)
        return self._known[state]

    def _measured(self, frozen: Tensor, plan: Mapping[str, LayerPlan]) -> int:
        prepared = []
        for layer in self._neurons.layers:
            part = plan[layer.name]
            prepared.append((layer.module, prepare(layer.module, part.cut)))
            assign(layer.module, _work(layer, frozen[layer.neurons], part))
        try:
            with torch.enable_grad(), torch.random.fork_rng([]), _recomputations() as counter:
                outputs = tensors(self._run(self._model.train()))
                losses = [output.sum() for output in outputs if output.requires_grad]
                if losses:
                    torch.autograd.backward(torch.stack(losses).sum())
        finally:
            self._model.zero_grad()
            for module, traced in prepared:
                release(module, traced)
        return counter.recomputed


def _is_plain(frozen: Tensor, part: LayerPlan) -> bool:
    return not bool(frozen.any()) or (part.kernel == "dense" and not part.cut)


def _work(layer: Layer, frozen: Tensor, part: LayerPlan) -> Work | None:
    """What `part` of a plan gives the layer to do."""
    if _is_plain(frozen, part):
        return None
    shape = geometry(layer.module)
    if part.kernel == "skip":
        return Work("skip", None, part.cut, shape)
    return Work(part.kernel, rows_for(part.kernel, frozen, shape), part.cut, shape)


class _Again(Products):  # type: ignore[no-untyped-call]
    """Counts apart, as `recomputed`, what is computed inside `depth` recomputations."""

    def __init__(self) -> None:
        super().__init__()
        self.recomputed = self.depth = 0

    def _note(self, func: Any, flops: int, given: Any, result: Any) -> None:
        self.recomputed += flops * bool(self.depth)


@contextmanager
def _recomputations() -> Iterator[_Again]:
    """Inside, products are counted, and those apart that PyTorch's checkpointing does again."""
    module: Any = torch.utils.checkpoint
    before: Any = module._recomputation_hook
    counter = _Again()

    class Hook(before):  # type: ignore[misc]
        def __enter__(self) -> None:
            counter.depth += 1
            super().__enter__()

        def __exit__(self, *error: object) -> None:
            counter.depth -= 1
            super().__exit__(*error)

    module._recomputation_hook = Hook
    try:
        with counter:
            yield counter
    finally:
        module._recomputation_hook = before
