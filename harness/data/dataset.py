"""What a trial asks of its data, and how an epoch is cut into steps and shares of workers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import torch
from torch import Tensor

from harness.errors import UserError
from harness.parallel import rank, workers
from harness.seeds import generator
from harness.suite.config import Data, Recipe

FINGERPRINT_SAMPLES = 16  # of each set

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward of a step: float32 inputs [n, …] and targets [n, …] on the device.

    `weight`: of its mean loss, its share of the step's samples times the workers, over which
    gradients are averaged. `last`: the optimizer steps after it.
    """

    inputs: Tensor
    targets: Tensor
    weight: float
    last: bool


@dataclass(frozen=True, slots=True)
class Share:
    """Positions in the epoch's order that one forward of this worker takes."""

    rows: slice
    weight: float
    last: bool


def used(count: int, recipe: Recipe) -> int:
    """Samples of `count` that an epoch trains on.

    A last batch with fewer than two samples for each worker is left out: BatchNorm needs two.
    """
    rest = count % recipe.batch_size
    return count - rest if rest < 2 * workers() else count


def shares(count: int, recipe: Recipe) -> Iterator[Share]:
    """This worker's forwards of an epoch over `count` samples, as many as any other worker's."""
    world = workers()
    for start in range(0, used(count, recipe), recipe.batch_size):
        stop = min(start + recipe.batch_size, count)
        largest, smallest = ceil((stop - start) / world), (stop - start) // world
        forwards = min(ceil(largest / recipe.forward_size(world)), smallest // 2)
        for number in range(forwards := max(forwards, 1)):
            rows = slice(start + rank() + number * world, stop, world * forwards)
            samples = len(range(count)[rows])
            yield Share(rows, samples * world / (stop - start), number == forwards - 1)


class Batches(ABC):
    """An opened data set: batches on the training device, this worker's share of each."""

    def __init__(self, counts: Mapping[str, int], recipe: Recipe) -> None:
        self._counts, self._recipe = counts, recipe

    def size(self, part: str) -> int:
        """Samples of "train" (of an epoch), "validation" or "test", of all workers together."""
        count = self._counts[part]
        return used(count, self._recipe) if part == "train" else count

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return ceil(self.size("train") / self._recipe.batch_size)

    def _shares(self) -> Iterator[Share]:
        return shares(self._counts["train"], self._recipe)

    @abstractmethod
    def train(self, epoch: int) -> Iterator[Forward]:
        """One epoch: order and augmentation each from its own stream, drawn on the CPU."""

    @abstractmethod
    def evaluate(self, part: str, batch_size: int) -> Iterator[Batch]:
        """All of a part without augmentation, each sample on one worker, none padded."""


@dataclass(frozen=True, kw_only=True)
class Dataset(ABC):
    """What a suite's data part returns, not yet decoded; `options` say how much of it is used.

    Raises UserError where the validation samples leave none to train on.
    """

    name: str
    options: Data

    def __post_init__(self) -> None:
        available, size = len(self.sources[0]), self.options.train_size
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
        if not len(self.sources[1]):
            raise UserError(f"{self.name}: there is no test image; add some")

    @property
    @abstractmethod
    def sources(self) -> tuple[Any, Any]:
        """(training set, test set), each with a length and `labels`."""

    @cached_property
    def indices(self) -> tuple[Tensor, Tensor]:
        """(training, validation) indices into the training set; the validation part is taken out
        of it.
        """
        shuffle = generator(self.options.split_seed, "split")
        chosen = torch.randperm(len(self.sources[0]), generator=shuffle)
        chosen = chosen[: self.options.train_size]
        return chosen[self.options.validation_size :], chosen[: self.options.validation_size]

    def parts(self, most: int | None = None) -> dict[str, tuple[Any, Tensor]]:
        """Name of a part → the set that it is taken from, and which samples (`most`: the first)."""
        train, validation = self.indices
        source, test = self.sources
        everything = torch.arange(len(test))
        return {
            "train": (source, train[:most]),
            "validation": (source, validation[:most]),
            "test": (test, everything[:most]),
        }

    def labels(self) -> list[Tensor]:
        """Of each set, where they are known without decoding."""
        known = (source.labels for source in self.sources)
        return [labels for labels in known if isinstance(labels, Tensor)]

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of counts, labels and some decoded samples; nothing of where they lie."""

    @abstractmethod
    def open(
        self,
        device: torch.device,
        seed: int,
        recipe: Recipe,
        *,
        loaders: int = 0,
        most: int | None = None,
    ) -> Batches:
        """Ready for training; `loaders`: processes that decode beside this one; `most`: samples of
        each part.
        """


def some(count: int) -> Tensor:
    """Indices for a fingerprint, evenly spread."""
    return torch.linspace(0, count - 1, min(count, FINGERPRINT_SAMPLES)).long()
