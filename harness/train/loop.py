"""The loops over batches: one epoch of training, and the evaluation of a part of the data."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from harness import parallel
from harness.data.dataset import Microbatch
from harness.seeds import seed_globals
from harness.suite.config import Recipe
from harness.train.assembly import Assembly
from harness.train.tuning import autocast

EVALUATION_BYTES = 2**31  # for the outputs of one batch that are kept while deciding
EVALUATION_BATCH = 500  # samples, at the most


class Loop:
    """Trains and evaluates an assembly by its recipe, with the random streams of `seed`."""

    def __init__(self, assembly: Assembly, recipe: Recipe, seed: int) -> None:
        self._at_work, self._recipe, self._seed = assembly, recipe, seed
        self.evaluation_batch = assembly.costs.batch_within(EVALUATION_BYTES, EVALUATION_BATCH)

    def train(self, epoch: int) -> float:
        """Train one epoch; returns the mean loss over its samples, of all workers.

        Nothing in the loop waits for the device.
        """
        work = self._at_work
        # Dropout differs between processes, as it does between samples.
        seed_globals(self._seed, f"training{parallel.rank() or ''}", epoch)
        work.trained.train()
        total = torch.zeros((), dtype=torch.float64, device=work.device)
        for microbatch in work.batches.train(epoch):
            with self._communicating(microbatch):
                total += self._backward(microbatch) * len(microbatch.inputs)
            if microbatch.last:
                self._step()
                work.optimizer.zero_grad()
        if work.scheduler is not None and self._recipe.schedule == "epoch":
            work.scheduler.step()
        mean: float = parallel.add_up(total).item() / work.batches.size("train")
        return mean

    @torch.no_grad()
    def evaluate(self, part: str) -> tuple[float, float]:
        """(mean loss, metric) over "validation" or "test", of all workers.

        Without samples the loss is 0, and the metric what its meter says.
        """
        work = self._at_work
        work.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=work.device)
        meter = work.task.meter(work.device)
        for inputs, targets in work.batches.evaluate(part, self.evaluation_batch):
            inputs = work.tuning.apply(inputs)
            with self._autocast():
                outputs = work.model(inputs)
                total += work.task.loss(outputs, targets) * len(inputs)
            meter.add(outputs, targets)
        parallel.add_up(meter.counts)
        return float(parallel.add_up(total)) / max(work.batches.size(part), 1), meter.value()

    def _communicating(self, microbatch: Microbatch) -> AbstractContextManager[None]:
        """Gradients of several microbatches are added up first, and exchanged once."""
        trained = self._at_work.trained
        if isinstance(trained, DistributedDataParallel) and not microbatch.last:
            return trained.no_sync()
        return nullcontext()

    def _backward(self, microbatch: Microbatch) -> Tensor:
        work = self._at_work
        inputs, targets = work.task.mix(work.tuning.apply(microbatch.inputs), microbatch.targets)
        with self._autocast():
            outputs = work.trained(inputs)
            loss = work.task.loss(outputs, targets)
        work.method.after_forward(inputs, outputs)
        torch.autograd.backward(work.scaler.scale(loss * microbatch.weight))
        return loss.detach()

    def _step(self) -> None:
        work = self._at_work
        parameters = (p for group in work.optimizer.param_groups for p in group["params"])
        # The scaler refuses a step without gradients: everything stands still.
        if not work.scaler.is_enabled() or any(p.grad is not None for p in parameters):
            work.scaler.unscale_(work.optimizer)
            work.method.after_backward()
            work.scaler.step(work.optimizer)
            work.scaler.update()
            work.method.after_step()
        if work.scheduler is not None and self._recipe.schedule == "iteration":
            work.scheduler.step()

    def _autocast(self) -> torch.autocast:
        return autocast(self._at_work.device.type, self._recipe.precision)
