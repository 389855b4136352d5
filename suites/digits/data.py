"""scikit-learn's handwritten digits: 1,797 grey images of 8 × 8, shown at 16 × 16."""

import importlib.util
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from harness.data import Data, Images, Split
from harness.seeds import generator

TEST_SIZE = 597


def load(options: Data) -> Images:
    """The digits: 1,200 images to train on, 597 to test on, uint8 [n, 1, 16, 16].

    Nothing is read from disk but scikit-learn itself.
    """
    train, test = _splits(size=16)
    return Images(
        name="digits",
        train=train,
        test=test,
        mean=(0.305,),
        std=(0.34,),
        padding=2,
        flip=False,
        options=options,
    )


def load_like_mnist(options: Data) -> Images:
    """The same digits as MNIST shows its own, uint8 [n, 1, 28, 28]: 20 × 20 pixels within a margin
    of 4, and normalised by its mean and deviation.
    """
    train, test = _splits(size=20, margin=4)
    return Images(
        name="digits like MNIST",
        train=train,
        test=test,
        mean=(0.1307,),
        std=(0.3081,),
        padding=0,
        flip=False,
        options=options,
    )


def _splits(size: int, margin: int = 0) -> tuple[Split, Split]:
    """Those to train on and those to test on."""
    pixels, labels = _table()
    images = pixels.float().view(-1, 1, 8, 8) * (255 / 16)
    images = functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
    images = functional.pad(images.round().to(torch.uint8), [margin] * 4)
    order = torch.randperm(len(labels), generator=generator(0, "test split"))
    train, test = order[TEST_SIZE:], order[:TEST_SIZE]
    return _split(images[train], labels[train]), _split(images[test], labels[test])


def _table() -> tuple[Tensor, Tensor]:
    """What load_digits reads: importing it takes longer than all else that `plan` does."""
    package = importlib.util.find_spec("sklearn")
    assert package
    assert package.origin
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    values = torch.from_numpy(numpy.loadtxt(file, delimiter=",", dtype=numpy.int64))
    return values[:, :-1], values[:, -1]


def _split(images: Tensor, labels: Tensor) -> Split:
    return Split(labels, lambda indices: images[indices])
