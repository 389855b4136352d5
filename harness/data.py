"""Images for a trial: what a suite's data part returns, and the batches that a trial trains on.

Everything lives as one uint8 tensor on the training device; crop and flip run there in batches.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from harness import suites
from harness.config import Data, Suite
from harness.errors import UserError
from harness.streams import generator

EVALUATION_BATCH = 500
FINGERPRINT_SAMPLES = 16

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Split:
    """`labels`: int64 [n]. `read(indices)`: uint8 [len(indices), channels, height, width]."""

    labels: Tensor
    read: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Images:
    """A data set, not yet decoded; `options` say how much of it is used.

    `mean` and `std` are per channel for values in [0, 1]; `padding` is that of the random crop
    (0: none), `flip` mirrors half of the images.

    Raises UserError where the validation images leave none to train on.
    """

    name: str
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    options: Data

    def __post_init__(self) -> None:
        available, size = len(self.train.labels), self.options.train_size
        if size is not None and size > available:
            raise UserError(
                f"data.train_size: {size} is more than the {available} images of {self.name}; "
                "lower it or leave it out"
            )
        if self.options.validation_size >= (size or available):
            raise UserError(
                f"data.validation_size: {self.options.validation_size} of {size or available} "
                "training images leave none to train on; lower it"
            )

    @cached_property
    def indices(self) -> tuple[Tensor, Tensor]:
        """(training, validation) indices into the training set; the validation part is taken out
        of it.
        """
        shuffle = generator(self.options.split_seed, "split")
        chosen = torch.randperm(len(self.train.labels), generator=shuffle)
        chosen = chosen[: self.options.train_size]
        return chosen[self.options.validation_size :], chosen[: self.options.validation_size]

    def fingerprint(self) -> str:
        """Hash of counts, labels and some decoded samples; nothing of where they lie."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            count = len(split.labels)
            some = torch.linspace(0, count - 1, min(count, FINGERPRINT_SAMPLES)).long()
            for tensor in (split.labels, split.read(some)):
                digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def open(self, device: torch.device, seed: int, batch_size: int) -> "Batches":
        """Decode what is used and move it to the device."""
        train, validation = self.indices
        everything = torch.arange(len(self.test.labels))
        parts = {}
        for name, split, indices in (
            ("train", self.train, train),
            ("validation", self.train, validation),
            ("test", self.test, everything),
        ):
            images, labels = split.read(indices).to(device), split.labels[indices].to(device)
            parts[name] = images, labels
        return Batches(self, parts, seed, batch_size)


def load_images(suite: Suite, folder: Path | str) -> Images:
    """What the suite's data part returns; raises UserError where that is no Images."""
    try:
        images = suites.part(suite.data.load, folder)(suite.data)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{suite.data.load!r} failed: {suites.said(error)}") from error
    if not isinstance(images, Images):
        raise UserError(f"{suite.data.load!r} returned {type(images).__name__}, not Images")
    return images


class Batches:
    """Batches of (float32 images [n, channels, height, width], int64 labels [n])."""

    def __init__(self, images: Images, parts: dict[str, Batch], seed: int, batch_size: int) -> None:
        self._parts = parts
        self._seed = seed
        self._batch_size = batch_size
        self._padding, self._flip = images.padding, images.flip
        device = parts["train"][0].device
        mean, std = (
            torch.tensor(v, device=device).view(-1, 1, 1) for v in (images.mean, images.std)
        )
        self._scale, self._shift = 1 / (255 * std), mean / std

    def size(self, part: str) -> int:
        """Images in "train", "validation" or "test"."""
        return len(self._parts[part][1])

    def train(self, epoch: int) -> Iterator[Batch]:
        """One epoch: order and augmentation each from its own stream, drawn on the CPU."""
        images, labels = self._parts["train"]
        count, device = len(labels), images.device
        order = torch.randperm(count, generator=generator(self._seed, "order", epoch)).to(device)
        stream = generator(self._seed, "augmentation", epoch)
        corners = torch.randint(2 * self._padding + 1, (count, 2), generator=stream).to(device)
        mirrored = (torch.rand(count, generator=stream) < 0.5).to(device)
        for start in range(0, count, self._batch_size):
            part = slice(start, start + self._batch_size)
            batch = images[order[part]]
            if self._padding:
                batch = crop(batch, self._padding, corners[part])
            if self._flip:
                batch = torch.where(mirrored[part, None, None, None], batch.flip(-1), batch)
            yield self._normalised(batch), labels[order[part]]

    def evaluate(self, part: str) -> Iterator[Batch]:
        """All of a part, in order, without augmentation."""
        images, labels = self._parts[part]
        for start in range(0, len(labels), EVALUATION_BATCH):
            chosen = slice(start, start + EVALUATION_BATCH)
            yield self._normalised(images[chosen]), labels[chosen]

    def _normalised(self, batch: Tensor) -> Tensor:
        return batch.float() * self._scale - self._shift


def crop(images: Tensor, padding: int, corners: Tensor) -> Tensor:
    """Pad with zeros, then cut each image's own window.

    `images` [n, channels, height, width]; `corners` int64 [n, 2]: top and left, 0 to 2 · padding.
    """
    count, _, height, width = images.shape
    padded = functional.pad(images, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    everyone = torch.arange(count, device=images.device)
    return windows[everyone, :, corners[:, 0], corners[:, 1]]
