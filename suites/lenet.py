"""The two LeNets on which pruning is compared, for grey images of 28 × 28 pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class LeNet300(nn.Module):
    """LeNet-300-100 (LeCun et al. 1998, section III.C): three dense layers, 266,610 parameters.

    `hidden`: widths of the first two; `inputs`: pixels of an image. Raises ValueError for other
    than two widths, or one below 1.
    """

    def __init__(
        self, hidden: Sequence[int] = (300, 100), inputs: int = 784, classes: int = 10
    ) -> None:
        super().__init__()
        _check("LeNet300: hidden", hidden, (300, 100))
        self.fc1 = nn.Linear(inputs, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, …] with `inputs` values an image → logits [n, classes]."""
        x = functional.relu(self.fc1(torch.flatten(x, 1)))
        logits: Tensor = self.fc3(functional.relu(self.fc2(x)))
        return logits


class LeNet5(nn.Module):
    """Caffe's LeNet-5 (its example lenet.prototxt, after LeCun et al. 1998): 431,080 parameters.

    Unlike there, a ReLU follows the convolutions, too. `channels`: of the two convolutions;
    `hidden`: width of the first dense layer. Raises ValueError for other than two channels, or a
    width below 1.
    """

    def __init__(
        self, channels: Sequence[int] = (20, 50), hidden: int = 500, classes: int = 10
    ) -> None:
        super().__init__()
        _check("LeNet5: channels", channels, (20, 50))
        _check("LeNet5: hidden", [hidden], (500,))
        self.conv1 = nn.Conv2d(1, channels[0], 5)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 5)
        self.fc1 = nn.Linear(channels[1] * 4 * 4, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 1, 28, 28] → logits [n, classes]."""
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = functional.relu(self.fc1(torch.flatten(x, 1)))
        logits: Tensor = self.fc2(x)
        return logits


def _check(what: str, widths: Sequence[int], usual: tuple[int, ...]) -> None:
    """Whether there are as many widths as usual, whole numbers from 1 on."""
    given = list(widths)
    if len(given) != len(usual) or not all(isinstance(w, int) and w >= 1 for w in given):
        example = ", ".join(map(str, usual))
        raise ValueError(
            f"{what} must be {len(usual)} whole number{'s' * (len(usual) > 1)} from 1 on, "
            f"such as {example}; got {', '.join(map(str, given)) or 'none'}"
        )
