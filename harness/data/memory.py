"""Data sets that fit into memory.

Images live as one uint8 tensor on the training device; crop and flip run there, batch by batch.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from harness.data.dataset import Batch, Batches, Dataset, Microbatch, some
from harness.errors import UserError
from harness.parallel import rank, workers
from harness.seeds import generator
from harness.suite.config import Recipe


@dataclass(frozen=True, slots=True)
class Split:
    """The training or the test set of Images.

    `labels`: int64 [n], or one for each pixel: [n, height, width]. `read(indices)` decodes images:
    uint8 [len(indices), channels, height, width].
    """

    labels: Tensor
    read: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Images(Dataset):
    """A data set that fits into memory.

    `mean` and `std` are per channel for values in [0, 1]; `padding` is that of the random crop
    (0: none), `flip` mirrors half of the images. Neither moves labels of pixels.
    """

    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.labels.dim() > 1 and (self.padding or self.flip):
            raise UserError(
                f"{self.name}: padding and flip move images and not the labels of their pixels; "
                "leave them out, or return Samples with a transform that moves both"
            )

    @property
    def sources(self) -> tuple[Split, Split]:
        """See Dataset."""
        return self.train, self.test

    def fingerprint(self) -> str:
        """See Dataset."""
        digest = hashlib.sha256()
        for split in self.sources:
            for tensor in (split.labels, split.read(some(len(split)))):
                digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def open(
        self,
        device: torch.device,
        seed: int,
        recipe: Recipe,
        *,
        loaders: int = 0,
        most: int | None = None,
    ) -> Batches:
        """See Dataset; decodes what is used and moves it to the device."""
        parts = {
            name: (split.read(indices).to(device), split.labels[indices].to(device))
            for name, (split, indices) in self.parts(most).items()
        }
        return InMemory(self, parts, seed, recipe)


class InMemory(Batches):
    """Batches of (float32 images [n, channels, height, width], labels [n] or of pixels)."""

    def __init__(self, images: Images, parts: dict[str, Batch], seed: int, recipe: Recipe) -> None:
        super().__init__({name: len(labels) for name, (_, labels) in parts.items()}, recipe)
        self._parts, self._seed = parts, seed
        self._padding, self._flip = images.padding, images.flip
        device = parts["train"][0].device
        mean, std = (
            torch.tensor(v, device=device).view(-1, 1, 1) for v in (images.mean, images.std)
        )
        self._scale, self._shift = 1 / (255 * std), mean / std

    def train(self, epoch: int) -> Iterator[Microbatch]:
        """See Batches."""
        images, labels = self._parts["train"]
        count, device = len(labels), images.device
        order = torch.randperm(count, generator=generator(self._seed, "order", epoch)).to(device)
        stream = generator(self._seed, "augmentation", epoch)
        corners = torch.randint(2 * self._padding + 1, (count, 2), generator=stream).to(device)
        mirrored = (torch.rand(count, generator=stream) < 0.5).to(device)
        for share in self._shares():
            rows = share.rows
            batch = images[order[rows]]
            if self._padding:
                batch = crop(batch, self._padding, corners[rows])
            if self._flip:
                batch = torch.where(mirrored[rows, None, None, None], batch.flip(-1), batch)
            targets = labels[order[rows]]
            yield Microbatch(self._normalised(batch), targets, share.weight, share.last)

    def evaluate(self, part: str, batch_size: int) -> Iterator[Batch]:
        """See Batches; images come in order."""
        images, labels = (tensor[rank() :: workers()] for tensor in self._parts[part])
        for start in range(0, len(labels), batch_size):
            chosen = slice(start, start + batch_size)
            yield self._normalised(images[chosen]), labels[chosen]

    def _normalised(self, batch: Tensor) -> Tensor:
        return batch.float() * self._scale - self._shift


def crop(images: Tensor, padding: int, corners: Tensor) -> Tensor:
    """Pad images with zeros, and cut from each a window of its former size.

    `images` [n, channels, height, width]; `corners` int64 [n, 2]: top and left, 0 to 2 · padding.
    """
    count, _, height, width = images.shape
    padded = functional.pad(images, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    everyone = torch.arange(count, device=images.device)
    return windows[everyone, :, corners[:, 0], corners[:, 1]]
