"""Run trials: `inline` in this process one after the other, `ray` as one task each."""

import contextlib
import os
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from harness import parallel
from harness.errors import UserError
from harness.run import ray_cluster
from harness.run.afterwards import Shown, Told, Work, here, on_cluster
from harness.run.attempt import Broken, Unstored, attempt, record_death
from harness.run.claims import Claims
from harness.run.events import Elsewhere, Event, Halted, Held, Started
from harness.run.ray_train import run_with_workers
from harness.storage import leases
from harness.storage.leases import Claim
from harness.storage.provenance import Slot
from harness.storage.schema import EpochRecord, Failure
from harness.storage.store import Store
from harness.suite.config import TrialSpec
from harness.train.tuning import check_recipe

Events = Generator[tuple[TrialSpec, Event | None]]


class Executor(Protocol):
    """Runs trials and tells what happens to each."""

    def run(self, specs: Sequence[TrialSpec], root: str) -> Events:
        """(trial, event) as they happen, those of several trials interleaved; None ends a trial.

        `root`: where results lie. Raises UserError where results can't be stored any more: trials
        go on from their last commit another time.
        """
        ...

    def afterwards(
        self, work: Work, trials: Sequence[TrialSpec], root: str, shown: Shown
    ) -> Iterator[Told]:
        """Do `work` for what is finished of `trials`, of one group, on each kind of machine at hand
        that they ran on.
        """
        ...


class Inline:
    """Runs one trial after the other, in this process and in those that torchrun started with it.

    `retry`: failed trials are run again.
    """

    def __init__(self, *, retry: bool = False) -> None:
        self._retry = retry

    def run(self, specs: Sequence[TrialSpec], root: str) -> Events:
        """See Executor; trials come one after the other."""
        claims = Claims(specs, root, retry=self._retry)
        while parallel.shared(len(claims)):
            found = (list(claims.events()), claims.take()) if parallel.leads() else None
            events, taken = parallel.shared(found)
            yield from events
            if taken:
                spec, claim = taken
                yield from self._trial(spec, claim, root, claims)
            elif len(claims):
                time.sleep(1)

    def afterwards(
        self, work: Work, trials: Sequence[TrialSpec], root: str, shown: Shown
    ) -> Iterator[Told]:
        """See Executor: in this process."""
        yield from here(work, trials, root, shown)

    def _trial(self, spec: TrialSpec, claim: Claim, root: str, claims: Claims) -> Events:
        limit, slot = spec.suite.resources.time_limit, _slot_here(spec)
        clock = _Clock(limit)
        events = attempt(spec, root, slot, claim)
        try:
            with contextlib.closing(events):  # and its lease given back
                while (event := clock.next(events)) is not None:
                    yield spec, _stored(event)
                    if isinstance(event, Held):
                        claims.give_back(spec)
                        return
            yield spec, None
        except _TooLongError:
            if parallel.leads():
                yield from _given_up(spec, root, slot, too_long(limit), claims)
            if parallel.workers() > 1:
                raise SystemExit(1) from None
        except Unstored as error:
            raise UserError(str(error)) from None
        except Broken as error:  # the other processes wait for this one: end them all
            yield spec, Failure(str(error), "")
            raise SystemExit(1) from error


def _stored(event: Event) -> Event:
    """The event itself; raises UserError for the one that says that results can't be stored."""
    if isinstance(event, Halted):
        raise UserError(event.reason)
    return event


class _TooLongError(BaseException):
    """Raised by the clock, past whoever handles exceptions."""


