"""Scenes composed from scikit-learn's handwritten digits, with a label for each pixel."""

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from harness.data import Data, Images, Split
from harness.seeds import generator

TRAIN, TEST = 1050, 300
SIZE, DIGIT = 64, 24  # pixels of a scene, and of a digit in it
DIGITS = 4  # in a scene; later ones lie over earlier ones
INK = 0.35  # of full brightness, from which on a pixel belongs to its digit


def load(options: Data) -> Images:
    """1,050 scenes to train on, 300 of other digits to test on; label 0 is the background,
    n + 1 the digit n. Nothing is read from disk but scikit-learn itself.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pictures = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    pictures = functional.interpolate(pictures, size=DIGIT, mode="bilinear", align_corners=False)
    labels, half = torch.from_numpy(bunch.target.astype(numpy.int64)), 1200
    return Images(
        name="digits in scenes",
        train=_split(pictures[:half, 0], labels[:half], TRAIN, 0),
        test=_split(pictures[half:, 0], labels[half:], TEST, 1),
        mean=(0.15, 0.15, 0.15),
        std=(0.25, 0.25, 0.25),
        options=options,
    )


def _split(pictures: Tensor, labels: Tensor, count: int, seed: int) -> Split:
    draw = generator(seed, "scenes")
    chosen = torch.randint(len(labels), (count, DIGITS), generator=draw)
    corners = torch.randint(SIZE - DIGIT + 1, (count, DIGITS, 2), generator=draw)
    noise = 0.1 * torch.rand(count, 3, SIZE, SIZE, generator=draw)
    colours = 0.5 + 0.5 * torch.rand(count, DIGITS, 3, 1, 1, generator=draw)
    images, targets = noise, torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
    for scene in range(count):
        for position, (top, left) in enumerate(corners[scene].tolist()):
            digit = int(chosen[scene, position])
            window = (..., slice(top, top + DIGIT), slice(left, left + DIGIT))
            ink = pictures[digit] > INK
            painted = colours[scene, position] * pictures[digit]
            images[scene][window] = torch.where(ink, painted, images[scene][window])
            targets[scene][window][ink] = int(labels[digit]) + 1
    pixels = (255 * images).round().to(torch.uint8)
    return Split(targets, lambda indices: pixels[indices])
