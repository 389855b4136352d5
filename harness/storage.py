"""Where results lie: `<root>/<suite>/{trials,epochs,layers,checkpoints}/<trial>`, and beside them
`tuning`, what was chosen by the clock for a kind of machine.

Every write goes to a temporary file whose name starts with a dot (readers skip it) and is then
renamed, so that nobody ever sees half a file. The checkpoint, which holds the rows so far, is the
commit; parquet follows from it.
"""

import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from harness.config import TrialSpec
from harness.errors import UserError
from harness.records import SCHEMA_VERSION, SCHEMAS


class Store:
    """The results of one suite below `root`."""

    def __init__(self, root: Path | str, suite: str) -> None:
        self.folder = Path(root) / suite

    def check_writable(self) -> None:
        """Raises UserError where results can't be written, before anything is computed."""
        try:
            for kind in (*SCHEMAS, "checkpoints", "tuning"):
                (self.folder / kind).mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix="."):
                pass
        except OSError as error:
            raise UserError(
                f"results folder {self.folder} can't be written ({error.strerror}); "
                "choose another with --results"
            ) from None

    def write(self, kind: str, spec: TrialSpec, rows: pa.Table) -> None:
        """Replace the trial's file of one table."""
        buffer = io.BytesIO()
        pq.write_table(rows, buffer)
        _replace(self.folder / kind / f"{spec.key}.parquet", buffer.getvalue())

    def read(self, kind: str) -> pa.Table:
        """The rows of all trials; raises UserError for a damaged file or a newer schema."""
        paths = sorted((self.folder / kind).glob("[!.]*.parquet"))
        tables = [_read(path, SCHEMAS[kind]) for path in paths]
        return pa.concat_tables(tables) if tables else SCHEMAS[kind].empty_table()

    def trial(self, key: str) -> dict[str, Any] | None:
        """The trial's row of `trials`, if it has one."""
        path = self.folder / "trials" / f"{key}.parquet"
        return _read(path, SCHEMAS["trials"]).to_pylist()[0] if path.is_file() else None

    def has_rows(self, key: str) -> bool:
        """Whether the trial's rows are there beside its row of `trials`."""
        kinds = ("epochs", "layers")
        return all((self.folder / kind / f"{key}.parquet").is_file() for kind in kinds)

    def epochs(self, key: str) -> list[dict[str, Any]]:
        """The trial's rows of `epochs`, as far as they are published."""
        path = self.folder / "epochs" / f"{key}.parquet"
        return _read(path, SCHEMAS["epochs"]).to_pylist() if path.is_file() else []

    def save_checkpoint(self, key: str, state: dict[str, Any]) -> None:
        """Commit: from here on the trial continues after this state."""
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        _replace(self._checkpoint(key), buffer.getvalue())

    def load_checkpoint(self, key: str) -> dict[str, Any] | None:
        """The last commit on the CPU; raises UserError where the file is damaged."""
        import torch

        path = self._checkpoint(key)
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(
                f"checkpoint {path} is damaged ({type(error).__name__}); "
                "delete it and run again with --retry-failed to compute the trial anew"
            ) from None
        return state

    def tuning(self, name: str) -> dict[str, Any] | None:
        """What was kept under that name; raises UserError where the file is damaged."""
        path = self.folder / "tuning" / f"{name}.json"
        if not path.is_file():
            return None
        try:
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path} is damaged; delete it, and it is measured anew") from None
        return kept

    def keep_tuning(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is kept under that name; made once, while others wait for it."""
        path = self.folder / "tuning" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{name}.lock")):
            found = self.tuning(name)
            if found is None:
                found = make()
                _replace(path, json.dumps(found, indent=1).encode())
        return found

    def _checkpoint(self, key: str) -> Path:
        return self.folder / "checkpoints" / f"{key}.pt"


class Follower(Store):
    """The store of a process that leaves tables to another one."""

    def __init__(self, store: Store) -> None:
        self.folder = store.folder

    def write(self, kind: str, spec: TrialSpec, rows: pa.Table) -> None:
        """Nothing."""


def identified(spec: TrialSpec, rows: list[dict[str, Any]], kind: str) -> pa.Table:
    """`rows` as a table of `kind`, with the columns that say whose they are."""
    identity = {
        "trial": spec.key,
        "group": spec.group,
        "suite": spec.suite.name,
        "method": spec.method,
        "seed": spec.seed,
    }
    return pa.Table.from_pylist([identity | row for row in rows], schema=SCHEMAS[kind])


def to_bytes(table: pa.Table) -> bytes:
    """Arrow's own file format, to be kept inside a checkpoint."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def from_bytes(data: bytes) -> pa.Table:
    """The inverse of `to_bytes`."""
    return pa.ipc.open_file(pa.py_buffer(data)).read_all()


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        # In one go: by its path it would be opened twice, and may be replaced in between.
        table = pq.read_table(pa.py_buffer(path.read_bytes()))
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is damaged ({' '.join(str(error).split())[:100]}); "
            "delete it and run the suite again: it is rewritten from its checkpoint"
        ) from None
    version = (table.schema.metadata or {}).get(b"neqbench.schema", b"?").decode()
    if version != SCHEMA_VERSION or table.schema.names != schema.names:
        raise UserError(
            f"{path}: schema version {version}, this neqbench reads version {SCHEMA_VERSION}; "
            "use the neqbench that wrote it, or another --results"
        )
    return table


def _replace(path: Path, data: bytes) -> None:
    """Write beside, flush to the disk, rename over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
