"""One owner per trial: a lease that its owner renews, and that others take over when it is dead.

`leases/<key>/<number>.json`: whoever creates the next number owns the trial, and numbers only
grow. So taking over needs no more than "create if absent", which disks and object stores both have,
and an owner that was thought dead finds out: what it committed meanwhile bears the lower number.
"""

import json
import os
import re
import resource
import signal
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

from harness.storage.locations import Place, StorageError

BEAT = 5.0  # seconds between renewals
STALE = 30.0  # without any, as seen by whoever watches: clocks of machines differ


class Lost(Exception):  # noqa: N818
    """Somebody else owns the trial now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What the newest lease says. `machine`, `pid`, `born`: which process renews it; `memory`: the
    most bytes that it has had in use; `at`: Unix time on its own clock.
    """

    number: int
    owner: str
    count: int = 0
    at: float = 0.0
    machine: str = ""
    pid: int = 0
    born: int = 0
    memory: int = 0
    released: bool = False

    @property
    def dead(self) -> bool:
        """Whether its process ran on this machine, and does not any more."""
        if self.machine != machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's: its file below /proc may be hidden
            return False
        return born(self.pid) != self.born


SAMPLE = Beat(number=0, owner="")


def latest(place: Place, key: str) -> Beat | None:
    """The trial's newest lease, if it ever had one."""
    names = _names(place, key)
    if not names:
        return None
    number = int(names[-1][:6])
    try:
        beat = Beat(**json.loads(place.read(_name(key, number)) or b"") | {"number": number})
        if all(type(v) is type(getattr(SAMPLE, name)) for name, v in asdict(beat).items()):
            return beat
    except (ValueError, TypeError):
        pass
    return Beat(number=number, owner="")  # about to be written, or damaged: nobody renews it


class Watch:
    """Says which leases are free, as far as one process can see."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._seen: dict[str, tuple[Beat, float]] = {}

    def free(self, key: str, beat: Beat | None) -> bool:
        """Whether the trial may be taken: nobody has it, we have, or its owner is dead."""
        if beat is None or beat.released or beat.owner == self._owner or beat.dead:
            self._seen.pop(key, None)
            return True
        known, since = self._seen.get(key, (None, 0.0))
        if known != beat:
            self._seen[key] = beat, time.monotonic()
            return False
        return time.monotonic() - since > STALE


@dataclass(frozen=True, slots=True)
class Claim:
    """A run's right to a trial: who claims it, and the lease it was seen to be free under.

    `attempts`: how many there were, as far as the claim knows; a failure of a later one counts.
    """

    owner: str
    over: Beat | None
    attempts: int | None = None


class Lease:
    """Of one trial, held by this process: renewed in a thread between `with` and its end."""

    def __init__(self, place: Place, key: str, beat: Beat) -> None:
        self._place, self._key, self._beat = place, key, beat
        self._end = threading.Event()

    @classmethod
    def acquire(cls, place: Place, key: str, claim: Claim) -> Self | None:
        """The next lease; None where somebody else has it, or was quicker."""
        now = latest(place, key)
        watch = Watch(claim.owner)
        if now != claim.over and not watch.free(key, now):
            return None
        beat = _here(Beat(number=now.number + 1 if now else 1, owner=claim.owner))
        if not place.create(_name(key, beat.number), _json(beat)):
            return None
        for name in _names(place, key):
            if int(name[:6]) < beat.number:
                place.remove(f"leases/{key}/{name}")
        return cls(place, key, beat)

    @property
    def number(self) -> int:
        """Grows with every owner."""
        return self._beat.number

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()
        try:
            check(self._place, self._key, self.number)
            self._write(replace(_here(self._beat), released=True))
        except (Lost, StorageError):
            pass  # it is another's already, or will be

    def _renew(self) -> None:
        while not self._end.wait(BEAT):
            try:
                check(self._place, self._key, self.number)
                self._write(_here(self._beat))
            except Lost:
                return
            except StorageError:
                continue  # the next commit says so, if it lasts

    def _write(self, beat: Beat) -> None:
        self._beat = beat
        self._place.write(_name(self._key, beat.number), _json(beat))


def check(place: Place, key: str, number: int) -> None:
    """Raises Lost where there is a newer lease."""
    if any(int(name[:6]) > number for name in _names(place, key)):
        raise Lost


def free(place: Place, key: str, owner: str) -> None:
    """Give back, from outside, what a process of ours held that was stopped."""
    beat = latest(place, key)
    if beat and beat.owner == owner and not beat.released:
        lease = Lease.acquire(place, key, Claim(owner, beat))
        if lease:
            with lease:
                pass


def kill(beat: Beat | None, owner: str) -> None:
    """End the process that holds it, where that is ours, on this machine and may be stuck."""
    mine = beat and not beat.released and beat.owner == owner and beat.pid != os.getpid()
    if beat and mine and beat.machine == machine() and born(beat.pid) == beat.born:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(beat.pid, signal.SIGKILL)


def owner() -> str:
    """A name for a run, unlike any other."""
    return uuid4().hex


@cache
def machine() -> str:
    """This machine since it was started, and its process table; says nothing about its name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return uuid4().hex  # not to be known again: leases are waited for


def born(pid: int) -> int | None:
    """When the process was started, in clock ticks; None where there is none (or a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def peak() -> int:
    """The most bytes that this process has had in use."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _here(beat: Beat) -> Beat:
    return replace(
        beat,
        count=beat.count + 1,
        at=time.time(),
        machine=machine(),
        pid=os.getpid(),
        born=born(os.getpid()) or 0,
        memory=peak(),
    )


def _names(place: Place, key: str) -> list[str]:
    return [n for n in place.names(f"leases/{key}") if re.fullmatch(r"[0-9]{6}\.json", n)]


def _name(key: str, number: int) -> str:
    return f"leases/{key}/{number:06d}.json"


def _json(beat: Beat) -> bytes:
    return json.dumps(asdict(beat)).encode()
