"""MNIST and Fashion-MNIST from the IDX files of torchvision's layout, or downloaded."""

import gzip
import math
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray

from harness.data import Data, Images, Split
from harness.errors import UserError, one_line
from harness.vision import torchvision
from suites.archives import fetch

SIZE = 28
CLASSES = 10
UNSIGNED_BYTES = b"\x00\x00\x08"  # an IDX file of them starts so; the number of dimensions follows


@dataclass(frozen=True, slots=True)
class Collection:
    """Four IDX files in `<folder>/raw`; `folder` is torchvision's class, too.

    `mean` and `std`: of the training pixels, for values in [0, 1].
    """

    name: str
    folder: str
    mean: float
    std: float


MNIST = Collection("MNIST", "MNIST", 0.1307, 0.3081)
FASHION = Collection("Fashion-MNIST", "FashionMNIST", 0.2860, 0.3530)


def load(options: Data) -> Images:
    """MNIST's 60,000 training and 10,000 test images below `options.root`, uint8 [n, 1, 28, 28].

    Raises UserError for missing, damaged or foreign files, and where a download fails.
    """
    return _load(options, MNIST)


def load_fashion(options: Data) -> Images:
    """As `load`, for Fashion-MNIST."""
    return _load(options, FASHION)


def download(options: Data) -> None:
    """Fetch MNIST (12 MB) where its folder is not there; raises UserError where that fails."""
    _download(options, MNIST)


def download_fashion(options: Data) -> None:
    """As `download`, for Fashion-MNIST (31 MB)."""
    _download(options, FASHION)


def _load(options: Data, collection: Collection) -> Images:
    _download(options, collection)
    folder = Path(options.root) / collection.folder
    return Images(
        name=collection.name,
        train=_split(folder, "train"),
        test=_split(folder, "t10k"),
        mean=(collection.mean,),
        std=(collection.std,),
        padding=0,
        flip=False,
        options=options,
    )


def _download(options: Data, collection: Collection) -> None:
    root, folder = Path(options.root), collection.folder
    if (root / folder).is_dir():  # before `fetch`, which needs a root that can be written
        return
    get = partial(getattr(torchvision("torchvision.datasets"), folder), download=True)
    where = f"put its four IDX files into {folder}/raw there, or point --set data.root=… at them"
    fetch(root, folder, get, where)


def _split(folder: Path, part: str) -> Split:
    """`part`: train or t10k, as the files' names begin."""
    paths = [_find(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
    images, labels = _read(paths[0], folder, 3), _read(paths[1], folder, 1)
    mend = _mend(folder)
    if images.shape[1:] != (SIZE, SIZE):
        height, width = images.shape[1:]
        raise UserError(f"{paths[0]}: images are {width} × {height}, not {SIZE} × {SIZE}; {mend}")
    if len(images) != len(labels):
        raise UserError(f"{paths[1]}: {len(labels)} labels for {len(images)} images; {mend}")
    if (labels >= CLASSES).any():
        raise UserError(f"{paths[1]}: label {labels.max()} is not one of 0 to 9; {mend}")
    pixels = torch.from_numpy(images).unsqueeze(1)
    return Split(torch.from_numpy(labels).long(), lambda indices: pixels[indices])


def _find(folder: Path, name: str) -> Path:
    """The unpacked file, or else the packed one."""
    for path in (folder / "raw" / name, folder / "raw" / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(
        f"{folder / 'raw' / name}: missing, and so is {name}.gz; add it, "
        f"or delete {folder} to download it again"
    )


def _read(path: Path, folder: Path, dimensions: int) -> NDArray[numpy.uint8]:
    """An IDX file of unsigned bytes: its magic, big-endian sizes and values, and no more."""
    content = _content(path, folder)
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != UNSIGNED_BYTES + bytes([dimensions]):
        raise UserError(
            f"{path}: no IDX file of unsigned bytes in {dimensions} "
            f"dimension{'s' * (dimensions > 1)}; {_mend(folder)}"
        )
    shape = numpy.frombuffer(content, ">u4", dimensions, 4).tolist()
    count = len(content) - start
    if count != math.prod(shape) or count == 0:
        said = " × ".join(map(str, shape))
        raise UserError(f"{path}: {count} values, and its header says {said}; {_mend(folder)}")
    return numpy.frombuffer(content, numpy.uint8, offset=start).reshape(shape).copy()


def _content(path: Path, folder: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path}: truncated, damaged or unreadable ({one_line(error)}); {_mend(folder)}"
        ) from None


def _mend(folder: Path) -> str:
    return f"replace it, or delete {folder} to download it again"
