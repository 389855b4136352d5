"""What a model is trained for: its loss and its metric. The trial's loop knows no more of it.

Suites name a task by import string: "harness.tasks:Classification", or a subclass of Task.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from harness.errors import UserError
from harness.suite.config import Suite
from harness.suite.parts import build_part
from harness.vision import torchvision


class Meter(Protocol):
    """Accumulates a metric on the device, in integer `counts` that workers can add up."""

    counts: Tensor

    def add(self, outputs: Any, targets: Tensor) -> None:
        """Count one batch."""
        ...

    def value(self) -> float:
        """The metric that `counts` say, from 0 to 1; the only call that waits for the device."""
        ...


class Task(ABC):
    """A suite's task. `metric` names what its meter measures, a share from 0 to 1."""

    metric: str

    @abstractmethod
    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """The mean loss of a batch: a tensor of one number, with a gradient."""

    @abstractmethod
    def meter(self, device: torch.device) -> Meter:
        """A meter that has counted nothing yet."""

    def mix(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Augment a training batch as a whole, drawing from torch's global CPU stream."""
        return inputs, targets

    def check_labels(self, outputs: Any, labels: Tensor) -> None:  # noqa: B027
        """Raises UserError where one of all the labels of a part does not fit the outputs."""

    def random_targets(self, outputs: Any, draw: torch.Generator) -> Tensor:
        """Targets that fit the outputs of one batch, for `--synthetic`; raises UserError."""
        raise UserError(
            f"{type(self).__name__} has no random_targets, which --synthetic needs; add it, or do "
            "without --synthetic"
        )

    def check(self, outputs: Any, targets: Tensor) -> None:  # noqa: B027 — for those who want it
        """Raises UserError where targets and outputs of a batch don't fit together."""


def build_task(suite: Suite, folder: Path | str) -> Task:
    """The task that a suite names; raises UserError where that fails, or is no Task."""
    task = build_part(suite.task, folder, suite.task_arguments)
    if not isinstance(task, Task):
        raise UserError(f"{suite.task!r} returned {type(task).__name__}, not a harness.tasks.Task")
    if not isinstance(getattr(task, "metric", None), str):
        raise UserError(f"{suite.task!r} has no metric: name what its meter measures")
    return task


class Classification(Task):
    """Cross-entropy and top-1 accuracy.

    `label_smoothing`: share of the target spread over all classes; `mixup` and `cutmix`: their
    alphas (0: none), one of the two drawn for each batch (Zhang et al. 2018, Yun et al. 2019);
    they need the number of `classes`.
    """

    metric = "accuracy"

    def __init__(
        self,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        classes: int = 0,
    ) -> None:
        self._smoothing, self._classes = label_smoothing, classes
        alphas = {"MixUp": mixup, "CutMix": cutmix}
        if any(alphas.values()) and classes < 1:
            raise ValueError(
                "mixup and cutmix need the number of classes; set task_arguments.classes"
            )
        self._mixes = [
            getattr(torchvision("torchvision.transforms.v2"), name)(alpha=a, num_classes=classes)
            for name, a in alphas.items()
            if a
        ]

    def mix(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The batch mixed by mixup or cutmix; its targets become shares [samples, classes]."""
        if not self._mixes:
            return inputs, targets
        drawn = self._mixes[int(torch.randint(len(self._mixes), ()))]
        mixed: tuple[Tensor, Tensor] = drawn(inputs, targets)
        return mixed

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of outputs [samples, classes]; targets: [samples], or shares like
        outputs.
        """
        return functional.cross_entropy(outputs, targets, label_smoothing=self._smoothing)

    def meter(self, device: torch.device) -> "Accuracy":
        """A meter that has counted nothing yet."""
        return Accuracy(device)

    def random_targets(self, outputs: Tensor, draw: torch.Generator) -> Tensor:
        """A random class for each sample: int64 [samples]."""
        return torch.randint(outputs.shape[1], (len(outputs),), generator=draw)

    def check(self, outputs: Any, targets: Tensor) -> None:
        """Raises UserError unless there is one class for each sample, and the model knows it."""
        _check_shape(outputs, targets, (len(targets),))
        if self._mixes and self._classes != outputs.shape[1]:
            raise UserError(
                f"the model has {outputs.shape[1]} classes, the task mixes {self._classes}; "
                "set task_arguments.classes or model.arguments"
            )
        self.check_labels(outputs, targets)

    def check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        """Raises UserError unless labels are integers from 0 to the model's classes − 1."""
        _check_range(outputs.shape[1], labels)


class Accuracy:
    """Share of samples whose largest output is the target's: 0 to 1, NaN without samples."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch of outputs [samples, classes] and targets [samples]."""
        self.counts[0] += (outputs.argmax(1) == targets).sum()
        self.counts[1] += len(targets)

    def value(self) -> float:
        """The share of samples that were right."""
        correct, samples = self.counts.tolist()
        return correct / samples if samples else float("nan")


class Segmentation(Task):
    """Cross-entropy and mean intersection over union, over pixels that are not `ignore`.

    Models return logits [samples, classes, height, width], or torchvision's dict of them: "out"
    and "aux", whose loss counts `auxiliary` times, in validation and test loss, too.
    """

    metric = "mean IoU"

    def __init__(self, classes: int, ignore: int = 255, auxiliary: float = 0.5) -> None:
        self._classes, self._ignore, self._auxiliary = classes, ignore, auxiliary

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """The mean loss over pixels; targets: integers [samples, height, width].

        It is zero where every pixel is ignored.
        """
        loss = self._one(_logits(outputs), targets)
        if isinstance(outputs, dict) and "aux" in outputs:
            loss = loss + self._auxiliary * self._one(outputs["aux"], targets)
        return loss

    def _one(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets.long()
        total = functional.cross_entropy(
            logits, targets, ignore_index=self._ignore, reduction="sum"
        )
        return total / (targets != self._ignore).sum().clamp(min=1)

    def meter(self, device: torch.device) -> "MeanIoU":
        """A meter that has counted nothing yet."""
        return MeanIoU(self._classes, self._ignore, device)

    def random_targets(self, outputs: Any, draw: torch.Generator) -> Tensor:
        """A random class for each pixel: uint8 [samples, height, width]."""
        samples, classes, *shape = _logits(outputs).shape
        return torch.randint(classes, (samples, *shape), generator=draw, dtype=torch.uint8)

    def check(self, outputs: Any, targets: Tensor) -> None:
        """Raises UserError unless there is one class, that the model knows, for each pixel."""
        logits = _logits(outputs)
        if logits.shape[1] != self._classes:
            raise UserError(
                f"the model has {logits.shape[1]} classes, the task {self._classes}; "
                "set task_arguments.classes or model.arguments"
            )
        _check_shape(logits, targets, (len(targets), *logits.shape[2:]))
        self.check_labels(outputs, targets)

    def check_labels(self, outputs: Any, labels: Tensor) -> None:
        """Raises UserError unless labels are below the model's classes, or `ignore`."""
        _check_range(_logits(outputs).shape[1], labels[labels != self._ignore])


class MeanIoU:
    """Intersection over union, averaged over the classes that targets or predictions have."""

    def __init__(self, classes: int, ignore: int, device: torch.device) -> None:
        self._ignore = ignore
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def add(self, outputs: Any, targets: Tensor) -> None:
        """Count a batch of logits (or a dict with "out") and targets [samples, height, width]."""
        predicted, seen, classes = (
            _logits(outputs).argmax(1),
            targets != self._ignore,
            len(self.counts),
        )
        pairs = targets[seen].long() * classes + predicted[seen]
        self.counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes)

    def value(self) -> float:
        """The mean over classes, from 0 to 1; NaN without pixels."""
        counts = self.counts.double()
        common = counts.diag()
        union = counts.sum(0) + counts.sum(1) - common
        return float((common / union)[union > 0].mean())


def _logits(outputs: Any) -> Tensor:
    logits: Tensor = outputs["out"] if isinstance(outputs, dict) else outputs
    return logits


def _check_shape(outputs: Any, targets: Tensor, wanted: tuple[int, ...]) -> None:
    if not isinstance(outputs, Tensor) or outputs.dim() < 2:
        raise UserError(
            f"the model returns {type(outputs).__name__}; the task needs a tensor "
            "[samples, classes, …]"
        )
    if tuple(targets.shape) != wanted:
        raise UserError(
            f"the targets of a batch are {list(targets.shape)}, "
            f"the model's outputs need {list(wanted)}"
        )


def _check_range(classes: int, targets: Tensor) -> None:
    if targets.is_floating_point():
        raise UserError(f"targets must be whole numbers, got {targets.dtype}")
    low, high = (int(targets.min()), int(targets.max())) if targets.numel() else (0, 0)
    if low < 0 or high >= classes:
        raise UserError(
            f"labels from {low} to {high} do not fit the model's {classes} classes "
            f"(0 to {classes - 1}); set model.arguments, or mend the labels"
        )
