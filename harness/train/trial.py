"""One trial as a generator of epoch records, resumed from its checkpoint where there is one.

Resumed equals uninterrupted, bit for bit on the CPU: every random stream follows from (seed,
purpose, epoch), and the checkpoint holds all other state together with the rows so far. Where
torch.distributed has several processes, each runs this and the trial is theirs together.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from harness import parallel
from harness.data.dataset import Forward
from harness.data.load import load_data
from harness.errors import UserError, line
from harness.flops.costs import measure
from harness.methods.freezing import Freezing
from harness.run.events import Notice, went_on
from harness.seeds import seed_globals
from harness.storage.locations import StorageError
from harness.storage.recorder import Rows
from harness.storage.schema import EpochRecord
from harness.suite.config import TrialSpec
from harness.suite.parts import build_model
from harness.tasks import build_task
from harness.train import weights
from harness.train.energy import Energy
from harness.train.optimizers import build_optimizer
from harness.train.tuning import Tuning, autocast, check_precision, kept
from neq.parallel import broadcast_buffers
from neq.timings import stopwatch

DECIDING_BYTES = 2**31  # for the outputs of one batch that are kept while deciding
EVALUATION_BATCH = 500  # at the most


class DivergedError(Exception):
    """The training loss is not finite any more."""


class Trial:
    """The training of one spec: all its state, and the loop over its epochs."""

    def __init__(self, spec: TrialSpec, rows: Rows) -> None:
        self.spec, self.suite, self.recipe = spec, spec.suite, spec.suite.recipe
        self.store, self.rows = rows.store, rows
        self.device = parallel.device(rows.slot.gpu)
        self.energy = Energy(self.device, shared=rows.slot.sharing > 1)

    def records(self) -> Iterator[EpochRecord | Notice]:
        """All epochs from 0 on: the committed ones from the checkpoint, the others computed."""
        damaged: list[str] = []
        state = self.store.load_checkpoint(self.spec.key, damaged.append)
        for path in damaged:
            yield went_on(path)
        if state is not None:
            with self._fitting():
                self.rows.load(state["rows"])
        if not parallel.equal(len(self.rows.epochs)):
            raise UserError(
                f"the workers do not find the same checkpoint below {self.store.place.uri}; "
                "--results must lie where every node sees it"
            )
        for record in list(self.rows.epochs):  # noqa: UP028 — Ray sends; a list can't receive
            yield record
        self.rows.publish()
        parallel.wait()
        if self.rows.complete:
            return
        check_precision(self.recipe.precision, self.device)
        torch.set_num_threads(self.rows.threads)
        self._build(state)
        if state is None:
            self.method.start(self._deciding())
        else:
            with self._fitting():
                self._restore(state)
        del state
        for epoch in range(len(self.rows.epochs), self.recipe.epochs):
            yield self._epoch(epoch)

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """Raises StorageError where a checkpoint is whole, and yet not one of this trial."""
        try:
            yield
        except Exception as error:
            raise StorageError(
                f"{self.store.place.path('checkpoints')}/{self.spec.key} does not fit this "
                f"neqbench ({line(error)}); use what wrote it, or delete it: the trial "
                "is computed anew"
            ) from error

    def _build(self, state: dict[str, Any] | None) -> None:
        parts, seed, folder = self.suite.model, self.spec.seed, self.spec.folder
        data = load_data(self.suite, folder)
        loaders = self.suite.resources.cpus if self.device.type == "cuda" else 0
        self.batches = data.open(self.device, seed, self.recipe, loaders=loaders)
        self.task = build_task(self.suite, folder)
        seed_globals(seed, "initialisation")
        model = build_model(parts.build, folder, parts.arguments)
        weights.load(model, parts)
        self.costs = measure(model, parts.input, parts.unpublished)
        self.evaluated = self.costs.batch_within(DECIDING_BYTES, EVALUATION_BATCH)
        model = model.to(self.device)
        self.tuning = Tuning.from_json(state["tuning"]) if state else self._tuned(model)
        self.model = self.tuning.convert(model)
        self.optimizer, self.scheduler = build_optimizer(
            self.suite.name, self.recipe, model, self.batches.steps
        )
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.recipe.precision == "fp16"
        )
        self.trained = model if parallel.workers() == 1 else DistributedDataParallel(model)
        fixed = [*parts.exclude, *self.costs.uncalled]
        self.method = Freezing(
            self.spec.spec, self.model, self.optimizer, fixed, seed, self.tuning.timings
        )

    def _tuned(self, model: torch.nn.Module) -> Tuning:
        """Measured by one process, for all of them."""
        tuned = kept(self.store, self.suite, model).to_json() if parallel.leads() else None
        return Tuning.from_json(parallel.shared(tuned))

    def _deciding(self) -> Iterator[Any]:
        return self.batches.evaluate("validation", self.evaluated)

    def _stateful(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "method": self.method,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _restore(self, state: dict[str, Any]) -> None:
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])

    def _commit(self) -> None:
        if not parallel.leads():
            return
        state = {name: part.state_dict() for name, part in self._stateful().items()}
        state |= {"tuning": self.tuning.to_json(), "rows": self.rows.state()}
        done, last = len(self.rows.epochs), self.rows.complete
        self.store.save_checkpoint(self.spec.key, done, state, last=last)

    def _epoch(self, epoch: int) -> EpochRecord:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        frozen, samples = self.method.freezer.frozen, self.batches.size("train")
        plan = self.method.freezer.plan
        backward = self.costs.backward(frozen, samples, plan)
        layers = self.costs.layers(frozen, samples, plan)
        lr = float(self.optimizer.param_groups[0]["lr"])
        with self.energy.measuring():
            train_loss, seconds_train = self._timed(lambda: self._train(epoch))
        _check_finite("training loss", train_loss, epoch)
        broadcast_buffers(self.model)
        (val_loss, test_loss, metric), seconds_test = self._timed(self._test)
        _check_finite("test loss", test_loss, epoch)
        validation = self.batches.size("validation")
        with self.energy.measuring():
            _, seconds_equilibrium = self._timed(lambda: self.method.end_epoch(self._deciding()))
        parallel.agree(self.model, self.method.freezer.frozen)
        record = EpochRecord(
            epoch=epoch,
            samples=samples,
            lr=lr,
            train_loss=train_loss,
            val_loss=val_loss if validation else None,
            test_loss=test_loss,
            test_metric=metric,
            frozen_neurons=int(frozen.sum()),
            total_neurons=len(frozen),
            forward_flops=self.costs.forward(samples),
            backward_flops_dense=backward.dense,
            backward_flops_paper=backward.paper,
            backward_flops_required=backward.required,
            backward_flops_executed=backward.executed,
            overhead_flops=self.method.overhead(self.costs, validation),
            seconds_train=seconds_train,
            seconds_equilibrium=seconds_equilibrium,
            seconds_test=seconds_test,
            seconds_checkpoint=None,
            peak_memory_bytes=self._peak_memory(),
            energy_joules=self.energy.take(),
        )
        self.rows.add(record, frozen, layers, self.method.freezer)
        _, seconds = self._timed(self._commit)
        record = self.rows.committed(seconds)
        parallel.wait()  # what another process may store next comes after this
        return record

    def _train(self, epoch: int) -> float:
        """One epoch; the mean loss. Nothing in the loop waits for the device."""
        # Dropout differs between processes, as it does between samples.
        seed_globals(self.spec.seed, f"training{parallel.rank() or ''}", epoch)
        self.trained.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for forward in self.batches.train(epoch):
            with self._communicating(forward):
                total += self._backward(forward) * len(forward.inputs)
            if forward.last:
                self._step()
                self.optimizer.zero_grad()
        if self.scheduler is not None and self.recipe.schedule == "epoch":
            self.scheduler.step()
        mean: float = parallel.add_up(total).item() / self.batches.size("train")
        return mean

    def _communicating(self, forward: Forward) -> AbstractContextManager[None]:
        """Gradients of several forwards are added up first, and exchanged once."""
        if isinstance(self.trained, DistributedDataParallel) and not forward.last:
            return self.trained.no_sync()
        return nullcontext()

    def _backward(self, forward: Forward) -> Tensor:
        inputs, targets = self.task.mix(self.tuning.apply(forward.inputs), forward.targets)
        with self._autocast():
            outputs = self.trained(inputs)
            loss = self.task.loss(outputs, targets)
        self.method.after_forward(inputs, outputs)
        torch.autograd.backward(self.scaler.scale(loss * forward.weight))
        return loss.detach()

    def _step(self) -> None:
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        # The scaler refuses a step without gradients: everything stands still.
        if not self.scaler.is_enabled() or any(p.grad is not None for p in parameters):
            self.scaler.unscale_(self.optimizer)
            self.method.after_backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.method.after_step()
        if self.scheduler is not None and self.recipe.schedule == "iteration":
            self.scheduler.step()

    def _test(self) -> tuple[float, float, float]:
        """(validation loss, test loss, test metric)."""
        return (self._evaluate("validation")[0], *self._evaluate("test"))

    @torch.no_grad()
    def _evaluate(self, part: str) -> tuple[float, float]:
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        meter = self.task.meter(self.device)
        for inputs, targets in self.batches.evaluate(part, self.evaluated):
            inputs = self.tuning.apply(inputs)
            with self._autocast():
                outputs = self.model(inputs)
                total += self.task.loss(outputs, targets) * len(inputs)
            meter.add(outputs, targets)
        parallel.add_up(meter.counts)
        return float(parallel.add_up(total)) / max(self.batches.size(part), 1), meter.value()

    def _autocast(self) -> torch.autocast:
        return autocast(self.device.type, self.recipe.precision)

    def _timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        with stopwatch(self.device) as seconds:
            result = work()
        return result, seconds[0]

    def _peak_memory(self) -> int | None:
        """Of the process that needed most."""
        if self.device.type != "cuda":
            return None
        return parallel.largest(torch.cuda.max_memory_allocated())


def _check_finite(what: str, loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise DivergedError(f"the {what} became {loss} in epoch {epoch}")