class _Clock:
    """Raises _TooLongError inside a generator that takes more than so many seconds in all."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def next(self, events: Iterator[Event]) -> Event | None:
        """The next event; None at the end."""
        if self._end is None:
            return next(events, None)

        def stop(*_: object) -> None:
            raise _TooLongError

        earlier = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self._end - time.monotonic(), 1e-3))
        try:
            return next(events, None)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, earlier)


def _given_up(spec: TrialSpec, root: str, slot: Slot, reason: str, claims: Claims) -> Events:
    event = _stored(record_death(spec, root, slot, reason, claims.owner))
    yield spec, event
    if isinstance(event, Held):
        claims.give_back(spec)
    else:
        yield spec, None


def too_long(seconds: float | None) -> str:
    """The reason for stopping a trial that has a time limit of `seconds`."""
    return (
        f"it took longer than resources.time_limit, {seconds:g} s; raise that with --set "
        "resources.time_limit=…, or find out why it hangs"
    )


def _slot_here(spec: TrialSpec) -> Slot:
    import torch

    wanted = spec.suite.resources
    gpu = torch.cuda.is_available() and wanted.gpus != 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if parallel.workers() > 1 else 1
    if wanted.gpus not in ("auto", 0) and not gpu:
        raise UserError(ray_cluster.no_gpu(spec, "this machine"))
    if gpu and here > torch.cuda.device_count():
        raise UserError(
            f"{here} workers on this machine need a GPU each, and it has "
            f"{torch.cuda.device_count()}; start fewer, or run on the CPU with "
            "--set resources.gpus=0"
        )
    if wanted.world_size != parallel.workers():
        raise UserError(
            f"suite {spec.suite.name}: one process can't be {wanted.world_size} workers; leave "
            "--executor inline out, or start them with "
            f"torchrun --nproc-per-node {wanted.world_size} -m harness run …"
        )
    check_recipe(spec.suite.recipe, parallel.device(gpu))
    return Slot(gpu, 1)


class Ray:
    """Runs each trial as a Ray task, on this machine or on the cluster at `address`.

    `retry`: failed trials are run again.
    """

    def __init__(self, address: str | None = None, *, retry: bool = False) -> None:
        self._address, self._retry = address, retry

    def run(self, specs: Sequence[TrialSpec], root: str) -> Events:
        """See Executor. A dead worker's trial is tried again, from its checkpoint."""
        claims = Claims(specs, root, retry=self._retry)
        with ray_cluster.connected(self._address) as head:
            running = _RayTasks(claims, root, head)
            try:
                if specs:
                    slot = ray_cluster.slots(specs[0], len(specs), head.nodes)[1]
                    ray_cluster.check_device(specs[0], slot)
                while len(claims) or running.tasks:
                    yield from claims.events()
                    running.fill(specs[0], slot.gpu)
                    yield from running.wait()
                    head.check()
            finally:
                running.stop()

    def afterwards(
        self, work: Work, trials: Sequence[TrialSpec], root: str, shown: Shown
    ) -> Iterator[Told]:
        """See Executor: on each node of a cluster as a task that has it for itself; where Ray was
        started here, it is over, and this process has the machine.
        """
        if ray_cluster.named(self._address):
            yield from on_cluster(work, self._address, trials, root, shown)
        else:
            yield from here(work, trials, root, shown)


@dataclass(slots=True)
class _Task:
    """One trial that runs, or waits for its turn in Ray.

    `seen`: epochs that were told; `deaths` of workers since the last of them; `spent`: seconds of
    workers that died; `began`: when the present one did.
    """

    spec: TrialSpec
    slot: Slot
    claim: Claim
    seen: int = 0
    deaths: int = 0
    ended: bool = False
    spent: float = 0.0
    began: float | None = None

    @property
    def overdue(self) -> bool:
        """Whether the trial takes longer than it may."""
        limit = self.spec.suite.resources.time_limit
        if self.ended or limit is None or self.began is None:
            return False
        return self.spent + time.monotonic() - self.began > limit

    def news(self, event: Event) -> bool:
        """Whether the event is new: not one that an earlier attempt has told already."""
        if isinstance(event, Started):
            self.began = time.monotonic()
            return self.deaths == 0 and self.seen == 0
        if isinstance(event, EpochRecord):
            if event.epoch < self.seen:
                return False
            self.seen, self.deaths = event.epoch + 1, 0
            self.ended = self.seen == self.spec.suite.recipe.epochs
        self.ended |= isinstance(event, Failure | Elsewhere | Halted)
        return True


