"""What was chosen by the clock for a kind of machine, made once and kept beside the results.

`tuning/<name>.json`. Of several processes that need the same choice one makes it, under a lease of
that name, while the others wait: choices round differently, so all trials must use the same.
"""

import json
import time
from collections.abc import Callable
from typing import Any

from harness.storage import leases
from harness.storage.leases import Claim, Lease
from harness.storage.locations import Location, StorageError

WAIT = 0.2  # seconds between looks whether another process has made it


def cached(location: Location, name: str) -> dict[str, Any] | None:
    """What was kept under `name`; raises StorageError where the file is damaged."""
    data = location.read(f"tuning/{name}.json")
    try:
        kept: dict[str, Any] | None = None if data is None else dict(json.loads(data))
    except (ValueError, TypeError):
        path = location.path(f"tuning/{name}.json")
        raise StorageError(f"{path} is damaged; delete it, and it is measured anew") from None
    return kept


def make_once(location: Location, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is kept under `name`; `make` is called where there is nothing, while others wait."""
    found, owner = cached(location, name), leases.new_owner()
    watch = leases.Watch(owner)
    while found is None:
        beat = leases.latest(location, name)
        lease = None
        if watch.free(name, beat):
            lease = Lease.acquire(location, name, Claim(owner, beat))
        if lease is None:
            time.sleep(WAIT)
            found = cached(location, name)
            continue
        with lease:
            found = cached(location, name)
            if found is None:
                found = make()
                location.write(f"tuning/{name}.json", json.dumps(found, indent=1).encode())
    return found
