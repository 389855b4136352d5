"""One attempt at a trial: under a lease, with every way in which it can end said as an event."""

import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext

import torch

from harness import parallel
from harness.errors import UserError
from harness.run.events import Elsewhere, Event, Halted, Held, Started, went_on
from harness.seeds import restored
from harness.storage import leases
from harness.storage.leases import Claim, Lease, LeaseLost
from harness.storage.locations import StorageError
from harness.storage.owner import Follower, Owner
from harness.storage.provenance import Slot
from harness.storage.recorder import Recorder
from harness.storage.schema import Failure
from harness.storage.store import Store
from harness.suite.config import Suite, TrialSpec
from harness.train.trial import DivergedError, Trial
from harness.train.tuning import numerics


class Broken(Exception):  # noqa: N818
    """One of several processes has died, or failed, as its row of `trials` says: none can go on."""


class Unstored(Broken):
    """What one of several processes computed can't be stored; the trial is none the worse."""


def attempt(spec: TrialSpec, root: str, slot: Slot, claim: Claim | None = None) -> Generator[Event]:
    """Run a trial, if nobody else has it: its records, those of earlier attempts first.

    `root`: where results lie; `claim`: the run's right to the trial (default: that of a run of its
    own). Ends with Held, Halted or Failure where the trial can't be finished. A failure is stored
    with its traceback; nothing is raised but an interrupt, and Broken where the failure is that of
    one process among several.
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
            yield from attempt_under_lease(spec, root, slot, number)


def _taken(
    store: Store, key: str, claim: Claim | None
) -> tuple[Lease | None, Held | Halted | Elsewhere | Failure | None]:
    """The lease of a trial that is to be computed, or why it is not."""
    lease = None
    try:
        lease = Lease.acquire(store.location, key, claim or Claim(leases.new_owner(), None))
        return lease, ended_meanwhile(store, key, claim) if lease else Held()
    except StorageError as error:
        return lease, Halted(str(error))


def ended_meanwhile(store: Store, key: str, claim: Claim | None) -> Elsewhere | Failure | None:
    """How the trial `key` has ended since it was claimed; None where it has not."""
    row = store.trial(key) if claim else None
    if row is None or claim is None:
        return None
    if row["state"] == "done" and store.has_rows(row):
        return Elsewhere()
    if row["state"] == "failed" and claim.attempts not in (None, row["attempts"]):
        return Failure(row["reason"], row["traceback"])
    return None


def attempt_under_lease(spec: TrialSpec, root: str, slot: Slot, lease: int) -> Generator[Event]:
    """As `attempt`, under the lease of that number, which is held already."""
    kind = Owner if parallel.leads() else Follower
    owner = kind(Store(root, spec.suite.name), spec.key, lease)
    recorder = None
    try:
        owner.sweep()
        recorder = Recorder(spec, owner, slot)
        with undisturbed(spec.suite, slot):
            damaged: list[str] = []
            # Popped, so that nothing here keeps it alive while the trial goes on: it is large.
            states = [owner.load_checkpoint(damaged.append)]
            yield from map(went_on, damaged)
            yield from Trial(spec, owner, recorder, slot).records(states.pop())
    except DivergedError as error:  # every process has seen the same loss
        assert recorder
        yield _record(recorder, Failure(str(error), traceback.format_exc()))
    except Exception as error:
        ended = _ended(error)
        failure = Failure(_reason(error, spec), traceback.format_exc())
        if spec.suite.resources.world_size > 1:  # its group may be gone by now
            if not ended and not parallel.lost_another(error):
                _record_from(spec, Owner(owner.store, spec.key, lease), slot, failure)
            kind_of_end = Unstored if isinstance(ended, Halted) else Broken
            raise kind_of_end(failure.reason) from error
        yield ended or (_record(recorder, failure) if recorder else failure)


def _ended(error: Exception) -> Held | Halted | None:
    """The event for an error that says nothing about the trial."""
    if isinstance(error, LeaseLost):
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
        used = f"{leases.peak_memory() / 2**30:.1f} GiB"
        return (
            f"the machine's memory is full: this process had used {used}; "
            "lower recipe.forward_batch, or run fewer trials at a time with more resources.cpus"
        )
    if isinstance(error, LeaseLost):
        return "another run has taken the trial over"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def record_death(spec: TrialSpec, root: str, slot: Slot, reason: str, run: str) -> Event:
    """Record, from the driver, a trial whose process can't say itself why it ended.

    `run`: the driver's name on leases. Returns the failure; Held where the trial is another run's,
    Elsewhere where it turns out to be done, Halted where results can't be stored.
    """
    store = Store(root, spec.suite.name)
    try:
        lease = Lease.acquire(store.location, spec.key, Claim(run, None))
        if lease is None:
            return Held()
        with lease:
            owner = Owner(store, spec.key, lease.number)
            return _record_from(spec, owner, slot, Failure(reason, ""), here=False)
    except StorageError as error:
        return Halted(str(error))


def _record_from(
    spec: TrialSpec, owner: Owner, slot: Slot, failure: Failure, *, here: bool = True
) -> Event:
    """Record with the rows of the last commit; a trial that is complete has not failed."""
    recorder = Recorder(spec, owner, slot, here=here)
    state = owner.load_checkpoint()
    if state is not None:
        recorder.load(state)
    if recorder.complete:
        recorder.publish()
        return Elsewhere()
    return _record(recorder, failure)


def _record(recorder: Recorder, failure: Failure) -> Event:
    try:
        recorder.publish(failure)
    except (LeaseLost, StorageError) as error:
        return _ended(error) or failure
    return failure


@contextmanager
def undisturbed(suite: Suite, slot: Slot) -> Iterator[None]:
    """Inside, a trial of the suite computes deterministically; afterwards the process is as it
    was.
    """
    threads = torch.get_num_threads()
    gpus = [parallel.device(gpu=True)] if slot.gpu else []
    try:
        with torch.random.fork_rng(gpus), restored(), numerics(suite.recipe.precision):
            yield
    finally:
        torch.set_num_threads(threads)
