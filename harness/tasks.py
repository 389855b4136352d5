"""What a model is trained for: its loss and its metric. The trial's loop knows no more of it."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Meter(Protocol):
    """Accumulates a metric on the device; `value` is the only synchronisation."""

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """One batch."""
        ...

    def value(self) -> float:
        """The metric over all batches added."""
        ...


class Classification:
    """Cross-entropy and top-1 accuracy (a share, 0 to 1)."""

    metric = "accuracy"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch of outputs [samples, classes] and targets [samples]."""
        return functional.cross_entropy(outputs, targets)

    def meter(self) -> "Accuracy":
        """A fresh accumulator."""
        return Accuracy()


class Accuracy:
    """Share of samples whose largest output is the target's."""

    def __init__(self) -> None:
        self._correct: Tensor | int = 0
        self._samples = 0

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """One batch: outputs [samples, classes], targets [samples]."""
        self._correct = self._correct + (outputs.argmax(1) == targets).sum(dtype=torch.int64)
        self._samples += len(targets)

    def value(self) -> float:
        """0 to 1; NaN without samples."""
        return int(self._correct) / self._samples if self._samples else float("nan")
