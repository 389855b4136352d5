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
class Microbatch:
    """What one forward of this worker takes: float32 inputs [n, …] and targets [n, …].

    `weight`: what its mean loss counts in the step's gradient: its share of the step's samples,
    times the workers, over which gradients are averaged. `last`: whether the optimizer steps after
    it.
    """

    inputs: Tensor
    targets: Tensor
    weight: float
    last: bool


@dataclass(frozen=True, slots=True)
class Share:
    """Positions in the epoch's order that make one microbatch; else as Microbatch."""

    rows: slice
    weight: float
    last: bool


def used(count: int, recipe: Recipe) -> int:
    """How many of `count` samples an epoch trains on.

    A last batch with fewer than two samples for each worker is left out: BatchNorm needs two.
    """
    rest = count % recipe.batch_size
    return count - rest if rest < 2 * workers() else count


def shares(count: int, recipe: Recipe) -> Iterator[Share]:
    """This worker's microbatches of an epoch over `count` samples, as many as any other
    worker's.
    """
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
    """An opened data set: gives batches on the training device, this worker's share of each.

    `counts`: samples of "train", "validation" and "test".
    """

    def __init__(self, counts: Mapping[str, int], recipe: Recipe) -> None:
        self._counts, self._recipe = counts, recipe

    def size(self, part: str) -> int:
        """Samples of a part, of all workers together; of "train" as many as an epoch trains on."""
        count = self._counts[part]
        return used(count, self._recipe) if part == "train" else count

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return ceil(self.size("train") / self._recipe.batch_size)

    def _shares(self) -> Iterator[Share]:
        return shares(self._counts["train"], self._recipe)

    @abstractmethod
    def train(self, epoch: int) -> Iterator[Microbatch]:
        """The microbatches of an epoch, in an order of its own, augmented.

        Order and augmentation have a random stream each, drawn on the CPU.
        """

    @abstractmethod
    def evaluate(self, part: str, batch_size: int) -> Iterator[Batch]:
        """Batches of all of a part, without augmentation; each sample is on one worker, none twice.

        `part`: "train", "validation" or "test".
        """


@dataclass(frozen=True, kw_only=True)
class Dataset(ABC):
    """What a suite's data part returns, not yet decoded.

    `name`: as reports show it; `options`: the suite's Data, which say how much is used. Raises
    UserError where the validation samples leave none to train on.
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
        """(training set, test set), each with a length and with `labels`."""

    @cached_property
    def indices(self) -> tuple[Tensor, Tensor]:
        """Indices into the training set: (those to train on, those to validate on)."""
        shuffle = generator(self.options.split_seed, "split")
        chosen = torch.randperm(len(self.sources[0]), generator=shuffle)
        chosen = chosen[: self.options.train_size]
        return chosen[self.options.validation_size :], chosen[: self.options.validation_size]

    def parts(self, most: int | None = None) -> dict[str, tuple[Any, Tensor]]:
        """By part: (the set that it is taken from, indices into that); `most`: the first ones
        only.
        """
        train, validation = self.indices
        source, test = self.sources
        everything = torch.arange(len(test))
        return {
            "train": (source, train[:most]),
            "validation": (source, validation[:most]),
            "test": (test, everything[:most]),
        }

    def labels(self) -> list[Tensor]:
        """The labels of each set, where they are known without decoding."""
        known = (source.labels for source in self.sources)
        return [labels for labels in known if isinstance(labels, Tensor)]

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of counts, labels and some decoded samples; it does not depend on where they lie."""

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
        """The batches for training with `seed` by `recipe` on `device`.

        `loaders`: processes that decode beside this one; `most`: samples of each part (default:
        all).
        """


def some(count: int) -> Tensor:
    """Indices of the samples that make a fingerprint, evenly spread over `count`."""
    return torch.linspace(0, count - 1, min(count, FINGERPRINT_SAMPLES)).long()
