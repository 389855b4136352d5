"""Where results lie: `<root>/<suite>/{trials,epochs,layers}/<trial>.parquet`, and beside them
`checkpoints`, `leases`, `plans`, and `tuning`, what was chosen by the clock for a kind of machine.

Nobody ever sees half a file. A checkpoint, which holds the rows so far, is the commit; parquet
follows from it. A commit is a file of its own, `checkpoints/<trial>/<epochs>.<lease>.<sha256>.pt`:
it replaces none, not even that of an owner who was thought dead, and what is damaged shows. Once it
has been read back, all others go but the one before it.
"""

import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.errors import UserError, line
from harness.storage import leases
from harness.storage.leases import Claim, Lease, Lost
from harness.storage.locations import StorageError, place
from harness.storage.requests import Plan
from harness.storage.schema import (
    READABLE,
    REWRITTEN,
    SCHEMA_VERSION,
    SCHEMAS,
    from_bytes,
    from_parquet,
)
from harness.suite.config import TrialSpec

COMMIT = re.compile(r"[0-9]{6}\.[0-9]{6}\.[0-9a-f]{16}\.pt")  # epochs, lease, checksum
TRIES = 5  # at commits that are removed while they are read


class NothingError(UserError):
    """There are no results."""


class Store:
    """The results of one suite below `root`, a path or a URI."""

    def __init__(self, root: Path | str, suite: str) -> None:
        self.place, self.name = place(root, suite), suite
        self._damaged: set[str] = set()

    def check_writable(self) -> None:
        """Raises UserError where results can't be written, before anything is computed."""
        name = f".writable.{leases.owner()}"
        try:
            self.place.write(name, b"")
            self.place.remove(name)
        except StorageError as error:
            raise UserError(f"results folder {self.place.uri} can't be written: {error}") from None

    def read(
        self,
        kind: str,
        columns: list[str] | None = None,
        but: Container[str] = (),
        only: Container[str] | None = None,
    ) -> pa.Table:
        """The rows of all trials `but` some, or of some `only`; raises UserError for damaged or
        newer files.
        """
        keys = [k for k in self._keys(kind) if k not in but and (only is None or k in only)]

        def one(key: str) -> pa.Table | None:
            return self._table(kind, key, columns)

        readers = self.place.readers
        with ThreadPoolExecutor(readers) as pool:
            found = (pool.map if readers > 1 else map)(one, keys)
            tables = [table for table in found if table is not None]
        if tables:
            return pa.concat_tables(tables)
        empty = SCHEMAS[kind].empty_table()  # which imports pandas
        return empty.select(columns or empty.column_names)

    def trial(self, key: str) -> dict[str, Any] | None:
        """The trial's row of `trials`, if it has one."""
        table = self._table("trials", key)
        return None if table is None else table.to_pylist()[0]

    def has_rows(self, key: str) -> bool:
        """Whether the trial's rows of `epochs` and `layers` are there."""
        return all(self.place.read(f"{kind}/{key}.parquet") for kind in ("epochs", "layers"))

    def with_rows(self) -> set[str]:
        """The trials whose rows of `epochs` and `layers` are there."""
        return set(self._keys("epochs")).intersection(self._keys("layers"))

    def epochs(self, key: str) -> list[dict[str, Any]]:
        """The trial's rows of `epochs`, as far as they are published."""
        table = self._table("epochs", key)
        return [] if table is None else table.to_pylist()

    def load_checkpoint(
        self, key: str, report: Callable[[str], None] = lambda path: None
    ) -> dict[str, Any] | None:
        """The last commit that is whole, on the CPU; newer ones that are damaged are reported.

        Raises StorageError where none is whole, and for one of another trial or version.
        """
        for _ in range(TRIES):
            self._damaged = set()
            for name in self._commits(key):
                data = self.place.read(name)
                if data is None:  # removed meanwhile: a newer one is there
                    break
                path = self.place.path(name)
                if _sum(data) == name.split(".")[-2]:
                    return _unpacked(data, key, path)
                self._damaged.add(name)
                report(path)
            else:
                break
        else:
            raise StorageError(
                f"{self.place.path('checkpoints')}/{key} can't be read: its files vanish; "
                "run the same command again"
            )
        if not self._damaged:
            return None
        raise StorageError(
            f"every checkpoint of trial {key} is damaged; delete {self.place.path('checkpoints')}/"
            f"{key} and run the same command again: it is computed anew"
        )

    def _commits(self, key: str) -> list[str]:
        """Newest first: of most epochs, then of the highest lease."""
        names = self.place.names(f"checkpoints/{key}")
        return [f"checkpoints/{key}/{name}" for name in reversed(names) if COMMIT.fullmatch(name)]

    def tuning(self, name: str) -> dict[str, Any] | None:
        """What was kept under that name; raises StorageError where the file is damaged."""
        data = self.place.read(f"tuning/{name}.json")
        try:
            kept: dict[str, Any] | None = None if data is None else dict(json.loads(data))
        except (ValueError, TypeError):
            path = self.place.path(f"tuning/{name}.json")
            raise StorageError(f"{path} is damaged; delete it, and it is measured anew") from None
        return kept

    def keep_tuning(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is kept under that name; made once, while others wait for it."""
        found, owner = self.tuning(name), leases.owner()
        watch = leases.Watch(owner)
        while found is None:
            beat = leases.latest(self.place, name)
            lease = None
            if watch.free(name, beat):
                lease = Lease.acquire(self.place, name, Claim(owner, beat))
            if lease is None:
                time.sleep(0.2)
                found = self.tuning(name)
                continue
            with lease:
                found = self.tuning(name)
                if found is None:
                    found = make()
                    self.place.write(f"tuning/{name}.json", json.dumps(found, indent=1).encode())
        return found

    def plan(self, plan: Plan) -> None:
        """Say what is to be run, for `status`, and by what it is to be judged, for `report`."""
        name = f"plans/{plan.group}.{_sum(plan.to_json())}.json"
        self.place.write(name, replace(plan, written=time.time()).to_json())

    def plans(self) -> list[Plan]:
        """All that `plan` was told, the oldest first; raises UserError where a file is damaged."""
        found = []
        for name in self.place.names("plans"):
            try:
                found.append(Plan.from_json(self.place.read(f"plans/{name}") or b""))
            except (ValueError, TypeError, KeyError, AttributeError):
                path = self.place.path(f"plans/{name}")
                raise UserError(
                    f"{path} is damaged, or of a newer neqbench; delete it: runs write it anew"
                ) from None
        return sorted(found, key=lambda plan: plan.written)

    def _keys(self, kind: str) -> list[str]:
        names = self.place.names(kind)
        return [name.removesuffix(".parquet") for name in names if name.endswith(".parquet")]

    def _table(self, kind: str, key: str, columns: list[str] | None = None) -> pa.Table | None:
        name = f"{kind}/{key}.parquet"
        data = self.place.read(name)
        if data is None:
            return None
        table, path = (
            from_parquet(data, self.place.path(name), kind, columns),
            self.place.path(name),
        )
        whose = set(table["trial"].unique().to_pylist())
        if whose - {key} or (kind == "trials" and len(table) != 1):
            raise UserError(f"{path} holds rows of {whose or 'nobody'}; {REWRITTEN}")
        return table


def stores(where: str, root: str) -> list[Store]:
    """The results meant by a suite's name (below `root`), a results root, or one suite's results.

    Raises NothingError where there are none.
    """
    inside = [] if "://" in where else [f"{root.rstrip('/')}/{where}"]
    for uri in (*inside, where):
        if _suite(uri):
            return [Store(*_split(uri))]
        below = [name for name in place(uri).names("") if _suite(f"{uri}/{name}")]
        if below:
            return [Store(uri, name) for name in below]
    raise NothingError(
        f"no results for {where!r} below {root!r}: run `neqbench run {where}` first, or name the "
        "folder that holds them"
    )


def _suite(uri: str) -> bool:
    return not {"trials", "plans"}.isdisjoint(place(uri).names(""))


def _split(uri: str) -> tuple[str, str]:
    parent, _, name = place(uri).uri.rpartition("/")
    return parent or "/", name


class Owner(Store):
    """The store of who holds a trial's lease; raises leases.Lost where that is another's now."""

    def __init__(self, root: Path | str, suite: str, lease: int) -> None:
        super().__init__(root, suite)
        self._lease = lease

    def write(self, kind: str, spec: TrialSpec, rows: pa.Table) -> None:
        """Replace the trial's file of one table."""
        name = f"{kind}/{spec.key}.parquet"
        self._write(spec.key, name, _parquet(rows))
        try:
            leases.check(self.place, spec.key, self._lease)
        except Lost:  # in the very moment: put back what the new owner has committed
            state = self.load_checkpoint(spec.key)
            if state and kind in state["rows"]:
                committed = from_bytes(state["rows"][kind].numpy().tobytes())
                self.place.write(name, _parquet(committed))
            raise

    def save_checkpoint(
        self, key: str, epochs: int, state: dict[str, Any], *, last: bool = False
    ) -> None:
        """Commit: from here on the trial continues after this state of so many epochs.

        Raises StorageError where the new commit can't be read back; the one before it stays.
        """
        import torch

        buffer = io.BytesIO()
        torch.save({"trial": key, "version": SCHEMA_VERSION, "state": state}, buffer)
        data = buffer.getvalue()
        earlier = [name for name in self._commits(key) if int(name.split(".")[1]) <= self._lease]
        name = f"checkpoints/{key}/{epochs:06d}.{self._lease:06d}.{_sum(data)}.pt"
        self._write(key, name, data)
        if self.place.read(name) != data:
            raise StorageError(
                f"{self.place.path(name)} reads back otherwise than it was written; mend the "
                "disk or share and run the same command again: the commit before it is kept"
            )
        kept = [name, *([] if last else [n for n in earlier if n not in self._damaged][:1])]
        for old in earlier:
            if old not in kept:
                self.place.remove(old)

    def sweep(self, key: str) -> None:
        """Remove what killed owners left of a commit half written."""
        self.place.sweep(f"checkpoints/{key}")

    def _write(self, key: str, name: str, data: bytes) -> None:
        def check() -> None:
            leases.check(self.place, key, self._lease)

        try:
            self.place.write(name, data, check)
        except StorageError:
            check()  # of one whose trial is another's now, nobody wants to know
            raise


class Follower(Owner):
    """The store of a process that leaves writing to another one."""

    def write(self, kind: str, spec: TrialSpec, rows: pa.Table) -> None:
        """Nothing."""

    def sweep(self, key: str) -> None:
        """Nothing."""

    def save_checkpoint(
        self, key: str, epochs: int, state: dict[str, Any], *, last: bool = False
    ) -> None:
        """Nothing."""


def _parquet(rows: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes, key: str, path: str) -> dict[str, Any]:
    """The state in a whole checkpoint; nothing but tensors and plain values is unpickled."""
    import torch

    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        owner, version, state = found["trial"], found["version"], dict(found["state"])
        state["rows"]
    except Exception as error:
        raise StorageError(
            f"checkpoint {path} is none of this neqbench ({line(error)[:100]}); use the "
            "neqbench that wrote it, or another --results"
        ) from None
    if version not in READABLE or owner != key:
        raise StorageError(
            f"checkpoint {path} is that of trial {owner}, version {version}; expected {key}, "
            f"version {SCHEMA_VERSION}: put it back where it was, or choose another --results"
        )
    return state


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
