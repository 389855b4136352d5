"""Which trial is next: one that nobody else has, or one that another run has given up."""

import time
from collections import deque
from collections.abc import Iterator, Sequence

from harness.run.events import Elsewhere, Event, Held
from harness.storage import leases
from harness.storage.leases import Claim, Watch
from harness.storage.schema import Failure
from harness.storage.store import Store
from harness.suite.config import TrialSpec

LOOK = 2.0  # seconds between looks at the trials of others


class Claims:
    """The trials of one run that are still to be taken, and those that other runs have.

    A trial of `specs` is looked at when it is taken. `owner` is the run's name on its leases.
    `retry`: failed trials are to be run, too.
    """

    def __init__(self, specs: Sequence[TrialSpec], root: str, *, retry: bool) -> None:
        self.owner = leases.new_owner()
        self._root, self._retry = root, retry
        self._fresh, self._left = iter(specs), len(specs)
        self._others: dict[str, TrialSpec] = {}
        self._free: deque[tuple[TrialSpec, Claim]] = deque()
        self._watch = Watch(self.owner)
        self._events: deque[tuple[TrialSpec, Event | None]] = deque()
        self._looked = 0.0

    def __len__(self) -> int:
        """Trials that were not taken yet, as far as is known, and events that were not told."""
        return self._left + len(self._free) + len(self._others) + len(self._events)

    def take(self) -> tuple[TrialSpec, Claim] | None:
        """A trial to start now, with the claim to it; None where none is free."""
        if self._free:
            return self._free.popleft()
        for spec in self._fresh:
            self._left -= 1
            claim = self._claim(spec, retry=self._retry)
            if claim:
                return spec, claim
        return None

    def give_back(self, spec: TrialSpec) -> None:
        """Put back a trial that another run turned out to have."""
        self._others[spec.key] = spec

    def events(self) -> Iterator[tuple[TrialSpec, Event | None]]:
        """What has become of the trials of others, as (trial, event); None ends a trial.

        Looks after them every LOOK seconds.
        """
        if self._others and time.monotonic() - self._looked > LOOK:
            self._looked = time.monotonic()
            for spec in list(self._others.values()):
                claim = self._claim(spec, retry=False)
                if claim:
                    self._free.append((spec, claim))
        while self._events:
            yield self._events.popleft()

    def _claim(self, spec: TrialSpec, *, retry: bool) -> Claim | None:
        """The claim to a trial that is free; one that is not is kept, or has ended."""
        key, store = spec.key, Store(self._root, spec.suite.name)
        beat = leases.latest(store.location, key)
        if not self._watch.free(key, beat):
            if key not in self._others:
                self._events.append((spec, Held()))
            self._others[key] = spec
            return None
        self._others.pop(key, None)
        row = store.trial(key)
        state = row["state"] if row else None
        if row and state == "done" and store.has_rows(row):
            self._events += [(spec, Elsewhere()), (spec, None)]
        elif row and state == "failed" and not retry:
            self._events += [(spec, Failure(row["reason"], row["traceback"])), (spec, None)]
        else:
            return Claim(self.owner, beat, row["attempts"] if row else 0)
        return None
