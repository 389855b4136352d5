"""The format of a checkpoint: a trial's whole state in one file, its rows so far among it.

The file is what `torch.save` makes of {"trial": key, "version": schema version, "state": state}.
`state["rows"]` holds what a Recorder gives; tables lie there as Arrow files in uint8 tensors, for a
checkpoint is loaded with `weights_only=True`: nothing but tensors and plain values is unpickled.

This module alone knows the file's format; what is in `state` its writers know, an Assembly and a
Recorder. torch is imported where it is needed: `neqbench status` does not need it.
"""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from harness.errors import one_line
from harness.storage.locations import StorageError
from harness.storage.schema import READABLE, SCHEMA_VERSION, with_newer_columns

if TYPE_CHECKING:
    from torch import Tensor


def pack(key: str, state: Mapping[str, Any]) -> bytes:
    """The bytes of a checkpoint file with the state of trial `key`."""
    import torch

    buffer = io.BytesIO()
    torch.save({"trial": key, "version": SCHEMA_VERSION, "state": dict(state)}, buffer)
    return buffer.getvalue()


def unpack(data: bytes, key: str, path: str) -> dict[str, Any]:
    """The state in the bytes of a checkpoint file, tensors on the CPU.

    Raises StorageError, naming `path`, for what is no checkpoint, and for one of another trial or
    version.
    """
    import torch

    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        whose, version, state = found["trial"], found["version"], dict(found["state"])
        state["rows"]
    except Exception as error:
        raise StorageError(
            f"checkpoint {path} is none of this neqbench ({one_line(error)[:100]}); use the "
            "neqbench that wrote it, or another --results"
        ) from None
    if version not in READABLE or whose != key:
        raise StorageError(
            f"checkpoint {path} is that of trial {whose}, version {version}; expected {key}, "
            f"version {SCHEMA_VERSION}: put it back where it was, or choose another --results"
        )
    return state


def pack_table(table: pa.Table) -> "Tensor":
    """A table as an Arrow file in a uint8 tensor [bytes]."""
    import torch

    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return torch.frombuffer(bytearray(sink.getvalue().to_pybytes()), dtype=torch.uint8)


def unpack_table(packed: "Tensor") -> pa.Table:
    """The inverse of `pack_table`."""
    return pa.ipc.open_file(pa.py_buffer(packed.numpy().tobytes())).read_all()


def table_in(rows: Mapping[str, Any], kind: str) -> pa.Table:
    """The table of `kind` in a checkpoint's `rows`; columns newer than the checkpoint are null.

    Raises KeyError where there is none.
    """
    return with_newer_columns(unpack_table(rows[kind]), kind)
