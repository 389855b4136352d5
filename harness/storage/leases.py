"""One owner per trial: a lease that its owner renews, and that others take over when it expires.

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

from harness.storage.locations import Location, StorageError

BEAT = 5.0  # seconds between renewals
STALE = 30.0  # seconds without a renewal after which a lease expires, as seen by who watches it


class LeaseLost(Exception):  # noqa: N818
    """Somebody else owns the trial now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a lease's file says at one renewal.

    `number`: of the lease; `owner`: the name of the run that holds it; `count`: renewals so far;
    `at`: Unix time on the owner's own clock. `machine`, `pid`, `born`: which process renews it;
    `memory`: the most bytes that it has had in use. `released`: whether it was given back.
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
        """Whether its process ran on this machine, and does not any more.

        The time of birth tells the process from a later one with the same number.
        """
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


def latest(location: Location, key: str) -> Beat | None:
    """What the newest lease of a trial says; None where it never had one."""
    names = _names(location, key)
    if not names:
        return None
    number = int(names[-1][:6])
    try:
        beat = Beat(**json.loads(location.read(_name(key, number)) or b"") | {"number": number})
        if all(type(v) is type(getattr(SAMPLE, name)) for name, v in asdict(beat).items()):
            return beat
    except (ValueError, TypeError):
        pass
    return Beat(number=number, owner="")  # about to be written, or damaged: nobody renews it


class Watch:
    """Says which leases are free, as far as the run `owner` can see from here."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._seen: dict[str, tuple[Beat, float]] = {}

    def free(self, key: str, beat: Beat | None) -> bool:
        """Whether the trial may be taken: nobody has it, we have it, or its owner is dead.

        `beat`: what `latest` says of it now. An owner on another machine is dead when it has not
        renewed its lease for STALE seconds while this process was watching.
        """
        if beat is None or beat.released or beat.owner == self._owner or beat.dead:
            self._seen.pop(key, None)
            return True
        # Not `beat.at`: clocks of machines differ, and one that is wrong must not free a lease.
        known, since = self._seen.get(key, (None, 0.0))
        if known != beat:
            self._seen[key] = beat, time.monotonic()
            return False
        return time.monotonic() - since > STALE


@dataclass(frozen=True, slots=True)
class Claim:
    """A run's right to take a trial.

    `owner`: the run that claims it; `over`: the lease under which it was seen to be free (None: it
    had none). `attempts`: how many attempts there were by then: a failure that was recorded by a
    later one means that the trial has ended since.
    """

    owner: str
    over: Beat | None
    attempts: int | None = None


class Lease:
    """The lease of one trial, held by this process.

    Between `with` and its end a thread renews it every BEAT seconds; then it is given back.
    """

    def __init__(self, location: Location, key: str, beat: Beat) -> None:
        self._location, self._key, self._beat = location, key, beat
        self._end = threading.Event()

    @classmethod
    def acquire(cls, location: Location, key: str, claim: Claim) -> Self | None:
        """Take the trial `key`; None where somebody else has it, or was quicker.

        Raises StorageError where the disk or the network fails.
        """
        now = latest(location, key)
        watch = Watch(claim.owner)
        if now != claim.over and not watch.free(key, now):
            return None
        # Of several who take over from the same lease, each tries to create the same next number:
        # the one who does is the owner.
        beat = _here(Beat(number=now.number + 1 if now else 1, owner=claim.owner))
        if not location.create(_name(key, beat.number), _json(beat)):
            return None
        for name in _names(location, key):
            if int(name[:6]) < beat.number:
                location.remove(f"leases/{key}/{name}")
        return cls(location, key, beat)

    @property
    def number(self) -> int:
        """The number of this lease; numbers of a trial grow with every owner."""
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
            check_owned(self._location, self._key, self.number)
            self._write(replace(_here(self._beat), released=True))
        except (LeaseLost, StorageError):
            pass  # it is another's already, or will be

    def _renew(self) -> None:
        while not self._end.wait(BEAT):
            try:
                check_owned(self._location, self._key, self.number)
                self._write(_here(self._beat))
            except LeaseLost:
                return
            except StorageError:
                continue  # if it lasts, the next commit says so

    def _write(self, beat: Beat) -> None:
        self._beat = beat
        self._location.write(_name(self._key, beat.number), _json(beat))


def check_owned(location: Location, key: str, number: int) -> None:
    """Raises LeaseLost where the trial `key` has a newer lease than `number`."""
    if any(int(name[:6]) > number for name in _names(location, key)):
        raise LeaseLost


def release(location: Location, key: str, owner: str) -> None:
    """Give back, from outside, the lease that a stopped process of the run `owner` held."""
    beat = latest(location, key)
    if beat and beat.owner == owner and not beat.released:
        lease = Lease.acquire(location, key, Claim(owner, beat))
        if lease:
            with lease:
                pass


def kill_holder(beat: Beat | None, owner: str) -> None:
    """End the process that holds a lease, where it is one of the run `owner` on this machine.

    It may be stuck, and would never give the lease back.
    """
    mine = beat and not beat.released and beat.owner == owner and beat.pid != os.getpid()
    if beat and mine and beat.machine == machine() and born(beat.pid) == beat.born:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(beat.pid, signal.SIGKILL)


def new_owner() -> str:
    """A name for a run, unlike any other."""
    return uuid4().hex


@cache
def machine() -> str:
    """A name for this machine since its start, and for its process table; not its host name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return uuid4().hex  # not to be known again: leases are waited for


def born(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot; None where there is none, or a
    zombie.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def peak_memory() -> int:
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
        memory=peak_memory(),
    )


def _names(location: Location, key: str) -> list[str]:
    return [n for n in location.names(f"leases/{key}") if re.fullmatch(r"[0-9]{6}\.json", n)]


def _name(key: str, number: int) -> str:
    return f"leases/{key}/{number:06d}.json"


def _json(beat: Beat) -> bytes:
    return json.dumps(asdict(beat)).encode()