class _RayTasks:
    """The trials that Ray has: twice as many as fit, so that no slot waits for the driver."""

    def __init__(self, claims: Claims, root: str, head: ray_cluster.Head) -> None:
        self.tasks: dict[Any, _Task] = {}
        self._claims, self._root, self._head = claims, root, head

    def fill(self, spec: TrialSpec, gpu: bool) -> None:
        """Start what there is room for, if all trials are like `spec`."""
        together = spec.suite.resources.world_size > 1
        while True:
            trials = len(self._claims) + len(self.tasks)
            try:
                slots, slot = ray_cluster.slots(spec, trials, self._head.nodes, gpu=gpu)
            except UserError:  # nodes are gone that were there at the start: they may come back
                return
            taken = None
            if len(self.tasks) < slots * (1 if together else 2):
                taken = self._claims.take()
            if taken is None:
                return
            self._submit(_Task(taken[0], slot, taken[1]))

    def _submit(self, task: _Task) -> None:
        together = task.spec.suite.resources.world_size > 1
        remote = ray_cluster.task(run_with_workers if together else attempt, task.spec, task.slot)
        self.tasks[remote.remote(task.spec, self._root, task.slot, task.claim)] = task

    def wait(self) -> Events:
        """Events that have happened; waits for the first of them, a second at the most."""
        import ray

        if not self.tasks:
            time.sleep(1 if len(self._claims) else 0)
            return
        ready, _ = ray.wait(list(self.tasks), timeout=1.0, fetch_local=False)
        for stream in ready:
            task = self.tasks[stream]
            yield from self._heard(stream, task)
        for stream, task in list(self.tasks.items()):
            if task.overdue:
                self._kill(stream)
                yield from self._given_up(task, too_long(task.spec.suite.resources.time_limit))

    def _heard(self, stream: Any, task: _Task) -> Events:
        import ray

        try:
            event: Event = ray.get(next(stream))
        except StopIteration:
            del self.tasks[stream]
            yield from self._died(task, "it ended without a word")
        except ray.exceptions.RayTaskError as error:  # not even begun
            del self.tasks[stream]
            yield from self._given_up(
                task, f"its worker failed: {ray_cluster.cause_of_death(error)}"
            )
        except ray.exceptions.RayError as error:
            del self.tasks[stream]
            yield from self._died(task, ray_cluster.cause_of_death(error))
        else:
            if isinstance(event, Held):
                del self.tasks[stream]
                self._claims.give_back(task.spec)
            if task.news(event):
                yield task.spec, _stored(event)

    def _died(self, task: _Task, how: str) -> Events:
        """Tried again from its last commit, but not for ever at the same epoch."""
        if task.ended:
            yield task.spec, None
            return
        task.deaths += 1
        if task.began is not None:  # what it waits for the next worker is not its own time
            task.spent, task.began = task.spent + time.monotonic() - task.began, None
        if task.deaths <= ray_cluster.MAX_RETRIES:
            self._submit(task)
            return
        beat = leases.latest(Store(self._root, task.spec.suite.name).location, task.spec.key)
        used = f"{beat.memory / 2**30:.1f} GiB" if beat and beat.memory else "an unknown amount"
        reason = (
            f"its workers died {task.deaths} times ({how}); they had used up to {used} of memory: "
            "where that was too much, lower recipe.forward_batch"
        )
        yield from self._given_up(task, reason)

    def _given_up(self, task: _Task, reason: str) -> Events:
        return _given_up(task.spec, self._root, task.slot, reason, self._claims)

    def _kill(self, stream: Any) -> None:
        import ray

        task = self.tasks.pop(stream)
        if task.ended:  # Ray ends the driver where a task ends in the moment in which it is killed
            return
        if self._head.answers():
            ray.cancel(stream, force=True)
        location = Store(self._root, task.spec.suite.name).location
        leases.kill_holder(leases.latest(location, task.spec.key), self._claims.owner)

    def stop(self) -> None:
        """End all tasks and give their leases back."""
        for stream, task in list(self.tasks.items()):
            with contextlib.suppress(UserError):  # the next run waits for these leases instead
                self._kill(stream)
                location = Store(self._root, task.spec.suite.name).location
                leases.release(location, task.spec.key, self._claims.owner)
