"""The loop over batches: one epoch of training."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from harness import parallel
from harness.data.dataset import Microbatch
from harness.methods import Method
from harness.seeds import seed_globals
from harness.suite.config import Recipe
from harness.train.assembly import Assembly
from harness.train.tuning import autocast


class Loop:
    """Trains an assembly by its recipe, with the random streams of `seed`."""

    def __init__(self, assembly: Assembly, recipe: Recipe, seed: int) -> None:
        self._at_work, self._recipe, self._seed = assembly, recipe, seed
        hook = getattr(assembly.method.after_step, "__func__", None)
        self._minds_steps = hook is not Method.after_step

    def train(self, epoch: int) -> float:
        """Train one epoch; returns the mean loss over its samples, of all workers.

        Nothing in the loop waits for the device, unless a method wants to know whether a GradScaler
        has skipped a step.
        """
        for total in self.steps(epoch):  # noqa: B007 — the last one is that of the epoch
            pass
        mean: float = parallel.add_up(total).item() / self._at_work.batches.size("train")
        return mean

    def steps(self, epoch: int) -> Iterator[Tensor]:
        """Train one epoch; gives, after each step, the sum of its samples' losses so far."""
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
                yield total
        self._schedule("epoch")

    def follow(self, loss: float) -> None:
        """After an epoch, with its validation loss, for a scheduler that follows that."""
        scheduler = self._at_work.scheduler
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss)

    def _schedule(self, now: str) -> None:
        scheduler = self._at_work.scheduler
        if scheduler is None or isinstance(scheduler, ReduceLROnPlateau):
            return
        if self._recipe.schedule == now:
            scheduler.step()

    def _communicating(self, microbatch: Microbatch) -> AbstractContextManager[None]:
        """Gradients of several microbatches are added up first, and exchanged once."""
        trained = self._at_work.trained
        if isinstance(trained, DistributedDataParallel) and not microbatch.last:
            return trained.no_sync()
        return nullcontext()

    def forward(self, microbatch: Microbatch) -> tuple[Tensor, Any, Any, Tensor]:
        """Inputs and targets as they are trained on, the outputs, and their mean loss."""
        work = self._at_work
        inputs, targets = work.task.mix(work.tuning.apply(microbatch.inputs), microbatch.targets)
        with self._autocast():
            outputs = work.trained(inputs)
            loss = work.task.loss(outputs, targets)
        return inputs, targets, outputs, loss

    def _backward(self, microbatch: Microbatch) -> Tensor:
        work = self._at_work
        inputs, targets, outputs, loss = self.forward(microbatch)
        work.method.after_forward(
            inputs, targets, outputs, weight=microbatch.weight, last=microbatch.last
        )
        torch.autograd.backward(work.scaler.scale(loss * microbatch.weight))
        return loss.detach()

    def _step(self) -> None:
        work, scaler = self._at_work, self._at_work.scaler
        parameters = (p for group in work.optimizer.param_groups for p in group["params"])
        # The scaler refuses a step without gradients: everything stands still.
        steps = not scaler.is_enabled() or any(p.grad is not None for p in parameters)
        if steps:
            scaler.unscale_(work.optimizer)
        work.method.after_backward()
        if steps and self._made(work):
            work.method.after_step()
        self._schedule("iteration")

    def _made(self, work: Assembly) -> bool:
        """Let the optimizer step; whether it has, as far as the method minds."""
        watched = self._minds_steps and work.scaler.is_enabled()
        # A fused optimizer skips a step on the device, so that its hooks are called all the same:
        # what tells is that the scale falls. Reading it waits for the device.
        before = work.scaler.get_scale() if watched else 0.0
        work.scaler.step(work.optimizer)
        work.scaler.update()
        return not watched or work.scaler.get_scale() >= before

    def _autocast(self) -> torch.autocast:
        return autocast(self._at_work.device.type, self._recipe.precision)
