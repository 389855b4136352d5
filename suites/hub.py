"""The hub's parquet shards with encoded images, readable at random without unpacking them to files.

Its two layouts are known: train-00000-of-00002.parquet, as data sets come, and the folders
default/train/0000.parquet, as it converts them.

Parquet has to be decoded by groups of rows, so each part is copied once into an Arrow file beside
the shards, which is mapped into memory: a sample costs its own bytes.
"""

import hashlib
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import track
from torch import Tensor

from harness.errors import UserError, one_line
from harness.paths import files_below

ROWS = 256  # copied at a time
SCHEMA = pa.schema([("image", pa.large_binary()), ("label", pa.int64())])
PARTS = {  # what words in the names of files and folders say so
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
IMAGES = ("image", "img", "images", "picture", "jpg", "jpeg", "png", "webp", "pixel_values")
LABELS = ("label", "labels", "fine_label", "class", "cls", "class_id", "target", "category")


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


def shards(root: Path, part: str, *, called: bool = False) -> list[Path]:
    """The part's parquet files below `root`: those called train-….parquet or, where there is none
    and this is not asked for, those whose name or folder has that word in it.

    Raises UserError where they belong to several data sets.
    """
    files = sorted(map(Path, files_below(root, [".parquet"]))) if root.is_dir() else []
    found = [file for file in files if file.name.startswith(f"{part}-")]
    counted = not found or "-of-" in found[0].name
    sets = [_total(file) if counted else "" for file in found]
    if not found and not called:
        placed = {file: _placed(file.relative_to(root)) for file in files}
        found = [file for file in files if placed[file][0] == part]
        sets = [f"{placed[file][1]} {_total(file)}" for file in found]
    names: dict[str, Path] = {}
    for file, its in zip(found, sets, strict=True):
        other = names.setdefault(file.name, file) if its == sets[0] else found[0]
        if counted and other != file:
            raise UserError(
                f"{root}: there are several data sets, as {other.relative_to(root)} and "
                f"{file.relative_to(root)} show; point --set data.root=… at the folder of one"
            )
    return found


def _placed(file: Path) -> tuple[str | None, Path]:
    """The part that a word in the file's name stands for, or in that of the nearest folder; and
    the folder around what has that name: that of a configuration.
    """
    for place in (file.with_suffix(""), *file.parents):
        for word in re.split("[^a-z]+", place.name.lower()):
            for part, words in PARTS.items():
                if word in words:
                    return part, place.parent
    return None, file.parent


def _total(file: Path) -> str:
    """Of train-00000-of-00294.parquet, or ….-of-00294-a1b2.parquet, it is 00294."""
    return file.stem.partition("-of-")[2].split("-")[0]


def encoded(root: Path, part: str) -> Encoded:
    """The part's rows, copied before if nobody has.

    Raises UserError for shards that are missing, damaged or without images and labels, and where
    the copy can't be written.
    """
    files = complete(root, part, shards(root, part))
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


def complete(root: Path, part: str, files: list[Path]) -> list[Path]:
    """The part's `files`; raises UserError where there is none, or their names say that some are
    missing: train-00000-of-00294.parquet tells how many there are, 0003.parquet how many before it
    (those of other lengths than the hub's four may begin at 1).
    """
    if not files:
        raise UserError(f"{root}: no {part}-*.parquet beside the other parquet files; add them")
    total = _total(files[0])
    if total.isdecimal() and len(files) != int(total):
        raise UserError(
            f"{files[0].parent}: {len(files)} of {int(total)} {part} shards are there; add the "
            "others"
        )
    lacking = _lacking([file.stem for file in files])
    if lacking:
        raise UserError(f"{files[0].parent}: {lacking}.parquet is not there; add it")
    return files


def _lacking(stems: list[str]) -> str:
    """The first number that is left out; of long ones without a zero before them, which are dates
    or the like, nothing is known.
    """
    counts = [stem for stem in stems if re.fullmatch("[0-9]{1,4}|0[0-9]+", stem)]
    if not counts:
        return ""
    digits, numbers = min(map(len, counts)), {int(stem) for stem in counts}
    first = 0 if digits == 4 else min(1, *numbers)
    lacking = next(n for n in itertools.count(first) if n not in numbers)
    return f"{lacking:0{digits}d}" if lacking < max(numbers) else ""


def _copy(files: list[Path], path: Path) -> None:
    """Remove the old copy of shards that have changed meanwhile."""
    part = path.name.rpartition("-")[0]
    for old in path.parent.glob(f"{part}-*.arrow"):
        old.unlink()
    temporary = path.with_suffix(".part")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for file in _followed(files):
                for batch in rows(file, "image"):
                    writer.write_batch(batch)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def rows(file: Path, usual: str) -> Iterator[pa.RecordBatch]:
    """The rows of a parquet file: "image", encoded as large_binary, and "label", int64.

    Columns are found by the names that are common for them, that of images at `usual` first. Raises
    UserError for a file that is damaged or has none of them.
    """
    try:
        parquet = pq.ParquetFile(file)
        image, label = _columns(file, parquet, usual)
        for batch in parquet.iter_batches(ROWS, columns=[image, label]):
            encoded, labels = batch.column(image), _whole(file, label, batch.column(label))
            if pa.types.is_struct(encoded.type):
                pictures, encoded = encoded, pc.struct_field(encoded, "bytes")
                if encoded.null_count == len(encoded) and _has_paths(pictures):
                    raise UserError(_paths_alone(file, image))
            if encoded.null_count or labels.null_count:
                raise ValueError("rows without the bytes of an image, or without a label")
            yield pa.record_batch([encoded.cast(pa.large_binary()), labels], schema=SCHEMA)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(
            f"{file}: truncated, damaged or incomplete ({one_line(error)}); replace the file"
        ) from None


def _whole(file: Path, name: str, labels: pa.Array) -> pa.Array:
    try:
        return labels.cast(pa.int64())
    except pa.ArrowException as error:
        raise UserError(
            f"{file}: {name} ({labels.type}) holds what is no whole number ({one_line(error)}); "
            "number the classes from 0 on"
        ) from None


def _has_paths(pictures: pa.StructArray) -> bool:
    if _field(pictures.type, "path") is None:
        return False
    return bool(pc.struct_field(pictures, "path").null_count < len(pictures))


def _paths_alone(file: Path, name: str) -> str:
    return (
        f"{file}: {name} holds paths, not pictures; save it with the pictures embedded (as bytes)"
    )


def _columns(file: Path, parquet: pq.ParquetFile, usual: str) -> tuple[str, str]:
    """The names of the columns with the images and the labels, in any case."""
    there = {field.name: field.type for field in parquet.schema_arrow}
    spelt = {name.lower(): name for name in sorted(there)}  # in small letters, where there are two
    named = [spelt[name] for name in (usual, *IMAGES) if name in spelt]
    images = [name for name in named if _holds_images(there[name])]
    labels = [spelt[name] for name in LABELS if name in spelt]
    # Those that are none by their type may be by their values.
    ranked = [name for name in labels if pa.types.is_integer(there[name])]
    ranked = ranked or [name for name in labels if _castable(parquet, name)]
    real = (pa.types.is_floating, pa.types.is_decimal)  # said by their values
    ranked = ranked or [name for name in labels if any(kind(there[name]) for kind in real)]
    if images and ranked:
        return images[0], ranked[0]
    paths = [name for name in named if _field(there[name], "path")]
    if paths and not images:
        raise UserError(_paths_alone(file, paths[0]))
    others = ", ".join(name for name in IMAGES if name != usual)
    raise UserError(
        f"{file}: without the columns {usual} (bytes, or a struct with bytes; or called {others}) "
        f"and label (whole numbers; or called {', '.join(LABELS[1:])}): there are "
        f"{', '.join(f'{name} ({kind})' for name, kind in there.items())}; rename them"
    )


def _castable(parquet: pq.ParquetFile, name: str) -> bool:
    try:
        parquet.read([name])[name].cast(pa.int64())
    except pa.ArrowException:
        return False
    return True


def _field(kind: pa.DataType, name: str) -> pa.DataType | None:
    place = kind.get_field_index(name) if pa.types.is_struct(kind) else -1
    return kind.field(place).type if place >= 0 else None


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        kind = _field(kind, "bytes")
    if kind is None:
        return False
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind)
    )


def _followed(files: list[Path]) -> Iterable[Path]:
    """The items, with a progress bar on the error stream where that is a terminal."""
    shown = sys.stderr.isatty()
    what = f"copying {len(files)} parquet files for reading at random"
    return track(files, what, console=Console(stderr=True), transient=True, disable=not shown)
