"""Data sets too large for memory: every sample is decoded when it is needed, in loader processes.

What a sample looks like depends on (seed, epoch, its index) alone, never on how many processes
decode or train.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from harness.data.dataset import Batch, Batches, Dataset, Microbatch, some
from harness.errors import UserError, with_origin
from harness.parallel import rank, workers
from harness.seeds import generator, seeded
from harness.suite.config import Recipe

Transform = Callable[[Any, Any], tuple[Tensor, Any]]


class Source(Protocol):
    """The training or the test set of Samples; item i is (PIL image or uint8 tensor, target).

    `labels`: int64 [n], or the names of the samples where a label is more than a number; they
    identify the set. An item that can't be read raises UserError.
    """

    @property
    def labels(self) -> Tensor | Sequence[str]:
        """One label, or name, for each sample."""
        ...

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """(image, target) of one sample, decoded and whole."""
        ...


@dataclass(frozen=True, kw_only=True)
class Samples(Dataset):
    """A data set that is decoded sample by sample.

    Transforms take image and target and return both: a float32 tensor [channels, height, width],
    and a number or tensor. `train_transform` may draw from the global random streams;
    `validation_transform` must return one size, that of the model's input. Test images are
    transformed as validation images are, unless `test_transform` says otherwise: its sizes may
    differ, and it sees images one by one.
    """

    train: Source
    test: Source
    train_transform: Transform
    validation_transform: Transform
    test_transform: Transform | None = None

    @property
    def sources(self) -> tuple[Source, Source]:
        """See Dataset."""
        return self.train, self.test

    def fingerprint(self) -> str:
        """See Dataset."""
        digest = hashlib.sha256()
        for source in self.sources:
            known = source.labels
            listed = known.tolist() if isinstance(known, Tensor) else list(known)
            digest.update(repr(listed).encode())
            for index in some(len(source)).tolist():
                for value in _read(source, index):
                    array = numpy.asarray(value)
                    digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
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
        """See Dataset; nothing is decoded yet."""
        return Streamed(self, self.parts(most), device, seed, recipe, loaders)


class Streamed(Batches):
    """Batches from a DataLoader; where there is a GPU, pinned and copied in the background."""

    def __init__(
        self,
        data: Samples,
        parts: dict[str, tuple[Source, Tensor]],
        device: torch.device,
        seed: int,
        recipe: Recipe,
        loaders: int,
    ) -> None:
        super().__init__({name: len(part) for name, (_, part) in parts.items()}, recipe)
        self._data, self._parts = data, parts
        self._device, self._seed, self._loaders = device, seed, loaders

    def train(self, epoch: int) -> Iterator[Microbatch]:
        """See Batches."""
        source, indices = self._parts["train"]
        draw = generator(self._seed, "order", epoch)
        order = indices[torch.randperm(len(indices), generator=draw)]
        cut = list(self._shares())
        samples = _Transformed(source, self._data.train_transform, self._seed, epoch)
        loaded = self._load(samples, [order[share.rows] for share in cut])
        for share, (inputs, targets) in zip(cut, loaded, strict=True):
            yield Microbatch(inputs, targets, share.weight, share.last)

    def evaluate(self, part: str, batch_size: int) -> Iterator[Batch]:
        """See Batches; samples come in order, test samples of sizes of their own one by one."""
        source, indices = self._parts[part]
        transform = self._data.validation_transform
        if part == "test" and self._data.test_transform is not None:
            transform, batch_size = self._data.test_transform, 1
        mine = indices[rank() :: workers()]
        samples = _Transformed(source, transform, self._seed, 0)
        yield from self._load(samples, list(torch.split(mine, batch_size)) if len(mine) else [])

    def _load(self, samples: "_Transformed", batches: list[Tensor]) -> Iterator[Batch]:
        pinned = self._device.type == "cuda"
        loader: DataLoader[Any] = DataLoader(
            samples,  # type: ignore[arg-type]
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=min(self._loaders, len(batches)),
            collate_fn=_collate,
            pin_memory=pinned,
            generator=generator(self._seed, "loaders"),  # else it draws from the global stream
            multiprocessing_context="fork" if self._loaders and batches else None,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            inputs, targets = (t.to(self._device, non_blocking=pinned) for t in batch)
            yield inputs, targets


class _Transformed:
    """Items of a source, each transformed with its own random stream."""

    def __init__(self, source: Source, transform: Transform, seed: int, epoch: int) -> None:
        self._source, self._transform, self._seed, self._epoch = source, transform, seed, epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Any] | UserError:
        """An error is handed over as a value: a loader process would wrap it in its traceback."""
        try:
            with seeded(self._seed, f"augmentation of {index}", self._epoch):
                return self._transform(*_read(self._source, index))
        except UserError as error:
            return error
        except Exception as error:
            return UserError(f"the transform of sample {index} failed: {with_origin(error)}")


def _read(source: Source, index: int) -> tuple[Any, Any]:
    try:
        image, target = source[index]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"sample {index} can't be read: {with_origin(error)}") from error
    return image, target


def _collate(items: list[tuple[Tensor, Any] | UserError]) -> Any:
    for item in items:
        if isinstance(item, UserError):
            return item
    shapes = [list(item[0].shape) for item in items if isinstance(item, tuple)]
    if other := [shape for shape in shapes if shape != shapes[0]]:
        return UserError(
            f"transformed images differ in size: {shapes[0]} and {other[0]}; let the transform end "
            "in one size"
        )
    return default_collate(items)
