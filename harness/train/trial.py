"""One trial as a generator of epoch records, resumed from its checkpoint where there is one.

Resumed equals uninterrupted, bit for bit on the CPU: every random stream follows from (seed,
purpose, epoch), and the checkpoint holds all other state together with the rows so far. Where
torch.distributed has several processes, each runs this and the trial is theirs together.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

import neq
from harness import parallel
from harness.errors import UserError, one_line
from harness.storage.locations import StorageError
from harness.storage.owner import Owner
from harness.storage.provenance import Slot, code
from harness.storage.recorder import Recorder
from harness.storage.schema import EpochRecord, flops_columns
from harness.suite.config import TrialSpec, digest
from harness.train.assembly import Assembly, assemble
from harness.train.compiling import start_anew
from harness.train.energy import Energy
from harness.train.loop import Loop
from harness.train.neighbours import Neighbours
from harness.train.tuning import check_recipe


class DivergedError(Exception):
    """A loss is not finite any more."""


class Trial:
    """The training of `spec` in `slot`, committed through `owner`, its rows kept by `recorder`."""

    def __init__(self, spec: TrialSpec, owner: Owner, recorder: Recorder, slot: Slot) -> None:
        self._spec, self._owner, self._recorder = spec, owner, recorder
        self._device = parallel.device(slot.gpu)
        self._energy = Energy(self._device, shared=slot.sharing > 1)
        name = digest({"trial": spec.key, "results": owner.store.location.uri})
        self._neighbours = Neighbours(self._device, name)

    def records(self, state: Mapping[str, Any] | None) -> Iterator[EpochRecord]:
        """The records of all epochs from 0 on.

        Those of the checkpoint's `state` come first, the others are computed and committed one by
        one. Raises UserError for what is wrong in the suite, DivergedError for a loss that is not
        finite, StorageError and leases.LeaseLost where results can't be stored any more.
        """
        recorder, location = self._recorder, self._owner.store.location
        if state is not None:
            with self._fitting():
                recorder.load(state)
        if not parallel.equal(len(recorder.epochs)):
            raise UserError(
                f"the workers do not find the same checkpoint below {location.uri}; "
                "--results must lie where every node sees it"
            )
        for record in list(recorder.epochs):  # noqa: UP028 — Ray sends; a list can't receive
            yield record
        recorder.publish()
        parallel.wait()
        if recorder.complete:
            return
        recipe = self._spec.suite.recipe
        check_recipe(recipe, self._device)
        torch.set_num_threads(recorder.threads)
        with self._neighbours.registered():
            work = assemble(self._spec, self._device, location, state)
            if recipe.compile:
                start_anew()
            loop = Loop(work, recipe, self._spec.seed)
            if state is None:
                work.start()
            else:
                with self._fitting():
                    work.restore(state)
            del state
            for epoch in range(len(recorder.epochs), recipe.epochs):
                yield self._epoch(epoch, work, loop)

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """Raises StorageError where a checkpoint is whole, and yet not one of this trial."""
        try:
            yield
        except Exception as error:
            raise StorageError(
                f"{self._owner.store.location.path('checkpoints')}/{self._spec.key} does not fit "
                f"this neqbench ({one_line(error)}); use what wrote it, or delete it: the trial "
                "is computed anew"
            ) from error

    def _epoch(self, epoch: int, work: Assembly, loop: Loop) -> EpochRecord:
        """Train, decide, test, commit."""
        frozen, plan = work.begin_epoch()
        measured = self._measured(epoch, work, loop)
        if parallel.workers() > 1:
            parallel.agree(work.model, work.method.state_dict())
        flops = work.flops(frozen, plan)
        record = EpochRecord(
            epoch=epoch,
            samples=work.training.samples["train"],
            frozen_neurons=int(frozen.sum()),
            total_neurons=len(frozen),
            fixed_neurons=int(work.costs.neurons.fixed.sum()),
            **flops_columns(flops),
            effective_parameters=work.size(),
            seconds_checkpoint=None,
            code=code(),
            **measured,
        )
        measures = work.measure_rows() + work.analysis.rows(epoch, record.test_metric)
        self._recorder.add(record, work.layer_rows(frozen, plan), measures)
        _, seconds = self._timed(lambda: self._commit(work))
        record = self._recorder.committed(seconds)
        parallel.wait()  # what another process may store next comes after this
        return record

    def _measured(self, epoch: int, work: Assembly, loop: Loop) -> dict[str, Any]:
        """Run the epoch, and look who else is on the device; the columns that this tells."""
        before = self._neighbours.trials()
        self._neighbours.begin()
        measured = self._run_epoch(epoch, work, loop)
        measured["other_load"] = self._neighbours.load()
        trials = max(before, self._neighbours.trials())
        self._recorder.sharing(trials)
        if trials > 1:  # the counter is of all of them
            measured["energy_joules"] = None
        return measured

    def _run_epoch(self, epoch: int, work: Assembly, loop: Loop) -> dict[str, Any]:
        """Run the epoch; the columns that only running it can tell."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        lr = float(work.optimizer.param_groups[0]["lr"])
        with self._energy.measuring():
            train_loss, seconds_train = self._timed(lambda: loop.train(epoch))
        _check_finite("training loss", train_loss, epoch)
        parallel.broadcast_buffers(work.model)
        val_loss, seconds_validation = self._timed(lambda: work.evaluator.loss("validation"))
        loop.follow(val_loss)
        before = parallel.fingerprint(work.model)
        with self._energy.measuring():
            _, seconds_equilibrium = self._timed(lambda: work.method.end_epoch(epoch))
        # Of any worker: they evaluate together. Whether they agree is asked afterwards.
        changed = parallel.largest(not torch.equal(before, parallel.fingerprint(work.model)))
        if changed:  # to weights of a moment when each worker's BatchNorm had seen other samples
            parallel.broadcast_buffers(work.model)
        (val_loss, test_loss, test_metric), seconds_test = self._timed(
            lambda: (
                work.evaluator.loss("validation") if changed else val_loss,
                *work.evaluator.loss_and_metric("test"),
            )
        )
        _check_finite("test loss", test_loss, epoch)
        return {
            "lr": lr,
            "train_loss": train_loss,
            "val_loss": val_loss if work.training.samples["validation"] else None,
            "test_loss": test_loss,
            "test_metric": test_metric,
            "seconds_train": seconds_train,
            "seconds_equilibrium": seconds_equilibrium,
            "seconds_test": seconds_validation + seconds_test,
            "peak_memory_bytes": self._peak_memory(),
            "energy_joules": self._energy.take(),
        }

    def _commit(self, work: Assembly) -> None:
        if not parallel.leads():
            return
        state = work.state() | {"rows": self._recorder.state()}
        done, last = len(self._recorder.epochs), self._recorder.complete
        self._owner.save_checkpoint(done, state, last=last)

    def _timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        with neq.stopwatch(self._device) as seconds:
            result = work()
        return result, seconds[0]

    def _peak_memory(self) -> int | None:
        """Of the process that needed most; None on a CPU."""
        if self._device.type != "cuda":
            return None
        return parallel.largest(torch.cuda.max_memory_allocated())


def _check_finite(what: str, loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise DivergedError(
            f"the {what} became {loss} in epoch {epoch}; try a lower recipe.optimizer.lr"
        )
