"""`--synthetic`: noise of the right shape, to try plumbing and speed without the data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.data.dataset import Dataset
from harness.data.streamed import Samples
from harness.errors import UserError
from harness.seeds import generator, restored
from harness.suite import parts
from harness.suite.config import Suite
from harness.tasks import build_task

STEPS = 8  # of an epoch, where the suite does not say how many images
TEST = 32


class _Noise:
    """A Source of uint8 noise [channels, height, width], with targets of the task's choice."""

    def __init__(self, part: str, count: int, shape: tuple[int, ...], targets: Tensor) -> None:
        self._part, self._count, self._shape, self._targets = part, count, shape, targets

    @property
    def labels(self) -> Sequence[str]:
        """Names of the samples, all of them made up."""
        return [f"{self._part} {index}" for index in range(self._count)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        draw = generator(0, f"synthetic {self._part} {index}")
        image = torch.randint(256, self._shape, generator=draw, dtype=torch.uint8)
        return image, self._targets[index % len(self._targets)]


def synthetic(suite: Suite, folder: Path | str) -> Dataset:
    """A data set of noise in the shape of the suite's model input.

    Raises UserError where the model does not run on it, or the task can make no targets.
    """
    shape, data = suite.model.input, suite.data
    count = data.train_size or data.validation_size + STEPS * suite.recipe.batch_size
    task = build_task(suite, folder)
    with restored(), torch.no_grad():
        model = parts.build_model(suite.model.build, folder, suite.model.arguments).eval()
        try:
            outputs = model(torch.zeros(2, *shape))
        except Exception as error:
            raise UserError(
                f"the model does not run on an input of {list(shape)} "
                f"({type(error).__name__}: {error})"
            ) from error
    draw = generator(0, "synthetic targets")
    targets = torch.cat([task.random_targets(outputs, draw) for _ in range(TEST // 2)])
    return Samples(
        name="synthetic",
        train=_Noise("train", count, shape, targets),
        test=_Noise("test", TEST, shape, targets),
        train_transform=_scaled,
        validation_transform=_scaled,
        options=data,
    )


def _scaled(image: Tensor, target: Any) -> tuple[Tensor, Any]:
    return image.float() / 255 - 0.5, target
