"""Who holds a trial's lease writes its results; whoever lost it does not."""

import io
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.storage import leases
from harness.storage.checkpoint import table_in
from harness.storage.commits import Commits
from harness.storage.leases import LeaseLost
from harness.storage.locations import StorageError
from harness.storage.store import Store


class Owner:
    """Reads and writes the results of one trial under a lease.

    `key`: the trial's; `lease`: the number of the lease. All that writes raises leases.LeaseLost
    where a newer lease exists, and StorageError where the disk or the network fails.
    """

    def __init__(self, store: Store, key: str, lease: int) -> None:
        self.store, self.key = store, key
        self._commits, self._lease = Commits(store.location, key), lease

    def load_checkpoint(
        self, report: Callable[[str], None] = lambda path: None
    ) -> dict[str, Any] | None:
        """The state of the last commit that is whole, as `Commits.load` gives it."""
        return self._commits.load(report)

    def save_checkpoint(self, epochs: int, state: Mapping[str, Any], *, last: bool = False) -> None:
        """Commit: from here on the trial continues after this state of so many epochs."""
        self._commits.save(epochs, self._lease, state, self._write, last=last)

    def write_table(self, kind: str, rows: pa.Table) -> None:
        """Replace the trial's file of one table ("trials", "epochs", …)."""
        name = f"{kind}/{self.key}.parquet"
        self._write(name, _parquet(rows))
        try:
            leases.check_owned(self.store.location, self.key, self._lease)
        except LeaseLost:
            # The lease went in the very moment between the question and the write: what was
            # written may be older than what the new owner has published. Put its own back.
            state = self.load_checkpoint()
            if state and kind in state["rows"]:
                self.store.location.write(name, _parquet(table_in(state["rows"], kind)))
            raise

    def sweep(self) -> None:
        """Remove what killed owners left of a commit half written."""
        self._commits.sweep()

    def _write(self, name: str, data: bytes) -> None:
        # Asked at the last moment before the file is replaced: writing the data may take long.
        def check() -> None:
            leases.check_owned(self.store.location, self.key, self._lease)

        try:
            self.store.location.write(name, data, check)
        except StorageError:
            check()  # of one whose trial is another's now, nobody wants to know
            raise


class Follower(Owner):
    """For a worker that leaves writing to another one: it reads, and writes nothing."""

    def write_table(self, kind: str, rows: pa.Table) -> None:
        """Does nothing: the first worker writes."""

    def sweep(self) -> None:
        """Does nothing: the first worker writes."""

    def save_checkpoint(self, epochs: int, state: Mapping[str, Any], *, last: bool = False) -> None:
        """Does nothing: the first worker writes."""


def _parquet(rows: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer)
    return buffer.getvalue()
