"""CIFAR-10 from torchvision's layout, from the hub's parquet layout, or downloaded."""

from functools import partial
from pathlib import Path

import numpy
import pyarrow as pa
import torch
from torch import Tensor

from harness.data import Data, Images, Split
from harness.errors import UserError, one_line
from harness.vision import torchvision
from suites import hub
from suites.archives import fetch
from suites.pictures import decode

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BINARIES = "cifar-10-batches-py"
SIZE = 32


def load(options: Data) -> Images:
    """50,000 training and 10,000 test images below `options.root`.

    Raises UserError for missing, damaged or foreign files, and where a download fails.
    """
    root = Path(options.root)
    packed = (root / BINARIES).is_dir()
    shards = {part: hub.shards(root, part, called=packed) for part in ("train", "test")}
    if any(shards.values()):
        train, test = (_parquet(root, part, shards[part]) for part in ("train", "test"))
        name = "CIFAR-10 (JPEG)" if _is_jpeg(shards["test"][0]) else "CIFAR-10"
    else:
        train, test = _binaries(root)
        name = "CIFAR-10"
    return Images(
        name=name, train=train, test=test, mean=MEAN, std=STD, padding=4, flip=True, options=options
    )


def _binaries(root: Path) -> tuple[Split, Split]:
    """torchvision's own reader, which checks every file's MD5 sum."""
    datasets = torchvision("torchvision.datasets")
    if not (root / BINARIES).is_dir():
        _download(root)
    splits = []
    for train in (True, False):
        try:
            files = datasets.CIFAR10(str(root), train=train)
        except (RuntimeError, OSError, EOFError) as error:
            raise UserError(
                f"{root / BINARIES}: files are missing or damaged ({one_line(error)}); "
                "delete the folder to download it again"
            ) from None
        splits.append(_in_memory(torch.from_numpy(files.data), torch.tensor(files.targets)))
    return splits[0], splits[1]


def _in_memory(images: Tensor, labels: Tensor) -> Split:
    """`images` uint8 [n, height, width, channels]."""
    return Split(labels, lambda indices: images[indices].permute(0, 3, 1, 2).contiguous())


def _download(root: Path) -> None:
    get = partial(torchvision("torchvision.datasets").CIFAR10, download=True)
    where = f"put {BINARIES} or the parquet files there, or point --set data.root=… at them"
    fetch(root, BINARIES, get, where)


def _parquet(root: Path, part: str, shards: list[Path]) -> Split:
    tables = [_read(path) for path in hub.complete(root, part, shards)]
    encoded = pa.chunked_array([chunk for table in tables for chunk in table["image"].chunks])
    labels = torch.cat([torch.from_numpy(table["label"].to_numpy().copy()) for table in tables])
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) > 9:
        raise UserError(f"{shards[0]}: labels must be 0 to 9 and at least one; is it CIFAR-10?")

    def read(indices: Tensor) -> Tensor:
        images = torch.empty(len(indices), 3, SIZE, SIZE, dtype=torch.uint8)
        for row, index in enumerate(indices.tolist()):
            where = f"image {index} of {part}-*.parquet below {root}"
            images[row] = _decode(encoded[index].as_py(), where)
        return images

    return Split(labels.long(), read)


def _read(path: Path) -> pa.Table:
    return pa.Table.from_batches(hub.rows(path, "img"), hub.SCHEMA)


def _decode(encoded: bytes, where: str) -> Tensor:
    image = numpy.asarray(decode(encoded, where))
    if image.shape != (SIZE, SIZE, 3):
        raise UserError(
            f"{where} is {image.shape[1]} × {image.shape[0]}, not {SIZE} × {SIZE}; replace it"
        )
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def _is_jpeg(shard: Path) -> bool:
    return bool(_read(shard)["image"][0].as_py().startswith(b"\xff\xd8"))
