"""One trial as a generator of epoch records, resumed from its checkpoint where there is one.

Resumed equals uninterrupted, bit for bit on the CPU: every random stream follows from (seed,
purpose, epoch), and the checkpoint holds all other state together with the rows so far.
"""

import inspect
import math
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor

from harness import suites
from harness.config import Named, Recipe, Suite, TrialSpec
from harness.data import load_images
from harness.errors import UserError
from harness.flops import measure
from harness.methods import Method
from harness.records import EpochRecord
from harness.rows import Failure, Rows, Slot
from harness.storage import Store
from harness.streams import seed_globals
from harness.tuning import Tuning, autocast, kept, numerics
from neq.timings import stopwatch


class DivergedError(Exception):
    """The training loss is not finite any more."""


@dataclass(frozen=True, slots=True)
class Started:
    """The trial is being built."""


Event = Started | EpochRecord | Failure


def supervised(spec: TrialSpec, root: str, slot: Slot) -> Iterator[Event]:
    """The trial's records, those of earlier attempts first; ends with a Failure if it raises.

    The i-th event is the same in every attempt, up to measured times: whoever listens loses
    nothing. A failure is stored with its traceback; only an interrupt leaves this generator.
    """
    store = Store(root, spec.suite.name)
    rows = Rows(spec, store, slot)
    yield Started()
    try:
        with _process(spec.suite):
            yield from Trial(spec, store, rows).records()
    except Exception as error:
        known = isinstance(error, UserError | DivergedError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        yield _record(rows, Failure(reason, traceback.format_exc()))


def lost(spec: TrialSpec, root: str, slot: Slot, reason: str) -> Failure:
    """Record, from the driver, a trial whose process died too often to say so itself."""
    store = Store(root, spec.suite.name)
    rows = Rows(spec, store, slot, here=False)
    state = store.load_checkpoint(spec.key)
    if state is not None:
        rows.load(state["rows"])
    return _record(rows, Failure(reason, ""))


def _record(rows: Rows, failure: Failure) -> Failure:
    try:
        rows.publish(failure)
    except OSError as error:  # a full disk may be why it failed
        return replace(failure, reason=f"{failure.reason} (and could not be stored: {error})")
    return failure


@contextmanager
def _process(suite: Suite) -> Iterator[None]:
    """Determinism for one trial; the process is left as it was."""
    threads, python, numpys = torch.get_num_threads(), random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(), numerics(suite.recipe.precision):
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        numpy.random.set_state(numpys)


class Trial:
    """The training of one spec: all its state, and the loop over its epochs."""

    def __init__(self, spec: TrialSpec, store: Store, rows: Rows) -> None:
        self.spec, self.suite, self.recipe = spec, spec.suite, spec.suite.recipe
        self.store, self.rows = store, rows
        self.device = torch.device(rows.slot.device)

    def records(self) -> Iterator[EpochRecord]:
        """All epochs from 0 on: the committed ones from the checkpoint, the others computed."""
        state = self.store.load_checkpoint(self.spec.key)
        if state is not None:
            self.rows.load(state["rows"])
        for record in list(self.rows.epochs):  # noqa: UP028 — Ray sends; a list can't receive
            yield record
        self.rows.publish()
        if self.rows.complete:
            return
        torch.set_num_threads(self.rows.threads)
        self._build(state)
        if state is None:
            self.method.start(self.batches.evaluate("validation"))
        else:
            self._restore(state)
        del state
        for epoch in range(len(self.rows.epochs), self.recipe.epochs):
            yield self._epoch(epoch)

    def _build(self, state: dict[str, Any] | None) -> None:
        parts, seed, folder = self.suite.model, self.spec.seed, self.spec.folder
        data = load_images(self.suite, folder)
        self.batches = data.open(self.device, seed, self.recipe.batch_size)
        self.task = suites.part(self.suite.task, folder)()
        seed_globals(seed, "initialisation")
        model = suites.build_model(parts.build, folder, parts.arguments)
        self.costs = measure(model, parts.input)
        model = model.to(self.device)
        self.tuning = (
            Tuning.from_json(state["tuning"]) if state else kept(self.store, self.suite, model)
        )
        self.model = self.tuning.convert(model)
        self.optimizer, self.scheduler = build_optimizer(
            self.suite.name, self.recipe, model.parameters()
        )
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.recipe.precision == "fp16"
        )
        fixed = [*parts.exclude, *self.costs.uncalled]
        self.method = Method(
            self.spec.spec, self.model, self.optimizer, fixed, seed, self.tuning.timings
        )

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
        state = {name: part.state_dict() for name, part in self._stateful().items()}
        state |= {"tuning": self.tuning.to_json(), "rows": self.rows.state()}
        self.store.save_checkpoint(self.spec.key, state)

    def _epoch(self, epoch: int) -> EpochRecord:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        frozen, samples = self.method.freezer.frozen, self.batches.size("train")
        plan = self.method.freezer.plan
        backward = self.costs.backward(frozen, samples, plan)
        layers = self.costs.layers(frozen, samples, plan)
        lr = float(self.optimizer.param_groups[0]["lr"])
        train_loss, seconds_train = self._timed(lambda: self._train(epoch))
        _check_finite("training loss", train_loss, epoch)
        (val_loss, test_loss, metric), seconds_test = self._timed(self._test)
        _check_finite("test loss", test_loss, epoch)
        validation = self.batches.size("validation")
        _, seconds_equilibrium = self._timed(
            lambda: self.method.end_epoch(self.batches.evaluate("validation"))
        )
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
        )
        self.rows.add(record, frozen, layers, self.method.freezer)
        _, seconds = self._timed(self._commit)
        return self.rows.committed(seconds)

    def _train(self, epoch: int) -> float:
        """One epoch; the mean loss. Nothing in the loop waits for the device."""
        seed_globals(self.spec.seed, "training", epoch)
        self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for inputs, targets in self.batches.train(epoch):
            inputs = self.tuning.apply(inputs)
            with self._autocast():
                outputs = self.model(inputs)
                loss = self.task.loss(outputs, targets)
            self.method.after_forward(inputs, outputs)
            self.scaler.scale(loss).backward()
            self._step()
            self.optimizer.zero_grad()
            total += loss.detach() * len(targets)
        if self.scheduler is not None:
            self.scheduler.step()
        mean: float = total.item() / self.batches.size("train")
        return mean

    def _step(self) -> None:
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        if self.scaler.is_enabled() and all(p.grad is None for p in parameters):
            return  # everything stands still, and the scaler refuses a step without gradients
        self.scaler.unscale_(self.optimizer)
        self.method.after_backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.method.after_step()

    def _test(self) -> tuple[float, float, float]:
        """(validation loss, test loss, test metric)."""
        return (self._evaluate("validation")[0], *self._evaluate("test"))

    @torch.no_grad()
    def _evaluate(self, part: str) -> tuple[float, float]:
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        meter = self.task.meter()
        for inputs, targets in self.batches.evaluate(part):
            inputs = self.tuning.apply(inputs)
            with self._autocast():
                outputs = self.model(inputs)
                total += self.task.loss(outputs, targets) * len(targets)
            meter.add(outputs, targets)
        return float(total) / max(self.batches.size(part), 1), meter.value()

    def _autocast(self) -> torch.autocast:
        return autocast(self.device.type, self.recipe.precision)

    def _timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        with stopwatch(self.device) as seconds:
            result = work()
        return result, seconds[0]

    def _peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def _check_finite(what: str, loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise DivergedError(f"the {what} became {loss} in epoch {epoch}")


def build_optimizer(
    suite: str, recipe: Recipe, parameters: Iterator[Tensor]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]:
    """The recipe's optimizer and scheduler, each by torch's own name; fused where torch has that.

    Raises UserError for an unknown name or for arguments that torch refuses.
    """
    where = f"suite {suite}: recipe."
    build = partial(_torch_class, torch.optim, torch.optim.Optimizer, where + "optimizer")
    optimizer = build(_fused(recipe.optimizer), parameters)
    if recipe.scheduler is None:
        return optimizer, None
    kind = torch.optim.lr_scheduler
    build = partial(_torch_class, kind, kind.LRScheduler, where + "scheduler")
    scheduler = build(recipe.scheduler, optimizer)
    if isinstance(scheduler, kind.ReduceLROnPlateau):
        raise UserError(
            f"suite {suite}: recipe.scheduler: ReduceLROnPlateau follows a metric, which "
            "would differ by method; take a schedule of epochs"
        )
    milestones = getattr(scheduler, "milestones", [])
    if not all(isinstance(epoch, int) for epoch in milestones):  # torch would ignore them
        raise UserError(
            f"suite {suite}: recipe.scheduler.milestones: {list(milestones)} must be a list "
            "of epochs, such as [15, 22]"
        )
    return optimizer, scheduler


def _torch_class(module: Any, base: Any, where: str, named: Named, argument: Any) -> Any:
    cls = getattr(module, named.name, None)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        known = [n for n in dir(module) if isinstance(getattr(module, n), type)]
        names = ", ".join(n for n in known if issubclass(getattr(module, n), base) and n[0] != "_")
        raise UserError(f"{where}: unknown name {named.name!r}; torch has {names}")
    try:
        return cls(argument, **named.arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: {named.name} refuses its arguments: {error}") from None


def _fused(named: Named) -> Named:
    """The same optimizer, fused where torch has that and the recipe says nothing else."""
    cls = getattr(torch.optim, named.name, None)
    known = inspect.signature(cls).parameters if isinstance(cls, type) else {}
    if "fused" not in known or {"fused", "foreach", "differentiable"} & named.arguments.keys():
        return named
    return Named.model_validate({"name": named.name, **named.arguments, "fused": True})
