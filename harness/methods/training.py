"""What a training method is given of the trial that it works in."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import neq
from harness.flops.costs import Costs
from harness.seeds import generator


class Weights:
    """A place for the best weights of `model`: parameters and buffers, kept with checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[str, Any] | None = None

    def keep(self) -> None:
        """Copy the model's weights as they are now, in the place of earlier ones."""
        self._kept = copy.deepcopy(dict(self._model.state_dict()))

    @torch.no_grad()
    def bring_back(self) -> None:
        """Give the model the weights that were kept; the optimizer's state stays as it is.

        Raises ValueError where none were.
        """
        if self._kept is None:
            raise ValueError("no weights were kept: call keep() before bring_back()")
        self._model.load_state_dict(self._kept)

    def state_dict(self) -> dict[str, Any]:
        """The weights by name; empty where none were kept."""
        return dict(self._kept or {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        device = next(self._model.parameters()).device
        moved = ((n, v.to(device) if isinstance(v, Tensor) else v) for n, v in state.items())
        self._kept = dict(moved) or None


@dataclass(slots=True, kw_only=True)
class Training:
    """The trial as its method sees it.

    `model`: the bare module, on its device; `exclude`: layers, or dotted prefixes of their names,
    that must not freeze. `costs`: FLOPs of the model's passes, and `costs.neurons`, the index of
    its neurons. `epochs`: of the whole training; `samples`: how many there are of "train" (in an
    epoch) and "validation", of all workers together. `timings`: of backward kernels. `best`: a
    place for the best weights. `validation_batches()`: (inputs, targets) of this worker's share of
    the validation samples; `validation_loss()`: what `evaluate` returns, not counted.
    """

    model: nn.Module
    optimizer: Optimizer
    exclude: tuple[str, ...]
    costs: Costs
    epochs: int
    samples: Mapping[str, int]
    seed: int
    timings: neq.Timings
    best: Weights
    validation_batches: Callable[[], Iterable[tuple[Tensor, Any]]]
    validation_loss: Callable[[], float]
    _evaluations: int = field(default=0, init=False)
    _counting: bool = field(default=False, init=False)

    def evaluate(self, part: str) -> float:
        """The mean loss over the samples of `part`, of all workers; its FLOPs are `overhead`.

        Every worker must ask at the same time, in `start`, in a step or in `end_epoch`. Modes and
        random streams are left as they were. Raises ValueError for any part but "validation",
        where there are no such samples, and in hooks that only tell what the epoch was like.
        """
        if not self._counting:
            raise ValueError(
                "evaluate: ask in start, in a step or in end_epoch, where it is counted"
            )
        if part != "validation":
            raise ValueError(f'evaluate({part!r}): a method may decide on "validation" alone')
        if not self.samples[part]:
            raise ValueError("evaluate: data.validation_size is 0; it must be at least 1")
        self._evaluations += 1
        return self.validation_loss()

    def count(self) -> None:
        """From here on evaluations are counted."""
        self._counting = True

    def overhead(self) -> int:
        """FLOPs of the evaluations that were counted; until `count` there may be no others."""
        flops = self._evaluations * self.costs.evaluation(self.samples["validation"])
        self._evaluations, self._counting = 0, False
        return flops

    def generator(self, purpose: str, epoch: int = 0) -> torch.Generator:
        """A random stream of the method's own, on the CPU, that follows from (seed, purpose,
        epoch): nothing has to be stored to resume.
        """
        return generator(self.seed, f"method: {purpose}", epoch)
