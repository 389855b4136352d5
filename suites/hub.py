"""The hub's parquet shards with encoded images, readable at random without unpacking them to files.

Parquet has to be decoded by groups of rows, so each part is copied once into an Arrow file beside
the shards, which is mapped into memory: a sample costs its own bytes.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import track
from torch import Tensor

from harness.errors import UserError, one_line

ROWS = 256  # copied at a time
SCHEMA = pa.schema([("image", pa.large_binary()), ("label", pa.int64())])


class Encoded:
    """Rows of one part: `labels` int64 [n]; item i is the encoded bytes of image i."""

    def __init__(self, table: pa.Table) -> None:
        self._images = table["image"]
        self.labels: Tensor = torch.from_numpy(table["label"].to_numpy().copy()).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> bytes:
        encoded: bytes = self._images[index].as_py()
        return encoded


def shards(root: Path, part: str) -> list[Path]:
    """The part's parquet files below `root`."""
    return sorted(root.glob(f"**/{part}-*.parquet"))


def encoded(root: Path, part: str) -> Encoded:
    """The part's rows, copied before if nobody has.

    Raises UserError for shards that are missing, damaged or without images and labels, and where
    the copy can't be written.
    """
    files = shards(root, part)
    if not files:
        raise UserError(f"{root}: no {part}-*.parquet beside the other parquet files; add them")
    _check_complete(files, part)
    known = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    name = hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]
    path = root / f".neqbench-{part}-{name}.arrow"
    try:
        if not path.is_file():
            with FileLock(root / f".neqbench-{part}.lock"):
                if not path.is_file():
                    _copy(files, path)
        return Encoded(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
    except pa.ArrowException:
        raise UserError(f"{path} is damaged; delete it, and it is copied anew") from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{root}: the images of {part}-*.parquet can't be copied there for reading at random "
            f"({reason}); it needs their size once more"
        ) from None


def _check_complete(files: list[Path], part: str) -> None:
    """The names say how many there are: train-00000-of-00294.parquet."""
    _, of, total = files[0].stem.partition("-of-")
    if of and total.split("-")[0].isdecimal() and len(files) != int(total.split("-")[0]):
        raise UserError(
            f"{files[0].parent}: {len(files)} of {int(total.split('-')[0])} {part} shards are "
            "there; add the others"
        )


def _copy(files: list[Path], path: Path) -> None:
    """Remove the old copy of shards that have changed meanwhile."""
    part = path.name.rpartition("-")[0]
    for old in path.parent.glob(f"{part}-*.arrow"):
        old.unlink()
    temporary = path.with_suffix(".part")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for file in _followed(files):
                for batch in _batches(file):
                    writer.write_batch(batch)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    try:
        for batch in pq.ParquetFile(file).iter_batches(ROWS, columns=["image", "label"]):
            images = batch.column("image").field("bytes").cast(pa.large_binary())
            labels = batch.column("label").cast(pa.int64())
            yield pa.record_batch([images, labels], schema=SCHEMA)
    except (pa.ArrowException, KeyError, AttributeError, OSError) as error:
        raise UserError(
            f"{file}: truncated, damaged, or without the columns image (struct with bytes) "
            f"and label ({one_line(error)}); replace the file"
        ) from None


def _followed(files: list[Path]) -> Iterable[Path]:
    """The items, with a progress bar on the error stream where that is a terminal."""
    shown = sys.stderr.isatty()
    what = f"copying {len(files)} parquet files for reading at random"
    return track(files, what, console=Console(stderr=True), transient=True, disable=not shown)
