"""scikit-learn's handwritten digits: 1,797 grey images of 8 × 8, shown at 16 × 16."""

import torch
from torch import Tensor
from torch.nn import functional

from harness.config import Data
from harness.data import Images, Split
from harness.streams import generator

TEST_SIZE = 597


def load(options: Data) -> Images:
    """1,200 to train on, 597 to test; nothing is read from disk but scikit-learn itself."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / 16)
    images = functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    images, labels = images.round().to(torch.uint8), torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=generator(0, "test split"))
    train, test = order[TEST_SIZE:], order[:TEST_SIZE]
    return Images(
        name="digits",
        train=_split(images[train], labels[train]),
        test=_split(images[test], labels[test]),
        mean=(0.305,),
        std=(0.34,),
        padding=2,
        flip=False,
        options=options,
    )


def _split(images: Tensor, labels: Tensor) -> Split:
    return Split(labels, lambda indices: images[indices])
