"""The commits of one trial: checkpoints that replace none, not even a dead owner's.

A commit is a file of its own, `checkpoints/<trial>/<epochs>.<lease>.<sha256>.pt`. Sorted by name
the last one is the newest: that of most epochs, and of two with as many that of the higher lease.
The checksum in the name shows what is damaged. Once a commit has been read back, all others go but
the one before it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from harness.storage.checkpoint import pack, unpack
from harness.storage.locations import Location, StorageError, checksum

NAME = re.compile(r"[0-9]{6}\.[0-9]{6}\.[0-9a-f]{16}\.pt")  # epochs, lease, checksum
TRIES = 5  # at commits that are removed while they are read


class Commits:
    """The checkpoints of the trial `key` in a suite's results."""

    def __init__(self, location: Location, key: str) -> None:
        self._location, self._key = location, key
        self._folder = f"checkpoints/{key}"
        self._damaged: set[str] = set()

    def load(self, report: Callable[[str], None] = lambda path: None) -> dict[str, Any] | None:
        """The state of the newest commit that is whole, on the CPU; None where there is none.

        `report` is called with the path of each newer one that is damaged. Raises StorageError
        where none is whole, and for a checkpoint of another trial or version.
        """
        # The owner removes a commit once a newer one is there: a name that was listed may be gone.
        for _ in range(TRIES):
            self._damaged = set()
            for name in self._newest_first():
                data = self._location.read(name)
                if data is None:  # removed meanwhile: a newer one is there
                    break
                path = self._location.path(name)
                if checksum(data) == name.split(".")[-2]:
                    return unpack(data, self._key, path)
                self._damaged.add(name)
                report(path)
            else:
                break
        else:
            raise StorageError(
                f"{self._location.path(self._folder)} can't be read: its files vanish; "
                "run the same command again"
            )
        if not self._damaged:
            return None
        raise StorageError(
            f"every checkpoint of trial {self._key} is damaged; delete "
            f"{self._location.path(self._folder)} and run the same command again: it is computed "
            "anew"
        )

    def save(
        self,
        epochs: int,
        lease: int,
        state: Mapping[str, Any],
        write: Callable[[str, bytes], None],
        *,
        last: bool,
    ) -> None:
        """Commit the state after so many `epochs`; `write(name, data)` stores the file.

        Only what this lease may know of is removed: a commit of a higher lease belongs to whoever
        took the trial over. The one before is kept in case the new file is damaged later, but not
        after the `last` epoch. Raises StorageError where the file reads back otherwise than it was
        written; nothing is removed then.
        """
        data = pack(self._key, state)
        # Not of higher leases: who took the trial over goes on from those, and removes them itself.
        earlier = [n for n in self._newest_first() if int(n.split(".")[1]) <= lease]
        name = f"{self._folder}/{epochs:06d}.{lease:06d}.{checksum(data)}.pt"
        write(name, data)
        # A share may acknowledge what it loses. Until the new commit is known to be there, the one
        # before it is all that there is.
        if self._location.read(name) != data:
            raise StorageError(
                f"{self._location.path(name)} reads back otherwise than it was written; mend the "
                "disk or share and run the same command again: the commit before it is kept"
            )
        # A damaged commit is no reserve: keep the newest of those that could be read.
        whole = [n for n in earlier if n not in self._damaged]
        kept = [name, *([] if last else whole[:1])]
        for old in earlier:
            if old not in kept:
                self._location.remove(old)

    def sweep(self) -> None:
        """Remove what killed owners left of a commit half written."""
        self._location.sweep(self._folder)

    def _newest_first(self) -> list[str]:
        names = self._location.names(self._folder)
        return [f"{self._folder}/{name}" for name in reversed(names) if NAME.fullmatch(name)]
