"""Runs of Weights & Biases, on its server or in files for `wandb sync`."""

import json
import os
import struct
import time
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from neq.integrations import missing

try:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record
except ImportError as error:
    raise missing("wandb", "wandb") from error

SECONDS = 10.0  # for the server to answer
HEADER, BLOCK = 7, 2**15  # bytes, of LevelDB's log format


class _Run:
    """Rows by epoch. What is on the server is known by its last row alone."""

    def __init__(self, run: Any, *, offline: bool) -> None:
        self._run, self._offline = run, offline
        self._next = int(run.step)  # of the server's rows, after a resume

    def read(self) -> Iterator[tuple[str, int, float | None]]:
        if self._offline:
            folder = Path(self._run.dir).parents[1]
            for path in sorted(folder.glob(f"offline-run-*/run-{self._run.id}.wandb")):
                yield from _rows(path.read_bytes())

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        if epoch >= self._next:
            self._run.log(dict(values), step=epoch, commit=True)

    def close(self) -> None:
        # Offline, W&B comes back before its file is complete: who reads it now misses rows.
        path = Path(self._run.dir).parent / f"run-{self._run.id}.wandb"
        self._run.finish()
        end = time.monotonic() + SECONDS
        while self._offline and not _complete(path) and time.monotonic() < end:
            time.sleep(0.02)


def open_place(mode: str, run: str, config: Mapping[str, Any], project: str) -> _Run:
    """The run called `run`, in `project`; `mode`: "offline", or "" for the environment's."""
    quiet: dict[str, Any] = {"silent": True, "console": "off", "init_timeout": SECONDS}
    quiet |= {"disable_git": True, "disable_code": True, "x_disable_stats": True}
    online = not mode and wandb.setup(wandb.Settings(silent=True)).settings.mode == "online"
    if online and not wandb.login(prompt=False, verify=False):
        raise PermissionError("nobody is logged in: run `wandb login`, or log to wandb:offline")
    made = wandb.init(
        project=project,
        id=f"neq-{sha256(run.encode()).hexdigest()[:20]}",
        name=run,
        config=dict(config),
        resume="allow",
        reinit="create_new",
        dir=os.environ.get("WANDB_DIR") or str(Path.cwd()),  # not where the first run was
        mode="offline" if mode else None,
        settings=wandb.Settings(**quiet),
    )
    return _Run(made, offline=bool(made.offline))


def _complete(path: Path) -> bool:
    """Whether the file of a run has its end; one that was moved away is not waited for."""
    if not path.exists():
        return True
    records = map(Record.FromString, _records(path.read_bytes()))
    return any(record.HasField("exit") for record in records)


def _rows(data: bytes) -> Iterator[tuple[str, int, float | None]]:
    """(name, epoch, value) of the rows in an offline run's file; W&B has no reader of its own."""
    for record in map(Record.FromString, _records(data)):
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            if not name.startswith("_"):
                yield name, record.history.step.num, float(json.loads(item.value_json))


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a log as LevelDB writes it, as far as they are whole."""
    at, parts = HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        end = at + HEADER + size
        if end > len(data) or not kind:
            return
        parts += data[at + HEADER : end]
        at = end
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""
