"""One attempt at a trial: under a lease, with every way in which it can end said as an event."""

import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext

import torch

from harness import parallel
from harness.errors import UserError
from harness.run.events import Elsewhere, Event, Halted, Held, Started
from harness.seeds import restored
from harness.storage import leases
from harness.storage.leases import Claim, Lease, Lost
from harness.storage.locations import StorageError
from harness.storage.recorder import Failure, Rows, Slot
from harness.storage.store import Follower, Owner, Store
from harness.suite.config import Suite, TrialSpec
from harness.train.trial import DivergedError, Trial
from harness.train.tuning import numerics


class Broken(Exception):  # noqa: N818
    """One of several processes failed, and its row says why, or died; the others can't go on."""


class Unstored(Broken):
    """What one of several processes computed can't be stored; the trial is none the worse."""


def supervised(
    spec: TrialSpec, root: str, slot: Slot, claim: Claim | None = None
) -> Generator[Event]:
    """The trial's records, those of earlier attempts first, if nobody else has it.

    Ends with Held, Halted or Failure where it can't be finished. A failure is stored with its
    traceback; only an interrupt leaves this generator, and Broken where the failure is that of one
    process among several.
    """
    yield Started()
    lease = found = None
    if parallel.leads():
        lease, found = _taken(Store(root, spec.suite.name), spec.key, claim)
    number, found = parallel.shared((lease and lease.number, found))
    with lease or nullcontext():
        if found:
            yield found
        else:
            yield from owned(spec, root, slot, number)


def _taken(
    store: Store, key: str, claim: Claim | None
) -> tuple[Lease | None, Held | Halted | Elsewhere | Failure | None]:
    """The lease of a trial that is to be computed, or why it is not."""
    lease = None
    try:
        lease = Lease.acquire(store.place, key, claim or Claim(leases.owner(), None))
        return lease, meanwhile(store, key, claim) if lease else Held()
    except StorageError as error:
        return lease, Halted(str(error))


def meanwhile(store: Store, key: str, claim: Claim | None) -> Elsewhere | Failure | None:
    """How the trial has ended since it was claimed, if it has."""
    row = store.trial(key) if claim else None
    if row is None or claim is None:
        return None
    if row["state"] == "done" and store.has_rows(key):
        return Elsewhere()
    if row["state"] == "failed" and claim.attempts not in (None, row["attempts"]):
        return Failure(row["reason"], row["traceback"])
    return None


def owned(spec: TrialSpec, root: str, slot: Slot, lease: int) -> Generator[Event]:
    """As `supervised`, under a lease that is held already."""
    store = (Owner if parallel.leads() else Follower)(root, spec.suite.name, lease)
    rows = None
    try:
        store.sweep(spec.key)
        rows = Rows(spec, store, slot)
        with _process(spec.suite, slot):
            yield from Trial(spec, rows).records()
    except DivergedError as error:  # every process has seen the same loss
        assert rows
        yield _record(rows, Failure(str(error), traceback.format_exc()))
    except Exception as error:
        ended = _ended(error)
        failure = Failure(_reason(error, spec), traceback.format_exc())
        if spec.suite.resources.world_size > 1:  # its group may be gone by now
            if not ended and not parallel.lost_another(error):
                _record_from(spec, Owner(root, spec.suite.name, lease), slot, failure)
            kind = Unstored if isinstance(ended, Halted) else Broken
            raise kind(failure.reason) from error
        yield ended or (_record(rows, failure) if rows else failure)


def _ended(error: Exception) -> Held | Halted | None:
    """For errors that say nothing about the trial."""
    if isinstance(error, Lost):
        return Held()
    return Halted(str(error)) if isinstance(error, StorageError) else None


def _reason(error: Exception, spec: TrialSpec) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        size = spec.suite.recipe.forward_size(spec.suite.resources.world_size)
        peak = torch.cuda.max_memory_allocated() / 2**30
        return (
            f"the GPU's memory is full: {peak:.1f} GiB in use with forwards of {size} samples; "
            "lower recipe.forward_batch"
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return (
            f"the machine's memory is full: this process had used {leases.peak() / 2**30:.1f} GiB; "
            "lower recipe.forward_batch, or run fewer trials at a time with more resources.cpus"
        )
    if isinstance(error, Lost):
        return "another run has taken the trial over"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def lost(spec: TrialSpec, root: str, slot: Slot, reason: str, owner: str) -> Event:
    """Record, from the driver, a trial whose process can't say itself why it ended.

    Held where it is another run's, Elsewhere where it turns out to be done.
    """
    try:
        place = Store(root, spec.suite.name).place
        lease = Lease.acquire(place, spec.key, Claim(owner, None))
        if lease is None:
            return Held()
        with lease:
            store = Owner(root, spec.suite.name, lease.number)
            return _record_from(spec, store, slot, Failure(reason, ""), here=False)
    except StorageError as error:
        return Halted(str(error))


def _record_from(
    spec: TrialSpec, store: Owner, slot: Slot, failure: Failure, *, here: bool = True
) -> Event:
    """With the rows of the last commit; a trial that is complete has not failed."""
    rows = Rows(spec, store, slot, here=here)
    state = store.load_checkpoint(spec.key)
    if state is not None:
        rows.load(state["rows"])
    if rows.complete:
        rows.publish()
        return Elsewhere()
    return _record(rows, failure)


def _record(rows: Rows, failure: Failure) -> Event:
    try:
        rows.publish(failure)
    except (Lost, StorageError) as error:
        return _ended(error) or failure
    return failure


@contextmanager
def _process(suite: Suite, slot: Slot) -> Iterator[None]:
    """Determinism for one trial; the process is left as it was."""
    threads = torch.get_num_threads()
    gpus = [parallel.device(gpu=True)] if slot.gpu else []
    try:
        with torch.random.fork_rng(gpus), restored(), numerics(suite.recipe.precision):
            yield
    finally:
        torch.set_num_threads(threads)
