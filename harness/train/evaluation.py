"""Loss and metric of a model over a part of the data."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from harness import parallel
from harness.data.dataset import Batch, Batches
from harness.seeds import restored
from harness.tasks import Task
from harness.train.tuning import Tuning, autocast


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Evaluates `model` as it is, in batches of at most `batch_size` samples."""

    model: nn.Module
    task: Task
    batches: Batches
    tuning: Tuning
    device: torch.device
    precision: str
    batch_size: int

    def part(self, name: str) -> Iterable[Batch]:
        """Batches of this worker's share of "validation" or "test"."""
        return self.batches.evaluate(name, self.batch_size)

    def loss(self, part: str) -> float:
        """The mean loss over "validation" or "test", of all workers; 0 without samples."""
        return self.loss_and_metric(part)[0]

    def loss_and_metric(self, part: str) -> tuple[float, float]:
        """(mean loss, metric) over "validation" or "test", of all workers.

        Without samples the loss is 0, and the metric what its meter says.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        meter = self.task.meter(self.device)
        with self._undisturbed():
            for inputs, targets in self.part(part):
                inputs = self.tuning.apply(inputs)
                with autocast(self.device.type, self.precision):
                    outputs = self.model(inputs)
                    total += self.task.loss(outputs, targets) * len(inputs)
                meter.add(outputs, targets)
        parallel.add_up(meter.counts)
        return float(parallel.add_up(total)) / max(self.batches.size(part), 1), meter.value()

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Eval mode, no gradients; afterwards modes and random streams are as they were."""
        modes = {module: module.training for module in self.model.modules()}
        gpus = [self.device] if self.device.type == "cuda" else []
        self.model.eval()
        try:
            with torch.random.fork_rng(gpus), restored(), torch.no_grad():
                yield
        finally:
            for module, training in modes.items():
                module.training = training
